"""Further data in every pass: their share, their order, and that it is the same for every number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from src.config.mixing import MixedShare, mixes_in
from src.data.documents import Documents
from src.data.mixing import mixed
from src.data.sampling import BatchDataset
from src.errors import DataError


def documents(source: str, sizes: list[int], first_token: int) -> Documents:
    """Of these sizes, each of one token that is no other document's."""
    stream = np.repeat(np.arange(first_token, first_token + len(sizes)), sizes)
    ends = np.cumsum(sizes)
    return Documents.from_stream(source, stream, ends - np.array(sizes), np.array(sizes), 1000)


MAIN = documents("main", [5, 9, 4, 7, 6, 8, 5, 6], 1)
OTHER = documents("other", [6, 4, 8, 5, 7, 9, 3, 6, 5, 4, 8], 100)
THIRD = documents("third", [5], 500)


def dataset(mode: str = "pad", others: tuple[tuple[Documents, float], ...] = ((OTHER, 0.2),), **options: int | None):
    """With the main documents and others."""
    together, mixes = mixed(MAIN, others)
    return BatchDataset(
        together,
        mixes=mixes,
        mode=mode,
        **{"ctx_len": 16, "micro_bsz": 2, "seed": 3, **options},  # type: ignore[arg-type]
    )


def seen(data: BatchDataset, steps: range) -> list[list[int]]:
    """The first token of every document of some steps, by step."""
    return [[int(data.documents.tokens(index)[0]) for index in data[step].sample_indices] for step in steps]


def passes(data: BatchDataset, count: int) -> list[list[int]]:
    """The documents of passes, which may end anywhere among steps."""
    per_pass = len(MAIN) + sum(draws.per_pass for draws in data._draws)
    tokens: list[int] = []
    step = 0
    while len(tokens) < count * per_pass:
        tokens += seen(data, range(step, step + 1))[0]
        step += 1
    assert len(tokens) == count * per_pass
    return [tokens[begin : begin + per_pass] for begin in range(0, len(tokens), per_pass)]


@pytest.mark.parametrize("mode", ["pad", "pack"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_every_pass_has_all_of_its_own_and_its_share_of_others(mode: str, share: float) -> None:
    data = dataset(mode, ((OTHER, share),))
    drawn = round(8 * share / (1 - share))
    found = passes(data, 12)
    for one in found:
        own, others = sorted(token for token in one if token < 100), [token for token in one if token >= 100]
        assert own == list(range(1, 9))
        assert len(others) == drawn
    times = Counter(token for one in found for token in one if token >= 100)
    assert set(times) == set(range(100, 111))
    assert max(times.values()) - min(times.values()) <= 1
    assert len({tuple(sorted(one)) for one in found[:3]}) == 3 or drawn % 11 == 0


def test_small_data_come_several_times_a_pass() -> None:
    (one,) = passes(dataset("pad", ((THIRD, 0.5),)), 1)
    assert one.count(500) == 8


def test_several() -> None:
    data = dataset("pack", ((OTHER, 0.2), (THIRD, 0.4)))
    (one,) = passes(data, 1)
    assert len([token for token in one if 100 <= token < 500]) == 4
    assert one.count(500) == 8
    assert data.plan.documents == 20
    said = data.plan.statements()
    assert said[0].startswith("4 of 20 documents of a pass (20.0%; ")
    assert said[0].endswith("are from other, which has 11: each comes once before any comes twice.")
    assert "8 of 20 documents of a pass (40.0%; " in said[1]


@pytest.mark.parametrize("mode", ["pad", "pack", "only"])
def test_ranks_share_what_one_sees_and_a_step_is_a_function_of_its_number(mode: str) -> None:
    rows = {"micro_bsz": 1} if mode == "only" else {}
    alone = seen(dataset(mode, **rows), range(40))
    two = [seen(dataset(mode, **rows, rank=rank, world_size=2), range(20)) for rank in range(2)]
    assert alone == [step for pair in zip(*two, strict=True) for step in pair]
    assert seen(dataset(mode, **rows), range(33, 34)) == alone[33:34]


def test_packed_batches_are_weighed_by_what_they_hold() -> None:
    data = dataset("pack", accumulate=2)
    for step in range(0, 20, 2):
        weights = [data[step + place].step_weight for place in range(2)]
        counted = [
            sum(len(data.documents.tokens(i)) - 1 for i in data[step + place].sample_indices) for place in range(2)
        ]
        assert weights == pytest.approx([2 * count / sum(counted) for count in counted])


def test_in_the_order_of_the_data() -> None:
    data = dataset("pad", seed=None)
    assert passes(data, 2) == [[*range(1, 9), 100, 101], [*range(1, 9), 102, 103]]


def test_without_others_nothing_changes() -> None:
    plain = BatchDataset(MAIN, mode="pack", ctx_len=16, micro_bsz=2, seed=3)
    assert seen(dataset("pack", ()), range(30)) == seen(plain, range(30))


def test_nothing_to_draw_is_refused() -> None:
    other = THIRD.masked(np.array([True, False, False, False, False]))
    with pytest.raises(DataError, match="third cannot be mixed in: nothing that the loss is taken on"):
        dataset("pad", ((other, 0.5),))


@pytest.mark.parametrize(
    ("text", "mixes"),
    [
        ("", ()),
        ("a.jsonl:0.2", (MixedShare("a.jsonl", 0.2),)),
        ("a b.jsonl:.5, c:0.1", (MixedShare("a b.jsonl", 0.5), MixedShare("c", 0.1))),
        ("a:0.2 c:d:1e-1", (MixedShare("a", 0.2), MixedShare("c:d", 0.1))),
    ],
)
def test_what_a_flag_names(text: str, mixes: tuple[MixedShare, ...]) -> None:
    assert mixes_in(text) == (mixes, "")


@pytest.mark.parametrize("share", ["1e-400", "0.00", "1.0000001", "1e400"])
def test_a_share_is_shown_as_it_was_typed(share: str) -> None:
    assert mixes_in(f"a:0.2 b:{share}") == ((), f"gives b the share {share}: it must be above 0 and below 1")
