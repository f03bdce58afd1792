"""What layers keep, for what is trained in each; tests of memory compare it with what autograd keeps."""

from __future__ import annotations

import math

import pytest
from factories import ARCHITECTURES, tiny_shape

from src.adapters.kept import KeptByLayers
from src.adapters.method import method_of
from src.config import TrainConfig
from src.model.recompute import Recompute
from src.model.shape import ModelShape

LAYERS = 4


def of_layers(
    shape: ModelShape,
    positions: int,
    mode: Recompute = Recompute.NOTHING,
    *,
    fused: bool = True,
    itemsize: int = 2,
    **flags: str,
) -> list[float]:
    config = TrainConfig.from_flags({"load_model": "m.pth", "data_file": "d", **flags})
    return KeptByLayers(method_of(config), shape, fused=fused, itemsize=itemsize).by_layer(mode, positions)


@pytest.fixture(params=ARCHITECTURES)
def shape(request: pytest.FixtureRequest) -> ModelShape:
    return tiny_shape(n_layer=LAYERS, architecture=request.param)


@pytest.mark.parametrize("part", ["blocks.1.ffn", "blocks.2.att.key"])
@pytest.mark.parametrize("positions", [0, 10])
def test_a_layer_counts_for_what_is_trained_in_it(part: str, positions: int, shape: ModelShape) -> None:
    """The one that keeps most comes first."""
    frozen = of_layers(shape, positions)
    trained = of_layers(shape, positions, train_parts=part, quant="0")
    assert len(trained) == LAYERS
    assert trained[0] > frozen[0]
    assert trained[1:] == frozen[1:]


def test_of_layers_by_turns_so_many_count_as_are_trained_at_a_time(shape: ModelShape) -> None:
    frozen = of_layers(shape, 10)
    every = of_layers(shape, 10, train_type="none")
    by_turns = of_layers(shape, 10, peft="lisa", lisa_r="2", train_parts="[]")
    assert by_turns == [*every[1:3], *frozen[2:]]  # but for the first layer, all are alike


def test_casts_do_not_grow_with_the_rows(shape: ModelShape) -> None:
    """Those of every matrix, and small ones; none of what is as wide as activations."""
    matrices = 2 * sum(math.prod(shape.parameter_shapes()[name]) for name in shape.matrix_names()) / LAYERS
    (casts, *_), (more, *_) = (of_layers(shape, positions, train_type="none") for positions in (0, 10))
    assert matrices < casts < 1.4 * matrices
    (fewer, *_), (narrow, *_) = (
        of_layers(shape, positions, train_type="none", weights="bf16") for positions in (0, 10)
    )
    assert more - casts == narrow - fewer > 0
    assert fewer < 0.4 * matrices
    assert of_layers(shape, 0, train_type="none", fused=False, itemsize=4) == [0] * LAYERS
    assert of_layers(shape, 0, Recompute.ALL, train_type="none") == [0] * LAYERS
    assert of_layers(shape, 0) == [0] * LAYERS


def test_narrow_weights_may_be_of_another_16_bit_format(shape: ModelShape) -> None:
    flags = {"train_type": "none", "weights": "bf16"}
    assert of_layers(shape, 0, fused=False, **flags) == of_layers(shape, 0, fused=False, train_type="none")


def test_adapters_have_casts_of_their_own(shape: ModelShape) -> None:
    flags = {"peft": "lora", "lora_r": "4"}
    assert of_layers(shape, 0, train_parts="time,ln", **flags) == [0] * LAYERS
    beside = of_layers(shape, 0, train_parts="ffn.key", targets="att.key", **flags)
    assert beside == [2.0 * shape.dim_ffn * shape.n_embd] * LAYERS
    assert of_layers(shape, 0, train_parts="[]", lora_dropout="0.1", **flags)[0] > 0
    assert of_layers(shape, 0, Recompute.ALL, train_parts="[]", lora_dropout="0.1", **flags) == [0] * LAYERS


@pytest.mark.parametrize("mode", Recompute)
def test_what_is_drawn_at_random_is_kept(mode: Recompute, shape: ModelShape) -> None:
    """Beside an input of each matrix; but not where it is drawn again."""
    flags = {"peft": "lora", "lora_r": "4", "train_parts": "[]"}
    (without, *_), (with_dropout, *_) = (
        of_layers(shape, 1000, mode, itemsize=2, lora_dropout=dropout, **flags) for dropout in ("0", "0.1")
    )
    assert with_dropout < without if mode is Recompute.ALL else with_dropout > without
