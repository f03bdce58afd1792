"""Head, softmax and target log-probability in one, chunk by chunk over tokens.

The logits of all tokens never exist at once: a chunk's logits are formed, reduced to two numbers per token and
dropped. `token_logps` forms them again in backward, since any loss may follow. `head_sft_loss` knows the loss
and so each row's weight, `token_logps_gradient` is told it: they turn a chunk's logits into their gradient while they
are there, two products with the head instead of three. On a GPU in bf16 a chunk is reduced by one kernel and turned
into its gradient in place by another (`cuda/elementwise.cu`); no fp32 copy of it exists.

A packed head comes in parts of the vocabulary, each dequantised when it is wanted; the numbers of a row are then put
together part by part, so that no whole matrix exists either.

Shape legend: M tokens (rows), C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from src.losses import L2WRAP_FACTOR, sft_loss
from src.ops.elementwise import fused_kernels
from src.ops.node import Node, once

HeadWeight = Tensor | Sequence[Callable[[], Tensor]]
"""[V, C]; or functions that give its rows anew at every call, a part [V_i, C] each, in order."""

_CHUNK_ELEMENTS = 1 << 24
"""Logits formed at a time if `chunk_tokens` is not given: 256 tokens of a 65536 vocabulary, 32 MiB."""
_TRAINED_CHUNK_ELEMENTS = 1 << 26
"""The same on a GPU where a backward wants the head's gradient, 1024 tokens and 128 MiB: unless all rows are one chunk,
it is added up in fp32, twice as large as a head of 16 bits."""
_PART_CHUNK_ELEMENTS = 1 << 22
"""The same where they are widened to fp32: 16 MiB."""


def token_logps(
    hidden: Tensor, head_weight: HeadWeight, targets: Tensor, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """log p(target) and the largest logit of every row.

    Logits are rounded to hidden's dtype, as a plain linear layer gives them; sums over the vocabulary run in
    fp32 (fp64 for fp64 inputs). The gradient of `max_logit` goes to the one of equal largest logits that
    torch.max names.

    Args:
        hidden: [M, C], bf16, fp32 or fp64.
        head_weight: [V, C] in hidden's dtype; or parts of it by function (a packed head), which get no gradient.
        targets: int64 [M]; a negative target is not counted: logp 0, max_logit 0, no gradient from that row.
        chunk_tokens: rows whose logits exist at one time; None chooses about 2^24 logits.

    Returns:
        (logp [M], max_logit [M]), fp32, differentiable with respect to hidden, and to head_weight if that
        requires grad.
    """
    assert hidden.ndim == 2, f"hidden has shape {tuple(hidden.shape)}, expected [rows, channels]"
    assert targets.shape == hidden.shape[:1], f"targets have shape {tuple(targets.shape)}, expected [rows]"
    operation: Any = _TokenLogps if isinstance(head_weight, Tensor) else _TokenLogpsByParts
    logp, max_logit = operation.apply(hidden, head_weight, targets, chunk_tokens)
    return logp, max_logit


@torch.no_grad()
def token_logps_gradient(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    grad_logp: Tensor,
    grad_max_logit: Tensor,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """What the backward of `token_logps` gives for hidden, where its gradients are known beforehand.

    Two products with the head instead of three, and nothing is saved.

    Args:
        hidden, targets, chunk_tokens: as for `token_logps`.
        head_weight: [V, C] in hidden's dtype; gets no gradient.
        grad_logp, grad_max_logit: [M], fp32 (fp64 for fp64 inputs).

    Returns:
        [M, C] as hidden.
    """
    kernels = _kernels(hidden, head_weight)
    statistics = _logit_statistics if kernels is None else kernels.logit_statistics
    gradient = _logit_gradient if kernels is None else kernels.logit_gradient
    values = _row_values(hidden, targets, kernels)
    targets, _, _, logsumexp, argmax = values
    grad_logp, grad_max_logit = grad_logp.contiguous(), grad_max_logit.contiguous()
    grad_hidden = torch.empty_like(hidden)
    for part, logits in _chunks_of_logits(hidden, head_weight, chunk_tokens):
        statistics(logits, *(value[part] for value in values))
        gradient(logits, targets[part], logsumexp[part], argmax[part], grad_logp[part], grad_max_logit[part])
        torch.mm(logits, head_weight, out=grad_hidden[part])
    return grad_hidden


def head_sft_loss(
    hidden: Tensor, head_weight: HeadWeight, targets: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """`losses.sft_loss` of `token_logps`, with the gradient formed in the forward.

    Args:
        hidden, head_weight, targets, chunk_tokens: as for `token_logps`; a head that requires grad or comes in
            parts takes the longer way.

    Returns:
        0-d fp32 (fp64 for fp64 inputs): mean cross-entropy over the counted rows, with L2Wrap's gradient.
    """
    if not isinstance(head_weight, Tensor) or head_weight.requires_grad:
        logp, max_logit = token_logps(hidden, head_weight, targets, chunk_tokens=chunk_tokens)
        return sft_loss(logp, max_logit, targets >= 0)
    loss: Tensor = _HeadSftLoss.apply(hidden, head_weight.detach(), targets, chunk_tokens)
    return loss


class _HeadSftLoss(Node):
    """Saves the gradient of hidden; the backward scales it, by a factor that is not rounded to hidden's dtype.

    In fp16 it is saved as that of the sum over the counted rows, because a mean's would underflow before the loss
    scale reaches it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, dense: Tensor, targets: Tensor, chunk_tokens: int | None) -> Tensor:
        kernels = _kernels(hidden, dense)
        statistics = _logit_statistics if kernels is None else kernels.logit_statistics
        gradient = _logit_gradient if kernels is None else kernels.logit_gradient
        values = _row_values(hidden, targets, kernels)
        targets, logp, max_logit, logsumexp, argmax = values
        counted = targets >= 0
        mean = counted.sum().clamp(min=1).to(logp.dtype).reciprocal()
        is_sum = hidden.dtype is torch.float16
        weight = counted.to(mean.dtype) if is_sum else counted * mean
        by_logp = weight.neg()
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part, logits in _chunks_of_logits(hidden, dense, chunk_tokens):
            statistics(logits, *(value[part] for value in values))
            if grad_hidden is not None:
                by_max = (max_logit[part] * weight[part]).mul_(2 * L2WRAP_FACTOR)
                gradient(logits, targets[part], logsumexp[part], argmax[part], by_logp[part], by_max)
                torch.mm(logits, dense, out=grad_hidden[part])
        ctx.save_for_backward(grad_hidden, mean if is_sum else None)
        loss = (logp * by_logp).sum()
        return loss * mean if is_sum else loss

    @staticmethod
    @once
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, None, None, None]:
        grad_hidden, mean = ctx.saved_tensors
        factor = grad_loss if mean is None else grad_loss * mean
        # With an axis, unlike a 0-d tensor, it takes part in type promotion: the product is formed in its dtype.
        scaled = torch.mul(grad_hidden, factor.view(1, 1), out=torch.empty_like(grad_hidden))
        return scaled, None, None, None


class _TokenLogps(Node):
    """Saves hidden, targets, logsumexp and arg-max of each row; recomputes logits chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, dense: Tensor, targets: Tensor, chunk_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        kernels = _kernels(hidden, dense)
        statistics = _logit_statistics if kernels is None else kernels.logit_statistics
        values = _row_values(hidden, targets, kernels)
        for part, logits in _chunks_of_logits(hidden, dense, chunk_tokens):
            statistics(logits, *(value[part] for value in values))
        targets, logp, max_logit, logsumexp, argmax = values
        ctx.save_for_backward(hidden, dense, targets, logsumexp, argmax)
        ctx.chunk_tokens = chunk_tokens
        return logp, max_logit

    @staticmethod
    @once
    def backward(
        ctx: Any, grad_logp: Tensor, grad_max_logit: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, dense, targets, logsumexp, argmax = ctx.saved_tensors
        kernels = _kernels(hidden, dense)
        gradient = _logit_gradient if kernels is None else kernels.logit_gradient
        grad_logp, grad_max_logit = grad_logp.contiguous(), grad_max_logit.contiguous()
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight, chunk_tokens = None, ctx.chunk_tokens
        if ctx.needs_input_grad[1]:
            if kernels is not None:
                chunk_tokens = chunk_tokens or max(1, _TRAINED_CHUNK_ELEMENTS // dense.shape[0])
            if kernels is None or hidden.shape[0] > chunk_tokens:
                grad_weight = torch.zeros(dense.shape, dtype=logsumexp.dtype, device=dense.device)
        for part, logits in _chunks_of_logits(hidden, dense, chunk_tokens):
            gradient(logits, targets[part], logsumexp[part], argmax[part], grad_logp[part], grad_max_logit[part])
            if grad_hidden is not None:
                torch.mm(logits, dense, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.add_(logits.t() @ hidden[part])
            elif ctx.needs_input_grad[1]:
                grad_weight = logits.t() @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(dense.dtype), None, None


class _TokenLogpsByParts(Node):
    """`_TokenLogps` of a head in parts: running logsumexp and maximum over them, gradients added up in fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, parts: Sequence[Callable[[], Tensor]], targets: Tensor, chunk_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        counted = targets >= 0
        logsumexp = hidden.new_full(targets.shape, -torch.inf, dtype=_sum_dtype(hidden))
        max_logit, target_logit = logsumexp.clone(), torch.zeros_like(logsumexp)
        argmax = torch.zeros_like(targets)
        for rows, first, dense in _pieces(hidden, parts, chunk_tokens):
            logits = (hidden[rows] @ dense.t()).to(logsumexp.dtype)
            largest, place = logits.max(-1)
            argmax[rows] = torch.where(largest > max_logit[rows], place + first, argmax[rows])
            max_logit[rows] = torch.maximum(max_logit[rows], largest)
            logsumexp[rows] = torch.logaddexp(logsumexp[rows], logits.logsumexp(-1))
            local, inside = _within(targets[rows], first, logits)
            target_logit[rows] += torch.where(inside, logits.gather(1, local).squeeze(1), 0.0)
        ctx.save_for_backward(hidden, targets, logsumexp, argmax)
        ctx.parts, ctx.chunk_tokens = parts, chunk_tokens
        return torch.where(counted, target_logit - logsumexp, 0.0), torch.where(counted, max_logit, 0.0)

    @staticmethod
    @once
    def backward(ctx: Any, grad_logp: Tensor, grad_max_logit: Tensor) -> tuple[Tensor | None, None, None, None]:
        hidden, targets, logsumexp, argmax = ctx.saved_tensors
        by_logp, by_max = (torch.where(targets >= 0, grad, 0.0) for grad in (grad_logp, grad_max_logit))
        total = torch.zeros_like(hidden, dtype=logsumexp.dtype)
        for rows, first, dense in _pieces(hidden, ctx.parts, ctx.chunk_tokens):
            logits = (hidden[rows] @ dense.t()).to(logsumexp.dtype)
            gradient = logits.sub_(logsumexp[rows].unsqueeze(1)).exp_().mul_(-by_logp[rows].unsqueeze(1))
            for places, values in ((targets, by_logp), (argmax, by_max)):
                local, inside = _within(places[rows], first, logits)
                gradient.scatter_add_(1, local, torch.where(inside, values[rows], 0.0).unsqueeze(1))
            total[rows] += gradient.to(hidden.dtype) @ dense
        return total.to(hidden.dtype), None, None, None


def _pieces(
    hidden: Tensor, parts: Sequence[Callable[[], Tensor]], chunk_tokens: int | None
) -> Iterator[tuple[slice, int, Tensor]]:
    """(rows, number of the part's first token, the part [V_i, C]) for every part and chunk of rows."""
    first = 0
    for part in parts:
        dense = part()
        chunk = chunk_tokens or max(1, _PART_CHUNK_ELEMENTS // dense.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            yield slice(start, start + chunk), first, dense
        first += dense.shape[0]


def _within(tokens: Tensor, first: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of tokens in a part's logits, [m, 1], and which of them lie there, [m]; others get some column."""
    local = tokens - first
    inside = (local >= 0) & (local < logits.shape[1])
    return local.clamp(0, logits.shape[1] - 1).unsqueeze(1), inside


def _chunks_of_logits(hidden: Tensor, dense: Tensor, chunk_tokens: int | None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [m, V]) chunk by chunk, all in one buffer."""
    rows, vocabulary = hidden.shape[0], dense.shape[0]
    chunk = chunk_tokens or max(1, _CHUNK_ELEMENTS // vocabulary)
    buffer = torch.empty(min(chunk, rows), vocabulary, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        yield part, torch.mm(hidden[part], dense.t(), out=buffer[: min(chunk, rows - start)])


def _row_values(hidden: Tensor, targets: Tensor, kernels: Any | None) -> tuple[Tensor, ...]:
    """(targets, logp, max_logit, logsumexp, argmax) of each row, [M] each; all but the targets are yet to be filled."""
    logp = torch.empty(targets.shape, dtype=_sum_dtype(hidden), device=hidden.device)
    argmax = torch.empty_like(logp, dtype=torch.int64 if kernels is None else torch.int32)
    return targets.contiguous(), logp, torch.empty_like(logp), torch.empty_like(logp), argmax


def _logit_statistics(
    logits: Tensor, targets: Tensor, logp: Tensor, max_logit: Tensor, logsumexp: Tensor, argmax: Tensor
) -> None:
    """Writes log p(target) and largest logit (0 for a negative target), logsumexp and arg-max of each row."""
    wide = logits.to(logp.dtype)
    torch.max(wide, dim=-1, out=(max_logit, argmax))
    torch.logsumexp(wide, dim=-1, out=logsumexp)
    target_logit = wide.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    uncounted = targets < 0
    torch.sub(target_logit, logsumexp, out=logp).masked_fill_(uncounted, 0.0)
    max_logit.masked_fill_(uncounted, 0.0)


def _logit_gradient(
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    argmax: Tensor,
    grad_logp: Tensor,
    grad_max_logit: Tensor,
) -> None:
    """Overwrites logits by the gradient of sum(grad_logp * logp) + sum(grad_max_logit * max_logit)."""
    counted = targets >= 0
    by_logp = torch.where(counted, grad_logp, 0.0).unsqueeze(1)
    by_max = torch.where(counted, grad_max_logit, 0.0).unsqueeze(1)
    gradient = torch.sub(logits.to(logsumexp.dtype), logsumexp.unsqueeze(1)).exp_().mul_(-by_logp)
    gradient.scatter_add_(1, targets.clamp(min=0).unsqueeze(1), by_logp)
    gradient.scatter_add_(1, argmax.unsqueeze(1), by_max)
    logits.copy_(gradient)


def _kernels(hidden: Tensor, dense: Tensor) -> Any | None:
    """The fused kernels where they apply: bf16 on a GPU, rows of logits 16-byte aligned."""
    return fused_kernels() if hidden.is_cuda and hidden.dtype is torch.bfloat16 and dense.shape[0] % 8 == 0 else None


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
