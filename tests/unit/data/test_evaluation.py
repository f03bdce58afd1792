"""Held-out documents: all of them, once, with each target's place."""

import numpy as np
import pytest

from src.data.batches import IGNORED_TARGET
from src.data.documents import Documents
from src.data.evaluation import evaluation_batches
from src.errors import DataError


def made(sizes, counted=None):
    sizes = np.array(sizes)
    stream = np.arange(1, sizes.sum() + 1)
    starts = np.cumsum(sizes) - sizes
    return Documents.from_stream("data", stream, starts, sizes, 65536, stream_counted=counted)


def places(batches):
    """(target, position) of everything counted."""
    return sorted(
        (target, position)
        for item in batches
        for target, position in zip(
            item.batch.targets.flatten().tolist(), item.positions.flatten().tolist(), strict=True
        )
        if target != IGNORED_TARGET
    )


@pytest.mark.parametrize("batch_tokens", [1, 16, 10_000])
def test_every_target_once_at_its_place(batch_tokens):
    documents = made([5, 2, 30, 9, 9, 12])
    batches = list(evaluation_batches(documents, ctx_len=20, batch_tokens=batch_tokens))
    expected = [
        (int(token), place) for index in range(6) for place, token in enumerate(documents.tokens(index, 21)[1:])
    ]
    assert places(batches) == sorted(expected)
    assert all(item.batch.tokens.numel() <= max(batch_tokens, item.batch.tokens.shape[1]) for item in batches)
    assert all(item.positions.shape == item.batch.tokens.shape for item in batches)


def test_documents_of_like_length_share_a_batch():
    batches = list(evaluation_batches(made([9, 3, 9, 3]), ctx_len=20, batch_tokens=16))
    assert [item.batch.sample_indices for item in batches] == [(0, 2), (1, 3)]
    assert all(item.batch.token_count == item.batch.tokens.numel() for item in batches)


def test_only_answers_count():
    counted = np.array([0, 0, 1, 0, 1, 0, 0, 1], bool)
    batches = list(evaluation_batches(made([5, 3], counted), ctx_len=3, batch_tokens=100))
    assert places(batches) == [(3, 1), (8, 1)]


def test_answers_beyond_the_cut_are_an_error():
    documents = made([4], np.array([0, 0, 0, 1], bool))
    with pytest.raises(DataError, match="nothing to evaluate with --ctx_len 2"):
        list(evaluation_batches(documents, ctx_len=2, batch_tokens=100))
