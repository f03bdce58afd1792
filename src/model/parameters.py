"""Names, shapes and fresh values of the tensors of an RWKV-6 (x060) model.

Everything about a model's size is in the shapes of its tensors; nothing here reads a file.

Shape legend: C channels (n_embd), A dim_att, F dim_ffn, V vocabulary, H heads, N head size,
L layers, Dm mix-LoRA width, Dd decay-LoRA width. Linear weights are [out, in].
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from src.errors import CheckpointError, ConfigError

Shape: TypeAlias = tuple[int, ...]

MIX_GROUPS = 5
"""Axis 0 of `time_maa_w2`: one token-shift modulation each for w, k, v, r, g, in this order."""

_LAYER_KEY = re.compile(r"blocks\.(\d+)\.")
_SIZE_GRAIN = 32
"""n_embd, dim_att and dim_ffn typed by hand are multiples of this, as in the original."""


@dataclass(frozen=True)
class ModelShape:
    """Every size of one model. Source: formats of the RWKV-6 "World" checkpoints."""

    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    vocab_size: int
    n_head: int
    head_size: int
    mix_lora_width: int  # 32, or 64 in 7B and 14B (--double_extra_dim 1)
    decay_lora_width: int  # 64, or 128 in 7B and 14B

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> "ModelShape":
        """Reads the sizes from the tensors of a model.

        Only what defines a size is looked at here; `key_problems` compares every key afterwards.

        Args:
            shapes: file key -> shape, without prefix.

        Raises:
            CheckpointError: A tensor that defines a size is missing or has the wrong number of
                axes, a layer is missing, or sizes contradict each other. The sentence does not
                name the file.
        """
        n_layer = _count_layers(shapes)
        vocab_size, n_embd = _axes(shapes, "emb.weight", 2)
        dim_att, _ = _axes(shapes, "blocks.0.att.key.weight", 2)
        dim_ffn, _ = _axes(shapes, "blocks.0.ffn.key.weight", 2)
        n_head, head_size = _axes(shapes, "blocks.0.att.time_faaaa", 2)
        _, mix_lora_width, _ = _axes(shapes, "blocks.0.att.time_maa_w2", 3)
        _, decay_lora_width = _axes(shapes, "blocks.0.att.time_decay_w1", 2)
        if n_head * head_size != dim_att:
            raise CheckpointError(
                f"blocks.0.att.time_faaaa has {n_head} heads of size {head_size}, together "
                f"{n_head * head_size}, but blocks.0.att.key.weight has {dim_att} rows; the two must agree"
            )
        return cls(
            n_layer=n_layer,
            n_embd=n_embd,
            dim_att=dim_att,
            dim_ffn=dim_ffn,
            vocab_size=vocab_size,
            n_head=n_head,
            head_size=head_size,
            mix_lora_width=mix_lora_width,
            decay_lora_width=decay_lora_width,
        )

    @classmethod
    def from_sizes(
        cls,
        *,
        n_layer: int,
        n_embd: int,
        vocab_size: int,
        dim_att: int = 0,
        dim_ffn: int = 0,
        head_size: int = 64,
        double_extra_dim: bool = False,
    ) -> "ModelShape":
        """Sizes of a model that does not exist yet, by the original's rules for sizes typed by hand.

        Args:
            dim_att: A; 0 means A = C.
            dim_ffn: F; 0 means 3.5·C rounded down to a multiple of 32.

        Raises:
            ConfigError: All sizes that cannot work, in one sentence.
        """
        dim_att = dim_att or n_embd
        dim_ffn = dim_ffn or int(3.5 * n_embd) // _SIZE_GRAIN * _SIZE_GRAIN
        problems = [
            f"--{flag} {value} must be at least 1"
            for flag, value in (("n_layer", n_layer), ("vocab_size", vocab_size), ("head_size_a", head_size))
            if value < 1
        ]
        problems += [
            f"--{flag} {value} must be a positive multiple of {_SIZE_GRAIN}"
            for flag, value in (("n_embd", n_embd), ("dim_att", dim_att), ("dim_ffn", dim_ffn))
            if value < 1 or value % _SIZE_GRAIN
        ]
        if head_size >= 1 and dim_att % head_size:
            problems.append(f"--dim_att {dim_att} must be a multiple of --head_size_a {head_size}")
        if problems:
            raise ConfigError("; ".join(problems))
        return cls(
            n_layer=n_layer,
            n_embd=n_embd,
            dim_att=dim_att,
            dim_ffn=dim_ffn,
            vocab_size=vocab_size,
            n_head=dim_att // head_size,
            head_size=head_size,
            mix_lora_width=64 if double_extra_dim else 32,
            decay_lora_width=128 if double_extra_dim else 64,
        )

    @property
    def parameter_count(self) -> int:
        """Number of weights, `time_state` not included."""
        return sum(math.prod(shape) for shape in parameter_shapes(self).values())

    @property
    def state_parameter_count(self) -> int:
        """Number of values in a state file: L·H·N·N."""
        return self.n_layer * self.n_head * self.head_size**2


def parameter_shapes(shape: ModelShape) -> dict[str, Shape]:
    """File key -> shape of all 28·L + 6 weights in file order, `time_state` not included."""
    channels, attention, hidden = shape.n_embd, shape.dim_att, shape.dim_ffn
    mix, decay = shape.mix_lora_width, shape.decay_lora_width
    shapes: dict[str, Shape] = {"emb.weight": (shape.vocab_size, channels)}
    for layer in range(shape.n_layer):
        block = f"blocks.{layer}"
        norms = ("ln1", "ln2", "ln0") if layer == 0 else ("ln1", "ln2")
        for norm in norms:
            shapes[f"{block}.{norm}.weight"] = (channels,)
            shapes[f"{block}.{norm}.bias"] = (channels,)
        for group in ("x", "w", "k", "v", "r", "g"):
            shapes[f"{block}.att.time_maa_{group}"] = (1, 1, channels)
        shapes[f"{block}.att.time_maa_w1"] = (channels, MIX_GROUPS * mix)
        shapes[f"{block}.att.time_maa_w2"] = (MIX_GROUPS, mix, channels)
        shapes[f"{block}.att.time_decay"] = (1, 1, attention)
        shapes[f"{block}.att.time_decay_w1"] = (channels, decay)
        shapes[f"{block}.att.time_decay_w2"] = (decay, attention)
        shapes[f"{block}.att.time_faaaa"] = (shape.n_head, shape.head_size)
        for matrix in ("receptance", "key", "value"):
            shapes[f"{block}.att.{matrix}.weight"] = (attention, channels)
        shapes[f"{block}.att.output.weight"] = (channels, attention)
        shapes[f"{block}.att.gate.weight"] = (attention, channels)
        shapes[f"{block}.att.ln_x.weight"] = (attention,)
        shapes[f"{block}.att.ln_x.bias"] = (attention,)
        shapes[f"{block}.ffn.time_maa_k"] = (1, 1, channels)
        shapes[f"{block}.ffn.time_maa_r"] = (1, 1, channels)
        shapes[f"{block}.ffn.key.weight"] = (hidden, channels)
        shapes[f"{block}.ffn.receptance.weight"] = (channels, channels)
        shapes[f"{block}.ffn.value.weight"] = (channels, hidden)
    shapes["ln_out.weight"] = (channels,)
    shapes["ln_out.bias"] = (channels,)
    shapes["head.weight"] = (shape.vocab_size, channels)
    return shapes


def state_key(layer: int) -> str:
    """File key of one layer's initial state."""
    return f"blocks.{layer}.att.time_state"


def state_shapes(shape: ModelShape) -> dict[str, Shape]:
    """File key -> [H, N, N] (head, value, key) of every layer's initial state, in layer order."""
    square = (shape.n_head, shape.head_size, shape.head_size)
    return {state_key(layer): square for layer in range(shape.n_layer)}


def quantizable_names(shape: ModelShape) -> tuple[str, ...]:
    """Keys of the 8 large matrices of each layer: the ones `--quant 1` packs."""
    matrices = (
        *(f"att.{matrix}.weight" for matrix in ("receptance", "key", "value", "gate", "output")),
        *(f"ffn.{matrix}.weight" for matrix in ("key", "receptance", "value")),
    )
    return tuple(f"blocks.{layer}.{matrix}" for layer in range(shape.n_layer) for matrix in matrices)


def key_problems(shapes: Mapping[str, Shape], shape: ModelShape) -> list[str]:
    """What keeps `shapes` from being a complete model of this shape; empty when nothing does.

    `time_state` is optional: all layers have one, or none.

    Returns:
        Phrases that name the missing, superfluous and misshapen keys.
    """
    expected = parameter_shapes(shape)
    states = state_shapes(shape)
    if any(key in shapes for key in states):
        expected |= states
    problems = []
    missing = [key for key in expected if key not in shapes]
    if missing:
        problems.append(f"missing {_some(missing)}")
    superfluous = [key for key in shapes if key not in expected]
    if superfluous:
        problems.append(f"superfluous {_some(superfluous)}")
    misshapen = [
        f"{key} of shape {list(shapes[key])} instead of {list(wanted)}"
        for key, wanted in expected.items()
        if key in shapes and tuple(shapes[key]) != wanted
    ]
    if misshapen:
        problems.append(f"misshapen {_some(misshapen)}")
    return problems


def fresh_parameters(shape: ModelShape, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Initial weights of an untrained model, in file order, `time_state` not included.

    With depth = i/(L−1) (0 when L = 1), rest = 1 − i/L and c_j = j/C for layer i:

    | parameter | value |
    |---|---|
    | att maa_x, _w, _k; ffn maa_k, _r | 1 − c^rest |
    | att maa_v | 1 − (c^rest + 0.3·depth) |
    | att maa_r, _g | 1 − c^(rest/2) |
    | time_decay | −6 + 5·(n/(A−1))^(0.7 + 1.3·depth) |
    | time_faaaa | depth·(1 − n/(A−1)) + 0.1·((n+1) mod 3 − 1) |
    | maa_w1, decay_w1 | 0 |
    | maa_w2, decay_w2 | uniform ±0.01 |
    | LayerNorms; ln_x | weight 1, bias 0; weight ((i+1)/L)^0.7, bias 0 |
    | emb | uniform ±1e-4 (ln0 normalises it) |
    | head | orthogonal, gain 0.5·√(V/C), at least 0.5 |
    | att receptance, value; ffn key | orthogonal, gain 1 |
    | att key, gate | orthogonal, gain 0.1 |
    | att output; ffn value, receptance | 0 |

    Values are drawn and computed in fp32 on the CPU from one generator in file order, then cast.

    Source: the initialisation of RWKV-LM's x060 trainer.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for key, key_shape in parameter_shapes(shape).items():
        layer = _LAYER_KEY.match(key)
        fresh = _fresh_value(key, key_shape, int(layer.group(1)) if layer else 0, shape, generator)
        assert tuple(fresh.shape) == key_shape, key
        parameters[key] = fresh.to(dtype)
    return parameters


def _fresh_value(key: str, key_shape: Shape, layer: int, shape: ModelShape, generator: torch.Generator) -> Tensor:
    """The fp32 value of one parameter; the table is `fresh_parameters`' docstring."""
    name = _LAYER_KEY.sub("", key)
    depth = layer / (shape.n_layer - 1) if shape.n_layer > 1 else 0.0
    rest = 1 - layer / shape.n_layer

    def uniform(limit: float) -> Tensor:
        return torch.empty(key_shape).uniform_(-limit, limit, generator=generator)

    def orthogonal(gain: float) -> Tensor:
        return torch.nn.init.orthogonal_(torch.empty(key_shape), gain=gain, generator=generator)

    def mixing(power: float, offset: float = 0.0) -> Tensor:
        channel = torch.arange(shape.n_embd, dtype=torch.float32) / shape.n_embd
        return (1 - (channel**power + offset)).reshape(key_shape)

    def along_attention() -> Tensor:
        return torch.arange(shape.dim_att, dtype=torch.float32) / max(shape.dim_att - 1, 1)

    def decay() -> Tensor:
        return (-6 + 5 * along_attention() ** (0.7 + 1.3 * depth)).reshape(key_shape)

    def bonus() -> Tensor:
        zigzag = 0.1 * ((torch.arange(shape.dim_att) + 1) % 3 - 1)
        return (depth * (1 - along_attention()) + zigzag).reshape(key_shape)

    def zeros() -> Tensor:
        return torch.zeros(key_shape)

    rules: dict[str, Callable[[], Tensor]] = {
        "emb.weight": lambda: uniform(1e-4),
        "head.weight": lambda: orthogonal(0.5 * math.sqrt(max(shape.vocab_size / shape.n_embd, 1.0))),
        "att.time_maa_x": lambda: mixing(rest),
        "att.time_maa_w": lambda: mixing(rest),
        "att.time_maa_k": lambda: mixing(rest),
        "att.time_maa_v": lambda: mixing(rest, offset=0.3 * depth),
        "att.time_maa_r": lambda: mixing(0.5 * rest),
        "att.time_maa_g": lambda: mixing(0.5 * rest),
        "ffn.time_maa_k": lambda: mixing(rest),
        "ffn.time_maa_r": lambda: mixing(rest),
        "att.time_maa_w1": zeros,
        "att.time_maa_w2": lambda: uniform(0.01),
        "att.time_decay": decay,
        "att.time_decay_w1": zeros,
        "att.time_decay_w2": lambda: uniform(0.01),
        "att.time_faaaa": bonus,
        "att.receptance.weight": lambda: orthogonal(1.0),
        "att.key.weight": lambda: orthogonal(0.1),
        "att.value.weight": lambda: orthogonal(1.0),
        "att.gate.weight": lambda: orthogonal(0.1),
        "att.output.weight": zeros,
        "att.ln_x.weight": lambda: torch.full(key_shape, ((layer + 1) / shape.n_layer) ** 0.7),
        "ffn.key.weight": lambda: orthogonal(1.0),
        "ffn.receptance.weight": zeros,
        "ffn.value.weight": zeros,
    }
    if name in rules:
        return rules[name]()
    if name.endswith(".bias"):
        return zeros()
    assert name in ("ln0.weight", "ln1.weight", "ln2.weight", "ln_out.weight"), name
    return torch.ones(key_shape)


def _count_layers(shapes: Mapping[str, Shape]) -> int:
    """1 + the largest layer index, every smaller one being present."""
    present = {int(match.group(1)) for match in map(_LAYER_KEY.match, shapes) if match}
    if not present:
        raise CheckpointError("it has no blocks.0 tensors, so it holds no layers")
    highest = max(present)
    if len(present) <= highest:
        first_gap = next(layer for layer in range(highest) if layer not in present)
        raise CheckpointError(
            f"layer {first_gap} (blocks.{first_gap}) is missing although layer {highest} is there; "
            f"layers 0 to {highest} are needed"
        )
    return highest + 1


def _axes(shapes: Mapping[str, Shape], key: str, count: int) -> Shape:
    """The shape of a tensor that must have `count` non-empty axes."""
    if key not in shapes:
        raise CheckpointError(f"{key} is missing")
    shape = tuple(shapes[key])
    if len(shape) != count or 0 in shape:
        raise CheckpointError(f"{key} has shape {list(shape)}, expected {count} axes, none empty")
    return shape


def _some(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
