"""Tools in conversations, in the text that RWKV-7's G1 models know: what there is, what is called, what comes back.

Tools stand in the system turn, a call is an answer that begins with a fenced JSON block, and a result is a turn of the
user's. Source: `RWKV7-G1x-templates.txt` of RWKV-LM (2026-07).
"""

from __future__ import annotations

import json

from src.data.inputs import LeftOut, MalformedEntry, kind_of, string_of

_INSTRUCTION = "Return only a JSON function call."
_RESULT = "Function output:\n"
CALL = '{"name": …, "arguments": {…}}'
"""How a call stands in data, for messages."""


def tools_text(tools: object) -> str:
    """What the system turn says of the tools: lines of a list of texts, or a JSON array of a list of objects.

    Raises:
        MalformedEntry: it is no such list.
    """
    if not isinstance(tools, list) or not tools:
        raise MalformedEntry(f'"tools" is {kind_of(tools)}, expected a list of objects or of texts, not empty')
    if all(isinstance(tool, str) for tool in tools):
        listed = "\n".join(f"- {tool.strip()}" for tool in tools)
    elif all(isinstance(tool, dict) for tool in tools):
        listed = _json(tools)
    else:
        raise MalformedEntry('"tools" is a list of several kinds of things, expected objects or texts')
    return f"Tools:\n{listed}\n{_INSTRUCTION}"


def result_text(result: object) -> str:
    """The user's turn that hands a tool's result back: a text as it is, all else as JSON.

    Raises:
        LeftOut: it is empty.
    """
    text = string_of({"content": result}, "content").strip() if isinstance(result, str) else _json(result)
    if not text or result is None:
        raise LeftOut("an empty result of a tool")
    return f"{_RESULT}{text}"


def joined_results(first: str, second: str) -> str:
    """Two of them as one turn: what several calls made at once give back."""
    return f"{first}\n{second.removeprefix(_RESULT)}"


def call_text(calls: object, said: str, position: int) -> str:
    """An answer that calls tools: its calls as a fenced JSON block, and after that what it says.

    Args:
        calls: as `tool_calls` has them.
        said: beside them.
        position: of the message, for messages.

    Raises:
        MalformedEntry: a call has no name.
        LeftOut: its arguments are no JSON.
    """
    if not isinstance(calls, list) or not calls:
        raise MalformedEntry(f'message {position}: "tool_calls" is {kind_of(calls)}, expected a list, not empty')
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise MalformedEntry(f"message {position}: a call has no name of a function", CALL)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise LeftOut("a call whose arguments are a text that is no JSON") from None
        made.append({"name": function["name"], "arguments": arguments})
    block = f"```json\n{_json(made[0] if len(made) == 1 else made)}\n```"
    return f"{block}\n{said.strip()}" if said.strip() else block


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
