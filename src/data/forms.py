"""The forms in which data sets keep conversations and texts, and how an entry of each is read.

Forms are told apart by the names of fields, entry by entry; capitals do not matter. What a form has no place for is
named as not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from src.config.fields import Fields
from src.config.recognition import QUESTION_ANSWER
from src.data.inputs import LeftOut, MalformedEntry, kind_of, listed_names, shown, string_of
from src.data.templates import Turn
from src.data.tools import CALL, call_text, joined_results, result_text, tools_text

FORMS = (
    '{"messages": […]}, {"conversations": […]}, {"prompt": …, "response": …}, {"instruction": …, "output": …}, '
    '{"question": …, "answer": …} or {"text": …}; others are named with --sft_field'
)
TURN_FIELDS = ("messages", "conversations", "conversation")
INPUTS = ("input", "context")
_REASONING = ("reasoning_content", "reasoning", "thinking")
ANSWERING = "assistant"
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": ANSWERING, "gpt": ANSWERING, "chatgpt": ANSWERING, "model": ANSWERING, "bot": ANSWERING,
    "tool": "tool", "function": "tool", "observation": "tool", "function_call": "call",
}  # fmt: skip
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_NAMES = {
    ("prompt", "response"): "prompt and response", ("prompt", "completion"): "prompt and completion",
    ("instruction", "output"): "Alpaca", ("instruction", "response"): "Dolly",
    ("question", "answer"): "question and answer", ("query", "response"): "query and response",
    ("input", "output"): "input and output",
}  # fmt: skip
TEXT, MESSAGES, SHAREGPT, NAMED = "plain text", "messages", "ShareGPT", "the fields of --sft_field"


@dataclass
class Notes:
    """What the user should know of the messages of an entry.

    Attributes:
        unread: names of what was not read.
        joined: messages joined to the one before, of the same speaker.
    """

    unread: set[str] = field(default_factory=set)
    joined: int = 0


@dataclass
class Content:
    """What an entry says.

    Attributes:
        form: the one it was recognised as.
        turns: of a conversation; none of a text.
        text: of an entry that is one.
        unread: names of what was not read.
        joined: see `Notes`.
    """

    form: str
    turns: list[Turn] = field(default_factory=list)
    text: str = ""
    unread: set[str] = field(default_factory=set)
    joined: int = 0


class Reading:
    """An entry, its fields by name, and which of them were read.

    Attributes:
        entry: values by the names that stand there.
        read: such names.
    """

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry = dict(entry)
        self._names: dict[str, str] = {}
        for name in entry:
            if name == name.strip().lower():
                self._names[name] = name
            else:
                self._names.setdefault(name.strip().lower(), name)
        self.read: set[str] = set()

    def has(self, *names: str) -> bool:
        """Whether there are all of these fields."""
        return all(name in self._names for name in names)

    def take(self, name: str) -> Any:
        """The value of a field, None if it is not there."""
        actual = self._names.get(name)
        if actual is None:
            return None
        self.read.add(actual)
        return self.entry[actual]

    def text(self, name: str) -> str:
        """The text of a field, "" where it is missing or null.

        Raises:
            MalformedEntry: it is no text.
        """
        value = self.take(name)
        actual = self._names.get(name, name)
        return "" if value is None else string_of({actual: value}, actual)

    def needed_text(self, name: str, *, nul: bool = False) -> str:
        """The text of a field that has to be there; `nul` says whether it may hold NUL characters.

        Raises:
            MalformedEntry: it is missing, or no text.
        """
        actual = self._names.get(name, name)
        self.read.add(actual)
        return string_of(self.entry, actual, nul=nul)

    def filled(self, name: str, kind: str) -> str:
        """The text of a question or an answer, which an empty one would end at once.

        Raises:
            MalformedEntry: it is missing or no text.
            LeftOut: it is empty, or null.
        """
        actual = self._names.get(name, name)
        self.read.add(actual)
        value = "" if self.entry.get(actual, "") is None else string_of(self.entry, actual)
        if not value.strip():
            raise LeftOut(f"an empty {kind}")
        return value

    @property
    def unread(self) -> set[str]:
        """Fields that were not read."""
        return self.entry.keys() - self.read

    @property
    def keys(self) -> str:
        """The names of all fields, for messages."""
        return listed_names(list(self.entry)) or "none"


def content_of_entry(entry: Mapping[str, Any], fields: Fields | None = None) -> Content:
    """What an entry says, read in the form that its fields have.

    Args:
        entry: values by name.
        fields: names that stand for known ones; None: fields are looked for by their own.

    Raises:
        MalformedEntry: it is none of the known forms.
        LeftOut: it holds nothing that could be learned, or messages that cannot be written.
    """
    reading = Reading(entry)
    if fields is not None:
        return _of_named(reading, fields)
    for name in TURN_FIELDS:
        if reading.has(name) and not (reading.has("chosen") and name != "messages"):
            return _of_turns(reading, name)
    for question, answer in QUESTION_ANSWER:
        if reading.has(question, answer):
            return _of_question(reading, question, answer)
    if reading.has("text"):
        return Content(TEXT, text=reading.needed_text("text"), unread=reading.unread)
    if reading.has("chosen"):
        raise MalformedEntry(
            "it is a preference pair; make pairs with PrepareOrpoDataset.py --input_csv FILE and train with --orpo 1"
        )
    raise _unknown(reading)


def _unknown(reading: Reading) -> MalformedEntry:
    """Why an entry has none of the known forms."""
    for name, value in reading.entry.items():
        if isinstance(value, list) and value and all(isinstance(element, dict) for element in value):
            inside = f"{shown(name)} is a list of objects: if those are the entries, make a file of that list alone"
            return MalformedEntry(f"its keys are {reading.keys} ({inside})", FORMS)
    asked = next((question for question, _ in QUESTION_ANSWER if reading.has(question)), None)
    if asked is not None:
        answers = " or ".join(f'"{answer}"' for question, answer in QUESTION_ANSWER if question == asked)
        return MalformedEntry(f"it has {reading.keys}, but no {answers}", FORMS)
    return MalformedEntry(f"its keys are {reading.keys}", FORMS)


def _of_named(reading: Reading, fields: Fields) -> Content:
    """An entry whose fields the user has named."""
    missing = [name for name in fields.needed if name not in reading.entry]
    if missing:
        raise MalformedEntry(f"its keys are {reading.keys}, and --sft_field names {shown(missing[0])}")
    entry = {role: reading.entry[name] for role, name in fields.names.items() if name in reading.entry}
    named = Reading(entry)
    try:
        if "body" in fields.names:
            body = entry["body"]
            if isinstance(body, str) and not _is_json_list(body):
                content = Content(TEXT, text=string_of({"body": body}, "body"))
            else:
                content = _of_turns(named, "body")
        else:
            content = _of_question(named, "question", "answer")
    except MalformedEntry as error:
        text = str(error)
        for role, name in fields.names.items():
            text = text.replace(f'"{role}"', f'"{name}"')
        raise MalformedEntry(text) from error
    content.unread = reading.entry.keys() - set(fields.names.values()) | {
        name for name in content.unread if ": " in name
    }
    content.form = NAMED
    return content


def _of_question(reading: Reading, question: str, answer: str) -> Content:
    """A question, what it is about, and the answer; with what was said before."""
    turns, notes = [], Notes()
    system = reading.text("system")
    if system:
        turns.append(Turn("system", system))
    turns += history_turns(listed_value(reading.take("history") or []))
    ends = _dialogue(reading, question, answer, notes)
    if ends is None:
        asked = reading.filled(question, "question")
        about = [reading.text(name) for name in INPUTS if name != question and reading.has(name)]
        reasoning = next((reading.text(name) for name in _REASONING if reading.has(name)), "")
        ends = [
            Turn("user", "\n".join([asked.strip(), *(text.strip() for text in about if text.strip())])),
            Turn(ANSWERING, reading.filled(answer, "answer"), reasoning),
        ]
        if not any(text.strip() for text in about):
            ends[0] = Turn("user", asked)
    if turns and ends[0].role == "system":
        raise LeftOut("a system message behind others")
    name = _NAMES.get((question, answer), NAMED)
    return Content(name, [*turns, *ends], unread=reading.unread | notes.unread, joined=notes.joined)


def _dialogue(reading: Reading, question: str, answer: str, notes: Notes) -> list[Turn] | None:
    """The turns of a prompt and an answer that are both lists of messages; None if they are texts."""
    asked, answered = (reading.take(name) for name in (question, answer))
    if not (isinstance(asked, list) and isinstance(answered, list)):
        return None
    turns = turns_of([*asked, *answered], notes)
    _leave_out_unlearnable(turns)
    return turns


def _of_turns(reading: Reading, name: str) -> Content:
    """A list of messages, with tools and a system message beside it or in it."""
    messages = listed_value(reading.take(name))
    notes = Notes()
    turns = turns_of(messages, notes, name)
    system = reading.text("system")
    if system:
        if turns and turns[0].role == "system":
            raise MalformedEntry('there are a "system" and a system message; keep one')
        turns.insert(0, Turn("system", system))
    tools = reading.take("tools" if reading.has("tools") else "functions")
    if tools not in (None, "", [], "[]"):
        told = [turns.pop(0).content.strip()] if turns and turns[0].role == "system" else []
        turns.insert(0, Turn("system", "\n".join([*filter(None, told), tools_text(listed_value(tools))])))
    _leave_out_unlearnable(turns)
    is_sharegpt = any(isinstance(message, dict) and "from" in message for message in messages)
    form = SHAREGPT if is_sharegpt else MESSAGES
    return Content(form, turns, unread=reading.unread | notes.unread, joined=notes.joined)


def _leave_out_unlearnable(turns: list[Turn]) -> None:
    """Raises LeftOut where messages hold nothing that could be learned."""
    if all(turn.role != ANSWERING for turn in turns):
        raise LeftOut("no answer")
    if not any(turn.counted for turn in turns if turn.role == ANSWERING):
        raise LeftOut("answers of the weight 0 alone")
    for turn in turns:
        if turn.role != "system" and not turn.content.strip():
            raise LeftOut(f"an empty {'answer' if turn.role == ANSWERING else 'question'}")


def turns_of(messages: object, notes: Notes, name: str = "messages") -> list[Turn]:
    """The turns of a list of messages: role and content, or from and value.

    Words of one speaker in several messages in a row become one turn, a line break between them, and so do results of
    tools.

    Args:
        messages: the list.
        notes: to which is added what the user should know.
        name: of the list.

    Raises:
        MalformedEntry: it is none, or a role is unknown.
        LeftOut: they cannot be written as turns that take turns.
    """
    if not isinstance(messages, list):
        raise MalformedEntry(f'"{name}" is {kind_of(messages)}, expected a list')
    turns: list[Turn] = []
    before = ""
    words_before = False
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise MalformedEntry(f"message {position} is {kind_of(message)}, expected an object")
        role = _role(message, position)
        turn, read = _turn(message, position, role)
        words = role not in ("tool", "call") and not any(message.get(name) for name in _CALLS)
        if turn.role == "system" and before not in ("", "system"):
            raise LeftOut("a system message behind others")
        if role == before == "tool":
            turn = turn._replace(content=joined_results(turns.pop().content, turn.content))
        elif turns and turn.role == turns[-1].role:
            turn = joined_turn(turns.pop(), turn, are_words=words and words_before)
            notes.joined += 1
        turns.append(turn)
        before, words_before = role, words
        notes.unread |= {f"messages: {key}" for key in message.keys() - read}
    return turns


def joined_turn(first: Turn, second: Turn, *, are_words: bool = True) -> Turn:
    """Two turns of one speaker as one.

    Raises:
        LeftOut: one of them is more than words, they differ in weight, or the second begins with reasoning.
    """
    if not are_words or first.counted != second.counted or second.reasoning.strip():
        raise LeftOut("messages of one speaker in a row that cannot be joined")
    return first._replace(content="\n".join(filter(None, (first.content.strip(), second.content.strip()))))


def _role(message: dict[str, Any], position: int) -> str:
    """Who says a message: a value of `_ROLES`."""
    said_by = "from" if "from" in message else "role"
    if said_by not in message:
        raise MalformedEntry(f'message {position} has no "role"')
    named = string_of(message, said_by)
    role = _ROLES.get(named.strip().lower())
    if role is None:
        known = (
            "system, user, assistant, tool" if said_by == "role" else "system, human, gpt, function_call, observation"
        )
        raise MalformedEntry(f"message {position} has the role {shown(named)}; known are {known}")
    return role


def _turn(message: dict[str, Any], position: int, role: str) -> tuple[Turn, set[str]]:
    """A message as a turn, and the names of what was read of it."""
    said_by, said = ("from", "value") if "from" in message else ("role", "content")
    calling = next((name for name in _CALLS if role == ANSWERING and message.get(name)), "")
    if not calling and said not in message:
        raise MalformedEntry(f'message {position} has no "{said}"')
    read = {said_by, said}
    counted = True
    if role in (ANSWERING, "call") and message.get("weight") is not None:
        if message["weight"] not in (0, 1):
            raise MalformedEntry(f"message {position} has the weight {message['weight']!r}; known are 0 and 1")
        counted = bool(message["weight"])
        read.add("weight")
    content: Any = message.get(said)
    if role == "call":
        return Turn(ANSWERING, call_text(_listed_calls(content, position), "", position), counted=counted), read
    if role == "tool":
        return Turn("user", result_text(_joined(content, position) if _is_parts(content) else content)), read
    if content is None:  # beside calls nothing, elsewhere an empty turn
        text = ""
    else:
        text = _joined(content, position) if isinstance(content, list) else string_of(message, said)
    if role == ANSWERING:
        read |= {name for name in _CALLS if name == calling or not message.get(name)}
    if calling:
        calls = message[calling]
        text = call_text([calls] if calling == "function_call" else calls, text, position)
    apart = next((name for name in _REASONING if isinstance(message.get(name), str)), "")
    if role == ANSWERING and apart:
        return Turn(role, text, message[apart], counted), {*read, apart}
    return Turn(role, text, counted=counted), read


def _is_parts(content: object) -> bool:
    """Whether a tool's result is a text in parts, and not a list of its own."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(part, dict) and part.get("type") in _TEXT_PARTS and "text" in part for part in content)
    )


def _joined(parts: list[Any], position: int) -> str:
    """The text of a content that is a list of parts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if not isinstance(part, dict):
            raise MalformedEntry(f"message {position} holds {kind_of(part)}; only text can be trained on")
        if kind not in _TEXT_PARTS:
            raise LeftOut(f"a part of the type {shown(str(kind))}, which is no text")
        texts.append(string_of(part, "text"))
    return "".join(texts)


def _listed_calls(value: object, position: int) -> list[Any]:
    """The calls in the text of a turn that is one."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise MalformedEntry(f"message {position} is a function call that is no JSON", CALL) from None
    return calls if isinstance(calls, list) else [calls]


def listed_value(value: Any) -> Any:
    """A list that stands in a field as JSON text, as tables keep it; everything else as it is."""
    if isinstance(value, str) and _is_json_list(value):
        return json.loads(value)
    return value


def _is_json_list(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def history_turns(history: object) -> list[Turn]:
    """The turns of a list of [question, answer]."""
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise MalformedEntry('"history" is no list of [question, answer] pairs')
    turns = []
    for pair in history:
        for role, kind, value in zip(("user", ANSWERING), ("question", "answer"), pair, strict=True):
            text = string_of({"history": value}, "history")
            if not text.strip():
                raise LeftOut(f"an empty {kind}")
            turns.append(Turn(role, text))
    return turns
