"""Rows cut into chunks: what belongs to which, and who continues whom."""

from __future__ import annotations

import random

import pytest
import torch

from src.cutting import Chunk, cut, on_device
from src.layout import SegmentLayout


def named(chunks: list[Chunk]) -> list[tuple[object, ...]]:
    """Number, rows, columns, lengths of the sequences, who continues whom, and what is kept."""
    return [(c.number, c.rows, (c.start, c.end), c.layout and c.layout.lengths, c.sources, c.kept) for c in chunks]


def test_padded_rows_leave_after_their_last_target() -> None:
    chunks = cut(3, 10, None, torch.tensor([3, 8, 12]), 4)
    assert named(chunks) == [
        (0, (0, 1), (0, 4), None, (), (0,)),
        (1, (0,), (4, 8), None, ((0, 0),), (0,)),
        (2, (0,), (8, 9), None, ((1, 0),), ()),
    ]
    assert [chunk.scored.tolist() for chunk in chunks] == [[0, 2], [], [1]]
    assert [chunk.places.tolist() for chunk in chunks] == [[3, 6], [], [0]]
    tokens = torch.arange(30).view(3, 10)
    assert chunks[0].of(tokens).tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert chunks[2].of(tokens).tolist() == [[8]]


def test_documents_of_a_packed_row_go_on_over_borders_or_begin_within_a_chunk() -> None:
    chunks = cut(1, 16, SegmentLayout.packed([3, 10, 3]), torch.tensor([1, 8, 12, 14]), 5)
    assert named(chunks) == [
        (0, (0,), (0, 5), (3, 2), (), (1,)),
        (1, (0,), (5, 10), None, ((0, 0),), (0,)),
        (2, (0,), (10, 15), (3, 2), ((1, 0),), ()),
    ]
    carry = chunks[0].layout.carry  # type: ignore[union-attr]
    assert carry is not None
    assert [tensor.tolist() for tensor in carry.tensors] == [[], [], [1], [4]]
    assert [tensor.tolist() for tensor in chunks[2].layout.carry.tensors] == [[0], [0], [], []]  # type: ignore[union-attr]


def test_what_no_target_depends_on_is_left_out() -> None:
    chunks = cut(1, 16, SegmentLayout.packed([3, 10, 3]), torch.tensor([8, 9, 14]), 4)
    assert named(chunks) == [
        (0, (0,), (3, 4), None, (), (0,)),
        (1, (0,), (4, 8), None, ((0, 0),), (0,)),
        (2, (0,), (8, 10), None, ((1, 0),), ()),
        (3, (0,), (13, 15), None, (), ()),
    ]
    assert cut(1, 16, SegmentLayout.packed([3, 10, 3]), torch.tensor([], dtype=torch.int64), 4) == []
    assert cut(2, 8, None, torch.tensor([], dtype=torch.int64), 4) == []


def test_answers_begin_where_their_prompts_end() -> None:
    layout = SegmentLayout.branching([6, 1, 0], [4, 3, 2, 2], [0, 0, 1, 2])
    chunks = cut(1, 18, layout, torch.arange(18), 4)
    assert named(chunks) == [
        (0, (0,), (0, 4), None, (), (0,)),
        (1, (0,), (4, 7), (2, 1), ((0, 0),), (0, 1)),
        (2, (0,), (7, 11), None, ((1, 0),), ()),
        (3, (0,), (11, 15), (3, 1), ((1, 0), (1, 1)), (1,)),
        (4, (0,), (15, 18), (1, 2), ((3, 0),), ()),
    ]


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 9, 100])
def test_every_target_is_scored_once_at_its_place(chunk_tokens: int) -> None:
    generator = random.Random(chunk_tokens)
    for _ in range(40):
        roots = [generator.randrange(9) for _ in range(generator.randrange(1, 5))]
        children = [generator.randrange(9) for _ in range(generator.randrange(4))]
        layout = SegmentLayout.branching(roots, children, [generator.randrange(len(roots)) for _ in children])
        width = layout.tokens
        positions = torch.tensor(
            sorted(generator.sample(range(width), generator.randrange(width + 1))), dtype=torch.int64
        )
        tokens = torch.arange(width)[None]
        chunks = cut(1, width, layout, positions, chunk_tokens)
        assert sorted(index for chunk in chunks for index in chunk.scored.tolist()) == list(range(len(positions)))
        for index, chunk in enumerate(chunks):
            assert 1 <= chunk.end - chunk.start <= chunk_tokens
            assert chunk.of(tokens).flatten()[chunk.places].tolist() == positions[chunk.scored].tolist()
            assert all(source < index and place < len(chunks[source].kept) for source, place in chunk.sources)
            if chunk.layout is not None:
                assert chunk.layout.tokens == chunk.end - chunk.start
                assert min(chunk.layout.lengths) >= 1


def test_moving_keeps_everything() -> None:
    (chunk,) = cut(1, 6, SegmentLayout.packed([3, 3]), torch.tensor([2, 5]), 6)
    (moved,) = on_device([chunk], torch.device("cpu"))
    assert (moved.sources, moved.scored.tolist(), moved.places.tolist()) == ((), [0, 1], [2, 5])
    assert chunk.layout is not None
    assert moved.layout is not None
    for one, other in zip(moved.layout.tensors, chunk.layout.tensors, strict=True):
        assert torch.equal(one, other)
