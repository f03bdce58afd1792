"""The RWKV-7 (x070, "Goose") architecture: its mixers, and the one table of its names, shapes and values.

What is unusual about it:
  - no attention: every head keeps one N x N matrix that decays per key channel, forgets what one direction of key
    space held, and stores a new value there (`ops.wkv7`): the delta rule; its learned start, `time_state`, is what
    state tuning trains;
  - token shift by static amounts (`x_r` ...): each input is blended with the token before;
  - decay, in-context learning rate, value residual and gate come from small two-layer maps of the input
    (`w0 w1 w2`, `a0 a1 a2`, `v0 v1 v2`, `g1 g2`), whose widths follow from nothing but the file;
  - every layer's values are pulled towards those of layer 0, which hands them on: `handed`, an argument;
  - the feed-forward has no gate; no positions, no biases in the matrices, embedding and head never tied.

Parameter names and shapes are the checkpoint's. Zero, learned and carried states are one code path.

Legend: B rows, T tokens, C = H·N channels, H heads, N head size, F feed-forward width, V vocabulary, L layers, Dw,
Da, Dv, Dg widths of the small maps.

Source: "RWKV-7 Goose with Expressive Dynamic State Evolution" (arXiv 2503.14456).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from src.errors import CheckpointError, ConfigError
from src.layout import SegmentLayout
from src.model.layers import ChannelMixer, Linear, TimeMixer, join, squared_relu_gradients, together
from src.model.shape import ModelShape, Shape, axes_of, count_layers, orthogonal, uniform
from src.model.small_maps import SmallMaps, hidden_width
from src.ops import delta_rule_cuda, delta_rule_whole, elementwise_cuda, wkv7_cuda
from src.ops.delta_rule import group_norm_bonus_gate, removal_and_replacement, value_residual
from src.ops.elementwise import shift_mixes, squared_relu
from src.ops.kernels import Kernel
from src.ops.node import Node, once
from src.ops.products import mix_places
from src.ops.small_maps import Maps, small_maps
from src.ops.wkv7 import wkv7, wkv7_branching
from src.ops.wkv7_cuda import CUDA_HEAD_SIZE, kernel_is_available
from src.quant import FrozenLinear

LN_X_EPS = 64e-5
"""Of the group norm, whatever the head size."""

_SIZE_GRAIN = 32
"""n_embd and dim_ffn typed by hand are multiples of this, as are the small maps' widths of fresh models."""

_MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
_MAPS = ("w0", "w1", "w2", "a0", "a1", "a2", "v0", "v1", "v2", "g1", "g2")
_IDLE = ("v0", "v1", "v2")
"""What layer 0 may have and does not use: its values are what the others are pulled towards."""


@dataclass(frozen=True)
class RWKV7Shape(ModelShape):
    """Every size of one RWKV-7 model. Source: formats of the RWKV-7 "World" and G1 checkpoints.

    Attributes:
        holds_idle: whether layer 0 has a value residual's weights, which the reference trainer writes.
    """

    architecture: ClassVar[str] = "x070"
    family: ClassVar[str] = "RWKV-7 (x070)"
    merged_state: ClassVar[str] = (
        "this program starts from the state, but\n"
        "         the rwkv package (0.8.32) and RWKV-Runner (1.9.11) ignore a state inside an RWKV-7 model:\n"
        "         RWKV-Runner takes the state file itself; with rwkv, state[3 * i + 1] of a fresh state is layer i's"
    )

    merged_note: ClassVar[str] = (
        "The rwkv package and RWKV-Runner ignore a state inside an RWKV-7 model; give them the state itself"
    )

    decay_width: int  # Dw
    rate_width: int  # Da
    value_width: int  # Dv
    gate_width: int  # Dg
    holds_idle: bool = False

    @classmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        """See ModelShape."""
        return any("att.r_k" in key for key in keys)

    @classmethod
    def relative(cls, keys: Collection[str]) -> str:
        """See ModelShape."""
        for part, name in (
            (".qkv.qq.weight", "RWKV-7b, a research model with an attention beside the recurrence"),
            (".ffn.s_emb.weight", "RWKV-7a, a research model with embeddings inside its feed-forwards"),
            (".ffn.enn.weight", "RWKV-8 rc00, a research model"),
        ):
            if any(part in key for key in keys):
                return f"is an {name}; this program trains RWKV-7 (x070) and RWKV-6 (x060)"
        return ""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> RWKV7Shape:
        """See ModelShape."""
        n_layer = count_layers(shapes)
        vocab_size, n_embd = axes_of(shapes, "emb.weight", 2)
        dim_ffn, _ = axes_of(shapes, "blocks.0.ffn.key.weight", 2)
        n_head, head_size = axes_of(shapes, "blocks.0.att.r_k", 2)
        if n_head * head_size != n_embd:
            raise CheckpointError(
                f"blocks.0.att.r_k has {n_head} heads of size {head_size}, together {n_head * head_size}, but "
                f"emb.weight has {n_embd} channels; the two must agree"
            )
        holds_idle = any(f"blocks.0.att.{name}" in shapes for name in _IDLE)
        decay, rate, gate = (axes_of(shapes, f"blocks.0.att.{letter}1", 2)[1] for letter in "wag")
        value = 0
        if n_layer > 1 or holds_idle:
            value = axes_of(shapes, f"blocks.{1 if n_layer > 1 else 0}.att.v1", 2)[1]
        widths = (decay, rate, value, gate)
        return cls(n_layer, n_embd, n_embd, dim_ffn, vocab_size, n_head, head_size, *widths, holds_idle)

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
    ) -> RWKV7Shape:
        """Sizes of a model that does not exist yet, with the reference trainer's rule for the small maps' widths.

        Args:
            dim_att: C, or 0.
            dim_ffn: F; 0 means 4·C.
            double_extra_dim: belongs to RWKV-6.

        Raises:
            ConfigError: All sizes that cannot work, in one sentence.
        """
        dim_ffn = dim_ffn or 4 * n_embd
        problems = [
            f"--{flag} {value} must be at least 1"
            for flag, value in (("n_layer", n_layer), ("vocab_size", vocab_size), ("head_size_a", head_size))
            if value < 1
        ]
        problems += [
            f"--{flag} {value} must be a positive multiple of {_SIZE_GRAIN}"
            for flag, value in (("n_embd", n_embd), ("dim_ffn", dim_ffn))
            if value < 1 or value % _SIZE_GRAIN
        ]
        if head_size >= 1 and n_embd % head_size:
            problems.append(f"--n_embd {n_embd} must be a multiple of --head_size_a {head_size}")
        if dim_att not in (0, n_embd):
            problems.append(f"--dim_att {dim_att} must be --n_embd {n_embd} in RWKV-7: leave it out")
        if double_extra_dim:
            problems.append("--double_extra_dim 1 belongs to RWKV-6: leave it out")
        if problems:
            raise ConfigError("; ".join(problems))
        # decay, rate, value, gate
        widths = (max(round(f * n_embd**0.5 / _SIZE_GRAIN), 1) * _SIZE_GRAIN for f in (2.5, 2.5, 1.7, 5.0))
        return cls(n_layer, n_embd, n_embd, dim_ffn, vocab_size, n_embd // head_size, head_size, *widths)

    def contradictions(self, given: Mapping[str, int]) -> list[str]:
        """See ModelShape."""
        sentences = super().contradictions(given)
        if given.get("double_extra_dim"):
            sentences.append("--double_extra_dim 1 belongs to RWKV-6, and the checkpoint is RWKV-7: leave it out")
        divisor = given.get("head_size_divisor", 8)
        if divisor != 8:
            sentences.append(
                f"--head_size_divisor {divisor} would change an eps that is {LN_X_EPS:g} in every RWKV-7 model: leave "
                "it out"
            )
        return sentences

    def time_mix_shapes(self, layer: int) -> dict[str, Shape]:
        """See ModelShape."""
        C = self.n_embd
        shapes: dict[str, Shape] = dict.fromkeys(_MIXES, (1, 1, C))
        widths = {"w": self.decay_width, "a": self.rate_width}
        if layer or self.holds_idle:
            widths["v"] = self.value_width
        for letter, width in widths.items():
            shapes |= {f"{letter}0": (1, 1, C), f"{letter}1": (C, width), f"{letter}2": (width, C)}
        return {
            **shapes,
            "g1": (C, self.gate_width),
            "g2": (self.gate_width, C),
            "k_k": (1, 1, C),
            "k_a": (1, 1, C),
            "r_k": (self.n_head, self.head_size),
            "receptance.weight": (C, C),
            "key.weight": (C, C),
            "value.weight": (C, C),
            "output.weight": (C, C),
            "ln_x.weight": (C,),
            "ln_x.bias": (C,),
        }

    def channel_mix_shapes(self) -> dict[str, Shape]:
        """See ModelShape."""
        C, F = self.n_embd, self.dim_ffn
        return {"x_k": (1, 1, C), "key.weight": (F, C), "value.weight": (C, F)}

    def time_mixer(self, layer: int, head_size_divisor: int) -> TimeMix:
        """See ModelShape; the group norm's eps is the same with every divisor."""
        return TimeMix(self, layer)

    def channel_mixer(self) -> ChannelMix:
        """See ModelShape."""
        return ChannelMix(self)

    def rate_factor(self, key: str) -> float:
        """2 for the bare decay vectors, as in RWKV-LM's trainer."""
        return 2.0 if key.endswith("att.w0") else 1.0

    def decays(self, key: str) -> bool:
        """See ModelShape: matrices alone. The small maps suffer from it, says RWKV-LM's trainer."""
        return key.endswith(".weight")

    def idle_names(self) -> frozenset[str]:
        """See ModelShape."""
        return frozenset(f"blocks.0.att.{name}" for name in _IDLE) if self.holds_idle else frozenset()

    def part(self, name: str) -> dict[str, Shape]:
        """See ModelShape; `time` is all of the mixers but matrices and norms, which RWKV-6 calls `time_...`."""
        shapes = {key: shape for key, shape in self.parameter_shapes().items() if key not in self.idle_names()}
        if name == "time":
            return {key: shape for key, shape in shapes.items() if not key.endswith((".weight", ".bias"))}
        return {key: shape for key, shape in shapes.items() if name in key}

    def kernels(self, *, trains_weights: bool) -> tuple[Kernel, ...]:
        """See ModelShape."""
        mixes = ((6, False), (1, False))
        return (
            *elementwise_cuda.layer_kernels(self.n_embd, mixes, sums=trains_weights),
            *delta_rule_cuda.layer_kernels(self.head_size, sums=trains_weights),
            *(wkv7_cuda.KERNELS if self.head_size == CUDA_HEAD_SIZE else ()),
        )

    def kept_values(self, *, inputs_again: bool, fused: bool, trained: Collection[str]) -> int:
        """See ModelShape.

        What enters both mixers, what the recurrence takes and its checkpoints, keys, rate and value residual's amount
        before they are made of, y and gate, the feed-forward's hidden layer and those of decay and gate. Where inputs
        are not made again, besides statistics of norms; mixes whose amounts are frozen keep nothing. What layer 0 hands
        on is kept once, not per layer. Where operators are not `fused` they keep more, the keys' norm in fp32 for one,
        and the starts of sequences, of 128 tokens or more.
        """
        hidden = self.decay_width
        if fused and not any(f"att.{map_}" in trained for map_ in _MAPS):
            # The hidden values of decay, rate and value residual lie together.
            hidden = 3 * hidden_width({"w": self.decay_width, "a": self.rate_width, "v": self.value_width})
        # Of the recurrence six inputs and, with its kernel, three times as much as one of them.
        kept = (16 if fused else 20) * self.n_embd + self.dim_ffn + hidden + self.gate_width
        return kept if inputs_again else kept + 8

    def trained_inputs(self, *, inputs_again: bool, fused: bool) -> list[tuple[int, frozenset[str]]]:
        """See ModelShape; where element-wise operators are not `fused` the time mix's inputs lie in one piece."""
        C = self.n_embd
        mixed = [{"receptance.weight"}, {"w1"}, {"key.weight"}, {"value.weight", "v1"}, {"a1"}, {"g1"}]
        inputs = [(C, names) for names in mixed] if fused else [(6 * C, set().union(*mixed))]
        inputs += [(C, {"output.weight"}), (self.rate_width, {"a2"}), (self.value_width, {"v2"})]
        inputs += [] if fused else [(C, {"k_a"}), (C, {"r_k"})]
        inputs += [] if inputs_again else [(C, set(_MIXES))]
        of_time_mix = [(values, frozenset(f"att.{name}" for name in names)) for values, names in inputs]
        of_channel_mix = [(C, frozenset({"ffn.key.weight"})), (self.dim_ffn, frozenset({"ffn.value.weight"}))]
        return of_time_mix + of_channel_mix + ([] if inputs_again else [(C, frozenset({"ffn.x_k"}))])

    def passing_bytes_again(self, adapters: str) -> int:
        """See ModelShape; what layer 0 hands on and its gradient are among it."""
        of_channels = {"": 22, "bone": 30, "bat": 36}.get(adapters, 32)
        return 2 * (of_channels * self.n_embd + 2 * self.dim_ffn)

    def fresh_mixer_value(self, layer: int, name: str, key_shape: Shape, generator: torch.Generator) -> Tensor:
        """See ModelShape.

        With depth = i/(L-1) (0 when L = 1), rest = 1 - i/L, c_n = n/C, e_n = n/(C-1), lin = e - 0.5 and
        zig = z·|z| for z that goes from -1 to 1 along each head:

        | parameter | value |
        |---|---|
        | x_r, x_g / x_w, x_a / x_k, x_v | 1 - c^(0.2 rest) / 1 - c^(0.9 rest) / 1 - c^(0.7 rest) |
        | ffn.x_k | 1 - c^(rest⁴) |
        | w0 | -5.5 + 6·e^(1 + depth^0.3) + 2.5·zig |
        | a0 | -0.19 + 0.3·zig + 0.4·lin |
        | v0 | 0.73 - 0.4·lin |
        | k_k, k_a, r_k | 0.71 - 0.1·lin, 1.02, -0.04 |
        | w1, a1, v1, g1 | 0 |
        | w2, a2, v2, g2 | orthogonal, gain 0.1 |
        | receptance, value; key | uniform ±0.5/√C; ±0.05/√C |
        | ffn.key | uniform ±0.5/√C |
        | output, ffn.value | 0 |
        | ln_x | weight ((i+1)/L)^0.7 |

        Source: the initialisation of RWKV-LM's x070 trainer.
        """
        C, N = self.n_embd, self.head_size
        depth = layer / (self.n_layer - 1) if self.n_layer > 1 else 0.0
        rest = 1 - layer / self.n_layer
        channel = torch.arange(C, dtype=torch.float32)
        along = channel / max(C - 1, 1)
        linear = along - 0.5
        middle = (N - 1) / 2
        in_head = (channel % N - middle) / max(middle, 0.5)
        zigzag = in_head * in_head.abs()

        def mixing(power: float) -> Tensor:
            return 1 - (channel / C) ** power

        vectors = {
            "att.x_r": lambda: mixing(0.2 * rest),
            "att.x_w": lambda: mixing(0.9 * rest),
            "att.x_k": lambda: mixing(0.7 * rest),
            "att.x_v": lambda: mixing(0.7 * rest),
            "att.x_a": lambda: mixing(0.9 * rest),
            "att.x_g": lambda: mixing(0.2 * rest),
            "ffn.x_k": lambda: mixing(rest**4),
            "att.w0": lambda: -5.5 + 6 * along ** (1 + depth**0.3) + 2.5 * zigzag,
            "att.a0": lambda: -0.19 + 0.3 * zigzag + 0.4 * linear,
            "att.v0": lambda: 0.73 - 0.4 * linear,
            "att.k_k": lambda: 0.71 - 0.1 * linear,
            "att.k_a": lambda: torch.full((C,), 1.02),
            "att.r_k": lambda: torch.full((C,), -0.04),
            "att.ln_x.weight": lambda: torch.full((C,), ((layer + 1) / self.n_layer) ** 0.7),
        }
        if name in vectors:
            values: Tensor = vectors[name]().reshape(key_shape)
            return values
        match name:
            case "att.w2" | "att.a2" | "att.v2" | "att.g2":
                return orthogonal(key_shape, 0.1, generator)
            case "att.receptance.weight" | "att.value.weight" | "ffn.key.weight":
                return uniform(key_shape, 0.5 / C**0.5, generator)
            case "att.key.weight":
                return uniform(key_shape, 0.05 / C**0.5, generator)
        zeros = ("att.w1", "att.a1", "att.v1", "att.g1", "att.output.weight", "ffn.value.weight")
        assert name in zeros, name
        return torch.zeros(key_shape)


_HF_MODULES = (
    (re.compile(r"^(?:model\.)?embeddings\."), "emb."),
    (re.compile(r"^(?:model\.)?norm\."), "ln_out."),
    (re.compile(r"^lm_head\."), "head."),
    (re.compile(r"^(?:model\.)?layers\.(\d+)\."), r"blocks.\1."),
    (re.compile(r"\.pre_norm\."), ".ln0."),
    (re.compile(r"\.attn_norm\."), ".ln1."),
    (re.compile(r"\.ffn_norm\."), ".ln2."),
    (re.compile(r"\.attn\."), ".att."),
    (re.compile(r"\.att\.r_proj\."), ".att.receptance."),
    (re.compile(r"\.att\.k_proj\."), ".att.key."),
    (re.compile(r"\.att\.v_proj\."), ".att.value."),
    (re.compile(r"\.att\.o_proj\."), ".att.output."),
    (re.compile(r"\.att\.g_norm\."), ".att.ln_x."),
    (re.compile(r"\.att\.([wavg])_lora\.lora\.0\.weight$"), r".att.\g<1>1"),
    (re.compile(r"\.att\.([wavg])_lora\.lora\.2\.weight$"), r".att.\g<1>2"),
    (re.compile(r"\.att\.([wavg])_lora\.lora\.2\.bias$"), r".att.\g<1>0"),
)
"""What Hugging Face's form of this architecture calls things, and their names here."""


def is_hf(keys: Collection[str]) -> bool:
    """Whether these are the keys of an RWKV-7 model in Hugging Face's form."""
    return any(key.endswith("layers.0.attn.r_k") for key in keys)


def own_name(hf_name: str) -> str:
    """The name here of a tensor, or of an adapter's, in Hugging Face's form."""
    for theirs, ours in _HF_MODULES:
        hf_name = theirs.sub(ours, hf_name)
    return hf_name


def from_hf(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A model in Hugging Face's form under its own names: small maps transposed, vectors [1, 1, C]; views."""
    own: dict[str, Any] = {}
    for hf_name, tensor in tensors.items():
        name = own_name(hf_name)
        last = name.rpartition(".")[2]
        if isinstance(tensor, Tensor):
            if "_lora." in hf_name and tensor.ndim == 2:
                tensor = tensor.t()
            elif last in (*_MIXES, "k_k", "k_a", "w0", "a0", "v0"):
                tensor = tensor.reshape(1, 1, -1)
        own[name] = tensor
    return own


_HF_NAMES = {
    "emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head", "ln0": "pre_norm", "ln1": "attn_norm",
    "ln2": "ffn_norm", "att.receptance": "attn.r_proj", "att.key": "attn.k_proj", "att.value": "attn.v_proj",
    "att.output": "attn.o_proj", "att.ln_x": "attn.g_norm",
}  # fmt: skip
_HF_SMALL = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}
_HF_FLAT = ("att.k_k", "att.k_a", "ffn.x_k")


def hf_name(name: str) -> str:
    """The inverse of `own_name`, for a model's tensor."""
    block = re.match(r"blocks\.(\d+)\.", name)
    prefix = f"model.layers.{block[1]}." if block else ""
    rest = name[block.end() :] if block else name
    if small := re.fullmatch(r"att\.([wavg])([012])", rest):
        return f"{prefix}attn.{small[1]}_lora.{_HF_SMALL[small[2]]}"
    module, _, last = rest.rpartition(".")
    if module in ("att", "ffn"):
        return f"{prefix}{module.replace('att', 'attn')}.{last}"
    return f"{prefix}{_HF_NAMES.get(module, module)}.{last}"


def hf_tensor(name: str, tensor: Tensor) -> Tensor:
    """What stands for a tensor of this name in Hugging Face's form."""
    if small := re.fullmatch(r".+\.att\.[wavg]([012])", name):
        return tensor.flatten() if small[1] == "0" else tensor.t()
    return tensor.flatten() if name.endswith(_HF_FLAT) else tensor


class TimeMix(TimeMixer):
    """Token shift, the recurrence, and its gate: z = ln1 x [B, T, C] -> what is added to x.

    Layer 0 hands on its values, which the others take.
    """

    matrices = ("receptance", "key", "value", "output")
    mixed = ("receptance", "key")  # not value, whose results are kept for longer
    stacks = (_MIXES,)
    products = _MAPS
    w0: nn.Parameter
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    v0: nn.Parameter
    v1: nn.Parameter
    v2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter
    r_k: nn.Parameter
    receptance: Linear
    key: Linear
    value: Linear

    def __init__(self, shape: RWKV7Shape, layer: int) -> None:
        super().__init__(shape.time_mix_shapes(layer))
        H, N = shape.n_head, shape.head_size
        self.head_count, self.head_size = H, N
        self.hands_on = layer == 0
        self.ln_x = nn.GroupNorm(H, shape.n_embd, eps=LN_X_EPS)
        self.time_state = nn.Parameter(torch.empty(H, N, N, dtype=torch.float32))
        widths = {"w": shape.decay_width, "a": shape.rate_width}
        if not self.hands_on:
            widths["v"] = shape.value_width
        self._maps = SmallMaps(shape.n_embd, widths, ("g1", "g2"))

    def placed(self, name: str, weight: nn.Parameter) -> nn.Parameter:
        """See Mixer."""
        return self._maps.placed(name, weight)

    def mixing_parameters(self) -> list[nn.Parameter]:
        """See TimeMixer."""
        return [getattr(self, name) for name in _MIXES]

    def handed_parameters(self) -> list[nn.Parameter]:
        """See TimeMixer."""
        return [*self.mixing_parameters(), *self.value.parameters()]

    def has_kernel(self, device: torch.device) -> bool:
        """See TimeMixer."""
        return self.head_size == CUDA_HEAD_SIZE and kernel_is_available(device)

    def mixed_inputs(
        self, z: Tensor, shift: Tensor | None, layout: SegmentLayout | None, *, keeps_modulation: bool = False
    ) -> tuple[Tensor, ...]:
        """z [B, T, C] -> the inputs of receptance, decay, key, value, rate and gate; see TimeMixer."""
        previous = None if layout is None else layout.previous
        r, k = mixed = self._mixed
        joined: tuple[tuple[int, ...], ...] = ((0, 2),) if join(mixed) else ()
        if self._small_maps() is not None:
            joined += ((1, 4),) if self.hands_on or not self._frozen_value() else ((1, 4, 3),)
        places = mix_places(joined, (r.room, 0, k.room))
        return shift_mixes(z, shift, self.stacked(_MIXES, z), None, previous, places=places)

    def attend(
        self, inputs: tuple[Tensor, ...], start: Tensor | None, layout: SegmentLayout | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See TimeMixer."""
        self.dequantize()
        assert self.hands_on == (handed is None)
        parts: Any = {**self._modules, **self._parameters}  # an attribute of a module takes ten times as long
        z_r, z_w, z_k, z_v, z_a, z_g = inputs
        gate, w_raw, rate, amount = self._mapped(z_w, z_a, z_g, None if handed is None else z_v)
        r, k = together(self._mixed, (z_r, z_k))
        own = parts["value"](z_v)
        norm = parts["ln_x"]
        scales, readout = (parts["k_k"], parts["k_a"]), (parts["r_k"], norm.weight, norm.bias)
        state = parts["time_state"] if start is None else start
        if delta_rule_whole.can_take(r, self.head_size) and (pieces := _pieces(layout, r.shape[1])):
            made = (r, w_raw, k, rate, own, handed, amount, gate)
            given = delta_rule_whole.Inputs(*made, *scales, *readout, state)
            gated, final = delta_rule_whole.whole(given, norm.eps, pieces)
            return gated, final, own if self.hands_on else None
        heads = (*r.shape[:2], self.head_count, self.head_size)
        v = own if handed is None or amount is None else value_residual(own, handed, amount)
        r, v = r.view(heads), v.view(heads)
        k, removal, written = removal_and_replacement(k.view(heads), rate.view(heads), *scales)
        y, final = self._recur((r, w_raw.view(heads), k, v, removal, written), state, layout)
        gated = group_norm_bonus_gate(y, r, k, v, gate, *readout, norm.eps)
        return gated, final, own if self.hands_on else None

    def _mapped(
        self, z_w: Tensor, z_a: Tensor, z_g: Tensor, z_v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Results of the small maps: gate, decay, rate, and with z_v the value residual's amount."""
        maps = self._small_maps()
        if maps is not None and z_w.is_cuda and z_w.dtype is maps.first.dtype:
            gate, w_raw, rate, *amount = small_maps(maps, z_g, (z_w, z_a) if z_v is None else (z_w, z_a, z_v))
            return gate, w_raw, rate, amount[0] if amount else None
        w_raw = self.product(torch.tanh(self.product(z_w, "w1")), "w2", bias="w0")
        rate = self.product(self.product(z_a, "a1"), "a2", bias="a0")
        gate = self.product(torch.sigmoid(self.product(z_g, "g1")), "g2")
        return gate, w_raw, rate, None if z_v is None else self.product(self.product(z_v, "v1"), "v2", bias="v0")

    def _small_maps(self) -> Maps | None:
        """Those that are computed at once; None where one is trained, or elsewhere than on a GPU in bf16."""
        return self._maps.ready(self._parameters)

    def _frozen_value(self) -> bool:
        """Whether the value matrix keeps nothing of its input for a backward."""
        value: Any = self._modules["value"]
        return isinstance(value, FrozenLinear) or (type(value) is Linear and not value.weight.requires_grad)

    def _recur(self, tokens: tuple[Tensor, ...], start: Tensor, layout: SegmentLayout | None) -> tuple[Tensor, Tensor]:
        """The recurrence over rows, packed roots, or roots and then the segments that continue them."""
        r, w_raw, k, v, a, b = tokens
        if layout is None:
            return wkv7(r, w_raw, k, v, a, b, start)
        if not layout.has_children:
            return wkv7(r, w_raw, k, v, a, b, start, layout.root_borders)
        borders = (layout.root_borders, layout.child_borders)
        return wkv7_branching(r, w_raw, k, v, a, b, start, *borders, layout.parents, layout.root_tokens)


def _pieces(layout: SegmentLayout | None, tokens: int) -> tuple[wkv7_cuda.Part, ...]:
    """Rows, packed roots, or roots and what continues them, for the kernels; none where one of the latter is empty."""
    if layout is None or not layout.has_children:
        return wkv7_cuda.one_part(tokens, None if layout is None else layout.root_borders)
    if not 0 < layout.root_tokens < tokens:
        return ()
    borders = layout.root_borders, layout.child_borders
    return wkv7_cuda.two_parts(tokens, *borders, layout.parents, layout.root_tokens)


class ChannelMix(ChannelMixer):
    """Token shift and a squared-ReLU feed-forward: x + W_v relu(W_k z_k)²."""

    mixed = ("key",)
    key: Linear
    value: Linear

    def __init__(self, shape: RWKV7Shape) -> None:
        super().__init__(shape.channel_mix_shapes())

    def mixing_parameters(self) -> list[nn.Parameter]:
        """See ChannelMixer."""
        return list(self.parameters(recurse=False))

    def mixed_inputs(self, z: Tensor, shift: Tensor | None, layout: SegmentLayout | None) -> tuple[Tensor, ...]:
        """z [B, T, C] -> the input of key; see ChannelMixer."""
        previous = None if layout is None else layout.previous
        (key,) = self._mixed
        places = mix_places((), (key.room,))
        return shift_mixes(z, shift, self.stacked(("x_k",), z), None, previous, places=places)

    def feed(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """See ChannelMixer."""
        (z_k,) = inputs
        hidden = squared_relu(self.key(z_k))
        matrix: Any = self._modules["value"]
        if x.is_cuda and not torch.is_grad_enabled() and type(matrix) in (Linear, FrozenLinear):
            matrix.add_product(hidden.flatten(0, 1), x.view(-1, x.shape[-1]))
            return x
        value: Tensor = matrix(hidden)
        return x + value

    def feed_again(self, x: Tensor, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """See ChannelMixer."""
        trained = [parameter for matrix in self._matrices for parameter in matrix.trained()]
        again: Tensor = _FeedAgain.apply(self, x, *inputs, result, *trained)
        return again

    def can_feed_again(self) -> bool:
        """See ChannelMixer."""
        return not any(isinstance(matrix, Linear) and matrix.weight.requires_grad for matrix in self._matrices)

    @property
    def _matrices(self) -> tuple[Linear, Linear]:
        return self.value, self.key


class _FeedAgain(Node):
    """The backward of `ChannelMix.feed` from what goes in: one product of two is computed again."""

    @staticmethod
    def forward(ctx: Any, mixer: ChannelMix, x: Tensor, z_k: Tensor, result: Tensor, *trained: Tensor) -> Tensor:
        ctx.mixer = mixer
        ctx.known = mixer.key.remembers(), mixer.value.remembers()
        ctx.save_for_backward(z_k)
        return result.view_as(result)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (z_k,) = ctx.saved_tensors
        mixer: ChannelMix = ctx.mixer
        rows = z_k.flatten(0, 1)
        grad_hidden, of_value = mixer.value.gradients(grad.flatten(0, 1))
        known_of_key, known_of_value = ctx.known
        kept = mixer.key.kept(rows, known_of_key)
        key = mixer.key.product(rows, kept)
        grad_key, of_trained = squared_relu_gradients(mixer.value, key, grad_hidden, known_of_value, of_value)
        del of_value, key, grad_hidden
        grad_z_k, of_key = mixer.key.gradients(grad_key)
        return None, grad, grad_z_k.view_as(z_k), None, *of_trained, *of_key(kept)
