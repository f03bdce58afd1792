"""The WKV6 operator as a readable loop over tokens: its specification, in any float dtype.

Shapes: B batch, T tokens, H heads, N head size, S sequences. The state is [..., H, value, key].

Slow (autograd keeps every state) and as accurate as its dtype: run in float64 it is what every other backend
is compared with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# exp(-exp(60)) is exactly 0 even in float64; without the bound autograd would form inf * 0 = NaN.
W_RAW_LIMIT = 60.0


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence token by token; plain autograd gives every gradient.

    For each head, with decay = exp(-exp(w_raw)), i the value and j the key index:

        y[t, i]     = Σ_j r[t, j] · (S[i, j] + u[j] · k[t, j] · v[t, i])
        S[i, j]    <- decay[t, j] · S[i, j] + k[t, j] · v[t, i]

    Args:
        r: receptance [B, T, H, N], float.
        k: key [B, T, H, N].
        v: value [B, T, H, N].
        w_raw: decay on the checkpoint's scale [B, T, H, N], any value from -inf to +inf.
        u: bonus of the current token, `time_faaaa` [H, N].
        state: start state, one per sequence [B or S, H, N, N].
        lengths: tokens of each packed sequence (then B == 1 and they sum to T); None for a dense batch.

    Returns:
        y [B, T, H, N] in r's dtype, and the final states [B or S, H, N, N] in the accumulation dtype
        (float64 for float64 inputs, else float32).

    Source: Peng et al. 2024, "Eagle and Finch" (arXiv 2404.05892), equations 16 to 19.
    """
    accumulate = torch.float64 if r.dtype == torch.float64 else torch.float32
    if lengths is not None:
        outputs, finals, first = [], [], 0
        for sequence, length in enumerate(lengths):
            rows = slice(first, first + length)
            y, final = wkv6_reference(
                r[:, rows], k[:, rows], v[:, rows], w_raw[:, rows], u, state[sequence : sequence + 1]
            )
            outputs.append(y)
            finals.append(final)
            first += length
        return torch.cat(outputs, dim=1), torch.cat(finals)

    bonus, running = u.to(accumulate), state.to(accumulate)
    decay = torch.exp(-torch.exp(w_raw.to(accumulate).clamp(max=W_RAW_LIMIT)))
    receptance, key, value = r.to(accumulate), k.to(accumulate), v.to(accumulate)
    outputs = []
    for t in range(r.shape[1]):
        outer = value[:, t, :, :, None] * key[:, t, :, None, :]  # [B, H, value, key]
        seen = running + bonus[:, None, :] * outer
        outputs.append((seen @ receptance[:, t, :, :, None]).squeeze(-1))
        running = decay[:, t, :, None, :] * running + outer
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(value)
    return y.to(r.dtype), running
