"""Where an RWKV-7 layer's frozen small maps lie: their parameters stay what a checkpoint says they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_parameters, tiny_shape
from torch import nn

from src.checkpoint import open_checkpoint, save_model
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.small_maps import hidden_width

SHAPE = tiny_shape(n_layer=3, architecture="x070", holds_idle=True)
VALUES = {key: value.bfloat16() for key, value in tiny_parameters(SHAPE).items()}
MAPS = {0: "wa", 1: "wav", 2: "wav"}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is said to be on one."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def model_of(dtype: torch.dtype = torch.bfloat16, **options: Any) -> LanguageModel:
    return build_model(VALUES, SHAPE, LoadOptions(torch.device("cpu"), dtype, **options))


def mixer(model: LanguageModel, layer: int) -> Any:
    return model.blocks[layer].att  # type: ignore[union-attr]


@pytest.mark.parametrize("layer", MAPS)
def test_frozen_maps_lie_in_one_room_with_the_values_and_shapes_of_the_file(layer: int) -> None:
    own = mixer(model_of(), layer)
    maps = own._small_maps()
    letters = MAPS[layer]
    width = hidden_width({"w": 16, "a": 12, "v": 6} if layer else {"w": 16, "a": 12})
    assert width == 24
    assert maps.first.shape == (len(letters), 32, width)
    assert maps.second.shape == (len(letters), width, 32)
    for number, letter in enumerate(letters):
        bias, first, second = (VALUES[f"blocks.{layer}.att.{letter}{which}"] for which in range(3))
        for which, value in enumerate((bias, first, second)):
            parameter = getattr(own, f"{letter}{which}")
            assert parameter.shape == value.shape
            assert torch.equal(parameter, value)
            room = maps.first if which == 1 else maps.second
            assert parameter.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
        small = first.shape[1]
        assert torch.equal(maps.first[number], torch.cat([first, first.new_zeros(32, width - small)], 1))
        rest = second.new_zeros(width - 1 - small, 32)
        assert torch.equal(maps.second[number], torch.cat([second, rest, bias.view(1, -1)]))
    assert torch.equal(maps.gate_first, VALUES[f"blocks.{layer}.att.g1"])
    assert torch.equal(maps.gate_second, VALUES[f"blocks.{layer}.att.g2"])
    if layer == 0:  # what nothing uses stays where it is
        assert own.v1.is_contiguous()


@pytest.mark.parametrize("options", [{"lays_out": False}, {"dtype": torch.float32}])
def test_where_they_may_not_or_need_not_they_lie_by_themselves(options: dict[str, Any]) -> None:
    model = model_of(**options)
    assert all(mixer(model, layer)._small_maps() is None for layer in MAPS)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["w0", "a1", "v2", "g1", "g2"])
def test_one_that_is_trained_lies_by_itself(name: str) -> None:
    model = model_of(trained={f"blocks.1.att.{name}"})
    assert mixer(model, 1)._small_maps() is None
    assert getattr(mixer(model, 1), name).is_contiguous()
    assert mixer(model, 2)._small_maps() is not None


def test_one_that_is_trained_for_a_while_comes_back() -> None:
    model = model_of()
    own = mixer(model, 1)
    before = own._small_maps()
    trained = nn.Parameter(torch.ones(32, 12))
    model.place("blocks.1.att.a1", trained)
    assert own.a1 is trained
    assert own._small_maps() is None
    model.place("blocks.1.att.a1", nn.Parameter(torch.full((32, 12), 2.0).bfloat16(), requires_grad=False))
    after = own._small_maps()
    assert after.first.data_ptr() == before.first.data_ptr()
    assert torch.equal(after.first[1, :, :12], torch.full((32, 12), 2.0).bfloat16())
    assert not after.first[1, :, 12:].any()
    own.w2.requires_grad_()
    assert own._small_maps() is None


def test_a_parameter_that_somebody_replaces_counts() -> None:
    own = mixer(model_of(), 1)
    own.w1 = nn.Parameter(own.w1.detach().clone(), requires_grad=False)
    assert own._small_maps() is None


def test_files_hold_them_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    weights = {key: model.get_parameter(key).detach() for key in VALUES if not re.match("emb", key)}
    monkeypatch.undo()
    paths = tmp_path / "plain.pth", tmp_path / "laid out.pth"
    save_model(paths[0], VALUES)
    save_model(paths[1], {**VALUES, **weights})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert open_checkpoint(paths[1]).info.shape == SHAPE
