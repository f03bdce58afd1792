"""Variables of launchers that hold no numbers."""

from collections.abc import Mapping

import pytest

from src.cli import given_train_flags
from src.config.environment import check_environment
from src.errors import ConfigError


def refusal(environment: Mapping[str, str]) -> str:
    with pytest.raises(ConfigError) as refused:
        check_environment(environment)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, text) for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS") for text in ("abc", "", " ", "1.5", "-1")),
        *(("LOCAL_RANK", text) for text in ("-1", "٣", "9" * 30, "9" * 5000, "1e3", "0x1", "2147483648")),
        *(("MASTER_PORT", text) for text in ("0", "65536", "http", "")),
        *(("OMP_NUM_THREADS", text) for text in ("abc", "0", "", "1,", "2,x", "-4")),
        ("WORLD_SIZE", "0"),
        ("NODE_RANK", "node-1"),
        ("SLURM_PROCID", "x"),
    ],
)
def test_what_is_no_number_of_its_range_is_refused(name: str, text: str) -> None:
    message = refusal({name: text})
    assert message.startswith(f"the environment variable {name} is '")
    assert "not a whole number from" in message
    assert message.endswith(": unset it, or set it as the launcher would")
    assert len(message) < 300


def test_all_are_named_at_once() -> None:
    message = refusal({"RANK": "a", "WORLD_SIZE": "b", "LOCAL_RANK": "0"})
    assert "RANK is 'a', not a whole number from 0 on; the environment variable WORLD_SIZE is 'b'" in message


def test_what_launchers_set_passes() -> None:
    check_environment({})
    check_environment(
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "4,2"}
    )


@pytest.mark.parametrize("text", ["abc", "", "-1", "1,5", "nan", "9" * 400])
@pytest.mark.parametrize("name", ["TQDM_MININTERVAL", "TQDM_DELAY"])
def test_times_of_progress_bars(name: str, text: str) -> None:
    assert f"{name} is '" in refusal({name: text})
    check_environment({name: "0.5"})


def test_sizes_of_progress_bars() -> None:
    assert "TQDM_NCOLS is '8.5', not a whole number from 0 on" in refusal({"TQDM_NCOLS": "8.5"})
    check_environment({"TQDM_NCOLS": "80", "TQDM_DISABLE": "1"})


def test_command_lines_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "abc")
    with pytest.raises(ConfigError, match="RANK is 'abc'"):
        given_train_flags([])
