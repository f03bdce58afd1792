"""Frozen two-layer maps of few hidden values, several at once, on NVIDIA GPUs.

RWKV-7 has four beside its matrices: tanh(x w1) w2 + w0 for decay, x a1 a2 + a0 and x v1 v2 + v0 for rate and value
residual, sigmoid(x g1) g2 for the gate. Each product is over before it has filled a GPU. The first three are made as
wide as the widest, with zeros, and lie in two pieces of memory: then each side of all of them is one batched product,
see `products`. A further hidden value, which is always 1, multiplies their biases.

Legend: M maps, n tokens, C channels in, A out, W hidden values of each of the M, G hidden values of the gate's map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from src.ops.delta_rule_cuda import activate_maps, activate_maps_gradient
from src.ops.node import Node, once
from src.ops.products import products
from src.ops.rows import prepared, records


@dataclass(frozen=True)
class Maps:
    """The matrices, bf16, none of them trained.

    Attributes:
        first: [M, C, W], zero from each map's width on.
        second: [M, W, A], likewise, but the last row is the bias.
        gate_first: [C, G].
        gate_second: [G, A].
    """

    first: Tensor
    second: Tensor
    gate_first: Tensor
    gate_second: Tensor


def small_maps(maps: Maps, gate_input: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gate, and each map of its input; the first map goes through tanh, the gate's through sigmoid.

    Best where inputs, and gradients of the results, lie at equal distances in memory; results do.

    Args:
        maps: of M inputs.
        gate_input: [..., C], bf16.
        inputs: M such tensors.

    Returns:
        1 + M tensors [..., A].
    """
    if records(gate_input, *inputs):
        results: tuple[Tensor, ...] = _SmallMaps.apply(maps, gate_input, *inputs)
        return results
    return _run(maps, gate_input, inputs)[0]


def _run(maps: Maps, gate_input: Tensor, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Results, hidden values of the first map [n, W] and of the gate's [n, G]."""
    rows = [prepared(x, "x").flatten(0, -2) for x in inputs]
    hidden = products(rows, maps.first.unbind())
    gate_hidden = prepared(gate_input, "x").flatten(0, -2) @ maps.gate_first
    together = hidden[0].as_strided((len(rows), *hidden[0].shape), (hidden[0].numel(), *hidden[0].stride()))
    activate_maps(together, gate_hidden)
    results = [gate_hidden @ maps.gate_second, *products(hidden, maps.second.unbind())]
    return tuple(result.view(*gate_input.shape[:-1], -1) for result in results), hidden[0], gate_hidden


class _SmallMaps(Node):
    @staticmethod
    def forward(ctx: Any, maps: Maps, gate_input: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        results, hidden, gate_hidden = _run(maps, gate_input, inputs)
        ctx.save_for_backward(hidden, gate_hidden)
        ctx.maps, ctx.shape = maps, gate_input.shape
        return results

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gate_hidden = ctx.saved_tensors
        maps: Maps = ctx.maps
        of_gate, *of_maps = [prepared(grad, "a gradient").flatten(0, -2) for grad in gradients]
        grad_hidden = products(of_maps, maps.second.transpose(1, 2).unbind())
        grad_gate_hidden = of_gate @ maps.gate_second.t()
        activate_maps_gradient(hidden, grad_hidden[0], gate_hidden, grad_gate_hidden)
        of_inputs = products(grad_hidden, maps.first.transpose(1, 2).unbind())
        of_gate_input = grad_gate_hidden @ maps.gate_first.t()
        return None, *(grad.view(ctx.shape) for grad in (of_gate_input, *of_inputs))
