"""The forms in which preference files keep a prompt with a better and a worse answer.

Prompt and answers are texts or lists of messages; answers may be conversations that begin with the prompt, or bring it,
as messages or as one text of "Human: …" and "Assistant: …".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.data.forms import (
    ANSWERING,
    INPUTS,
    TURN_FIELDS,
    Notes,
    Reading,
    history_turns,
    joined_turn,
    listed_value,
    turns_of,
)
from src.data.inputs import LeftOut, MalformedEntry, shown, unix_lines
from src.data.templates import WORLD_CHAT, Rendering, Turn

PAIR = "preferences"
OF_MESSAGES, OF_DIALOGUES = f"{PAIR} of messages", f'{PAIR} of dialogues, "Human: …" and "Assistant: …"'
_PROMPTS = ("prompt", "question", "instruction")
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|User|Assistant):")


@dataclass
class Preference:
    """A prompt with a better and a worse answer.

    Attributes:
        form: the one it was recognised as.
        prompt: a question; or where more precedes the answer, a text in the template of World chats.
        chosen, rejected: the answers; the latter "" if there is none.
        notes: what the user should know.
    """

    form: str
    prompt: str
    chosen: str
    rejected: str
    notes: Notes


def preference_of_entry(entry: Mapping[str, Any]) -> Preference:
    """What an entry of a preference file says.

    Raises:
        MalformedEntry: it is no such entry.
        LeftOut: it is one that nothing can be learned from.
    """
    reading = Reading(entry)
    notes = Notes()
    chosen = _answer(reading, "chosen", notes)
    rejected = {name: _answer(reading, name, notes) for name in ("reject", "rejected") if _is_filled(reading, name)}
    texts = {name: answer.text for name, answer in rejected.items() if answer.text.strip()}
    if len(set(texts.values())) > 1:
        raise MalformedEntry(
            f"'reject' is {shown(texts['reject'])} and 'rejected' is {shown(texts['rejected'])}: leave one of them "
            "empty"
        )
    worse = next((rejected[name] for name in ("rejected", "reject") if name in texts), None)
    if worse is None and rejected:
        worse = max(rejected.values(), key=lambda answer: len(answer.text))
    before, form = _before(reading, notes)
    turns = before or chosen.before
    if not turns and (chosen.form or form != PAIR):
        raise LeftOut("no question before the answers")
    if not turns:
        raise MalformedEntry('"prompt" is missing')
    if chosen.before and before and _said(chosen.before[-len(before) :]) != _said(before):
        raise LeftOut("a chosen answer to another prompt")
    if worse is not None and worse.before and _said(worse.before) != _said(chosen.before or turns):
        raise LeftOut("two answers to different questions")
    turns = chosen.before if len(chosen.before) > len(turns) else turns
    if turns[-1].role == ANSWERING:
        raise LeftOut("an answer where the question should be")
    system = reading.text("system") if reading.has("system") else ""
    if system.strip() and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    if len(turns) == 1 and turns[0].role == "user":
        prompt = turns[0].content
    else:
        parts = WORLD_CHAT.render([*turns, Turn(ANSWERING, "")], Rendering())
        prompt = "".join(part.text for part in parts[:-1])
    notes.unread |= reading.unread
    return Preference(chosen.form or form, prompt, chosen.text, worse.text if worse is not None else "", notes)


@dataclass
class _Answer:
    """An answer, and the turns before it and the form it has where it is a conversation."""

    text: str
    before: list[Turn]
    form: str = ""


def _is_filled(reading: Reading, name: str) -> bool:
    return reading.has(name) and reading.take(name) is not None


def _answer(reading: Reading, name: str, notes: Notes) -> _Answer:
    value = listed_value(reading.take(name))
    if isinstance(value, dict):
        value = [value]
    form = OF_MESSAGES
    if isinstance(value, list):
        turns = _messages(value, notes, name)
    else:
        text = reading.needed_text(name, nul=name != "chosen")
        brings_prompt = not any(reading.has(other) for other in (*_PROMPTS, *TURN_FIELDS))
        turns, form = _dialogue_turns(text, notes) if brings_prompt else [], OF_DIALOGUES
        if not turns:
            return _Answer(text, [])
    if not turns or turns[-1].role != ANSWERING:
        raise LeftOut(f'a "{name}" that does not end with an answer')
    return _Answer(turns[-1].content, turns[:-1], form)


def _messages(messages: object, notes: Notes, name: str) -> list[Turn]:
    """See `turns_of`; what pairs have no place for is not read."""
    turns = turns_of(messages, notes, name)
    if any(turn.reasoning.strip() for turn in turns):
        notes.unread.add("messages: reasoning")
    if not all(turn.counted for turn in turns):
        notes.unread.add("messages: weight 0")
    return turns


def _dialogue_turns(text: str, notes: Notes) -> list[Turn]:
    """The turns of a text that begins with who speaks and names them after each blank line; none of any other text.

    Who speaks twice in a row has said both in one turn.
    """
    text, _ = unix_lines(text)
    labels = list(_SPEAKER.finditer(text))
    if not labels or labels[0].start():
        return []
    turns: list[Turn] = []
    for label, end in zip(labels, [*(label.start() for label in labels[1:]), len(text)], strict=True):
        role = ANSWERING if label[1] == "Assistant" else "user"
        turn = Turn(role, text[label.end() : end].strip())
        if turns and turns[-1].role == role:
            turn = joined_turn(turns.pop(), turn)
            notes.joined += 1
        turns.append(turn)
    return turns


def _before(reading: Reading, notes: Notes) -> tuple[list[Turn], str]:
    """What precedes the answers, and the form that it has."""
    for name in _PROMPTS:
        if not reading.has(name):
            continue
        value = listed_value(reading.take(name))
        if isinstance(value, list):
            return _messages(value, notes, name), OF_MESSAGES
        text = reading.needed_text(name)
        if text.lstrip().startswith("Human:"):
            turns = _dialogue_turns(text, notes)
            return turns[:-1] if turns[-1] == Turn(ANSWERING, "") else turns, OF_DIALOGUES
        about = [reading.text(other) for other in INPUTS if name == "instruction" and reading.has(other)]
        asked = "\n".join([text, *(other for other in about if other.strip())])
        return [*history_turns(listed_value(reading.take("history") or [])), Turn("user", asked)], PAIR
    for name in TURN_FIELDS:
        if reading.has(name):
            return _messages(listed_value(reading.take(name)), notes, name), OF_MESSAGES
    return [], PAIR


def _said(turns: list[Turn]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns if turn.role != "system"]
