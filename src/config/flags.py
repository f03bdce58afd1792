"""How flags are declared, read from their texts, and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, TypeVar

from src.errors import ConfigError

BY_METHOD = math.inf
"""Default of a number that the method of training has a value for; no command line can give it."""

Given = Mapping[str, str]
"""The flags on a command line as texts, without the dashes."""
Lines = Iterator[str]
"""Sentences for the user."""

INPUT, INPUTS, OUTPUT, FOLDER = "input", "inputs", "output", "folder"
"""Kinds of paths, see `flag`."""

_SHOWN_CHARACTERS = 60
_LONGEST_NAME_BYTES = 255
_LONGEST_PATH_BYTES = 4095
_NUL = "holds a NUL character, which no file and no program takes: leave it out"


@dataclass(frozen=True)
class Rule:
    """What must hold for a value, and in which words; the flag and its value stand before them."""

    holds: Callable[[Any], bool]
    words: str


AT_LEAST_1 = Rule(lambda value: value >= 1, "must be at least 1")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "must not be negative")
ABOVE_0 = Rule(lambda value: value > 0, "must be above 0")
SHARE = Rule(lambda value: 0 <= value <= 1, "must lie between 0 and 1")
SHARE_BELOW_1 = Rule(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
LARGEST: dict[type, float] = {int: 2**31 - 1, float: 1e12}
"""Beyond these no number means anything, whatever its flag; most flags state less."""
MOST_SEED = 2**32 - 1
MOST_STEPS = 10**9
"""Of steps, epochs and positions: years of training."""


def empty_paths(config: Flags, *names: str) -> Lines:
    """A sentence for each of these flags that is empty: no folder and no file is meant by that."""
    for name in names:
        if not getattr(config, name):
            yield f"--{name} is empty: give a path, or leave the flag out"


def unset_inputs(config: Flags, given: Given, *names: str) -> Lines:
    """A sentence for each of these flags that was left to the original's default, which is not there."""
    for name in names:
        if name not in given and not os.path.exists(getattr(config, name)):
            yield f"--{name} is missing: name the file (the original's {getattr(config, name)} is not here)"


def flag(
    default: Any,
    text: str,
    choices: tuple[Any, ...] = (),
    *,
    must: Rule | None = None,
    most: float | None = None,
    path: str = "",
    only_with: tuple[str, int] | None = None,
    several: bool = False,
) -> Any:
    """Declares one command-line flag as a dataclass field.

    Args:
        default: of the flag's type: str, int or float.
        text: for the help.
        choices: all values, where they can be listed; -1 stands for "not given" and is not shown.
        must: what has to hold for the value.
        most: the largest number it takes, in either direction; without it `LARGEST` of its type.
        path: INPUT for a file that is read, INPUTS for several of them, divided by commas or words, or a folder;
            OUTPUT for one that is written, FOLDER for a folder.
        only_with: another flag and the value it must have for this one to have an effect.
        several: whether its value may be several words of the command line, or none.
    """
    metadata = {
        "help": text,
        "choices": choices,
        "must": must,
        "most": most,
        "path": path,
        "only_with": only_with,
        "several": several,
    }
    return field(default=default, metadata=metadata)


_Config = TypeVar("_Config", bound="Flags")


@dataclass(frozen=True)
class Flags:
    """Base of each subject's flags and, through them, of each script's configuration.

    A subject is a frozen dataclass that names its `group`. A configuration inherits from its subjects, the last one
    first, since a dataclass takes its fields from its last base on. Both may define `_contradictions(self, given)`
    and `_remarks(self)`, which yield lines; all of them are asked.
    """

    group: ClassVar[str] = ""
    unsupported: ClassVar[Mapping[str, tuple[str, str]]] = {}
    understood: ClassVar[Mapping[str, bool]] = {}
    """Flags that are translated into others, and whether they may stand without a value."""

    def __init_subclass__(cls, group: str = "") -> None:
        cls.group = group

    @classmethod
    def groups(cls) -> dict[str, tuple[Field[Any], ...]]:
        """The flags of each subject, in the order of the help."""
        parts = [part for part in reversed(cls.__mro__) if issubclass(part, Flags)]
        return {part.group: dataclasses.fields(part) for part in parts if part.group}

    @classmethod
    def from_flags(cls: type[_Config], given: Given) -> _Config:
        """Builds the configuration from flag texts; all values are then final and consistent.

        Raises:
            ConfigError: naming every problem at once.
        """
        given, problems = cls._translated(given)
        values: dict[str, Any] = {}
        refused: list[str] = []
        specs = {spec.name: spec for spec in dataclasses.fields(cls)}
        for name, text in given.items():
            if name in cls.unsupported:
                default, reason = cls.unsupported[name]
                if not _same(text, default):
                    problems.append(f"--{name} {shortened(text)} is not supported ({reason}): leave it out")
                continue
            try:
                values[name] = _typed(specs[name], text)
            except ConfigError as problem:
                refused.append(name)
                problems.append(str(problem))
        config = cls(**values)._completed()
        missing = tuple(f"--{name} is missing" for name in refused)
        problems += [problem for problem in config._problems(given) if not problem.startswith(missing)]
        if problems:
            raise ConfigError(_together(problems))
        return config

    def notes(self) -> list[str]:
        """One line for each flag that was accepted without having an effect, or with a doubtful one."""
        lines = self._asked_of_all("_remarks")
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.metadata["only_with"] and value != spec.default:
                switch, on = spec.metadata["only_with"]
                if getattr(self, switch) != on:
                    lines.append(f"{self._seen(spec.name, {})} has no effect without --{switch} {on}")
        return lines

    @classmethod
    def _translated(cls, given: Given) -> tuple[Given, list[str]]:
        """The flags that are meant, and what is wrong with spellings that are understood."""
        return given, []

    def _completed(self: _Config) -> _Config:
        """With the defaults that depend on other flags."""
        return self

    def _problems(self, given: Given) -> list[str]:
        ruled = [(spec.name, spec.metadata["must"]) for spec in dataclasses.fields(self)]
        lines = [
            f"{self._seen(name, given)} {rule.words}"
            for name, rule in ruled
            if rule and not rule.holds(getattr(self, name))
        ]
        return lines + self._asked_of_all("_contradictions", given)

    def _seen(self, name: str, given: Given) -> str:
        """A flag with its value for a sentence: as it was typed, or as other flags or the defaults say it."""
        value = getattr(self, name)
        plain = f"{value:g}" if isinstance(value, float) else f"{value}"
        return f"--{name} {shortened(given[name].strip() if name in given else plain)}"

    def _asked_of_all(self, question: str, *arguments: Any) -> list[str]:
        """The lines that every subject, and at last the configuration, has to a question."""
        answering = [part for part in reversed(type(self).__mro__) if question in vars(part)]
        return [line for part in answering for line in vars(part)[question](self, *arguments)]


def names_in(text: str) -> tuple[str, ...]:
    """The names in `a,b`, `a b`, `["a", "b"]`, or what a shell leaves of it; none in `[]`."""
    inner = text.strip().removeprefix("[").removesuffix("]")
    words = (word.strip("\"'") for word in inner.replace(",", " ").split())
    return tuple(dict.fromkeys(word for word in words if word))


def _typed(spec: Field[Any], text: str) -> Any:
    """A text as the flag's type, which is its default's.

    Raises:
        ConfigError: it is none of this type, or none of the choices.
    """
    kind: type = type(spec.default)
    value = _text(spec, text) if kind is str else _number(spec, text)
    choices = spec.metadata["choices"]
    if choices and value not in choices:
        allowed = ", ".join(str(choice) for choice in choices if choice != -1)
        shown = shortened(text)
        shown = shown if shown.isprintable() else repr(shown)  # a line break would tear the sentence
        raise ConfigError(f"--{spec.name} {shown} is unknown: use one of {allowed}")
    return value


def _text(spec: Field[Any], text: str) -> str:
    if problem := limit_problem(spec, text):
        raise ConfigError(f"--{spec.name} {shortened(text)!r} {problem}")
    return text


def _number(spec: Field[Any], text: str) -> int | float:
    kind: Any = type(spec.default)
    try:
        if not text.isascii():  # int and float take the digits of all scripts
            raise ValueError
        value: int | float = kind(text)
    except ValueError:
        digits = text.strip().lstrip("+-")
        if not (digits.isascii() and digits.isdecimal()):
            named = {int: "a whole number", float: "a number"}[kind]
            raise ConfigError(f"--{spec.name} {shortened(text)!r} is not {named}{_whole(text)}") from None
        value = math.inf  # more digits than Python reads
    problem = limit_problem(spec, value) or ("" if value else lost_number(text))
    if problem:
        raise ConfigError(f"--{spec.name} {shortened(text.strip())} {problem}")
    return value


def _whole(text: str) -> str:
    """How a whole number that is written as another kind of number has to be written, as the end of a sentence."""
    for kind, argument in ((float, ()), (int, (0,))):
        with contextlib.suppress(ValueError, OverflowError):
            number = kind(text, *argument)
            if text.isascii() and number == int(number) and abs(number) <= LARGEST[int]:
                return f": write {int(number)}"
    return ""


def lost_number(text: str) -> str:
    """What is wrong with a text that was read as 0, as the end of a sentence; "" if it says 0."""
    mantissa = re.split("[eE]", text, maxsplit=1)[0]
    return "is too close to 0: take 0, or a larger number" if re.search("[1-9]", mantissa) else ""


def limit_problem(spec: Field[Any], value: float | str) -> str:
    """What is wrong with a value of the flag's type wherever it stands, as the end of a sentence; "" is nothing."""
    if isinstance(value, str):
        return path_problem(value, spec.metadata["path"])
    kind = type(spec.default)
    most = spec.metadata["most"] or LARGEST[kind]
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number"
    return f"is too large: it takes at most {shown_number(most)}" if abs(value) > most else ""


def shown_number(value: float) -> str:
    """A limit as a reader wants it: 1,000,000 or 1e+12."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def path_problem(text: str, path: str) -> str:
    """What keeps a text from naming a file, as the end of a sentence; "" when nothing does, or it is empty.

    Args:
        text: as it was given.
        path: INPUT, INPUTS, OUTPUT, FOLDER, or "" for a text that names none of them.
    """
    if path == INPUTS:
        parts = [text] if os.path.exists(text) else text.split(",")
        return next(filter(None, (path_problem(part, INPUT) for part in parts)), "")
    if "\0" in text:
        return _NUL
    if not path:
        return ""
    if text and not text.strip():
        return "is white space alone: name a file or folder"
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        return "holds a character that names of files cannot have here: choose another name"
    longest = max(map(len, encoded.split(os.fsencode(os.sep))))
    if longest > _LONGEST_NAME_BYTES:
        return f"holds a name of {longest:,} bytes, and file systems take {_LONGEST_NAME_BYTES}: choose a shorter one"
    if len(encoded) > _LONGEST_PATH_BYTES:
        return f"has {len(encoded):,} bytes, and systems take {_LONGEST_PATH_BYTES:,}: choose a shorter path"
    if path == OUTPUT and text.endswith(os.sep):
        return "ends like a folder: give the name of the file to write"
    # Opening a pipe waits for somebody to write into it, and a device may never end.
    if path == INPUT and os.path.exists(text) and not os.path.isfile(text) and not os.path.isdir(text):
        return "is a pipe or a device: name an ordinary file"
    return ""


class WrittenNumber(float):
    """A number of a JSON text that knows how it was written there."""

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def parsed_json(text: str, *, as_written: bool = False) -> tuple[Any, list[str]]:
    """What a JSON text holds, and the keys that it gives twice.

    Args:
        text: JSON.
        as_written: numbers that are no whole ones are `WrittenNumber`s.

    Raises:
        ValueError: it is no JSON.
        RecursionError: it is nested too deeply.
    """
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return content

    kind = WrittenNumber if as_written else None
    return json.loads(text, object_pairs_hook=unique, parse_float=kind, parse_constant=kind), twice


def shortened(text: str) -> str:
    """A text as it was given; of a long one its beginning and its length."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}… ({len(text):,} characters)"


def _same(text: str, default: str) -> bool:
    try:
        return float(text) == float(default)
    except ValueError:
        return text == default


def _together(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)
