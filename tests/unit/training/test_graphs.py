"""Padding before a step is recorded changes shapes and nothing else. Recording itself is tested on a GPU."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_training import PAIRS, preference_batch, state_gradients, tiny_model

from src.data.batches import Batch, packed_batch, padded_batch
from src.data.preference_batches import PairForm
from src.model.rwkv6 import RWKV6
from src.training.graphs import GraphedObjective, padded, room_for_targets, shared_size, worth_recording
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
    for prepared, room in ((batch, int), (padded(batch), room_for_targets)):
        model = tiny_model()
        loss, _ = objective.compute(model, objective.stage(model, prepared, room))
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


@pytest.mark.parametrize(("least", "sizes"), [(1, 2), (8, 2), (128, 8), (256, 2)])
def test_sizes_hold_their_counts_and_are_few(least: int, sizes: int) -> None:
    rounded = [shared_size(count, least, sizes) for count in range(1, 8193)]
    assert all(size >= count for count, size in enumerate(rounded, start=1))
    assert rounded == sorted(rounded)
    assert all(size % least == 0 for size in rounded)
    assert all(size < count * (1 + 1 / sizes) + least for count, size in enumerate(rounded, start=1))
    assert all(shared_size(size, least, sizes) == size for size in rounded), "a size is its own"
    for power in range(13):
        between = {size for size in rounded if 2**power < size <= 2 ** (power + 1)}
        assert len(between) <= sizes
    assert shared_size(0, least, sizes) == 0


def recordings(shapes: list[int], most: int) -> list[int]:
    """Shapes in the order in which they are recorded."""
    uses: Counter[tuple[int]] = Counter()
    recorded: set[tuple[int]] = set()
    order = []
    for shape in shapes:
        key = (shape,)
        uses[key] += 1
        if key not in recorded:
            worth, given_up = worth_recording(key, uses, recorded, most)
            if worth:
                recorded.discard(given_up)  # type: ignore[arg-type]
                recorded.add(key)
                order.append(shape)
    return order


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    assert recordings([1, 2, 3, 2, 1, 1, 2], most=4) == [2, 1]


def test_more_shapes_in_turn_than_recordings_do_not_push_each_other_out() -> None:
    assert recordings(list(range(10)) * 20, most=4) == [0, 1, 2, 3]


def test_a_shape_that_comes_much_more_often_takes_the_rarest_ones_place() -> None:
    assert recordings([1, 2, 1, 2, 2, 3, 3, 3, 3], most=2) == [1, 2, 3]


class TestRoom:
    """A GPU of 10 GiB, on which a step has needed 3 beside the 2 that stay allocated; imagined."""

    @pytest.fixture
    def graphed(self, monkeypatch: pytest.MonkeyPatch) -> GraphedObjective:
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**30)
        monkeypatch.setattr(RWKV6, "device", torch.device("cuda"))
        made = GraphedObjective(SFTObjective(), tiny_model())
        made._graphs[("recorded",)] = None  # type: ignore[assignment]
        made._others_fit = False
        return made

    @pytest.mark.parametrize(("free", "limit", "fits"), [(4, 0, True), (3, 0, False), (6, 8, True), (6, 6, False)])
    def test_recordings_go_when_other_steps_need_their_memory(
        self, free: int, limit: int, fits: bool, graphed: GraphedObjective, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 10 * 2**30))
        graphed._limit = limit * 2**30
        with contextlib.nullcontext() if fits else pytest.warns(UserWarning, match="do not fit beside the recordings"):
            graphed._make_room()
        assert bool(graphed._graphs) == graphed._works == fits
        assert graphed._others_fit

    def test_it_is_looked_at_once(self, graphed: GraphedObjective, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (2**34, 2**34))[1])
        graphed._make_room()
        graphed._make_room()
        assert len(asked) == 1
