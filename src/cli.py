"""Flags <-> configuration; the only module that knows argparse."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from src.config import TrainConfig
from src.config.flags import BY_METHOD, INPUT, OUTPUT, Flags, path_problem, shortened, shown_number
from src.config.synonyms import meant_by
from src.errors import ConfigError

_NUMBER = re.compile(r"-[\d.]+([eE][-+]?\d+)?")


class SuggestingParser(argparse.ArgumentParser):
    """A parser that raises ConfigError and suggests the nearest flag for an unknown one."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

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
            # A text behind an unknown flag is that flag's value.
            stray = [
                text
                for before, text in zip(["", *unknown], unknown, strict=False)
                if (text.startswith("-") and not _NUMBER.fullmatch(text)) or not before.startswith("-") or "=" in before
            ]
            raise ConfigError("; ".join(self._complaint(text) for text in stray))
        return known

    def _complaint(self, text: str) -> str:
        if not text.startswith("-"):
            return f"{shortened(text)!r} belongs to no flag"
        name = shortened(text.split("=")[0])
        if known := meant_by(name, self._option_string_actions):
            return f"unknown flag {name}: {f'use {known}' if known.startswith('--') else known}"
        near = difflib.get_close_matches(name, list(self._option_string_actions), n=1, cutoff=0.5)
        return f"unknown flag {name}" + (f": did you mean {near[0]}?" if near else f"; see {self.prog} -h")


def given_train_flags(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """The flags on train.py's command line as texts, only those given.

    Raises:
        ConfigError: for unknown flags or missing values.
    """
    parser = SuggestingParser(
        prog="train.py",
        description="Tunes the initial state of an RWKV-6 model. Without any flag it runs the bundled demonstration.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return _given(parser, TrainConfig, arguments)


def given_flags(config_class: type[Flags], prog: str, description: str) -> dict[str, str]:
    """The flags on the command line of another script, whose flags are those of `config_class`; only those given.

    Raises:
        ConfigError: for unknown flags or missing values.
    """
    return _given(SuggestingParser(prog=prog, description=description), config_class)


def merge_arguments() -> argparse.Namespace:
    """The command line of merge_state.py: `base_model`, `state_checkpoint` and `output`.

    Raises:
        ConfigError: for flags, for other than three words, and for words that name no file.
    """
    parser = SuggestingParser(
        prog="merge_state.py",
        description="Write a copy of an RWKV-6 base model that starts from a trained state (time_state). "
        "Every other tensor is copied bit for bit; the inputs are left alone.",
    )
    parser.add_argument("base_model", help="the .pth model that the state was trained on")
    parser.add_argument("state_checkpoint", help="the state file (rwkv-final.pth), or a merged model")
    parser.add_argument("output", help="the model to write; it must be neither of the inputs")
    parsed = parser.parse_args()
    for name, path in vars(parsed).items():
        if problem := path_problem(path, OUTPUT if name == "output" else INPUT) or (
            "" if path else "is empty: name a file"
        ):
            raise ConfigError(f"{name} {shortened(path)!r} {problem}")
    return parsed


def _given(
    parser: SuggestingParser, config_class: type[Flags], arguments: Sequence[str] | None = None
) -> dict[str, str]:
    """Parses one flag per field of a configuration, in its groups; texts left for it to convert."""
    for title, specs in config_class.groups().items():
        group = parser.add_argument_group(title)
        for spec in specs:
            text = _help(spec).replace("%", "%%")
            words: dict[str, Any] = {"nargs": "*"} if spec.metadata["several"] else {}
            group.add_argument(f"--{spec.name}", metavar=_metavar(spec), default=argparse.SUPPRESS, help=text, **words)
    for name in config_class.unsupported:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    # No word is an empty list, which differs from a flag that is not there.
    return {name: (" ".join(text) or "[]") if isinstance(text, list) else text for name, text in given.items()}


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
