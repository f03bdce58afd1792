"""Runs under DeepSpeed's stages on a CPU, through Lightning and alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from binidx_files import write_binidx
from engine_on_cpu import let_engines_take_a_cpu
from factories import tiny_checkpoint
from running import go_on, metrics, stopped, train, try_train, write_documents
from torch import Tensor

from src.checkpoint import open_checkpoint, save_model
from src.training import engine
from src.training.flat_updates import FlatUpdates

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of DeepSpeed, about the CPU
]

COMMON = {"epoch_steps": 6, "epoch_count": 2, "lr_init": 1e-3, "lr_final": 1e-3, "ctx_len": 32}
KINDS: dict[str, dict[str, object]] = {
    "all weights": {"train_type": "none"},
    "all weights in bf16": {"train_type": "none", "weights": "bf16"},
    "lora": {"peft": "lora", "lora_r": 8, "grad_cp": 0, "train_parts": "time,ln"},
    "bone": {"peft": "bone", "bone_r": 8},
    "lora beside states": {"peft": "lora", "lora_r": 8, "train_type": "states", "accumulate_grad_batches": 2},
    "states": {"lr_init": 0.1, "accumulate_grad_batches": 2},
}


@pytest.fixture(autouse=True)
def engine_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    let_engines_take_a_cpu(monkeypatch)


@pytest.fixture(scope="module")
def base(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data") / "documents", [30, 12, 25, 18, 9, 33])


def tensors_in(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
    return tensors


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder) if "loss" in row]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_whole_and_steps_are_those_of_a_single_device(
    kind: str, stage: int, base: Path, data: Path, tmp_path: Path
) -> None:
    flags = {"load_model": base, "data_file": data, "val_file": data, "val_steps": 2, **COMMON, **KINDS[kind]}
    train(tmp_path / "one", **{**flags, "weights": "fp32"} if "weights" in flags else flags)
    ended = train(tmp_path / "stage", strategy=f"deepspeed_stage_{stage}", **flags)
    assert "held out   tuned: loss" in ended.out
    narrow = kind == "all weights in bf16"
    assert ("DeepSpeed has fp32 masters" in ended.out) == narrow
    assert losses_of(tmp_path / "stage") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-2 if narrow else 1e-4)
    for name in ("rwkv-0.pth", "rwkv-1.pth", "rwkv-best.pth", "rwkv-final.pth"):
        one, other = (tensors_in(tmp_path / folder / name) for folder in ("one", "stage"))
        assert {key: (t.shape, t.dtype) for key, t in other.items()} == {k: (t.shape, t.dtype) for k, t in one.items()}
        for key, tensor in other.items():
            torch.testing.assert_close(
                tensor, one[key], rtol=2**-5 if narrow else 2**-7, atol=5e-3 if narrow else 1e-5, msg=key
            )


@pytest.mark.parametrize("optim", ["none", "adamw8bit"])
def test_stage_3_updates_a_few_values_at_a_time(
    optim: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if there were so many weights: the same steps, but for what moments in 8 bits share scales with."""
    flags = {"load_model": base, "data_file": data, "strategy": "deepspeed_stage_3", "optim": optim}
    for name in ("together", "apart"):
        train(tmp_path / name, **flags, **COMMON, **KINDS["all weights"])
        monkeypatch.setattr(engine, "_VALUES_AT_A_TIME", 5000)
    expected, losses = (losses_of(tmp_path / name) for name in ("together", "apart"))
    assert losses == pytest.approx(expected, rel=1e-6 if optim == "none" else 1e-3)
    one, other = (tensors_in(tmp_path / name / "rwkv-final.pth") for name in ("together", "apart"))
    assert one.keys() == other.keys()
    if optim == "none":
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("kind", "stage"), [("all weights", 3), ("lora", 3), ("lora", 1), ("lora", 2)])
def test_a_run_goes_on_with_the_same_bits(kind: str, stage: int, base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "strategy": f"deepspeed_stage_{stage}", **COMMON, **KINDS[kind]}
    train(tmp_path / "whole", **flags)
    stopped(4, tmp_path / "parts", **flags)
    go_on(tmp_path / "parts")
    one, other = (tensors_in(tmp_path / name / "rwkv-final.pth") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_moments_of_another_engine_are_not_left_out(base: Path, data: Path, tmp_path: Path) -> None:
    """Those in 8 bits cannot be taken from a file: a run that would go on without them is refused, and can go on."""
    flags = {"load_model": base, "data_file": data, "optim": "adamw8bit", **COMMON, **KINDS["lora"]}
    train(tmp_path / "whole", **flags)
    stopped(4, tmp_path / "parts", **flags)
    ended = try_train(tmp_path / "parts", resume=1, strategy="deepspeed_stage_1")
    assert ended.code == 2
    assert "--resume 1 cannot go on under deepspeed_stage_1" in ended.err
    assert "leave --strategy and --devices as they were" in ended.err
    go_on(tmp_path / "parts")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


@pytest.mark.parametrize(("stage", "accumulate"), [(1, 1), (1, 2), (2, 2)])
def test_a_loss_that_is_not_finite_stops_before_the_step(
    stage: int, accumulate: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of the embedding is finite, but too large for the norm that follows."""
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(base).items()}
    tensors["emb.weight"][40] = 3e38
    tensors["emb.weight"][40, ::2] = -3e38
    save_model(tmp_path / "poisoned.pth", tensors)
    documents = [[5, 6, 7 + number, 8, 9, 0] for number in range(6)]
    documents[5][2] = 40
    write_binidx(tmp_path / "documents", documents)
    stayed: list[bool] = []
    step = FlatUpdates.step

    def watched(optimizer: FlatUpdates) -> None:
        (whole,) = optimizer.param_groups[0]["params"]
        before = whole.detach().clone()
        step(optimizer)
        stayed.append(torch.equal(whole, before))

    monkeypatch.setattr(FlatUpdates, "step", watched)
    ended = try_train(
        tmp_path / "out",
        load_model=tmp_path / "poisoned.pth",
        data_file=tmp_path / "documents",
        strategy=f"deepspeed_stage_{stage}",
        accumulate_grad_batches=accumulate,
        epoch_count=1,
        **KINDS["bone"],
    )
    assert ended.code == 2
    taken = len(metrics(tmp_path / "out"))
    assert 0 < taken < 6 // accumulate
    assert stayed == [False] * taken + [True]
    assert f"the loss is not finite at step {taken + 1} (document" in ended.err
