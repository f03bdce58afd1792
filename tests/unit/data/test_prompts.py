"""A user's own prompts, one a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.data.prompts import Prompt, read_sample_prompts
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" \n\n", "holds no prompt"),
        ("a\n{", "line 2: not valid JSON"),
        ('{"question": "x"}', "line 1: its keys are question, expected"),
        ('{"prompt": " "}', 'line 1: "prompt" is empty'),
        ('{"prompt": 3}', "line 1: "),
        ('{"messages": "x"}', '"messages" is'),
        ('{"messages": [{"role": "user"}]}', "message 1 is no object with"),
        ('{"messages": [{"role": "me", "content": "x"}]}', "message 1 has the role 'me'; known are"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no message is a question"),
    ],
)
def test_what_is_no_prompt(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        prompts(text, tmp_path)
    assert said in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_sample_prompts(str(tmp_path / "none"), chats=True)
