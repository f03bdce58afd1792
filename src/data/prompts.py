"""Prompts of the user's own, which a run answers now and then: one a line, as text or as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from src.data.forms import Notes, turns_of
from src.data.inputs import LeftOut, MalformedEntry, json_object, numbered_lines, string_of, unix_lines
from src.data.templates import WORLD_CHAT, ChatTemplate, Turn
from src.errors import DataError

PROMPT_FORMS = '{"prompt": …}, {"messages": [{"role": …, "content": …}, …]} or {"text": …}'


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        shown: as the user wrote it, of a conversation its last question.
        text: as the model reads it.
        is_turn: whether an answer follows, which a blank line ends.
    """

    shown: str
    text: str
    is_turn: bool


def read_sample_prompts(path: str, *, chats: bool, template: ChatTemplate = WORLD_CHAT) -> list[Prompt]:
    """Reads a file of prompts; blank lines are passed over.

    A line that is a JSON object is a question ("prompt", with "system" if there is one), a conversation up to its last
    question ("messages", as in training data; answers at its end are left out), or a text to go on with ("text"). Any
    other line is a question if the run trains on chats, and else a text to go on with.

    Args:
        path: the file.
        chats: whether the run trains on chats.
        template: in which questions are written.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a line is malformed.
    """
    prompts = []
    for number, line in numbered_lines(path):
        try:
            if line.lstrip().startswith("{"):
                prompts.append(_of_entry(json_object(line), template))
            else:
                prompts.append(_asked([Turn("user", line)], template) if chats else _text(line.rstrip("\r\n")))
        except MalformedEntry as error:
            raise DataError(f"{path}, line {number}: {str(error).removesuffix('.')}.") from error
        except LeftOut as reason:
            raise DataError(f"{path}, line {number}: it has {reason}, which cannot be asked.") from reason
    if not prompts:
        raise DataError(f"{path} holds no prompt: write one a line.")
    return prompts


def _of_entry(entry: dict[str, Any], template: ChatTemplate) -> Prompt:
    if "messages" in entry:
        turns = _turns(entry["messages"])
    elif "prompt" in entry:
        question = string_of(entry, "prompt")
        if not question.strip():
            raise MalformedEntry('"prompt" is empty')
        turns = [Turn("user", question)]
    elif "text" in entry:
        return _text(string_of(entry, "text"))
    else:
        raise MalformedEntry(f"its keys are {', '.join(entry) or 'none'}, expected {PROMPT_FORMS}")
    if entry.get("system"):
        turns.insert(0, Turn("system", string_of(entry, "system")))
    return _asked(turns, template)


def _turns(messages: object) -> list[Turn]:
    """The turns up to the last question."""
    turns = turns_of(messages, Notes())
    while turns and turns[-1].role == WORLD_CHAT.answering:
        turns.pop()
    if not turns or turns[-1].role != "user":
        raise MalformedEntry("no message is a question (role user) that could be answered")
    return turns


def _asked(turns: list[Turn], template: ChatTemplate) -> Prompt:
    return Prompt(turns[-1].content.strip(), template.asked(*turns), is_turn=True)


def _text(text: str) -> Prompt:
    return Prompt(text, unix_lines(text)[0], is_turn=False)
