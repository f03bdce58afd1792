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

import torch
from torch import Tensor, nn

from src.model.parameters import ModelShape, parameter_shapes, quantizable_names, state_shapes
from src.model.recompute import Recompute
from src.model.rwkv6 import RWKV6
from src.quant import FrozenHead, FrozenLinear


@dataclass(frozen=True)
class LoadOptions:
    """How a model is put on its device.

    Attributes:
        device: where it computes.
        compute_dtype: dtype of activations and frozen weights.
        quant_type: packs the eight matrices of every layer; None keeps them in compute_dtype.
        quant_head: pack the head, too.
        train_weights: keep every weight as a trainable fp32 master instead of freezing it.
        recompute: what every layer computes again in the backward pass, until a `MemoryPlan` says otherwise.
        head_size_divisor: group norm eps is 1e-5 times its square.
        dropout: probability, see RWKV6.
    """

    device: torch.device
    compute_dtype: torch.dtype
    quant_type: str | None = None
    quant_head: bool = False
    train_weights: bool = False
    recompute: Recompute = Recompute.NOTHING
    head_size_divisor: int = 8
    dropout: float = 0.0


def build_model(
    tensors: Mapping[str, Tensor],
    shape: ModelShape,
    options: LoadOptions,
    on_progress: Callable[[str], None] = lambda name: None,
) -> RWKV6:
    """Builds the model, all parameters frozen except as `train_weights` says and `time_state`.

    Args:
        tensors: a checkpoint's tensors by file key; `time_state` entries are optional and start at 0.
        shape: sizes of the checkpoint.
        options: device, dtype, packing.
        on_progress: called with each key after it has been placed.

    Returns:
        The model in training mode; `time_state` is fp32 and requires grad unless `train_weights`.
    """
    assert not (options.train_weights and options.quant_type)
    with torch.device("meta"):
        model = RWKV6(
            shape,
            compute_dtype=options.compute_dtype,
            head_size_divisor=options.head_size_divisor,
            recompute=options.recompute,
            dropout=options.dropout,
        )
    packed = set(quantizable_names(shape)) if options.quant_type else set()
    sizes = {name: math.prod(size) for name, size in parameter_shapes(shape).items()}
    # What is packed comes last and by size: the room of one dense matrix then takes the next, and no holes are left.
    order = sorted(sizes, key=lambda name: sizes[name] if name in packed else math.inf, reverse=True)
    stays = set() if options.train_weights else {"emb.weight"}
    for name, tensor in _read_ahead(tensors, order, stays, options.device):
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        if name == "head.weight" and options.quant_type and options.quant_head:
            weight = tensor.to(options.device, options.compute_dtype, non_blocking=True)
            model.head = FrozenHead.from_weight(weight, options.quant_type, options.compute_dtype)
        elif name in packed:
            _place_packed(model, module_name, tensor, options)
        elif name in stays:
            model.emb.keep_on_host(tensor)
        else:
            _place_parameter(module, parameter_name, tensor, options)
        on_progress(name)
    for name, state_shape in state_shapes(shape).items():
        start = tensors[name] if name in tensors else torch.zeros(state_shape)
        start = start.to(options.device, torch.float32, copy=True)
        module = model.get_submodule(name.rpartition(".")[0])
        module.time_state = nn.Parameter(start, requires_grad=not options.train_weights)
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


def _place_packed(model: RWKV6, module_name: str, weight: Tensor, options: LoadOptions) -> None:
    parent_name, _, child_name = module_name.rpartition(".")
    on_device = weight.to(options.device, options.compute_dtype, non_blocking=True)
    assert options.quant_type is not None
    # The backward of a recomputed layer comes back to the time mix after the feed-forward, with whose matrices it is
    # done one by one (`_FeedAgain`): the former gain by buffers of their own, the latter do not.
    kind = module_name.split(".", 2)[2]
    slot = kind if kind.startswith("att.") else ""
    linear = FrozenLinear.from_weight(on_device, options.quant_type, options.compute_dtype, slot=slot)
    setattr(model.get_submodule(parent_name), child_name, linear)


def _place_parameter(module: nn.Module, name: str, weight: Tensor, options: LoadOptions) -> None:
    if options.train_weights:
        placed = weight.to(options.device, torch.float32, copy=True)
    else:
        placed = weight.to(options.device, options.compute_dtype)
    module.register_parameter(name, nn.Parameter(placed, requires_grad=options.train_weights))
