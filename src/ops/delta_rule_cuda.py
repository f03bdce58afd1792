"""The operators around RWKV-7's recurrence on NVIDIA GPUs: memory and autograd around `cuda/elementwise_delta_rule.cu`.

Functions as in `src.ops.delta_rule`, in bfloat16. A gradient that is not needed costs nothing. Tensors that do not fit
raise RuntimeError, naming the argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from src.ops.kernels import Kernel, usable
from src.ops.node import Node
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
    records,
    refuse_double_backward,
    saved_parameter,
    sum_grid,
    sum_tile,
)
from src.ops.totals import TOTALS, total_of_tiles

_ROW_TILE = 2
_VECTORS_PER_BLOCK = 2 * THREADS


def _kernel(name: str, parameters: str, head_size: int = 0) -> Kernel:
    template = f"<{head_size // VECTOR}>" if head_size else ""
    return Kernel("elementwise_delta_rule.cu", f"elementwise::{name}{template}", parameters)


KEYS_FORWARD, KEYS_BACKWARD, KEYS_SUMS, READOUT_FORWARD, READOUT_BACKWARD, READOUT_SUMS = (
    {size: _kernel(name, parameters, size) for size in HEAD_SIZES}
    for name, parameters in (
        ("removal_and_replacement_forward", "PPPP PPP PPPP ii"),
        ("removal_and_replacement_backward", "PPPP PPP PP PPPPPPP ii"),
        ("removal_and_replacement_sums", "PPP PPP PP iiii"),
        ("group_norm_bonus_gate_forward", "PPPPP PPP f P ii"),
        ("group_norm_bonus_gate_backward", "PPPPP PPP f P PPPPP ii"),
        ("group_norm_bonus_gate_sums", "PPPPP f P PPP iiii"),
    )
)
VALUES_FORWARD = _kernel("value_residual_forward", "PPP P i")
VALUES_BACKWARD = _kernel("value_residual_backward", "PPP P PPP i")
MAPS_FORWARD = _kernel("small_maps_forward", "PP iiii")
MAPS_BACKWARD = _kernel("small_maps_backward", "PPPP iii")

KERNELS = (
    *(*KEYS_FORWARD.values(), *KEYS_BACKWARD.values(), *KEYS_SUMS.values()),
    *(*READOUT_FORWARD.values(), *READOUT_BACKWARD.values(), *READOUT_SUMS.values()),
    *(VALUES_FORWARD, VALUES_BACKWARD, MAPS_FORWARD, MAPS_BACKWARD),
)


def layer_kernels(head_size: int, *, sums: bool) -> tuple[Kernel, ...]:
    """The kernels that layers launch, forward and backward; `sums`: parameters of these operators are trained, too."""
    whatever = VALUES_FORWARD, VALUES_BACKWARD, MAPS_FORWARD, MAPS_BACKWARD
    if head_size not in HEAD_SIZES:
        return whatever
    passes, parameters = (KEYS_FORWARD, KEYS_BACKWARD, READOUT_FORWARD, READOUT_BACKWARD), (KEYS_SUMS, READOUT_SUMS)
    tables = (*passes, *parameters) if sums else passes
    return *(table[head_size] for table in tables), *([TOTALS] if sums else []), *whatever


def can_take(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these, [B, T, H, N] or [B, T, A]."""
    first = tensors[0]
    if not all(tensor.is_cuda and tensor.dtype is torch.bfloat16 for tensor in tensors) or first.shape[-1] % VECTOR:
        return False
    head_size = first.shape[3] if first.dim() == 4 else 0
    if head_size and head_size not in HEAD_SIZES:
        return False
    probe = layer_kernels(head_size, sums=False)
    return usable(probe, first.device, "Plain torch operations are used instead, and a step takes longer.")


def removal_and_replacement(
    k: Tensor, rate: Tensor, key_scale: Tensor, rate_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `delta_rule.removal_and_replacement`."""
    run: Any = _RemovalAndReplacement.apply if records(k, rate, key_scale, rate_scale) else keys_and_values
    replacement, removal, written, *_ = run(k, rate, key_scale, rate_scale)
    return replacement, removal, written


def value_residual(v: Tensor, first: Tensor, amount: Tensor) -> Tensor:
    """See `delta_rule.value_residual`."""
    run: Any = _ValueResidual.apply if records(v, first, amount) else _values
    result: Tensor = run(v, first, amount)
    return result


def group_norm_bonus_gate(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    bonus: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """See `delta_rule.group_norm_bonus_gate`."""
    run: Any = _GroupNormBonusGate.apply if records(y, r, k, v, gate, bonus, weight, bias) else readout
    output: Tensor = run(y, r, k, v, gate, bonus, weight, bias, eps)
    return output


class _RemovalAndReplacement(Node):
    @staticmethod
    def forward(ctx: Any, k: Tensor, rate: Tensor, key_scale: Tensor, rate_scale: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        k, rate = prepared(k, "k"), prepared(rate, "rate")
        saved = saved_parameter(ctx, "key_scale", key_scale, 2), saved_parameter(ctx, "rate_scale", rate_scale, 3)
        ctx.save_for_backward(k, rate, *saved)
        ctx.shapes = key_scale.shape, rate_scale.shape
        return keys_and_values(k, rate, key_scale, rate_scale)[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if all(grad is None for grad in grads):
            return (None,) * 4
        k, rate, key_scale, rate_scale = ctx.saved_tensors
        of_k, of_rate, *of_parameters = ctx.needs_input_grad
        arrived = [arrived_gradient(grad, k, "the gradient of removal_and_replacement") for grad in grads]
        scales = kept_parameter(ctx, "key_scale", key_scale), kept_parameter(ctx, "rate_scale", rate_scale)
        grad_k, grad_rate = _empty_like(k, of_k), _empty_like(rate, of_rate)
        if of_k or of_rate:
            keys_and_values_gradients(k, rate, *scales, arrived, grad_k, grad_rate)
        return grad_k, grad_rate, *keys_sums(k, rate, scales[0], arrived, of_parameters, ctx.shapes)


class _ValueResidual(Node):
    @staticmethod
    def forward(ctx: Any, v: Tensor, first: Tensor, amount: Tensor) -> Tensor:
        first, amount = prepared(first, "first"), prepared(amount, "amount")
        result = _values(v, first, amount)
        ctx.save_for_backward(first, amount, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        first, amount, result = ctx.saved_tensors
        grads = tuple(_empty_like(amount, asked) for asked in ctx.needs_input_grad)
        gradient = arrived_gradient(grad, first, "the gradient of value_residual")
        _over_vectors(VALUES_BACKWARD, first, first, amount, result, gradient, *grads)
        return grads


class _GroupNormBonusGate(Node):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        bonus: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        y, r, k, v = prepared(y, "y"), prepared(r, "r"), prepared(k, "k"), prepared(v, "v")
        gate = prepared(gate, "gate")
        parameters = {"bonus": bonus, "weight": weight, "bias": bias}
        saved = (saved_parameter(ctx, name, value, 5 + i) for i, (name, value) in enumerate(parameters.items()))
        ctx.save_for_backward(y, r, k, v, gate, *saved)
        ctx.eps = eps
        ctx.shapes = bonus.shape, weight.shape, bias.shape
        return readout(y, r, k, v, gate, bonus, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        *inputs, bonus, weight, bias = ctx.saved_tensors
        gradient = arrived_gradient(grad, inputs[4], "the gradient of group_norm_bonus_gate")
        asked, of_parameters = ctx.needs_input_grad[:5], ctx.needs_input_grad[5:8]
        grads: Sequence[Tensor | None] = (None,) * 5
        if any(asked):
            grads = [_empty_like(tensor, wanted) for tensor, wanted in zip(inputs, asked, strict=True)]
            saved = {"bonus": bonus, "weight": weight, "bias": bias}
            parameters = [kept_parameter(ctx, name, value) for name, value in saved.items()]
            readout_gradients(inputs, parameters, ctx.eps, gradient, grads)
        return *grads, *readout_sums(inputs, ctx.eps, gradient, of_parameters, ctx.shapes), None


def keys_and_values(
    k: Tensor,
    rate: Tensor,
    key_scale: Tensor,
    rate_scale: Tensor,
    v: Tensor | None = None,
    first: Tensor | None = None,
    amount: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Results of `removal_and_replacement`, and with `first` that of `value_residual`; outside autograd, one launch.

    Args:
        k, rate, key_scale, rate_scale: as for `removal_and_replacement`.
        v, first, amount: as for `value_residual`, [B, T, H, N]; without `first` v is the fourth result.
    """
    k, rate = prepared(k, "k"), prepared(rate, "rate")
    _check_heads(k, "k", {"rate": rate})
    key_scale, rate_scale = (
        _row(key_scale, k, "key_scale"),
        _row(rate_scale, k, "rate_scale"),
    )
    outputs = tuple(torch.empty_like(k) for _ in range(3))
    residual: tuple[Tensor | None, ...] = (None,) * 4
    values = v
    if first is not None:
        assert v is not None
        assert amount is not None
        v, first, amount = prepared(v, "v"), prepared(first, "first"), prepared(amount, "amount")
        _check_heads(k, "k", {"v": v, "first": first, "amount": amount})
        values = torch.empty_like(v)
        residual = v, first, amount, values
    _over_rows(KEYS_FORWARD, k, k, rate, key_scale, rate_scale, *outputs, *residual)
    return outputs if values is None else (*outputs, values)


def keys_and_values_gradients(
    k: Tensor,
    rate: Tensor,
    key_scale: Tensor,
    rate_scale: Tensor,
    arrived: Sequence[Tensor | None],
    grad_k: Tensor | None,
    grad_rate: Tensor | None,
    residual: Sequence[Tensor | None] = (None,) * 7,
) -> None:
    """Writes gradients of `keys_and_values`' inputs, as far as there is a place for them, by one launch.

    Args:
        k, rate, key_scale, rate_scale: what it was called with, k [B, T, H, N].
        arrived: gradients of its first three results, None for zero; places may be theirs, too.
        grad_k, grad_rate: places.
        residual: first, amount, the fourth result, its gradient; places for those of v, first and amount.
    """
    scales = prepared_parameter(key_scale, "key_scale"), prepared_parameter(rate_scale, "rate_scale")
    _over_rows(KEYS_BACKWARD, k, k, rate, *scales, *arrived, grad_k, grad_rate, *residual)


def keys_sums(
    k: Tensor,
    rate: Tensor,
    key_scale: Tensor,
    arrived: Sequence[Tensor | None],
    asked: Sequence[bool],
    shapes: Sequence[torch.Size],
) -> list[Tensor | None]:
    """Gradients of `removal_and_replacement`'s parameters as far as they are asked for, of those shapes."""
    if not any(asked):
        return [None] * len(asked)
    values = (k, rate, prepared_parameter(key_scale, "key_scale"), *arrived)
    return _sums(KEYS_SUMS, k, values, asked, shapes)


def activate_maps(hidden: Tensor, gate: Tensor) -> None:
    """What stands between the two matrices of small maps, in place.

    Args:
        hidden: [maps, rows, width]: tanh of the first map's, and 1 in each map's last column.
        gate: [rows, any]: its sigmoid.
    """
    maps, rows, width = hidden.shape
    vectors = rows * (width // VECTOR + maps - 1) + -(-gate.numel() // VECTOR)
    if rows:
        MAPS_FORWARD(hidden, -(-vectors // THREADS), THREADS, hidden, gate, rows, width, maps, gate.numel())


def activate_maps_gradient(hidden: Tensor, grad_hidden: Tensor, gate: Tensor, grad_gate: Tensor) -> None:
    """Gradients before `activate_maps` from those behind, in place.

    Args:
        hidden, grad_hidden: [rows, width], of the first map alone, as it left it.
        gate, grad_gate: as it left it.
    """
    rows, width = hidden.shape
    vectors = rows * (width // VECTOR) + -(-gate.numel() // VECTOR)
    if rows:
        values = (hidden, grad_hidden, gate, grad_gate, rows, width, gate.numel())
        MAPS_BACKWARD(hidden, -(-vectors // THREADS), THREADS, *values)


def _values(v: Tensor, first: Tensor, amount: Tensor) -> Tensor:
    v, first, amount = prepared(v, "v"), prepared(first, "first"), prepared(amount, "amount")
    check_channels(v.shape[-1], v.numel() // max(v.shape[-1], 1))
    check_shape(first, v.shape, "first")
    check_shape(amount, v.shape, "amount")
    result = torch.empty_like(v)
    _over_vectors(VALUES_FORWARD, v, v, first, amount, result)
    return result


def readout(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    bonus: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """`group_norm_bonus_gate` outside autograd."""
    y, r, k, v = prepared(y, "y"), prepared(r, "r"), prepared(k, "k"), prepared(v, "v")
    gate = prepared(gate, "gate")
    _check_heads(y, "y", {"r": r, "k": k, "v": v})
    check_shape(gate, (*y.shape[:2], y.shape[2] * y.shape[3]), "gate")
    parameters = _row(bonus, y, "bonus"), _row(weight, y, "weight"), _row(bias, y, "bias")
    output = torch.empty_like(gate)
    _over_rows(READOUT_FORWARD, y, y, r, k, v, gate, *parameters, eps, output)
    return output


def readout_gradients(
    inputs: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    eps: float,
    gradient: Tensor | None,
    grads: Sequence[Tensor | None],
) -> None:
    """Writes gradients of `group_norm_bonus_gate`'s inputs, as far as there is a place for them.

    Args:
        inputs: y, r, k, v, gate; r, k and v may be None where y's alone is asked for.
        parameters: bonus, weight, bias.
        eps: as there.
        gradient: that of the result.
        grads: places, as `inputs`.
    """
    names = ("bonus", "weight", "bias")
    rows = (prepared_parameter(value, name) for value, name in zip(parameters, names, strict=True))
    y = inputs[0]
    assert y is not None
    _over_rows(READOUT_BACKWARD, y, *inputs, *rows, eps, gradient, *grads)


def readout_sums(
    inputs: Sequence[Tensor | None],
    eps: float,
    gradient: Tensor | None,
    asked: Sequence[bool],
    shapes: Sequence[torch.Size],
) -> list[Tensor | None]:
    """Gradients of `group_norm_bonus_gate`'s parameters as far as they are asked for, of those shapes."""
    y = inputs[0]
    assert y is not None
    return _sums(READOUT_SUMS, y, (*inputs, eps, gradient), asked, shapes)


def _check_heads(like: Tensor, name: str, others: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError where tensors are not [B, T, H, N] with a head size that there are kernels for."""
    if like.ndim != 4:
        raise RuntimeError(f"{name} has {like.ndim} dimensions, expected [batch, tokens, heads, head size]")
    if like.shape[3] not in HEAD_SIZES:
        raise RuntimeError(f"the head size is {like.shape[3]}, expected 16, 32, 64 or 128")
    rows, channels = _sizes(like)
    check_channels(channels, rows)
    for other, tensor in others.items():
        check_shape(tensor, like.shape, other)


def _row(parameter: Tensor, like: Tensor, name: str) -> Tensor:
    """A parameter as the kernels read it, a value for each channel."""
    _, channels = _sizes(like)
    if parameter.numel() != channels:
        raise RuntimeError(f"{name} has {parameter.numel()} values, expected {channels}")
    return prepared_parameter(parameter, name)


def arrived_gradient(grad: Tensor | None, like: Tensor, name: str) -> Tensor | None:
    """A gradient as the kernels read it, shaped as `like`."""
    if grad is None:
        return None
    grad = prepared(grad, name)
    check_shape(grad, like.shape, name)
    return grad


def _empty_like(tensor: Tensor, asked: bool) -> Tensor | None:
    return torch.empty_like(tensor) if asked else None


def _over_rows(kernels: Mapping[int, Kernel], like: Tensor, *arguments: Any) -> None:
    """Runs what works on tiles of rows of [B, T, H, N]."""
    rows, channels = _sizes(like)
    if rows:
        kernels[like.shape[3]](like, blocks_for(rows, channels, _ROW_TILE), THREADS, *arguments, rows, channels)


def _over_vectors(kernel: Kernel, like: Tensor, *arguments: Any) -> None:
    vectors = like.numel() // VECTOR
    if vectors:
        kernel(like, -(-vectors // _VECTORS_PER_BLOCK), THREADS, *arguments, vectors)


def _sums(
    kernels: Mapping[int, Kernel],
    like: Tensor,
    arguments: Sequence[Any],
    asked: Sequence[bool],
    shapes: Sequence[torch.Size],
) -> list[Tensor | None]:
    """Gradients of parameters, as far as they are asked for: sums over tiles of rows, and of those."""
    if not any(asked):
        return [None] * len(asked)
    rows, channels = _sizes(like)
    tile, count = sum_tile(rows, channels), sum(asked)
    sums = like.new_empty(-(-rows // tile), count, channels, dtype=torch.float32)
    if rows:
        places = iter(sums.unbind(1))
        targets = [next(places) if wanted else None for wanted in asked]
        values = (*arguments, *targets, count * channels, tile, rows, channels)
        kernels[like.shape[3]](like, sum_grid(rows, channels, tile), SUM_THREADS, *values)
    totals = iter(total_of_tiles(sums))
    return [next(totals).view(shape) if wanted else None for wanted, shape in zip(asked, shapes, strict=True)]


def _sizes(like: Tensor) -> tuple[int, int]:
    """[B, T, H, N] -> rows, channels."""
    return like.shape[0] * like.shape[1], like.shape[2] * like.shape[3]
