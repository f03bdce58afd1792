"""Rows of `tests/bench/bench_step.py`, which only a GPU can time: each is a command that the program takes."""

import argparse
import sys
from pathlib import Path

import pytest
from bench.bench_step import ROWS, SETS, flags_of, in_turn, names_of

from src.adapters.method import method_of
from src.cli import given_train_flags
from src.config import TrainConfig
from src.training.work import prepare_work


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1"])
def test_each_is_a_command(strategy: str, tmp_path: Path) -> None:
    for name, row in ROWS.items():
        if strategy == "deepspeed_stage_1" and ("--fused_update" in row.flags or "lisa" in row.flags):
            continue  # refused with it
        flags = flags_of(row, tmp_path, 3, strategy, [])
        config = TrainConfig.from_flags(given_train_flags(flags))
        assert method_of(config).file_bytes(row.shape()) > 0, name
        if "--peft" in row.flags:
            assert config.method == row.flags[row.flags.index("--peft") + 1], name
        if row.ctx_len == 1024:
            assert prepare_work(config, row.shape()).batches_per_epoch == 3, name


def test_sets_are_of_rows() -> None:
    assert all(set(names) <= set(ROWS) and len(names) > 2 for names in SETS.values())
    assert names_of("lora-7b,adapters")[0] == "lora-7b"
    assert len(names_of("lora-7b,adapters")) == len(SETS["adapters"])
    with pytest.raises(argparse.ArgumentTypeError, match="lora-8b is no row and no set"):
        names_of("lora-8b")


def test_other_flags_take_the_place_of_a_row_s(tmp_path: Path) -> None:
    flags = flags_of(ROWS["lora-7b-8bit"], tmp_path, 3, "auto", ["--optim", "adam"])
    assert flags[-4:-2] == ["--optim", "adam"]
    assert flags.count("--optim") == 1


@pytest.mark.parametrize("apart", [False, True])
def test_one_row_has_the_gpu_at_a_time(apart: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import sys; name = sys.argv[1]; say = lambda word: print(word, name, file=open(sys.argv[2], 'a', 1)); "
        "say('begins'); sys.stdin.readline(); say('turn'); print(name); say('ends')"
    )
    commands = [[sys.executable, "-c", script, name, str(log)] for name in "abc"]
    assert [out.strip() for out, _ in in_turn(commands, apart=apart)] == ["a", "b", "c"]
    events = log.read_text().splitlines()
    if not apart:
        events = [event for event in events if not event.startswith("begins")]
    of_each = ("begins", "turn", "ends") if apart else ("turn", "ends")
    assert events == [f"{event} {name}" for name in "abc" for event in of_each]
