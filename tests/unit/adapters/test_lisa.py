"""LISA's draws, and layers that take turns: where their values are, and that each goes on from its own training."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from factories import tiny_parameters, tiny_shape
from tables import covering
from torch import Tensor

from src.adapters.lisa import Draw, Lisa
from src.adapters.method import method_of
from src.adapters.turns import LayerTurns
from src.config import TrainConfig
from src.errors import ConfigError
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.quant import FrozenLinear
from src.scratch import Scratch
from src.training.engine import resolve_hardware
from src.training.run import load_options

SHAPE = tiny_shape(n_layer=4)
BASE = tiny_parameters(SHAPE, dtype=torch.bfloat16)
TOKENS = torch.arange(1, 25)[None] % SHAPE.vocab_size


def config(**flags: object) -> TrainConfig:
    given = {"load_model": "b", "data_file": "d", "accelerator": "cpu", "peft": "lisa", **flags}
    return TrainConfig.from_flags({name: str(value) for name, value in given.items()})


def opened(folder: Path, **flags: object) -> tuple[Lisa, LanguageModel, LayerTurns]:
    chosen = config(**flags)
    method = method_of(chosen)
    assert isinstance(method, Lisa)
    options = load_options(chosen, method, resolve_hardware(chosen), SHAPE)
    model = build_model(BASE, SHAPE, options)
    return method, model, method.turns(model, BASE, options.quant_type, Scratch(folder, pytest.fail))


def trained_in(model: LanguageModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of_layers(*layers: int) -> set[str]:
    return {name for name in SHAPE.parameter_shapes() if any(name.startswith(f"blocks.{n}.") for n in layers)}


def loss_of(model: LanguageModel) -> Tensor:
    hidden, _ = model(TOKENS[:, :-1])
    return torch.nn.functional.cross_entropy(model.logits(hidden).float()[0], TOKENS[0, 1:])


def take_steps(model: LanguageModel, count: int = 2) -> None:
    """Adam's, with new moments."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def copied(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


class TestDraw:
    def layers(self, draw: Draw, periods: int, count: int = 6) -> list[tuple[int, ...]]:
        places: list[tuple[int, ...]] = [()]
        for period in range(periods):
            places.append(draw.after(places[-1], period, count))
        return places[1:]

    def test_it_is_a_function_of_the_seed(self) -> None:
        """Whichever process asks: ranks agree, and a run that goes on draws what it would have drawn."""
        drawn = self.layers(Draw(2, 10, 42), 40)
        torch.manual_seed(7)
        assert self.layers(Draw(2, 10, 42), 40) == drawn
        assert self.layers(Draw(2, 10, 43), 40) != drawn

    def test_every_layer_is_as_likely(self) -> None:
        """Of 3,000 periods each of 6 layers gets a third: 1000 ± 26."""
        counts = Counter(layer for layers in self.layers(Draw(2, 10, 42), 3000) for layer in layers)
        assert sum(counts.values()) == 6000
        assert all(abs(counts[layer] - 1000) < 4 * 26 for layer in range(6))

    def test_who_is_drawn_again_stays_in_place(self) -> None:
        drawn = self.layers(Draw(3, 10, 1), 60, 4)
        assert all(len(set(layers)) == 3 for layers in drawn)
        for before, after in itertools.pairwise(drawn):
            assert all(before.index(layer) == after.index(layer) for layer in set(before) & set(after))

    def test_all_of_them(self) -> None:
        assert self.layers(Draw(4, 10, 1), 3, 4) == [(0, 1, 2, 3)] * 3


@pytest.mark.parametrize(
    ("parts", "kept"),
    covering(
        ["emb,head", "[]", "emb,head,ln", "time", "blocks.2."],
        [{"quant": 0}, {"quant": 1, "precision": "bf16"}, {"quant": 1, "quant_type": "int8"}, {"precision": "bf16"}],
    ),
    ids=str,
)
def test_only_who_has_a_turn_changes_and_everybody_goes_on_from_his_training(
    parts: str, kept: dict[str, object], tmp_path: Path
) -> None:
    kept = {"quant": 0, **kept}
    if kept["quant"] and parts == "blocks.2.":
        pytest.skip("names packed matrices")
    method, model, turns = opened(tmp_path, lisa_r=2, train_parts=parts, **kept)
    throughout = set(method.trained_names(SHAPE))
    assert trained_in(model) == throughout
    now = copied({name: value.float() for name, value in turns.weights().items()})
    assert all(torch.equal(now[name], BASE[name].float()) for name in now)
    for layers in ((0, 1), (0, 3), (2, 3), (2, 1), (0, 1)):
        turns.change(layers)
        assert trained_in(model) == throughout | of_layers(*layers)
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        matrices = {name for name, part in model.named_modules() if isinstance(part, FrozenLinear)}
        expected = set(SHAPE.matrix_names()) - of_layers(*layers) if kept["quant"] else set()
        assert matrices == {name.removesuffix(".weight") for name in expected}
        values = turns.weights()
        assert all(torch.equal(values[name].float(), now[name]) for name in now)  # a turn alone changes nothing
        take_steps(model)
        values = copied({name: value.float() for name, value in turns.weights().items()})
        changed = {name for name in now if not torch.equal(values[name], now[name])}
        assert changed == throughout | of_layers(*layers)
        now = values
    assert set(turns.trained()) == throughout | of_layers(0, 1, 2, 3)


@pytest.mark.parametrize("quant", [0, 1])
def test_a_waiting_layer_computes_with_what_it_was_trained_to(quant: int, tmp_path: Path) -> None:
    _, model, turns = opened(tmp_path, lisa_r=1, quant=quant, train_parts="[]")
    turns.change((1,))
    take_steps(model)
    turns.change((3,))
    chosen = config(quant=quant)
    method = method_of(chosen)
    fresh = build_model(turns.weights(), SHAPE, load_options(chosen, method, resolve_hardware(chosen), SHAPE))
    if quant:  # layer 3 has its turn: it is not packed
        other = LayerTurns(fresh, turns.weights(), 1, "nf4", Scratch(tmp_path, pytest.fail))
        other.change((3,))
    with torch.no_grad():
        assert torch.equal(loss_of(model), loss_of(fresh))


def test_it_equals_a_loop_over_a_whole_model(tmp_path: Path) -> None:
    """In fp32, unpacked: the same steps by hand, on a model that trains every weight."""
    layers = ((0, 2), (1, 2), (1, 3), (0, 3))
    _, model, turns = opened(tmp_path, lisa_r=2, quant=0)
    by_hand = build_model(
        BASE, SHAPE, LoadOptions(torch.device("cpu"), torch.float32, trained=list(SHAPE.parameter_shapes()))
    )
    for drawn in layers:
        turns.change(drawn)
        take_steps(model, 3)
        for name, parameter in by_hand.named_parameters():
            parameter.requires_grad_(name in {"emb.weight", "head.weight"} | of_layers(*drawn))
        take_steps(by_hand, 3)
    values = turns.weights()
    assert all(torch.equal(values[name], by_hand.get_parameter(name)) for name in values)


@pytest.mark.parametrize("quant", [0, 1])
def test_what_was_trained_can_be_put_back(quant: int, tmp_path: Path) -> None:
    """Into a model whose layers are others' turns, or that was trained further: what is not in it is the file's."""
    _, model, turns = opened(tmp_path, lisa_r=1, quant=quant)
    turns.change((0,))
    take_steps(model)
    turns.change((2,))
    take_steps(model)
    kept = copied(turns.trained())
    with torch.no_grad():
        there = loss_of(model)
    turns.change((3,))
    take_steps(model)
    for layers in ((), (2,), (0,), (1,)):
        _, other_model, other = opened(tmp_path, lisa_r=1, quant=quant)
        for now in ((3,), layers) if layers else ():
            other.change(now)
            take_steps(other_model, 1)
        other.restore(kept)
        if not layers:
            other.change((2,))
        assert copied(other.trained()).keys() == kept.keys() | (of_layers(*layers) if layers else set())
        assert all(torch.equal(other.trained()[name], kept[name]) for name in kept)
        weights = other.weights()
        assert all(torch.equal(weights[name].float(), BASE[name].float()) for name in weights.keys() - kept.keys())
        if other.layers == (2,):
            with torch.no_grad():
                assert torch.equal(loss_of(other_model), there)


class TestScratch:
    def test_a_full_disk_keeps_them_in_memory(self, tmp_path: Path) -> None:
        said: list[str] = []
        scratch = Scratch(tmp_path / "gone", said.append)
        for seed in range(2):
            tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
            kept = scratch.keep({"a": tensor, "b": tensor[0].bfloat16()})
            assert torch.equal(kept["a"], tensor)
            assert torch.equal(kept["b"], tensor[0].bfloat16().float())
        assert len(said) == 1
        assert "layers that wait stay in memory" in said[0]

    def test_it_leaves_no_file(self, tmp_path: Path) -> None:
        scratch = Scratch(tmp_path, pytest.fail)
        kept = scratch.keep({"a": torch.arange(6.0).view(2, 3)})
        assert kept["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert not list(tmp_path.iterdir())
        assert scratch.keep({}) == {}


class TestPlan:
    def test_says_what_takes_turns_and_what_that_costs(self) -> None:
        text = method_of(config(lisa_r=2, lisa_k=7, train_parts="emb", lisa_moments="park")).describe(SHAPE)
        assert "LISA: 2 of 4 layers at a time (" in text
        assert "drawn every 7 steps, and emb: 8,224 values throughout" in text
        assert "its moments wait on the host" in text

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"lisa_r": 5}, "--lisa_r 5 is more than the model's 4 layers: lower it"),
            ({"quant": 1, "quant_head": 1}, "--train_parts head names head.weight, which is packed and cannot be trai"),
            ({"quant": 1, "train_parts": "att"}, "use --quant 0, or leave it out"),
            ({"train_parts": "nothing"}, "--train_parts nothing is part of no weight's name"),
        ],
    )
    def test_what_cannot_be_trained_is_refused(self, flags: dict[str, object], expected: str) -> None:
        with pytest.raises(ConfigError) as refused:
            method_of(config(**flags)).trained_names(SHAPE)
        assert expected in str(refused.value)

    def test_rates(self) -> None:
        method = method_of(config(train_type="states", lr_init=0.1, lr_state=0.5))
        assert method.rate_factor(SHAPE, "blocks.1.att.time_decay") == 2.0
        assert method.rate_factor(SHAPE, "blocks.1.att.time_state") == 5.0
        assert method_of(config(layerwise_lr=0)).rate_factor(SHAPE, "blocks.1.att.time_decay") == 1.0


def test_what_no_computation_uses_takes_no_turn(tmp_path: Path) -> None:
    """Such weights have no gradient, which is no reason to call them trained; they are written as in the file."""
    shape = tiny_shape(n_layer=2, architecture="x070", holds_idle=True)
    base = tiny_parameters(shape, dtype=torch.bfloat16)
    method = method_of(config(lisa_r=2))
    assert isinstance(method, Lisa)
    options = load_options(config(lisa_r=2), method, resolve_hardware(config()), shape)
    turns = method.turns(build_model(base, shape, options), base, None, Scratch(tmp_path, pytest.fail))
    turns.change((0, 1))
    in_layers = {name for name in shape.parameter_shapes() if name.startswith("blocks.")}
    assert turns.trained().keys() == (in_layers - shape.idle_names()) | {"emb.weight", "head.weight"}
    weights = turns.weights()
    assert all(torch.equal(weights[name], base[name]) for name in shape.idle_names())
