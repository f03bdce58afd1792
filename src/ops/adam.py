"""Adam's step on one tensor, or many at once, without a number that only the host knows: it can be recorded.

Weights are fp32, or bf16 and then rounded stochastically (`src.ops.stochastic`); moments are fp32, or packed in 8 bits
with a scale for every 256 values, in bitsandbytes' format. On a GPU it is one kernel in one pass (`cuda/adam.cu`),
which reads and writes packed moments of bf16 weights with 10 bytes a value in all; the definition is in plain torch.

A packed mean of squares is never rounded to 0, by whose root the next step would divide: it is at least the map's
smallest number (arXiv 2309.01507, section 4.1, on the zero point).

Source: Adam, arXiv 1412.6980; decoupled decay, arXiv 1711.05101; 8-bit moments, arXiv 2110.02861, section 2.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.ops.kernels import Kernel, usable
from src.ops.row_gradient import RowGradient, values_of

Gradient = Tensor | RowGradient

BLOCK_VALUES = 256
_THREADS = 256
_BLOCKS_OF_PROCESSOR = 8

_PIECE_VALUES = 32 * BLOCK_VALUES
"""Of a tensor, that one block of threads updates where there are many."""

_TENSOR, _STEP = struct.Struct("<6Q q ii"), "(PP PPP ffff)"
_NARROW = {torch.float32: "false", torch.bfloat16: "true"}
_CASES = [(dtype, packed) for dtype in _NARROW for packed in (False, True)]
KERNELS = {
    (dtype, packed): Kernel(
        "adam.cu", f"adam::step_kernel<{_NARROW[dtype]}, {str(packed).lower()}>", f"(PPPPPP q ii) {_STEP} Pi"
    )
    for dtype, packed in _CASES
}
"""By dtype of the weights, and whether moments are packed."""
KERNELS_OF_MANY = {
    (dtype, packed): Kernel("adam.cu", f"adam::steps_kernel<{_NARROW[dtype]}, {str(packed).lower()}>", f"PP {_STEP}")
    for dtype, packed in _CASES
}
NORMS = {dtype: Kernel("adam.cu", f"adam::norms_kernel<{narrow}>", "PPP") for dtype, narrow in _NARROW.items()}


@dataclass(frozen=True)
class Moments:
    """Running means of a tensor's gradient and of its square.

    Attributes:
        first, second: fp32 of the tensor's shape, or uint8 places in the maps; on its device, or in pinned memory.
        first_scales, second_scales: fp32 [blocks], what a block's numbers are multiples of; None of fp32 moments.
    """

    first: Tensor
    second: Tensor
    first_scales: Tensor | None = None
    second_scales: Tensor | None = None

    @classmethod
    def zeros(cls, like: Tensor, *, packed: bool, on_host: bool = False) -> Moments:
        """Those before the first step of a tensor; `on_host`: packed ones are in pinned memory."""
        if not packed:
            return cls(*(torch.zeros(like.shape, device=like.device) for _ in range(2)))
        pinned = on_host and like.is_cuda
        options: dict[str, Any] = {"dtype": torch.uint8, "device": "cpu" if pinned else like.device}
        blocks = -(-like.numel() // BLOCK_VALUES)
        first, second = (
            torch.full(like.shape, _place_of_zero(signed=signed), pin_memory=pinned, **options)
            for signed in (True, False)
        )
        return cls(first, second, *(torch.zeros(blocks, device=like.device) for _ in range(2)))

    def clear(self) -> None:
        """Makes them what they are before the first step, where they are."""
        for places, scales, signed in ((self.first, self.first_scales, True), (self.second, self.second_scales, False)):
            places.fill_(0 if scales is None else _place_of_zero(signed=signed))
            if scales is not None:
                scales.zero_()


@dataclass(frozen=True)
class Control:
    """What steps depend on besides gradients, on the device.

    Attributes:
        settings: fp32 [rows, 4], see `settings_row`; any number of tensors may have one.
        norm: fp32, 0-d: of the gradient; what is larger than the clip is scaled down. nan: nothing is.
        flags: int32 [2]: number of the step; if the other is not 0, everything stays as it is.
    """

    settings: Tensor
    norm: Tensor
    flags: Tensor

    def tell(self, rows: Sequence[Sequence[float]], step: int) -> None:
        """What only the host knows of a step, and that it is to be taken.

        It arrives behind what was issued before, for which nothing waits: hence from pinned memory.
        """
        for place, given in (
            (self.settings, torch.tensor(rows)),
            (self.flags, torch.tensor([step, 0], dtype=torch.int32)),
        ):
            place.copy_(given.pin_memory() if place.is_cuda else given, non_blocking=True)


@dataclass(frozen=True)
class Constants:
    """What stays from first to last: Adam's, and the largest norm of a gradient."""

    beta1: float
    beta2: float
    eps: float
    clip: float

    def settings_row(self, rate: float, weight_decay: float, step: int) -> list[float]:
        """Settings of tensors whose moments take their `step`-th step, counted from 1."""
        return [rate, weight_decay, 1 / (1 - self.beta1**step), (1 - self.beta2**step) ** -0.5]


def adam_step(
    weights: Tensor, gradient: Gradient, moments: Moments, control: Control, constants: Constants, row: int, seed: int
) -> None:
    """Updates weights and moments in place; nothing waits for the device.

    Args:
        weights: fp32 or bf16, contiguous.
        gradient: of their dtype and shape; or of rows of them, the others' being 0: they are updated, too.
        moments: theirs.
        control, constants: see there.
        row: of the settings.
        seed: below 2^31, the tensor's; noise is a function of it, of the step and of a value's place.
    """
    assert weights.dtype in (torch.float32, torch.bfloat16)
    assert values_of(gradient).dtype == weights.dtype
    if isinstance(gradient, RowGradient):
        assert (*gradient.places.shape, *gradient.values.shape[1:]) == weights.shape
    else:
        assert gradient.shape == weights.shape
    assert weights.is_contiguous()
    assert weights.numel() < 2**31 - BLOCK_VALUES
    if weights.is_cuda:
        _by_kernel(weights, gradient, moments, control, constants, row, seed)
    else:
        adam_step_torch(weights, gradient, moments, control, constants, row, seed)


class ManySteps:
    """`adam_step` on many tensors at once: of each dtype, and with either kind of moments, in one launch.

    Args:
        weights, moments: as for `adam_step`, on one device.
        rows: of the settings, of each tensor.
        seeds: of each tensor.
        device: where they are; it has to be said where there may be none.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        moments: Sequence[Moments],
        rows: Sequence[int],
        seeds: Sequence[int],
        device: torch.device | None = None,
    ) -> None:
        self._device = device or weights[0].device
        kinds: dict[tuple[torch.dtype, bool], _OfOneKind] = {}
        for number, (tensor, own) in enumerate(zip(weights, moments, strict=True)):
            kind = kinds.setdefault((tensor.dtype, own.first_scales is not None), _OfOneKind())
            kind.places.append(number)
            kind.weights.append(tensor)
            kind.moments.append(own)
            kind.rows.append(rows[number])
            kind.seeds.append(seeds[number])
        self._kinds = kinds

    def use_rows(self, rows: Sequence[int]) -> None:
        """Gives each tensor another row of the settings, before `look_at`."""
        for kind in self._kinds.values():
            kind.rows = [rows[place] for place in kind.places]

    def look_at(self, gradients: Sequence[Tensor | None]) -> None:
        """Takes note of each tensor's gradient, None where there is none, for what comes next."""
        for kind in self._kinds.values():
            kind.look_at(gradients)

    def gradient_norm(self) -> Tensor:
        """Of all gradients together, fp32, 0-d; nothing waits for the device."""
        norms = [kind.norms(dtype) for (dtype, _), kind in self._kinds.items()]
        norm: Tensor = torch.linalg.vector_norm(torch.cat([torch.zeros(1, device=self._device), *norms]))
        return norm

    def step(self, control: Control, constants: Constants) -> None:
        """Updates the tensors that have a gradient, as `adam_step` does, and forgets the gradients."""
        for (dtype, packed), kind in self._kinds.items():
            kind.step(dtype, packed, control, constants)


class _OfOneKind:
    """Tensors that one launch updates.

    What the kernels read of tensors is on the device, and is written anew when one of them, or its gradient, has moved.
    """

    def __init__(self) -> None:
        self.places: list[int] = []
        self.weights: list[Tensor] = []
        self.moments: list[Moments] = []
        self.rows: list[int] = []
        self.seeds: list[int] = []
        self._gradients: list[Tensor | None] = []
        self._described: list[int] = []
        self._present: list[int] = []
        self._tensors = self._pieces = torch.empty(0)

    @property
    def by_kernels(self) -> bool:
        """Whether they are on a GPU."""
        return self.weights[0].is_cuda

    def look_at(self, gradients: Sequence[Tensor | None]) -> None:
        own = [gradients[place] for place in self.places]
        self._gradients = [None if gradient is None else gradient.contiguous() for gradient in own]
        if self.by_kernels:
            self._describe(self._gradients)

    def norms(self, dtype: torch.dtype) -> Tensor:
        """fp32, those of pieces of gradients."""
        if not self.by_kernels:
            given = [gradient for gradient in self._gradients if gradient is not None]
            return torch.stack([torch.zeros(()), *torch._foreach_norm(given, 2, torch.float32)])
        count = len(self._pieces)
        norms = torch.empty(count, device=self.weights[0].device)
        if count:
            NORMS[dtype](norms, count, _THREADS, self._tensors, self._pieces, norms)
        return norms

    def step(self, dtype: torch.dtype, packed: bool, control: Control, constants: Constants) -> None:
        if not self.by_kernels:
            for tensor, gradient, moments, row, seed in zip(
                self.weights, self._gradients, self.moments, self.rows, self.seeds, strict=True
            ):
                if gradient is not None:
                    adam_step_torch(tensor, gradient, moments, control, constants, row, seed)
        elif count := len(self._pieces):
            values = _values_of_step(self._tensors.device, packed, control, constants)
            KERNELS_OF_MANY[dtype, packed](self._tensors, count, _THREADS, self._tensors, self._pieces, *values)
        self._gradients = []

    def _describe(self, gradients: Sequence[Tensor | None]) -> None:
        """Sees to it that the device knows these gradients; they stay where they are until the kernels have run."""
        described = [tensor.data_ptr() for tensor in self.weights]
        described += [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        described += self.rows
        if described == self._described:
            return
        tensors, present = bytearray(), []
        of_each = zip(self.weights, gradients, self.moments, self.rows, self.seeds, strict=True)
        for number, (weights, gradient, moments, row, seed) in enumerate(of_each):
            if gradient is None:
                continue
            assert gradient.dtype == weights.dtype
            assert gradient.shape == weights.shape
            assert weights.is_contiguous()
            assert weights.numel() < 2**31 - _PIECE_VALUES
            present.append(number)
            tensors += _TENSOR.pack(*map(_address, _pointers(weights, gradient, moments)), weights.numel(), row, seed)
        device = self.weights[0].device
        if present:
            self._tensors = torch.frombuffer(tensors, dtype=torch.uint8).to(device)
        if present != self._present:
            self._pieces = _pieces_of([self.weights[number].numel() for number in present]).to(device)
        self._described, self._present = described, present


def _pieces_of(counts: Sequence[int]) -> Tensor:
    """int32 [pieces, 2]: the number of its tensor, and the first of its blocks.

    Args:
        counts: values of each tensor; a thousand millions are a hundred thousand pieces.
    """
    of_each = torch.tensor([-(-count // _PIECE_VALUES) for count in counts], dtype=torch.int64)
    tensors = torch.repeat_interleave(of_each)
    before = of_each.cumsum(0) - of_each
    inside = torch.arange(len(tensors)) - before[tensors]
    return torch.stack([tensors, inside * (_PIECE_VALUES // BLOCK_VALUES)], 1).int()


@torch.no_grad()
def adam_step_torch(
    weights: Tensor, gradient: Gradient, moments: Moments, control: Control, constants: Constants, row: int, seed: int
) -> None:
    """Definition of `adam_step`."""
    if isinstance(gradient, RowGradient):
        gradient = gradient.dense()
    stays = control.flags[1] != 0
    rate, decay, first_correction, second_correction = control.settings[row].unbind()
    factor = constants.clip / (control.norm + 1e-6)
    gradient = gradient.float() * torch.where(factor < 1, factor, 1.0)
    first = _unpacked(moments.first, moments.first_scales, signed=True)
    second = _unpacked(moments.second, moments.second_scales, signed=False)
    first = constants.beta1 * first + (1 - constants.beta1) * gradient
    second = constants.beta2 * second + (1 - constants.beta2) * gradient * gradient
    values = weights.float() * (1 - rate * decay)
    values -= rate * first_correction * first / (second.sqrt() * second_correction + constants.eps)
    if weights.dtype == torch.bfloat16:
        values = rounded_by_hash(values, seed, control.flags[0])
    weights.copy_(torch.where(stays, weights, values.to(weights.dtype)))
    for kept, scales, value, signed in (
        (moments.first, moments.first_scales, first, True),
        (moments.second, moments.second_scales, second, False),
    ):
        if scales is None:
            kept.copy_(torch.where(stays, kept, value))
        else:
            places, new = _packed(value, signed=signed)
            kept.copy_(torch.where(stays, kept, places))
            scales.copy_(torch.where(stays, scales, new))


def rounded_by_hash(values: Tensor, seed: int, step: Tensor) -> Tensor:
    """Values, fp32, rounded to the bf16 below or above with the odds of the distance to the other, in fp32.

    Noise of 16 bits is a hash of seed, step (int32, 0-d) and place; what is not finite stays as it is.

    Source: stochastic rounding, arXiv 2010.06192, section 3.
    """
    pairs = torch.arange(-(-values.numel() // 2), device=values.device)
    hashes = _mixed(_mixed(seed + step.long() * 0x9E3779B9) + pairs)
    noise = torch.stack([hashes & 0xFFFF, hashes >> 16], 1).view(-1)[: values.numel()].view(values.shape).int()
    rounded = (noise + values.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)


@functools.cache
def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 numbers of 8-bit moments, in order, fp32.

    Seven decades below 1, each with as many numbers as all below it: the middles of equal parts. And 0, and 1.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade + (not signed))
        parts = [10.0 ** (decade - 6) * (0.1 + 0.9 * (part + 0.5) / count) for part in range(count)]
        numbers += [sign * part for sign in ((1, -1) if signed else (1,)) for part in parts]
    return torch.tensor(sorted(numbers), dtype=torch.float64).float()


@functools.cache
def _place_of_zero(*, signed: bool) -> int:
    return int(dynamic_map(signed=signed).abs().argmin())


@functools.cache
def _map_on(device: torch.device, *, signed: bool) -> Tensor:
    return dynamic_map(signed=signed).to(device)


def _mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits in int64. Source: lowbias32, https://nullprogram.com/blog/2018/07/31/"""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _unpacked(moments: Tensor, scales: Tensor | None, *, signed: bool) -> Tensor:
    if scales is None:
        return moments
    values = _map_on(moments.device, signed=signed)[moments.reshape(-1).long()]
    return (values * scales.repeat_interleave(BLOCK_VALUES)[: values.numel()]).view(moments.shape)


def _packed(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Places of the nearest numbers, and the blocks' scales."""
    flat = values.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_VALUES)).view(-1, BLOCK_VALUES)
    scales = blocks.abs().amax(1)
    relative = blocks * torch.where(scales > 0, 1 / scales, 0.0).unsqueeze(1)
    numbers = _map_on(values.device, signed=signed)
    places = torch.bucketize(relative, (numbers[1:] + numbers[:-1]) / 2).clamp_(min=0 if signed else 1)
    return places.view(-1)[: flat.numel()].view(values.shape).to(torch.uint8), scales


def kernels_for(dtypes: Collection[torch.dtype], *, packed: bool, singly: bool) -> tuple[Kernel, ...]:
    """The kernels that updates launch.

    Args:
        dtypes: of weights.
        packed: whether moments are, but for small tensors.
        singly: whether tensors are updated one by one, not many at once.
    """
    family = KERNELS if singly else KERNELS_OF_MANY
    steps = [family[dtype, kind] for dtype in dtypes for kind in sorted({False, packed})]
    return *steps, *(() if singly else (NORMS[dtype] for dtype in dtypes))


def kernels_are_available(kernels: tuple[Kernel, ...], device: torch.device) -> bool:
    """Whether they can be compiled for this device; warns once, with the reason, when a GPU cannot have them."""
    return device.type == "cuda" and usable(kernels, device, "Slower torch operations are used instead.")


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _by_kernel(
    weights: Tensor, gradient: Gradient, moments: Moments, control: Control, constants: Constants, row: int, seed: int
) -> None:
    given = values_of(gradient).contiguous()
    rows = (gradient.places, given.shape[1]) if isinstance(gradient, RowGradient) else (None, 0)
    packed = moments.first_scales is not None
    blocks = -(-weights.numel() // (BLOCK_VALUES * _THREADS // 32))
    grid = min(blocks, _BLOCKS_OF_PROCESSOR * _multiprocessors(weights.get_device()))
    pointers = _pointers(weights, given, moments)
    values = _values_of_step(weights.device, packed, control, constants)
    KERNELS[weights.dtype, packed](weights, grid, _THREADS, *pointers, weights.numel(), row, seed, *values, *rows)


def _pointers(weights: Tensor, gradient: Tensor, moments: Moments) -> tuple[Tensor | None, ...]:
    """Those of `adam::Tensor`."""
    return weights, gradient, moments.first, moments.second, moments.first_scales, moments.second_scales


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _values_of_step(
    device: torch.device, packed: bool, control: Control, constants: Constants
) -> tuple[Tensor | float | None, ...]:
    """The members of `adam::Step`."""
    maps = [_map_on(device, signed=signed) for signed in (True, False)] if packed else [None, None]
    on_device = (control.settings, control.norm, control.flags)
    return *maps, *on_device, constants.beta1, constants.beta2, constants.eps, constants.clip
