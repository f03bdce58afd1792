"""The forms in which preference files keep a prompt with a better and a worse answer.

Prompt and answers are texts or lists of messages; answers may be conversations that begin with the prompt, or bring it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.data.forms import ANSWERING, INPUTS, MESSAGES, TURN_FIELDS, Reading, history_turns, listed_value, turns_of
from src.data.inputs import MalformedEntry, shown
from src.data.templates import WORLD_CHAT, Rendering, Turn

PAIR = "preferences"


@dataclass
class Preference:
    """A prompt with a better and a worse answer.

    Attributes:
        form: the one it was recognised as.
        prompt: a question; or where more precedes the answer, a text in the template of World chats.
        chosen, rejected: the answers; the latter "" if there is none.
        unread: names of what was not read.
    """

    form: str
    prompt: str
    chosen: str
    rejected: str
    unread: set[str]


def preference_of_entry(entry: Mapping[str, Any]) -> Preference:
    """What an entry of a preference file says.

    Raises:
        MalformedEntry: it is no such entry.
    """
    reading = Reading(entry)
    unread: set[str] = set()
    chosen = _answer(reading, "chosen", unread)
    rejected = {name: _answer(reading, name, unread) for name in ("reject", "rejected") if _is_filled(reading, name)}
    texts = {name: answer.text for name, answer in rejected.items() if answer.text.strip()}
    if len(set(texts.values())) > 1:
        raise MalformedEntry(
            f"'reject' is {shown(texts['reject'])} and 'rejected' is {shown(texts['rejected'])}: leave one of them "
            "empty"
        )
    worse = next((rejected[name] for name in ("rejected", "reject") if name in texts), None)
    if worse is None and rejected:
        worse = max(rejected.values(), key=lambda answer: len(answer.text))
    before, form = _before(reading, unread)
    turns = before or chosen.before
    if not turns:
        raise MalformedEntry('"prompt" is missing')
    if chosen.before and before and _said(chosen.before[-len(before) :]) != _said(before):
        raise MalformedEntry('"chosen" is a conversation that does not begin with the prompt')
    if worse is not None and worse.before and _said(worse.before) != _said(chosen.before or turns):
        raise MalformedEntry("the two answers are to different questions")
    turns = chosen.before if len(chosen.before) > len(turns) else turns
    system = reading.text("system") if reading.has("system") else ""
    if system.strip() and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    if len(turns) == 1 and turns[0].role == "user":
        prompt = turns[0].content
    else:
        parts = WORLD_CHAT.render([*turns, Turn(ANSWERING, "")], Rendering())
        prompt = "".join(part.text for part in parts[:-1])
    as_messages = bool(chosen.is_messages or form == MESSAGES)
    return Preference(
        f"{PAIR} of messages" if as_messages else form,
        prompt,
        chosen.text,
        worse.text if worse is not None else "",
        reading.unread | unread,
    )


@dataclass
class _Answer:
    """An answer, and the turns before it where it is a conversation."""

    text: str
    before: list[Turn]
    is_messages: bool = False


def _is_filled(reading: Reading, name: str) -> bool:
    return reading.has(name) and reading.take(name) is not None


def _answer(reading: Reading, name: str, unread: set[str]) -> _Answer:
    value = listed_value(reading.take(name))
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return _Answer(reading.needed_text(name, nul=name != "chosen"), [])
    turns = turns_of(value, unread, name)
    if not turns or turns[-1].role != ANSWERING:
        raise MalformedEntry(f'"{name}" does not end with an answer')
    return _Answer(turns[-1].content, turns[:-1], is_messages=True)


def _before(reading: Reading, unread: set[str]) -> tuple[list[Turn], str]:
    """What precedes the answers, and the form that it has."""
    for name in ("prompt", "question", "instruction"):
        if not reading.has(name):
            continue
        value = listed_value(reading.take(name))
        if isinstance(value, list):
            return turns_of(value, unread, name), MESSAGES
        text = reading.needed_text(name)
        about = [reading.text(other) for other in INPUTS if name == "instruction" and reading.has(other)]
        asked = "\n".join([text, *(other for other in about if other.strip())])
        return [*history_turns(listed_value(reading.take("history") or [])), Turn("user", asked)], PAIR
    for name in TURN_FIELDS:
        if reading.has(name):
            return turns_of(listed_value(reading.take(name)), unread, name), MESSAGES
    return [], PAIR


def _said(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns if turn.role != "system"]
