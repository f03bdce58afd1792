"""Words and flags of writing tokens to a configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from src.cli import given_binidx_flags
from src.config import BinidxConfig
from src.errors import ConfigError

FLAGS = (
    "inputs", "output", "data_type", "sft_field", "template", "tokenizer", "shuffle", "repeat", "seed", "ctx_len",
)  # fmt: skip
"""Every flag. Adding one is a decision: it belongs here too."""


def config(*words: str) -> BinidxConfig:
    return BinidxConfig.from_flags(given_binidx_flags(words))


def test_the_flags_are_these() -> None:
    assert tuple(spec.name for spec in dataclasses.fields(BinidxConfig)) == FLAGS


def test_words_are_files_and_the_last_is_the_output(tmp_path: Path) -> None:
    for name in ("a b.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    made = config(str(tmp_path / "a b.jsonl"), str(tmp_path), "out.bin", "--shuffle", "1", "--repeat", "3")
    assert made.files == [f"{tmp_path}/a b.jsonl", f"{tmp_path}/a b.jsonl", f"{tmp_path}/c.txt"]
    assert (made.prefix, made.shuffle, made.repeat) == ("out", 1, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "IN and OUT missing: give IN ... OUT"),
        (("a.jsonl",), "OUT missing"),
        (("a.jsonl", "out", "--repeat", "0"), "--repeat 0 must be at least 1"),
        (("a.jsonl", "out", "--tokenizer", "gpt"), "--tokenizer gpt is unknown: use one of world, bytes"),
        (("a.jsonl", "out", "--sft_field", "a", "b", "c", "d"), "--sft_field a b c d must be one name"),
        (("empty", "out"), "empty is a folder without data in it: name files"),
        (("a.save", "out"), "a.save is a zip archive"),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("a.save").write_bytes(b"PK\3\4")
    with pytest.raises(ConfigError) as refused:
        config(*words)
    assert message in str(refused.value)


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    made = config(str(tmp_path / "a.txt"), "out", "--template", "think", "--seed", "3")
    assert "--template think has no effect: no input holds entries" in made.notes()
    assert "--seed 3 has no effect without --shuffle 1" in made.notes()
