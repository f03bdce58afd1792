"""The token shift that computes its modulation itself, on the emulator, against the definition in fp64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulator.kernels import emulated, has_compiler
from operators import poisoned_memory
from torch import Tensor

from src.ops import elementwise, elementwise_cuda
from src.ops.elementwise import modulated_shift_mixes, shift_mixes_torch
from src.ops.elementwise_cuda import (
    MODULATED_BACKWARD,
    MODULATED_FORWARD,
    SHIFT_BACKWARD,
    SHIFT_FORWARD,
    layer_kernels,
)

BOUND, BOUND_OF_FEW = 2.5e-3, 4e-3
"""Of bf16's roundings. That of hidden's gradient, and up's, which sum a gradient of the modulation that was rounded,
and of results of few values."""
BRANCHING = (-1, 0, 1, 2, 3, -1, 5, 6, 4, 8, 9, 10, 7, 12, 4, 14, 15, 7, 4, 4)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kernels_are_chosen_by_width() -> None:
    for width in (32, 64):
        kernels = layer_kernels(64, ((5, True),), modulation_width=width, sums=False)
        assert MODULATED_FORWARD[width] in kernels
        assert MODULATED_BACKWARD[width] in kernels
        assert SHIFT_FORWARD[5, True] not in kernels
    kernels = layer_kernels(64, ((5, True),), modulation_width=20, sums=False)
    assert SHIFT_FORWARD[5, True] in kernels
    assert SHIFT_BACKWARD[5, True] in kernels


def product_with_dtype(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Any:
    """`torch.bmm` with the option that the one for CPUs does not have."""
    if out is not None:
        return out.copy_(a @ b)
    return a @ b if out_dtype is None else a.to(out_dtype) @ b.to(out_dtype)


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "bmm", product_with_dtype)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(elementwise, "fused_kernels", lambda: elementwise_cuda)
    monkeypatch.setattr(elementwise, "shift_mixes_torch", None)
    for kernels in (SHIFT_FORWARD, SHIFT_BACKWARD):
        monkeypatch.setitem(kernels, (5, True), None)  # the modulation must not have been in memory
    with poisoned_memory(), emulated():
        yield


def definition(
    z: Tensor, carry: Tensor | None, maa: Tensor, hidden: Tensor, up: Tensor, previous: Tensor | None
) -> tuple[Tensor, ...]:
    modulation = torch.einsum("btgk,gkc->gbtc", hidden.unflatten(2, up.shape[:2]), up)
    return shift_mixes_torch(z, carry, maa, modulation, previous)


def results(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: list[Tensor | None],
    previous: Tensor | None,
    wanted: tuple[int, ...],
    used: tuple[int, ...],
) -> list[Tensor]:
    leaves = [
        None if tensor is None else tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(tensors)
    ]
    outputs = function(*leaves, previous)
    if wanted:
        cotangents = [normal(*outputs[0].shape, seed=50 + g).to(outputs[0].dtype) for g in range(5)]
        torch.autograd.backward([outputs[g] for g in used], [cotangents[g] for g in used])
    return [*(output.detach() for output in outputs), *(leaves[i].grad for i in wanted)]  # type: ignore[union-attr, misc]


ALL = (0, 1, 2, 3, 4)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "width", "case", "wanted", "used"),
    [
        (1, 1, 64, 32, "", ALL, ALL),
        (1, 17, 72, 32, "carry", ALL, ALL),
        (2, 17, 8, 64, "carry", ALL, ALL),
        (3, 40, 64, 32, "carry", (0, 1), ALL),
        (1, 1000, 64, 32, "", ALL, ALL),
        (4, 250, 136, 64, "", (0, 3), ALL),
        (1, 17, 2560, 32, "", (0, 3), ALL),
        (1, 20, 64, 32, "branching", ALL, ALL),
        (1, 20, 200, 64, "branching", (0,), ALL),
        (1, 200, 64, 64, "packed", ALL, ALL),
        (1, 33, 64, 32, "", ALL, (1, 4)),
        (1, 33, 64, 32, "carry", (1,), (0,)),
        (1, 33, 64, 32, "wide", ALL, ALL),
        (1, 33, 64, 32, "", (2,), ALL),
        (1, 33, 64, 64, "", (4,), ALL),
        (2, 33, 64, 32, "", (), ALL),
    ],
)
def test_modulated_shift_mixes(
    batch: int, tokens: int, channels: int, width: int, case: str, wanted: tuple[int, ...], used: tuple[int, ...]
) -> None:
    """Cut tiles of rows and channels, several tiles for a warp, segments, parameters in fp32, some outputs unused."""
    z = normal(batch, tokens, channels, seed=1).bfloat16()
    carry = normal(batch, channels, seed=2).bfloat16() if case == "carry" else None
    maa, hidden = normal(5, channels, seed=3).bfloat16(), normal(batch, tokens, 5 * width, seed=4).bfloat16()
    up = (0.2 * normal(5, width, channels, seed=5)).bfloat16()
    previous = None
    if case == "branching":
        previous = torch.tensor(BRANCHING)
    elif case == "packed":
        previous = torch.tensor([-1 if t % 21 == 0 else t - 1 for t in range(tokens)])
    tensors = [z, carry, maa, hidden, up]
    wanted = tuple(i for i in wanted if tensors[i] is not None)
    exact = results(definition, [None if t is None else t.double() for t in tensors], previous, wanted, used)
    if case == "wide":
        tensors[2], tensors[4] = maa.float(), up.float()
    found, again = (results(modulated_shift_mixes, tensors, previous, wanted, used) for _ in range(2))
    for place, (ours, second, theirs) in enumerate(zip(found, again, exact, strict=True)):
        assert torch.equal(ours, second), place
        assert ours.shape == theirs.shape
        rounded_twice = place >= 5 and wanted[place - 5] in (3, 4)
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < (BOUND_OF_FEW if rounded_twice or ours.numel() < 512 else BOUND), place


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
@pytest.mark.usefixtures("emulator")
def test_several_tiles_of_a_warp_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """How the rows are shared out makes no difference to any bit."""
    shapes = (2, 150, 64), (5, 64), (2, 150, 160), (5, 32, 64)
    z, maa, hidden, up = (normal(*shape, seed=seed).bfloat16() for seed, shape in enumerate(shapes))
    found = []
    for wanted in (10**6, 1):
        monkeypatch.setattr(elementwise_cuda, "_MODULATED_BLOCKS_WANTED", wanted)
        found.append(results(modulated_shift_mixes, [z, None, maa, hidden, up], None, (0, 3, 4), ALL))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
@pytest.mark.usefixtures("emulator")
def test_factors_may_begin_anywhere() -> None:
    """Also where no vector does."""
    shapes = (1, 20, 64), (5, 64), (1, 20, 160), (5, 32, 64)
    z, maa, hidden, up = (normal(*shape, seed=seed).bfloat16() for seed, shape in enumerate(shapes))
    found = []
    for shift in (0, 1):
        moved = [
            torch.cat((tensor.new_zeros(shift), tensor.flatten()))[shift:].view_as(tensor) for tensor in (hidden, up)
        ]
        assert all((tensor.data_ptr() % 16 == 0) == (shift == 0) for tensor in moved)
        leaves = [tensor.requires_grad_() for tensor in (z.clone(), *moved)]
        outputs = modulated_shift_mixes(leaves[0], None, maa, *leaves[1:], None)
        found.append([*outputs, *torch.autograd.grad(sum(output.float().sum() for output in outputs), leaves)])
    for aligned, moved in zip(*found, strict=True):
        assert torch.equal(aligned, moved)


@pytest.mark.parametrize("rows", [1, 8, 1000, 2**20, 2**24, 2**27])
@pytest.mark.parametrize("channels", [64, 2048])
@pytest.mark.parametrize("tiles", [1, 2])
def test_every_row_has_a_place_in_a_grid_that_cards_take(rows: int, channels: int, tiles: int) -> None:
    (groups, parts), chunk = elementwise_cuda._modulated_places(rows, channels, tiles)
    covered = parts * elementwise_cuda._MODULATED_WARPS * chunk
    assert groups == channels // 64
    assert 1 <= parts <= 65535
    assert chunk % (8 * tiles) == 0
    assert rows <= covered < rows + elementwise_cuda._MODULATED_WARPS * chunk
