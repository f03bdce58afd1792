"""What models are compared on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from binidx_files import write_binidx
from factories import tiny_shape

from src.commands.comparison import COMPARED_TOKENS, compared_tokens
from src.errors import DataError

SHAPE = tiny_shape()
CHATS = '{"prompt": "Say a", "response": "a"}\n{"prompt": "Say b", "response": "b"}\n'
AS_TRAINED = "User: Say a\n\nAssistant: a\n\n\0User: Say b\n\nAssistant: b\n\n"


def read(path: Path) -> str:
    """The tokens' text, a zero where a document ends."""
    from src.tokenizer import tokenizer_for_vocabulary

    decode = tokenizer_for_vocabulary(SHAPE.vocab_size).decode
    ids = compared_tokens(str(path), SHAPE).tolist()
    return "".join("\0" if token == 0 else decode([token]) for token in ids)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "hello, world", "hello, world"),
        ("a.txt", "\ufeffone\r\ntwo", "one\ntwo"),
        ("without", "plain", "plain"),
        ("a.jsonl", CHATS, AS_TRAINED),
        ("without", CHATS, AS_TRAINED),
        ("a.json", json.dumps([json.loads(line) for line in CHATS.splitlines()]), AS_TRAINED),
        ("a.jsonl", '{"text": "plain"}', "plain"),
        ("a.csv", "prompt,response\nSay a,a\nSay b,b\n", AS_TRAINED),
    ],
)
def test_data_are_read_as_training_reads_them(name: str, content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read(tmp_path / name) == expected
    if "." in name:  # of a folder
        assert read(tmp_path) == expected


def test_tokens_are_read_too(tmp_path: Path) -> None:
    write_binidx(tmp_path / "documents", [np.array([5, 6, 0], dtype=np.uint16), np.array([7, 8, 0], dtype=np.uint16)])
    assert compared_tokens(str(tmp_path / "documents"), SHAPE).tolist() == [5, 6, 0, 7, 8]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_the_first_are_taken(name: str, tmp_path: Path) -> None:
    text = "".join(map(str, range(1000)))
    (tmp_path / name).write_text(
        text if name == "a.txt" else (json.dumps({"text": text}) + "\n") * COMPARED_TOKENS + "not read"
    )
    assert read(tmp_path / name) == text[:COMPARED_TOKENS]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl is empty"),
        ("a.jsonl", b'{"prompt": "Say a", "respon', "a.jsonl, line 1: not valid JSON"),
        ("a.txt", b"\xff\xfea\0", "is UTF-16, expected UTF-8"),
        ("a.txt", b"\xe9", "line 1: not UTF-8"),
        ("a.txt", b'{"text": "a"}\nand\n', "a.txt is in part JSON, but not an object on every line: name another text"),
        ("pairs.csv", b"prompt,chosen,reject\na,b,c\n", "pairs.csv is a table of preference pairs"),
        ("a.save", b"PK\3\4", "a.save is a zip archive, as .pth and .save files are: name another text"),
    ],
)
def test_what_is_no_text_is_refused(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        compared_tokens(str(tmp_path / name), SHAPE)
    assert expected in str(refused.value)
    assert "--data_type" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["none", "none.txt", "none.jsonl"])
def test_a_missing_one_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"--verify_text .*{name} does not exist"):
        compared_tokens(str(tmp_path / name), SHAPE)


def test_without_a_file_they_are_random() -> None:
    tokens = compared_tokens("", SHAPE)
    assert len(tokens) == COMPARED_TOKENS
    assert set(tokens.tolist()) <= set(range(SHAPE.vocab_size))
