"""What a run trains, as one object: everything else asks it and does not look at the flags.

A way of training is one file beside this one, one arm of the match below, and its flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from src.adapters.full import FullTraining
from src.adapters.lisa import Draw, Lisa
from src.adapters.plan import AdapterPlan
from src.adapters.states import StateTuning
from src.adapters.tuning import Rates, Tuning
from src.config import TrainConfig
from src.identity import FileIdentity
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape


class Method(Protocol):
    """A way of training.

    Attributes:
        small: whether what is trained is megabytes, not gigabytes.
        recordable: whether its steps can be CUDA graphs.
        in_place: whether there is so much to train that a recorded step leaves gradients in the parameters.
        freezes_matrices: whether the large matrices stay as they are, so that they can be packed.
        adapters: what stands beside the matrices.
    """

    small: bool
    recordable: bool
    in_place: bool
    freezes_matrices: bool
    adapters: AdapterPlan | None

    def trained_names(self, shape: ModelShape) -> list[str]:
        """Keys of the trained parameters."""
        ...

    def rate_factor(self, shape: ModelShape, name: str) -> float:
        """Factor on a trained parameter's learning rate."""
        ...

    def describe(self, shape: ModelShape) -> str:
        """What is trained, for the plan."""
        ...

    def file_bytes(self, shape: ModelShape) -> int:
        """Size of a saved file, its header left out."""
        ...

    def properties(self, shape: ModelShape) -> dict[str, Any]:
        """What a reader of the files must know; `method` says which way of training it is."""
        ...

    def check_files(self, shape: ModelShape, base: FileIdentity | None) -> None:
        """Reads the files that a run goes on with, before anything is done.

        Raises:
            CheckpointError: one cannot be read, or does not fit.
        """
        ...

    def start(self, shape: ModelShape, folder: Path, base: FileIdentity | None) -> Mapping[str, Tensor]:
        """Tensors of files that a run goes on with: they take the place of the base model's, or of fresh ones.

        Raises:
            CheckpointError: a file cannot be read, or does not fit.
        """
        ...

    def begin(self, model: LanguageModel, folder: Path, base: FileIdentity | None, start: Mapping[str, Tensor]) -> None:
        """Writes what its files need beside them, before the first step; `start` is what `start` gave.

        Raises:
            CheckpointError: it cannot be written.
        """
        ...

    def save(self, model: LanguageModel, path: Path) -> None:
        """Writes what was trained, atomically.

        Raises:
            CheckpointError: it cannot be written, or holds what no file should.
        """
        ...

    def next_steps(self, base: str, result: Path, folder: str, template: str | None, merged_note: str) -> list[str]:
        """Lines that say what to do with a run's result.

        Args:
            base: the base model's file.
            result: the file that was written.
            folder: of the run.
            template: for a chat; None where there can be none.
            merged_note: what clients leave out of a model with a state in it; "" if nothing.
        """
        ...


def method_of(config: TrainConfig) -> Method:
    """The way of training that the flags ask for."""
    match config.method:
        case "states":
            return StateTuning()
        case "full":
            return FullTraining(
                layerwise_rates=bool(config.layerwise_lr),
                narrow=config.weights == "bf16",
                in_backward=bool(config.fused_update),
                engine_has_masters=not config.updates_by_tensor,
            )
    rates = Rates(
        states=config.lr_state / config.lr_init if config.trains_states and config.lr_init else 1.0,
        lora_b=config.lora_plus if config.method == "lora" else 1.0,
        layerwise=bool(config.layerwise_lr),
    )
    if config.method == "lisa":
        return Lisa(
            Draw(config.lisa_r, config.lisa_k, config.random_seed),
            parts=config.parts,
            states=config.trains_states,
            loads_states=bool(config.load_state),
            packed=config.quantised,
            packed_head=bool(config.quant_head),
            parks_moments=config.lisa_moments == "park",
            rates=rates,
        )
    return Tuning(
        None if config.method == "parts" else _adapters(config),
        parts=config.parts,
        states=config.trains_states,
        packed=config.quantised,
        packed_head=bool(config.quant_head),
        rates=rates,
        load=config.load_adapter,
        pissa_init=config.pissa_init,
        beside="" if config.trains_states else config.load_state,
    )


def _adapters(config: TrainConfig) -> AdapterPlan:
    return AdapterPlan(
        config.adapter,
        config.adapter_r,
        targets=config.target_names,
        seed=config.random_seed,
        alpha=config.lora_alpha,
        rslora=bool(config.lora_rslora),
        dropout=config.lora_dropout,
        niter=config.svd_niter,
    )
