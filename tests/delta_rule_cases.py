"""The fused operators around RWKV-7's recurrence against their definitions, on a GPU or emulated on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from fused_operators import BOUND_OF_FEW, check_against, error, normal
from torch import Tensor

from src.ops import delta_rule_cuda
from src.ops.delta_rule import group_norm_bonus_gate_torch, removal_and_replacement_torch, value_residual_torch

EPS = 64e-5
BOUND_OF_AMOUNT = 6e-3
"""The gradient of value_residual's amount comes from a difference with its rounded result: 2.9e-3 on many values,
4.3e-3 on 16 (emulated)."""

SHAPES = [(1, 1, 4, 16), (2, 15, 5, 32), (1, 61, 3, 64), (3, 7, 2, 128)]
"""B, T, H, N."""

Heads = tuple[int, int, int, int]
Chosen = tuple[int, ...]


def combinations(count: int) -> list[Chosen]:
    """Every choice of some of the first `count` tensors, but for none."""
    return [chosen for size in range(1, count + 1) for chosen in itertools.combinations(range(count), size)]


def keys(batch: int, tokens: int, heads: int, size: int, device: str) -> list[Tensor]:
    """Arguments of removal_and_replacement."""
    shapes = (batch, tokens, heads, size), (batch, tokens, heads, size), (1, 1, heads * size), (1, 1, heads * size)
    return [normal(*shape, seed=seed, device=device) for seed, shape in enumerate(shapes)]


def readout(batch: int, tokens: int, heads: int, size: int, device: str) -> list[Tensor]:
    """Arguments of group_norm_bonus_gate, but for eps."""
    channels = heads * size
    shapes = [(batch, tokens, heads, size)] * 4 + [(batch, tokens, channels), (heads, size), (channels,), (channels,)]
    return [normal(*shape, seed=seed, device=device) for seed, shape in enumerate(shapes)]


def check_keys(shape: Heads, wanted: Chosen, device: str, *, wide: bool = True) -> None:
    """`wide`: parameters are stored in fp32."""
    check_against(
        removal_and_replacement_torch,
        delta_rule_cuda.removal_and_replacement,
        keys(*shape, device),
        wanted,
        masters=(2, 3) if wide else (),
    )


def check_keys_with_unused_outputs(used: Chosen, device: str) -> None:
    """Gradients arrive for the outputs named only."""

    def chosen(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *arguments: tuple(function(*arguments)[index] for index in used)

    depends_on = {0: (0, 1, 3), 1: (0, 2), 2: (0, 1, 2)}
    wanted = sorted({index for output in used for index in depends_on[output]})
    functions = chosen(removal_and_replacement_torch), chosen(delta_rule_cuda.removal_and_replacement)
    check_against(*functions, keys(1, 19, 3, 64, device), wanted, masters=(2, 3))


def check_a_key_of_zeros(device: str) -> None:
    """It removes nothing, and its gradient is finite."""
    k, rate, k_k, k_a = keys(1, 3, 2, 64, device)
    k[0, 1] = 0
    k.requires_grad_()
    outputs = delta_rule_cuda.removal_and_replacement(k, rate, k_k, k_a)
    assert all(output.isfinite().all() and not output[0, 1].any() for output in outputs)
    outputs[0].sum().backward()
    assert k.grad is not None
    assert k.grad.isfinite().all()


def check_values(shape: tuple[int, int, int], wanted: Chosen, device: str) -> None:
    tensors = [normal(*shape, seed=seed, device=device) for seed in range(3)]
    check_against(value_residual_torch, delta_rule_cuda.value_residual, tensors, wanted, bound=BOUND_OF_AMOUNT)


def check_values_near_saturation(device: str) -> None:
    """Where sigmoid(amount) is near 1 the gradient of amount is small, and its error that of rounding the result."""
    v, first, amount, grad = (normal(1, 40, 512, seed=seed, device=device) for seed in range(4))
    amount = (amount + 6).bfloat16().requires_grad_()
    delta_rule_cuda.value_residual(v, first, amount).backward(grad)
    exact = amount.detach().double().requires_grad_()
    value_residual_torch(v.double(), first.double(), exact).backward(grad.double())
    assert amount.grad is not None
    assert exact.grad is not None
    assert (amount.grad - exact.grad).abs().max() < BOUND_OF_FEW * (grad * first).abs().max()
    assert error(amount.grad, exact.grad) < 1


def check_readout(shape: Heads, wanted: Chosen, device: str, *, wide: bool = True, mean: float = 0.0) -> None:
    """`wide`: parameters are stored in fp32; `mean` of y."""
    tensors = readout(*shape, device)
    tensors[0] = (tensors[0] + mean).bfloat16()
    check_against(
        group_norm_bonus_gate_torch,
        delta_rule_cuda.group_norm_bonus_gate,
        tensors,
        wanted,
        EPS,
        masters=(5, 6, 7) if wide else (),
    )


def check_that_wrong_arguments_are_named(device: str) -> None:
    k, rate, *scales = keys(1, 3, 2, 64, device)
    with pytest.raises(RuntimeError, match=r"rate has shape \[1, 2, 2, 64\], expected \[1, 3, 2, 64\]"):
        delta_rule_cuda.removal_and_replacement(k, rate[:, :2], *scales)
    with pytest.raises(RuntimeError, match="rate_scale has 64 values, expected 128"):
        delta_rule_cuda.removal_and_replacement(k, rate, scales[0], scales[1][..., :64])
    with pytest.raises(RuntimeError, match="the head size is 8"):
        delta_rule_cuda.removal_and_replacement(*keys(1, 3, 2, 8, device))
    with pytest.raises(RuntimeError, match=r"amount has dtype torch\.float32, expected bfloat16"):
        delta_rule_cuda.value_residual(k, k, k.float())
    with pytest.raises(RuntimeError, match="gate has shape"):
        delta_rule_cuda.group_norm_bonus_gate(k, k, k, k, k, *readout(1, 3, 2, 64, device)[5:], EPS)
    output = delta_rule_cuda.value_residual(k.requires_grad_(), rate, rate)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output.sum(), k, create_graph=True)


def layer(k: Tensor, rate: Tensor, first: Tensor, small: Tensor, r_k: Tensor) -> Tensor:
    """All operators in a row, [1, T, 2, 64] each but small [128] and r_k [2, 64] -> [1, T, 128]."""
    replacement, removal, written = delta_rule_cuda.removal_and_replacement(k, rate, small, small)
    v = delta_rule_cuda.value_residual(removal, first, rate)
    rows = (written, removal, replacement, v, first.flatten(2))
    return delta_rule_cuda.group_norm_bonus_gate(*rows, r_k, small, small, EPS)


def layer_inputs(device: str) -> tuple[Tensor, ...]:
    """What `layer` takes; the last two are stored in fp32. Gradients of all are asked for."""
    rows = (normal(1, 33, 2, 64, seed=seed, device=device) for seed in range(3))
    tensors = *rows, normal(128, device=device).float(), normal(2, 64, seed=1, device=device).float()
    return tuple(tensor.requires_grad_() for tensor in tensors)


def layer_gradients(run: Callable[..., Tensor], device: str) -> tuple[Tensor, ...]:
    """The result and all gradients."""
    inputs = layer_inputs(device)
    out = run(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, normal(*out.shape, seed=3, device=device)))


def strided(*inputs: Tensor) -> Tensor:
    """`layer` of tensors with gaps."""
    return layer(*(tensor.repeat_interleave(2, -1)[..., ::2] for tensor in inputs))
