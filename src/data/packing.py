"""Packing documents into rows of bounded length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from src.data.documents import Positions


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts each length, in the order given, into the row it fills most; opens a row when none has room.

    Returns:
        Rows of positions in `lengths`, in the order they were opened.
    """
    rows: list[list[int]] = []
    rows_with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit n is set while some row has room for exactly n
    for position, length in enumerate(lengths):
        assert 0 < length <= capacity, f"length {length} does not fit a row of {capacity}"
        roomy = rooms >> length
        if roomy:
            room = length + (roomy & -roomy).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(position)
        rest = room - length
        if rest:
            rows_with_room[rest].append(row)
            rooms |= 1 << rest
    return rows


class RowPlan:
    """Rows of one pass after another, in equal number every time.

    Each pass packs the documents in an order of its own. The number of rows that gives varies a
    little, and must not if a step's place in its pass is to be known at once: a pass with too many
    rows is packed from the longest document down instead, which takes the same number of rows for
    every order of equals; one with too few has its last rows halved.

    Args:
        lengths: int64 [n], positions each document fills.
        capacity: positions of a row.
        seed: of the documents' order; None: the order given, but for documents that fill an earlier row up.

    Attributes:
        rows: number of rows of every pass.
    """

    def __init__(self, lengths: Positions, capacity: int, seed: int | None) -> None:
        self._lengths = lengths
        self._capacity = min(capacity, int(lengths.sum()))  # more is never filled, and --ctx_len may be any number
        self._seed = seed
        longest_first = best_fit(sorted(lengths.tolist(), reverse=True), self._capacity)
        first_pass = self._in_order(pass_generator(seed, 0).permutation(len(lengths)))
        self.rows = max(len(longest_first), len(first_pass))

    def pass_rows(self, pass_number: int) -> list[list[int]]:
        """Rows of document numbers of a pass: a pure function of (lengths, capacity, seed, pass)."""
        generator = pass_generator(self._seed, pass_number)
        order = generator.permutation(len(self._lengths))
        rows = self._in_order(order)
        if len(rows) > self.rows:
            rows = self._in_order(order[np.argsort(-self._lengths[order], kind="stable")])
        return _halved([rows[row] for row in generator.permutation(len(rows))], self.rows)

    def _in_order(self, order: Positions) -> list[list[int]]:
        rows = best_fit(self._lengths[order].tolist(), self._capacity)
        return [order[row].tolist() for row in rows]


def rows_in_order(lengths: Positions, capacity: int, seed: int | None, pass_number: int) -> list[list[int]]:
    """Rows of a pass that may have any number of them; see `RowPlan`."""
    generator = pass_generator(seed, pass_number)
    order = generator.permutation(len(lengths))
    rows = best_fit(lengths[order].tolist(), min(capacity, int(lengths.sum())))
    return [order[rows[row]].tolist() for row in generator.permutation(len(rows))]


class InOrder:
    """Stands for a generator where nothing is to be shuffled."""

    def permutation(self, x: int | Positions) -> Positions:
        """0 … x - 1, or x itself."""
        return np.arange(x) if isinstance(x, int) else x


def pass_generator(seed: int | None, pass_number: int) -> np.random.Generator | InOrder:
    """The orders of a pass, a pure function of its arguments; with None for a seed every order is the one given."""
    return InOrder() if seed is None else np.random.default_rng((seed, pass_number))


def _halved(rows: list[list[int]], count: int) -> list[list[int]]:
    """Halves rows of several documents, from the last one back, until there are `count`."""
    rows = list(rows)
    while len(rows) < count:
        for place in range(len(rows) - 1, -1, -1):
            row = rows[place]
            if len(row) > 1 and len(rows) < count:
                rows[place] = row[: len(row) // 2]
                rows.append(row[len(row) // 2 :])
    return rows
