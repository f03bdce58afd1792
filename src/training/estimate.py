"""How much memory a run takes, by part, from its flags and the model's sizes alone.

What is there in any case (weights, what is trained with its moments, the workspace) is counted exactly, and so is, for
states and adapters at `--grad_cp 1`, what passes while a layer is computed again: the tensors that are alive when its
backward has come farthest. What passes otherwise, and what an allocator and a driver keep beside it, are fitted to
measured runs: the table in README ("Memory and time", 1.6B to 14B), of which the estimate meets the allocator's peak
within 3 % and what is used within 10 % (tests/unit/training/test_estimate.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from src.adapters.full import FullTraining
from src.adapters.kept import KeptByLayers
from src.adapters.lisa import Lisa
from src.adapters.method import Method
from src.adapters.parts import value_count
from src.config import TrainConfig
from src.data.rounding import ceil_div
from src.model.recompute import Recompute
from src.model.shape import ModelShape
from src.training.flat_updates import updates_flat
from src.training.memory import (
    MEMORIES_AT_HAND,
    bytes_of_trained,
    moment_bytes,
    packed_bytes,
    passing_bytes,
    recorded_bytes,
)
from src.training.updates import leaves_gradients

EVALUATED_TOKENS = 4096
"""Positions of a batch of held-out texts (`evaluation._BATCH_TOKENS`)."""
_PASSING_SHARE, _PLAIN_PASSING_SHARE = 0.79, 2.8
"""Of `memory.passing_bytes`, which has a reserve, so much is there at the peak: with the operator's kernel, and where
it is torch operations (CPU, models of 0.8 M to 3.5 M, rows of 512 and 2,048: 2.3 to 2.9)."""
_EVALUATING_SHARE, _PLAIN_EVALUATING_SHARE = 0.4, 1.4
"""The same without a backward; the first is a guess, the second measured as above."""
_PRODUCTS_BYTES = 32 * 2**20
"""cuBLAS's own on an H100, which torch's allocator gives it."""
_LOGITS = 2**24
"""Formed at a time at most (`ops.token_logps`)."""
_CONTEXT_BYTES = 300 * 2**20
"""Of a CUDA context: 295 MiB on an H200 (`device._limit_stacks`)."""
_IDLE_BYTES, _IDLE_SHARE = 250 * 2**20, 0.035
"""Of a GPU's allocator and library handles: so much, and of what is allocated at the peak so large a share."""
_HOST_IDLE_BYTES = 20 * 2**20
"""What the first step leaves with a process on a CPU."""
_ENGINE_BYTES = 6
"""Of each trained value, DeepSpeed's fp32 copy and its buckets of a quarter each."""
_LARGEST_CTX_LEN, _LARGEST_BATCH = 1 << 24, 1 << 16


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part.

    Attributes:
        parts: by name, in the order in which they are shown.
        positions: that are computed at a time.
        of_positions: of the parts, what grows with these.
    """

    parts: Mapping[str, float]
    positions: int
    of_positions: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> float:
        """Bytes of tensors at the peak."""
        return self.total - sum(self.parts.get(name, 0.0) for name in (CONTEXT, IDLE))

    @property
    def standing(self) -> float:
        """Bytes that are there as soon as the model is loaded."""
        return sum(self.parts.get(name, 0.0) for name in (WEIGHTS, HEAD, VALUES, WORKSPACE))


WEIGHTS, HEAD, VALUES, GRADIENTS, MOMENTS = "frozen weights", "head", "what is trained", "its gradients", "optimizer"
WORKSPACE, ACTIVATIONS, PASSING, LOSS = "workspace", "activations kept", "activations of a layer", "logits"
MEMORIES, EVALUATION = "memories of chunks", "held-out data beyond these"
RECORDINGS, IDLE, CONTEXT = "recordings' own", "allocator and libraries", "CUDA context"


def estimate_memory(
    config: TrainConfig,
    method: Method,
    shape: ModelShape,
    *,
    on_gpu: bool,
    itemsize: int,
    positions: int,
    memories: int = 0,
    evaluates: int = 0,
    records: bool = False,
) -> MemoryEstimate:
    """What a run takes on its device.

    Args:
        config: final flags; `strategy` is the engine that runs.
        method: what is trained.
        shape: of the model.
        on_gpu: whether the device is one.
        itemsize: bytes of an activation.
        positions: that are computed at a time, at most.
        memories: that wait on the device between chunks.
        evaluates: positions of the held-out texts, which are measured in batches of EVALUATED_TOKENS at most; 0: none.
        records: whether steps are recorded, of micro-batches that need not all have one shape.
    """
    fused = on_gpu and itemsize == 2
    trained = set(method.trained_names(shape))
    sizes = shape.parameter_shapes()
    matrices = set(shape.matrix_names())
    packed = {*matrices, *(["head.weight"] if config.quant_head else [])} if config.quantised else set()

    def bytes_of(name: str) -> float:
        return math.prod(sizes[name]) * (packed_bytes(config.quant_type) if name in packed else itemsize)

    rooms = 0.0
    if fused and config.dense_and_whole and method.adapters is not None:
        rooms = float(itemsize * sum(sizes[name][0] * width for name, width in method.adapters.rooms(shape).items()))
    on_device = sizes.keys() - trained - ({"emb.weight"} if on_gpu else set())
    parts = {
        WEIGHTS: sum(bytes_of(name) for name in on_device - {"head.weight"}) + rooms,
        HEAD: bytes_of("head.weight") if "head.weight" in on_device else 0.0,
        **_trained_parts(config, method, shape, on_gpu=on_gpu),
        WORKSPACE: _workspace_bytes(config, shape, packed, itemsize),
    }
    wider = itemsize / 2
    by_layer = fused and memories > 0 and config.chunk_keep == "inputs"
    kept_activations, kept_casts = _kept_bytes(config, method, shape, positions, on_gpu=on_gpu, itemsize=itemsize)
    passing = positions * passing_bytes(shape, by_layer=by_layer) * wider
    passing *= _PASSING_SHARE if on_gpu else _PLAIN_PASSING_SHARE
    logits = float(min(_LOGITS, positions * shape.vocab_size) * itemsize)
    of_casts = 0.0
    if fused and not config.chunk_ctx and config.grad_cp == 1 and not isinstance(method, FullTraining | Lisa):
        # What is there when a layer's backward has come farthest; the logits are gone by then.
        passing = float(positions * shape.passing_bytes_again("" if method.adapters is None else method.adapters.kind))
        of_casts = _PRODUCTS_BYTES + _cast_bytes(method, shape)
        logits = max(logits - passing, 0.0)
    elif fused and isinstance(method, Lisa):
        of_casts = _layer_bytes(shape)
    kept = kept_activations + kept_casts
    together = min(kept, parts[GRADIENTS]) if _gradients_follow(config, method, memories) else 0.0
    parts |= {
        ACTIVATIONS: kept - together,
        PASSING: passing + of_casts,
        LOSS: logits,
        MEMORIES: shape.memory_bytes(itemsize) * _memories_there(config, memories),
    }
    grows = max(parts[ACTIVATIONS] - kept_casts, 0.0) + passing
    if evaluates:
        # Before training there are no gradients and moments yet, and no row of its own.
        at_evaluation = (
            min(evaluates, EVALUATED_TOKENS)
            * passing_bytes(shape)
            * wider
            * (_EVALUATING_SHARE if on_gpu else _PLAIN_EVALUATING_SHARE)
        )
        beside = grows + parts[GRADIENTS] + parts[MOMENTS] + parts[MEMORIES]
        parts[EVALUATION] = max(at_evaluation - beside, 0.0)
    if on_gpu:
        twice = records and config.accumulate_grad_batches > 1 and not leaves_gradients(config, method)
        parts[RECORDINGS] = parts[GRADIENTS] if twice else 0.0
        if records and leaves_gradients(config, method):
            parts[RECORDINGS] += together  # gradients are where the recording of another shape has left them
        if records and memories:
            parts[RECORDINGS] += recorded_bytes(config, method, shape, positions // config.chunk_ctx, itemsize)
        allocated = sum(parts.values())
        parts |= {IDLE: _IDLE_BYTES + _IDLE_SHARE * allocated, CONTEXT: _CONTEXT_BYTES}
    else:
        parts[IDLE] = _HOST_IDLE_BYTES
    shown = {name: amount for name, amount in parts.items() if amount}
    return MemoryEstimate(shown, positions, grows)


def _kept_bytes(
    config: TrainConfig, method: Method, shape: ModelShape, positions: int, *, on_gpu: bool, itemsize: int
) -> tuple[float, float]:
    """What layers keep on the device for their backward: what grows with the positions, and the rest."""
    fused = on_gpu and itemsize == 2
    options = {"dense": config.dense_and_whole, "dropout": config.dropout > 0}
    layers = KeptByLayers(method, shape, fused=fused, itemsize=itemsize, **options)
    with_memory = Recompute.ALL if on_gpu else Recompute.INPUTS
    mode = {0: Recompute.NOTHING, 1: Recompute.ALL}.get(config.grad_cp, with_memory)
    if config.chunk_ctx and config.chunk_keep == "inputs":
        all_of, once = (layers.by_layer(Recompute.NOTHING, count)[0] for count in (positions, 0))
    elif config.offload_activations:
        return 0.0, 0.0
    else:
        all_of, once = (layers.of_all(mode, count) for count in (positions, 0))
    return all_of - once, once


def _gradients_follow(config: TrainConfig, method: Method, memories: int) -> bool:
    """Whether gradients come as what layers keep goes: the more there is of one, the less there is of the other.

    Not where they are added to those of earlier micro-batches or chunks, or an engine has a place for all of them, nor
    where few layers are trained, which may be the last ones. Of a layer that is used up at once there are none.
    """
    by_layer = method.adapters is not None or (isinstance(method, FullTraining) and not config.updates_by_tensor)
    return by_layer and not (memories or config.has_engine or config.accumulate_grad_batches > 1)


def _cast_bytes(method: Method, shape: ModelShape) -> float:
    """Of one layer's adapters, and of what is trained beside them, in 16 bits (`casts.CastBuffer`)."""
    if method.adapters is None:
        return 0.0
    sizes = {**shape.parameter_shapes(), **method.adapters.parameter_shapes(shape)}
    return 2.0 * sum(
        math.prod(sizes[name])
        for name in method.trained_names(shape)
        if name in sizes and name.startswith(f"blocks.{shape.n_layer - 1}.")
    )


def _layer_bytes(shape: ModelShape) -> float:
    """Of one layer's matrices in 16 bits.

    Three runs of LISA at 7B (H100, 12f312b) had so much more at their peak than what is counted else, whether embedding
    and head were trained and moments packed or not (0.39 to 0.42 GiB); on the emulator such casts are gone by then.
    """
    sizes = shape.parameter_shapes()
    return 2.0 * sum(math.prod(sizes[name]) for name in shape.matrix_names() if name.startswith("blocks.0."))


def _memories_there(config: TrainConfig, memories: int) -> int:
    """Of the memories that wait, those on the device, and the few that a chunk works with."""
    if not memories:
        return 0
    return MEMORIES_AT_HAND + (memories if config.chunk_keep == "device" else 0)


def _trained_parts(config: TrainConfig, method: Method, shape: ModelShape, *, on_gpu: bool) -> dict[str, float]:
    """Of what is trained at a time: values, gradients, moments."""
    names = method.trained_names(shape)
    sizes = {**shape.parameter_shapes(), **shape.state_shapes()}
    if method.adapters is not None:
        sizes |= method.adapters.parameter_shapes(shape)
    values = value_count({name: sizes[name] for name in names})
    values += method.layer_values(shape) if isinstance(method, Lisa) else 0
    moments = float(moment_bytes(config.optim) * values)
    if config.strategy.endswith("offload") and on_gpu:
        moments = 0.0
    if isinstance(method, FullTraining) and config.updates_by_tensor:
        narrow = set(method.narrow_names(shape))
        own = sum(math.prod(sizes[name]) * (2 if name in narrow else 4) for name in names)
        rest = bytes_of_trained(config, method, shape) - own - moments
        return {VALUES: float(own), GRADIENTS: float(rest), MOMENTS: moments}
    # A state file's worth of copies: the newest values that gave a finite loss.
    copies = 4 if method.small else 0
    engine = _ENGINE_BYTES if config.uses_deepspeed and on_gpu and not updates_flat(config, method) else 0
    frozen_states = 0 if any(name in shape.state_shapes() for name in names) else 4 * value_count(shape.state_shapes())
    return {
        VALUES: float(values * (4 + copies + engine) + frozen_states),
        GRADIENTS: float(values * 4),
        MOMENTS: moments,
    }


def _workspace_bytes(config: TrainConfig, shape: ModelShape, packed: set[str], itemsize: int) -> float:
    """Of the buffers in which packed matrices are dense: the largest alone, or each of a layer's time mix besides."""
    if not packed:
        return 0.0
    sizes = {name: math.prod(size) * itemsize for name, size in shape.parameter_shapes().items()}
    of_layer = {name: size for name, size in sizes.items() if name in packed and name.startswith("blocks.0.")}
    largest = max(of_layer.values())
    if config.grad_cp != 1:
        return float(largest)
    others = max(size for name, size in of_layer.items() if ".att." not in name)
    return float(others + sum(size for name, size in of_layer.items() if ".att." in name))


@dataclass(frozen=True)
class Largest:
    """What would fit, everything else being as it is; 0 where not even the smallest does."""

    ctx_len: int
    micro_bsz: int


def positions_of(config: TrainConfig) -> tuple[int, int]:
    """(positions that are computed at a time, memories that wait) of full rows or pairs."""
    rows, width = 1, config.micro_bsz * config.ctx_len
    if config.preference:
        shared = config.orpo_shared_prompt and not (config.orpo and config.orpo_type)
        width = config.micro_bsz * (3 if shared else 4) * config.rlhf_max_corpus_len
    elif config.dataload != "pack":
        rows, width = config.micro_bsz, config.ctx_len
    if not config.chunk_ctx or config.chunk_ctx >= width:
        return rows * width, 0
    return rows * config.chunk_ctx, rows * (ceil_div(width, config.chunk_ctx) - 1)


def largest_that_fit(config: TrainConfig, needed_bytes: Callable[[TrainConfig], float], limit_bytes: float) -> Largest:
    """The largest `--ctx_len` (of pairs `--rlhf_max_corpus_len`) and `--micro_bsz` within a limit.

    Args:
        config: final flags.
        needed_bytes: of a run with such flags; grows with both.
        limit_bytes: of the device.
    """
    length = "rlhf_max_corpus_len" if config.preference else "ctx_len"

    def most(name: str, largest: int) -> int:
        low, high = 0, 1
        while high <= largest and fits(name, high):
            low, high = high, 2 * high
        while high - low > max(low // 256, 1):  # closer than any estimate
            middle = (low + high) // 2
            low, high = (middle, high) if fits(name, middle) else (low, middle)
        return low

    def fits(name: str, value: int) -> bool:
        return needed_bytes(dataclasses.replace(config, **{name: value})) <= limit_bytes  # type: ignore[arg-type]

    return Largest(most(length, _LARGEST_CTX_LEN), most("micro_bsz", _LARGEST_BATCH))
