"""Whole runs of full training in bf16 and with updates in the backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_checkpoint, tiny_shape
from running import after_step, assert_same_end, go_on, metrics, refusal, stopped, train, try_train, write_documents
from torch import Tensor

from src.training.saver import RunSaver
from src.training.stopper import Stopper

LENGTHS = [30, 12, 25, 18, 9, 33]
SHAPE = tiny_shape()
FULL: dict[str, object] = {"train_type": "none", "lr_init": 1e-2, "lr_final": 1e-2, "ctx_len": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data") / "documents", LENGTHS)


def weights_in(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


@pytest.fixture
def unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("module", "fitting"):
        monkeypatch.setattr(f"src.training.{module}.GRADIENT_CLIP", 1e9)


@pytest.mark.parametrize(
    ("flags", "grad_cp"),
    [
        ({"optim": "adamw8bit"}, 1),
        ({"weights": "bf16", "weight_decay": 0.1}, 0),
        *(
            pytest.param(flags, grad_cp, marks=pytest.mark.slow)
            for flags in ({"precision": "bf16"}, {"weights": "bf16", "precision": "bf16", "optim": "lion8bit"}, {})
            for grad_cp in (0, 1, 2)
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unclipped")
def test_under_the_clip_fused_updates_are_the_ordinary_ones(
    flags: dict[str, object], grad_cp: int, base: Path, data: Path, tmp_path: Path
) -> None:
    common = {"load_model": base, "data_file": data, "epoch_steps": 4, "epoch_count": 1, "grad_cp": grad_cp, **FULL}
    for fused in (0, 1):
        ended = train(tmp_path / str(fused), fused_update=fused, **common, **flags)
        assert ("clipped by the norm of the step before" in ended.out) == bool(fused)
    one, other = (weights_in(tmp_path / str(fused) / "rwkv-final.pth") for fused in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    before = weights_in(base)
    assert sum(not torch.equal(one[name], before[name]) for name in one) > 0.9 * len(one)
    records = [[(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / str(fused))] for fused in (0, 1)]
    assert records[0] == records[1]


KINDS: dict[str, dict[str, object]] = {
    "fused": {"fused_update": 1, "weight_decay": 0.01},
    "bf16": {"weights": "bf16", "dropout": 0.1},
    "bf16, accumulated": {"weights": "bf16", "accumulate_grad_batches": 2, "epoch_steps": 10},
    "bf16, fused, 8 bits": {"weights": "bf16", "fused_update": 1, "optim": "adamw8bit"},
    "bf16, fused, computed in bf16": {"weights": "bf16", "fused_update": 1, "precision": "bf16"},
}


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("bf16, fused, 8 bits", 3),
        *(pytest.param(kind, step, marks=pytest.mark.slow) for kind in KINDS for step in (1, 5, 8)),
    ],
)
def test_going_on_ends_with_the_same_bits(kind: str, step: int, base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "epoch_steps": 5, "epoch_count": 2, **FULL, **KINDS[kind]}
    train(tmp_path / "whole", **flags)
    stopped(step, tmp_path / "parts", **flags)
    go_on(tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_fresh_model_and_windows(data: Path, tmp_path: Path) -> None:
    sizes = {"n_layer": 2, "n_embd": 32, "head_size_a": 8, "vocab_size": 257, "dataload": "get"}
    flags = {**FULL, **sizes, "ctx_len": 16, "epoch_steps": 12, "epoch_count": 1, "warmup_steps": 0}
    train(tmp_path, data_file=data, weights="bf16", fused_update=1, **flags)
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert losses[-1] < losses[0] - 0.5


def test_a_gradient_that_is_not_finite_stops_before_its_layer_and_the_last_save_is_whole(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Saved after step 3, an epoch; in step 6 layer 0 has a gradient that is not finite, whatever the loss."""
    modules: list[Any] = []
    remember = RunSaver.on_train_start

    def remembering(self: RunSaver, trainer: object, module: object) -> None:
        modules.append(module)
        remember(self, trainer, module)  # type: ignore[arg-type]

    def spoil(stopper: Stopper) -> None:
        modules[0].model.blocks[0].ln2.weight.register_hook(lambda gradient: gradient * float("inf"))

    flags = {"load_model": base, "data_file": data, "epoch_steps": 3, "epoch_count": 4, **FULL, "weights": "bf16"}
    with pytest.MonkeyPatch.context() as patch, after_step(5, spoil):
        patch.setattr(RunSaver, "on_train_start", remembering)
        ended = try_train(tmp_path, fused_update=1, **flags)
    assert ended.code == 2
    assert "the gradient is not finite at step 6" in ended.err
    assert "it was met in blocks.0, which was not updated, nor was what comes after it" in ended.err
    assert "head, ln_out, blocks.1 had been updated" in ended.err
    assert "the weights after step 3, which gave a finite loss and gradient" in ended.err
    good, saved = weights_in(tmp_path / "rwkv-last-good.pth"), weights_in(tmp_path / "rwkv-0.pth")
    assert all(torch.equal(good[name], saved[name]) for name in saved)
    run = torch.load(tmp_path / "rwkv-resume.pth", weights_only=True)
    assert run["steps"] == 3
    assert not (tmp_path / "rwkv-final.pth").exists()


def test_an_error_in_mid_backward_saves_no_half_step(base: Path, data: Path, tmp_path: Path) -> None:
    """Layers that were updated are a step ahead: the run goes on from the save before."""
    modules: list[Any] = []
    remember = RunSaver.on_train_start

    def remembering(self: RunSaver, trainer: object, module: object) -> None:
        modules.append(module)
        remember(self, trainer, module)  # type: ignore[arg-type]

    def fail(gradient: Tensor) -> Tensor:
        raise OSError("the device is gone")

    def spoil(stopper: Stopper) -> None:
        modules[0].model.blocks[0].ln2.weight.register_hook(fail)

    flags = {"load_model": base, "data_file": data, "epoch_steps": 3, "epoch_count": 3, **FULL, "fused_update": 1}
    with pytest.MonkeyPatch.context() as patch, after_step(5, spoil):
        patch.setattr(RunSaver, "on_train_start", remembering)
        with pytest.raises(OSError, match="the device is gone"):
            try_train(tmp_path, **flags)
    assert torch.load(tmp_path / "rwkv-resume.pth", weights_only=True)["steps"] == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            {"fused_update": 1, "accumulate_grad_batches": 2},
            "--accumulate_grad_batches 2 adds several: use --micro_bsz",
        ),
        ({"fused_update": 1, "train_type": "states"}, "--fused_update 1 is for --train_type none, which trains every"),
        ({"weights": "bf16", "peft": "lisa"}, "--weights bf16 is for --train_type none, which trains every weight"),
        ({"weights": "fp16"}, "--weights fp16 is unknown: use one of fp32, bf16"),
    ],
)
def test_refusals(flags: dict[str, object], expected: str, base: Path, data: Path, tmp_path: Path) -> None:
    ended = try_train(tmp_path / "out", load_model=base, data_file=data, **{**FULL, **flags})
    assert expected in refusal(ended, tmp_path / "out")
