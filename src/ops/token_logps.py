"""Head, softmax and target log-probability in one, chunk by chunk over tokens.

The logits of all tokens never exist at once: a chunk's logits are formed, reduced to two numbers per token and
dropped; the backward forms them again.

Shape legend: M tokens (rows), C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HeadWeight = Tensor | Callable[[], Tensor]

_CHUNK_ELEMENTS = 1 << 25
"""Logits formed at a time if `chunk_tokens` is not given: 512 tokens of a 65536 vocabulary, 128 MiB in fp32."""


def token_logps(
    hidden: Tensor, head_weight: HeadWeight, targets: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """log p(target) and the largest logit of every row.

    Logits are rounded to hidden's dtype, as a plain linear layer gives them; sums over the vocabulary run in
    fp32 (fp64 for fp64 inputs). The gradient of `max_logit` goes to the one of equal largest logits that
    torch.max names.

    Args:
        hidden: [M, C], bf16, fp32 or fp64.
        head_weight: [V, C] in hidden's dtype; or a function that gives it anew in forward and backward (a
            quantised head), which then gets no gradient.
        targets: int64 [M]; a negative target is not counted: logp 0, max_logit 0, no gradient from that row.
        chunk_tokens: rows whose logits exist at one time; None chooses about 2^25 logits.

    Returns:
        (logp [M], max_logit [M]), fp32, differentiable with respect to hidden, and to head_weight if that
        requires grad.
    """
    assert hidden.ndim == 2, f"hidden has shape {tuple(hidden.shape)}, expected [rows, channels]"
    assert targets.shape == hidden.shape[:1], f"targets have shape {tuple(targets.shape)}, expected [rows]"
    weight = head_weight if isinstance(head_weight, Tensor) else None
    weight_again = None if isinstance(head_weight, Tensor) else head_weight
    logp, max_logit = _TokenLogps.apply(hidden, weight, weight_again, targets, chunk_tokens)
    return logp, max_logit


class _TokenLogps(torch.autograd.Function):
    """Saves hidden, targets, logsumexp and arg-max of each row; recomputes logits chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        weight_again: Callable[[], Tensor] | None,
        targets: Tensor,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor]:
        dense = _dense(weight, weight_again)
        rows = hidden.shape[0]
        chunk = chunk_tokens or max(1, _CHUNK_ELEMENTS // dense.shape[0])
        sum_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp = torch.empty(rows, dtype=sum_dtype, device=hidden.device)
        max_logit = torch.empty_like(logp)
        logsumexp = torch.empty_like(logp)
        argmax = torch.empty(rows, dtype=torch.int64, device=hidden.device)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ dense.t()).to(sum_dtype)
            torch.max(logits, dim=-1, out=(max_logit[part], argmax[part]))
            torch.logsumexp(logits, dim=-1, out=logsumexp[part])
            target_logit = logits.gather(1, targets[part].clamp(min=0).unsqueeze(1)).squeeze(1)
            torch.sub(target_logit, logsumexp[part], out=logp[part])
        uncounted = targets < 0
        logp.masked_fill_(uncounted, 0.0)
        max_logit.masked_fill_(uncounted, 0.0)
        ctx.save_for_backward(hidden, weight, targets, logsumexp, argmax)
        ctx.weight_again = weight_again
        ctx.chunk = chunk
        return logp, max_logit

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor, grad_max_logit: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, logsumexp, argmax = ctx.saved_tensors
        dense = _dense(weight, ctx.weight_again)
        counted = targets >= 0
        grad_logp = torch.where(counted, grad_logp, 0.0)
        grad_max_logit = torch.where(counted, grad_max_logit, 0.0)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = (
            torch.zeros(dense.shape, dtype=logsumexp.dtype, device=dense.device)
            if ctx.needs_input_grad[1]
            else None
        )
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad_logits = (hidden[part] @ dense.t()).to(logsumexp.dtype)
            grad_logits.sub_(logsumexp[part].unsqueeze(1)).exp_().mul_(grad_logp[part].neg().unsqueeze(1))
            grad_logits.scatter_add_(1, targets[part].clamp(min=0).unsqueeze(1), grad_logp[part].unsqueeze(1))
            grad_logits.scatter_add_(1, argmax[part].unsqueeze(1), grad_max_logit[part].unsqueeze(1))
            rounded = grad_logits.to(hidden.dtype)
            del grad_logits
            if grad_hidden is not None:
                torch.mm(rounded, dense, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.add_(rounded.t() @ hidden[part])
        return grad_hidden, None if grad_weight is None else grad_weight.to(dense.dtype), None, None, None


def _dense(weight: Tensor | None, weight_again: Callable[[], Tensor] | None) -> Tensor:
    """The head's matrix [V, C] from whichever of the two was given."""
    if weight is not None:
        return weight
    assert weight_again is not None
    return weight_again()
