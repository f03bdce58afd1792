"""What fits into memory: sizes that cannot, how much of a layer is kept for the backward pass (`--grad_cp`), and of a
row at a time (`--chunk_ctx auto`).

Keeping a layer's costly tensors saves its recomputation. Layers are alike, so the choice is two numbers: so
many layers recompute only their inputs, so many nothing, the others everything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from src.adapters.full import FullTraining
from src.adapters.kept import KeptByLayers
from src.adapters.lisa import Lisa
from src.adapters.method import Method
from src.adapters.parts import value_count
from src.config import TrainConfig
from src.data.rounding import ceil_div
from src.device import require_memory
from src.errors import ConfigError
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.model.shape import ModelShape
from src.training.flat_updates import updates_flat
from src.training.graphs import may_record_chunks
from src.training.joined import joins
from src.training.unpacked import free_bytes
from src.training.updates import leaves_gradients, unit_of
from src.training.work import Work

_WORKING_BYTES = 700 * 2**20
"""Kept free for what the estimate below does not see: library handles, logits of a chunk, fragmentation."""


_MOMENT_BYTES = {"adamw8bit": 2, "paged_adamw8bit": 2, "lion8bit": 1}
"""Of each trained value, an optimizer's moments; Adam's are two in fp32."""
_ADAM_MOMENT_BYTES = 8
_UPDATE_BYTES = 16
"""Of each value of a tensor that is updated on its own: widened, its gradient, and what is added and rounded."""
_SMALLEST_CHUNK, _EFFICIENT_CHUNK = 128, 2048
"""Tokens; packed weights are unpacked for every chunk, which below the second takes longer than recomputing layers."""
MEMORIES_AT_HAND = 4
"""What a chunk begins from and leaves, and their gradients."""
_STREAMS, _STREAMS_BY_LAYER = 4, 7
"""Places [N, C] of a recording: what enters and leaves it in each pass, and a gradient; or what enters it and three
layers, two gradients, and the result."""
_SHARE_BY_LAYER = 0.35
"""Of what passes, fitted to LoRA 1.6B and states 7B in chunks of 2,048 and 4,096 tokens (H100, 2026-11-26)."""
_TARGET_BYTES = 64
"""Of each position of a row in chunks: where its target is, its scores and their gradients."""
_SHARE_OF_FREE = 0.95


@dataclass(frozen=True)
class MemoryPlan:
    """What `apply` does to a model.

    Attributes:
        layers: of the model.
        light_layers: layers that recompute only norms and mixer inputs (`Recompute.INPUTS`).
        whole_layers: layers that recompute nothing (`Recompute.NOTHING`).
        keep_dequantized: whether recomputation and backward share one dequantisation, for which one layer's
            dense time mix has to be kept.
    """

    layers: int
    light_layers: int = 0
    whole_layers: int = 0
    keep_dequantized: bool = False

    def __str__(self) -> str:
        counts = {
            "everything": self.layers - self.light_layers - self.whole_layers,
            "only norms and mixing": self.light_layers,
            "nothing": self.whole_layers,
        }
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        shared = "; one dequantisation for recomputation and backward" if self.keep_dequantized else ""
        return f"of {self.layers} layers the backward pass recomputes: {', '.join(parts)}{shared}"

    def apply(self, model: LanguageModel) -> None:
        """Sets the layers' modes; the last layers keep most, whose tensors live shortest."""
        modes = [Recompute.NOTHING] * self.whole_layers + [Recompute.INPUTS] * self.light_layers
        modes += [Recompute.ALL] * (self.layers - len(modes))
        model.set_recomputation(modes[::-1], keep_dequantized=self.keep_dequantized)


def require_memory_of_run(config: TrainConfig, device: torch.device, shape: ModelShape, work: Work) -> None:
    """Refuses sizes that no way of training could fit into the device's memory, before anything is allocated.

    Counted is what has to be there in any case: the weights of a fresh model in fp32 on the host, and in 2 bytes a
    value what enters each layer at every position of a micro-batch. Real runs take several times as much.

    Args:
        config: the flags.
        device: where the run computes.
        shape: of the model.
        work: says how many positions a micro-batch has.

    Raises:
        ConfigError: naming the flags, what they need and what there is.
    """
    host = torch.device("cpu")
    if not config.load_model:
        sizes = f"--n_layer {shape.n_layer} --n_embd {shape.n_embd} --vocab_size {shape.vocab_size}"
        require_memory(f"a fresh model of {sizes}", "choose smaller ones", shape.parameter_count * 4, host)
    limit = "rlhf_max_corpus_len" if config.preference else "ctx_len"
    if work.memories:
        elsewhere = ", or --chunk_keep host" if config.chunk_keep == "device" and device.type == "cuda" else ""
        require_memory(
            f"--chunk_ctx {config.chunk_ctx}, which cuts --{limit} {getattr(config, limit)} into chunks that leave "
            f"{work.memories:,} memories,",
            f"raise it{elsewhere}",
            work.memories * shape.memory_bytes(2),
            device if config.chunk_keep == "device" else host,
        )
    if work.memories and config.chunk_keep == "inputs":
        require_memory(
            f"--chunk_keep inputs, with {work.all_tokens:,} positions of {shape.n_layer} layers,",
            "use --chunk_keep host",
            work.all_tokens * shape.n_embd * (shape.n_layer + 1) * 2,
            host,
        )
    positions = work.row_tokens
    require_memory(
        f"--{limit} {getattr(config, limit)} with --micro_bsz {config.micro_bsz}, {positions:,} positions at a time,",
        "lower them",
        positions * shape.n_embd * shape.n_layer * 2,
        host if config.offload_activations else device,
    )


def plan_memory(
    model: LanguageModel,
    method: Method,
    row_tokens: int,
    limit_gib: float,
    waiting_bytes: int = 0,
    trained_bytes: int = 0,
) -> MemoryPlan:
    """Chooses as many light layers as fit, and when all are, as many whole ones.

    Args:
        model: on its GPU.
        method: what is trained; of layers that are not alike those that keep most are counted first.
        row_tokens: most tokens of a micro-batch that are computed at a time.
        limit_gib: device memory the run may use in all; 0 is the whole device.
        waiting_bytes: of memories that wait there between chunks.
        trained_bytes: of what is trained, see `bytes_of_trained`.
    """
    shape = model.shape
    free, total = torch.cuda.mem_get_info(model.device)
    idle = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    used = total - free - idle
    limit = min(limit_gib * 2**30 or total, total)
    passing = row_tokens * passing_bytes(shape) * model.compute_dtype.itemsize // 2
    available = limit - used - trained_bytes - passing - waiting_bytes - _WORKING_BYTES
    itemsize = model.compute_dtype.itemsize
    options = {"dense": model.reserves_room, "dropout": model.dropout > 0}
    kept = KeptByLayers(method, shape, fused=model.is_fused, itemsize=itemsize, **options)
    everything, inputs, nothing = (
        kept.by_layer(mode, row_tokens) for mode in (Recompute.ALL, Recompute.INPUTS, Recompute.NOTHING)
    )

    def layers_that_fit(more: list[float], less: list[float]) -> int:
        """How many layers can keep more, all others less."""
        counts = range(1, shape.n_layer + 1)
        return max((n for n in counts if sum(more[:n]) + sum(less[n:]) <= available), default=0)

    light = layers_that_fit(inputs, everything)
    if light == shape.n_layer:
        whole = layers_that_fit(nothing, inputs)
        return MemoryPlan(shape.n_layer, light_layers=light - whole, whole_layers=whole)
    available -= sum(inputs[:light]) + sum(everything[light:])
    keeps = 0 < model.dense_time_mix_bytes <= available
    return MemoryPlan(shape.n_layer, light_layers=light, keep_dequantized=keeps)


def passing_bytes(shape: ModelShape, *, by_layer: bool = False) -> int:
    """Allowed for each position that is computed, for as long as its layer is; 16-bit activations.

    Args:
        shape: of the model.
        by_layer: whether layers are computed one by one from what enters them, of which one then keeps all it needs.
    """
    whole = 2 * (12 * shape.n_embd + 12 * shape.dim_att + 3 * shape.dim_ffn)
    return int(_SHARE_BY_LAYER * whole) if by_layer else whole


def moment_bytes(optimizer: str) -> int:
    """Of each trained value, what an optimizer of `--optim` remembers."""
    return _MOMENT_BYTES.get(optimizer, _ADAM_MOMENT_BYTES)


def packed_bytes(quant_type: str) -> float:
    """Of each packed value with its share of scales: exactly 1 + 1/64, or 4.127 bits (`FrozenLinear`)."""
    return 1 + 4 / 256 if quant_type == "int8" else (4 + 8 / 64 + 32 / (64 * 256)) / 8


def bytes_of_trained(config: TrainConfig, method: Method, shape: ModelShape) -> int:
    """Of what is trained at a time: values, gradients, moments, and gradients that recordings keep for themselves.

    An engine adds fp32 masters and gradients, of which each rank has its share (in stage 3 a few at a time), and shares
    more by its stage; unless it is stage 3, it strings 16-bit gradients of a share together before it widens them.
    Where it is given wholes, their gradients stand beside those of the pieces, and it needs no others. With
    `FlatUpdates` it has no masters, and beside gradients of wholes only those to which chunks of rows, or a step's
    micro-batches, add theirs: elsewhere gradients of pieces come when what they are computed from goes.
    Updates tensor by tensor need in passing what one tensor does, unless a kernel makes them. Those in the backward
    have the gradients of one layer at a time; of chunks, which add gradients up, those of all.
    """
    moments = moment_bytes(config.optim)
    sizes = {**shape.parameter_shapes(), **shape.state_shapes()}
    if method.adapters is not None:
        sizes |= method.adapters.parameter_shapes(shape)
    sizes = {name: sizes[name] for name in method.trained_names(shape)}
    narrow = set(method.narrow_names(shape)) if isinstance(method, FullTraining) else set()
    if config.updates_by_tensor:
        return _bytes_by_tensor(config, sizes, narrow, moments)
    count = value_count(sizes) + (method.layer_values(shape) if isinstance(method, Lisa) else 0)
    width = 2 if narrow else 4
    ranks = config.processes
    if not config.has_engine:
        handed_out = 0 if leaves_gradients(config, method) and not config.chunk_ctx else 4
        return count * (width + 4 + moments + handed_out)
    if updates_flat(config, method):
        added_up = config.chunk_ctx or config.accumulate_grad_batches > 1
        return math.ceil(count * (width + (8 if added_up else 4) + moments / ranks))
    offloaded = config.strategy.endswith("offload")
    kept = 0 if offloaded else 4 + moments
    if joins(config, method):
        return math.ceil(count * (width + 8 + kept / ranks))
    strung = 2 if narrow and not offloaded else 0
    shared = kept + (0 if _stage(config) == 3 else 4 + strung)
    gradients_by, weights_by = (ranks if stage <= _stage(config) else 1 for stage in (2, 3))
    return math.ceil(count * (width / weights_by + width / gradients_by + shared / ranks))


def _bytes_by_tensor(
    config: TrainConfig, sizes: Mapping[str, tuple[int, ...]], narrow: Collection[str], moments: int
) -> int:
    units: dict[str, int] = {}
    for name, size in sizes.items():
        unit = unit_of(name)
        units[unit] = units.get(unit, 0) + math.prod(size) * (2 if name in narrow else 4)
    by_kernel = config.accelerator != "cpu" and config.optim != "lion8bit"
    gradients = max(units.values()) if config.fused_update and not config.chunk_ctx else sum(units.values())
    in_passing = 0 if by_kernel else _UPDATE_BYTES * max(map(math.prod, sizes.values()))
    on_host = by_kernel and config.optim == "paged_adamw8bit"
    return sum(units.values()) + gradients + (0 if on_host else value_count(sizes) * moments) + in_passing


def _stage(config: TrainConfig) -> int:
    """Of an engine."""
    return int(config.strategy.split("_")[2]) if config.uses_deepspeed else 1


def recorded_bytes(config: TrainConfig, method: Method, shape: ModelShape, rows: int, itemsize: int) -> int:
    """Of a recording of chunks what there is besides what it computes with: what it reads, and what it leaves.

    Args:
        config: final flags; without `--chunk_ctx` none is counted.
        method: what is trained.
        shape: of the model.
        rows: beside each other in a chunk.
        itemsize: bytes of an activation.
    """
    if not may_record_chunks(config, method):
        return 0
    streams = _STREAMS_BY_LAYER if config.chunk_keep == "inputs" else _STREAMS
    of_tokens = streams * config.chunk_ctx * shape.n_embd * itemsize
    return rows * (of_tokens + MEMORIES_AT_HAND * shape.memory_bytes(itemsize))


def chunk_that_fits(
    config: TrainConfig,
    method: Method,
    shape: ModelShape,
    device: torch.device,
    compute_dtype: torch.dtype,
    own_bytes: int = 0,
) -> int:
    """What `--chunk_ctx auto` is: the most tokens of a chunk, a power of two, or 0 where whole rows fit.

    Counted are the weights, what is trained, the activations of a chunk as `--grad_cp` has them, what it begins from
    and leaves, scores of all targets, what a recording has for itself, and the memories that wait on the device.
    Under 2 activations are all, since a chunk without recomputation saves a pass, or what enters the layers where no
    such chunk of an efficient size fits.

    Args:
        config: the flags.
        method: what is trained.
        shape: of the model, which is not loaded yet.
        device: where the run computes.
        compute_dtype: of activations and frozen weights.
        own_bytes: taken by a run of these flags that is over, and free for the next one.

    Raises:
        ConfigError: not even the smallest chunk fits.
    """
    if config.preference:
        parts = 3 if config.orpo_shared_prompt and not (config.orpo and config.orpo_type) else 4
        rows, width = 1, config.micro_bsz * parts * config.rlhf_max_corpus_len
    elif config.dataload == "pack":
        rows, width = 1, config.micro_bsz * config.ctx_len
    else:
        rows, width = config.micro_bsz, config.ctx_len
    fused = device.type == "cuda" and compute_dtype is torch.bfloat16
    options = {"dense": config.dense_and_whole, "dropout": config.dropout > 0}
    kept = KeptByLayers(method, shape, fused=fused, itemsize=compute_dtype.itemsize, **options)
    modes = {0: [Recompute.NOTHING], 1: [Recompute.ALL], 2: [Recompute.NOTHING, Recompute.ALL]}[config.grad_cp]
    of_memory = shape.memory_bytes(compute_dtype.itemsize)
    waiting = of_memory if config.chunk_keep == "device" else 0
    free = _SHARE_OF_FREE * (free_bytes(device) + own_bytes)
    if device.type == "cuda" and config.memory_gib:
        free = min(free, config.memory_gib * 2**30)
    model = _model_bytes(config, method, shape, compute_dtype) + _WORKING_BYTES

    def needed(tokens: int, mode: Recompute) -> float:
        # With their inputs at hand, one layer after the other is computed and left.
        by_layer = config.chunk_keep == "inputs" and tokens < width
        of_layers = kept.by_layer(Recompute.NOTHING if by_layer else mode, rows * tokens)
        passing = passing_bytes(shape, by_layer=fused and by_layer) * compute_dtype.itemsize // 2
        of_chunks = MEMORIES_AT_HAND * of_memory + width * _TARGET_BYTES if tokens < width else 0
        recorded = 0
        if tokens < width and device.type == "cuda":
            recorded = recorded_bytes(replace(config, chunk_ctx=tokens), method, shape, rows, compute_dtype.itemsize)
        of_rows = rows * (tokens * passing + of_chunks + (ceil_div(width, tokens) - 1) * waiting)
        return model + recorded + of_rows + (of_layers[0] if by_layer else sum(of_layers))

    sizes = [size for power in range(width.bit_length()) if _SMALLEST_CHUNK <= (size := 1 << power) < width]
    if needed(width, modes[-1]) <= free:
        return 0
    fitting = [[tokens for tokens in sizes if needed(tokens, mode) <= free] for mode in modes]
    if largest := [max(found) for found in fitting if found]:
        return next((tokens for tokens in largest if tokens >= _EFFICIENT_CHUNK), max(largest))
    least = min(needed(tokens, modes[-1]) for tokens in sizes or [width])
    ways = [
        *(["--chunk_keep host"] if waiting and device.type == "cuda" else []),
        *(["--quant 1"] if method.freezes_matrices and not config.quantised else []),
        *(["--grad_cp 1"] if config.grad_cp != 1 else []),
        "shorter rows",
        "a smaller model",
    ]
    raise ConfigError(
        f"--chunk_ctx auto finds no size that fits: {least / 2**30:.1f} GiB are needed at least and "
        f"{free / 2**30:.1f} are free; use {', or '.join(ways)}"
    )


def _model_bytes(config: TrainConfig, method: Method, shape: ModelShape, compute_dtype: torch.dtype) -> int:
    """Of the weights, and of what is trained with all that belongs to it. A frozen embedding stays on the host."""
    trained = bytes_of_trained(config, method, shape)
    if not method.freezes_matrices:
        return trained
    sizes = shape.parameter_shapes()
    packed = {*shape.matrix_names(), *(["head.weight"] if config.quant_head else [])} if config.quantised else set()
    frozen = sum(
        math.prod(size) * (packed_bytes(config.quant_type) if name in packed else compute_dtype.itemsize)
        for name, size in sizes.items()
        if name != "emb.weight"
    )
    return trained + int(frozen / (config.processes if _stage(config) == 3 else 1))
