"""The element-wise operators on NVIDIA GPUs: checks, memory and autograd around the kernels of `cuda/elementwise.cu`.

Functions as in `src.ops.elementwise`, in bfloat16. What is dear (inputs that some product made), or kept by another
node in any case, is saved; the rest is computed again. Parameters may be stored wider than bf16; their gradients are
summed in fp32 and so handed to autograd, which casts them to the parameter's dtype. A gradient that is not needed costs
nothing. Tensors that do not fit raise RuntimeError, naming the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from src.ops.kernels import Kernel, Size
from src.ops.node import Node
from src.ops.products import ANYWHERE, MOST_MIXES, MixPlaces, Places
from src.ops.rows import (
    HEAD_SIZES,
    SUM_THREADS,
    THREADS,
    VECTOR,
    blocks_for,
    check_channels,
    check_shape,
    kept_parameter,
    prepared,
    prepared_parameter,
    read_parameter,
    records,
    refuse_double_backward,
    saved_parameter,
    sum_grid,
    sum_tile,
)
from src.ops.totals import TOTALS, total_of_tiles

MOST_NORM_CHANNELS = 8192
MIXES = (1, 2, 5, 6)
MODULATED_MIXES = 5
MODULATION_WIDTHS = (32, 64)
"""Of hidden, from which kernels compute the modulation of as many mixes where they use it."""
_NORM_THREADS = 256
_ROW_THREADS = 512
_SHIFT_TILE = 4
_MODULATED_WARPS = 8
_MODULATED_CHANNELS = 64
_MODULATED_BLOCKS_WANTED = 4 * 132
_MOST_MODULATED_TILES = 4
"""That a warp has one after another, if the grid can be so large."""
_MOST_BLOCKS_DOWN = 65535
"""Of a grid, in its second direction, on any card."""
_NORM_TILE = 2
_VALUES_PER_BLOCK = 2 * THREADS * VECTOR


def _kernel(expression: str, parameters: str) -> Kernel:
    return Kernel("elementwise.cu", f"elementwise::{expression}", parameters)


def _flag(value: bool) -> str:
    return "true" if value else "false"


_SHIFT, _POINTERS, _OUTPUTS, _SUMS = "(PPPPP iiiii)", "(PPPPPP)", "(PPPPPP iiiiii)", "(PPq)"
_CASES = [(mixes, modulated) for mixes in MIXES for modulated in (False, True)]
SHIFT_FORWARD = {
    (mixes, modulated): _kernel(
        f"shift_mix_forward_kernel<{mixes}, {_flag(modulated)}, {_SHIFT_TILE}>", f"{_SHIFT} {_OUTPUTS}"
    )
    for mixes, modulated in _CASES
}
SHIFT_BACKWARD = {
    (mixes, modulated): _kernel(
        f"shift_mix_backward_kernel<{mixes}, {_flag(modulated)}, {_SHIFT_TILE}>", f"{_SHIFT} {_POINTERS} PPPP"
    )
    for mixes, modulated in _CASES
}
# Row tiles of a warp at a time, of 8 rows each, and warps that a multiprocessor has registers for.
_FORWARD_TILES, _FORWARD_RESIDENT = 2, 16
_BACKWARD_TILES, _BACKWARD_RESIDENT = 1, 16
MODULATED_FORWARD, MODULATED_BACKWARD = (
    {
        width: _kernel(
            f"modulated_shift_mix_{name}_kernel<{width}, {_MODULATED_WARPS}, {tiles}, {resident}>",
            f"{_SHIFT} (PP) {rest}",
        )
        for width in MODULATION_WIDTHS
    }
    for name, tiles, resident, rest in (
        ("forward", _FORWARD_TILES, _FORWARD_RESIDENT, f"{_OUTPUTS} i"),
        ("backward", _BACKWARD_TILES, _BACKWARD_RESIDENT, f"{_POINTERS} PPPPi"),
    )
)
MAA_SUMS = {mixes: _kernel(f"shift_mix_maa_sums_kernel<{mixes}>", f"{_SHIFT} {_POINTERS} iP") for mixes in MIXES}
GATE_FORWARD, GATE_BACKWARD, GATE_SUMS = (
    {size: _kernel(f"group_norm_silu_gate_{name}_kernel<{size // VECTOR}{tile}>", parameters) for size in HEAD_SIZES}
    for name, tile, parameters in (
        ("forward", f", {_NORM_TILE}", "PPPP f P iii"),
        ("backward", f", {_NORM_TILE}", "PPPP f PPP iii"),
        ("sums", "", f"PP f P iii {_SUMS}"),
    )
)
NORM_FORWARD = {
    (held, adds): _kernel(f"add_norm_forward_kernel<{held}, {_flag(adds)}>", "PPPP f PPP ii")
    for held in (1, 2, 4)
    for adds in (False, True)
}
NORM_BACKWARD = {held: _kernel(f"add_norm_backward_kernel<{held}>", "PPPPPP ii") for held in (1, 2, 4)}
NORM_SUMS = _kernel("add_norm_sums_kernel", f"PPP iii {_SUMS}")
SQUARED_RELU = _kernel("each_vector_kernel<elementwise::SquaredRelu>", "q (PP)")
SQUARED_RELU_GRADIENT = _kernel("each_vector_kernel<elementwise::SquaredReluGradient>", "q (PPP)")
SQUARED_RELU_AND_GRADIENT = _kernel("each_vector_kernel<elementwise::SquaredReluAndGradient>", "q (PP)")
GATED_RESIDUAL = _kernel("each_vector_kernel<elementwise::SigmoidGatedResidual>", "q (PPPP)")
GATED_RESIDUAL_GRADIENT = _kernel("each_vector_kernel<elementwise::SigmoidGatedResidualGradient>", "q (PPPPPP)")
LOGIT_STATISTICS = _kernel("logit_statistics_kernel", "PPPPPP i")
LOGIT_GRADIENT = _kernel("logit_gradient_kernel", "PPPPPP i")

KERNELS = (
    *(*SHIFT_FORWARD.values(), *SHIFT_BACKWARD.values(), *MAA_SUMS.values()),
    *(*MODULATED_FORWARD.values(), *MODULATED_BACKWARD.values()),
    *(*GATE_FORWARD.values(), *GATE_BACKWARD.values(), *GATE_SUMS.values()),
    *(*NORM_FORWARD.values(), *NORM_BACKWARD.values(), NORM_SUMS, TOTALS),
    *(SQUARED_RELU, SQUARED_RELU_GRADIENT, SQUARED_RELU_AND_GRADIENT, GATED_RESIDUAL, GATED_RESIDUAL_GRADIENT),
    *(LOGIT_STATISTICS, LOGIT_GRADIENT),
)


def layer_kernels(
    channels: int,
    mixes: Collection[tuple[int, bool]],
    *,
    modulation_width: int = 0,
    head_size: int = 0,
    gates_channels: bool = False,
    sums: bool,
) -> tuple[Kernel, ...]:
    """The kernels that layers and the head launch, forward and backward.

    Args:
        channels: of the residual stream.
        mixes: how many mixes each token shift makes, and whether they are modulated.
        modulation_width: of the hidden layer that modulates them; 0 where there is none.
        head_size: of a group norm with SiLU gate; 0 is none.
        gates_channels: whether the channel mix ends in `sigmoid_gated_residual`.
        sums: whether parameters of these operators are trained, too.
    """
    held = held_vectors(channels)
    norms = (NORM_FORWARD[held, True], NORM_FORWARD[held, False], NORM_BACKWARD[held])
    shifts: list[Kernel] = []
    for count, modulated in mixes:
        if modulated and _kernels_modulate(count, modulation_width):
            shifts += [MODULATED_FORWARD[modulation_width], MODULATED_BACKWARD[modulation_width]]
        else:
            shifts += [SHIFT_FORWARD[count, modulated], SHIFT_BACKWARD[count, modulated]]
    found = [*norms, *shifts, SQUARED_RELU, SQUARED_RELU_GRADIENT, LOGIT_STATISTICS, LOGIT_GRADIENT]
    if gates_channels:
        found += [GATED_RESIDUAL, GATED_RESIDUAL_GRADIENT]
    if head_size in HEAD_SIZES:
        found += [GATE_FORWARD[head_size], GATE_BACKWARD[head_size]]
    if sums:
        found += [
            SQUARED_RELU_AND_GRADIENT,
            NORM_SUMS,
            TOTALS,
            *(MAA_SUMS[count] for count in sorted({count for count, _ in mixes})),
        ]
        found += [GATE_SUMS[head_size]] if head_size in HEAD_SIZES else []
    return tuple(found)


def held_vectors(channels: int) -> int:
    """How many vectors of a row a thread of the norm's kernels holds, a template argument of theirs."""
    held = -(-channels // (VECTOR * _NORM_THREADS))
    return held if held <= 2 else 4


def shift_mixes(
    z: Tensor,
    carry: Tensor | None,
    maa: Tensor,
    modulation: Tensor | None,
    previous: Tensor | None,
    children: Tensor | None,
    places: MixPlaces = ANYWHERE,
) -> tuple[Tensor, ...]:
    """See `elementwise.shift_mixes`; `children` are `continuations` of `previous`."""
    run: Any = _ShiftMix.apply if records(z, carry, maa, modulation) else _ShiftMix.run
    outputs: tuple[Tensor, ...] = run(z, carry, maa, modulation, previous, children, places)
    return outputs


def modulated_shift_mixes(
    z: Tensor,
    carry: Tensor | None,
    maa: Tensor,
    hidden: Tensor,
    up: Tensor,
    previous: Tensor | None,
    children: Tensor | None,
    places: MixPlaces,
    keeps_modulation: bool,
    narrow_up: Callable[[], Tensor] | None,
) -> tuple[Tensor, ...]:
    """See `elementwise.modulated_shift_mixes`."""
    run: Any = _ModulatedShiftMix.apply if records(z, carry, maa, hidden, up) else _ModulatedShiftMix.run
    options = (places, keeps_modulation, narrow_up)
    outputs: tuple[Tensor, ...] = run(z, carry, maa, hidden, up, previous, children, *options)
    return outputs


def group_norm_silu_gate(
    y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, places: Places | None = None
) -> Tensor:
    """See `elementwise.group_norm_silu_gate`."""
    if not records(y, gate, weight, bias):
        return _GroupNormSiluGate.run(y, gate, weight, bias, eps)
    output: Tensor = _GroupNormSiluGate.apply(y, gate, weight, bias, eps, places)
    return output


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `elementwise.add_norm`."""
    if records(x, delta, weight, bias):
        total, normed = _AddNorm.apply(x, delta, weight, bias, eps)
        return total, normed
    total, normed, _ = _normed(x, delta, weight, bias, eps)
    return total, normed


def squared_relu(x: Tensor) -> Tensor:
    """See `elementwise.squared_relu`."""
    output: Tensor = _SquaredRelu.apply(x) if records(x) else _squared(_vectors(x, "x"))
    return output


def squared_relu_gradient(x: Tensor, grad: Tensor) -> None:
    """See `elementwise.squared_relu_gradient`: `grad` is overwritten."""
    name = "the gradient of squared_relu"
    x = _vectors(x, "x")
    check_shape(grad, x.shape, name)
    if prepared(grad, name) is not grad:
        raise RuntimeError(f"{name} is strided")
    _each_vector(SQUARED_RELU_GRADIENT, x, x, grad, grad)


def squared_relu_and_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """See `elementwise.squared_relu_and_gradient`."""
    x, grad = _vectors(x, "x"), prepared(grad, "the gradient of squared_relu")
    check_shape(grad, x.shape, "the gradient of squared_relu")
    _each_vector(SQUARED_RELU_AND_GRADIENT, x, x, grad)
    return x, grad


def sigmoid_gated_residual(x: Tensor, r: Tensor, value: Tensor) -> Tensor:
    """See `elementwise.sigmoid_gated_residual`."""
    run: Any = _SigmoidGatedResidual.apply if records(x, r, value) else _gated
    result: Tensor = run(x, r, value)
    return result


def sigmoid_gated_residual_gradients(x: Tensor, r: Tensor, result: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """See `elementwise.sigmoid_gated_residual_gradients`."""
    x, r, result = _vectors(x, "x"), prepared(r, "r"), prepared(result, "result")
    grad = prepared(grad, "the gradient of sigmoid_gated_residual")
    check_shape(r, x.shape, "r")
    check_shape(result, x.shape, "result")
    check_shape(grad, x.shape, "the gradient of sigmoid_gated_residual")
    grad_r, grad_value = torch.empty_like(r), torch.empty_like(r)
    _each_vector(GATED_RESIDUAL_GRADIENT, x, x, r, result, grad, grad_r, grad_value)
    return grad_r, grad_value


def logit_statistics(
    logits: Tensor, targets: Tensor, logp: Tensor, max_logit: Tensor, logsumexp: Tensor, argmax: Tensor
) -> None:
    """Writes log p(target) and largest logit (0 for a negative target), logsumexp and arg-max of each row.

    Args:
        logits: [rows, vocabulary].
        targets: int64 [rows].
        logp, max_logit, logsumexp: fp32 [rows].
        argmax: int32 [rows], the lowest of equal ones.
    """
    _check_logits(logits, targets, {"logp": logp, "max_logit": max_logit, "logsumexp": logsumexp, "argmax": argmax})
    rows, vocabulary = logits.shape
    if rows:
        values = (logits, targets, logp, max_logit, logsumexp, argmax)
        LOGIT_STATISTICS(logits, rows, _ROW_THREADS, *values, vocabulary)


def logit_gradient(
    logits: Tensor, targets: Tensor, logsumexp: Tensor, argmax: Tensor, grad_logp: Tensor, grad_max_logit: Tensor
) -> None:
    """Overwrites logits by the gradient of sum(grad_logp * logp) + sum(grad_max_logit * max_logit)."""
    values = {"logsumexp": logsumexp, "grad_logp": grad_logp, "grad_max_logit": grad_max_logit, "argmax": argmax}
    _check_logits(logits, targets, values)
    rows, vocabulary = logits.shape
    if rows:
        arguments = (logits, targets, logsumexp, argmax, grad_logp, grad_max_logit)
        LOGIT_GRADIENT(logits, rows, _ROW_THREADS, *arguments, vocabulary)


class _ShiftMix(Node):
    @staticmethod
    def run(
        z: Tensor,
        carry: Tensor | None,
        maa: Tensor,
        modulation: Tensor | None,
        previous: Tensor | None,
        children: Tensor | None,
        places: MixPlaces,
    ) -> tuple[Tensor, ...]:
        inputs = _ShiftInputs(z, carry, maa, previous, children)
        return inputs.mixed(inputs.checked(modulation), places)

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        carry: Tensor | None,
        maa: Tensor,
        modulation: Tensor | None,
        previous: Tensor | None,
        children: Tensor | None,
        places: MixPlaces,
    ) -> tuple[Tensor, ...]:
        inputs = _ShiftInputs(z, carry, maa, previous, children)
        modulation = inputs.checked(modulation)
        outputs = inputs.mixed(modulation, places)
        ctx.set_materialize_grads(False)
        # Without modulation the proportions are constants: only the gradient of maa needs an input.
        needs_inputs = modulation is not None or ctx.needs_input_grad[2]
        kept_z, kept_carry = (inputs.z, inputs.carry) if needs_inputs else (None, None)
        ctx.save_for_backward(kept_z, kept_carry, saved_parameter(ctx, "maa", maa, 2), modulation)
        inputs.keep(ctx)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if all(grad is None for grad in grads):
            return (None,) * 7
        z, carry, maa, modulation = ctx.saved_tensors
        needed = ctx.needs_input_grad
        maa = read_parameter(kept_parameter(ctx, "maa", maa), "maa")
        found = _shift_gradients(ctx, grads, z, carry, maa, modulation, *needed[:4])
        return *found, None, None, None


class _ModulatedShiftMix(Node):
    """A token shift whose modulation is hidden @ up for each mix.

    Kernels compute it where they use it; where they do not, it is formed in memory, and again unless it is kept.
    """

    @staticmethod
    def run(
        z: Tensor,
        carry: Tensor | None,
        maa: Tensor,
        hidden: Tensor,
        up: Tensor,
        previous: Tensor | None,
        children: Tensor | None,
        places: MixPlaces,
        keeps_modulation: bool,
        narrow_up: Callable[[], Tensor] | None,
    ) -> tuple[Tensor, ...]:
        inputs = _ShiftInputs(z, carry, maa, previous, children)
        outputs, _ = inputs.modulated(prepared(hidden, "hidden"), _used_up(up, narrow_up), places)
        return outputs

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        carry: Tensor | None,
        maa: Tensor,
        hidden: Tensor,
        up: Tensor,
        previous: Tensor | None,
        children: Tensor | None,
        places: MixPlaces,
        keeps_modulation: bool,
        narrow_up: Callable[[], Tensor] | None,
    ) -> tuple[Tensor, ...]:
        inputs = _ShiftInputs(z, carry, maa, previous, children)
        hidden = prepared(hidden, "hidden")
        outputs, modulation = inputs.modulated(hidden, _used_up(up, narrow_up), places)
        keeps_modulation = keeps_modulation and modulation is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            inputs.z,
            inputs.carry,
            saved_parameter(ctx, "maa", maa, 2),
            modulation if keeps_modulation else None,
            hidden if not keeps_modulation or ctx.needs_input_grad[4] else None,
            saved_parameter(ctx, "up", up, 4),
        )
        inputs.keep(ctx)
        ctx.narrow_up = narrow_up
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if all(grad is None for grad in grads):
            return (None,) * 10
        z, carry, maa, modulation, hidden, up = ctx.saved_tensors
        maa = read_parameter(kept_parameter(ctx, "maa", maa), "maa")
        up = _used_up(kept_parameter(ctx, "up", up), ctx.narrow_up)
        of_z, of_carry, of_maa, of_hidden, of_up = ctx.needs_input_grad[:5]
        if modulation is None and (of_z or of_carry or of_hidden or of_up):
            fused = _kernels_modulate(*up.shape[:2])
            modulation = (_aligned(hidden), _aligned(up)) if fused else torch.bmm(_by_mix(hidden, up), up)
        of_modulation = of_hidden or of_up
        found = _shift_gradients(ctx, grads, z, carry, maa, modulation, of_z, of_carry, of_maa, of_modulation)
        grad_z, grad_carry, grad_maa, grad_modulation = found
        grad_hidden = grad_up = None
        if of_modulation:
            assert grad_modulation is not None
            grad_modulation = grad_modulation.view(up.shape[0], -1, up.shape[2])
        if of_hidden:
            assert grad_modulation is not None
            grad_hidden = z.new_empty(*z.shape[:2], up.shape[0] * up.shape[1])
            torch.bmm(grad_modulation, up.transpose(1, 2), out=_by_mix(grad_hidden, up))
        if of_up:
            assert grad_modulation is not None
            grad_up = torch.bmm(_by_mix(hidden, up).transpose(1, 2), grad_modulation, out_dtype=torch.float32)
        return grad_z, grad_carry, grad_maa, grad_hidden, grad_up, None, None, None, None, None


class _GroupNormSiluGate(Node):
    @staticmethod
    def run(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return _gated_norm(prepared(y, "y"), prepared(gate, "gate"), weight, bias, eps)

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, places: Places | None
    ) -> Tensor:
        y, gate = prepared(y, "y"), prepared(gate, "gate")
        output = _gated_norm(y, gate, weight, bias, eps)
        ctx.save_for_backward(y, gate, saved_parameter(ctx, "weight", weight, 2), saved_parameter(ctx, "bias", bias, 3))
        ctx.eps, ctx.places = eps, places
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        y, gate, weight, bias = ctx.saved_tensors
        of_y, of_gate, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad = prepared(grad, "the gradient of group_norm_silu_gate")
        rows, channels, head_size = y.shape[0] * y.shape[1], gate.shape[2], y.shape[3]
        grad_y = grad_gate = None
        if of_y or of_gate:
            weight, bias, wide = _read_alike(kept_parameter(ctx, "weight", weight), kept_parameter(ctx, "bias", bias))
            grad_y = torch.empty_like(y)
            grad_gate = torch.empty_like(gate) if ctx.places is None else ctx.places.empty_like(3, gate)
            if rows:
                values = (y, gate, weight, bias, ctx.eps, grad, grad_y, grad_gate, rows, channels, wide)
                GATE_BACKWARD[head_size](y, blocks_for(rows, channels, _NORM_TILE), THREADS, *values)

        def sums(tile: int, grid: Size, places: Sequence[Any]) -> None:
            GATE_SUMS[head_size](y, grid, SUM_THREADS, y, gate, ctx.eps, grad, rows, channels, tile, *places)

        of_parameters = _norm_gradients(of_weight, of_bias, y, rows, channels, sums)
        return grad_y, grad_gate, *of_parameters, None, None


class _AddNorm(Node):
    """(x + delta, layer norm of that), so that the backward adds the residual stream's gradient in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, statistics = _normed(x, delta, weight, bias, eps)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(total)
        # Without delta the sum is the input itself.
        ctx.save_for_backward(x if delta is None else total, statistics, saved_parameter(ctx, "weight", weight, 2))
        ctx.adds = delta is not None
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        of_x, of_delta, of_weight, of_bias, _ = ctx.needs_input_grad
        if grad_normed is None:
            return grad_sum, grad_sum if ctx.adds else None, None, None, None
        total, statistics, weight = ctx.saved_tensors
        total = total.contiguous()
        grad = prepared(grad_normed, "the gradient of add_norm")
        rows, channels = statistics.shape[1], total.shape[-1]
        grad_x = None
        if of_x or of_delta:
            weight = read_parameter(kept_parameter(ctx, "weight", weight), "weight")
            if grad_sum is not None:
                grad_sum = prepared(grad_sum, "the gradient of add_norm's sum")
            grad_x = torch.empty_like(total)
            if rows:
                wide = weight.dtype is torch.float32
                values = (total, statistics, weight, grad, grad_sum, grad_x, channels, wide)
                NORM_BACKWARD[held_vectors(channels)](total, rows, _NORM_THREADS, *values)

        def sums(tile: int, grid: Size, places: Sequence[Any]) -> None:
            NORM_SUMS(total, grid, SUM_THREADS, total, statistics, grad, rows, channels, tile, *places)

        of_parameters = _norm_gradients(of_weight, of_bias, total, rows, channels, sums)
        return grad_x, grad_x if ctx.adds else None, *of_parameters, None


class _SquaredRelu(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = _vectors(x, "x")
        ctx.save_for_backward(x)
        return _squared(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_double_backward()
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        _each_vector(SQUARED_RELU_GRADIENT, x, x, prepared(grad, "the gradient of squared_relu"), grad_x)
        return grad_x


class _SigmoidGatedResidual(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, value: Tensor) -> Tensor:
        x, r = prepared(x, "x"), prepared(r, "r")
        result = _gated(x, r, value)
        # The norms beside this sum keep x and the result in any case; value would be kept for this alone.
        ctx.save_for_backward(x, r, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        refuse_double_backward()
        x, r, result = ctx.saved_tensors
        return grad, *sigmoid_gated_residual_gradients(x, r, result, grad)


_Modulation = Tensor | tuple[Tensor, Tensor] | None
"""As it lies in memory, or hidden and up, whose product it is."""


class _ShiftInputs:
    """The inputs of a token shift, checked."""

    def __init__(
        self, z: Tensor, carry: Tensor | None, maa: Tensor, previous: Tensor | None, children: Tensor | None
    ) -> None:
        self.z, self.maa = prepared(z, "z"), read_parameter(maa, "maa")
        if z.ndim != 3:
            raise RuntimeError(f"z has {z.ndim} dimensions, expected [batch, tokens, channels]")
        batch, tokens, channels = z.shape
        check_channels(channels, batch * tokens)
        mixes = self.mixes = maa.shape[0]
        if mixes not in MIXES:
            raise RuntimeError(f"maa holds {mixes} mixes, expected 1, 2, 5 or 6")
        check_shape(maa, (mixes, channels), "maa")
        self.carry = None
        if carry is not None:
            _require(previous is None, "carry and previous exclude each other here")
            self.carry = prepared(carry, "carry")
            check_shape(carry, (batch, channels), "carry")
        if previous is not None:
            if batch != 1:
                raise RuntimeError(f"a packed row has batch size 1, got {batch}")
            check_shape(previous, (tokens,), "previous")
            _require(children is not None and children.shape == (2, tokens), "children must be [2, tokens]")
            assert children is not None
            for name, tensor, dtype in (("previous", previous, torch.int64), ("children", children, torch.int32)):
                if not (tensor.device == z.device and tensor.dtype is dtype):
                    raise RuntimeError(f"{name} must be {dtype} on z's device")
                if not tensor.is_contiguous():
                    raise RuntimeError(f"{name} must be contiguous")
        self.previous, self.children = previous, children

    def checked(self, modulation: Tensor | None) -> Tensor | None:
        if modulation is None:
            return None
        modulation = prepared(modulation, "modulation")
        check_shape(modulation, (self.mixes, *self.z.shape), "modulation")
        return modulation

    def mixed(self, modulation: _Modulation, places: MixPlaces) -> tuple[Tensor, ...]:
        outputs = places.empty_mixes(self.mixes, self.z)
        batch, tokens, channels = self.z.shape
        rows = batch * tokens
        if rows:
            sizes = (len(outputs), rows, tokens, channels, self.maa.dtype is torch.float32)
            in_memory = None if isinstance(modulation, tuple) else modulation
            shift = (self.z, self.carry, self.maa, in_memory, self.previous, *sizes)
            vectors = [(channels + room) // VECTOR for room in places.rooms]
            of_outputs = (*_all_mixes(outputs), *vectors)
            if isinstance(modulation, tuple):
                grid, chunk = _modulated_places(rows, channels, _FORWARD_TILES)
                kernel = MODULATED_FORWARD[modulation[1].shape[1]]
                kernel(self.z, grid, 32 * _MODULATED_WARPS, *shift, *modulation, *of_outputs, chunk)
            else:
                kernel = SHIFT_FORWARD[len(outputs), modulation is not None]
                kernel(self.z, blocks_for(rows, channels, _SHIFT_TILE), THREADS, *shift, *of_outputs)
        return outputs

    def modulated(self, hidden: Tensor, up: Tensor, places: MixPlaces) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What is mixed, and the modulation [mixes, batch * tokens, channels] if it had to be formed in memory."""
        z = self.z
        if up.ndim != 3:
            raise RuntimeError(f"up has {up.ndim} dimensions, expected [mixes, width, channels]")
        check_shape(up, (self.mixes, up.shape[1], z.shape[2]), "up")
        check_shape(hidden, (*z.shape[:2], up.shape[0] * up.shape[1]), "hidden")
        if not _kernels_modulate(*up.shape[:2]):
            modulation = torch.bmm(_by_mix(hidden, up), up)
            return self.mixed(modulation, places), modulation
        return self.mixed((_aligned(hidden), _aligned(up)), places), None

    def keep(self, ctx: Any) -> None:
        """For `_shift_gradients`, but for what goes among the saved tensors."""
        ctx.shape = self.z.shape
        ctx.previous, ctx.children = self.previous, self.children


def _shift_gradients(
    ctx: Any,
    gradients: Sequence[Tensor | None],
    z: Tensor | None,
    carry: Tensor | None,
    maa: Tensor,
    modulation: _Modulation,
    of_z: bool,
    of_carry: bool,
    of_maa: bool,
    of_modulation: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of z, carry, maa and modulation; inputs as far as those that are needed need them."""
    grads = [None if grad is None else prepared(grad, "the gradient of shift_mix") for grad in gradients]
    batch, tokens, channels = ctx.shape
    rows, mixes = batch * tokens, len(grads)
    in_memory = None if isinstance(modulation, tuple) else modulation
    shift = (z, carry, maa, in_memory, ctx.previous, mixes, rows, tokens, channels, maa.dtype is torch.float32)
    grad_z = grad_carry = grad_maa = grad_modulation = None
    if of_z or of_carry or of_modulation:
        grad_z = maa.new_empty(ctx.shape, dtype=torch.bfloat16)
        grad_carry = maa.new_empty(batch, channels, dtype=torch.bfloat16) if of_carry else None
        if of_modulation:
            grad_modulation = maa.new_empty(mixes, *ctx.shape, dtype=torch.bfloat16)
        if rows:
            of_all = (*_all_mixes(grads), ctx.children, grad_z, grad_carry, grad_modulation)
            if isinstance(modulation, tuple):
                grid, chunk = _modulated_places(rows, channels, _BACKWARD_TILES)
                kernel = MODULATED_BACKWARD[modulation[1].shape[1]]
                kernel(maa, grid, 32 * _MODULATED_WARPS, *shift, *modulation, *of_all, chunk)
            else:
                kernel = SHIFT_BACKWARD[mixes, modulation is not None]
                kernel(maa, blocks_for(rows, channels, _SHIFT_TILE), THREADS, *shift, *of_all)
    if of_maa:
        tile = sum_tile(rows, channels)
        sums = maa.new_empty(-(-rows // tile), mixes, channels, dtype=torch.float32)
        if rows:
            grid = sum_grid(rows, channels, tile)
            MAA_SUMS[mixes](maa, grid, SUM_THREADS, *shift, *_all_mixes(grads), tile, sums)
        grad_maa = total_of_tiles(sums)
    return grad_z, grad_carry, grad_maa, grad_modulation


def _kernels_modulate(mixes: int, width: int) -> bool:
    """Whether kernels compute a modulation where they use it."""
    return mixes == MODULATED_MIXES and width in MODULATION_WIDTHS


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _modulated_places(rows: int, channels: int, tiles: int) -> tuple[Size, int]:
    """A grid for the kernels that compute the modulation, and how many rows a warp of it has.

    Args:
        tiles: of 8 rows, that a warp has at a time.
    """
    groups, rows_at_once = -(-channels // _MODULATED_CHANNELS), 8 * tiles
    turns = rows * groups // (_MODULATED_WARPS * rows_at_once * _MODULATED_BLOCKS_WANTED)
    fewest = -(-rows // (_MODULATED_WARPS * rows_at_once * _MOST_BLOCKS_DOWN))
    chunk = rows_at_once * max(min(turns, _MOST_MODULATED_TILES), fewest)
    return (groups, -(-rows // (_MODULATED_WARPS * chunk))), chunk


def _used_up(up: Tensor, narrow: Callable[[], Tensor] | None) -> Tensor:
    return prepared_parameter(up, "up") if narrow is None else prepared(narrow(), "up")


def _by_mix(hidden: Tensor, up: Tensor) -> Tensor:
    """hidden [batch, tokens, mixes * width] as [mixes, tokens of all, width]."""
    return hidden.view(-1, up.shape[0], up.shape[1]).transpose(0, 1)


def _all_mixes(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return (*tensors, *(None,) * (MOST_MIXES - len(tensors)))


def _gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    weight, bias, wide = _read_alike(weight, bias)
    if y.ndim != 4:
        raise RuntimeError(f"y has {y.ndim} dimensions, expected [batch, tokens, heads, head size]")
    batch, tokens, heads, head_size = y.shape
    if head_size not in HEAD_SIZES:
        raise RuntimeError(f"the head size is {head_size}, expected 16, 32, 64 or 128")
    rows, channels = batch * tokens, heads * head_size
    check_channels(channels, rows)
    check_shape(gate, (batch, tokens, channels), "gate")
    check_shape(weight, (channels,), "weight")
    check_shape(bias, (channels,), "bias")
    output = torch.empty_like(gate)
    if rows:
        values = (y, gate, weight, bias, eps, output, rows, channels, wide)
        GATE_FORWARD[head_size](y, blocks_for(rows, channels, _NORM_TILE), THREADS, *values)
    return output


def _normed(
    x_given: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta, its layer norm, and [2, rows]: mean and inverse standard deviation of each row."""
    x = prepared(x_given, "x")
    weight, bias, wide = _read_alike(weight, bias)
    _require(x.ndim > 0, "x has no dimension, expected [..., channels]")
    channels = x.shape[-1]
    if not (0 < channels <= MOST_NORM_CHANNELS):
        raise RuntimeError(f"x has {channels} channels, expected 1 to {MOST_NORM_CHANNELS}")
    rows = x.numel() // channels
    check_channels(channels, rows)
    check_shape(weight, (channels,), "weight")
    check_shape(bias, (channels,), "bias")
    total = None
    if delta is not None:
        delta = prepared(delta, "delta")
        check_shape(delta, x.shape, "delta")
        total = torch.empty_like(x)
    normed, statistics = torch.empty_like(x), x.new_empty(2, rows, dtype=torch.float32)
    if rows:
        values = (x, delta, weight, bias, eps, total, normed, statistics, channels, wide)
        NORM_FORWARD[held_vectors(channels), delta is not None](x, rows, _NORM_THREADS, *values)
    return x_given.detach() if total is None else total, normed, statistics


def _read_alike(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, bool]:
    """A norm's parameters as the kernels read them, and whether both are in fp32."""
    weight, bias = read_parameter(weight, "weight"), read_parameter(bias, "bias")
    if weight.dtype is not bias.dtype:
        weight, bias = weight.float(), bias.float()
    return weight, bias, weight.dtype is torch.float32


def _norm_gradients(
    of_weight: bool,
    of_bias: bool,
    like: Tensor,
    rows: int,
    channels: int,
    launch: Callable[[int, Size, Sequence[Any]], None],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a norm's weight and bias, as far as they are needed.

    Args:
        launch: sums over tiles of rows; takes the rows of a tile, the grid, and the three members of NormSums.
    """
    asked = of_weight + of_bias
    if not asked:
        return None, None
    tile = sum_tile(rows, channels)
    sums = like.new_empty(-(-rows // tile), asked, channels, dtype=torch.float32)
    places = (sums if of_weight else None, sums[:, asked - 1] if of_bias else None, asked * channels)
    if rows:
        launch(tile, sum_grid(rows, channels, tile), places)
    total = total_of_tiles(sums)
    return total[0] if of_weight else None, total[asked - 1] if of_bias else None


def _squared(x: Tensor) -> Tensor:
    output = torch.empty_like(x)
    _each_vector(SQUARED_RELU, x, x, output)
    return output


def _gated(x: Tensor, r: Tensor, value: Tensor) -> Tensor:
    x, r, value = _vectors(x, "x"), prepared(r, "r"), prepared(value, "value")
    check_shape(r, x.shape, "r")
    check_shape(value, x.shape, "value")
    result = torch.empty_like(x)
    _each_vector(GATED_RESIDUAL, x, x, r, value, result)
    return result


def _each_vector(kernel: Kernel, like: Tensor, *tensors: Tensor) -> None:
    count = like.numel()
    if count:
        kernel(like, -(-count // _VALUES_PER_BLOCK), THREADS, count, *tensors)


def _vectors(tensor: Tensor, name: str) -> Tensor:
    tensor = prepared(tensor, name)
    if tensor.numel() % VECTOR:
        raise RuntimeError(f"{name} has {tensor.numel()} values, expected a multiple of {VECTOR}")
    return tensor


def _check_logits(logits: Tensor, targets: Tensor, values: dict[str, Tensor]) -> None:
    _require(
        logits.is_cuda and logits.dtype is torch.bfloat16 and logits.ndim == 2 and logits.is_contiguous(),
        "logits must be a contiguous bfloat16 matrix [rows, vocabulary] on a CUDA device",
    )
    rows, vocabulary = logits.shape
    if vocabulary % VECTOR:
        raise RuntimeError(f"the vocabulary has {vocabulary} entries, expected a multiple of {VECTOR}")
    _require(
        targets.dtype is torch.int64 and targets.is_contiguous() and targets.device == logits.device,
        "targets must be contiguous int64 on the logits' device",
    )
    check_shape(targets, (rows,), "targets")
    for name, tensor in values.items():
        dtype = torch.int32 if name == "argmax" else torch.float32
        if tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.device != logits.device:
            raise RuntimeError(f"{name} must be contiguous {dtype} on the logits' device")
        check_shape(tensor, (rows,), name)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)
