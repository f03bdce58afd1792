"""Room behind a matrix and its inputs, in which an adapter computes by one product what two are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import tiny_parameters, tiny_shape
from recompute_cases import adapt, model_of, shape_of, tokens_of
from torch import Tensor, nn

from src.adapters.adapter import Adapter
from src.adapters.low_rank import LowRank
from src.adapters.plan import KINDS, AdapterPlan
from src.loading import LoadOptions, build_model
from src.model import rwkv6, rwkv7
from src.model.casts import CastBuffer, LayerCasts
from src.model.language_model import LanguageModel
from src.model.layers import Linear, Mixer
from src.model.recompute import Recompute
from src.ops.products import ANYWHERE, MixPlaces, has_room
from src.quant import DequantizationWorkspace, FrozenLinear

OUT, IN, R = 24, 32, 8
MIXED = {"att.receptance", "att.key", "ffn.key"}
"""Names in both architectures."""
MIXED_OF_RWKV6 = {"att.value", "att.gate", "ffn.receptance"}
"""Further ones."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(room: int = R) -> Linear:
    made = Linear(IN, OUT)
    made.weight = nn.Parameter(normal(OUT, IN, seed=1).bfloat16(), requires_grad=False)
    if room:
        made.reserve(room)
    return made


def around(base: Linear | FrozenLinear, kind: str = "lora", r: int = R, seed: int = 2, cast: bool = True) -> Adapter:
    shapes = KINDS[kind].parameter_shapes(r, base.out_features, base.in_features)
    values = {name: normal(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    adapter = KINDS[kind](base, values, **({"scale": 0.5} if kind == "lora" else {}))
    if cast:
        adapter.cast_with(LayerCasts(CastBuffer()))
    return adapter


def inputs(count: int, room: int, rows: int = 5) -> list[Tensor]:
    """Side by side, with NaN in the room."""
    whole = torch.full((count, 2, rows, IN + room), torch.nan, dtype=torch.bfloat16)
    whole[..., :IN] = normal(count, 2, rows, IN, seed=9)
    return [each[..., :IN].requires_grad_() for each in whole.unbind()]


def results(adapters: list[Adapter], room: int) -> list[Tensor]:
    """Products, and gradients of inputs and parameters."""
    given = inputs(len(adapters), room)
    for number, adapter in enumerate(adapters):
        adapter._casts._buffer.forget()  # type: ignore[union-attr]
        for parameter in adapter.trained():
            parameter.grad = None
        assert number == 0 or adapters[0].joins([adapter])
    ys = adapters[0].joint(adapters, given)
    torch.autograd.backward(ys, [normal(*y.shape, seed=20 + i).to(y.dtype) for i, y in enumerate(ys)])
    return [*(y.detach() for y in ys), *(x.grad for x in given), *(p.grad for a in adapters for p in a.trained())]  # type: ignore[misc]


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters computed by single products, at each time some did."""
    calls: list[int] = []
    made = LowRank._single_products.__func__  # type: ignore[attr-defined]

    def noted(cls: type[LowRank], adapters: list[Adapter], *rest: object) -> list[Tensor]:
        calls.append(len(adapters))
        return made(cls, adapters, *rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(LowRank, "_single_products", classmethod(noted))
    return calls


@pytest.mark.parametrize("count", [1, 3])
def test_it_is_the_same_as_two_products(count: int, single: list[int]) -> None:
    """And goes on being so when what is trained has moved."""
    with_room, without = ([around(dense(), seed=40 * i, cast=False) for i in range(count)] for _ in range(2))
    for adapters in (with_room, without):
        layer = LayerCasts(CastBuffer())
        for adapter in adapters:
            adapter.cast_with(layer)
    for adapter in with_room:
        adapter.take_room()
    for _ in range(2):
        found, expected = results(with_room, R), results(without, 0)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.double() - theirs.double()).norm() < 1e-2 * theirs.double().norm()
        for adapter in (*with_room, *without):
            for parameter in adapter.trained():
                parameter.data.add_(0.3)
    assert single == [count, count]


def test_it_is_exact(single: list[int]) -> None:
    """Sums are rounded once."""
    adapter = around(dense())
    adapter.take_room()
    (y, *_) = results([adapter], R)
    (x,) = inputs(1, R)
    a, b = (p.detach().bfloat16().double() for p in adapter.trained())
    hidden = (0.5 * x.double() @ a.t()).bfloat16().double()
    exact = x.double() @ adapter.base.weight.double().t() + hidden @ b.t()
    assert (y.double() - exact).norm() < 2.5e-3 * exact.norm()
    assert single == [1]


def test_what_is_trained_is_used_as_it_is_now(single: list[int]) -> None:
    """Also where D x is known from before, so that nothing else asks for what is cast."""
    adapter = around(dense())
    adapter.take_room()
    x = inputs(1, R)[0].detach().flatten(0, 1)
    with torch.no_grad():
        kept = adapter.kept(x)
        adapter.lora_B.add_(1)  # type: ignore[operator, union-attr]
        adapter._casts._buffer.forget()  # type: ignore[union-attr]
        y = adapter.product(x, kept)
        exact = x.double() @ adapter.base.weight.double().t() + kept[-1].double() @ adapter.trained()[1].double().t()
    assert (y.double() - exact).norm() < 5e-3 * exact.norm()
    assert single == [1]


def test_inputs_without_room_are_two_products(single: list[int]) -> None:
    adapter, other = around(dense()), around(dense())
    adapter.take_room()
    for ours, theirs in zip(results([adapter], 0), results([other], 0), strict=True):
        assert torch.equal(ours, theirs)
    one_row = inputs(1, R, rows=1)[0][:1]  # of which nothing shows whether there is room
    adapter(one_row)
    adapter(torch.zeros(5, IN + R)[:, :IN])  # of another dtype than W
    with torch.no_grad():
        adapter.base.weight.data = adapter.base.weight.data.clone(memory_format=torch.contiguous_format)
    for ours, theirs in zip(results([adapter], R), results([other], R), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert single == []


def shared_out(adapter: Adapter) -> Adapter:
    """As stage 3 leaves it: every tensor is empty, and its parts are elsewhere."""
    for parameter in adapter.parameters():
        parameter.data = parameter.data.new_empty(0)
    return adapter


def packed() -> FrozenLinear:
    return FrozenLinear.from_weight(normal(OUT, IN, seed=1), "nf4", torch.bfloat16, workspace=DequantizationWorkspace())


@pytest.mark.parametrize(
    ("made", "takes"),
    [
        (lambda: around(dense()), True),
        (lambda: around(dense(16), r=16), True),
        (lambda: around(dense(room=0)), False),
        (lambda: shared_out(around(dense(room=0))), False),
        (lambda: around(dense(), cast=False), False),
        (lambda: around(dense(), "bone"), False),
        (lambda: around(dense(), "bat"), False),
        (lambda: around(packed()), False),
    ],
)
def test_who_takes_room(made: Callable[[], Adapter], takes: bool) -> None:
    adapter = made()
    before = None if isinstance(adapter.base, FrozenLinear) else adapter.base.weight.clone()
    for _ in range(2):
        adapter.take_room()
        assert (adapter.room > 0) is takes
    if before is not None:
        assert torch.equal(adapter.base.weight, before)
        assert adapter.base.weight.ndim == 1 or has_room(adapter.base.weight, adapter.room) is (
            takes or before.is_contiguous()
        )
        assert not adapter.base.weight.requires_grad


def test_rows_that_are_no_whole_vectors_have_no_room() -> None:
    shape = tiny_shape(n_embd=36, head_size=12)
    assert {key.split(".", 2)[2] for key in AdapterPlan("lora", 8).rooms(tiny_shape())} >= {"att.key.weight"}
    assert AdapterPlan("lora", 8).rooms(shape) == {}


def reserving(plan: AdapterPlan, architecture: str, *, reserves: bool = True) -> LanguageModel:
    shape = shape_of(architecture)
    options = LoadOptions(torch.device("cpu"), torch.bfloat16, adapters=plan, reserves_room=reserves)
    return build_model(tiny_parameters(shape), shape, options)


def test_a_model_elsewhere_takes_none() -> None:
    model = model_of(Recompute.ALL, None, dtype=torch.bfloat16)
    adapt(model, "lora", model.shape.matrix_names())
    model.take_room()
    assert not any(module.room for module in model.modules() if isinstance(module, Adapter))


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("x060", name) for name in sorted(MIXED | MIXED_OF_RWKV6)] + [("x070", name) for name in sorted(MIXED)],
)
def test_a_matrix_finds_room_behind_the_mix_that_it_takes(
    architecture: str, name: str, single: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on its own: where all have room, a mix has it whoever takes it."""

    def placed(mixes: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        """As kernels do it."""

        def mixed(z: Tensor, *rest: Any, places: MixPlaces = ANYWHERE, **options: Any) -> tuple[Tensor, ...]:
            found = mixes(z, *rest, **options)
            empty = places.empty_mixes(len(found), z)
            return tuple(place.copy_(each) for place, each in zip(empty, found, strict=True))

        return mixed

    for module, functions in ((rwkv6, ("shift_mixes", "modulated_shift_mixes")), (rwkv7, ("shift_mixes",))):
        for function in functions:
            monkeypatch.setattr(module, function, placed(getattr(module, function)))
    model = reserving(AdapterPlan("lora", 8, targets=(name,)), architecture)
    for module in model.modules():
        if isinstance(module, Mixer):
            module.take_room()
    with torch.no_grad():
        model(tokens_of(5))
    assert single == [1] * len(model.blocks)


@pytest.mark.parametrize(
    ("plan", "architecture", "widths"),
    [
        (AdapterPlan("lora", 8), "x060", {8}),
        (AdapterPlan("pissa", 16), "x070", {16}),
        (AdapterPlan("lora", 8, targets=("att.key", "ffn.value")), "x070", {8}),
        (AdapterPlan("lora", 12), "x060", set()),
        (AdapterPlan("lora", 8, dropout=0.1), "x060", set()),
        (AdapterPlan("lora", 8, targets=("att.output",)), "x060", set()),
        (AdapterPlan("bone", 8), "x060", set()),
        (AdapterPlan("bat", 8), "x070", set()),
    ],
)
def test_what_a_plan_reserves(plan: AdapterPlan, architecture: str, widths: set[int]) -> None:
    """Where the input is a mix of tokens that nothing else takes; the values of the matrices stay."""
    shape = shape_of(architecture)
    rooms = plan.rooms(shape)
    assert set(rooms.values()) == widths
    names = {key.split(".", 2)[2].removesuffix(".weight") for key in rooms}
    mixed = {"x060": MIXED | MIXED_OF_RWKV6, "x070": MIXED}[architecture]
    assert names == (mixed & set(plan.targets) if plan.targets else mixed if widths else set())
    models = [reserving(plan, architecture, reserves=reserves) for reserves in (True, False)]
    for (key, ours), (_, theirs) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
        room = rooms.get(key.replace(".base.", "."), 0)
        extra = ours.untyped_storage().nbytes() - theirs.untyped_storage().nbytes()
        assert extra == (2 * room * len(ours) if ours.ndim else 0)
