"""Which matrices get which adapter, how they start, and what is refused."""

from __future__ import annotations

import pytest
import torch
from factories import tiny_parameters, tiny_shape
from torch import Tensor

from src.adapters.plan import KINDS, AdapterPlan, init_key
from src.errors import CheckpointError, ConfigError
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel

SHAPE = tiny_shape(n_embd=64)
CPU = torch.device("cpu")
TOKENS = torch.arange(24)[None]


def adapted(plan: AdapterPlan | None, quant_type: str | None = None, **start: Tensor) -> LanguageModel:
    trained = [] if plan is None else list(plan.parameter_shapes(SHAPE))
    options = LoadOptions(CPU, torch.float32, quant_type=quant_type, trained=trained, adapters=plan)
    return build_model({**tiny_parameters(SHAPE), **start}, SHAPE, options)


def hidden(model: LanguageModel) -> Tensor:
    return model(TOKENS)[0].detach()  # type: ignore[no-any-return]


def plan(kind: str, r: int = 8, **options: object) -> AdapterPlan:
    return AdapterPlan(kind, r, **options)  # type: ignore[arg-type]


class TestMatrices:
    def test_all_of_every_layer_by_default(self) -> None:
        assert plan("lora").matrices(SHAPE) == list(SHAPE.matrix_names())
        assert len(SHAPE.matrix_names()) == 8 * SHAPE.n_layer

    def test_those_that_are_named(self) -> None:
        named = plan("lora", targets=("att.key", "value")).matrices(SHAPE)
        assert named == [
            f"blocks.{i}.{name}.weight" for i in range(2) for name in ("att.key", "att.value", "ffn.value")
        ]

    def test_keys_and_shapes_are_those_of_the_files(self) -> None:
        A, F = SHAPE.n_embd, SHAPE.dim_ffn
        one = {"targets": ("ffn.key",)}
        assert plan("lora", **one).parameter_shapes(SHAPE)["blocks.1.ffn.key.lora_A"] == (8, A)
        assert plan("pissa", **one).parameter_shapes(SHAPE)["blocks.1.ffn.key.lora_B"] == (F, 8)
        assert plan("bone", **one).parameter_shapes(SHAPE)["blocks.1.ffn.key.bone"] == (8, F)
        assert plan("bat", **one).parameter_shapes(SHAPE)["blocks.1.ffn.key.bone"] == (A // 8, 8, 8)

    @pytest.mark.parametrize(
        ("wrong", "expected"),
        [
            (plan("lora", targets=("att.keys",)), "--targets att.keys is no matrix of this model: use some of att."),
            (plan("lora", targets=("emb",)), "--targets emb is no matrix"),
            (plan("lora", r=65), "--lora_r 65 is larger than att.receptance of 64 x 64: lower it"),
            (plan("pissa", r=65), "--pissa_r 65 is larger than"),
            (plan("bone", r=65), "--bone_r 65 is larger than"),
            (plan("bat", r=12), "--bone_r 12 does not divide att.receptance of 64 x 64, which bat needs"),
            (plan("bat", r=64), "--bone_r 64 does not divide ffn.key of 224 x 64"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_refused(self, wrong: AdapterPlan, expected: str) -> None:
        with pytest.raises(ConfigError) as refused:
            wrong.parameter_shapes(SHAPE)
        assert expected in str(refused.value)

    def test_a_choice_of_targets_may_take_a_larger_r(self) -> None:
        assert plan("bat", r=64, targets=("att.key",)).matrices(SHAPE)


class TestStart:
    @pytest.mark.parametrize("quant_type", [None, "nf4", "int8"])
    @pytest.mark.parametrize("kind", ["lora", "bone", "bat"])
    def test_is_the_base_model(self, kind: str, quant_type: str | None) -> None:
        assert torch.equal(hidden(adapted(plan(kind), quant_type)), hidden(adapted(None, quant_type)))

    def test_of_pissa_is_the_base_model_up_to_rounding(self) -> None:
        base = hidden(adapted(None))
        assert float((hidden(adapted(plan("pissa"))) - base).norm() / base.norm()) < 1e-5

    def test_pissa_packs_less_than_the_matrix_holds(self) -> None:
        """The residual is what is packed, so that the start is nearer to the base than packing the whole."""
        base = hidden(adapted(None))
        pissa, packed = hidden(adapted(plan("pissa", r=32), "nf4")), hidden(adapted(None, "nf4"))
        assert float((pissa - base).norm()) < 0.8 * float((packed - base).norm())
        key = "blocks.0.att.key"
        model = adapted(plan("pissa"), "nf4")
        adapter = model.get_submodule(key)
        residual = tiny_parameters(SHAPE)[f"{key}.weight"] - (adapter.lora_B @ adapter.lora_A).detach()
        left = adapter.base.dequantized() - residual
        assert float(left.norm() / residual.norm()) < 0.12

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_base_that_is_not_finite_is_refused_by_name(self, kind: str) -> None:
        key = "blocks.1.att.value.weight"
        broken = tiny_parameters(SHAPE)[key].index_fill(0, torch.tensor([3]), float("nan"))
        with pytest.raises(CheckpointError, match=key):
            adapted(plan(kind), **{key: broken})

    def test_each_matrix_draws_its_own_and_a_seed_repeats_them(self) -> None:
        def factor(seed: int, layer: int) -> Tensor:
            return adapted(plan("lora", seed=seed)).get_parameter(f"blocks.{layer}.att.key.lora_A").detach()

        assert torch.equal(factor(1, 0), factor(1, 0))
        assert not torch.equal(factor(1, 0), factor(1, 1))
        assert not torch.equal(factor(1, 0), factor(2, 0))

    @pytest.mark.parametrize("kind", KINDS)
    def test_values_that_are_known_are_taken(self, kind: str) -> None:
        made = plan(kind)
        start = {key: torch.randn(size).bfloat16() for key, size in made.parameter_shapes(SHAPE).items()}
        model = adapted(made, **start)
        for key, values in start.items():
            parameter = model.get_parameter(key)
            assert parameter.dtype is torch.float32
            assert torch.equal(parameter.detach(), values.float())

    def test_known_first_factors_of_pissa_are_subtracted_whatever_the_adapter_has_become(self) -> None:
        made = plan("pissa")
        shapes = made.parameter_shapes(SHAPE)
        first = {init_key(key): torch.randn(size) / 8 for key, size in shapes.items()}
        begun, gone_on = adapted(made, **first), adapted(made, **first, **{k: torch.ones(s) for k, s in shapes.items()})
        key = "blocks.0.att.gate"
        expected = tiny_parameters(SHAPE)[f"{key}.weight"]
        expected = expected - first[f"{key}.init_lora_B"] @ first[f"{key}.init_lora_A"]
        for model in (begun, gone_on):
            assert torch.allclose(model.get_submodule(key).base.weight, expected, atol=1e-6)
        assert torch.equal(begun.get_parameter(f"{key}.lora_A").detach(), first[f"{key}.init_lora_A"])
        assert bool((gone_on.get_parameter(f"{key}.lora_A") == 1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_adapters_is_the_model_of_the_dense_matrices(kind: str) -> None:
    """Each adapter stands at the matrix that its key names; what it does there is a matter of test_formulas.py."""
    made = plan(kind, alpha=4.0)
    generator = torch.Generator().manual_seed(7)
    start = {key: torch.randn(size, generator=generator) / 16 for key, size in made.parameter_shapes(SHAPE).items()}
    model = adapted(made, **start)
    merged = {}
    for key in SHAPE.matrix_names():
        matrix = model.get_submodule(key.removesuffix(".weight"))
        merged[key] = matrix(torch.eye(SHAPE.parameter_shapes()[key][1])).t().detach().contiguous()
    dense = hidden(adapted(None, **merged))
    assert float((hidden(model) - dense).norm() / dense.norm()) < 1e-5
    assert float((hidden(adapted(None)) - dense).norm() / dense.norm()) > 0.01


class TestScale:
    def test_is_alpha_over_r_or_over_its_root_and_lora_s_alone(self) -> None:
        assert plan("lora", alpha=32.0).scale == 4
        assert plan("lora", r=16, alpha=32.0, rslora=True).scale == 8
        assert plan("pissa", alpha=32.0).scale == plan("bone", alpha=32.0).scale == 1

    def test_reaches_the_adapters(self) -> None:
        model = adapted(plan("lora", alpha=24.0, dropout=0.25))
        adapter = model.get_submodule("blocks.0.ffn.key")
        assert (adapter.scale, adapter.dropout) == (3, 0.25)
        assert all(block.draws_random for block in model.blocks)
        assert not any(block.draws_random for block in adapted(plan("lora")).blocks)
