"""Weights of which every rank keeps a piece: DeepSpeed's stage 3.

The engine gathers a module's own weights around its call, and lets them go afterwards. Layers here use the weights of
their parts without calling these, so that each layer gathers all of its; the head's are gathered for the whole step.
To read weights elsewhere takes all ranks together.

Source: ZeRO, arXiv 1910.02054, section 5.3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from src.device import global_rank
from src.model.language_model import LanguageModel


def is_sharded(parameter: Tensor) -> bool:
    """Whether an engine has taken it apart."""
    return hasattr(parameter, "ds_id")


def piece_here(parameter: Tensor) -> Tensor:
    """What this rank has of a parameter between steps: all of it, or, in one dimension, its piece."""
    piece: Tensor = parameter.ds_tensor if is_sharded(parameter) and not parameter.numel() else parameter  # type: ignore[attr-defined]
    return piece


def any_sharded(module: nn.Module) -> bool:
    """Whether one of its parameters is."""
    return any(map(is_sharded, module.parameters()))


def gather_by_layer(step: nn.Module, model: LanguageModel) -> None:
    """Tells the engine which weights are used where; nothing if it does not shard them.

    Args:
        step: the module whose call is a step.
        model: in it.
    """
    if not any_sharded(model):
        return
    from deepspeed import zero

    for block in model.blocks:
        for name, parameter in block.named_parameters():
            if not name.startswith("ln0."):  # is called before the layer, as a module
                zero.register_external_parameter(block, parameter)
    for parameter in model.head.parameters():
        zero.register_external_parameter(step, parameter)


def values_on_host(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Copies on the host of the first rank, which alone has them, of parameters by name; all ranks take part."""
    from deepspeed import zero

    values = {}
    for name, parameter in named:
        with zero.GatheredParameters([parameter]):
            if global_rank() == 0:
                values[name] = parameter.detach().to("cpu", copy=True)
    return values


@contextlib.contextmanager
def readable(model: nn.Module) -> Iterator[None]:
    """A context that all ranks enter together, and in which the first has whole parameters in the model.

    Where they are sharded these are copies on the host: to be read, not to compute with.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if is_sharded(parameter)]
    values = values_on_host(named) if named else {}
    with _in_place_of_parameters(model, values):
        yield


@contextlib.contextmanager
def computable(model: LanguageModel) -> Iterator[None]:
    """A context that all ranks enter together to compute with the model outside of a step, each the same."""
    head = [parameter for parameter in model.head.parameters() if is_sharded(parameter)]
    if not head:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(head):
        yield


@contextlib.contextmanager
def _in_place_of_parameters(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    before: list[tuple[Any, str, nn.Parameter]] = []
    for name, value in values.items():
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)._parameters
        parameter = owner[last]
        assert parameter is not None
        before.append((owner, last, parameter))
        owner[last] = nn.Parameter(value, requires_grad=parameter.requires_grad and value.is_floating_point())
    try:
        yield
    finally:
        for owner, last, parameter in before:
            owner[last] = parameter
