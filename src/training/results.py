"""The files of a result: what was trained, and beside it how."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from pathlib import Path
from typing import Any

from src.adapters.files import description_path, write_description
from src.adapters.method import Method
from src.config import TrainConfig
from src.errors import CheckpointError
from src.identity import FileIdentity
from src.model.language_model import LanguageModel

_LIBRARIES = ("torch", "pytorch-lightning", "bitsandbytes", "deepspeed")


@dataclasses.dataclass(frozen=True)
class Results:
    """Writes results of one run.

    Attributes:
        method: what is trained.
        config: the flags.
        base: which file the base model is; None for a fresh one.
    """

    method: Method
    config: TrainConfig
    base: FileIdentity | None = None

    def save(self, model: LanguageModel, path: Path) -> None:
        """Writes a checkpoint, and a JSON file of its name that says how it was made.

        Raises:
            CheckpointError: one cannot be written.
        """
        self.method.save(model, path)
        write_description(description_path(path), self._description(model))

    def _description(self, model: LanguageModel) -> dict[str, Any]:
        config = self.config
        try:
            base = None if self.base is None else self.base.as_dict()
        except OSError as error:
            raise CheckpointError(f"--load_model {config.load_model} cannot be read: {error.strerror}") from error
        return {
            **self.method.properties(model.shape),
            "architecture": model.shape.architecture,
            "quant": config.quant_type if config.quantised else "none",
            "quant_head": bool(config.quant_head),
            "base": base,
            "flags": dataclasses.asdict(config),
            "versions": _versions(),
        }


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
