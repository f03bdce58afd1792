"""Whole layers on a GPU: LISA, bf16 weights, and updates in the backward."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint, tiny_shape
from running import go_on, metrics, stopped, train, write_documents
from torch import Tensor

from src.adapters.lisa import Draw
from src.ops.stochastic import round_stochastically

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LAYERS = 4
SIZES = {"n_layer": LAYERS, "n_embd": 128, "head_size": 64}
SHAPE = tiny_shape(**SIZES)
COMMON: dict[str, object] = {"accelerator": "gpu", "lr_init": 1e-3, "lr_final": 1e-3, "warmup_steps": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, dtype=torch.bfloat16, **SIZES)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data") / "documents", [200, 33, 64, 129, 16, 90])


def weights_in(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def apart(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far two results are apart, as a share of how far one went."""
    between = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    gone = sum(float((one[name].double() - start[name].double()).square().sum()) for name in one)
    return math.sqrt(between / gone)


@pytest.mark.parametrize("optim", ["none", "adamw8bit", "paged_adamw8bit"])
@pytest.mark.parametrize(("quant", "moments", "grad_cp"), [(0, "drop", 1), (1, "park", 1), (1, "drop", 2)])
def test_lisa_changes_what_has_its_turn(
    quant: int, moments: str, grad_cp: int, optim: str, base: Path, data: Path, tmp_path: Path
) -> None:
    flags = {"peft": "lisa", "lisa_r": 2, "lisa_k": 3, "lisa_moments": moments, "quant": quant, "grad_cp": grad_cp}
    train(tmp_path, load_model=base, data_file=data, epoch_steps=3, epoch_count=4, optim=optim, **{**COMMON, **flags})
    files = [weights_in(path) for path in (base, *(tmp_path / f"rwkv-{n}.pth" for n in range(4)))]
    places: tuple[int, ...] = ()
    for period, (before, after) in enumerate(itertools.pairwise(files)):
        places = Draw(2, 3, 42).after(places, period, LAYERS)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        allowed = {name for name in before if name.startswith(tuple(f"blocks.{layer}." for layer in places))}
        assert changed <= allowed | {"emb.weight", "head.weight"}
        assert {name for name in allowed if name in SHAPE.matrix_names()} <= changed
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("optim", ["none", "adamw8bit"])
def test_lisa_goes_on(optim: str, base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "epoch_steps": 5, "epoch_count": 2, "optim": optim, **COMMON}
    flags |= {"peft": "lisa", "lisa_r": 2, "lisa_k": 3, "lisa_moments": "park", "quant": 1}
    train(tmp_path / "whole", **flags)
    stopped(7, tmp_path / "parts", **flags)
    go_on(tmp_path / "parts")
    one, other = (weights_in(tmp_path / name / "rwkv-final.pth") for name in ("whole", "parts"))
    assert apart(one, other, weights_in(base)) < 0.05


def test_rounding_is_right_in_the_mean() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(2)).cuda()
    generator = torch.Generator("cuda").manual_seed(1)
    wide = values.repeat(20_000, 1)
    target = torch.empty_like(wide, dtype=torch.bfloat16)
    round_stochastically(target, wide, generator)
    error = values.abs() * 2**-7 / math.sqrt(20_000)
    assert bool(((target.double().mean(0) - values).abs() < 2.5 * error).all())
    again = torch.empty_like(target)
    round_stochastically(again, wide, generator.manual_seed(1))
    assert torch.equal(again, target)


@pytest.mark.parametrize("optim", ["none", "adamw8bit", "paged_adamw8bit"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_updates_in_the_backward_are_the_ordinary_ones(
    weights: str, optim: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("module", "run"):
        monkeypatch.setattr(f"src.training.{module}.GRADIENT_CLIP", 1e9)
    flags = {"load_model": base, "data_file": data, "epoch_steps": 6, "epoch_count": 1, "train_type": "none", **COMMON}
    for fused in (0, 1):
        train(tmp_path / str(fused), fused_update=fused, weights=weights, optim=optim, **flags)
    one, other = (weights_in(tmp_path / str(fused) / "rwkv-final.pth") for fused in (0, 1))
    assert apart(one, other, weights_in(base)) < 0.05
    losses = [[row["loss"] for row in metrics(tmp_path / str(fused))] for fused in (0, 1)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_bf16_weights_learn_what_fp32_ones_do(base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "epoch_steps": 30, "epoch_count": 1, "train_type": "none", **COMMON}
    train(tmp_path / "fp32", **flags)
    train(tmp_path / "bf16", weights="bf16", fused_update=1, optim="adamw8bit", **flags)
    ends = {name: sum(row["loss"] for row in metrics(tmp_path / name)[-6:]) / 6 for name in ("fp32", "bf16")}
    begin = metrics(tmp_path / "fp32")[0]["loss"]
    assert begin - ends["bf16"] > 0.9 * (begin - ends["fp32"])
