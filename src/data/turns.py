"""Conversations written out as text: who speaks where.

A turn begins at the document's start or after a blank line, with its speaker's name and a colon. A name within a line
begins none, and neither does one at the start of a line that no blank line precedes: it belongs to what somebody says.
Only where a document has no answer by this rule, because its turns are lines and not paragraphs, a name at the start of
a line is enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from src.output import several

SYSTEM = "System"


class Speakers(NamedTuple):
    """Names that belong together in a conversation."""

    asking: tuple[str, ...]
    answering: str


SPEAKERS = (
    Speakers(("User",), "Assistant"),
    Speakers(("Question",), "Answer"),
    Speakers(("Instruction", "Input"), "Response"),
)
_ANSWERING = "|".join(speakers.answering for speakers in SPEAKERS)
_ASKING = "|".join(name for speakers in SPEAKERS for name in speakers.asking)

_FORMATTED = re.compile(rf"({SYSTEM}|Assistant|{_ASKING}):.*\n\n({_ANSWERING}):", re.DOTALL)

_LINE_END = r"(?:\r\n|\r(?!\n)|\n)"
_NAMED = rf"(?P<name>{SYSTEM}|{_ASKING}|{_ANSWERING}):"
_PARAGRAPHS = re.compile(rf"(?:\A\s*|{_LINE_END}[ \t]*{_LINE_END}){_NAMED}")
_LINES = re.compile(rf"(?:\A\s*|{_LINE_END}){_NAMED}")


class Stretch(NamedTuple):
    """Characters of a text, from `begin` up to `end`."""

    begin: int
    end: int


@dataclass(frozen=True)
class Answers:
    """What is said in answer in a document.

    Attributes:
        stretches: each from behind the colon of its label up to the next label, or to the end of the text.
        in_lines: whether turns were told apart by line ends, not by blank lines.
        blank: answers without text, which are no stretches.
        repeated: where a speaker has a turn after their own, and their name.
    """

    stretches: tuple[Stretch, ...] = ()
    in_lines: bool = False
    blank: int = 0
    repeated: tuple[int, str] | None = None


def answers_in(text: str) -> Answers:
    """The answers of a conversation, whose speakers are those of its first label that anybody answers."""
    for pattern in (_PARAGRAPHS, _LINES):
        labels = list(pattern.finditer(text))
        speakers = _speakers(label["name"] for label in labels)
        if speakers is not None:
            turns = [label for label in labels if label["name"] in (SYSTEM, speakers.answering, *speakers.asking)]
            return _answers(text, turns, speakers.answering, in_lines=pattern is _LINES)
    return Answers()


def speakers_in(text: str) -> Speakers | None:
    """Who speaks in a conversation in which somebody answers; None if it is none."""
    for pattern in (_PARAGRAPHS, _LINES):
        speakers = _speakers(label["name"] for label in pattern.finditer(text))
        if speakers is not None:
            return speakers
    return None


def _speakers(names: Iterator[str]) -> Speakers | None:
    said = list(names)
    met = [speakers for name in said for speakers in SPEAKERS if name in (*speakers.asking, speakers.answering)]
    return next((speakers for speakers in met if speakers.answering in said), None)


def _answers(text: str, turns: list[re.Match[str]], answering: str, *, in_lines: bool) -> Answers:
    names = [turn["name"] for turn in turns]
    begins = [turn.start("name") for turn in turns]
    stretches = [
        Stretch(turn.end(), end)
        for turn, end in zip(turns, [*begins[1:], len(text)], strict=True)
        if turn["name"] == answering
    ]
    filled = [stretch for stretch in stretches if text[slice(*stretch)].strip()]
    repeats = (
        (begin, name) for before, name, begin in zip(["", *names], names, begins, strict=False) if before == name
    )
    repeated = next((repeat for repeat in repeats if repeat[1] != SYSTEM), None)
    return Answers(tuple(filled), in_lines, len(stretches) - len(filled), repeated)


def is_formatted(prompt: str) -> bool:
    """Whether a prompt, with Unix lines, stands in a template: `User: hi`, a blank line, `Assistant:`."""
    return _FORMATTED.fullmatch(prompt.strip()) is not None


def joined_statement(count: int) -> str:
    """Says that what a speaker says in several messages in a row became one turn."""
    return f"{several(count, 'message')} joined to the one before, of the same speaker."


def formatted_statement(count: int) -> str:
    """Says that such prompts get no template."""
    prompts = "1 prompt" if count == 1 else f"{count} prompts"
    return f"Taken as they are, since the template (User: …, Assistant:) stands in them: {prompts}."
