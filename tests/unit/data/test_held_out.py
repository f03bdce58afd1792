"""A share of the data that is kept from training, and held-out data that are trained on."""

from __future__ import annotations

import numpy as np
import pytest

from src.data.documents import Documents
from src.data.held_out import overlap_statements, shared_documents, shared_prompts, split_documents, split_pairs
from src.data.preferences import PreferencePair
from src.errors import DataError


def documents(*texts: list[int], counted: list[int] | None = None) -> Documents:
    sizes = np.array([len(text) for text in texts])
    stream = np.concatenate(texts).astype(np.int64)
    mask = None if counted is None else np.isin(np.arange(len(stream)), counted)
    return Documents.from_stream("data", stream, np.cumsum(sizes) - sizes, sizes, 100, stream_counted=mask)


def contents(some: Documents) -> list[list[int]]:
    return [some.tokens(index).tolist() for index in range(len(some))]


MANY = documents(*([n, n + 1, n + 2] for n in range(40)))


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999])
def test_every_document_is_in_one_of_both_parts(share: float) -> None:
    training, held_out = split_documents(MANY, share, seed=7, row_tokens=9)
    assert len(held_out) == min(max(round(share * 40), 1), 39)
    assert sorted(contents(training) + contents(held_out)) == contents(MANY)
    assert held_out.total_tokens == 3 * len(held_out)
    assert training.total_tokens == 120 - held_out.total_tokens
    assert set(training.numbers) | set(held_out.numbers) == set(MANY.numbers)


def test_it_is_a_function_of_the_seed() -> None:
    first, again, other = (split_documents(MANY, 0.2, seed, 9)[1].numbers.tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert first == sorted(first)


def test_copies_go_together() -> None:
    copies = documents(*[[5, 6, 7], [1, 2, 3], [5, 6, 7], [1, 2, 3, 4]] * 5)
    for seed in range(20):
        training, held_out = split_documents(copies, 0.1, seed, 9)
        assert not {tuple(text) for text in contents(training)} & {tuple(text) for text in contents(held_out)}


def test_what_cannot_be_measured_is_not_held_out() -> None:
    """The loss is on the first and last document only."""
    some = documents([1, 2, 3], [4, 5, 6], [7, 8, 9], counted=[2, 8])
    for seed in range(9):
        training, held_out = split_documents(some, 0.01, seed, 9)
        assert contents(held_out) in ([[1, 2, 3]], [[7, 8, 9]])
        assert [4, 5, 6] in contents(training)


@pytest.mark.parametrize("some", [documents([1, 2, 3]), documents([1, 2, 3], [1, 2, 3])])
def test_too_little_to_hold_out(some: Documents) -> None:
    with pytest.raises(DataError, match="data has fewer than two different documents to train on, so that --val_share"):
        split_documents(some, 0.5, 1, 9)


def test_pairs_of_a_prompt_go_together() -> None:
    pairs = [PreferencePair([n % 7], [n], [n + 1]) for n in range(28)]
    kept, held = split_pairs(pairs, 0.3, 5, "pairs")
    assert sorted(kept + held) == list(range(28))
    assert len(held) == 8
    assert not {n % 7 for n in kept} & {n % 7 for n in held}
    assert (kept, held) == split_pairs(pairs, 0.3, 5, "pairs")
    with pytest.raises(DataError, match="fewer than two different prompts"):
        split_pairs(pairs[:1] * 3, 0.3, 5, "pairs")


def test_overlaps_are_counted() -> None:
    held_out = documents([1, 2, 3], [2, 3, 4], [50, 51, 52], [1, 2])
    assert shared_documents(held_out, MANY) == 2
    assert shared_documents(MANY, MANY) == 40
    pairs = [PreferencePair([n], [n], []) for n in range(4)]
    assert shared_prompts([*pairs, PreferencePair([9], [1], [])], pairs) == 4
    assert overlap_statements(0, 4, "lines", "in x") == ()
    (said,) = overlap_statements(2, 4, "lines", "in --data_file x")
    assert said.startswith("warning: 2 of 4 held-out lines are in --data_file x, too")
