"""Further documents in every pass: as many of them as make up a share of it, each once before any comes twice.

The training data's documents are in every pass, all of them. Of n of these and data that are to be a share s of the
documents, m = round(n · s / (1 - all shares)) are drawn: pass p has the places p·m up to (p + 1)·m of an endless list,
which is one permutation of the data after the other, each a function of the seed and its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src.data.documents import Documents, Positions, joined
from src.errors import DataError

_STREAM = 0x6D69_7800  # keeps these random numbers apart from those of the passes


@dataclass(frozen=True)
class MixedIn:
    """Documents of which every pass has some.

    Attributes:
        source: what they are called.
        first, count: their indices among all documents.
        share: of the documents of a pass.
    """

    source: str
    first: int
    count: int
    share: float


def mixed(documents: Documents, others: Sequence[tuple[Documents, float]]) -> tuple[Documents, tuple[MixedIn, ...]]:
    """The training data with further data behind them.

    Args:
        documents: of training.
        others: further data, and their share of the documents of a pass.
    """
    together = joined([documents, *(other for other, _ in others)], documents.source) if others else documents
    firsts = np.cumsum([len(documents), *(len(other) for other, _ in others)]).tolist()
    return together, tuple(
        MixedIn(other.source, first, len(other), share) for (other, share), first in zip(others, firsts, strict=False)
    )


class Draws:
    """Which documents of further data a pass has.

    Args:
        indices: of those that can be trained on, at least one.
        per_pass: how many a pass has.
        seed: of their order; None: that of the data.
        number: of the data among all that are mixed in.
    """

    def __init__(self, indices: Positions, per_pass: int, seed: int | None, number: int) -> None:
        self.per_pass = per_pass
        self.indices, self._seed, self._number = indices, seed, number

    def of_pass(self, pass_number: int) -> Positions:
        """int64 [per_pass]."""
        count = len(self.indices)
        begin = pass_number * self.per_pass
        end = begin + self.per_pass
        rounds = [self._round(number) for number in range(begin // count, (end - 1) // count + 1)]
        skipped = begin // count * count
        return np.concatenate(rounds)[begin - skipped : end - skipped]

    def _round(self, number: int) -> Positions:
        if self._seed is None:
            return self.indices
        return np.random.default_rng((self._seed, _STREAM, self._number, number)).permutation(self.indices)


def draws_of(mixes: Sequence[MixedIn], visited: Positions, seed: int | None) -> tuple[Positions, list[Draws]]:
    """(the training data's documents, what is drawn of others) of the documents that can be trained on.

    Args:
        mixes: in the order of their indices.
        visited: indices of what can be trained on, ascending.
        seed: of the draws.

    Raises:
        DataError: of some there is nothing that can be trained on.
    """
    own = visited[visited < mixes[0].first] if mixes else visited
    rest = 1 - sum(mix.share for mix in mixes)
    draws = []
    for number, mix in enumerate(mixes):
        indices = visited[(visited >= mix.first) & (visited < mix.first + mix.count)]
        if not len(indices):
            raise DataError(
                f"{mix.source} cannot be mixed in: nothing that the loss is taken on stands within a row; a larger "
                "--ctx_len keeps it."
            )
        draws.append(Draws(indices, max(round(len(own) * mix.share / rest), 1), seed, number))
    return own, draws
