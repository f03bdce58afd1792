"""What each mode hands to the model, in which order, on how many ranks."""

import numpy as np
import pytest
import torch

from src.data import passes
from src.data.batches import IGNORED_TARGET
from src.data.documents import Documents
from src.data.sampling import BatchDataset
from src.errors import ConfigError, DataError

IGN = IGNORED_TARGET


def made(*documents, counted=None):
    sizes = np.array([len(document) for document in documents])
    return Documents.from_stream(
        "data",
        np.concatenate([np.array(document, np.int32) for document in documents]),
        np.cumsum(sizes) - sizes,
        sizes,
        65536,
        stream_counted=None if counted is None else np.concatenate([np.array(c, bool) for c in counted]),
    )


def numbered(sizes):
    """Documents whose tokens are all different, so that a token says where it came from."""
    stream = np.arange(1, sum(sizes) + 1)
    return made(*np.split(stream, np.cumsum(sizes)[:-1]))


def dataset(documents, mode, ctx_len, micro_bsz=1, **options):
    return BatchDataset(documents, mode=mode, ctx_len=ctx_len, micro_bsz=micro_bsz, **({"seed": 1} | options))


def one_pass(data):
    return [data[step] for step in range(data.batches_per_pass)]


def epoch_of(data, number):
    return [data[step] for step in range(number * len(data), (number + 1) * len(data))]


def targets_of(batches):
    return sorted(target for batch in batches for target in batch.targets.flatten().tolist() if target != IGN)


SHARED = made([5, 6, 7, 0], [9, 10, 0])
MANY = numbered(np.random.default_rng(0).integers(2, 20, size=53).tolist())


class TestContents:
    def test_pad_never_reads_another_document(self):
        batch = one_pass(dataset(SHARED, "pad", 5, micro_bsz=2))[0]
        rows = sorted(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))
        assert rows == [([5, 6, 7], [6, 7, 0]), ([9, 10, 0], [10, 0, IGN])]
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert (batch.token_count, batch.layout) == (5, None)

    def test_pad_cuts_at_the_row(self):
        batch = one_pass(dataset(made([5, 6, 7, 0]), "pad", 2))[0]
        assert (batch.tokens.tolist(), batch.targets.tolist()) == ([[5, 6]], [[6, 7]])

    def test_only_is_a_document_alone(self):
        batches = one_pass(dataset(SHARED, "only", 8))
        assert sorted(batch.tokens.tolist() for batch in batches) == [[[5, 6, 7]], [[9, 10]]]

    def test_get_reads_across_borders(self):
        data = dataset(SHARED, "get", 3)
        seen = {batch.sample_indices[0]: batch for batch in (data[step] for step in range(40))}
        assert sorted(seen) == [0, 1, 2]
        assert (seen[2].tokens.tolist(), seen[2].targets.tolist()) == ([[7, 0, 9]], [[0, 9, 10]])

    def test_pack_joins_documents_and_marks_their_borders(self):
        batch = one_pass(dataset(SHARED, "pack", 5))[0]
        first = batch.sample_indices[0]
        expected = ([[5, 6, 7, 9, 10]], [[6, 7, 0, 10, 0]], (3, 2))
        if first == 1:
            expected = ([[9, 10, 5, 6, 7]], [[10, 0, 6, 7, 0]], (2, 3))
        assert (batch.tokens.tolist(), batch.targets.tolist(), batch.layout.lengths) == expected
        assert batch.layout.root_borders.tolist() == [0, expected[2][0], 5]

    def test_pack_fills_micro_bsz_rows(self):
        batches = one_pass(dataset(MANY, "pack", 19, micro_bsz=4))
        assert {batch.tokens.shape[0] for batch in batches} == {1}
        assert max(batch.tokens.shape[1] for batch in batches) in range(74, 77)
        assert len(batches) == -(-sum(batch.token_count for batch in batches) // 76)

    def test_masks_reach_the_targets(self):
        documents = made([1, 2, 3, 4, 0], [5, 6, 0], counted=[[0, 0, 1, 0, 1], [1, 1, 0]])
        for mode in ("pad", "pack"):
            batches = one_pass(dataset(documents, mode, 8, micro_bsz=2))
            assert targets_of(batches) == [0, 3, 6]
            assert sum(batch.token_count for batch in batches) == 6
        for step in range(20):
            batch = dataset(documents, "get", 2)[step]
            assert (batch.targets != IGN).any()
            span = slice(batch.sample_indices[0] + 1, batch.sample_indices[0] + 3)
            expected = np.where(documents.stream_counted[span], documents.stream[span], IGN)
            assert batch.targets[0].tolist() == expected.tolist()

    def test_documents_without_an_answer_in_the_row_are_left_out(self):
        documents = made([1, 2, 3, 4], [5, 6, 7], counted=[[0, 0, 0, 1], [0, 0, 1]])
        data = dataset(documents, "pad", 2)
        assert [batch.sample_indices for batch in one_pass(data)] == [(1,)]
        (said,) = data.plan.statements()
        assert said.startswith("warning: 1 document left out")
        assert "4 of 7 tokens (57.1%) are never seen; a larger --ctx_len keeps them." in said


@pytest.mark.parametrize("mode", ["pad", "only", "pack"])
class TestPasses:
    def data(self, mode, documents=MANY, **options):
        return dataset(documents, mode, 10, 1 if mode == "only" else 3, **options)

    def expected(self, documents=MANY):
        return sorted(t for index in range(len(documents)) for t in documents.tokens(index, 11)[1:].tolist())

    def test_a_pass_holds_every_token_once(self, mode):
        data = self.data(mode)
        steps = data.batches_per_pass
        for pass_number in (0, 1, 5):
            batches = [data[pass_number * steps + place] for place in range(steps)]
            assert targets_of(batches) == self.expected()
            assert sorted(i for batch in batches for i in batch.sample_indices) == list(range(53))

    @pytest.mark.parametrize("world_size", [2, 3, 4, 7, 100])
    def test_ranks_share_a_pass_without_overlap_in_equally_many_steps(self, mode, world_size):
        ranks = [self.data(mode, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {len(data) for data in ranks} == {-(-ranks[0].batches_per_pass // world_size)}
        batches = [data[step] for step in range(len(ranks[0])) for data in ranks]
        visits = [i for batch in batches[: ranks[0].batches_per_pass] for i in batch.sample_indices]
        assert sorted(visits) == list(range(53))

    @pytest.mark.parametrize("world_size", [2, 5])
    def test_ranks_see_what_one_sees_in_as_many_steps(self, mode, world_size):
        alone = self.data(mode)
        for rank in range(world_size):
            shared = self.data(mode, rank=rank, world_size=world_size)
            for step in range(2 * len(shared)):
                expected = alone[world_size * step + rank]
                assert shared[step].sample_indices == expected.sample_indices
                assert torch.equal(shared[step].tokens, expected.tokens)

    def test_an_epoch_is_rounded_up_to_whole_optimizer_steps(self, mode):
        batches = self.data(mode).batches_per_pass
        data = self.data(mode, world_size=2, accumulate=4)
        assert len(data) == -(-batches // 8) * 4
        assert len(self.data(mode, epoch_steps=9, accumulate=4)) == 12

    def test_order_is_a_function_of_seed_and_pass(self, mode):
        def order(seed, pass_number):
            data = self.data(mode, seed=seed)
            steps = range(pass_number * len(data), (pass_number + 1) * len(data))
            return [batch.sample_indices for batch in map(data.__getitem__, steps)]

        assert order(1, 0) == order(1, 0)
        assert order(1, 3) == order(1, 3)
        assert order(1, 0) != order(1, 1)
        assert order(1, 0) != order(2, 0)

    def test_explicit_epochs_stream_through_passes(self, mode):
        whole, short = self.data(mode), self.data(mode, epoch_steps=4)
        assert len(short) == 4
        steps = 3 * len(whole)
        streamed = [batch for epoch in range(-(-steps // 4)) for batch in epoch_of(short, epoch)][:steps]
        straight = [batch for epoch in range(3) for batch in epoch_of(whole, epoch)]
        assert [batch.sample_indices for batch in streamed] == [batch.sample_indices for batch in straight]
        assert targets_of(streamed) == sorted(3 * self.expected())


class TestGet:
    def test_windows_are_uniform_over_the_stream(self):
        data = dataset(numbered([10] * 11), "get", 9, micro_bsz=50)
        offsets = np.array([offset for step in range(80) for offset in data[step].sample_indices])
        counts = np.bincount(offsets, minlength=100)
        assert len(counts) == 100
        assert counts.min() > 10
        assert counts.max() < 80

    def test_windows_depend_on_seed_step_and_rank_alone(self):
        def offsets(step, **options):
            return dataset(MANY, "get", 9, micro_bsz=4, **options)[step].sample_indices

        assert offsets(3) == offsets(3, epoch_steps=2)
        assert len({offsets(3), offsets(4), offsets(3, seed=2), offsets(3, rank=1, world_size=2)}) == 4
        assert offsets(1, rank=1, world_size=2) == offsets(3)

    def test_an_epoch_is_as_many_windows_as_the_stream_is_long(self):
        assert len(dataset(numbered([50, 51]), "get", 10, micro_bsz=2)) == 6
        assert len(dataset(numbered([50, 51]), "get", 10, micro_bsz=2, world_size=4)) == 2
        assert dataset(numbered([50, 51]), "get", 10, micro_bsz=2, world_size=4).batches_per_pass == 6

    @pytest.mark.parametrize("ctx_len", [6, 7, 100])
    def test_data_not_longer_than_a_window_are_refused(self, ctx_len):
        with pytest.raises(DataError, match=rf"has 7 tokens, .* ctx_len \+ 1 = {ctx_len + 1} out of more"):
            dataset(SHARED, "get", ctx_len)

    def test_data_one_longer_than_a_window_are_enough(self):
        assert dataset(SHARED, "get", 5)[0].tokens.tolist() == [[5, 6, 7, 0, 9]]

    def test_windows_without_an_answer_end_in_an_error(self):
        documents = made([1, 2, 3, 4, 5], counted=[[1, 0, 0, 0, 0]])
        with pytest.raises(DataError, match="random windows met none"):
            dataset(documents, "get", 2)[0]


@pytest.mark.parametrize("mode", ["get", "pad", "only", "pack"])
@pytest.mark.parametrize("masked", [False, True])
def test_weighted_batches_of_an_optimizer_step_give_the_mean_over_its_targets(mode, masked):
    counted = None if not masked else [np.arange(len(MANY.tokens(i))) % 3 > 0 for i in range(len(MANY))]
    documents = made(*(MANY.tokens(i) for i in range(len(MANY))), counted=counted)
    ranks = [
        dataset(documents, mode, 10, 1 if mode == "only" else 3, rank=rank, world_size=2, accumulate=3)
        for rank in range(2)
    ]
    assert len(ranks[0]) % 3 == 0
    for first in range(0, 4 * len(ranks[0]), 3):
        batches = [data[step] for step in range(first, first + 3) for data in ranks]
        weights = [batch.step_weight for batch in batches]
        counts = [int((batch.targets != IGN).sum()) for batch in batches]
        expected = [count * 6 / sum(counts) for count in counts]
        assert weights == pytest.approx(expected)


def test_passes_are_made_once_even_where_a_step_spans_two(monkeypatch):
    made_passes = []
    original = passes.pass_generator
    monkeypatch.setattr(passes, "pass_generator", lambda *key: made_passes.append(key[1]) or original(*key))
    data = dataset(MANY, "pad", 10, 3, accumulate=4)
    assert data.batches_per_pass % 4, "a step has to span two passes"
    for step in range(3 * len(data)):
        data[step]
    assert made_passes == sorted(set(made_passes))


def test_an_optimizer_step_of_many_batches_is_weighed_once(monkeypatch):
    data = dataset(MANY, "pad", 10, 3, accumulate=1000)
    weighed = []
    weigh = data._weight
    monkeypatch.setattr(data, "_weight", lambda number: weighed.append(number) or weigh(number))
    for step in range(4):
        data[step]
    assert len(weighed) == 1000 + 4


class TestRefusals:
    def test_only_takes_one_row(self):
        with pytest.raises(ConfigError, match=r"--micro_bsz has to be 1, not 2"):
            dataset(SHARED, "only", 8, micro_bsz=2)

    @pytest.mark.parametrize("mode", ["pad", "only", "pack"])
    def test_no_answer_within_a_row(self, mode):
        documents = made([1, 2, 3, 4], counted=[[0, 0, 0, 1]])
        with pytest.raises(DataError, match="--ctx_len 2: nothing that the loss is taken on"):
            dataset(documents, mode, 2)

    def test_no_answer_at_all(self):
        with pytest.raises(DataError, match="the loss is taken on no token of it"):
            made([1, 2], counted=[[0, 0]])


class TestPlan:
    def test_cut_documents_and_padding(self):
        plan = dataset(numbered([4, 6, 11, 13]), "pad", 9, micro_bsz=4).plan
        assert (plan.documents, plan.tokens, plan.unseen.cut_documents, plan.unseen.cut_tokens) == (4, 34, 2, 4)
        assert plan.counted_targets_per_pass == 3 + 5 + 9 + 9
        assert plan.padding_share == pytest.approx(1 - 26 / 36)
        cut, padding = plan.statements()
        assert cut.startswith("warning: 2 of 4 documents are longer than a row and are cut: 4 of 34 tokens (11.8%)")
        assert padding.startswith("28% of the positions are padding")

    def test_nothing_to_say(self):
        data = dataset(numbered([4, 4]), "pad", 9, micro_bsz=2, epoch_steps=5)
        assert data.plan.statements() == ()
        assert (data.batches_per_pass, len(data)) == (1, 5)

    def test_padding_share_is_what_the_batches_show(self):
        data = dataset(MANY, "pad", 15, micro_bsz=4)
        batches = one_pass(data)
        real = sum(batch.token_count for batch in batches)
        assert data.plan.counted_targets_per_pass == real
        assert data.plan.padding_share == pytest.approx(1 - real / sum(b.tokens.numel() for b in batches))

    def test_counted_targets(self):
        documents = made([1, 2, 3, 4, 0], [5, 6, 0], counted=[[0, 0, 1, 0, 1], [1, 1, 0]])
        assert dataset(documents, "pad", 8).plan.counted_targets_per_pass == 3
        assert dataset(documents, "pad", 3).plan.counted_targets_per_pass == 2
        assert dataset(documents, "get", 3).plan.counted_targets_per_pass == 4

    def test_batches_are_described(self):
        data = dataset(made([1], [2, 3]), "pad", 4)
        assert data.describe(data[0]) == "document 1 of data"
        both = dataset(numbered([2] * 12), "pack", 12)
        assert both.describe(both[0]).startswith("documents ")
        assert both.describe(both[0]).endswith(" and 4 more of data")
        windows = dataset(SHARED, "get", 5)
        assert windows.describe(windows[0]) == "tokens 0 and following of data"


class TestTheOrderOfTheFile:
    """Without a seed."""

    @pytest.mark.parametrize("mode", ["pad", "only"])
    def test_every_pass_begins_at_the_first_document(self, mode):
        data = dataset(numbered([3, 5, 2, 7, 4]), mode, 8, micro_bsz=1 if mode == "only" else 2, seed=None)
        seen = [[index for batch in epoch_of(data, number) for index in batch.sample_indices] for number in (0, 1)]
        assert seen == [[0, 1, 2, 3, 4]] * 2

    def test_packed_rows_follow_it_as_far_as_they_fill(self):
        data = dataset(numbered([6, 6, 11, 3, 9]), "pack", 10, seed=None)
        rows = [batch.sample_indices for batch in one_pass(data)]
        assert rows == [(0, 1), (2,), (3, 4)]
        assert [batch.sample_indices for batch in epoch_of(data, 1)] == rows

    def test_ranks_take_turns(self):
        halves = [dataset(numbered([3] * 6), "pad", 8, seed=None, rank=rank, world_size=2) for rank in (0, 1)]
        assert [[batch.sample_indices[0] for batch in epoch_of(half, 0)] for half in halves] == [[0, 2, 4], [1, 3, 5]]
