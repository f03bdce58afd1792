"""Held-out data measured while a run goes on (`--val_steps`, `--early_stop`)."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint
from running import (
    PICTURE,
    Ended,
    assert_same_end,
    files_in,
    go_on,
    left_by_run,
    records,
    refusal,
    stopped,
    train,
    try_train,
    write_documents,
)
from tables import some

from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.training import work
from src.training.evaluation import HeldOutLoss

pytestmark = pytest.mark.usefixtures("architecture")

METHODS: dict[str, dict[str, object]] = {
    "states": {"dropout": 0.2},
    "nf4, accumulated": {"quant": 1, "accumulate_grad_batches": 2, "epoch_steps": 12},
    "lora": {"peft": "lora", "lora_r": 4, "lora_dropout": 0.1},
    "lisa": {"peft": "lisa", "lisa_r": 1, "lisa_k": 3},
    "chunks": {"chunk_ctx": 8},
}


@pytest.fixture(scope="module")
def files(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pth`, `documents`, `held-out`, and `pairs.save`."""
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "base.pth", dtype=torch.bfloat16)
    write_documents(folder / "documents", [30, 12, 25, 18, 9, 33])
    write_documents(folder / "held-out", [21, 14])
    pairs = [PreferencePair(list(range(n, 2 * n)), [60 + n] * n, [90 + n] * (n + 1)) for n in range(3, 9)]
    save_pairs(folder / "pairs.save", pairs)
    return folder


def run(files: Path, folder: Path, **flags: object) -> Ended:
    given = {"load_model": files / "base.pth", "val_file": files / "held-out", "epoch_count": 1, "epoch_save": 0}
    data = {} if "rlhf_train_file" in flags else {"data_file": files / "documents"}
    return train(folder, **{**given, **data, **flags})


def measured(folder: Path, label: str | None = None) -> list[dict[str, object]]:
    """Between steps, or those with a label."""
    return [row for row in records(folder) if "held_out" in row and row.get("label") == label]


@pytest.mark.parametrize("name", some(METHODS, "nf4, accumulated", "lora"))
def test_it_changes_no_step(name: str, files: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "without", **METHODS[name])
    ended = run(files, tmp_path / "with", val_steps=2, **METHODS[name])
    one, other = (torch.load(tmp_path / n / "rwkv-final.pth", weights_only=True) for n in ("without", "with"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [row["step"] for row in measured(tmp_path / "with")] == [2, 4, 6]
    assert files_in(tmp_path / "with") == left_by_run("rwkv-0.pth", "rwkv-best.pth")
    assert len(re.findall(r"step \d+: held out loss", ended.err)) == 3
    losses = {row["step"]: row["held_out"]["overall"] for row in measured(tmp_path / "with")}  # type: ignore[index]
    best = min(losses, key=lambda step: losses[step])
    assert f"rwkv-best.pth, after step {best}: loss {losses[best]:.4f}" in ended.out


@pytest.mark.parametrize("flags", some([{}, {"val_steps": 4}, {"val_steps": 2}], {"val_steps": 4}))
def test_both_ends_of_a_run_are_in_its_records_and_its_picture(
    flags: dict[str, object], files: Path, tmp_path: Path
) -> None:
    ended = run(files, tmp_path, plot=1, **flags)
    (before,) = measured(tmp_path, "untuned")
    at_end = measured(tmp_path, "tuned") or measured(tmp_path)[-1:]
    for row, step, said in ((before, 0, "untuned"), (at_end[0], 6, "tuned")):
        assert row["step"] == step
        assert f"held out   {said}: loss {row['held_out']['overall']:.4f}" in ended.out  # type: ignore[index]
    if PICTURE:
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "pip install matplotlib" in ended.out


@pytest.mark.parametrize("loss", some(["orpo", "dpo", "simpo"], "dpo"))
def test_pairs_are_measured_too(loss: str, files: Path, tmp_path: Path) -> None:
    flags = {"rlhf_train_file": files / "pairs.save", "val_file": files / "pairs.save", loss: 1}
    ended = run(files, tmp_path, val_steps=3, **flags)
    assert [row["step"] for row in measured(tmp_path)] == [3, 6]
    assert "best       " in ended.out


def test_the_best_is_what_gave_the_best_figure(files: Path, tmp_path: Path) -> None:
    """And the figure is that of a run which begins from it."""
    ended = run(files, tmp_path / "one", val_steps=1, epoch_count=2, lr_init=3, lr_final=3)
    told = re.search(r"rwkv-best\.pth, after step (\d+): (loss .*)", ended.out)
    assert told is not None
    again = run(files, tmp_path / "two", load_state=tmp_path / "one" / "rwkv-best.pth", epoch_steps=1)
    rounded = re.search(r"loaded: loss ([\d.]+)", again.out)
    first = re.search(r"loss ([\d.]+)", told[2])
    assert rounded is not None
    assert first is not None
    assert float(rounded[1]) == pytest.approx(float(first[1]), rel=1e-3)  # the file is bf16


def test_a_run_that_gets_no_better_ends(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 1.5, 1.6, 1.7, 1.8])  # untuned, after four steps, at the end

    def measure(*_: object, **__: object) -> HeldOutLoss:
        return HeldOutLoss(next(losses), math.nan, math.nan, targets=33, documents=2)

    monkeypatch.setattr(work, "held_out_loss", measure)
    ended = run(files, tmp_path, val_steps=1, early_stop=2, epoch_count=2)
    assert [(row["step"], row["best"]) for row in measured(tmp_path)] == [(1, True), (2, True), (3, False), (4, False)]
    assert "rwkv-best.pth, after step 2: loss 1.5000" in ended.out
    assert "ended after 2 measurements without a better one" in ended.out
    assert not files_in(tmp_path) & {"rwkv-resume.pth", "rwkv-resume-previous.pth"}


def test_a_stopped_run_goes_on_to_the_same_best(files: Path, tmp_path: Path) -> None:
    flags = {"val_steps": 2, "early_stop": 3, "epoch_count": 2, "lr_init": 5, "lr_final": 5, "epoch_save": 1}
    run(files, tmp_path / "whole", **flags)
    given = {"load_model": files / "base.pth", "data_file": files / "documents", "val_file": files / "held-out"}
    stopped(5, tmp_path / "two", **given, **flags)
    go_on(tmp_path / "two")
    assert_same_end(tmp_path / "whole", tmp_path / "two")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"val_steps": 5}, "--val_steps 5 has nothing to measure"),
        ({"early_stop": 2}, "--early_stop 2 counts measurements of --val_steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: dict[str, object], said: str, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    given = {"load_model": files / "base.pth", "data_file": files / "documents"}
    assert said in refusal(try_train(folder, **given, **flags), folder)


def test_a_run_that_falls_apart_is_warned_of(files: Path, tmp_path: Path) -> None:
    flags = {"lr_init": 3000, "lr_final": 3000, "warmup_steps": 0, "epoch_steps": 60}
    ended = run(files, tmp_path, **flags)
    assert "note: --lr_init 3000 is above the usual 0.01 to 50 of states" in ended.out
    assert ended.err.count("warning: the states grow out of bounds") == 1
    assert "begin again with less than --lr_init 3000" in ended.err
