"""The configuration of writing data as tokens."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import ClassVar

from src.config.fields import Fields, fields_in
from src.config.flags import AT_LEAST_1, MOST_SEED, NOT_NEGATIVE, OUTPUT, Flags, Given, Lines, flag, shortened
from src.config.recognition import DATA_TYPES, files_of, recognise
from src.config.templates import CHAT_TEMPLATE_NAMES

VOCABULARIES = {"world": 65536, "bytes": 257}
"""Sizes of the models' vocabularies, by the name of the tokenizer."""
_SUFFIXES = (".bin", ".idx")


@dataclass(frozen=True)
class _Files(Flags, group="files"):
    inputs: str = flag("", "IN ...: files of entries or text, binidx prefixes, folders; quoted as for a shell")
    output: str = flag("", "OUT: the common name of OUT.bin and OUT.idx", path=OUTPUT)

    @property
    def prefix(self) -> str:
        """The output without the suffix of one of its files."""
        stem, suffix = os.path.splitext(self.output)
        return stem if suffix in _SUFFIXES else self.output

    @property
    def files(self) -> list[str]:
        """Every file that is read, in order."""
        return [file for word in self._words() for file in files_of(word)]

    def _words(self) -> list[str]:
        try:
            return shlex.split(self.inputs)
        except ValueError:  # a quotation mark without its other
            return [self.inputs]

    def _contradictions(self, given: Given) -> Lines:
        missing = [word for word, value in (("IN", self.inputs), ("OUT", self.output)) if not value]
        if missing:
            yield f"{' and '.join(missing)} missing: give IN ... OUT"
        for word in self._words() if self.inputs else ():
            if not files_of(word):
                yield f"{shortened(word)} is a folder without data in it: name files"


@dataclass(frozen=True)
class _Reading(Flags, group="reading"):
    data_type: str = flag(
        "", "of all inputs: binidx, jsonl (entries) or utf-8 (text, one document a file); found if not given",
        tuple(kind for kind in DATA_TYPES if kind != "dummy"),
    )  # fmt: skip
    sft_field: str = flag("", "names of fields of entries, as train.py has it", several=True)
    template: str = flag("user", "what stands around questions and answers, as train.py has it", CHAT_TEMPLATE_NAMES)
    tokenizer: str = flag("world", "world: of World and G1 models; bytes: of vocabularies of 257", tuple(VOCABULARIES))

    @property
    def named_fields(self) -> Fields | None:
        """Which field of an entry holds what; None: the known ones do."""
        return fields_in(self.sft_field)[0]

    def _contradictions(self, given: Given) -> Lines:
        if problem := fields_in(self.sft_field)[1]:
            yield f"--sft_field {shortened(self.sft_field)} {problem}"


@dataclass(frozen=True)
class _Writing(Flags, group="writing"):
    shuffle: int = flag(0, "1: documents in an order drawn anew for each repetition; 0: that of the files", (0, 1))
    repeat: int = flag(1, "all documents so many times, one pass after the other", must=AT_LEAST_1, most=10**5)
    seed: int = flag(42, "of the orders", must=NOT_NEGATIVE, most=MOST_SEED)
    ctx_len: int = flag(
        0, "prints what RWKV-LM's pre-training wants to know of rows of so many tokens; 0 does not",
        must=NOT_NEGATIVE, most=10**8,
    )  # fmt: skip


@dataclass(frozen=True)
class BinidxConfig(_Writing, _Reading, _Files):
    """Every flag of `src.commands.binidx`."""

    words: ClassVar[tuple[str, ...]] = ("inputs", "output")

    def kind_of(self, file: str) -> str:
        """The data type of an input."""
        return self.data_type or recognise(file).data_type

    def _contradictions(self, given: Given) -> Lines:
        if not self.data_type and self.inputs:
            for file in self.files:
                if problem := recognise(file).problem:
                    yield f"{file} {problem}"

    def _remarks(self) -> Lines:
        kinds = {self.kind_of(file) for file in self.files}
        for name in ("sft_field", "template"):
            if getattr(self, name) != getattr(BinidxConfig, name) and "jsonl" not in kinds:
                yield f"--{name} {shortened(getattr(self, name))} has no effect: no input holds entries"
        if self.shuffle == 0 and self.seed != BinidxConfig.seed:
            yield f"--seed {self.seed} has no effect without --shuffle 1"
