"""Flags <-> configuration; the only module that knows argparse."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from typing import NoReturn

from src.config import UNSUPPORTED, TrainConfig
from src.errors import ConfigError


class SuggestingParser(argparse.ArgumentParser):
    """A parser that raises ConfigError and suggests the nearest flag for an unknown one."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} -h")

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parses, naming every unknown flag at once.

        Raises:
            ConfigError: for unknown flags or missing values.
        """
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # A text behind an unknown flag is that flag's value.
            stray = [
                text
                for before, text in zip(["", *unknown], unknown, strict=False)
                if text.startswith("-") or not before.startswith("-") or "=" in before
            ]
            raise ConfigError("; ".join(self._complaint(text) for text in stray))
        return known

    def _complaint(self, text: str) -> str:
        if not text.startswith("-"):
            return f"{text!r} belongs to no flag"
        name = text.split("=")[0]
        near = difflib.get_close_matches(name, list(self._option_string_actions), n=1, cutoff=0.5)
        return f"unknown flag {name}" + (f": did you mean {near[0]}?" if near else f"; see {self.prog} -h")


def train_parser() -> SuggestingParser:
    """The parser of train.py: one flag per field of TrainConfig, texts left for it to convert."""
    parser = SuggestingParser(
        prog="train.py",
        description="Tunes the initial state of an RWKV-6 model. Without any flag it runs the bundled demonstration.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_flags(parser, TrainConfig)
    refused = parser.add_argument_group("accepted at their default only (flags of RWKV-LM-State-4bit)")
    for name in UNSUPPORTED:
        refused.add_argument(f"--{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def given_train_flags(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """The flags on train.py's command line as texts, only those given.

    Raises:
        ConfigError: for unknown flags or missing values.
    """
    return dict(vars(train_parser().parse_args(arguments)))


def _add_flags(parser: SuggestingParser, config_class: type) -> None:
    """One flag per field of a configuration, in the groups the fields name; texts left for it to convert."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for spec in dataclasses.fields(config_class):
        title = spec.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(
            f"--{spec.name}",
            metavar=_metavar(spec),
            default=argparse.SUPPRESS,
            help=_help(spec).replace("%", "%%"),
        )


def given_flags(config_class: type, prog: str, description: str) -> dict[str, str]:
    """The flags on the command line of a script whose flags are the fields of `config_class`; only those given.

    Raises:
        ConfigError: for unknown flags or missing values.
    """
    parser = SuggestingParser(prog=prog, description=description)
    _add_flags(parser, config_class)
    return dict(vars(parser.parse_args()))


def _metavar(spec: dataclasses.Field[object]) -> str:
    choices = [str(choice) for choice in spec.metadata["choices"] if choice != -1]
    if choices:
        return "|".join(choices)
    return {"int": "N", "float": "X"}.get(str(spec.type), "TEXT")


def _help(spec: dataclasses.Field[object]) -> str:
    text: str = spec.metadata["help"]
    if spec.default in ("", -1) and spec.name not in ("random_seed",):
        return text
    return f"{text} (default {spec.default})"
