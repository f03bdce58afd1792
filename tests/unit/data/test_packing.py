"""Rows that are full, complete, and equally many in every pass."""

from itertools import chain

import numpy as np
import pytest

from src.data.packing import RowPlan, _halved, best_fit


def test_best_fit_takes_the_row_a_length_fills_most():
    assert best_fit([6, 5, 4, 6, 5], capacity=10) == [[0, 2], [1, 4], [3]]
    assert best_fit([5, 5, 1, 9], capacity=10) == [[0, 1], [2, 3]]
    assert best_fit([10, 10], capacity=10) == [[0], [1]]


def test_no_row_is_overfull_and_none_could_join_another():
    lengths = np.random.default_rng(3).integers(1, 101, size=2000)
    rows = best_fit(lengths.tolist(), 100)
    loads = sorted(int(lengths[row].sum()) for row in rows)
    assert loads[-1] <= 100
    assert loads[0] + loads[1] > 100
    assert sum(loads) == lengths.sum()
    assert sum(loads) / (100 * len(rows)) > 0.97


@pytest.mark.parametrize("seed", range(12))
def test_every_pass_has_the_same_number_of_rows_and_every_document_once(seed):
    lengths = np.random.default_rng(seed).integers(1, 33, size=40 + seed)
    plan = RowPlan(lengths, 32, seed)
    compositions = set()
    for pass_number in range(20):
        rows = plan.pass_rows(pass_number)
        assert len(rows) == plan.rows
        assert sorted(chain(*rows)) == list(range(len(lengths)))
        assert max(int(lengths[row].sum()) for row in rows) <= 32
        compositions.add(tuple(map(tuple, rows)))
        assert rows == RowPlan(lengths, 32, seed).pass_rows(pass_number)
    assert len(compositions) == 20


def test_missing_rows_are_made_by_halving_the_last():
    assert _halved([[1, 2, 3, 4], [5], [6, 7, 8], [9, 10]], 4) == [[1, 2, 3, 4], [5], [6, 7, 8], [9, 10]]
    assert _halved([[1, 2, 3, 4], [5], [6, 7, 8]], 5) == [[1, 2], [5], [6], [7, 8], [3, 4]]
    assert sorted(_halved([[1, 2, 3, 4]], 4)) == [[1], [2], [3], [4]]


def test_a_row_longer_than_all_documents_costs_nothing() -> None:
    lengths = np.array([5, 3, 9])
    assert [sorted(row) for row in RowPlan(lengths, 10**14, 0).pass_rows(0)] == [[0, 1, 2]]
