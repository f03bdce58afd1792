"""Runs whose device begins with the next step while the host looks at the last one: the same bits, logs and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from binidx_files import write_binidx
from factories import tiny_checkpoint
from running import go_on, metrics, steps_of, stopped, train, try_train, write_documents

from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.training.graphs import GraphedObjective

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

KINDS: dict[str, dict[str, object]] = {
    "states": {"quant": 1, "lr_init": 0.1},
    "lora": {"peft": "lora", "lora_r": 8},
    "lora, accumulated": {"peft": "lora", "lora_r": 8, "accumulate_grad_batches": 2},
    "bone, 8 bits, nf4": {"peft": "bone", "bone_r": 8, "optim": "adamw8bit", "quant": 1},
    "lora and states, stage 1": {"peft": "lora", "train_type": "states", "strategy": "deepspeed_stage_1"},
    "lora, stage 2, accumulated": {"peft": "lora", "strategy": "deepspeed_stage_2", "accumulate_grad_batches": 2},
    "full": {"train_type": "none"},
    "full in bf16, 8 bits": {"train_type": "none", "weights": "bf16", "optim": "adamw8bit"},
    "held out between": {"peft": "lora", "lora_r": 8, "val_steps": 3, "quant": 1},
    "orpo": {"orpo": 1, "orpo_alpha": 0.5, "quant": 1},
    "simpo with lora": {"simpo": 1, "peft": "lora", "lora_r": 8},
}
COMMON: dict[str, object] = {"accelerator": "gpu", "epoch_count": 2, "lr_init": 1e-3, "ctx_len": 128, "micro_bsz": 1}


@pytest.fixture(scope="module")
def base(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, dtype=torch.bfloat16, n_layer=3, n_embd=128, head_size=64)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    write_documents(folder / "documents", [64, 64, 33, 64, 64, 64, 64, 64])
    save_pairs(folder / "pairs.save", [PreferencePair([5 + n] * 16, [60 + n] * 16, [90 + n] * 16) for n in range(8)])
    return {"documents": folder / "documents", "pairs": folder / "pairs.save"}


@pytest.fixture
def gone_on(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every micro-batch, whether the device had begun with it."""
    found: list[bool] = []
    took_up = GraphedObjective._took_up

    def look(self: GraphedObjective, *given: Any) -> bool:
        found.append(took_up(self, *given))
        return found[-1]

    monkeypatch.setattr(GraphedObjective, "_took_up", look)
    return found


def flags_of(kind: str, base: Path, data: dict[str, Path]) -> dict[str, object]:
    pairs = {"orpo", "simpo"} & KINDS[kind].keys()
    documents = {"data_file": data["documents"], "dataload": "pad"}
    given: dict[str, object] = {"rlhf_train_file": data["pairs"]} if pairs else {**documents}
    if "val_steps" in KINDS[kind]:
        given["val_file"] = data["documents"]
    return {"load_model": base, **COMMON, **given, **KINDS[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_no_bit(
    kind: str, base: Path, data: dict[str, Path], tmp_path: Path, gone_on: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = flags_of(kind, base, data)
    train(tmp_path / "at once", **flags)
    assert sum(gone_on) >= 5, "most steps are recorded, and those are begun while their turn has not come"
    monkeypatch.setattr(GraphedObjective, "go_on", lambda self, staged: None)
    gone_on.clear()
    train(tmp_path / "in turn", **flags)
    assert not any(gone_on)
    one, other = (torch.load(tmp_path / name / "rwkv-final.pth") for name in ("at once", "in turn"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert steps_of(tmp_path / "at once") == steps_of(tmp_path / "in turn")


@pytest.mark.parametrize("kind", ["states", "lora and states, stage 1"])
def test_a_stopped_run_goes_on_with_the_same_bits(
    kind: str, base: Path, data: dict[str, Path], tmp_path: Path, gone_on: list[bool]
) -> None:
    flags = flags_of(kind, base, data)
    train(tmp_path / "whole", **flags)
    stopped(7, tmp_path / "parts", **flags)
    go_on(tmp_path / "parts")
    assert any(gone_on)
    one, other = (torch.load(tmp_path / name / "rwkv-final.pth") for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["states", "lora", "lora and states, stage 1"])
def test_a_step_that_is_not_finite_is_not_taken(kind: str, base: Path, tmp_path: Path, gone_on: list[bool]) -> None:
    """A token of the sixth text gives a loss that is not finite, when steps are recorded and the seventh has begun."""
    weights = torch.load(base)
    weights["emb.weight"][200] = 3e38  # finite; the sum of a row, in the norm that follows, is not
    torch.save(weights, tmp_path / "spoilt.pth")
    texts = [[5 + number] * 63 + [0] for number in range(8)]
    texts[5][7] = 200
    write_binidx(tmp_path / "documents", texts)
    flags = flags_of(kind, tmp_path / "spoilt.pth", {"documents": tmp_path / "documents"})
    ended = try_train(tmp_path / "run", **flags, data_shuffle=0)
    assert ended.code == 2
    assert "the loss is not finite at step 6 (document 5 of " in ended.err
    assert "the step was not taken" in ended.err
    assert sum(gone_on) >= 3
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] == 5
