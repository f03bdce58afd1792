"""Each adapter is a dense matrix W' that is never formed: outputs and gradients are those of x W'ᵀ in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from src.adapters.adapter import Adapter
from src.adapters.bone import Bat, Bone, bat_weight, bone_weight
from src.adapters.lora import LoRA, _orthonormal, fresh_factors, lora_weight, principal_factors
from src.model.layers import Linear
from src.quant import DequantizationWorkspace, FrozenLinear

OUT, IN = 48, 80

TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
"""Relative to the norm; measured at most 4e-16, 3e-7 and 6e-3 on an x86-64 CPU with torch 2.13."""


def lora_matrix(weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    return weight + 0.5 * parameters["lora_B"] @ parameters["lora_A"]


def bone_matrix(weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    block = parameters["bone"]
    columns = [weight[:, c] + block[c % block.shape[0]] for c in range(weight.shape[1])]
    return torch.stack(columns, dim=1)


def bat_matrix(weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    blocks = parameters["bone"]
    r = blocks.shape[1]
    strips = []
    for b, block in enumerate(blocks):
        tiles = weight[:, b * r : (b + 1) * r].split(r)
        strips.append(torch.cat([tile + tile @ block + block for tile in tiles]))
    return torch.cat(strips, dim=1)


def lora(base: Linear | FrozenLinear, parameters: Mapping[str, Tensor]) -> Adapter:
    return LoRA(base, parameters, scale=0.5)


CASES = {
    "lora": (LoRA, lora, lora_matrix, 6),
    "bone": (Bone, Bone, bone_matrix, 16),
    "bone that does not divide": (Bone, Bone, bone_matrix, 12),
    "bone of one block": (Bone, Bone, bone_matrix, IN),
    "bat": (Bat, Bat, bat_matrix, 8),
    "bat of one row of tiles": (Bat, Bat, bat_matrix, 16),
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def linear_of(weight: Tensor) -> Linear:
    linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = torch.nn.Parameter(weight)
    return linear


def made(
    name: str, base: Linear | FrozenLinear, dtype: torch.dtype = torch.float32
) -> tuple[Adapter, Callable[[Tensor, Mapping[str, Tensor]], Tensor]]:
    """An adapter away from its start around a matrix, and the formula of its W'."""
    kind, make, matrix, r = CASES[name]
    generator = torch.Generator().manual_seed(2)
    parameters = {
        key: torch.randn(size, generator=generator, dtype=torch.float64).div(3).to(dtype)
        for key, size in kind.parameter_shapes(r, OUT, IN).items()
    }
    return make(base, parameters), matrix


@pytest.mark.parametrize("leading", [(7,), (2, 5)], ids=str)
@pytest.mark.parametrize("base", ["float64", "float32", "bfloat16", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_dense_matrix(name: str, base: str, leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64) / IN**0.5
    packed = base in ("nf4", "fp4", "int8")
    dtype = torch.float32 if packed else getattr(torch, base)
    matrix: Linear | FrozenLinear
    if packed:
        matrix = FrozenLinear.from_weight(weight.float(), base, dtype, workspace=DequantizationWorkspace())
        weight = matrix.dequantized().double()
    else:
        matrix = linear_of(weight.to(dtype))
        weight = weight.to(dtype).double()
    adapter, formula = made(name, matrix, torch.float64 if dtype is torch.float64 else torch.float32)

    x = torch.randn(*leading, IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(*leading, OUT, generator=generator, dtype=torch.float64).to(dtype)
    y = adapter(x)
    assert y.dtype is dtype
    assert y.shape == grad.shape
    y.backward(grad)

    exact = {key: parameter.detach().double().requires_grad_() for key, parameter in adapter.named_parameters()
             if parameter.requires_grad}  # fmt: skip
    exact_x = x.detach().double().requires_grad_()
    exact_y = exact_x @ formula(weight, exact).t()
    exact_y.backward(grad.double())

    tolerance = TOLERANCES[dtype]
    assert relative(y.detach(), exact_y.detach()) < tolerance
    assert x.grad is not None
    assert exact_x.grad is not None
    assert relative(x.grad, exact_x.grad) < tolerance
    assert set(exact) == set(adapter.names)
    for key, parameter in exact.items():
        own = adapter.get_parameter(key)
        assert own.grad is not None
        assert parameter.grad is not None
        assert own.grad.dtype is own.dtype
        assert relative(own.grad, parameter.grad) < tolerance, key


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_of_the_matrix_exists(name: str) -> None:
    linear = linear_of(torch.randn(OUT, IN))
    adapter, _ = made(name, linear)
    adapter(torch.randn(3, IN)).sum().backward()
    assert linear.weight.grad is None
    assert not linear.weight.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_is_what_it_says(name: str) -> None:
    """Nothing of a matrix' size; bone not even its input."""
    kind, _, _, r = CASES[name]
    adapter, _ = made(name, linear_of(torch.randn(OUT, IN)))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        adapter(torch.randn(5, IN))
    assert sum(tensor.numel() for tensor in saved) == 5 * (IN * kind.keeps_input + kind.narrow_values(r))


def test_the_original_s_bat_is_not_bone() -> None:
    bat, bone = bat_matrix, bone_matrix
    weight, block = torch.randn(OUT, IN), torch.randn(8, OUT)
    assert not torch.allclose(bat(weight, {"bone": torch.randn(IN // 8, 8, 8)}), bone(weight, {"bone": block}))


class TestMergedWeights:
    @pytest.mark.parametrize("name", CASES)
    def test_they_are_the_dense_matrix(self, name: str) -> None:
        kind, _, matrix, r = CASES[name]
        generator = torch.Generator().manual_seed(1)
        shapes = kind.parameter_shapes(r, OUT, IN)
        parameters = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
        before = weight.clone()
        values = tuple(parameters.values())
        merged = {LoRA: lambda: lora_weight(weight, *values, scale=0.5), Bone: lambda: bone_weight(weight, *values)}
        found = merged.get(kind, lambda: bat_weight(weight, *values))()
        assert relative(found, matrix(weight, parameters)) < 1e-15
        assert torch.equal(weight, before)

    def test_parameters_of_16_bits_are_used_in_the_matrix_s_dtype(self) -> None:
        weight, a, b = (
            torch.zeros(OUT, IN),
            torch.full((4, IN), 1 / 3).bfloat16(),
            torch.full((OUT, 4), 1 / 3).bfloat16(),
        )
        assert torch.equal(lora_weight(weight, a, b), b.float() @ a.float())

    def test_bat_by_output_is_a_tile_loop_over_rows(self) -> None:
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(48, 48, generator=generator, dtype=torch.float64)
        blocks = torch.randn(6, 8, 8, generator=generator, dtype=torch.float64)
        expected = weight.clone()
        for a in range(6):
            for b in range(6):
                tile = weight[a * 8 : a * 8 + 8, b * 8 : b * 8 + 8]
                expected[a * 8 : a * 8 + 8, b * 8 : b * 8 + 8] = tile + tile @ blocks[a] + blocks[a]
        assert relative(bat_weight(weight, blocks, by_output=True), expected) < 1e-15
        assert relative(bat_weight(weight, blocks), expected) > 0.1


class TestDropout:
    def test_leaves_out_inputs_of_a_in_training_alone(self) -> None:
        generator = torch.Generator().manual_seed(6)
        factors = {
            "lora_A": torch.randn(4, IN, generator=generator),
            "lora_B": torch.randn(OUT, 4, generator=generator),
        }
        adapter = LoRA(linear_of(torch.zeros(OUT, IN)), factors, dropout=0.5)
        x = torch.randn(1, IN, generator=generator).expand(4000, IN)
        exact = adapter.eval()(x).detach().double()
        torch.manual_seed(1)
        drawn = adapter.train()(x)
        assert adapter.draws_random
        assert not torch.equal(drawn, adapter(x))
        assert relative(drawn.detach(), exact) > 0.3
        assert relative(drawn.detach().mean(0), exact[0]) < 0.05  # nothing is lost on average


class TestStart:
    def test_lora_draws_a_as_linear_layers_do(self) -> None:
        a, b = torch.empty(64, 4096), torch.full((8, 64), 7.0)
        fresh_factors(a, b, seed=3)
        assert not b.any()
        assert float(a.abs().max()) <= 1 / 64
        assert float(a.std()) == pytest.approx(1 / 64 / 3**0.5, rel=0.01)
        again, other = torch.empty(64, 4096), torch.empty(64, 4096)
        fresh_factors(again, b, seed=3)
        fresh_factors(other, b, seed=4)
        assert torch.equal(a, again)
        assert not torch.equal(a, other)


class TestPrincipalFactors:
    @pytest.mark.parametrize("size", [(96, 200), (200, 96), (64, 64)], ids=str)
    def test_what_is_left_is_as_small_as_it_can_be(self, size: tuple[int, int]) -> None:
        """Of a spectrum that hardly falls, the hardest there is: 0.23 % and 2 % were measured at most."""
        generator = torch.Generator().manual_seed(5)
        weight = torch.randn(size, generator=generator) / size[1] ** 0.5
        r = 12
        a, b = principal_factors(weight, r, niter=4, seed=1)
        assert (a.shape, b.shape) == ((r, size[1]), (size[0], r))
        values = torch.linalg.svdvals(weight.double())
        left = weight.double() - b.double() @ a.double()
        assert float(left.norm()) <= 1.005 * float(values[r:].norm())
        found = torch.linalg.svdvals(b.double() @ a.double())[:r]
        assert torch.allclose(found, values[:r], rtol=0.05)
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-4)  # √S on both sides

    def test_exact_where_the_rank_is_lower(self) -> None:
        weight = torch.randn(40, 3) @ torch.randn(3, 30)
        a, b = principal_factors(weight, 8, niter=2, seed=1)
        assert torch.allclose(b @ a, weight, atol=1e-4)
        assert a.isfinite().all()
        assert b.isfinite().all()

    def test_a_seed_gives_the_same_factors(self) -> None:
        weight = torch.randn(40, 30)
        first, again = principal_factors(weight, 8, 1, seed=1), principal_factors(weight, 8, 1, seed=1)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    def test_r_may_be_the_whole_matrix(self) -> None:
        weight = torch.randn(24, 20)
        a, b = principal_factors(weight, 20, niter=1, seed=1)
        assert torch.allclose(b @ a, weight, atol=1e-4)

    @pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6, 1e9])
    def test_bases_are_orthonormal_whatever_they_come_from(self, condition: float) -> None:
        """Less than 1e-6 was measured, with dependent columns, too; Householder's reflections leave 7e-7."""
        generator = torch.Generator().manual_seed(2)
        outer, inner = (torch.randn(n, 24, dtype=torch.double, generator=generator) for n in (300, 24))
        values = torch.logspace(0, -math.log10(condition), 24, dtype=torch.double)
        x = (torch.linalg.qr(outer)[0] * values @ torch.linalg.qr(inner)[0].t()).float()
        basis, triangle = _orthonormal(x)
        assert float((basis.double().t() @ basis.double() - torch.eye(24)).abs().max()) < 5e-6
        assert float((basis.double() @ triangle.double() - x).norm()) < 1e-6 * float(x.norm())
        assert not triangle.tril(-1).any()

    def test_zeros_give_zeros(self) -> None:
        a, b = principal_factors(torch.zeros(24, 20), 4, niter=2, seed=1)
        assert not (b @ a).any()
