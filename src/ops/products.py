"""Several matrix products in as few launches as the places of their operands allow.

A product of a few columns is over before its launch has filled a GPU. Those whose left sides, right sides and results
each lie at equal distances in memory are one batched product; the others are computed one by one, with the same results
but for the order of sums.

Legend: left [n, k] and right [k, m] of each pair; sizes may differ among pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_MIXES = 6
"""Results of a token shift."""


def side_by_side(shapes: Sequence[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """Empty tensors, in one piece of memory, one after the other, if their shapes are equal."""
    if len(shapes) > 1 and len(set(shapes)) == 1:
        return list(like.new_empty(len(shapes), *shapes[0]).unbind())
    return [like.new_empty(shape) for shape in shapes]


@dataclass(frozen=True)
class MixPlaces:
    """Where the results of a token shift are to lie; see `mix_places`.

    Attributes:
        joined: numbers of results that lie in one piece of memory in this order; for each piece.
        rooms: for each of MOST_MIXES results, how many values there is room for behind each row of it, alike in a
            piece; those not named have none.
    """

    joined: tuple[tuple[int, ...], ...] = ()
    rooms: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rooms", (*self.rooms, *(0,) * (MOST_MIXES - len(self.rooms))))
        assert all(len({self.rooms[mix] for mix in piece}) == 1 for piece in self.joined)

    def empty_mixes(self, mixes: int, like: Tensor) -> tuple[Tensor, ...]:
        """The results, empty, each of a shape [B, T, C], which is that of `like`, a contiguous tensor."""
        *rows, channels = like.shape
        found: list[Any] = [None] * mixes
        for piece in self.joined:
            shape = (*rows, channels + self.rooms[piece[0]])
            for mix, whole in zip(piece, side_by_side([shape] * len(piece), like), strict=True):
                found[mix] = whole
        for mix, room in zip(range(mixes), self.rooms, strict=False):
            if found[mix] is None:
                found[mix] = like.new_empty(*rows, channels + room) if room else torch.empty_like(like)
            if room:
                found[mix] = found[mix][..., :channels]
        return tuple(found)


mix_places = functools.cache(MixPlaces)
"""That of these arguments: it is asked for in every pass over every layer."""
ANYWHERE = mix_places()


def has_room(rows: Tensor, width: int) -> bool:
    """Whether rows [n, k] were made with room for `width` values behind each."""
    return rows.shape[0] > 1 and rows.stride() == (rows.shape[1] + width, 1)


def behind(rows: Tensor, width: int) -> Tensor:
    """The room behind rows [n, k] that have it: [n, width]."""
    return rows.as_strided((rows.shape[0], width), rows.stride(), rows.storage_offset() + rows.shape[1])


def with_room(rows: Tensor, width: int) -> Tensor:
    """Rows [n, k] and the room behind them: [n, k + width]."""
    return rows.as_strided((rows.shape[0], rows.shape[1] + width), rows.stride())


def reserved(rows: Tensor, width: int, memory: Tensor | None = None) -> Tensor:
    """A copy of rows [n, k], contiguous, in memory that takes `width` values more for each of them: see `spread`.

    Args:
        memory: of at least n (k + width) values in their dtype; None takes some.
    """
    whole = rows.new_empty(rows.shape[0] * (rows.shape[1] + width)) if memory is None else memory
    return whole[: rows.numel()].view(rows.shape).copy_(rows)


def spread(rows: Tensor, width: int) -> Tensor:
    """Reserved rows, moved within their memory to where each has room behind it; what was a view of them is none now.

    Raises:
        RuntimeError: their memory does not take it.
    """
    moved = rows.as_strided(rows.shape, (rows.shape[1] + width, 1))
    return moved.copy_(rows.clone())


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source [n, m] into its target, in as few launches as their places allow."""
    for part in _runs(targets, sources):
        _stack(targets[part]).copy_(_stack(sources[part]))


class Places:
    """Memory side by side for tensors of equal sizes that are written at different times, for who takes all of them.

    Args:
        count: of the places, each of which is taken once; then there is memory for the next ones.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._room: Tensor | None = None
        self._taken = 0

    def empty_like(self, number: int, like: Tensor) -> Tensor:
        """A place, contiguous, as `torch.empty_like`."""
        if self._room is None:
            self._room = like.new_empty(self._count, like.numel())
        place = self._room[number].view(like.shape)
        self._taken += 1
        if self._taken == self._count:
            self._room, self._taken = None, 0
        return place


def in_one_piece(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors of equal shapes follow each other in memory."""
    first = tensors[0]
    begin, size, storage = first.storage_offset(), first.numel(), first.untyped_storage().data_ptr()
    for number, tensor in enumerate(tensors):
        alike = tensor.shape == first.shape and tensor.dtype is first.dtype and tensor.is_contiguous()
        place = tensor.storage_offset() == begin + number * size and tensor.untyped_storage().data_ptr() == storage
        if not (alike and place):
            return False
    return True


def products(lefts: Sequence[Tensor], rights: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
    """scale · left @ right of each pair, side by side; outside autograd, as all functions here."""
    results = side_by_side(
        [(left.shape[0], right.shape[1]) for left, right in zip(lefts, rights, strict=True)], lefts[0]
    )
    for part in _runs(lefts, rights, results):
        left, right, result = (_stack(operand[part]) for operand in (lefts, rights, results))
        if scale != 1.0:
            multiply = result.baddbmm_ if result.ndim == 3 else result.addmm_
            multiply(left, right, beta=0.0, alpha=scale)
        elif result.ndim == 3:
            torch.bmm(left, right, out=result)
        else:
            torch.mm(left, right, out=result)
    return results


def outer_sums(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> list[Tensor]:
    """`outer_sum` of each pair."""
    found: list[Tensor] = []
    for part in _runs(lefts, rights):
        left, right = _stack(lefts[part]), _stack(rights[part])
        total = outer_sum(left, right)
        found += [total] if part.stop - part.start == 1 else total.unbind()
    return found


def outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """Σ over n of left [.., n, a] and right [.., n, b] -> [.., a, b], summed in fp32 at least and not rounded."""
    rows = left.transpose(-1, -2)
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        multiply = torch.bmm if left.ndim == 3 else torch.mm
        return multiply(rows, right, out_dtype=torch.float32)
    if left.dtype in (torch.bfloat16, torch.float16):
        return rows.float() @ right.float()
    return rows @ right


def _runs(*operands: Sequence[Tensor]) -> Iterator[slice]:
    """The longest parts in which each operand's tensors lie at equal distances; what is no matrix is alone."""
    count = len(operands[0])
    begin = 0
    for end in range(1, count + 1):
        if end == count or not all(_goes_on(operand[begin : end + 1]) for operand in operands):
            yield slice(begin, end)
            begin = end


def _goes_on(tensors: Sequence[Tensor]) -> bool:
    """Whether the last of two or more lies as far behind the one before it as the second behind the first."""
    first, last = tensors[0], tensors[-1]
    alike = last.shape == first.shape and last.stride() == first.stride() and last.dtype is first.dtype
    if first.ndim != 2 or not alike or last.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
        return False
    step = tensors[1].storage_offset() - first.storage_offset()
    return step >= 0 and last.storage_offset() - tensors[-2].storage_offset() == step


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Those of a run as one view [count, ...]; a single one as it is."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    step = tensors[1].storage_offset() - first.storage_offset()
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))
