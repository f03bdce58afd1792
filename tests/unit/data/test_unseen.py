"""The plan's share of tokens that are never seen is that of the tokens no row shows."""

import numpy as np
import pytest

from src.data.documents import Documents
from src.data.sampling import BatchDataset
from src.data.unseen import unseen_of


def numbered(sizes, counted=None):
    """Documents whose tokens are all different."""
    sizes = np.array(sizes)
    total = int(sizes.sum())
    mask = None if counted is None else np.array(counted, dtype=np.bool_)
    return Documents.from_stream(
        "data", np.arange(total, dtype=np.int32), np.cumsum(sizes) - sizes, sizes, 65536, stream_counted=mask
    )


@pytest.mark.parametrize("mode", ["pad", "only", "pack"])
@pytest.mark.parametrize("ctx_len", [1, 3, 8, 40])
@pytest.mark.parametrize("chance", [None, 0.05, 0.3])
def test_it_is_what_no_row_shows(mode: str, ctx_len: int, chance: float | None) -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(2, 20, size=40)
    counted = None if chance is None else rng.random(sizes.sum()) < chance
    documents = numbered(sizes, counted)
    data = BatchDataset(documents, mode=mode, ctx_len=ctx_len, micro_bsz=1 if mode == "only" else 3, seed=1)
    shown = {token for sample in data.samples() for token in sample.tokens.tolist()}
    unseen = data.plan.unseen
    assert len(shown) + unseen.cut_tokens + unseen.left_out_tokens == documents.total_tokens
    assert unseen.documents + unseen.left_out_documents == len(documents)
    assert unseen.unanswered_documents <= unseen.left_out_documents


def test_windows_may_show_everything() -> None:
    data = BatchDataset(numbered([9, 9]), mode="get", ctx_len=3, micro_bsz=1, seed=1)
    assert data.plan.unseen is None
    assert data.plan.statements() == ()


def test_both_are_said_and_those_that_no_row_would_help() -> None:
    """A long document, one whose answer is beyond the row, one without an answer, and one that fits."""
    counted = [0, 1, 1, 1, 1, 1, *(0, 0, 0, 0, 1), *(0, 0, 0), *(0, 1, 1)]
    documents = numbered([6, 5, 3, 3], counted)
    said = unseen_of(documents, np.array([0, 3]), 3).statements("not evaluated")
    assert said == [
        "warning: 1 of 2 documents is longer than a row and is cut: 3 of 17 tokens (17.6%) are not evaluated; a "
        "larger --ctx_len keeps more.",
        "warning: 2 documents left out, nothing that the loss is taken on stands within a row: another 8 of 17 tokens "
        "(47.1%) are not evaluated; a larger --ctx_len keeps 1 of them.",
    ]
    assert unseen_of(documents, np.array([0, 1, 3]), 6).statements() == [
        "1 document left out, nothing that the loss is taken on stands within a row: 3 of 17 tokens (17.6%) are never "
        "seen."
    ]
    assert unseen_of(numbered([3, 3]), np.array([0, 1]), 3).statements() == []
