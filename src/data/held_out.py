"""What is kept from training, to measure on: a share of the data, or a file that may overlap with them.

Whatever is the same stays together: a document's copies, and preference pairs of one prompt, are trained on or held
out, never both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from src.data.documents import Documents, Positions
from src.data.preferences import PreferencePair
from src.errors import DataError

_STREAM = 0x4865_6C64  # keeps these random numbers apart from others of the same seed


def split_documents(documents: Documents, share: float, seed: int, row_tokens: int) -> tuple[Documents, Documents]:
    """(documents to train on, documents held out), a function of the documents, the share and the seed alone.

    Chosen are documents with something to measure within a row, each with all of its copies.

    Args:
        documents: all there are.
        share: of them to hold out, above 0 and below 1; one at least.
        seed: 0 or more.
        row_tokens: tokens that a row takes of a document.

    Raises:
        DataError: there are fewer than two different ones.
    """
    usable = np.flatnonzero(documents.counted_targets(row_tokens))
    chosen = _drawn(len(usable), share, seed, documents.source, f"{documents.unit}s")
    digests = {_digest(documents, index) for index in usable[chosen].tolist()}
    held = _those_among(documents, digests, set(documents.sizes[usable[chosen]].tolist()))
    kept = np.setdiff1d(np.arange(len(documents)), held)
    if not len(np.intersect1d(kept, usable)):
        raise DataError(_too_few(documents.source, f"{documents.unit}s", share))
    return documents.selected(kept), documents.selected(held)


def split_pairs(pairs: Sequence[PreferencePair], share: float, seed: int, source: str) -> tuple[list[int], list[int]]:
    """(numbers of the pairs to train on, numbers of those held out), by their prompts; see `split_documents`."""
    prompts: dict[tuple[int, ...], int] = {}
    prompt_of = [prompts.setdefault(tuple(pair.prompt), len(prompts)) for pair in pairs]
    chosen = set(_drawn(len(prompts), share, seed, source, "prompts").tolist())
    kept, held = ([n for n, prompt in enumerate(prompt_of) if (prompt in chosen) is out] for out in (False, True))
    return kept, held


def shared_documents(held_out: Documents, training: Documents) -> int:
    """How many held-out documents are, token by token, among those that are trained on."""
    sizes = set(held_out.sizes.tolist())
    candidates = np.flatnonzero(np.isin(training.sizes, list(sizes)))
    trained = {_digest(training, index) for index in candidates.tolist()}
    return sum(_digest(held_out, index) in trained for index in range(len(held_out)))


def shared_prompts(held_out: Sequence[PreferencePair], training: Sequence[PreferencePair]) -> int:
    """How many held-out pairs have a prompt that is trained on."""
    prompts = {tuple(pair.prompt) for pair in training}
    return sum(tuple(pair.prompt) in prompts for pair in held_out)


def overlap_statements(shared: int, total: int, what: str, where: str) -> tuple[str, ...]:
    """What the user should know of held-out data that are trained on, in a sentence or none.

    Args:
        shared: how many of them are.
        total: of how many.
        what: they are, in the plural.
        where: else they are.
    """
    if not shared:
        return ()
    return (
        f"warning: {shared:,} of {total:,} held-out {what} are {where}, too: of these the figures say what was learnt "
        "by heart; take them out of one of the two files.",
    )


def _drawn(count: int, share: float, seed: int, source: str, what: str) -> Positions:
    """Which of so many are held out, in ascending order."""
    assert 0 < share < 1
    if count < 2:
        raise DataError(_too_few(source, what, share))
    amount = min(max(round(share * count), 1), count - 1)
    return np.sort(np.random.default_rng((seed, _STREAM)).permutation(count)[:amount])


def _too_few(source: str, what: str, share: float) -> str:
    return (
        f"{source} has fewer than two different {what} to train on, so that --val_share {share:g} cannot hold any out: "
        "leave it out, or give more data."
    )


def _those_among(documents: Documents, digests: Collection[bytes], sizes: Collection[int]) -> Positions:
    """Numbers of the documents with one of these contents, which have one of these sizes."""
    candidates = np.flatnonzero(np.isin(documents.sizes, list(sizes)))
    return np.array([index for index in candidates.tolist() if _digest(documents, index) in digests], dtype=np.int64)


def _digest(documents: Documents, index: int) -> bytes:
    return hashlib.blake2b(documents.tokens(index).tobytes(), digest_size=16).digest()
