"""What stands around RWKV-7's recurrence against loops written from the formulas, and its gradients in fp64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.ops.delta_rule import group_norm_bonus_gate, removal_and_replacement, value_residual

DOUBLE = torch.float64
EPS = 64e-5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_keys_are_the_formula_head_by_head() -> None:
    k, rate, k_k, k_a = normal(2, 3, 4, 8), normal(2, 3, 4, 8, seed=1), normal(1, 1, 32, seed=2), normal(32, seed=3)
    replacement, removal, written = removal_and_replacement(k, rate, k_k, k_a)
    for b in range(2):
        for t in range(3):
            for h in range(4):
                scaled = [k[b, t, h, n].item() * k_k[0, 0, 8 * h + n].item() for n in range(8)]
                length = math.sqrt(sum(value * value for value in scaled))
                for n in range(8):
                    s = 1 / (1 + math.exp(-rate[b, t, h, n].item()))
                    kept = k[b, t, h, n].item() * (1 + (s - 1) * k_a[8 * h + n].item())
                    assert replacement[b, t, h, n].item() == pytest.approx(kept)
                    assert removal[b, t, h, n].item() == pytest.approx(-scaled[n] / length)
                    assert written[b, t, h, n].item() == pytest.approx(scaled[n] / length * s)


def test_a_key_of_zeros_removes_nothing() -> None:
    zeros = torch.zeros(1, 1, 1, 8, dtype=DOUBLE, requires_grad=True)
    outputs = removal_and_replacement(zeros, zeros, normal(8), normal(8))
    assert not any(output.any() for output in outputs)
    (gradient,) = torch.autograd.grad(outputs[0].sum(), zeros)
    assert gradient.isfinite().all()


def test_values_are_pulled_towards_the_first_layers() -> None:
    v, first, amount = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    share = 1 / (1 + torch.exp(-amount))
    torch.testing.assert_close(value_residual(v, first, amount), (1 - share) * v + share * first)
    assert torch.equal(value_residual(v, first, torch.full_like(v, -1e4)), v)


def test_the_readout_is_the_formula() -> None:
    y, r, k, v = (normal(2, 3, 4, 8, seed=seed) for seed in range(4))
    gate, r_k, weight, bias = normal(2, 3, 32, seed=4), normal(4, 8, seed=5), normal(32, seed=6), normal(32, seed=7)
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    normed = normed.view(2, 3, 32) * weight + bias
    bonus = torch.einsum("bthn,bthn,hn->bth", r, k, r_k)[..., None] * v
    expected = (normed + bonus.reshape(2, 3, 32)) * gate
    torch.testing.assert_close(group_norm_bonus_gate(y, r, k, v, gate, r_k, weight, bias, EPS), expected)


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "removal_and_replacement": (lambda *inputs: torch.stack(removal_and_replacement(*inputs)),
                                (normal(1, 3, 2, 4), normal(1, 3, 2, 4, seed=1), normal(8), normal(8, seed=2))),
    "value_residual": (value_residual, tuple(normal(1, 3, 4, seed=seed) for seed in range(3))),
    "group_norm_bonus_gate": (lambda *inputs: group_norm_bonus_gate(*inputs, EPS),
                              (*(normal(1, 3, 2, 4, seed=seed) for seed in range(4)), normal(1, 3, 8, seed=4),
                               normal(2, 4, seed=5), normal(8, seed=6), normal(8, seed=7))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_against_finite_differences(name: str) -> None:
    function, inputs = CASES[name]
    assert torch.autograd.gradcheck(function, tuple(tensor.clone().requires_grad_() for tensor in inputs))


@pytest.mark.parametrize("name", CASES)
def test_a_wider_parameter_is_used_rounded_and_gets_its_gradient_in_its_own_dtype(name: str) -> None:
    function, inputs = CASES[name]
    activations = {"removal_and_replacement": 2, "value_residual": 3, "group_norm_bonus_gate": 5}[name]
    results = []
    for rounds in (False, True):
        given = [tensor.bfloat16() for tensor in inputs[:activations]]
        masters = [tensor.float().requires_grad_() for tensor in inputs[activations:]]
        output = function(*given, *(master.bfloat16() if rounds else master for master in masters))
        assert output.dtype is torch.bfloat16
        if masters:
            output.backward(normal(*output.shape, seed=9).bfloat16())
        assert all(master.grad is not None and master.grad.dtype is torch.float32 for master in masters)
        results.append([output, *(master.grad for master in masters)])
    for as_it_is, rounded in zip(*results, strict=True):
        assert torch.equal(as_it_is, rounded)
