"""Products of several pairs: the same as one by one, batched exactly where operands lie at equal distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tables import covering
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from src.ops import products as module
from src.ops.products import (
    ANYWHERE,
    MixPlaces,
    Places,
    behind,
    copy_each,
    has_room,
    outer_sums,
    products,
    reserved,
    side_by_side,
    spread,
    with_room,
)

N, K, M = 6, 8, 4


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def apart(count: int, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(*shape, seed=seed + number, dtype=dtype) for number in range(count)]


def in_one_piece(count: int, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> list[Tensor]:
    return list(normal(count, *shape, seed=seed, dtype=dtype).unbind())


def with_others_between(count: int, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> list[Tensor]:
    return list(normal(2 * count, *shape, seed=seed, dtype=dtype)[::2].unbind())


def transposed(count: int, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.t() for tensor in in_one_piece(count, shape[::-1], seed, dtype)]


def one_for_all(count: int, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(*shape, seed=seed, dtype=dtype)] * count


def backwards(count: int, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> list[Tensor]:
    return in_one_piece(count, shape, seed, dtype)[::-1]


def two_pieces(count: int, shape: tuple[int, int], seed: int, dtype: torch.dtype) -> list[Tensor]:
    return in_one_piece(count - 1, shape, seed, dtype) + apart(1, shape, seed + 9, dtype)


Placed = Callable[[int, tuple[int, int], int, torch.dtype], list[Tensor]]
PLACES: list[Placed] = [apart, in_one_piece, with_others_between, transposed, one_for_all, backwards, two_pieces]
LAUNCHES = {apart: 4, backwards: 4, two_pieces: 2}
"""For four pairs of which the other side lies in one piece; 1 where nothing is said."""


@contextmanager
def counted() -> Iterator[list[str]]:
    names: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket.__name__ in ("mm", "bmm", "addmm_", "baddbmm_"):
                names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Products():
        yield names


@pytest.mark.parametrize(
    ("count", "left", "right", "dtype", "scale"),
    covering([1, 2, 4], PLACES, PLACES, [torch.float32, torch.bfloat16], [1.0, 0.3]),
)
def test_they_are_those_of_each_pair(count: int, left: Placed, right: Placed, dtype: torch.dtype, scale: float) -> None:
    lefts, rights = left(count, (N, K), 1, dtype), right(count, (K, M), 50, dtype)
    exact = [a.double() @ b.double() for a, b in zip(lefts, rights, strict=True)]
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2

    found = products(lefts, rights, scale)
    columns = [a.t() for a in lefts]
    outer = outer_sums(columns, rights)
    for ours, theirs in [
        *zip(found, [scale * each for each in exact], strict=True),
        *zip(outer, exact, strict=True),
    ]:
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=4 * tolerance)
    assert {tensor.dtype for tensor in outer} == {torch.float32}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("side", [0, 1])
def test_what_lies_at_equal_distances_is_one_product(place: Placed, side: int) -> None:
    others = in_one_piece(4, (K, M) if side == 0 else (N, K), 3, torch.float32)
    own = place(4, (N, K) if side == 0 else (K, M), 40, torch.float32)
    pair = (own, others) if side == 0 else (others, own)
    wanted = LAUNCHES.get(place, 1)
    with counted() as names:
        products(*pair)
        outer_sums([a.t() for a in pair[0]], pair[1])
    assert len(names) == 2 * wanted
    assert ("bmm" in names) == (wanted < 4)


def test_sizes_may_differ() -> None:
    lefts = in_one_piece(2, (N, K), 1, torch.float32)
    rights = [*apart(1, (K, M), 2, torch.float32), *apart(1, (K, M + 3), 3, torch.float32)]
    exact = [a @ b for a, b in zip(lefts, rights, strict=True)]
    for ours, theirs in zip(products(lefts, rights), exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_places_of_mixes() -> None:
    """Those of a piece lie side by side, with room or without; others anywhere."""
    like = torch.empty(2, 3, 16, dtype=torch.bfloat16)
    places = MixPlaces(((3, 1),), (0, 8, 16, 8))
    found = places.empty_mixes(5, like)
    assert {(each.shape, each.dtype) for each in found} == {(like.shape, like.dtype)}
    assert [each.stride(-2) - 16 for each in found] == [*places.rooms[:5]] == [0, 8, 16, 8, 0]
    assert found[1].data_ptr() - found[3].data_ptr() == 6 * 24 * like.element_size()
    assert len({each.untyped_storage().data_ptr() for each in found}) == 4
    assert all(each.is_contiguous() for each in ANYWHERE.empty_mixes(5, like))
    with pytest.raises(AssertionError):
        MixPlaces(((0, 1),), (8, 16))


def test_room_behind_rows() -> None:
    whole = torch.arange(60).view(5, 12)
    rows = whole[:, 2:9]
    assert has_room(rows, 5)
    assert not has_room(rows, 4)
    assert not has_room(rows[:1], 5), "one row shows nothing"
    assert not has_room(rows.contiguous(), 5)
    assert torch.equal(behind(rows, 3), whole[:, 9:])
    assert torch.equal(with_room(rows, 3), whole[:, 2:])


def test_reserved_rows_are_spread_where_they_are() -> None:
    rows = normal(5, 7, seed=1, dtype=torch.bfloat16)
    given = reserved(rows, 3)
    assert given.is_contiguous()
    assert torch.equal(given, rows)
    found = spread(given, 3)
    assert torch.equal(found, rows)
    assert has_room(found, 3)
    assert found.data_ptr() == given.data_ptr()
    assert behind(found, 3).shape == (5, 3)
    with pytest.raises(RuntimeError, match="out of bounds"):
        spread(reserved(rows, 3), 4)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_copied_at_once(place: Placed) -> None:
    sources = place(4, (N, K), 1, torch.float32)
    whole = torch.zeros(4, N, K + 3)
    copy_each([behind(each, 3) for each in whole[:, :, :K].unbind()], [each[:, :3] for each in sources])
    assert torch.equal(whole[:, :, K:], torch.stack(sources)[:, :, :3])
    assert not whole[:, :, :K].any()


def test_blocks_of_rows_are_summed_each() -> None:
    left, right = normal(3, N, K, seed=1, dtype=torch.float32), normal(3, N, M, seed=2, dtype=torch.float32)
    (found,) = outer_sums([left], [right])
    torch.testing.assert_close(found, left.transpose(1, 2) @ right)


def test_side_by_side() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    equal = side_by_side([(2, 3)] * 3, like)
    assert [tensor.storage_offset() for tensor in equal] == [0, 6, 12]
    assert {tensor.untyped_storage().data_ptr() for tensor in equal} == {equal[0].untyped_storage().data_ptr()}
    others = side_by_side([(2, 3), (2, 4)], like)
    assert [tensor.shape for tensor in others] == [(2, 3), (2, 4)]
    assert others[0].untyped_storage().data_ptr() != others[1].untyped_storage().data_ptr()
    assert side_by_side([], like) == []
    assert {tensor.dtype for tensor in (*equal, *others)} == {torch.bfloat16}


def test_places_lie_side_by_side_whoever_takes_them_first() -> None:
    places, like = Places(3), torch.empty(2, 5, 3, dtype=torch.bfloat16)
    before: list[torch.Tensor] = []
    for order in ((2, 0, 1), (0, 1, 2)):
        taken = {number: places.empty_like(number, like.view(2, 15) if number == 2 else like) for number in order}
        assert taken[2].shape == (2, 15)
        assert module.in_one_piece([taken[number].view(-1) for number in range(3)])
        own = taken[0].untyped_storage().data_ptr()
        assert all(own != other.untyped_storage().data_ptr() for other in before), "memory is not given away twice"
        before.append(taken[0])
