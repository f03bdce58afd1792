"""Names that fields of a user's data have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from src.config.flags import shortened

ROLES = ("question", "answer", "input", "system", "history", "reasoning", "body")
_BY_COUNT = {1: ("body",), 2: ("question", "answer"), 3: ("question", "input", "answer")}


@dataclass(frozen=True)
class Fields:
    """Which field of an entry holds what.

    Attributes:
        names: of fields, by what they hold, one of `ROLES`; body: a text, or a list of messages.
    """

    names: Mapping[str, str]

    @property
    def needed(self) -> list[str]:
        """Fields without which an entry is none."""
        return [name for role, name in self.names.items() if role in ("question", "answer", "body")]


def fields_in(text: str) -> tuple[Fields | None, str]:
    """The fields that a value of --sft_field names, and what is wrong with it, as the end of a sentence.

    One name is that of a text or a list of messages, two are question and answer, three question, input and answer.
    `what=name` says it of each. Names with spaces or commas are given as a JSON list.
    """
    names = _names(text)
    if not names:
        return None, ""
    if all("=" in name for name in names):
        by_role = {role: name for role, _, name in (name.partition("=") for name in names)}
        unknown = [role for role in by_role if role not in ROLES]
        if unknown:
            return None, f"says what {shortened(unknown[0])!r} is, and fields are {', '.join(ROLES)}"
        if not ("body" in by_role or {"question", "answer"} <= by_role.keys()):
            return None, "must name the question's field and the answer's, or that of the body"
        if "" in by_role.values() or len(by_role) < len(names):
            return None, "must name each field once"
        return Fields(by_role), ""
    if any("=" in name for name in names) or len(names) not in _BY_COUNT:
        return (
            None,
            "must be one name (text, messages), two (question, answer), three (question, input, answer), or what=name",
        )
    if len(set(names)) < len(names):
        return None, "must name each field once"
    return Fields(dict(zip(_BY_COUNT[len(names)], names, strict=True))), ""


def _names(text: str) -> tuple[str, ...]:
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        listed = None
    if isinstance(listed, list) and all(isinstance(name, str) and name for name in listed):
        return tuple(listed)
    inner = text.strip().removeprefix("[").removesuffix("]")
    return tuple(filter(None, (word.strip("\"'") for word in inner.replace(",", " ").split())))
