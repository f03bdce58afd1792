"""What stands around RWKV-7's recurrence: the keys it removes and stores, the values it takes, and its readout.

Each function has one definition in plain torch (`*_torch`): the path for CPU and for other dtypes than bf16, and what
the tests hold the kernels against. On a GPU and in bf16 it is one kernel forward and one backward
(`delta_rule_cuda`), in fp32 inside; gradients of parameters have a kernel of their own, which runs when they are asked
for. Parameters may be stored wider than bf16: they are used rounded to it, and their gradients are summed in fp32, in a
fixed order, and not rounded before they reach a wider parameter.

What is saved for backward: removal_and_replacement k and rate, value_residual its result instead of v,
group_norm_bonus_gate its inputs; parameters as they are.

Shape legend: B batch, T tokens, H heads, N head size, A = H * N attention channels.

Source: RWKV-7, arXiv 2503.14456, section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from src.ops import delta_rule_cuda

_SMALLEST_NORM = 1e-12


def removal_and_replacement(
    k: Tensor, rate: Tensor, key_scale: Tensor, rate_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator makes of keys: what is stored, what is read to be removed, where that is written.

    With κ = k key_scale divided by each head's norm (at least 1e-12) and s = sigmoid(rate): k (1 + (s - 1) rate_scale),
    -κ and κ s.

    Args:
        k: [B, T, H, N].
        rate: as k, the in-context learning rate before its sigmoid.
        key_scale, rate_scale: H * N values each, called k_k and k_a in models.

    Returns:
        The operator's k, a and b, as k. The norm is fp32 at least.
    """
    if delta_rule_cuda.can_take(k, rate):
        return delta_rule_cuda.removal_and_replacement(k, rate, key_scale, rate_scale)
    return removal_and_replacement_torch(k, rate, key_scale, rate_scale)


def removal_and_replacement_torch(
    k: Tensor, rate: Tensor, key_scale: Tensor, rate_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Definition of `removal_and_replacement`."""
    dtype = k.dtype
    wide = torch.promote_types(dtype, torch.float32)
    removal = F.normalize((k * key_scale.to(dtype).view(k.shape[2:])).to(wide), dim=-1, eps=_SMALLEST_NORM).to(dtype)
    rate = torch.sigmoid(rate)
    replacement = k * (1 + (rate - 1) * rate_scale.to(dtype).view(k.shape[2:]))
    return replacement, -removal, removal * rate


def value_residual(v: Tensor, first: Tensor, amount: Tensor) -> Tensor:
    """v + (first - v) sigmoid(amount), [B, T, A] each: values pulled towards those of the first layer.

    Fused, the gradient of amount comes from the result, which is kept in any case, instead of v: with s =
    sigmoid(amount), (first - v) (1 - s) is first - result. That holds the rounding of the result, which is small
    beside the difference unless s is near 1, where there is hardly a gradient. Measured on real models in bf16: it is
    0.2 to 0.4 % off (a model whose s reach 1: 4 to 10 %), those of other parameters change by less than 0.1 %.
    """
    if delta_rule_cuda.can_take(v, first, amount):
        return delta_rule_cuda.value_residual(v, first, amount)
    return value_residual_torch(v, first, amount)


def value_residual_torch(v: Tensor, first: Tensor, amount: Tensor) -> Tensor:
    """Definition of `value_residual`."""
    return v + (first - v) * torch.sigmoid(amount)


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
    """(GroupNorm over each head's N channels of y + (sum over the head of r k bonus) v) * gate.

    Args:
        y: [B, T, H, N], the operator's output.
        r, k, v: as y: receptance, replacement key and value, as the operator took them.
        gate: [B, T, A].
        bonus: [H, N], called r_k in models.
        weight, bias: [A].
        eps: added to the variance.

    Returns:
        [B, T, A] in y's dtype.
    """
    if delta_rule_cuda.can_take(y, r, k, v, gate):
        return delta_rule_cuda.group_norm_bonus_gate(y, r, k, v, gate, bonus, weight, bias, eps)
    return group_norm_bonus_gate_torch(y, r, k, v, gate, bonus, weight, bias, eps)


def group_norm_bonus_gate_torch(
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
    """Definition of `group_norm_bonus_gate`."""
    batch, tokens, heads, head_size = y.shape
    rows = y.reshape(batch * tokens, heads * head_size)
    normalised = F.group_norm(rows, heads, weight.to(y.dtype), bias.to(y.dtype), eps).view(y.shape)
    own = (r * k * bonus.to(y.dtype)).sum(-1, keepdim=True) * v
    return (normalised + own).view(gate.shape) * gate
