"""The element-wise parts of a layer: residual sum and norm, token shift and mix, group norm and gate, activations.

Each function has one definition in plain torch (`*_torch`): the path for CPU and for other dtypes than bf16, and
what the tests hold the kernels against. On a GPU and in bf16 the same formula runs as one kernel forward and one
backward (`cuda/elementwise.cu`), in fp32 inside; gradients of parameters (maa, up, weight, bias) have a kernel of
their own, which runs when they are asked for. Parameters may be stored wider than bf16: they are used rounded to it,
and their gradients are summed in fp32 and not rounded before they reach a wider parameter.

What is saved for backward: add_norm the sum and its statistics, shift_mixes z and modulation (without modulation
nothing, or z where maa is trained), modulated_shift_mixes z and hidden (where it keeps modulation, which it does only
for a K without kernels, that, and hidden only where up is trained), group_norm_silu_gate y and gate, squared_relu x,
sigmoid_gated_residual x, r and its result; beside z its carry, and trained parameters as they are.

Shape legend: B batch, T tokens, C channels, A attention channels, H heads, N head size, G mixes of one z.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.ops import elementwise_cuda
from src.ops.kernels import usable
from src.ops.products import ANYWHERE, MixPlaces, Places
from src.ops.rows import HEAD_SIZES

_VECTOR = 8


@functools.cache
def fused_kernels() -> Any | None:
    """The operators of `elementwise_cuda`; None, after one warning, where they cannot be had."""
    probe = (elementwise_cuda.SQUARED_RELU, elementwise_cuda.SQUARED_RELU_GRADIENT)
    instead = "Plain torch operations are used instead, and a step takes longer."
    return elementwise_cuda if usable(probe, torch.device("cuda"), instead) else None


def shift_mixes(
    z: Tensor,
    carry: Tensor | None,
    maa: Tensor,
    modulation: Tensor | None,
    previous: Tensor | None,
    *,
    places: MixPlaces = ANYWHERE,
) -> tuple[Tensor, ...]:
    """Mixes each token with the one before it, in G proportions: z + (shifted - z) * (maa_g + modulation_g).

    Args:
        z: [B, T, C], the normalised input.
        carry: [B, C], what stands before the first token of each row; with `previous` [R, C], a row for each of
            the R entries of `previous` that are -1, in order. None is zero.
        maa: [G, C].
        modulation: [G, B, T, C], data-dependent part of the proportions; None is zero.
        previous: int64 [T], position of the token before each token, -1 where there is none; needs B == 1. None
            is t - 1. Not to be changed in place after its first use.
        places: where results lie, where this is fused.

    Returns:
        G tensors [B, T, C] in z's dtype.

    Source: Eagle and Finch, arXiv 2404.05892, section 4.2 (ddlerp).
    """
    if (kernels := _shift_kernels(z, carry, maa, previous)) is not None:
        children = None if previous is None else _children(previous)
        if carry is not None:
            carry = carry.to(z.dtype)
        return tuple(kernels.shift_mixes(z, carry, maa, modulation, previous, children, places))
    return shift_mixes_torch(z, carry, maa, modulation, previous)


def shift_mixes_torch(
    z: Tensor, carry: Tensor | None, maa: Tensor, modulation: Tensor | None, previous: Tensor | None
) -> tuple[Tensor, ...]:
    """Definition of `shift_mixes`."""
    delta = shifted_tokens(z, carry, previous) - z
    proportion = maa.to(z.dtype)[:, None, None, :]
    if modulation is not None:
        proportion = proportion + modulation
    return (z + delta * proportion).unbind(0)


def modulated_shift_mixes(
    z: Tensor,
    carry: Tensor | None,
    maa: Tensor,
    hidden: Tensor,
    up: Tensor,
    previous: Tensor | None,
    *,
    places: MixPlaces = ANYWHERE,
    keeps_modulation: bool = False,
    narrow_up: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """`shift_mixes` with modulation_g = hidden_g @ up_g.

    Args:
        z, carry, maa, previous, places: as for `shift_mixes`.
        hidden: [B, T, G * K], the K values of each mix side by side.
        up: [G, K, C].
        keeps_modulation: where this is fused, but the kernels do not take K and so compute the modulation where they
            use it, keeps G times the memory of z for the backward pass, which forms it again otherwise.
        narrow_up: gives up in z's dtype, outside autograd, to be used at once; None casts it.

    Returns:
        G tensors [B, T, C] in z's dtype.
    """
    if hidden.dtype is z.dtype and (kernels := _shift_kernels(z, carry, maa, previous)) is not None:
        children = None if previous is None else _children(previous)
        if carry is not None:
            carry = carry.to(z.dtype)
        options = (places, keeps_modulation, narrow_up)
        return tuple(kernels.modulated_shift_mixes(z, carry, maa, hidden, up, previous, children, *options))
    batch, tokens, _ = z.shape
    by_mix = hidden.view(batch * tokens, up.shape[0], up.shape[1]).transpose(0, 1)
    modulation = torch.bmm(by_mix, up.to(z.dtype)).view(-1, *z.shape)
    return shift_mixes(z, carry, maa, modulation, previous)


def shifted_tokens(z: Tensor, carry: Tensor | None, previous: Tensor | None) -> Tensor:
    """The token before each token, [B, T, C] in z's dtype; arguments as in `shift_mixes`."""
    if previous is None:
        first = torch.zeros_like(z[:, 0]) if carry is None else carry.to(z.dtype)
        return torch.cat((first.unsqueeze(1), z[:, :-1]), dim=1)
    starts = previous < 0
    shifted = z[0].index_select(0, previous.clamp(min=0))
    if carry is None:
        at_starts = torch.zeros_like(shifted)
    else:
        row = (starts.cumsum(0) - 1).clamp(min=0)
        at_starts = carry.to(z.dtype).index_select(0, row)
    return torch.where(starts.unsqueeze(1), at_starts, shifted).unsqueeze(0)


def continuations(previous: Tensor) -> Tensor:
    """The inverse of `previous`: which tokens continue each token, as linked lists.

    Args:
        previous: int64 [T], see `shift_mixes`.

    Returns:
        int32 [2, T]: row 0 the first token that continues t, row 1 the next token after t that continues the same
        one as t does; -1 ends a list. No transfer to the host.
    """
    tokens = previous.shape[0]
    ordered, order = torch.sort(previous, stable=True)
    same_as_before = torch.zeros_like(ordered, dtype=torch.bool)
    torch.eq(ordered[1:], ordered[:-1], out=same_as_before[1:])
    lists = torch.full((2, tokens + 1), -1, dtype=torch.int32, device=previous.device)
    order32 = order.to(torch.int32)
    # Column T takes what has no place: entries that do not open a list, and starts of segments.
    opened = torch.where(same_as_before | (ordered < 0), tokens, ordered)
    lists[0].scatter_(0, opened, order32)
    lists[1].scatter_(0, order[:-1], torch.where(same_as_before[1:] & (ordered[1:] >= 0), order32[1:], -1))
    return lists[:, :tokens].contiguous()


_last_continuations: tuple[weakref.ref[Tensor], Tensor] | None = None


def _children(previous: Tensor) -> Tensor:
    """`continuations` of the layout in use, made once for all layers of a step."""
    global _last_continuations
    if _last_continuations is None or _last_continuations[0]() is not previous:
        _last_continuations = (weakref.ref(previous), continuations(previous))
    return _last_continuations[1]


def group_norm_silu_gate(
    y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, *, places: Places | None = None
) -> Tensor:
    """GroupNorm over each head's N channels, times silu(gate).

    Args:
        y: [B, T, H, N], the operator's output.
        gate: [B, T, A] with A = H * N.
        weight, bias: [A].
        eps: added to the variance.
        places: whose fourth the gate's gradient takes, where this is fused.

    Returns:
        [B, T, A] in y's dtype.
    """
    if y.shape[3] in HEAD_SIZES and (kernels := _kernels_for(y, gate)) is not None:
        fused: Tensor = kernels.group_norm_silu_gate(y, gate, weight, bias, eps, places)
        return fused
    return group_norm_silu_gate_torch(y, gate, weight, bias, eps)


def group_norm_silu_gate_torch(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Definition of `group_norm_silu_gate`."""
    batch, tokens, heads, head_size = y.shape
    rows = y.reshape(batch * tokens, heads * head_size)
    normalised = F.group_norm(rows, heads, weight.to(y.dtype), bias.to(y.dtype), eps)
    return normalised.view(batch, tokens, heads * head_size) * F.silu(gate)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream with something added, and its layer norm.

    Args:
        x: [..., C].
        delta: what is added, as x; None adds nothing.
        weight, bias: [C].
        eps: added to the variance.

    Returns:
        (x + delta, layer norm of that over C), both as x.
    """
    kernels = _kernels_for(x) if delta is None else _kernels_for(x, delta)
    if kernels is not None and x.shape[-1] <= elementwise_cuda.MOST_NORM_CHANNELS:
        total, normed = kernels.add_norm(x, delta, weight, bias, eps)
        return total, normed
    return add_norm_torch(x, delta, weight, bias, eps)


def add_norm_torch(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Definition of `add_norm`."""
    total = x if delta is None else x + delta
    return total, F.layer_norm(total, total.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, any shape."""
    if (kernels := _kernels_for(x)) is not None:
        fused: Tensor = kernels.squared_relu(x)
        return fused
    return squared_relu_torch(x)


def squared_relu_torch(x: Tensor) -> Tensor:
    """Definition of `squared_relu`."""
    return F.relu(x).square()


def squared_relu_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x from that of `squared_relu(x)`, in the latter's memory; for callers outside autograd."""
    if (kernels := _kernels_for(x, grad)) is not None:
        kernels.squared_relu_gradient(x, grad)
        return grad
    return squared_relu_gradient_torch(x, grad)


def squared_relu_gradient_torch(x: Tensor, grad: Tensor) -> Tensor:
    """Definition of `squared_relu_gradient`."""
    return grad.mul_(2 * F.relu(x))


def squared_relu_and_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """`squared_relu(x)` and what `squared_relu_gradient` gives; both arguments' memory is used up."""
    if (kernels := _kernels_for(x, grad)) is not None:
        fused: tuple[Tensor, Tensor] = kernels.squared_relu_and_gradient(x, grad)
        return fused
    return squared_relu_and_gradient_torch(x, grad)


def squared_relu_and_gradient_torch(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Definition of `squared_relu_and_gradient`."""
    grad = squared_relu_gradient_torch(x, grad)
    return F.relu_(x).square_(), grad


def sigmoid_gated_residual(x: Tensor, r: Tensor, value: Tensor) -> Tensor:
    """x + sigmoid(r) * value, equal shapes: the channel mix' output added to the residual stream."""
    if (kernels := _kernels_for(x, r, value)) is not None:
        fused: Tensor = kernels.sigmoid_gated_residual(x, r, value)
        return fused
    return sigmoid_gated_residual_torch(x, r, value)


def sigmoid_gated_residual_torch(x: Tensor, r: Tensor, value: Tensor) -> Tensor:
    """Definition of `sigmoid_gated_residual`."""
    return x + torch.sigmoid(r) * value


def sigmoid_gated_residual_gradients(x: Tensor, r: Tensor, result: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `sigmoid_gated_residual` from its result instead of `value`, for callers outside autograd.

    With s = sigmoid(r) the gradient of r is grad * s (1 - s) value, and s * value is what was added to x: the
    difference of result and x. That difference holds the rounding of result, u |result| for the dtype's unit u. The
    gradient of r has a share of the residual stream's as large as what was added has of the stream, so the error
    is u of the stream's gradient, however little was added: less than rounding the stream does in the forward pass.

    Args:
        x, r: what it was called with.
        result: what it returned.
        grad: gradient of the result.

    Returns:
        The gradients of r and value, as r. That of x is `grad`.
    """
    if (kernels := _kernels_for(x, r, result, grad)) is not None:
        grad_r, grad_value = kernels.sigmoid_gated_residual_gradients(x, r, result, grad)
        return grad_r, grad_value
    return sigmoid_gated_residual_gradients_torch(x, r, result, grad)


def sigmoid_gated_residual_gradients_torch(x: Tensor, r: Tensor, result: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Definition of `sigmoid_gated_residual_gradients`."""
    gate = torch.sigmoid(r)
    return grad * (result - x) * (1 - gate), grad * gate


def _kernels_for(*tensors: Tensor) -> Any | None:
    """The kernels if they can work on these tensors as on rows of whole vectors."""
    for tensor in tensors:
        if not (tensor.is_cuda and tensor.dtype is torch.bfloat16 and tensor.shape[-1] % _VECTOR == 0):
            return None
    return fused_kernels()


def _shift_kernels(z: Tensor, carry: Tensor | None, maa: Tensor, previous: Tensor | None) -> Any | None:
    """The kernels if they can shift and mix these."""
    fit = maa.shape[0] in elementwise_cuda.MIXES and (carry is None or previous is None)
    return _kernels_for(z) if fit else None
