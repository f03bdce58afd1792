"""The configurations of the state tool: one for each of its commands."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from src.config.flags import FOLDER, INPUT, OUTPUT, Flags, Given, Lines, flag, lost_number, shortened
from src.config.hardware import accelerator_flag, precision_flag
from src.config.model import ARCHITECTURES, QUANT_TYPES
from src.config.told import ToldFlags

CLIENT_NAMES = ("runner", "ai00", "web-rwkv", "rwkv-pip", "rwkvcpp", "hf")


class Share(NamedTuple):
    """A state file and its weight in a blend."""

    file: str
    weight: float


@dataclass(frozen=True)
class StateFlags(Flags):
    """Base of the commands' configurations.

    Attributes:
        words: flags that may also be given without their names, in this order; all of them are needed.
        many: the first of them takes all words but those of the others.
        about: what the command does, for its help.
    """

    words: ClassVar[tuple[str, ...]] = ()
    many: ClassVar[bool] = False
    about: ClassVar[str] = ""

    @classmethod
    def usage(cls) -> str:
        """The words as they stand on a command line."""
        return " ".join("FILE:WEIGHT ..." if cls.many and word == cls.words[0] else word.upper() for word in cls.words)

    def _contradictions(self, given: Given) -> Lines:
        missing = [word for word in self.words if not getattr(self, word)]
        if missing:
            yield f"{' and '.join(word.upper() for word in missing)} missing: give {self.usage()}"


@dataclass(frozen=True)
class InspectConfig(StateFlags, group="files"):
    """`inspect FILE`."""

    words: ClassVar[tuple[str, ...]] = ("file",)
    about: ClassVar[str] = "Says what a file holds: state, adapter or model, its norms, and how it was trained."

    file: str = flag("", "FILE: a state, an adapter, a model, or a folder of HF's peft", path=INPUT)


@dataclass(frozen=True)
class _ExportFiles(StateFlags, group="files"):
    words: ClassVar[tuple[str, ...]] = ("file", "output")
    about: ClassVar[str] = "Writes a state in the form that an inference client takes; an adapter, for hf."

    file: str = flag("", "FILE: a state or a merged model; for hf also an adapter", path=INPUT)
    output: str = flag("", "OUTPUT: the file to write, or for an adapter a folder", path=FOLDER)
    to: str = flag("", "the client", CLIENT_NAMES)
    base: str = flag("", "the model it was trained on: rwkv-pip (x060) and adapters need it", path=INPUT)
    my_testing: str = flag("", "architecture, where neither --base nor the JSON beside FILE says it", ARCHITECTURES)

    def _contradictions(self, given: Given) -> Lines:
        if not self.to and "to" not in given:
            yield f"--to is missing: name the client, one of {', '.join(CLIENT_NAMES)}"


@dataclass(frozen=True)
class ExportConfig(ToldFlags, _ExportFiles):
    """`export FILE OUTPUT --to CLIENT`."""


@dataclass(frozen=True)
class BlendConfig(StateFlags, group="files"):
    """`blend FILE:WEIGHT ... OUTPUT`."""

    words: ClassVar[tuple[str, ...]] = ("states", "output")
    many: ClassVar[bool] = True
    about: ClassVar[str] = "Writes the weighted sum of states that were trained on one model."

    states: str = flag("", "the states and their weights, FILE:WEIGHT each, quoted as for a shell")
    output: str = flag("", "OUTPUT: the state file to write", path=OUTPUT)

    @property
    def shares(self) -> list[Share]:
        """Files and weights, in order; a weight that is no number is NaN."""
        return [Share(*_share(word)) for word in self._words()]

    def _contradictions(self, given: Given) -> Lines:
        if self.states and not self.shares:
            yield f"{shortened(self.states)!r} names no state: write FILE:WEIGHT for each, as in a.pth:0.3"
        for word, share in zip(self._words(), self.shares, strict=True):
            if not share.file or not math.isfinite(share.weight):
                yield f"{shortened(word)!r} is no state with a weight: write FILE:WEIGHT, as in a.pth:0.3"

    def _words(self) -> list[str]:
        try:
            return shlex.split(self.states)
        except ValueError:  # a quotation mark without its other
            return [self.states]


@dataclass(frozen=True)
class DiffConfig(StateFlags, group="files"):
    """`diff FIRST SECOND`."""

    words: ClassVar[tuple[str, ...]] = ("first", "second")
    about: ClassVar[str] = "Says how far two files of the same kind are apart, layer by layer."

    first: str = flag("", "FIRST: a state, an adapter or a model", path=INPUT)
    second: str = flag("", "SECOND: another of the same kind", path=INPUT)


@dataclass(frozen=True)
class _VerifyFiles(StateFlags, group="files"):
    words: ClassVar[tuple[str, ...]] = ("file", "base")
    about: ClassVar[str] = "Says whether a state or adapter fits a model, and how it changes what the model expects."

    file: str = flag("", "FILE: a state or an adapter", path=INPUT)
    base: str = flag("", "BASE: the model (.pth) it was trained on", path=INPUT)
    verify_text: str = flag("", "text or data file to compare on, instead of random tokens", path=INPUT)


@dataclass(frozen=True)
class _VerifyHardware(Flags, group="hardware"):
    accelerator: str = accelerator_flag()
    precision: str = precision_flag()
    quant: str = flag("none", "packs the matrices", ("none", *QUANT_TYPES))


@dataclass(frozen=True)
class VerifyConfig(_VerifyHardware, ToldFlags, _VerifyFiles):
    """`verify FILE BASE`."""


STATE_COMMANDS: dict[str, type[StateFlags]] = {
    "inspect": InspectConfig,
    "export": ExportConfig,
    "blend": BlendConfig,
    "diff": DiffConfig,
    "verify": VerifyConfig,
}


def _share(word: str) -> tuple[str, float]:
    file, _, weight = word.rpartition(":")
    try:
        number = float(weight)
    except ValueError:
        return file, math.nan
    return file, math.nan if not number and lost_number(weight) else number
