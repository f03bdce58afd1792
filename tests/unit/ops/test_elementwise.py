"""The element-wise definitions against loops written from the formulas, and their gradients in fp64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from src.ops.elementwise import (
    add_norm,
    continuations,
    group_norm_silu_gate,
    modulated_shift_mixes,
    shift_mixes,
    shifted_tokens,
    sigmoid_gated_residual,
    sigmoid_gated_residual_gradients,
    squared_relu,
    squared_relu_and_gradient,
    squared_relu_gradient,
)

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("previous", [[-1], [-1, 0, 1], [-1, 0, 1, -1, 3, 2, 5, 4, 2, 2], [-1, -1, -1]])
def test_continuations_list_every_token_once_under_the_one_before_it(previous: list[int]) -> None:
    first, following = continuations(torch.tensor(previous)).tolist()
    listed: dict[int, list[int]] = {}
    for token in range(len(previous)):
        child = first[token]
        while child >= 0:
            listed.setdefault(token, []).append(child)
            child = following[child]
    expected: dict[int, list[int]] = {}
    for token, before in enumerate(previous):
        if before >= 0:
            expected.setdefault(before, []).append(token)
    assert listed == expected


@pytest.mark.parametrize("with_carry", [False, True])
@pytest.mark.parametrize("with_modulation", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_shift_mixes_are_the_formula_token_by_token(groups: int, with_modulation: bool, with_carry: bool) -> None:
    z, maa = normal(2, 5, 6), normal(groups, 6, seed=1)
    modulation = normal(groups, 2, 5, 6, seed=2) if with_modulation else None
    carry = normal(2, 6, seed=3) if with_carry else None
    mixed = shift_mixes(z, carry, maa, modulation, None)
    assert [part.shape for part in mixed] == [(2, 5, 6)] * groups
    for g in range(groups):
        for b in range(2):
            for t in range(5):
                start = carry[b] if carry is not None else torch.zeros(6, dtype=DOUBLE)
                before = z[b, t - 1] if t else start
                proportion = maa[g] + (modulation[g, b, t] if modulation is not None else 0)
                torch.testing.assert_close(mixed[g][b, t], z[b, t] + (before - z[b, t]) * proportion)


def test_shifted_tokens_follow_previous_across_segments_and_branches() -> None:
    z, carry = normal(1, 9, 4), normal(2, 4, seed=1)
    # Two prompts [0, 3) and [3, 5); continuations [5, 7) and [8, 9) of the first, [7, 8) of the second.
    previous = torch.tensor([-1, 0, 1, -1, 3, 2, 5, 4, 2])
    expected = [carry[0], z[0, 0], z[0, 1], carry[1], z[0, 3], z[0, 2], z[0, 5], z[0, 4], z[0, 2]]
    assert torch.equal(shifted_tokens(z, carry, previous)[0], torch.stack(expected))
    without = shifted_tokens(z, None, previous)[0]
    assert torch.equal(without[[0, 3]], torch.zeros(2, 4, dtype=DOUBLE))
    assert torch.equal(without[[1, 2, 4, 5]], torch.stack([z[0, i] for i in (0, 1, 3, 2)]))


def test_a_packed_row_equals_its_segments_apart() -> None:
    z, carry, maa = normal(1, 7, 4), normal(2, 4, seed=1), normal(5, 4, seed=2)
    modulation = normal(5, 1, 7, 4, seed=3)
    packed = torch.stack(shift_mixes(z, carry, maa, modulation, torch.tensor([-1, 0, 1, -1, 3, 4, 5])))
    for index, part in enumerate([slice(0, 3), slice(3, 7)]):
        alone = shift_mixes(z[:, part], carry[index : index + 1], maa, modulation[:, :, part], None)
        torch.testing.assert_close(packed[:, :, part], torch.stack(alone))


def test_shift_does_not_look_ahead() -> None:
    z = normal(1, 6, 4)
    changed = z.clone()
    changed[0, 4] += 1.0
    maa = normal(5, 4, seed=1)
    parts = zip(shift_mixes(z, None, maa, None, None), shift_mixes(changed, None, maa, None, None), strict=True)
    difference = torch.stack([before - after for before, after in parts])
    assert not difference[:, :, :4].any()
    assert difference[:, :, 4:].any()


def test_group_norm_silu_gate_is_the_formula() -> None:
    y, gate, weight, bias = (
        normal(2, 3, 4, 8),
        normal(2, 3, 32, seed=1),
        normal(32, seed=2),
        normal(32, seed=3),
    )
    eps = 64e-5
    mean = y.mean(-1, keepdim=True)
    variance = (y - mean).square().mean(-1, keepdim=True)
    normalised = ((y - mean) / (variance + eps).sqrt()).view(2, 3, 32) * weight + bias
    torch.testing.assert_close(
        group_norm_silu_gate(y, gate, weight, bias, eps), normalised * gate * torch.sigmoid(gate)
    )


def test_modulated_mixes_are_mixes_with_that_modulation() -> None:
    z, maa, hidden, up = normal(2, 3, 4), normal(5, 4, seed=1), normal(2, 3, 10, seed=2), normal(5, 2, 4, seed=3)
    modulation = torch.einsum("btgk,gkc->gbtc", hidden.view(2, 3, 5, 2), up)
    expected = shift_mixes(z, None, maa, modulation, None)
    for ours, theirs in zip(modulated_shift_mixes(z, None, maa, hidden, up, None), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("adds", [False, True])
def test_add_norm_is_the_formula(adds: bool) -> None:
    x, delta = normal(2, 3, 16), normal(2, 3, 16, seed=1) if adds else None
    weight, bias = normal(16, seed=2), normal(16, seed=3)
    expected = x if delta is None else x + delta
    mean = expected.mean(-1, keepdim=True)
    variance = (expected - mean).square().mean(-1, keepdim=True)
    total, normed = add_norm(x, delta, weight, bias, 1e-3)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(normed, (expected - mean) / (variance + 1e-3).sqrt() * weight + bias)


def test_activations_are_the_formulas() -> None:
    x, r, value = normal(50), normal(50, seed=1), normal(50, seed=2)
    torch.testing.assert_close(squared_relu(x), torch.where(x > 0, x * x, 0.0))
    torch.testing.assert_close(sigmoid_gated_residual(x, r, value), x + value / (1 + torch.exp(-r)))


def test_gradients_from_the_result_are_those_from_the_value() -> None:
    x, r, value, grad = (normal(50, seed=seed) for seed in range(4))
    inputs = [tensor.clone().requires_grad_() for tensor in (r, value)]
    result = sigmoid_gated_residual(x, *inputs)
    result.backward(grad)
    gradients = sigmoid_gated_residual_gradients(x, r, result.detach(), grad)
    for ours, leaf in zip(gradients, inputs, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(ours, leaf.grad)


def test_squared_relu_gradient_is_that_of_autograd() -> None:
    x, grad = normal(50).requires_grad_(), normal(50, seed=1)
    squared_relu(x).backward(grad)
    assert x.grad is not None
    assert squared_relu_gradient(x.detach(), grad) is grad
    torch.testing.assert_close(grad, x.grad)


def test_squared_relu_and_its_gradient_take_the_memory_that_is_there() -> None:
    x, grad = normal(50), normal(50, seed=1)
    expected = squared_relu(x), squared_relu_gradient(x, grad.clone())
    both = squared_relu_and_gradient(x, grad)
    assert both[0] is x
    assert both[1] is grad
    assert all(map(torch.equal, both, expected))


BRANCHING = torch.tensor([-1, 0, -1, 2, 1, 3, 1])
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "shift_mixes": (lambda z, carry, maa, m: torch.stack(shift_mixes(z, carry, maa, m, None)),
                    (normal(2, 3, 4), normal(2, 4), normal(5, 4), normal(5, 2, 3, 4))),
    "shift_mixes packed": (lambda z, carry, maa, m: torch.stack(shift_mixes(z, carry, maa, m, BRANCHING)),
                           (normal(1, 7, 4), normal(2, 4), normal(2, 4), normal(2, 1, 7, 4))),
    "shift_mixes bare": (lambda z, maa: torch.stack(shift_mixes(z, None, maa, None, None)),
                         (normal(2, 3, 4), normal(1, 4))),
    "modulated_shift_mixes": (lambda z, carry, maa, h, up: torch.stack(
                                  modulated_shift_mixes(z, carry, maa, h, up, None)),
                              (normal(2, 3, 4), normal(2, 4), normal(5, 4), normal(2, 3, 10), normal(5, 2, 4))),
    "group_norm_silu_gate": (lambda y, g, w, b: group_norm_silu_gate(y, g, w, b, 64e-5),
                             (normal(1, 3, 2, 4), normal(1, 3, 8), normal(8), normal(8))),
    "add_norm": (lambda *inputs: torch.cat(add_norm(*inputs, 1e-3)),
                 (normal(2, 8), normal(2, 8, seed=1), normal(8, seed=2), normal(8, seed=3))),
    "squared_relu": (squared_relu, (normal(20),)),
    "sigmoid_gated_residual": (sigmoid_gated_residual, (normal(20), normal(20, seed=1), normal(20, seed=2))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients_against_finite_differences(name: str) -> None:
    function, inputs = CASES[name]
    assert torch.autograd.gradcheck(function, tuple(tensor.clone().requires_grad_() for tensor in inputs))


def test_bf16_results_are_bf16() -> None:
    z = normal(1, 3, 8).bfloat16()
    maa = normal(2, 8)
    assert {part.dtype for part in shift_mixes(z, None, maa, None, None)} == {torch.bfloat16}
    y = normal(1, 3, 2, 4).bfloat16()
    assert group_norm_silu_gate(y, z, normal(8), normal(8), 1e-5).dtype == torch.bfloat16
    assert {part.dtype for part in add_norm(z, z, normal(8), normal(8), 1e-5)} == {torch.bfloat16}


PARAMETERS: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
    "shift_mixes": (lambda maa: shift_mixes(normal(2, 3, 8).bfloat16(), None, maa, None, None), (normal(2, 8),)),
    "modulated_shift_mixes": (lambda maa, up: modulated_shift_mixes(
                                  normal(2, 3, 8).bfloat16(), None, maa, normal(2, 3, 10).bfloat16(), up, None),
                              (normal(5, 8), normal(5, 2, 8, seed=1))),
    "group_norm_silu_gate": (lambda w, b: (group_norm_silu_gate(
                                 normal(2, 3, 2, 4).bfloat16(), normal(2, 3, 8).bfloat16(), w, b, 64e-5),),
                             (normal(8), normal(8, seed=1))),
    "add_norm": (lambda w, b: add_norm(normal(2, 8).bfloat16(), None, w, b, 1e-3)[1:], (normal(8), normal(8, seed=1))),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_wider_parameter_is_used_rounded_and_gets_its_gradient_in_its_own_dtype(name: str) -> None:
    function, values = PARAMETERS[name]
    results = []
    for rounds in (False, True):
        masters = [value.float().requires_grad_() for value in values]
        outputs = function(*(master.bfloat16() if rounds else master for master in masters))
        torch.autograd.backward(outputs, [normal(*output.shape, seed=5).bfloat16() for output in outputs])
        assert all(master.grad is not None and master.grad.dtype is torch.float32 for master in masters)
        results.append([*outputs, *(master.grad for master in masters)])
    for as_it_is, rounded in zip(*results, strict=True):
        assert torch.equal(as_it_is, rounded)


def test_a_trained_norm_does_not_make_the_stream_trained() -> None:
    total, normed = add_norm(normal(2, 8), normal(2, 8), normal(8).requires_grad_(), normal(8), 1e-3)
    assert (total.requires_grad, normed.requires_grad) == (False, True)
