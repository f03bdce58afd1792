"""Batches filled up to few shapes: what is where, and that nothing that counts changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import PAIRS, preference_batch, state_gradients, tiny_model

from src.config.data import DATALOAD_MODES
from src.data.batches import Batch, packed_batch, padded_batch
from src.data.documents import Documents
from src.data.preference_batches import PairForm, PreferenceBatch, PreferenceDataset
from src.data.preferences import PreferencePair
from src.data.rounding import EXACT, FEW_SHAPES, Rounding, shared_size
from src.data.sampling import BatchDataset
from src.losses import IGNORED_TARGET
from src.training.objectives import (
    DPOObjective,
    Objective,
    PreferenceObjective,
    SFTObjective,
    SimPOObjective,
    counted_positions,
    outcome_of,
)

IGN = IGNORED_TARGET
DOCUMENTS = [np.array([1, 2, 3, 4]), np.array([5, 6])]
COUNTED = [np.array([True, False, True, True]), None]
TWO_PAIRS = [PreferencePair([1, 2, 3], [4, 5], [6]), PreferencePair([7], [8, 9], [10, 11])]


def assert_same_layout(
    batch: Batch | PreferenceBatch, lengths: tuple[int, ...], roots: int, parents: list[int], starts: dict[int, int]
) -> None:
    """Lengths of all segments, and those tokens that do not follow their neighbour, with the one they follow."""
    layout = batch.layout
    assert layout is not None
    assert (layout.lengths, layout.roots, layout.root_tokens) == (lengths, roots, sum(lengths[:roots]))
    assert layout.root_borders.tolist() == np.cumsum([0, *lengths[:roots]]).tolist()
    assert layout.child_borders.tolist() == np.cumsum([0, *lengths[roots:]]).tolist()
    assert layout.parents.tolist() == parents
    assert {place: token for place, token in enumerate(layout.previous.tolist()) if token != place - 1} == starts


def assert_staged(batch: Batch | PreferenceBatch, positions: list[int], targets: list[int]) -> None:
    staged = counted_positions(batch.targets, batch.rounding)
    assert [values.tolist() for values in staged] == [positions, targets]


def pair_batch(form: PairForm) -> PreferenceBatch:
    data = PreferenceDataset(TWO_PAIRS, source="test", form=form, longest=64, micro_bsz=2, seed=1)
    return data.batch([0, 1], FEW_SHAPES)


class TestContents:
    """Each literally."""

    def test_rows_are_padded_further(self) -> None:
        batch = padded_batch(DOCUMENTS, COUNTED, [4, 9], FEW_SHAPES)
        assert batch.tokens.tolist() == [[1, 2, 3] + [0] * 125, [5] + [0] * 127]
        assert batch.targets.tolist() == [[IGN, 3, 4] + [IGN] * 125, [6] + [IGN] * 127]
        assert batch.layout is None
        assert (batch.token_count, batch.sample_indices) == (4, (4, 9))
        assert_staged(batch, [1, 2, 128] + [0] * 253, [3, 4, 6] + [IGN] * 253)

    def test_a_packed_row_gets_a_segment_of_padding_and_empty_ones(self) -> None:
        batch = packed_batch(DOCUMENTS, COUNTED, [4, 9], FEW_SHAPES)
        assert batch.tokens.tolist() == [[1, 2, 3, 5] + [0] * 124]
        assert batch.targets.tolist() == [[IGN, 3, 4, 6] + [IGN] * 124]
        assert_same_layout(batch, (3, 1, 124, 0, 0, 0, 0, 0), 8, [], {3: -1, 4: -1})
        assert (batch.token_count, batch.sample_indices) == (4, (4, 9))
        assert_staged(batch, [1, 2, 3] + [0] * 125, [3, 4, 6] + [IGN] * 125)

    def test_roots_and_continuations_are_filled_up_apart(self) -> None:
        batch = pair_batch(PairForm.SHARED_PROMPT)
        assert batch.tokens.tolist() == [[1, 2, 7, 8, 7, 10] + [0] * 122 + [3, 4, 3] + [0] * 125]
        assert batch.targets.tolist() == [2, 3, 8, 9, 10, 11] + [IGN] * 122 + [4, 5, 6] + [IGN] * 125
        assert batch.groups.tolist() == [0, 0, 4, 4, 5, 5] + [6] * 122 + [1, 1, 2] + [6] * 125
        lengths = (2, 2, 2, 122, 0, 0, 0, 0, 2, 1, 125, 0, 0, 0, 0, 0)
        assert_same_layout(batch, lengths, 8, [0] * 8, {2: -1, 4: -1, 6: -1, 128: 1, 130: 1, 131: 1})
        assert (batch.pairs, batch.token_count) == (2, 9)
        assert batch.reject_lengths.tolist() == [1, 2]
        positions = [0, 1, 2, 3, 4, 5, 128, 129, 130]
        assert_staged(batch, positions + [0] * 247, [2, 3, 8, 9, 10, 11, 4, 5, 6] + [IGN] * 247)

    def test_without_continuations_none_are_added(self) -> None:
        batch = pair_batch(PairForm.TWO_ROWS)
        assert batch.tokens.tolist() == [[1, 2, 3, 4, 1, 2, 3, 7, 8, 7, 10] + [0] * 117]
        assert batch.targets.tolist() == [2, 3, 4, 5, IGN, IGN, 6, 8, 9, 10, 11] + [IGN] * 117
        assert batch.groups.tolist() == [0, 0, 1, 1, 6, 6, 2, 4, 4, 5, 5] + [6] * 117
        assert_same_layout(batch, (4, 3, 2, 2, 117, 0, 0, 0), 8, [], {4: -1, 7: -1, 9: -1, 11: -1})
        assert (batch.pairs, batch.token_count) == (2, 11)
        positions = [0, 1, 2, 3, 6, 7, 8, 9, 10]
        assert_staged(batch, positions + [0] * 119, [2, 3, 4, 5, 6, 8, 9, 10, 11] + [IGN] * 119)


@pytest.mark.parametrize("mode", DATALOAD_MODES)
def test_a_data_set_rounds_when_asked_to(mode: str) -> None:
    stream = np.arange(1, 41)
    documents = Documents.from_stream("data", stream, np.array([0, 9]), np.array([9, 31]), 65536)
    data = BatchDataset(documents, mode=mode, ctx_len=20, micro_bsz=1, seed=1, accumulate=2)
    for step in range(4):
        exact, rounded = data[step], data.rounded(step, FEW_SHAPES)
        assert (exact.rounding, rounded.rounding) == (EXACT, FEW_SHAPES)
        width = exact.tokens.shape[1]
        assert width <= 20
        assert rounded.tokens.shape == (1, 128)
        assert torch.equal(rounded.tokens[:, :width], exact.tokens)
        assert rounded.step_weight == exact.step_weight
        assert rounded.token_count == exact.token_count


def documents(*sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(2)
    return [rng.integers(1, 257, size) for size in sizes]


def assert_same_loss_and_gradients(objective: Objective, batches: list[Batch] | list[PreferenceBatch]) -> None:
    results = []
    for batch in batches:
        model = tiny_model()
        loss = outcome_of(objective, model, objective.stage(model, batch)).loss
        results.append((loss.item(), state_gradients(model, loss)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "sizes"), [(padded_batch, (9, 40)), (packed_batch, (9, 40, 3)), (padded_batch, (129,))]
)
def test_neither_loss_nor_gradients_change(make: object, sizes: tuple[int, ...]) -> None:
    arguments = documents(*sizes), [None] * len(sizes), range(len(sizes))
    assert_same_loss_and_gradients(SFTObjective(), [make(*arguments, rounding) for rounding in (EXACT, FEW_SHAPES)])


@pytest.mark.parametrize("form", [PairForm.SHARED_PROMPT, PairForm.TWO_ROWS])
def test_neither_loss_nor_gradients_of_pairs_change(form: PairForm) -> None:
    batches = [preference_batch(form, PAIRS, rounding) for rounding in (EXACT, FEW_SHAPES)]
    assert_same_loss_and_gradients(PreferenceObjective(0.4, 0), batches)


@pytest.mark.parametrize("objective", [DPOObjective(0.1), SimPOObjective(2.0, 1.0)], ids=["dpo", "simpo"])
@pytest.mark.parametrize("form", [PairForm.SHARED_PROMPT, PairForm.TWO_ROWS])
def test_neither_loss_nor_gradients_of_comparisons_change(form: PairForm, objective: Objective) -> None:
    reference = torch.tensor([[-15.0, -20.0], [-10.0, -7.0], [-80.0, -12.0]], dtype=torch.float64)
    batches = [preference_batch(form, PAIRS[:3], rounding) for rounding in (EXACT, FEW_SHAPES)]
    assert_same_loss_and_gradients(objective, [replace(batch, reference=reference) for batch in batches])


def test_batches_of_about_one_size_get_one_shape() -> None:
    shapes = set()
    for sizes in ((100, 20, 3), (99, 28), (60, 60, 4, 2)):
        batch = packed_batch(documents(*sizes), [None] * len(sizes), range(len(sizes)), FEW_SHAPES)
        shapes.add((tuple(batch.tokens.shape), batch.layout.roots, batch.layout.root_tokens))
    assert shapes == {((1, 128), 8, 128)}


@pytest.mark.parametrize(
    ("rounding", "lengths", "padding"),
    [
        (EXACT, [], []),
        (EXACT, [3, 5], []),
        (FEW_SHAPES, [], []),
        (FEW_SHAPES, [100, 28], [0] * 6),
        (FEW_SHAPES, [1] * 8, [120] + [0] * 7),
        (FEW_SHAPES, [129], [127] + [0] * 6),
    ],
)
def test_segments_of_padding(rounding: Rounding, lengths: list[int], padding: list[int]) -> None:
    assert rounding.padding(lengths) == padding


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
