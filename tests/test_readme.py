"""README says what is so: its flag table, its commands, the files it names."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from src.cli import given_flags, given_merge_flags, given_state_flags, given_train_flags
from src.config import (
    STATE_COMMANDS,
    UNDERSTOOD,
    UNSUPPORTED,
    ChatConfig,
    MergeConfig,
    PairConfig,
    RejectConfig,
    TrainConfig,
)
from src.config.model import METHOD_DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACES = {
    "train.py", "merge_state.py", "PrepareOrpoDataset.py", "rlhf_generate_reject.py", "python -m src.commands.state",
    "python -m src.commands.chat",
}  # fmt: skip


def flag_table() -> list[tuple[str, str]]:
    """(flag, default) of the rows of train.py's table."""
    section = README.partition("\n## Flags of train.py\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `--(\w+)` \| ([^|]*?) ?\|", section, re.MULTILINE)


def commands() -> list[str]:
    """Lines of code blocks that call one of the scripts, continued lines joined."""
    joined = README.replace("\\\n", " ")
    blocks = [line.strip() for line in joined.splitlines() if line.startswith("    ")]
    return [line for line in blocks if any(place in line for place in PLACES)]


def test_the_flag_table_is_complete_and_in_order() -> None:
    fields = {spec.name: spec.default for spec in dataclasses.fields(TrainConfig)}
    assert [name for name, _ in flag_table()] == list(fields)
    for name, shown in flag_table():
        assert shown.strip("` ") in ("", str(fields[name])), name


def test_every_flag_it_names_exists() -> None:
    known = {*TrainConfig.__dataclass_fields__, *UNSUPPORTED, *UNDERSTOOD}
    for config in (RejectConfig, PairConfig, MergeConfig, ChatConfig, *STATE_COMMANDS.values()):
        known |= set(config.__dataclass_fields__)
    named = re.findall(r"`--(\w+)(\*?)", README)
    unknown = [
        name for name, star in named if name not in known and not (star and any(k.startswith(name) for k in known))
    ]
    assert unknown == []


@pytest.mark.parametrize("command", [c for c in commands() if "train.py" in c and "&&" not in c])
def test_its_training_commands_are_accepted(command: str) -> None:
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    given = given_train_flags(words)
    if not {"demo", "resume"} & given.keys():  # which bring flags of their own
        TrainConfig.from_flags(given)


@pytest.mark.parametrize("command", [c for c in commands() if "merge_state.py" in c])
def test_its_merging_commands_are_accepted(command: str) -> None:
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "merge_state.py")
    MergeConfig.from_flags(given_merge_flags(words))


@pytest.mark.parametrize("command", [c for c in commands() if "src.commands.state" in c])
def test_its_commands_of_the_state_tool_are_accepted(command: str) -> None:
    name, given = given_state_flags(shlex.split(command)[3:])
    STATE_COMMANDS[name].from_flags(given)


@pytest.mark.parametrize("command", [c for c in commands() if "src.commands.chat" in c])
def test_its_chats_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["chat", *shlex.split(command)[3:]])
    ChatConfig.from_flags(given_flags(ChatConfig, "chat", ""))


def test_it_shows_a_chat_and_every_command_of_the_state_tool() -> None:
    shown = [shlex.split(command)[3] for command in commands() if "src.commands.state" in command]
    assert set(shown) == set(STATE_COMMANDS)
    assert any("src.commands.chat" in command for command in commands())


def test_the_two_commands_of_the_first_screen() -> None:
    first_screen = README[:2500]
    assert "pip install -r requirements.txt && python train.py\n" in first_screen
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n" in first_screen
    runner = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "-r requirements.txt -r tests/requirements.txt" in runner
    assert " python -m pytest " in runner


def test_the_files_it_names_exist() -> None:
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    named |= set(re.findall(r"`((?:src|tests|cuda)/[\w./-]+)`", README))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_table_of_defaults_by_method_is_true() -> None:
    def row(label: str) -> list[str]:
        line = next(line for line in README.splitlines() if line.startswith(f"| {label} |"))
        return [cell.strip() for cell in line.split("|")[2:5]]

    columns = [["states"], ["lora", "pissa", "bone", "bat"], ["full"]]
    for cells, names in ((row("`--lr_init`, `--lr_final`"), ("lr_init", "lr_final")), (row("`--quant`"), ("quant",))):
        for cell, methods in zip(cells, columns, strict=True):
            shown = [float(number) for number in re.split("[;(]", cell)[0].split(",")]
            assert all(shown == [METHOD_DEFAULTS[method][name] for name in names] for method in methods)
    parts = {method: METHOD_DEFAULTS[method]["train_parts"] for methods in columns for method in methods}
    assert row("`--train_parts`") == ["none", parts["lora"], "all"]
    assert {parts["states"], parts["full"]} == {""}
    assert all(defaults["dataload"] == "pack" for defaults in METHOD_DEFAULTS.values())
    assert TrainConfig.warmup_steps == 10
