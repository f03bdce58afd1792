"""What a run takes, by part: against measured runs, against models that are there, and what fits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from factories import ARCHITECTURES, tiny_parameters, tiny_shape

from src.adapters.method import method_of
from src.config import TrainConfig
from src.loading import LoadOptions, build_model
from src.model.rwkv6 import RWKV6Shape
from src.model.rwkv7 import RWKV7Shape
from src.model.shape import ModelShape
from src.training import estimate
from src.training.estimate import MemoryEstimate, estimate_memory, largest_that_fit, positions_of

GIB = 2**30
SIZES = {
    "1.6b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096), "14b": (61, 4096),
    "1.5b": (24, 2048), "2.9b": (32, 2560), "7.2b": (32, 4096), "13.3b": (61, 4096),
}  # fmt: skip
OF_RWKV7 = {
    "1.5b": (96, 96, 64, 256), "2.9b": (96, 96, 64, 320), "7.2b": (128, 128, 96, 480), "13.3b": (192, 192, 128, 384),
}  # fmt: skip
"""Widths of the maps to decay, rate, value residual and gate, as published."""
STAGE_1 = {"strategy": "deepspeed_stage_1"}
LORA, BONE, BAT, LISA = ({"peft": name} for name in ("lora", "bone", "bat", "lisa"))
DENSE: dict[str, object] = {"quant": 0}
PACKED: dict[str, object] = {"quant": 1}
SMALL = {"optim": "adamw8bit"}
NARROW = {"train_type": "none", "weights": "bf16", "fused_update": 1, **SMALL}
MEASURED: list[tuple[str, int, dict[str, object], float, float]] = [
    ("1.6b", 1024, {**STAGE_1}, 1.28, 1.84),
    ("3b", 1024, {**STAGE_1}, 2.22, 2.84),
    ("7b", 1024, {**STAGE_1}, 5.00, 5.70),
    ("7b", 1024, {**STAGE_1, "quant_head": 1}, 0, 5.20),
    ("14b", 1024, {**STAGE_1}, 8.73, 9.56),
    ("7b", 4096, {**STAGE_1}, 6.39, 7.15),
    ("1.6b", 1536, {**STAGE_1}, 1.37, 1.96),
    ("7b", 1536, {**STAGE_1}, 5.13, 5.82),
    ("14b", 1536, {**STAGE_1}, 8.97, 9.79),
    ("1.6b", 1024, {}, 1.25, 1.83),
    ("3b", 1024, {}, 2.18, 2.75),
    ("7b", 1024, {}, 4.93, 5.61),
    ("14b", 1024, {}, 8.51, 9.15),
    ("7b", 4096, {}, 6.20, 6.99),
    ("7b", 1536, {"orpo": 1}, 5.16, 5.89),
    ("7b", 1536, {"dpo": 1}, 5.16, 5.89),
    ("7b", 1536, {"simpo": 1}, 0, 5.91),
    ("14b", 1536, {"orpo": 1}, 8.85, 9.56),
    ("3b", 1024, {"quant_type": "fp4"}, 2.18, 2.79),
    ("7b", 1024, {"quant_type": "fp4"}, 4.93, 5.56),
    ("14b", 1024, {"quant_type": "fp4"}, 8.51, 9.17),
    ("1.6b", 1024, {"quant_type": "int8"}, 1.86, 2.40),
    ("3b", 1024, {"quant_type": "int8"}, 3.45, 4.02),
    ("7b", 1024, {"quant_type": "int8"}, 8.18, 8.80),
    ("14b", 1024, {"quant_type": "int8"}, 14.70, 15.35),
    ("1.6b", 1024, {**LORA, **DENSE}, 4.23, 4.83),
    ("1.6b", 1024, {**LORA, **DENSE, **STAGE_1}, 4.36, 5.14),
    ("7b", 1024, {**LORA, **DENSE, **STAGE_1}, 18.66, 20.08),
    ("3b", 1024, {**LORA, **DENSE, **STAGE_1}, 8.09, 9.12),
    ("7b", 1024, {**LORA, **DENSE}, 18.35, 18.98),
    ("7b", 8192, {**LORA, **DENSE, **SMALL}, 19.65, 21.32),
    ("1.6b", 1024, {**LORA, **PACKED}, 0, 3.14),
    ("3b", 1024, {**LORA, **PACKED}, 4.14, 4.72),
    ("7b", 1024, {**LORA, **PACKED}, 8.84, 9.41),
    ("7b", 8192, {**LORA, **PACKED}, 11.73, 12.59),
    ("14b", 1024, {**LORA, **PACKED}, 15.90, 16.52),
    ("7b", 1024, {**LORA, **DENSE, **SMALL}, 16.57, 17.59),
    ("7b", 1024, {**LORA, **PACKED, **SMALL}, 7.19, 7.77),
    ("14b", 1024, {**LORA, **PACKED, **SMALL}, 12.76, 13.39),
    ("7b", 1024, {"peft": "pissa", **DENSE}, 18.35, 19.80),
    ("7b", 1024, {**BONE, **DENSE}, 16.87, 17.53),
    ("7b", 1024, {**BONE, **DENSE, **STAGE_1}, 17.18, 18.79),
    ("7b", 1024, {**LORA, **PACKED, **STAGE_1}, 9.14, 9.79),
    ("7b", 1024, {**BAT, **PACKED, **STAGE_1}, 7.84, 8.48),
    ("7b", 1024, {**BONE, **PACKED}, 7.49, 8.06),
    ("7b", 1024, {**BAT, **PACKED}, 7.56, 8.16),
    ("1.6b", 1024, {"train_type": "none"}, 23.90, 25.12),
    ("1.6b", 1024, {**NARROW}, 6.58, 7.12),
    ("3b", 1024, {**NARROW}, 0, 12.95),
    ("7b", 1024, {**NARROW, "optim": "paged_adamw8bit"}, 0, 16.23),
    ("7b", 1024, {**LISA, **PACKED}, 19.30, 20.36),
    ("7b", 1024, {**LISA, **PACKED, **SMALL}, 13.85, 14.90),
    ("7b", 1024, {**LISA, **PACKED, **SMALL, "train_parts": "[]"}, 9.34, 10.32),
    ("1.5b", 1024, {}, 1.29, 1.89),
    ("2.9b", 1024, {}, 2.23, 2.83),
    ("7.2b", 1024, {}, 4.93, 5.58),
    ("13.3b", 1024, {}, 8.57, 9.22),
    ("7.2b", 4096, {}, 6.42, 7.24),
    ("13.3b", 1536, {"orpo": 1}, 8.96, 9.61),
    ("7.2b", 1024, {**LORA, **PACKED}, 9.73, 10.39),
    ("1.5b", 1024, {**LORA, **DENSE}, 0, 4.86),
    ("1.5b", 1024, {**NARROW}, 0, 6.94),
]
"""README's tables "Memory and time": size, positions, flags, GiB at the allocator's peak (where it is told) and used.

The row with a packed head is older than the time mix's own dense matrices, which take 0.17 GiB.
"""
HELD_TWICE: list[tuple[str, int, dict[str, object], float]] = [
    ("7b", 1536, {"orpo": 1}, 5.82),
    ("7b", 1024, {**LORA, **DENSE, **SMALL}, 18.58),
    ("7b", 1024, {**LORA, **PACKED, **SMALL}, 9.06),
    ("7b", 1024, {**LISA, **PACKED, **SMALL, "train_parts": "[]"}, 11.99),
]
"""README's rows of 17d1001: a run then held gradients of the step before beside its recording's."""


def config(**flags: object) -> TrainConfig:
    given = {"load_model": "m.pth", "data_file": "data", **flags}
    return TrainConfig.from_flags({name: str(value) for name, value in given.items()})


def shape_of(size: str) -> ModelShape:
    layers, channels = SIZES[size]
    if size in OF_RWKV7:
        return RWKV7Shape(layers, channels, channels, 4 * channels, 65536, channels // 64, 64, *OF_RWKV7[size])
    return RWKV6Shape.from_sizes(n_layer=layers, n_embd=channels, vocab_size=65536, double_extra_dim=channels == 4096)


def on_gpu(made: TrainConfig, shape: Any, positions: int, **more: Any) -> MemoryEstimate:
    return estimate_memory(made, method_of(made), shape, on_gpu=True, itemsize=2, positions=positions, **more)


@pytest.mark.parametrize(("size", "positions", "flags", "peak", "used"), MEASURED)
def test_it_is_what_runs_on_gpus_took(
    size: str, positions: int, flags: dict[str, object], peak: float, used: float
) -> None:
    made = config(**flags)
    found = on_gpu(made, shape_of(size), positions)
    assert found.total / GIB == pytest.approx(used, rel=0.1)
    if peak:
        assert found.allocated / GIB == pytest.approx(peak, rel=0.03 if made.has_engine else 0.015)


@pytest.mark.parametrize(("size", "positions", "flags", "used"), HELD_TWICE)
def test_and_with_gradients_held_twice(size: str, positions: int, flags: dict[str, object], used: float) -> None:
    found = on_gpu(config(**flags), shape_of(size), positions)
    assert (found.total + found.parts[estimate.GRADIENTS]) / GIB == pytest.approx(used, rel=0.05)


WITH_MASTERS: list[tuple[str, dict[str, object], float, float]] = [
    ("7b", {**LORA, **DENSE}, 19.63, 21.17),
    ("1.6b", {**LORA, **DENSE}, 4.64, 5.36),
    ("7b", {**BONE, **DENSE}, 17.95, 19.55),
    ("7b", {**LORA, **PACKED}, 10.24, 10.83),
]
"""Peak and used under DeepSpeed's stage 1 on an H100 at 6329bf0, which had masters of 4 bytes a value."""


@pytest.mark.parametrize(("size", "flags", "peak", "used"), WITH_MASTERS)
def test_what_engines_hold_of_adapters(size: str, flags: dict[str, object], peak: float, used: float) -> None:
    """Gradients in one whole, beside all that layers keep; of values, gradients and moments nothing twice."""
    found = on_gpu(config(**STAGE_1, **flags), shape_of(size), 1024)
    masters = found.parts[estimate.GRADIENTS]
    assert (found.allocated + masters) / GIB == pytest.approx(peak, rel=0.01)
    assert (found.total + masters) / GIB == pytest.approx(used, rel=0.1)


IN_CHUNKS: list[tuple[str, int, dict[str, object], float, float]] = [
    ("7b", 2048, {"chunk_keep": "host"}, 5.56, 6.35),
    ("7b", 4096, {"chunk_keep": "host"}, 6.55, 7.44),
    ("7b", 640, {"chunk_keep": "host", "grad_cp": 0}, 6.79, 7.60),
    ("7b", 4096, {"chunk_keep": "inputs"}, 5.58, 6.45),
    ("1.6b", 2048, {"chunk_keep": "host", "grad_cp": 0}, 3.93, 4.59),
    ("1.6b", 4096, {"chunk_keep": "host"}, 1.96, 2.67),
    ("1.6b", 2048, {**LORA, **DENSE, "grad_cp": 0}, 8.92, 9.67),
    ("1.6b", 1024, {**LORA, **DENSE, "grad_cp": 0}, 6.20, 7.06),
    ("1.6b", 4096, {**LORA, **DENSE}, 4.50, 5.29),
    ("1.6b", 4096, {**LORA, **DENSE, "chunk_keep": "inputs"}, 4.14, 4.87),
]
"""Rows of 16,384 tokens in recorded chunks of so many, without an optimizer (bench_chunks.py, an H100, 2026-11-26)."""


@pytest.mark.parametrize(("size", "tokens", "flags", "peak", "used"), IN_CHUNKS)
def test_it_is_what_rows_in_chunks_took(
    size: str, tokens: int, flags: dict[str, object], peak: float, used: float
) -> None:
    made = config(ctx_len=16384, chunk_ctx=tokens, dataload="pad", **flags)
    positions, memories = positions_of(made)
    found = on_gpu(made, shape_of(size), positions, memories=memories, records=True)
    moments = found.parts[estimate.MOMENTS]
    assert (found.allocated - moments) / GIB == pytest.approx(peak, rel=0.06)
    assert (found.total - moments) / GIB == pytest.approx(used, rel=0.06)


@pytest.mark.parametrize("flags", [{}, {"quant_head": 1}, {"quant": 0}, {"peft": "lora", "lora_r": 4, "quant": 1}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_stands_is_counted_to_the_byte(flags: dict[str, object], architecture: str) -> None:
    """Weights, head and values of a model on a CPU; packed scales come in whole blocks."""
    shape = tiny_shape(n_layer=3, n_embd=256, head_size=64, architecture=architecture)
    made = config(**flags)
    method = method_of(made)
    options = LoadOptions(
        torch.device("cpu"),
        torch.float32,
        made.quant_type if made.quantised else None,
        bool(made.quant_head),
        trained=frozenset(method.trained_names(shape)),
        adapters=method.adapters,
    )
    model = build_model(tiny_parameters(shape), shape, options)
    table = model.emb.host_table
    tensors = [*model.parameters(), *model.buffers(), *([] if table is None else [table])]
    there = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    found = estimate_memory(made, method, shape, on_gpu=False, itemsize=4, positions=1)
    counted = sum(found.parts.get(name, 0) for name in (estimate.WEIGHTS, estimate.HEAD, estimate.VALUES))
    copies = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad) if method.small else 0
    assert counted - copies == pytest.approx(there, rel=0.01)


METHODS: list[dict[str, object]] = [
    {}, {"peft": "lora", "lora_r": 4}, {"peft": "lisa"}, {"train_type": "none"}, {"orpo": 1}, {"chunk_ctx": 64},
    {"grad_cp": 0}, {"peft": "bone", "bone_r": 4, "quant": 1, "optim": "adamw8bit"},
    {"train_type": "none", "weights": "bf16", "fused_update": 1},
    {"chunk_ctx": 64, "chunk_keep": "host"}, {"micro_bsz": 3, "dataload": "pad"},
    {"strategy": "deepspeed_stage_2_offload"},
]  # fmt: skip


@pytest.mark.parametrize("flags", METHODS)
@pytest.mark.parametrize("gpu", [True, False])
def test_every_method_has_parts_that_grow_with_the_rows(flags: dict[str, object], gpu: bool) -> None:
    shape, made = tiny_shape(n_layer=4), config(**flags)
    method = method_of(made)

    def total(of: TrainConfig) -> float:
        positions, memories = positions_of(of)
        found = estimate_memory(
            of,
            method,
            shape,
            on_gpu=gpu,
            itemsize=2,
            positions=positions,
            memories=memories,
            evaluates=estimate.EVALUATED_TOKENS,
        )
        assert all(part > 0 and math.isfinite(part) for part in found.parts.values())
        return found.total

    length = "rlhf_max_corpus_len" if made.preference else "ctx_len"
    smaller, larger = (
        total(dataclasses.replace(made, **{length: size}))
        for size in (128, 4096)  # type: ignore[arg-type]
    )
    on_host = made.chunk_ctx and made.chunk_keep == "host"
    assert smaller == larger if on_host and made.dataload != "pack" else smaller <= larger
    limit = (smaller + larger) / 2 + 1
    largest = largest_that_fit(made, total, limit)
    if not on_host:
        assert total(dataclasses.replace(made, **{length: largest.ctx_len})) <= limit  # type: ignore[arg-type]
        assert total(dataclasses.replace(made, **{length: largest.ctx_len + largest.ctx_len // 100 + 2})) > limit  # type: ignore[arg-type]
    assert largest_that_fit(made, total, 1.0) == estimate.Largest(0, 0)


def test_positions_of_full_rows() -> None:
    assert positions_of(config(ctx_len=100, micro_bsz=3)) == (300, 0)
    assert positions_of(config(ctx_len=100, micro_bsz=3, dataload="pad")) == (300, 0)
    assert positions_of(config(ctx_len=100, micro_bsz=3, chunk_ctx=64)) == (64, 4)
    assert positions_of(config(ctx_len=100, micro_bsz=3, dataload="pad", chunk_ctx=64)) == (192, 3)
    assert positions_of(config(orpo=1, rlhf_max_corpus_len=50, micro_bsz=2)) == (300, 0)
    assert positions_of(config(orpo=1, orpo_type=1, rlhf_max_corpus_len=50, micro_bsz=2)) == (400, 0)


def test_gradients_come_as_activations_go() -> None:
    """So that the larger of both is there at most; not where another recording has left gradients, nor with several."""
    flags = {**LORA, **PACKED}
    shape = shape_of("7b")

    def allocated(more: dict[str, object], **options: Any) -> float:
        return on_gpu(config(**flags, **more), shape, 1024, **options).allocated

    together = 1024 * 2 * (4096 + 8 * 64) * 32  # what enters layers, and what adapters remember
    once = allocated({})
    assert allocated({"accumulate_grad_batches": 2}) - once == pytest.approx(together)
    assert allocated({}, records=True) - once == pytest.approx(together)


@pytest.mark.parametrize(
    ("flags", "takes"),
    [
        ({**LORA, **DENSE}, True),
        ({**LORA, **DENSE, **STAGE_1}, True),
        ({"peft": "pissa", **DENSE}, True),
        ({**LORA, **PACKED}, False),
        ({**LORA, **DENSE, "lora_dropout": 0.1}, False),
        ({**LORA, **DENSE, "strategy": "deepspeed_stage_3"}, False),
        ({**BONE, **DENSE}, False),
    ],
)
@pytest.mark.parametrize("size", ["7b", "7.2b"])
def test_room_behind_dense_matrices_counts_where_it_is_taken(size: str, flags: dict[str, object], takes: bool) -> None:
    made, shape = config(**flags, train_parts="[]"), shape_of(size)
    bare = config(train_type="states", quant=made.quant)
    weights, without = (on_gpu(each, shape, 1024).parts[estimate.WEIGHTS] for each in (made, bare))
    outputs = 5 * 4096 + 14336 if size == "7b" else 2 * 4096 + 4 * 4096
    assert weights - without == (2 * 64 * outputs * 32 if takes else 0)


def test_layers_that_keep_all_keep_casts_of_what_is_trained() -> None:
    """Of weights in fp32: as much as the layers have in bf16, however long rows are."""
    shape = shape_of("1.6b")
    flags: dict[str, object] = {"train_type": "none", "accumulate_grad_batches": 2}

    def kept(positions: int, **more: object) -> float:
        return on_gpu(config(**flags, **more), shape, positions).parts[estimate.ACTIVATIONS]

    matrices = 2 * sum(math.prod(shape.parameter_shapes()[name]) for name in shape.matrix_names())
    for positions in (64, 1024):
        wide, narrow = (kept(positions, grad_cp=0, weights=weights) for weights in ("fp32", "bf16"))
        assert wide - narrow == pytest.approx(matrices)
    assert kept(64, grad_cp=1) == kept(64, grad_cp=1, weights="bf16") < matrices


def test_held_out_texts_count_where_rows_are_short() -> None:
    shape = RWKV6Shape.from_sizes(n_layer=24, n_embd=2048, vocab_size=65536)
    made = config()
    without, beside = (on_gpu(made, shape, 64, evaluates=evaluates) for evaluates in (0, estimate.EVALUATED_TOKENS))
    assert beside.parts[estimate.EVALUATION] > 0
    assert beside.total > without.total
    few = on_gpu(made, shape, 64, evaluates=estimate.EVALUATED_TOKENS // 2)
    assert without.total < few.total < beside.total
    assert on_gpu(made, shape, 64, evaluates=10**6).total == beside.total
    assert estimate.EVALUATION not in on_gpu(made, shape, 16384, evaluates=estimate.EVALUATED_TOKENS).parts


def test_recordings_hold_gradients_of_their_own_where_several_add_up() -> None:
    shape = tiny_shape()
    assert estimate.RECORDINGS not in on_gpu(config(), shape, 64, records=True).parts
    found = on_gpu(config(accumulate_grad_batches=2), shape, 64, records=True)
    assert found.parts[estimate.RECORDINGS] == found.parts[estimate.GRADIENTS]


def test_recordings_of_chunks_hold_what_goes_in_and_comes_out() -> None:
    """Of each row four memories, and four places for the tokens, or seven where layers are recorded one by one."""
    shape = tiny_shape()
    flags = {"chunk_ctx": 32, "ctx_len": 128, "dataload": "pad", "micro_bsz": 2}

    def recordings(**more: object) -> float:
        made = config(**{**flags, **more})
        positions, memories = positions_of(made)
        return on_gpu(made, shape, positions, memories=memories, records=True).parts.get(estimate.RECORDINGS, 0)

    place, memory = 2 * shape.n_embd * 2 * 32, 2 * shape.memory_bytes(2)
    assert recordings() == 4 * place + 4 * memory
    assert recordings(chunk_keep="inputs") == 7 * place + 4 * memory
    assert recordings(chunk_ctx=128) == recordings(peft="lisa") == 0
