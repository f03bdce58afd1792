"""The files of a result: what was trained, and beside it how."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.adapters.files import description_path, write_description
from src.adapters.method import Method
from src.config import TrainConfig
from src.config.model import quant_name
from src.errors import CheckpointError
from src.identity import FileIdentity
from src.model.language_model import LanguageModel
from src.training.console import warn

_LIBRARIES = ("torch", "pytorch-lightning", "bitsandbytes", "deepspeed")


@dataclasses.dataclass(frozen=True)
class Results:
    """Writes results of one run.

    Attributes:
        method: what is trained.
        config: the flags.
        base: which file the base model is; None for a fresh one.
        losses: training loss of every optimizer step so far; whoever trains adds to them.
    """

    method: Method
    config: TrainConfig
    base: FileIdentity | None = None
    losses: list[float] = dataclasses.field(default_factory=list)

    def save(self, model: LanguageModel, path: Path) -> None:
        """Writes a checkpoint, and a JSON file of its name that says how it was made.

        Raises:
            CheckpointError: one cannot be written.
        """
        self.method.save(model, path)
        write_description(description_path(path), self._description(model))

    def _description(self, model: LanguageModel) -> dict[str, Any]:
        config = self.config
        base: dict[str, str | int] | None = None
        if self.base is not None:
            try:
                base = self.base.as_dict()
            except CheckpointError as problem:  # no reason to lose what was trained
                base = {"file": self.base.name, "size_bytes": self.base.size_bytes}
                _warn_of_base(str(problem))
        return {
            **self.method.properties(model.shape),
            "architecture": model.shape.architecture,
            "quant": quant_name(config.quant_type) if config.quantised else "none",
            "quant_head": bool(config.quant_head),
            "base": base,
            "losses": {"steps": len(self.losses), **(ends_of(self.losses) if self.losses else {})},
            "flags": {**dataclasses.asdict(config), "strategy": config.strategy_flag},
            "versions": _versions(),
        }


def ends_of(losses: Sequence[float]) -> dict[str, float]:
    """Training loss at both ends of a run, `first` and `last`: means over `over` steps, a tenth of it.

    Single steps differ by their data.
    """
    tenth = max(len(losses) // 10, 1)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return {"first": first, "last": last, "over": tenth}


@functools.cache
def _warn_of_base(problem: str) -> None:
    """Says once why the base model's SHA-256 does not stand beside results."""
    warn(f"--load_model {problem}; its SHA-256 is not noted")


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
