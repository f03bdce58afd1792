"""Names, shapes and fresh values of an RWKV-6 model's tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import tiny_shape

from src.errors import CheckpointError, ConfigError
from src.model.rwkv6 import RWKV6Shape
from src.model.shape import ModelShape, state_key


def world_shape(n_layer: int, n_embd: int, double_extra_dim: bool = False) -> ModelShape:
    return RWKV6Shape.from_sizes(n_layer=n_layer, n_embd=n_embd, vocab_size=65536, double_extra_dim=double_extra_dim)


@pytest.mark.parametrize(
    ("shape", "parameters", "state_parameters"),
    [
        pytest.param(world_shape(24, 2048), 1_599_873_024, 3_145_728, id="1.6B"),
        pytest.param(world_shape(32, 2560), 3_099_863_040, 5_242_880, id="3B"),
        pytest.param(world_shape(32, 4096, True), 7_635_746_816, 8_388_608, id="7B"),
        pytest.param(world_shape(61, 4096, True), 14_069_088_256, 15_990_784, id="14B"),
        pytest.param(world_shape(32, 2048), 2_043_682_816, 4_194_304, id="community 2B"),
    ],
)
def test_published_models_have_their_published_sizes(shape: ModelShape, parameters: int, state_parameters: int) -> None:
    assert shape.parameter_count == parameters
    assert shape.state_parameter_count == state_parameters
    shapes = shape.parameter_shapes()
    assert len(shapes) == 28 * shape.n_layer + 6
    packed = shape.matrix_names()
    assert len(packed) == len(set(packed)) == 8 * shape.n_layer
    assert sum(shapes[name][0] * shapes[name][1] for name in packed) == shape.n_layer * (
        6 * shape.n_embd**2 + 2 * shape.n_embd * shape.dim_ffn
    )


@pytest.mark.parametrize(
    "shape",
    [
        tiny_shape(),
        tiny_shape(n_layer=1),
        tiny_shape(n_layer=3, n_embd=64, head_size=16, vocab_size=100, dim_att=96, dim_ffn=40),
        world_shape(61, 4096, True),
    ],
    ids=["tiny", "one layer", "A differs from C", "14B"],
)
def test_sizes_are_read_back_from_shapes(shape: ModelShape) -> None:
    shapes = shape.parameter_shapes()
    assert RWKV6Shape.from_shapes(shapes) == shape
    assert shape.key_problems(shapes) == []
    assert shape.key_problems(shapes | shape.state_shapes()) == []


def test_keys_and_their_order_are_those_of_a_real_file(real_inputs: Path) -> None:
    path = real_inputs / "tiny-rwkv6-3m-utf16.pth"
    real = {key: tuple(tensor.shape) for key, tensor in torch.load(path, weights_only=True, mmap=True).items()}
    shape = RWKV6Shape.from_shapes(real)
    assert shape == RWKV6Shape(
        n_layer=12,
        n_embd=128,
        dim_att=128,
        dim_ffn=448,
        vocab_size=256,
        n_head=16,
        head_size=8,
        mix_lora_width=32,
        decay_lora_width=64,
    )
    assert list(shape.parameter_shapes().items()) == list(real.items())


def test_states_are_one_square_per_head_and_layer() -> None:
    shape = tiny_shape(n_layer=2, n_embd=32, head_size=8)
    assert shape.state_shapes() == {
        "blocks.0.att.time_state": (4, 8, 8),
        "blocks.1.att.time_state": (4, 8, 8),
    }
    assert state_key(11) == "blocks.11.att.time_state"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emb.weight": None}, "emb.weight is missing"),
        ({"blocks.0.att.time_faaaa": None}, "blocks.0.att.time_faaaa is missing"),
        ({"emb.weight": (257, 32, 1)}, r"emb.weight has shape \[257, 32, 1\], expected 2 axes"),
        ({"blocks.0.att.key.weight": (0, 32)}, r"blocks.0.att.key.weight has shape \[0, 32\]"),
        ({"blocks.0.att.time_faaaa": (3, 8)}, "3 heads of size 8, together 24, but .* has 32 rows"),
        ({"blocks.3.ln1.weight": (32,)}, r"layer 2 \(blocks.2\) is missing although layer 3 is there"),
    ],
)
def test_sizes_that_cannot_be_read_are_refused(change: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = tiny_shape(n_layer=2).parameter_shapes()
    for key, value in change.items():
        shapes.pop(key, None)
        if value is not None:
            shapes[key] = value
    with pytest.raises(CheckpointError, match=message):
        RWKV6Shape.from_shapes(shapes)


def test_a_file_without_layers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no layers"):
        RWKV6Shape.from_shapes({"emb.weight": (4, 4)})


def test_every_wrong_key_is_named() -> None:
    shape = tiny_shape(n_layer=2)
    shapes = shape.parameter_shapes()
    del shapes["blocks.1.att.gate.weight"]
    shapes["blocks.0.att.dummy"] = (1,)
    shapes["blocks.1.ffn.value.weight"] = (32, 31)
    assert shape.key_problems(shapes) == [
        "missing blocks.1.att.gate.weight",
        "superfluous blocks.0.att.dummy",
        "misshapen blocks.1.ffn.value.weight of shape [32, 31] instead of [32, 112]",
    ]


def test_a_long_list_of_wrong_keys_is_cut() -> None:
    shape = tiny_shape(n_layer=2)
    shapes = shape.parameter_shapes()
    for matrix in ("receptance", "key", "value", "gate", "output"):
        del shapes[f"blocks.1.att.{matrix}.weight"]
    (problem,) = shape.key_problems(shapes)
    assert problem.endswith("blocks.1.att.value.weight and 2 more")


def test_states_are_optional_but_complete() -> None:
    shape = tiny_shape(n_layer=2)
    shapes = shape.parameter_shapes()
    shapes[state_key(1)] = (4, 8, 8)
    assert shape.key_problems(shapes) == ["missing blocks.0.att.time_state"]
    shapes[state_key(0)] = (4, 8, 7)
    assert shape.key_problems(shapes) == ["misshapen blocks.0.att.time_state of shape [4, 8, 7] instead of [4, 8, 8]"]


def test_sizes_typed_by_hand_follow_the_original_rules() -> None:
    shape = RWKV6Shape.from_sizes(n_layer=3, n_embd=96, vocab_size=300, head_size=16)
    assert (shape.dim_att, shape.dim_ffn, shape.n_head) == (96, 320, 6)  # 3.5·96 = 336, down to 10·32
    assert (shape.mix_lora_width, shape.decay_lora_width) == (32, 64)
    wide = RWKV6Shape.from_sizes(n_layer=1, n_embd=64, vocab_size=300, dim_att=128, dim_ffn=96, double_extra_dim=True)
    assert (wide.dim_att, wide.dim_ffn, wide.n_head) == (128, 96, 2)
    assert (wide.mix_lora_width, wide.decay_lora_width) == (64, 128)


def test_sizes_that_cannot_work_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        RWKV6Shape.from_sizes(n_layer=0, n_embd=100, vocab_size=0, dim_att=96, dim_ffn=33, head_size=64)
    message = str(caught.value)
    for part in ("--n_layer 0", "--vocab_size 0", "--n_embd 100", "--dim_ffn 33", "--dim_att 96"):
        assert part in message
    with pytest.raises(ConfigError, match="--head_size_a 0"):
        RWKV6Shape.from_sizes(n_layer=1, n_embd=64, vocab_size=9, head_size=0)


class TestFreshParameters:
    shape = replace(tiny_shape(n_layer=3, n_embd=32, head_size=8, vocab_size=128), dim_ffn=96)

    def test_every_key_has_its_shape_dtype_and_finite_values(self) -> None:
        fresh = self.shape.fresh_parameters(seed=0, dtype=torch.bfloat16)
        assert {key: tuple(tensor.shape) for key, tensor in fresh.items()} == self.shape.parameter_shapes()
        assert list(fresh) == list(self.shape.parameter_shapes())
        assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in fresh.values())

    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_values_given_by_formulas(self, layer: int) -> None:
        fresh = self.shape.fresh_parameters(seed=0, dtype=torch.float32)
        rest, depth = 1 - layer / 3, layer / 2
        mixed = {
            "att.time_maa_x": lambda c: 1 - c**rest,
            "att.time_maa_w": lambda c: 1 - c**rest,
            "att.time_maa_k": lambda c: 1 - c**rest,
            "att.time_maa_v": lambda c: 1 - (c**rest + 0.3 * depth),
            "att.time_maa_r": lambda c: 1 - c ** (0.5 * rest),
            "att.time_maa_g": lambda c: 1 - c ** (0.5 * rest),
            "ffn.time_maa_k": lambda c: 1 - c**rest,
            "ffn.time_maa_r": lambda c: 1 - c**rest,
        }
        for name, formula in mixed.items():
            expected = torch.tensor([formula(j / 32) for j in range(32)])
            torch.testing.assert_close(fresh[f"blocks.{layer}.{name}"].flatten(), expected, msg=name)
        decay = torch.tensor([-6 + 5 * (n / 31) ** (0.7 + 1.3 * depth) for n in range(32)])
        torch.testing.assert_close(fresh[f"blocks.{layer}.att.time_decay"].flatten(), decay)
        bonus = torch.tensor([depth * (1 - n / 31) + 0.1 * ((n + 1) % 3 - 1) for n in range(32)])
        torch.testing.assert_close(fresh[f"blocks.{layer}.att.time_faaaa"].flatten(), bonus)
        ln_x = fresh[f"blocks.{layer}.att.ln_x.weight"]
        torch.testing.assert_close(ln_x, torch.full((32,), ((layer + 1) / 3) ** 0.7))

    def test_constants(self) -> None:
        fresh = self.shape.fresh_parameters(seed=0, dtype=torch.float32)
        zero_names = ("time_maa_w1", "time_decay_w1", "att.output.weight", "ffn.value.weight", ".bias")
        for key, tensor in fresh.items():
            if key.endswith((*zero_names, "ffn.receptance.weight")):
                assert not tensor.any(), key
            elif key.endswith(("ln0.weight", "ln1.weight", "ln2.weight", "ln_out.weight")):
                assert (tensor == 1).all(), key

    def test_random_values(self) -> None:
        fresh = self.shape.fresh_parameters(seed=0, dtype=torch.float32)
        for key, limit in (
            ("emb.weight", 1e-4),
            ("blocks.1.att.time_maa_w2", 0.01),
            ("blocks.2.att.time_decay_w2", 0.01),
        ):
            assert 0.9 * limit < fresh[key].abs().max() <= limit
            assert fresh[key].mean().abs() < 0.2 * limit
        gains = {
            "head.weight": 0.5 * (128 / 32) ** 0.5,
            "blocks.0.att.receptance.weight": 1.0,
            "blocks.1.att.value.weight": 1.0,
            "blocks.1.ffn.key.weight": 1.0,
            "blocks.2.att.key.weight": 0.1,
            "blocks.2.att.gate.weight": 0.1,
        }
        for key, gain in gains.items():
            gram = fresh[key].T @ fresh[key]
            torch.testing.assert_close(gram, gain**2 * torch.eye(32), atol=1e-5, rtol=1e-5, msg=key)

    def test_a_head_with_fewer_rows_than_channels_has_gain_one_half(self) -> None:
        head = tiny_shape(vocab_size=16).fresh_parameters(0, torch.float32)["head.weight"]
        torch.testing.assert_close(head @ head.T, 0.25 * torch.eye(16), atol=1e-5, rtol=1e-5)

    def test_a_seed_determines_everything(self) -> None:
        first = self.shape.fresh_parameters(seed=7, dtype=torch.float32)
        torch.manual_seed(99)
        again = self.shape.fresh_parameters(seed=7, dtype=torch.float32)
        other = self.shape.fresh_parameters(seed=8, dtype=torch.float32)
        rounded = self.shape.fresh_parameters(seed=7, dtype=torch.bfloat16)
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert all(torch.equal(first[key].bfloat16(), rounded[key]) for key in first)
        assert not torch.equal(first["emb.weight"], other["emb.weight"])

    def test_layers_do_not_share_values(self) -> None:
        fresh = self.shape.fresh_parameters(seed=0, dtype=torch.float32)
        first, second = fresh["blocks.0.att.key.weight"], fresh["blocks.1.att.key.weight"]
        assert not torch.equal(first, second)

    def test_one_layer(self) -> None:
        fresh = tiny_shape(n_layer=1).fresh_parameters(0, torch.float32)
        assert all(tensor.isfinite().all() for tensor in fresh.values())
        torch.testing.assert_close(fresh["blocks.0.att.time_decay"].flatten()[-1], torch.tensor(-1.0))


def test_flags_that_agree_or_are_not_given_pass() -> None:
    wide = RWKV6Shape.from_sizes(n_layer=2, n_embd=64, vocab_size=9, double_extra_dim=True)
    given = {
        "n_layer": 2,
        "n_embd": 64,
        "dim_att": 64,
        "dim_ffn": 224,
        "vocab_size": 9,
        "head_size_a": 64,
        "double_extra_dim": 1,
    }
    assert wide.contradictions(given) == []
    assert wide.contradictions({"n_layer": 0, "n_embd": 0, "double_extra_dim": 0}) == []


def test_every_flag_that_contradicts_the_checkpoint_is_named_with_both_numbers() -> None:
    shape = RWKV6Shape.from_sizes(n_layer=24, n_embd=2048, vocab_size=65536)
    given = {
        "n_layer": 32,
        "n_embd": 2560,
        "dim_att": 2561,
        "dim_ffn": 8960,
        "vocab_size": 50277,
        "head_size_a": 32,
        "double_extra_dim": 1,
    }
    sentences = shape.contradictions(given)
    assert len(sentences) == 7
    numbers = zip(given.items(), (24, 2048, 2048, 7168, 65536, 64, 32), strict=True)
    for sentence, ((flag, value), actual) in zip(sentences, numbers, strict=True):
        assert sentence.startswith(f"--{flag} {value} ")
        assert f"has {actual}" in sentence
        assert "leave the flag out" in sentence
