"""Flags <-> configuration; the only module that knows argparse."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from src.config import STATE_COMMANDS, BinidxConfig, MergeConfig, TrainConfig
from src.config.environment import check_environment, check_folder
from src.config.flags import BY_METHOD, INPUTS, Flags, shortened, shown_number
from src.config.run_file import joined_words, read_flags
from src.config.synonyms import meant_by
from src.errors import ConfigError

_NUMBER = re.compile(r"-[\d.]+([eE][-+]?\d+)?")


class SuggestingParser(argparse.ArgumentParser):
    """A parser that raises ConfigError and suggests the nearest flag for an unknown one."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]
        self.differing: dict[str, list[Any]] = {}

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses what is known.

        Raises:
            ConfigError: naming every flag that is given with different values.
        """
        self.differing = {}
        parsed = super().parse_known_args(args, namespace)
        if self.differing:
            raise ConfigError("; ".join(_complaint_of_repetition(flag, all_) for flag, all_ in self.differing.items()))
        return parsed

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += " (a value that begins with a dash is written --flag=VALUE)"
        raise ConfigError(f"{message}; see {self.prog} -h")

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parses, naming every unknown flag at once.

        Raises:
            ConfigError: for unknown flags or missing values.
        """
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(self._stray(unknown))
        return known

    def parse_words(
        self, args: Sequence[str] | None, words: Sequence[str], *, many: bool = False
    ) -> argparse.Namespace:
        """As `parse_args`, with the first texts that belong to no flag as the values of `words`.

        Args:
            args: of the command line; None is this process's.
            words: names of flags, in this order.
            many: the first of them takes all texts but those of the others, quoted as for a shell.

        Raises:
            ConfigError: also if a value is given twice.
        """
        known, unknown = self.parse_known_args(args)
        others = len(words) - 1 - sum(hasattr(known, name) for name in words[1:])
        if many and not any(text.startswith("-") for text in unknown):
            first, rest = unknown[: len(unknown) - others], unknown[len(unknown) - others :]
            unknown = [shlex.join(first), *rest] if first else unknown
        if any(text.startswith("-") for text in unknown) or len(unknown) > len(words):
            stray = self._stray(unknown)
            taken = [text for text in stray if not text.startswith("-")][: len(words)]
            for text in taken:
                stray.remove(text)
            self._refuse(stray)
        for name, text in zip(words, unknown, strict=False):
            if hasattr(known, name):
                raise ConfigError(f"--{name} {getattr(known, name)} and {text!r} are the same: give one of them")
            setattr(known, name, text)
        return known

    @property
    def flags(self) -> Collection[str]:
        """All flags there are, with their dashes."""
        return self._option_string_actions

    @staticmethod
    def _stray(unknown: Sequence[str]) -> list[str]:
        """Those of the texts that belong to no flag which are no values: what stands behind an unknown flag is one."""
        return [
            text
            for before, text in zip(["", *unknown], unknown, strict=False)
            if (text.startswith("-") and not _NUMBER.fullmatch(text)) or not before.startswith("-") or "=" in before
        ]

    def _refuse(self, texts: Sequence[str]) -> NoReturn:
        """Texts of the command line that are no flags."""
        said = "; ".join(map(self.complaint, texts))
        spaces = any(not text.startswith("-") for text in texts)
        raise ConfigError(f"{said}; what holds spaces has to stand in quotes" if spaces else said)

    def complaint(self, text: str) -> str:
        """What is wrong with a text on the command line that is no flag, as a sentence."""
        if not text.startswith("-"):
            return f"{shortened(text)!r} belongs to no flag"
        name = shortened(text.split("=")[0])
        if known := meant_by(name, self.flags):
            return f"unknown flag {name}: {f'use {known}' if known.startswith('--') else known}"
        near = difflib.get_close_matches(name, list(self.flags), n=1, cutoff=0.5)
        return f"unknown flag {name}" + (f": did you mean {near[0]}?" if near else f"; see {self.prog} -h")


class _Once(argparse.Action):
    """Keeps a flag's value. The same value again is no mistake, another one is: none of the two may win silently."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        value = self.const if values is None else values
        first = getattr(namespace, self.dest, value)
        if value not in (found := parser.differing.get(self.dest, [first])):
            parser.differing[self.dest] = [*found, value]
        setattr(namespace, self.dest, first)


def _complaint_of_repetition(name: str, values: list[Any]) -> str:
    texts = [shortened(" ".join(value) if isinstance(value, list) else value) for value in values]
    return f"--{name} is given {len(texts)} different values ({', '.join(map(repr, texts))}): leave one of them"


def given_train_flags(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """The flags on train.py's command line, and behind them those of `--config`, as texts; only those given.

    Raises:
        ConfigError: for unknown flags or missing values.
    """
    parser = SuggestingParser(
        prog="train.py",
        description="Trains the initial state, adapters or weights of an RWKV-6 or RWKV-7 model. Without any flag it "
        "runs the bundled demonstration.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    given = _given(parser, TrainConfig, arguments)
    if not given.get("config"):
        return given
    of_file = read_flags(given["config"], _several_files(TrainConfig))
    if unknown := [name for name in of_file if f"--{name}" not in parser.flags]:
        raise ConfigError("; ".join(f"--config {given['config']}: {parser.complaint(f'--{name}')}" for name in unknown))
    return {**of_file, **given}


def given_flags(config_class: type[Flags], prog: str, description: str) -> dict[str, str]:
    """The flags on the command line of another script, whose flags are those of `config_class`; only those given.

    Raises:
        ConfigError: for unknown flags or missing values.
    """
    return _given(SuggestingParser(prog=prog, description=description), config_class)


def given_merge_flags(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """The words BASE, FILE and OUTPUT, and the flags, on merge_state.py's command line as texts; only those given.

    Raises:
        ConfigError: for unknown flags or missing values, or more than three words.
    """
    parser = SuggestingParser(
        prog="merge_state.py",
        usage="merge_state.py BASE FILE OUTPUT [flags]",
        description="Writes a copy of an RWKV-6 or RWKV-7 model with a trained state, adapter (LoRA, PiSSA, Bone, "
        "Bat) or further weights put in. Every other tensor is copied bit for bit; the inputs are left alone.",
    )
    return _given(parser, MergeConfig, arguments, words=("base_model", "peft_checkpoint", "output"))


def given_binidx_flags(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """The words IN ... and OUT, and the flags, on the command line of src.commands.binidx as texts; only those given.

    Raises:
        ConfigError: for unknown flags or missing values.
    """
    parser = SuggestingParser(
        prog="python -m src.commands.binidx",
        usage="python -m src.commands.binidx IN ... OUT [flags]",
        description="Writes data sets as tokens, OUT.bin and OUT.idx, which this program, RWKV-LM and RWKV-PEFT train "
        "on. What train.py takes for --data_file is read; token 0 ends each document.",
    )
    return _given(parser, BinidxConfig, arguments, BinidxConfig.words, many=True)


def given_state_flags(arguments: Sequence[str] | None = None) -> tuple[str, dict[str, str]]:
    """The command on the state tool's command line, and its words and flags as texts; only those given.

    Raises:
        ConfigError: for an unknown command, unknown flags, missing values, or too many words.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    prog = "python -m src.commands.state"
    chosen = arguments[0] if arguments else ""
    if chosen in STATE_COMMANDS:
        command = STATE_COMMANDS[chosen]
        parser = SuggestingParser(
            prog=f"{prog} {chosen}", usage=f"{prog} {chosen} {command.usage()} [flags]", description=command.about
        )
        return chosen, _given(parser, command, arguments[1:], command.words, many=command.many)
    overview = SuggestingParser(
        prog=prog,
        usage=f"{prog} COMMAND ...",
        description="Looks at states and adapters, writes them for inference clients, blends and compares them.",
        epilog="\n".join(f"{name:8} {command.about}" for name, command in STATE_COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if chosen in ("-h", "--help"):
        overview.parse_args(arguments)
    said = f"{shortened(chosen)!r} is no command" if chosen else "no command is given"
    near = difflib.get_close_matches(chosen, list(STATE_COMMANDS), n=1)
    way_out = f"did you mean {near[0]}?" if near else f"use one of {', '.join(STATE_COMMANDS)}; see {prog} -h"
    raise ConfigError(f"{said}: {way_out}")


def _given(
    parser: SuggestingParser,
    config_class: type[Flags],
    arguments: Sequence[str] | None = None,
    words: Sequence[str] = (),
    *,
    many: bool = False,
) -> dict[str, str]:
    """Parses one flag per field of a configuration, in its groups; texts left for it to convert.

    Args:
        words: flags that may also be given without their names, in this order.
        many: see `SuggestingParser.parse_words`.
    """
    for title, specs in config_class.groups().items():
        group = parser.add_argument_group(title)
        for spec in specs:
            text = _help(spec).replace("%", "%%")
            several: dict[str, Any] = {"nargs": "*"} if spec.metadata["several"] else {}
            if spec.metadata["path"] == INPUTS:
                several = {"nargs": "+"}
            group.add_argument(
                f"--{spec.name}", action=_Once, metavar=_metavar(spec), default=argparse.SUPPRESS, help=text, **several
            )
    for name in (*config_class.unsupported, *config_class.understood):
        alone: dict[str, Any] = {"nargs": "?", "const": "1"} if config_class.understood.get(name) else {}
        parser.add_argument(f"--{name}", action=_Once, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **alone)
    given = vars(parser.parse_words(arguments, words, many=many))
    check_environment(os.environ)
    check_folder()
    files = _several_files(config_class)
    return {
        name: joined_words(text, of_files=name in files) if isinstance(text, list) else text
        for name, text in given.items()
    }


def _several_files(config_class: type[Flags]) -> set[str]:
    """The flags that take several files."""
    return {spec.name for spec in dataclasses.fields(config_class) if spec.metadata["path"] == INPUTS}


def _metavar(spec: dataclasses.Field[object]) -> str:
    choices = [str(choice) for choice in spec.metadata["choices"] if choice != -1]
    if choices:
        return "|".join(choices)
    return {int: "N", float: "X"}.get(type(spec.default), "TEXT")


def _help(spec: dataclasses.Field[object]) -> str:
    text: str = spec.metadata["help"]
    if spec.default in ("", -1, BY_METHOD):
        return text
    most = spec.metadata["most"]
    limit = f"; at most {shown_number(most)}" if most else ""
    return f"{text} (default {spec.default}{limit})"
