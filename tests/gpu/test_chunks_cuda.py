"""Rows in chunks on a GPU in bf16: gradients, where memories wait, and memory that does not grow with a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import tiny_checkpoint, tiny_parameters, tiny_shape, tiny_states
from running import metrics, train, write_documents
from torch import Tensor

from src.data.batches import Batch, packed_batch
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.parking import Parking
from src.model.recompute import Recompute
from src.training.chunk_graphs import ChunkRecorder
from src.training.chunks import ChunkedObjective, ChunkOptions
from src.training.objectives import SFTObjective, outcome_of

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SIZES: dict[str, Any] = {"n_layer": 3, "n_embd": 128, "head_size": 64}
SHAPE = tiny_shape(**SIZES)
PLACES = {
    "device": {},
    "host": {"on_host": True},
    "inputs": {"on_host": True, "with_inputs": True},
}


def model_of(dtype: torch.dtype, recompute: Recompute = Recompute.ALL, quant_type: str | None = None) -> LanguageModel:
    options = LoadOptions(torch.device("cuda"), dtype, quant_type=quant_type)
    model = build_model({**tiny_parameters(SHAPE, seed=1), **tiny_states(SHAPE, seed=2)}, SHAPE, options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("time_" in name or ".ln" in name)
    model.set_recomputation([recompute] * SHAPE.n_layer, keep_dequantized=recompute is Recompute.ALL)
    return model


def documents(*lengths: int) -> Batch:
    generator = np.random.default_rng(1)
    tokens = [generator.integers(1, SHAPE.vocab_size, length + 1) for length in lengths]
    return packed_batch(tokens, [None] * len(lengths), range(len(lengths)))


def gradients(model: LanguageModel, objective: Any, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    outcome_of(objective, model, objective.stage(model, batch)).loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_chunks_are_as_close_to_fp32_as_whole_rows(quant_type: str | None, recompute: Recompute, place: str) -> None:
    """At most twice the error of the whole row in bf16, plus 2 % of the gradient's norm (see test_recompute_cuda)."""
    batch = documents(300, 40, 1, 170)
    exact = gradients(model_of(torch.float32, quant_type=quant_type), SFTObjective(), batch)
    model = model_of(torch.bfloat16, recompute, quant_type)
    whole = gradients(model, SFTObjective(), batch)
    found = gradients(model, ChunkedObjective(SFTObjective(), ChunkOptions(64, **PLACES[place])), batch)
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        allowed = 2 * (whole[name] - expected).norm() + 0.02 * expected.norm()
        assert (found[name] - expected).norm() <= allowed, name


def test_it_does_not_matter_where_memories_wait() -> None:
    batch, model = documents(300, 40, 1, 170), model_of(torch.bfloat16)
    on_device, on_host = (
        gradients(model, ChunkedObjective(SFTObjective(), ChunkOptions(64, **PLACES[place])), batch)
        for place in ("device", "host")
    )
    assert all(torch.equal(on_device[name], on_host[name]) for name in on_device)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_peak_memory_does_not_grow_with_the_row(place: str, recorded: bool) -> None:
    model = model_of(torch.bfloat16)
    recorder = ChunkRecorder(model, 1024, by_layer=place == "inputs") if recorded else None
    chunked = ChunkedObjective(SFTObjective(), ChunkOptions(1024, **PLACES[place]), recorder)
    peaks = []
    for tokens in (4096, 32768):
        gradients(model, chunked, documents(tokens))  # what is made once
        torch.cuda.reset_peak_memory_stats()
        gradients(model, chunked, documents(tokens))
        peaks.append(torch.cuda.max_memory_allocated())
    of_targets = 2 * 28 * 1024 * 40  # places, targets, scores and their gradients
    memories = 28 * SHAPE.memory_bytes(2) if place == "device" else 0
    assert peaks[1] - peaks[0] <= memories + of_targets


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"peft": "lora", "lora_r": 8, "lr_init": 1e-3},
        {"train_type": "infctx", "lr_init": 1e-4},
        {"strategy": "deepspeed_stage_1"},
    ],
    ids=["states", "lora", "infctx", "deepspeed"],
)
def test_runs_in_chunks_see_the_losses_of_runs_without(flags: dict[str, object], tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth", dtype=torch.bfloat16, **SIZES)
    data = write_documents(tmp_path / "data", [700, 300, 90, 500])
    common = {
        "load_model": tmp_path / "base.pth", "data_file": data, "ctx_len": 1024, "dataload": "pack",
        "accelerator": "gpu", "epoch_count": 2, "lr_init": 0.1, **flags,
    }  # fmt: skip
    # infctx brings chunks of its own; --train_type none is the same without.
    whole = {**common, **({"train_type": "none"} if flags.get("train_type") else {})}
    train(tmp_path / "whole", **whole)
    for keep in ("device", "inputs"):
        train(tmp_path / keep, **common, chunk_ctx=256, chunk_keep=keep)
        for one, other in zip(metrics(tmp_path / keep), metrics(tmp_path / "whole"), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)


def test_what_is_parked_comes_back_while_the_gpu_is_busy() -> None:
    """Each tensor is overwritten as soon as its memory may be used again, and fetched into memory that was in use."""
    device = torch.device("cuda")
    parking = Parking(device)
    work = torch.randn(2048, 2048, device=device)
    parked = []
    for value in range(20):
        work @ work  # something that the copy is beside
        parked.append(parking.park(torch.full((1 << 20,), float(value), device=device)))
    parking.settle()
    for value in reversed(range(20)):
        torch.full((1 << 20,), -1.0, device=device)
        coming = parking.fetch(parked[value])
        work @ work
        assert bool((coming.arrived() == value).all())
