"""A model with what was trained on it, as training has it, and without: both in the room of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from src.adapters.trained import MatrixAdapter, Trained
from src.checkpoint import Checkpoint
from src.errors import ConfigError
from src.loading import LoadOptions, show_and_build
from src.merge import Apart, Merged


class Tuned:
    """A base model, and what was trained on it.

    States and further weights are kept in both forms and copied into the model's parameters; adapters are put in and
    taken out. Beside PiSSA's residual, the factors that it began with stand for the base model.

    Args:
        base: the model's file.
        trained: what is put in; by default nothing.
        options: device, dtype and packing; which tensors are trained is added.

    Attributes:
        model: in eval mode, tuned.
        trained: as given.

    Raises:
        CheckpointError: a value is not finite.
        ConfigError: what was trained cannot be put into such a model.
    """

    def __init__(self, base: Checkpoint, trained: Trained | None, options: LoadOptions) -> None:
        shape = base.info.shape
        self.trained = trained or Trained(Path(base.source))
        _refuse(self.trained, options.quant_type, set(shape.matrix_names()))
        states = shape.state_shapes()
        exact = {*states, *self.trained.weights}
        merged = Merged(base, self.trained, device=options.device)
        self.model = show_and_build(
            Apart(merged, self.trained), shape, dataclasses.replace(options, trained=exact), source=base.source
        ).eval()
        own: Mapping[str, Tensor] = {**self.trained.states, **self.trained.weights}
        self._values = {
            name: (base[name] if name in base else torch.zeros(states[name]), tensor) for name, tensor in own.items()
        }
        self._is_tuned: bool | None = None
        self._modules = {key: self._both_of(key, adapter) for key, adapter in self.trained.adapters.items()}
        self.use(tuned=True)

    @property
    def differs(self) -> bool:
        """Whether there is anything that was trained."""
        return bool(self._values or self._modules)

    @torch.no_grad()
    def use(self, *, tuned: bool) -> None:
        """Makes the model the tuned one, or the base model; one that was interrupted meanwhile is made whole."""
        if self._is_tuned is tuned:
            return
        self._is_tuned = None
        for name, values in self._values.items():
            self.model.get_parameter(name).copy_(values[tuned])
        for key, modules in self._modules.items():
            parent, _, child = key.removesuffix(".weight").rpartition(".")
            setattr(self.model.get_submodule(parent), child, modules[tuned])
        self._is_tuned = tuned

    def _both_of(self, key: str, adapter: MatrixAdapter) -> tuple[nn.Module, nn.Module]:
        """What stands in a matrix's place in the base model and in the tuned one."""
        frozen = self.model.get_submodule(key.removesuffix(".weight"))
        if adapter.first is None:
            return frozen, adapter.module(frozen)
        first = dict(zip(("lora_A", "lora_B"), adapter.first, strict=True))
        return dataclasses.replace(adapter, parameters=first).module(frozen), adapter.module(frozen)


def _refuse(trained: Trained, quant_type: str | None, matrices: set[str]) -> None:
    """Refuses what no model here computes, and trained matrices in a packed model."""
    if trained.by_output:
        raise ConfigError(
            f"{trained.path} is a Bat of peft's, which no model here computes: merge it (merge_state.py) and take the "
            "merged model"
        )
    packed = sorted(matrices.intersection(trained.weights)) if quant_type else []
    if packed:
        raise ConfigError(
            f"--quant {quant_type} packs {packed[0]}, which {trained.path} holds trained: leave --quant out"
        )
