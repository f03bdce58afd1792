"""RWKV-7's recurrence and what stands around it as one node of autograd, on NVIDIA GPUs.

Keys, value residual, recurrence and readout as `delta_rule` and `wkv7` define them, by the same kernels. Joined they
take fewer launches: keys and values are made by one, and gradients of what is used twice (r, the replacement key, the
values) are added where the second of them is written, in fp32 and rounded once. The gradients that go on to small
products lie side by side, and so do those of r and k; see `products`.

Shape legend: B batch, T tokens, H heads, N head size, A = H * N attention channels, S packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from src.ops import delta_rule_cuda
from src.ops.node import Node, once
from src.ops.products import side_by_side
from src.ops.rows import kept_parameter, prepared, records, saved_parameter
from src.ops.wkv7_cuda import CUDA_HEAD_SIZE, Part, check_rows, kernel_is_available, prepared_tokens, walk, walk_back


def can_take(r: Tensor, head_size: int) -> bool:
    """Whether `whole` works on tensors like r [B, T, A]."""
    if not (r.is_cuda and r.dtype is torch.bfloat16 and head_size == CUDA_HEAD_SIZE):
        return False
    return kernel_is_available(r.device) and delta_rule_cuda.can_take(r.view(*r.shape[:2], -1, head_size))


class Inputs(NamedTuple):
    """What the matrices and small products make of a layer's input, its own parameters, and the start.

    Attributes:
        r, w_raw, k, rate, v, gate: [B, T, A], bf16.
        first, amount: as v, see `delta_rule.value_residual`; None in the first layer.
        key_scale, rate_scale: see `delta_rule.removal_and_replacement`.
        bonus, weight, bias: see `delta_rule.group_norm_bonus_gate`; bonus is [H, N].
        state: fp32 [H, N, N] or one for each sequence.
    """

    r: Tensor
    w_raw: Tensor
    k: Tensor
    rate: Tensor
    v: Tensor
    first: Tensor | None
    amount: Tensor | None
    gate: Tensor
    key_scale: Tensor
    rate_scale: Tensor
    bonus: Tensor
    weight: Tensor
    bias: Tensor
    state: Tensor


_TOKENS = Inputs._fields.index("gate") + 1
"""The first ones of them, rows of bf16."""
_PARAMETERS = {name: place for place, name in enumerate(Inputs._fields) if _TOKENS <= place < len(Inputs._fields) - 1}


def whole(inputs: Inputs, eps: float, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """From what stands before a layer's recurrence to what its last matrix is applied to.

    Args:
        inputs: what it works on.
        eps: see `delta_rule.group_norm_bonus_gate`.
        parts: of `wkv7_cuda.one_part` or `two_parts`.

    Returns:
        (the gated readout [B, T, A], final states of the first part's sequences fp32 [S, H, N, N]).

    Raises:
        RuntimeError: something is not as `Inputs` has it; the message names it.
    """
    if records(*inputs):
        gated, final = _Whole.apply(*inputs, eps, parts)
        return gated, final
    gated, final, *_ = _run(inputs, eps, parts, keeps=False)
    return gated, final


def _run(
    inputs: Inputs, eps: float, parts: Sequence[Part], *, keeps: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], list[Tensor]]:
    """(readout, final states, what is made on the way, what the recurrence keeps)."""
    r, w_raw, k, rate, v, first, amount, gate, key_scale, rate_scale, bonus, weight, bias, state = inputs
    heads = (*r.shape[:2], *bonus.shape)
    residual = () if first is None or amount is None else (first.view(heads), amount.view(heads))
    scales = key_scale, rate_scale
    made = delta_rule_cuda.keys_and_values(k.view(heads), rate.view(heads), *scales, v.view(heads), *residual)
    replacement, removal, written, values = made
    tokens = (r.view(heads), w_raw.view(heads), replacement, values, removal, written)
    check_rows(tokens[0])
    y, final, kept = walk(parts, [prepared_tokens(x) for x in tokens], state, keeps=keeps)
    gated = delta_rule_cuda.readout(y, tokens[0], replacement, values, gate, bonus, weight, bias, eps)
    return gated, final, (*made, y), kept


class _Whole(Node):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, eps, parts = arguments
        named = zip(Inputs._fields, tensors[:_TOKENS], strict=False)
        rows: list[Any] = [None if x is None else prepared(x, name) for name, x in named]
        inputs = Inputs(*rows, *tensors[_TOKENS:])
        r, w_raw, k, rate, _, first, amount, gate, *_ = inputs
        need = ctx.needs_input_grad
        of_keys, of_values = any((*need[2:4], *need[8:10])), any(need[4:7])
        of_tokens = any(need[:2]) or of_keys or of_values
        gated, final, made, kept = _run(inputs, eps, parts, keeps=of_tokens)
        replacement, removal, written, values, y = made
        if not (of_tokens or any(need[7:13])):  # the state's gradient alone needs neither keys nor values
            replacement = values = None  # type: ignore[assignment]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(r, w_raw, gate, y, replacement, values, removal, written),
            *((k, rate) if of_keys or of_values else (None, None)),
            *((first, amount) if of_values else (None, None)),
            *(saved_parameter(ctx, name, tensors[place], place) for name, place in _PARAMETERS.items()),
            *kept,
        )
        ctx.eps, ctx.parts, ctx.state_is_shared = eps, parts, inputs.state.dim() == 3
        ctx.shapes = [tensors[place].shape for place in _PARAMETERS.values()]
        return gated, final

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        r, w_raw, gate, y, replacement, values, removal, written, k, rate, first, amount, *more = ctx.saved_tensors
        parameters = [kept_parameter(ctx, name, saved) for name, saved in zip(_PARAMETERS, more, strict=False)]
        kept = more[len(_PARAMETERS) :]
        of_r, of_w, of_k, of_rate, of_v, of_first, of_amount, of_gate, *rest = ctx.needs_input_grad
        of_scales, of_readout, of_state = rest[:2], rest[2:5], rest[5]
        of_keys, of_values = any((of_k, of_rate, *of_scales)), any((of_v, of_first, of_amount))
        of_tokens = any((of_r, of_w, of_keys, of_values))

        def place(wanted: bool) -> Tensor | None:
            return torch.empty_like(gate) if wanted else None

        def places(*wanted: bool) -> list[Tensor | None]:
            beside = iter(side_by_side([gate.shape] * sum(wanted), gate))
            return [next(beside) if one else None for one in wanted]

        grad_r, grad_replacement = places(of_r, of_keys)
        grad_values = place(of_values)
        grad_gate = None
        of_parameters: list[Tensor | None] = [None] * 3
        grad_y = y if of_tokens or of_state else None
        if grad_y is not None:
            increment_version(y)  # whose memory it takes, so that autograd refuses a second backward
        inputs = (y, r, replacement, values, gate)
        if grad is not None:
            arrived = delta_rule_cuda.arrived_gradient(grad, gate, "the gradient of the readout")
            assert arrived is not None
            of_parameters = delta_rule_cuda.readout_sums(inputs, ctx.eps, arrived, of_readout, ctx.shapes[2:])
            grad_gate = place(of_gate)
            if grad_y is not None or grad_gate is not None:
                grads = (grad_y, grad_r, grad_replacement, grad_values, grad_gate)
                delta_rule_cuda.readout_gradients(inputs, parameters[2:], ctx.eps, arrived, grads)
        elif grad_y is not None:
            grad_y.zero_()
        grad_w, grad_rate, grad_amount = places(of_w, of_rate, of_amount)
        # What is written after these have been read takes their memory.
        grad_removal = grad_rate if of_rate else place(of_keys)
        grad_written = grad_amount if of_keys and of_amount else place(of_keys)
        grad_state = None
        if grad_y is not None:
            tokens = (r.view(y.shape), w_raw.view(y.shape), replacement, values, removal, written)
            found = (grad_r, grad_w, grad_replacement, grad_values, grad_removal, grad_written)
            shared = ctx.state_is_shared if of_state else None
            grad_state = walk_back(
                ctx.parts, tokens, kept, grad_y, grad_final, found, shared=shared, adds=grad is not None
            )
        grad_k, grad_v, grad_first = grad_replacement if of_k else None, grad_values, place(of_first)
        residual: Sequence[Tensor | None] = (None,) * 7
        if of_values and first is not None:
            grad_v = place(of_v)
            residual = (first, amount, values, grad_values, grad_v, grad_first, grad_amount)
        of_keys_parameters: list[Tensor | None] = [None] * 2
        if of_keys or residual[0] is not None:
            heads_k, (key_scale, rate_scale) = k.view(y.shape), parameters[:2]
            arrived_keys = (grad_replacement, grad_removal, grad_written)
            shapes = ctx.shapes[:2]
            of_keys_parameters = delta_rule_cuda.keys_sums(heads_k, rate, key_scale, arrived_keys, of_scales, shapes)
            if of_k or of_rate or residual[0] is not None:
                keys = (heads_k, rate, key_scale, rate_scale)
                delta_rule_cuda.keys_and_values_gradients(*keys, arrived_keys, grad_k, grad_rate, residual)
        of_inputs = (grad_r, grad_w, grad_k, grad_rate, grad_v, grad_first, grad_amount, grad_gate)
        return *of_inputs, *of_keys_parameters, *of_parameters, grad_state, None, None
