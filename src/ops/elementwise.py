"""The element-wise parts of a layer: token shift and mix, group norm and gate, activations.

Written in plain torch these functions are the definition, and the path for CPU, for other dtypes than bf16 and
for trainable weights.

Shape legend: B batch, T tokens, C channels, A attention channels, H heads, N head size, G mixes of one z.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted_tokens(z: Tensor, carry: Tensor | None, previous: Tensor | None) -> Tensor:
    """The token before each token.

    Args:
        z: [B, T, C].
        carry: [B, C], what stands before the first token of each row; with `previous` [R, C], a row for each of
            the R entries of `previous` that are -1, in order. None is zero.
        previous: int64 [T], position of the token before each token, -1 where there is none; needs B == 1.
            None is t - 1.

    Returns:
        [B, T, C] in z's dtype.
    """
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


def shift_mix(
    z: Tensor, carry: Tensor | None, maa: Tensor, modulation: Tensor | None, previous: Tensor | None
) -> Tensor:
    """Mixes each token with the one before it, in G proportions: z + (shifted - z) * (maa_g + modulation_g).

    Args:
        z: [B, T, C], the normalised input.
        carry: what stands before the first token, see `shifted_tokens`.
        maa: [G, C].
        modulation: [G, B, T, C], data-dependent part of the proportions; None is zero.
        previous: int64 [T], see `shifted_tokens`.

    Returns:
        [G, B, T, C] in z's dtype.

    Source: Eagle and Finch, arXiv 2404.05892, section 4.2 (ddlerp).
    """
    delta = shifted_tokens(z, carry, previous) - z
    proportion = maa.to(z.dtype)[:, None, None, :]
    if modulation is not None:
        proportion = proportion + modulation
    return z + delta * proportion


def group_norm_silu_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm over each head's N channels, times silu(gate).

    Args:
        y: [B, T, H, N], the operator's output.
        gate: [B, T, A] with A = H * N.
        weight, bias: [A].
        eps: added to the variance.

    Returns:
        [B, T, A] in y's dtype.
    """
    batch, tokens, heads, head_size = y.shape
    rows = y.reshape(batch * tokens, heads * head_size)
    normalised = F.group_norm(rows, heads, weight.to(y.dtype), bias.to(y.dtype), eps)
    return normalised.view(batch, tokens, heads * head_size) * F.silu(gate)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, any shape."""
    return F.relu(x).square()


def sigmoid_gated_residual(x: Tensor, r: Tensor, value: Tensor) -> Tensor:
    """x + sigmoid(r) * value, equal shapes: the channel mix' output added to the residual stream."""
    return x + torch.sigmoid(r) * value
