"""Two processes that each have everything, against one that accumulates: LISA and updates in the backward.

On a CPU; `tests/gpu/test_two_gpus_cuda.py` has two GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint
from running import ROOT, metrics, train, write_documents
from torch import Tensor

pytestmark = pytest.mark.slow  # processes of their own

LISA: dict[str, object] = {"peft": "lisa", "lisa_r": 2, "lisa_k": 2}
FULL: dict[str, object] = {"train_type": "none"}
KINDS: dict[str, dict[str, object]] = {
    "LISA": LISA,
    "LISA, packed, 8 bits, parked": {**LISA, "quant": 1, "optim": "adamw8bit", "lisa_moments": "park"},
    "LISA, accumulated": {**LISA, "accumulate_grad_batches": 2},
    "fused": {**FULL, "fused_update": 1},
    "fused, bf16": {**FULL, "fused_update": 1, "weights": "bf16"},
}
COMMON: dict[str, object] = {"lr_init": 1e-3, "lr_final": 1e-3, "dataload": "pad", "ctx_len": 64, "epoch_count": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, n_layer=4, dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data") / "documents", [60, 17, 32, 64, 8, 45, 35, 50])


def train_together(folder: Path, stop_after: int = 0, **flags: object) -> str:
    """Runs `tests/replica_of_two.py`; gives what it printed."""
    given = {"accelerator": "cpu", "quant": 0, "plot": 0, **flags} if "resume" not in flags else flags
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/replica_of_two.py"), "--proj_dir", str(folder), *words],
        env={**os.environ, "STOP_AFTER": str(stop_after)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights_in(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def digests(folder: Path) -> list[dict[str, object]]:
    return [json.loads((folder / f"digest-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_and_take_the_steps_of_one_that_accumulates(
    kind: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates in the backward cannot accumulate; under the clip they are the ordinary ones, which can."""
    monkeypatch.setenv("CLIP", "1e9")
    for module in ("module", "fitting"):
        monkeypatch.setattr(f"src.training.{module}.GRADIENT_CLIP", 1e9)
    flags = {"load_model": base, "data_file": data, **COMMON, **KINDS[kind]}
    out = train_together(tmp_path / "two", devices=2, **flags)
    assert "every GPU with a copy of everything" in out
    one, other = digests(tmp_path / "two")
    assert one == other
    assert len(one["tensors"]) > 10  # type: ignore[arg-type]
    accumulated = 2 * int(str(flags.pop("accumulate_grad_batches", 1)))
    flags.pop("fused_update", None)
    train(tmp_path / "one", accumulate_grad_batches=accumulated, **flags)
    lines, expected = (metrics(tmp_path / name) for name in ("two", "one"))
    assert len(lines) == len(expected) > 5
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-2), name
    before, two, accumulated = (
        weights_in(path) for path in (base, *(tmp_path / name / "rwkv-final.pth" for name in ("two", "one")))
    )
    gone = sum(float((accumulated[name].double() - before[name].double()).square().sum()) for name in before)
    apart = sum(float((accumulated[name].double() - two[name].double()).square().sum()) for name in before)
    assert apart < 0.05**2 * gone


@pytest.mark.parametrize("kind", ["LISA, packed, 8 bits, parked", "fused, bf16"])
def test_a_run_of_two_goes_on_with_the_same_bits(kind: str, base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "devices": 2, **COMMON, **KINDS[kind]}
    train_together(tmp_path / "whole", **flags)
    out = train_together(tmp_path / "parts", stop_after=5, **flags)
    assert "stopped by SIGINT" in out
    train_together(tmp_path / "parts", resume=1)
    assert digests(tmp_path / "whole") == digests(tmp_path / "parts")
    whole, parts = (weights_in(tmp_path / name / "rwkv-final.pth") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_gradient_that_is_not_finite_in_one_stops_both(base: Path, data: Path, tmp_path: Path) -> None:
    weights = weights_in(base)
    weights["blocks.1.ffn.value.weight"][0, 0] = 3e38
    torch.save(weights, tmp_path / "spoilt.pth")
    with pytest.raises(AssertionError, match="not finite at step 1"):
        train_together(
            tmp_path / "run", load_model=tmp_path / "spoilt.pth", data_file=data, devices=2, **COMMON, **KINDS["fused"]
        )
