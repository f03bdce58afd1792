"""The flags of a run in a TOML file: `--config run.toml`, which each run leaves in its folder.

A key is a flag without its dashes. Flags on the command line come before those of the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from src.config.flags import INPUT, path_problem
from src.errors import ConfigError

NAME = "run.toml"
_LARGEST_BYTES = 1 << 20


def read_flags(path: str, of_files: Collection[str] = ()) -> dict[str, str]:
    """The flags of a file as texts, as a command line would have them.

    Args:
        path: of the file.
        of_files: flags that take several files, which commas divide.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or a value is none a flag can have.
    """
    try:
        import tomllib
    except ImportError:
        raise ConfigError(f"--config {path} is TOML, which Python reads from 3.11 on: give the flags instead") from None
    if problem := path_problem(path, INPUT):
        raise ConfigError(f"--config {path!r} {problem}")
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
        if len(content) > _LARGEST_BYTES:
            raise ConfigError(f"--config {path} has more than {_LARGEST_BYTES:,} bytes: name a file of flags")
        values = tomllib.loads(content.decode("utf-8"), parse_float=str)
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error.strerror}): name a file of flags, as a run leaves it ({NAME})"
        ) from error
    # Too many digits and too many brackets are failures of Python's, not TOML's.
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--config {path} is no TOML ({str(error).splitlines()[0]}): write a line as in lr_init = 1.0 for each flag"
        ) from error
    flags, problems = {}, []
    for name, value in values.items():
        try:
            flags[name] = _as_text(path, name, value, "," if name in of_files else " ")
        except ConfigError as problem:
            problems.append(str(problem))
    if problems:
        raise ConfigError("; ".join(problems))
    return flags


def joined_words(words: Sequence[str], *, of_files: bool) -> str:
    """A flag's text of several words. None at all are an empty list, which differs from a flag that is not there; but
    of files, as a shell has them whose variable is empty, they are no file."""
    return ",".join(words) if of_files else " ".join(words) or "[]"


def _as_text(path: str, name: str, value: Any, divider: str) -> str:
    if name == "config":
        raise ConfigError(f"--config {path} names another file, config = {value!r}: put its flags here instead")
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return joined_words(value, of_files=divider == ",")
    if isinstance(value, dict):
        raise ConfigError(f"--config {path} has a section {name!r}: write its flags at the top, without sections")
    if not isinstance(value, (str, int, float)):
        raise ConfigError(f"--config {path} gives {name} a {type(value).__name__}: give a text, a number or true")
    return str(value)


def as_toml(values: Mapping[str, str | int | float]) -> str:
    """A file of flags.

    Args:
        values: by name. A text that no file can hold, such as a path of undecodable bytes, becomes a remark.
    """
    lines = ["# python train.py --config THIS-FILE --proj_dir FOLDER trains once more as this run did"]
    for name, value in values.items():
        try:
            lines.append(f"{name} = {_literal(value)}")
        except UnicodeEncodeError:
            lines.append(f"# {name} held a text that is no Unicode: give it as a flag")
    return "\n".join(lines) + "\n"


def _literal(value: str | int | float) -> str:
    if not isinstance(value, str):
        return repr(value)
    value.encode()
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
