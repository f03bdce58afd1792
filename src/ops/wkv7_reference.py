"""The WKV7 operator as a readable loop over tokens: its specification, in any float dtype.

Shapes: B batch, T tokens, H heads, N head size, S sequences. The state is [..., H, value, key].

Slow (autograd keeps every state) and as accurate as its dtype: run in float64 it is what every other backend
is compared with.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STRONGEST_LOG_DECAY = -math.exp(-0.5)
"""log_decay = this · sigmoid(w_raw): a decay is never below exp(-exp(-1/2)) = 0.5452."""


def wkv7_reference(
    r: Tensor,
    w_raw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence token by token; plain autograd gives every gradient.

    For each head, with decay = exp(-exp(-1/2) · sigmoid(w_raw)), i the value and j, m the key index:

        S[i, j]    <- decay[t, j] · S[i, j] + (Σ_m S[i, m] · a[t, m]) · b[t, j] + v[t, i] · k[t, j]
        y[t, i]     = Σ_j S[i, j] · r[t, j]

    Args:
        r: receptance [B, T, H, N], float.
        w_raw: decay before its sigmoid [B, T, H, N], any value from -inf to +inf.
        k: replacement key [B, T, H, N].
        v: value [B, T, H, N].
        a: what is read of the state before the token, -κ [B, T, H, N].
        b: where the answer is written, κ times the in-context learning rate [B, T, H, N].
        state: start state, one per sequence [B or S, H, N, N].
        lengths: tokens of each packed sequence (then B == 1 and they sum to T); None for a dense batch.

    Returns:
        y [B, T, H, N] in r's dtype, and the final states [B or S, H, N, N] in the accumulation dtype
        (float64 for float64 inputs, else float32).

    Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution" (arXiv 2503.14456), section 4.
    """
    accumulate = torch.float64 if r.dtype == torch.float64 else torch.float32
    if lengths is not None:
        outputs, finals, first = [], [], 0
        for sequence, length in enumerate(lengths):
            rows = slice(first, first + length)
            part = (r[:, rows], w_raw[:, rows], k[:, rows], v[:, rows], a[:, rows], b[:, rows])
            y, final = wkv7_reference(*part, state[sequence : sequence + 1])
            outputs.append(y)
            finals.append(final)
            first += length
        return torch.cat(outputs, dim=1), torch.cat(finals)

    running = state.to(accumulate)
    decay = torch.exp(STRONGEST_LOG_DECAY * torch.sigmoid(w_raw.to(accumulate)))
    # Unbound, not sliced: the backward of each slice would write zeros for all tokens.
    by_token = zip(*(x.to(accumulate).unbind(1) for x in (r, decay, k, v, a, b)), strict=True)
    outputs = []
    for receptance, kept, key, value, read, write in by_token:  # each [B, H, N]
        answer = running @ read[..., None]  # [B, H, value, 1]
        running = running * kept[..., None, :] + answer * write[..., None, :] + value[..., None] * key[..., None, :]
        outputs.append((running @ receptance[..., None]).squeeze(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v, dtype=accumulate)
    return y.to(r.dtype), running
