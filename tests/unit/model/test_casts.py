"""Adapters whose tensors are cast a layer at a time compute, to the last bit, what those cast at every use do."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from factories import tiny_parameters, tiny_states
from host_cost import Operators
from recompute_cases import (
    SHAPE,
    Gradients,
    adapt,
    branching_row,
    loss_of,
    model_of,
    own_start,
    packed_row,
    shape_of,
    tokens_of,
    two_chained_chunks,
)
from tables import covering
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from src.adapters.adapter import Adapter
from src.adapters.plan import KINDS
from src.loading import LoadOptions, build_model
from src.model.casts import CastBuffer, LayerCasts
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute


def adapted(kind: str, mode: Recompute, quant_type: str | None = None, *, together: bool = True) -> LanguageModel:
    model = model_of(mode, quant_type, dtype=torch.bfloat16)
    adapt(model, kind, SHAPE.matrix_names())
    if not together:
        for adapter in adapters_of(model):
            adapter._casts = None
    return model


def adapters_of(model: LanguageModel) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def move(model: LanguageModel) -> None:
    """As an optimizer and an engine do: in place, through `.data`, and by other storage."""
    for number, adapter in enumerate(adapters_of(model)):
        for parameter in adapter.trained():
            parameter.grad = None
            step = torch.full_like(parameter, 0.01).cumsum(0)
            match number % 3:
                case 0:
                    with torch.no_grad():
                        parameter.add_(step)
                case 1:
                    parameter.data.add_(step)
                case 2:
                    parameter.data = parameter.data + step


@pytest.mark.parametrize(
    ("kind", "case", "mode", "quant_type"),
    covering(
        [("lora", own_start), ("lora", two_chained_chunks), ("bone", packed_row), ("bat", branching_row)],
        Recompute,
        ["nf4", None],
    ),
)
def test_gradients_are_bitwise_those_of_casts_at_each_use(
    kind: str, case: Callable[[LanguageModel], Gradients], mode: Recompute, quant_type: str | None
) -> None:
    """In two steps, with another choice of what is trained in the second."""
    models = [adapted(kind, mode, quant_type, together=together) for together in (True, False)]
    for step in range(2):
        found, expected = (case(model) for model in models)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
        for model in models:
            model.zero_grad()
            move(model)
            if step == 0:
                model.get_parameter("blocks.1.att.time_state").requires_grad_(False)


def with_trained_parts(
    mode: Recompute, dtype: torch.dtype, architecture: str = "x060", *, together: bool = True
) -> LanguageModel:
    """LoRA on all matrices, and everything of `time` trained in fp32."""
    shape = shape_of(architecture)
    trained = [*shape.part("time"), *shape.state_shapes()]
    options = LoadOptions(torch.device("cpu"), dtype, trained=trained)
    model = build_model({**tiny_parameters(shape, seed=1), **tiny_states(shape, seed=2)}, shape, options)
    model.set_recomputation([mode] * shape.n_layer)
    adapt(model, "lora", shape.matrix_names())
    if not together:
        for block in model.blocks:
            block.att.narrow = lambda name, dtype: None  # type: ignore[union-attr, assignment]
    return model


NARROW = re.compile(r"\.(time_(maa|decay)_w1|time_decay_w2|[wavg][12])$")
"""Maps whose gradients are products."""
MAPS = re.compile(r"\.(time_maa_w[12]|time_decay|time_decay_w[12]|[wav][012]|g[12])$")


@pytest.mark.parametrize(
    ("case", "mode", "architecture"), covering([packed_row, two_chained_chunks], Recompute, ["x060", "x070"])
)
def test_maps_that_are_trained_are_cast_with_the_adapters(
    case: Callable[[LanguageModel], Gradients], mode: Recompute, architecture: str
) -> None:
    """Their gradients are as near to fp32's as those of casts at each use, and not rounded."""
    made = partial(with_trained_parts, mode, architecture=architecture)
    together, apart = (case(made(torch.bfloat16, together=kind)) for kind in (True, False))
    exact = case(made(torch.float32))
    maps = [name for name in exact if MAPS.search(name)]
    assert len(maps) > 4 * SHAPE.n_layer
    assert together.keys() == exact.keys()
    for name, expected in exact.items():
        assert together[name].dtype == torch.float32
        errors = [(found[name] - expected).norm() for found in (together, apart)]
        assert errors[0] <= 1.05 * errors[1] + 1e-3 * expected.norm(), name
    rounded = [name for name in maps if torch.equal(together[name], together[name].bfloat16().float())]
    assert not any(map(NARROW.search, rounded))


@pytest.mark.parametrize("architecture", ["x060", "x070"])
def test_casts_of_trained_maps_are_those_of_their_layer(architecture: str) -> None:
    """But for one that only the fused operator takes narrow."""
    model = with_trained_parts(Recompute.ALL, torch.bfloat16, architecture)
    maps = [p for n, p in model.named_parameters() if MAPS.search(n) and not n.endswith("time_maa_w2")]
    with CountedCasts(model, also=maps) as c:
        loss_of(model(tokens_of(11))[0]).backward()
    assert (c.single, c.together) == (0, 2 * SHAPE.n_layer - 1)


class CountedCasts(TorchDispatchMode):
    """Counts casts of single tensors that belong to adapters, and casts of many."""

    def __init__(self, model: LanguageModel, also: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.places = {p.data_ptr() for adapter in adapters_of(model) for p in adapter.trained()}
        self.places |= {tensor.data_ptr() for tensor in also}
        self.single = self.together = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.single += name == "_to_copy" and args[0].data_ptr() in self.places
        self.together += name == "_foreach_copy_"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_how_often_is_cast(kind: str) -> None:
    """Once in each pass over a layer; the last layer's forward is followed by its second pass at once."""
    passes = {Recompute.NOTHING: 2, Recompute.INPUTS: 2, Recompute.ALL: 2}
    for mode, count in passes.items():
        model = adapted(kind, mode)
        with CountedCasts(model) as counted:
            loss_of(model(tokens_of(11))[0]).backward()
        assert (counted.single, counted.together) == (0, count * SHAPE.n_layer - 1), mode


def test_fp32_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerCasts, "cast", None)
    model = model_of(Recompute.ALL, None)
    adapt(model, "lora", SHAPE.matrix_names())
    own_start(model)
    assert model.casts._values is None


class Owner:
    def __init__(self, *sizes: int) -> None:
        self.tensors = [torch.randn(size) for size in sizes]

    def trained(self) -> list[Tensor]:
        return self.tensors


def test_layers_of_different_sizes_take_turns_with_one_buffer() -> None:
    buffer = CastBuffer()
    owners = [Owner(3, 70), Owner(200), Owner(5)]
    layers = [LayerCasts(buffer) for _ in range(2)]
    numbers = [layers[0].add(owners[0]), layers[1].add(owners[1]), layers[0].add(owners[2])]
    assert numbers == [0, 0, 2]
    wanted = [(0, 0, owners[0].tensors[0]), (0, 2, owners[2].tensors[0]), (1, 0, owners[1].tensors[0])]
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        for layer, number, tensor in [*wanted, *reversed(wanted)]:
            cast = layers[layer].cast(number, dtype)
            assert torch.equal(cast, tensor.to(dtype))
            assert cast.data_ptr() % 128 == buffer._values.data_ptr() % 128  # type: ignore[union-attr]
    before = layers[1].cast(0, torch.bfloat16).clone()
    owners[1].tensors[0].zero_()
    assert torch.equal(layers[1].cast(0, torch.bfloat16), before)
    buffer.forget()
    assert not layers[1].cast(0, torch.bfloat16).any()


def test_a_tensor_is_cast_to_another_place_too() -> None:
    """From when that is said, with the layer's others, however they have moved; other layers' casts leave it alone."""
    buffer = CastBuffer()
    owners = [Owner(3), Owner(5), Owner(200)]
    layer, other = LayerCasts(buffer), LayerCasts(buffer)
    owners[1].tensors = [torch.randn(4, 6)]
    _, number = (layer.add(owner) for owner in owners[:2])
    other.add(owners[2])
    whole = torch.zeros(4, 10, dtype=torch.bfloat16)
    layer.cast(0, torch.bfloat16)
    layer.cast_to(number, whole[:, 3:9])

    def check() -> None:
        layer.cast(0, torch.bfloat16)
        assert torch.equal(whole[:, 3:9], owners[1].tensors[0].bfloat16())
        assert not whole[:, :3].any()
        assert not whole[:, 9:].any()

    check()
    owners[1].tensors[0].mul_(2)
    other.cast(0, torch.bfloat16)
    check()
    owners[1].tensors[0] = owners[1].tensors[0] + 1
    buffer.forget()
    check()


@pytest.mark.parametrize("architecture", ["x060", "x070"])
def test_trained_vectors_that_are_used_as_one_lie_in_one_piece(architecture: str) -> None:
    """No copy is made of them, and gradients are the same bits as if they were copied."""
    models = [with_trained_parts(Recompute.ALL, torch.float32, architecture) for _ in range(2)]
    for parameter in models[1].parameters():
        parameter.data = parameter.data.clone()
    found, copies = [], []
    for model in models:
        mixers = [mixer for block in model.blocks for mixer in (block.att, block.ffn)]
        stacks = [names for mixer in mixers for names in mixer.stacks]  # type: ignore[union-attr]
        with Operators() as operators:
            loss_of(model(tokens_of(11))[0]).backward()
        copies.append(operators.calls["aten.cat.default"])
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert copies[1] - copies[0] == 2 * len(stacks)
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


def test_a_vector_trained_alone_stays_where_it_is() -> None:
    options = LoadOptions(torch.device("cpu"), torch.float32, trained=["blocks.0.att.time_maa_k"])
    model = build_model({**tiny_parameters(SHAPE, seed=1), **tiny_states(SHAPE, seed=2)}, SHAPE, options)
    model(tokens_of(5))[0].square().mean().backward()
    assert model.get_parameter("blocks.0.att.time_maa_k").grad is not None
