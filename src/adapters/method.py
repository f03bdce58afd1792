"""What a run trains, as one object: everything else asks it and does not look at the flags.

A way of training is one file beside this one, one arm of the match below, and its flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from src.adapters.full import FullTraining
from src.adapters.states import StateTuning
from src.config import TrainConfig
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape


class Method(Protocol):
    """A way of training.

    Attributes:
        small: whether what is trained is megabytes, not gigabytes.
        recordable: whether its steps can be CUDA graphs.
        freezes_matrices: whether the large matrices stay as they are, so that they can be packed.
        needs_base: whether its files are of use only beside the base model.
    """

    small: bool
    recordable: bool
    freezes_matrices: bool
    needs_base: bool

    def trained_names(self, shape: ModelShape) -> list[str]:
        """Keys of the trained parameters, which are kept in fp32."""
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

    def save(self, model: LanguageModel, path: Path) -> None:
        """Writes what was trained, atomically.

        Raises:
            CheckpointError: it cannot be written, or holds what no file should.
        """
        ...

    def next_steps(self, base: str, result: Path, folder: str) -> list[str]:
        """Lines that say what to do with the file `result` of a run in `folder` on `base`."""
        ...


def method_of(config: TrainConfig) -> Method:
    """The way of training that the flags ask for."""
    match config.train_type:
        case "states":
            return StateTuning()
        case "none":
            return FullTraining(layerwise_rates=bool(config.layerwise_lr))
        case other:
            raise AssertionError(other)
