"""From a checkpoint's tensors to a model on its device.

Tensors are taken from the file's memory map one at a time, moved, and packed on the way, so that
host memory stays near one matrix whatever the model's size. On the way to a GPU the next tensor is
read into pinned memory while the one before is copied and packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.checkpoint import Checkpoint, load_state
from src.device import spare_threads
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape

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
        trained: keys of what is trained, kept in fp32; None is every layer's `time_state`.
        head_size_divisor: group norm eps is 1e-5 times its square.
        dropout: probability, see LanguageModel.
    """

    device: torch.device
    compute_dtype: torch.dtype
    quant_type: str | None = None
    quant_head: bool = False
    trained: Collection[str] | None = None
    head_size_divisor: int = 8
    dropout: float = 0.0


def open_model(
    checkpoint: Checkpoint, options: LoadOptions, *, state_file: str | Path = "", quiet: bool = False
) -> LanguageModel:
    """The model of an opened file on its device, with a progress bar where that takes time.

    Args:
        checkpoint: as `open_checkpoint` gives it.
        options: device, dtype, packing, what is trained.
        state_file: start states to take instead of the checkpoint's own or zeros; "" is none.
        quiet: shows no bar.

    Raises:
        CheckpointError: the state file cannot be read or does not fit.
    """
    shape = checkpoint.info.shape
    spare_threads(options.device, shape)
    states = load_state(state_file, shape) if state_file else {}
    hidden = quiet or shape.parameter_count < _SLOW_VALUES
    with tqdm(total=len(checkpoint), desc="loading", unit="tensor", disable=hidden, dynamic_ncols=True) as bar:
        return build_model({**checkpoint, **states}, shape, options, lambda _: bar.update() and None)


def build_model(
    tensors: Mapping[str, Tensor],
    shape: ModelShape,
    options: LoadOptions,
    on_progress: Callable[[str], None] = lambda name: None,
) -> LanguageModel:
    """Builds the model; what is not trained is frozen.

    Args:
        tensors: a checkpoint's tensors by file key; `time_state` entries are optional and start at 0.
        shape: sizes of the checkpoint.
        options: device, dtype, packing, what is trained.
        on_progress: called with each key after it has been placed.

    Returns:
        The model in training mode; `time_state` and what is trained are fp32.
    """
    trained = shape.state_shapes().keys() if options.trained is None else options.trained
    packed = set(shape.matrix_names()) if options.quant_type else set()
    assert not packed.intersection(trained), "what is packed cannot be trained"
    head = {"head.weight"} if options.quant_type and options.quant_head else set()
    stays = {"emb.weight"}.difference(trained)
    with torch.device("meta"):
        model = LanguageModel(
            shape,
            compute_dtype=options.compute_dtype,
            head_size_divisor=options.head_size_divisor,
            dropout=options.dropout,
        )
    sizes = {name: math.prod(size) for name, size in shape.parameter_shapes().items()}
    # What is packed comes last and by size: the room of one dense matrix then takes the next, and no holes are left.
    order = sorted(sizes, key=lambda name: sizes[name] if name in packed else math.inf, reverse=True)
    for name, tensor in _read_ahead(tensors, order, stays, options.device):
        if name in packed | head:
            assert options.quant_type is not None
            on_device = tensor.to(options.device, options.compute_dtype, non_blocking=True)
            model.pack(name, on_device, options.quant_type)
        elif name in stays:
            model.emb.keep_on_host(tensor)
        else:
            dtype = torch.float32 if name in trained else options.compute_dtype
            _place(model, name, tensor.to(options.device, dtype, copy=name in trained), name in trained)
        on_progress(name)
    for name, state_shape in shape.state_shapes().items():
        start = tensors[name] if name in tensors else torch.zeros(state_shape)
        _place(model, name, start.to(options.device, torch.float32, copy=True), name in trained)
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
        mapped = tensors[name]
        if name in stays or mapped.is_cuda:
            return mapped
        try:
            return torch.empty(mapped.shape, dtype=mapped.dtype, pin_memory=True).copy_(mapped)
        except RuntimeError:  # the system lets no more memory be pinned
            return mapped

    # A thread begins on device 0, where pinning would open a context that another process's GPU pays for.
    number = torch.cuda.current_device() if device.index is None else device.index
    with ThreadPoolExecutor(max_workers=1, initializer=torch.cuda.set_device, initargs=(number,)) as reader:
        coming = reader.submit(read, order[0])
        for name, following in zip(order, [*order[1:], None], strict=True):
            tensor = coming.result()
            if following is not None:
                coming = reader.submit(read, following)
            yield name, tensor


def _place(model: LanguageModel, name: str, tensor: Tensor, trained: bool) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    module.register_parameter(parameter_name, nn.Parameter(tensor, requires_grad=trained))
