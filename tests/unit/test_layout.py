"""Segments of a packed row."""

import pytest
import torch

from src.layout import SegmentLayout


def test_packed_documents_are_roots_one_after_the_other() -> None:
    layout = SegmentLayout.packed([3, 1, 2])
    assert (layout.roots, layout.root_tokens, layout.tokens, layout.has_children) == (3, 6, 6, False)
    assert layout.root_borders.tolist() == [0, 3, 4, 6]
    assert layout.root_borders.dtype == torch.int32
    assert layout.previous.tolist() == [-1, 0, 1, -1, -1, 4]
    assert layout.last_positions.tolist() == [2, 3, 5]


def test_answers_continue_the_last_token_of_their_prompt() -> None:
    layout = SegmentLayout.branching([2, 3], [2, 1, 2], [0, 1, 0])
    assert layout.lengths == (2, 3, 2, 1, 2)
    assert (layout.roots, layout.root_tokens, layout.tokens, layout.has_children) == (2, 5, 10, True)
    assert layout.child_borders.tolist() == [0, 2, 3, 5]
    assert layout.parents.tolist() == [0, 1, 0]
    assert layout.previous.tolist() == [-1, 0, -1, 2, 3, 1, 5, 4, 1, 8]


def test_an_empty_prompt_makes_its_answers_start_like_roots() -> None:
    layout = SegmentLayout.branching([0, 2], [2, 1], [0, 1])
    assert layout.previous.tolist() == [-1, 0, -1, 2, 1]
    assert layout.last_positions.tolist() == [-1, 1, 3, 4]


def test_an_empty_answer_takes_no_place() -> None:
    layout = SegmentLayout.branching([2], [0, 2], [0, 0])
    assert layout.previous.tolist() == [-1, 0, 1, 2]
    assert layout.child_borders.tolist() == [0, 0, 2]


def test_some_documents_go_on_from_a_memory_and_leave_one() -> None:
    plain = SegmentLayout.packed([3, 1, 2])
    layout = plain.carrying([0, 2], [2])
    assert layout.carry is not None
    assert [tensor.tolist() for tensor in layout.carry.tensors] == [[0, 2], [0, 4], [2], [5]]
    assert [tensor.dtype for tensor in layout.carry.tensors] == [torch.int64] * 4
    assert len(layout.tensors) == len(plain.tensors) + 4
    moved = layout.to("cpu").carry
    assert moved is not None
    assert [tensor.tolist() for tensor in moved.tensors] == [[0, 2], [0, 4], [2], [5]]
    with pytest.raises(AssertionError):
        SegmentLayout.packed([3, 0]).carrying([1], [])


def test_moving_keeps_everything() -> None:
    layout = SegmentLayout.branching([2, 3], [2], [1])
    moved = layout.to("cpu")
    assert moved.lengths == layout.lengths
    for name in ("root_borders", "child_borders", "parents", "previous"):
        assert torch.equal(getattr(moved, name), getattr(layout, name))


@pytest.mark.parametrize(("children", "parents"), [([1], []), ([1], [1]), ([1], [-1])])
def test_wrong_parents_are_a_programming_error(children: list[int], parents: list[int]) -> None:
    with pytest.raises(AssertionError):
        SegmentLayout.branching([2], children, parents)
