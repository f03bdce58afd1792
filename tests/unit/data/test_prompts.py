"""A user's own prompts, one a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.data.prompts import Prompt, read_sample_prompts
from src.data.templates import CHAT_TEMPLATES
from src.errors import DataError


def prompts(text: str, folder: Path, *, chats: bool = True) -> list[Prompt]:
    path = folder / "prompts"
    path.write_bytes(text.encode())
    return read_sample_prompts(str(path), chats=chats)


def test_lines_are_questions_where_chats_are_trained(tmp_path: Path) -> None:
    first, second = prompts("What is a state?\r\n\n  Why?  \n", tmp_path)
    assert first == Prompt("What is a state?", "User: What is a state?\n\nAssistant:", is_turn=True)
    assert second.text == "User: Why?\n\nAssistant:"


def test_and_texts_to_go_on_with_elsewhere(tmp_path: Path) -> None:
    (only,) = prompts("Once upon a time \n", tmp_path, chats=False)
    assert only == Prompt("Once upon a time ", "Once upon a time ", is_turn=False)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"prompt": "Hi", "response": "unread"}', "User: Hi\n\nAssistant:"),
        ('{"prompt": "User: Hi\\n\\nAssistant:"}', "User: Hi\n\nAssistant:"),
        ('{"system": "Be kind.", "prompt": "Hi"}', "System: Be kind.\n\nUser: Hi\n\nAssistant:"),
        ("User: Hi", "User: User: Hi\n\nAssistant:"),
        ('{"text": "As it is: {"}', "As it is: {"),
        (
            '{"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, '
            '{"role": "user", "content": "C"}, {"role": "assistant", "content": "D"}]}',
            "User: A\n\nAssistant: B\n\nUser: C\n\nAssistant:",
        ),
    ],
)
def test_json_lines(line: str, text: str, tmp_path: Path) -> None:
    (only,) = prompts(line, tmp_path)
    assert only.text == text
    assert only.is_turn == (text != "As it is: {")


SYSTEM_AND_QUESTION = '{"system": "Be kind.", "prompt": "Hi"}'
MANY_TURNS = (
    '{"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, '
    '{"role": "user", "content": "C"}]}'
)


@pytest.mark.parametrize(
    ("template", "line", "text"),
    [
        ("question", "Why?", "Question: Why?\n\nAnswer:"),
        ("question", SYSTEM_AND_QUESTION, "System: Be kind.\n\nQuestion: Hi\n\nAnswer:"),
        ("question", "User: Why?\n\nAssistant:", "User: Why?\n\nAssistant:"),
        ("input", MANY_TURNS, "Input: A\n\nResponse: B\n\nInput: C\n\nResponse:"),
        ("think", "Why?", "User: Why?\n\nAssistant: <think"),
        ("no-think", "Why?", "User: Why?\n\nAssistant: <think>\n</think"),
    ],
)
def test_other_templates(template: str, line: str, text: str, tmp_path: Path) -> None:
    if "\n" in line:
        line = json.dumps({"prompt": line})
    path = tmp_path / "prompts"
    path.write_text(line, encoding="utf-8")
    (only,) = read_sample_prompts(str(path), chats=True, template=CHAT_TEMPLATES[template])
    assert only == Prompt(only.shown, text, is_turn=True)


@pytest.mark.parametrize(
    ("template", "written", "shown"),
    [
        ("user", " Because.", "Because."),
        ("think", ">\nHm.\n</think>\nBecause.\n", "<think>\nHm.\n</think>\nBecause."),
        ("no-think", ">\nBecause.", "Because."),
    ],
)
def test_what_a_reader_is_shown(template: str, written: str, shown: str) -> None:
    assert CHAT_TEMPLATES[template].said(written) == shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" \n\n", "holds no prompt"),
        ("a\n{", "line 2: not valid JSON"),
        ('{"question": "x"}', "line 1: its keys are question, expected"),
        ('{"prompt": " "}', 'line 1: "prompt" is empty'),
        ('{"prompt": 3}', "line 1: "),
        ('{"messages": "x"}', '"messages" is'),
        ('{"messages": [{"role": "user"}]}', 'message 1 has no "content"'),
        ('{"messages": [{"role": "me", "content": "x"}]}', "message 1 has the role 'me'; known are"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no message is a question"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
            "line 1: it has a system message behind others, which cannot be asked.",
        ),
    ],
)
def test_what_is_no_prompt(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        prompts(text, tmp_path)
    assert said in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_sample_prompts(str(tmp_path / "none"), chats=True)
