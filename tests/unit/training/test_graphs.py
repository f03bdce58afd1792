"""Padding before a step is recorded changes shapes and nothing else. Recording itself is tested on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_training import PAIRS, preference_batch, state_gradients, tiny_model

from src.data.batches import Batch, packed_batch, padded_batch
from src.data.preference_batches import PairForm
from src.training.graphs import padded
from src.training.objectives import Objective, PreferenceObjective, SFTObjective


def documents(*sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.integers(1, 257, size) for size in sizes]


BATCHES = {
    "rows": padded_batch(documents(9, 40), [None, None], [0, 1]),
    "packed": packed_batch(documents(9, 40, 3), [None] * 3, [0, 1, 2]),
    "one row": padded_batch(documents(129), [None], [0]),
}


def both_ways(objective: Objective, batch: object) -> list[tuple[float, torch.Tensor]]:
    results = []
    for prepared, grain in ((batch, 1), (padded(batch), 128)):
        model = tiny_model()
        loss, _ = objective.compute(model, objective.stage(model, prepared, grain))
        results.append((loss.item(), state_gradients(model, loss)))
    return results


def assert_same(results: list[tuple[float, torch.Tensor]]) -> None:
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_padding_changes_neither_loss_nor_gradients(batch: Batch) -> None:
    assert_same(both_ways(SFTObjective(), batch))


@pytest.mark.parametrize("form", [PairForm.SHARED_PROMPT, PairForm.TWO_ROWS])
def test_padding_preference_pairs(form: PairForm) -> None:
    assert_same(both_ways(PreferenceObjective(0.4, 0), preference_batch(form, PAIRS)))


def test_batches_of_about_one_size_get_one_shape() -> None:
    shapes = set()
    for sizes in ((100, 20, 3), (99, 28), (60, 60, 4, 2)):
        batch = padded(packed_batch(documents(*sizes), [None] * len(sizes), range(len(sizes))))
        shapes.add((tuple(batch.tokens.shape), batch.layout.roots, batch.layout.root_tokens))
    assert shapes == {((1, 128), 8, 128)}
