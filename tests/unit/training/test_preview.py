"""How documents are shown with what the loss is taken on."""

from __future__ import annotations

import numpy as np
import pytest

from src.data.sampling import Sample
from src.tokenizer import ByteTokenizer, PlainBytes
from src.training.preview import MARKS, PLAIN_MARKS, Marks, marks_for, rendered

BYTES = ByteTokenizer()


def sample(text: str, counted: str, beyond: int = 0) -> Sample:
    """A document of bytes with an end token; `counted` has an x under every token that counts."""
    tokens = np.array([*BYTES.encode(text), 0], np.int64)
    return Sample("line 3 of data", tokens, np.array([mark == "x" for mark in counted.ljust(len(tokens))]), beyond)


def test_what_counts_stands_between_marks() -> None:
    lines = rendered(sample("A:\n\nB: c\n\n", "      xxxxx"), BYTES, MARKS)
    assert lines == ["line 3 of data: 5 of 10 targets (50.0%)", "  | A:", "  | ", "  | B:⟦ c", "  | ", "  | ∎⟧"]


def test_all_but_the_first_and_what_is_cut() -> None:
    lines = rendered(sample("abc", " xxx", beyond=1200), BYTES, PLAIN_MARKS)
    assert lines == ["line 3 of data: 3 of 3 targets (100.0%), 1,200 tokens beyond the row", "  | a[[bc<end>]]"]


def test_nothing_counts() -> None:
    assert rendered(sample("ab", ""), BYTES, MARKS)[1:] == ["  | ab∎"]


def test_colour_ends_with_each_line() -> None:
    lines = rendered(sample("ab\nc", " xxx"), BYTES, Marks("<", ">", "$", colour=True))
    assert lines[1:] == ["  | a\x1b[32m<b\x1b[0m", "  | \x1b[32mc>\x1b[0m$"]


def test_nothing_in_a_document_moves_the_cursor() -> None:
    text = "a\x1b[2J\r\nb\tc\x07\u202ed\u00e9"
    assert rendered(sample(text, ""), BYTES, MARKS)[1:] == [r"  | a\x1b[2J\r", "  | b\tc\\x07\\u202edé∎"]


def test_tokens_that_nothing_reads_are_numbers() -> None:
    made = Sample("document 0", np.array([5, 6, 7, 8]), np.array([False, True, True, False]))
    assert rendered(made, None, MARKS)[1:] == ["  | 5 ⟦6 7⟧ 8"]


def test_bytes_of_utf16() -> None:
    tokens = list("é\0b".encode("utf-16-le"))
    made = Sample("document 0", np.array(tokens), np.array([False, False, True, True, True, True]))
    assert rendered(made, PlainBytes(tokens), MARKS)[1:] == [r"  | é⟦\x00b⟧"]


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", MARKS),
        ("ascii", PLAIN_MARKS),
        ("latin-1", PLAIN_MARKS),
        (None, PLAIN_MARKS),
        ("none-such", PLAIN_MARKS),
    ],
)
def test_marks_are_those_the_output_has(encoding: str | None, expected: Marks) -> None:
    assert marks_for(encoding, terminal=False) == expected
    assert marks_for(encoding, terminal=True).colour
