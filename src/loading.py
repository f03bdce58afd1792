"""From a checkpoint's tensors to a model on its device.

Tensors are read from the file one at a time, moved, and packed on the way, so that host memory stays
near one matrix whatever the model's size. On the way to a GPU the next tensor is read into pinned
memory while the one before is copied and packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.adapters.plan import AdapterPlan
from src.checkpoint import Checkpoint, load_state
from src.device import spare_threads
from src.errors import CheckpointError
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.ops.kernels import compile_ahead
from src.quant import kernels_for

_SLOW_VALUES = 200_000_000
"""Models with fewer weights load too fast for a progress bar."""


@dataclass(frozen=True)
class LoadOptions:
    """How a model is put on its device.

    Attributes:
        device: where it computes.
        compute_dtype: dtype of activations and frozen weights.
        quant_type: packs the large matrices of every layer; None keeps them in compute_dtype.
        quant_head: pack the head, too.
        trained: keys of what is trained, kept in fp32 unless `narrow`; None is every layer's `time_state`.
        narrow: those of them that are kept in bf16.
        adapters: what stands beside the matrices; their keys are among `trained`.
        head_size_divisor: group norm eps is 1e-5 times its square.
        dropout: probability, see LanguageModel.
        lays_out: likewise; not where weights are sent between processes, which takes contiguous ones.
        reserves_room: whether dense matrices with adapters get the memory for `LanguageModel.take_room`.
    """

    device: torch.device
    compute_dtype: torch.dtype
    quant_type: str | None = None
    quant_head: bool = False
    trained: Collection[str] | None = None
    narrow: Collection[str] = ()
    adapters: AdapterPlan | None = None
    head_size_divisor: int = 8
    dropout: float = 0.0
    lays_out: bool = True
    reserves_room: bool = False


def open_model(
    checkpoint: Checkpoint,
    options: LoadOptions,
    *,
    state_file: str | Path = "",
    start: Mapping[str, Tensor] | None = None,
    quiet: bool = False,
) -> LanguageModel:
    """The model of an opened file on its device, with a progress bar where that takes time.

    Args:
        checkpoint: as `open_checkpoint` gives it.
        options: device, dtype, packing, what is trained.
        state_file: start states to take instead of the checkpoint's own or zeros; "" is none.
        start: further tensors to take instead of the checkpoint's, and values of adapters.
        quiet: shows no bar.

    Raises:
        CheckpointError: the state file cannot be read or does not fit, or a value of the model is not finite.
    """
    shape = checkpoint.info.shape
    states = load_state(state_file, shape) if state_file else {}
    tensors = checkpoint.overlaid({**states, **(start or {})})
    return show_and_build(tensors, shape, options, source=checkpoint.source, quiet=quiet)


def show_and_build(
    tensors: Mapping[str, Tensor],
    shape: ModelShape,
    options: LoadOptions,
    *,
    source: str | PathLike[str],
    quiet: bool = False,
) -> LanguageModel:
    """`build_model` with a progress bar where that takes time, and with as many threads as the model is worth."""
    spare_threads(options.device, shape)
    hidden = quiet or shape.parameter_count < _SLOW_VALUES
    total = len(shape.parameter_shapes())
    with tqdm(total=total, desc="loading", unit="tensor", disable=hidden, dynamic_ncols=True) as bar:
        return build_model(tensors, shape, options, lambda _: bar.update() and None, source=source)


def build_model(
    tensors: Mapping[str, Tensor],
    shape: ModelShape,
    options: LoadOptions,
    on_progress: Callable[[str], None] = lambda name: None,
    *,
    source: str | PathLike[str] = "the model",
) -> LanguageModel:
    """Builds the model; what is not trained is frozen.

    Args:
        tensors: a checkpoint's tensors by file key; `time_state` entries are optional and start at 0, those of
            adapters start as their method does.
        shape: sizes of the checkpoint.
        options: device, dtype, packing, what is trained.
        on_progress: called with each key after it has been placed.
        source: where the tensors come from, for messages.

    Returns:
        The model in training mode; `time_state` and what is trained are fp32, but for what is `narrow`.

    Raises:
        CheckpointError: a value is not finite in the dtype it is used in.
    """
    trained = shape.state_shapes().keys() if options.trained is None else options.trained
    packed = set(shape.matrix_names()) if options.quant_type else set()
    assert not packed.intersection(trained), "what is packed cannot be trained"
    head = {"head.weight"} if options.quant_type and options.quant_head else set()
    if options.compute_dtype is torch.bfloat16:
        kernels = shape.kernels(trains_weights=not shape.state_shapes().keys() >= set(trained))
        kernels += kernels_for(options.quant_type) if options.quant_type else ()
        kernels += options.adapters.kernels() if options.adapters is not None else ()
        compile_ahead(kernels, options.device)
    stays = {"emb.weight"}.difference(trained)
    with torch.device("meta"):
        model = LanguageModel(
            shape,
            compute_dtype=options.compute_dtype,
            head_size_divisor=options.head_size_divisor,
            dropout=options.dropout,
            lays_out=options.lays_out,
        )
    adapters = options.adapters
    values: dict[str, Tensor] = {}
    adapted: Collection[str] = ()
    if adapters is not None:
        # Before the matrices: between them they would break up the room that one leaves for the next.
        values = adapters.start_values(shape, tensors, options.device)
        adapted = set(adapters.matrices(shape))
    shapes = shape.parameter_shapes()
    sizes = {name: math.prod(size) for name, size in shapes.items()}
    rooms = adapters.rooms(shape) if adapters is not None and options.reserves_room else {}
    # Likewise: of what holds a matrix before it is put there nothing is to be left between them.
    kind: Any = {"dtype": options.compute_dtype, "device": options.device}
    memory = {name: torch.empty(sizes[name] + shapes[name][0] * width, **kind) for name, width in rooms.items()}
    # What is packed comes last and by size: the room of one dense matrix then takes the next, and no holes are left.
    # What is trained comes first, since an engine may give it another place.
    order = sorted(sizes, key=lambda name: (name in trained, sizes[name] if name in packed else math.inf), reverse=True)
    sums: dict[str, Tensor] = {}  # what is not finite shows in them; to look at each at once would wait for the device
    for name, tensor in _read_ahead(tensors, order, stays, options.device):
        if adapters is not None and name in adapted:
            tensor = adapters.residual(name, tensor.to(options.device, non_blocking=True), values, tensors)
        if name in packed | head:
            assert options.quant_type is not None
            used = tensor.to(options.device, options.compute_dtype, non_blocking=True)
            model.pack(name, used, options.quant_type)
        elif name in stays:
            used = tensor
            model.emb.keep_on_host(used)
        else:
            kept_in = torch.bfloat16 if name in options.narrow else torch.float32
            dtype = kept_in if name in trained else options.compute_dtype
            used = tensor.to(options.device, dtype, copy=name in trained)
            model.place(name, nn.Parameter(used, requires_grad=name in trained))
            if name in rooms:
                matrix: Any = model.get_submodule(name.removesuffix(".weight"))
                matrix.reserve(rooms[name], memory[name])
        sums[name] = used.sum()
        on_progress(name)
    for name, state_shape in shape.state_shapes().items():
        start = tensors[name] if name in tensors else torch.zeros(state_shape)
        used = start.to(options.device, torch.float32, copy=True)
        model.place(name, nn.Parameter(used, requires_grad=name in trained))
        sums[name] = used.sum()
    if adapters is not None:
        adapters.attach(model, values)
    model.lay_in_one_piece()
    _refuse_non_finite(source, tensors, sums)
    if options.device.type == "cuda":
        # What held the matrices before they were packed, there and here.
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", lambda: None)()
    return model.train()


def _read_ahead(
    tensors: Mapping[str, Tensor], order: Sequence[str], stays: Collection[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the order given; on the way to a GPU in pinned memory and one ahead, but for what `stays`."""
    if device.type != "cuda":
        yield from ((name, tensors[name]) for name in order)
        return

    def read(name: str) -> Tensor:
        if name in stays:
            return tensors[name]
        try:
            known = tensors.read(name, pinned=True) if isinstance(tensors, Checkpoint) else tensors[name]
            if known.is_cuda or known.is_pinned():
                return known
            return torch.empty(known.shape, dtype=known.dtype, pin_memory=True).copy_(known)
        except RuntimeError:  # the system lets no more memory be pinned
            return tensors[name]

    # A thread begins on device 0, where pinning would open a context that another process's GPU pays for.
    number = torch.cuda.current_device() if device.index is None else device.index
    with ThreadPoolExecutor(max_workers=1, initializer=torch.cuda.set_device, initargs=(number,)) as reader:
        coming = reader.submit(read, order[0])
        for name, following in zip(order, [*order[1:], None], strict=True):
            tensor = coming.result()
            if following is not None:
                coming = reader.submit(read, following)
            yield name, tensor


def _refuse_non_finite(source: str | PathLike[str], tensors: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Looks at the sums of all tensors at once, and only then, where one is not finite, at the tensor's values.

    Args:
        source: of the tensors.
        tensors: as they were read.
        sums: 0-d, on any device, in the dtype in which each tensor is used.

    Raises:
        CheckpointError: naming the first tensor with values that are not finite.
    """
    on_one_device = torch.stack(
        [total.detach().to(sums["head.weight"].device, torch.float32) for total in sums.values()]
    )
    for name, finite in zip(sums, on_one_device.isfinite().tolist(), strict=True):
        if finite or name not in tensors:
            continue
        dtype, values = sums[name].dtype, tensors[name]
        bad = values.numel() - int(torch.isfinite(values.to(dtype)).sum())
        if bad:
            in_file = not torch.isfinite(values).all()
            way_out = "the file is damaged, use another copy" if in_file else "compute in bf16 or fp32"
            raise CheckpointError(
                f"{source}: {bad:,} of the {values.numel():,} values of {name} are not finite in "
                f"{str(dtype).removeprefix('torch.')}, and with them no output would be; {way_out}"
            )
