"""Adapters of matrices that take mixes of one tensor compute at once: what each computes alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from factories import tiny_parameters
from recompute_cases import (
    Gradients,
    adapt,
    branching_row,
    model_of,
    own_start,
    packed_row,
    shape_of,
    two_chained_chunks,
)
from tables import covering

from src.adapters.adapter import Adapter
from src.adapters.bone import Bone
from src.adapters.lora import LoRA
from src.adapters.plan import AdapterPlan
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.layers import Linear, join
from src.model.recompute import Recompute

ATTENTION = ("receptance", "key", "value", "gate")


def adapters_of(model: LanguageModel) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


@pytest.mark.parametrize(
    ("kind", "case", "mode", "quant_type", "architecture"),
    covering(
        ["lora", "bone", "bat"],
        [own_start, packed_row, branching_row, two_chained_chunks],
        Recompute,
        ["nf4", None],
        ["x060", "x070"],
    ),
)
def test_gradients_are_those_of_each_alone(
    kind: str,
    case: Callable[[LanguageModel], Gradients],
    mode: Recompute,
    quant_type: str | None,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found() -> Gradients:
        model = model_of(mode, quant_type, architecture=architecture)
        adapt(model, kind, model.shape.matrix_names())
        return case(model)

    calls: list[int] = []
    joint = Adapter.joint.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, matrices: Any, inputs: Any) -> Any:
        calls.append(len(matrices))
        return joint(cls, matrices, inputs)

    monkeypatch.setattr(Adapter, "joint", classmethod(noted))
    together = found()
    assert max(calls) == (4 if architecture == "x060" else 2)
    monkeypatch.setattr(Adapter, "joins", lambda self, others: False)
    calls.clear()
    alone = found()
    assert max(calls) == 1
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        assert float((together[name] - expected).norm()) <= 2e-5 * float(expected.norm()), name


def linear() -> Linear:
    return Linear(16, 12).requires_grad_(False)


def lora(scale: float = 1.0, r: int = 4, dropout: float = 0.0) -> LoRA:
    values = {name: torch.zeros(size) for name, size in LoRA.parameter_shapes(r, 12, 16).items()}
    return LoRA(linear(), values, scale=scale, dropout=dropout)


def bone(r: int = 4) -> Bone:
    return Bone(linear(), {"bone": torch.zeros(r, 12)})


@pytest.mark.parametrize(
    ("matrices", "joins"),
    [
        ([lora(), lora()], True),
        ([lora(2.0), lora(2.0), lora(2.0)], True),
        ([bone(), bone()], True),
        ([lora(), bone()], False),
        ([lora(), linear()], False),
        ([linear(), lora()], False),
        ([linear(), linear()], False),
        ([lora(), lora(2.0)], False),
        ([lora(), lora(r=2)], False),
        ([bone(), bone(r=3)], False),
        ([lora(dropout=0.1), lora(dropout=0.1)], False),
        ([lora(dropout=0.1).eval(), lora(dropout=0.1).eval()], True),
    ],
)
def test_those_join_that_are_alike(matrices: list[Any], joins: bool) -> None:
    assert join(matrices) is joins


@pytest.mark.parametrize("kind", ["lora", "bone"])
def test_what_joins_is_cast_side_by_side(kind: str) -> None:
    """As it lies then, its products are batched (`ops.products`); maps that are trained, too, do not stand between."""
    shape = shape_of("x060")
    plan = AdapterPlan(kind, r=16)
    options = LoadOptions(torch.device("cpu"), torch.bfloat16, trained=list(shape.part("time")), adapters=plan)
    model = build_model(tiny_parameters(shape), shape, options)
    assert model.blocks[0].att.narrow("time_maa_w1", torch.bfloat16) is not None  # type: ignore[union-attr, operator]
    for block in model.blocks:
        joined: list[Any] = [getattr(block.att, name) for name in ATTENTION]
        for name in joined[0].names:
            places = [adapter.used(name, torch.bfloat16).storage_offset() for adapter in joined]
            steps = {after - before for before, after in pairwise(places)}
            assert len(steps) == 1
            assert steps.pop() > 0
