"""The RWKV-6 (x060, "Finch") architecture: its mixers, and the one table of its names, shapes and values.

What is unusual about it:
  - no attention: every head keeps one N x N matrix that decays per key channel and token
    (`ops.wkv6`); its learned start, `time_state`, is what state tuning trains;
  - token shift: each mixer sees its input blended with the token before, by amounts that
    themselves depend on the input (`time_maa_*`, a small two-layer map);
  - the decay depends on the input too (`time_decay` plus a low-rank term);
  - no positions, no biases in the matrices, embedding and head never tied.

Parameter names and shapes are the checkpoint's. Zero, learned and carried states are one code path.

Legend: B rows, T tokens, C channels, A = H·N attention width, H heads, N head size, F feed-forward
width, V vocabulary, S segments of a packed row, L layers, Dm mix-LoRA width, Dd decay-LoRA width.

Source: "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (arXiv 2404.05892).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from src.errors import CheckpointError, ConfigError
from src.layout import SegmentLayout
from src.model.layers import ChannelMixer, Linear, TimeMixer, join, kept_together, squared_relu_gradients, together
from src.model.recompute import Recompute
from src.model.shape import ModelShape, Shape, axes_of, count_layers, orthogonal, uniform
from src.ops import elementwise_cuda, wkv6_cuda
from src.ops.elementwise import (
    group_norm_silu_gate,
    modulated_shift_mixes,
    shift_mixes,
    sigmoid_gated_residual,
    sigmoid_gated_residual_gradients,
    squared_relu,
)
from src.ops.kernels import Kernel
from src.ops.node import Node, once
from src.ops.products import Places, mix_places
from src.ops.wkv6 import wkv6, wkv6_branching
from src.ops.wkv6_cuda import CUDA_HEAD_SIZE, kernel_is_available

MIX_GROUPS = 5
"""Axis 0 of `time_maa_w2`: one token-shift modulation each for w, k, v, r, g, in this order."""

_SIZE_GRAIN = 32
"""n_embd, dim_att and dim_ffn typed by hand are multiples of this, as in the original."""

_NARROW_LORA, _WIDE_LORA = (32, 64), (64, 128)
"""Dm and Dd of most models, and of 7B and 14B (--double_extra_dim 1)."""


@dataclass(frozen=True)
class RWKV6Shape(ModelShape):
    """Every size of one RWKV-6 model. Source: formats of the RWKV-6 "World" checkpoints."""

    architecture: ClassVar[str] = "x060"
    family: ClassVar[str] = "RWKV-6 (x060)"
    merged_state: ClassVar[str] = (
        "clients on the rwkv package (0.8.26 and later) start every\n"
        "         conversation from the state; ChatRWKV and RWKV-Runner take the state file itself instead"
    )

    merged_note: ClassVar[str] = ""

    mix_lora_width: int  # Dm
    decay_lora_width: int  # Dd

    @classmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        """See ModelShape."""
        return any("att.time_maa_" in key for key in keys)

    @classmethod
    def relative(cls, keys: Collection[str]) -> str:
        """See ModelShape."""

        def has(*parts: str) -> bool:
            return any(part in key for key in keys for part in parts)

        if has("att.time_maa_rkvw_w1", "att.gate_w1"):
            return "is an experimental RWKV-6 variant (x060a or x060b); this program trains x060"
        if has("att.time_mix_w1", "att.time_mix_x"):
            return "was converted for web-rwkv (renamed keys, axes swapped); use the original .pth"
        if has("att.time_mix_"):
            version = "RWKV-5" if has("att.ln_x", "att.gate") else "RWKV-4"
            return f"is an {version} model; this program trains RWKV-6 (x060) and RWKV-7 (x070)"
        return ""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> RWKV6Shape:
        """See ModelShape."""
        n_layer = count_layers(shapes)
        vocab_size, n_embd = axes_of(shapes, "emb.weight", 2)
        dim_att, _ = axes_of(shapes, "blocks.0.att.key.weight", 2)
        dim_ffn, _ = axes_of(shapes, "blocks.0.ffn.key.weight", 2)
        n_head, head_size = axes_of(shapes, "blocks.0.att.time_faaaa", 2)
        _, mix_lora_width, _ = axes_of(shapes, "blocks.0.att.time_maa_w2", 3)
        _, decay_lora_width = axes_of(shapes, "blocks.0.att.time_decay_w1", 2)
        if n_head * head_size != dim_att:
            raise CheckpointError(
                f"blocks.0.att.time_faaaa has {n_head} heads of size {head_size}, together "
                f"{n_head * head_size}, but blocks.0.att.key.weight has {dim_att} rows; the two must agree"
            )
        lora_widths = (mix_lora_width, decay_lora_width)
        return cls(n_layer, n_embd, dim_att, dim_ffn, vocab_size, n_head, head_size, *lora_widths)

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
    ) -> RWKV6Shape:
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
        lora_widths = _WIDE_LORA if double_extra_dim else _NARROW_LORA
        return cls(n_layer, n_embd, dim_att, dim_ffn, vocab_size, dim_att // head_size, head_size, *lora_widths)

    def contradictions(self, given: Mapping[str, int]) -> list[str]:
        """See ModelShape; `double_extra_dim` 1 means LoRA widths 64 and 128."""
        sentences = super().contradictions(given)
        widths = (self.mix_lora_width, self.decay_lora_width)
        if given.get("double_extra_dim") and widths != _WIDE_LORA:
            sentences.append(
                f"--double_extra_dim {given['double_extra_dim']} means LoRA widths 64 and 128, but the checkpoint has "
                f"{widths[0]} and {widths[1]}; leave the flag out"
            )
        return sentences

    def time_mix_shapes(self, layer: int) -> dict[str, Shape]:
        """See ModelShape."""
        C, A, Dm, Dd = self.n_embd, self.dim_att, self.mix_lora_width, self.decay_lora_width
        return {
            **{f"time_maa_{group}": (1, 1, C) for group in ("x", "w", "k", "v", "r", "g")},
            "time_maa_w1": (C, MIX_GROUPS * Dm),
            "time_maa_w2": (MIX_GROUPS, Dm, C),
            "time_decay": (1, 1, A),
            "time_decay_w1": (C, Dd),
            "time_decay_w2": (Dd, A),
            "time_faaaa": (self.n_head, self.head_size),
            "receptance.weight": (A, C),
            "key.weight": (A, C),
            "value.weight": (A, C),
            "output.weight": (C, A),
            "gate.weight": (A, C),
            "ln_x.weight": (A,),
            "ln_x.bias": (A,),
        }

    def channel_mix_shapes(self) -> dict[str, Shape]:
        """See ModelShape."""
        C, F = self.n_embd, self.dim_ffn
        return {
            "time_maa_k": (1, 1, C),
            "time_maa_r": (1, 1, C),
            "key.weight": (F, C),
            "receptance.weight": (C, C),
            "value.weight": (C, F),
        }

    def time_mixer(self, layer: int, head_size_divisor: int) -> TimeMix:
        """See ModelShape."""
        return TimeMix(self, head_size_divisor)

    def channel_mixer(self) -> ChannelMix:
        """See ModelShape."""
        return ChannelMix(self)

    def rate_factor(self, key: str) -> float:
        """2 for the bare `time_decay` vectors, as in RWKV-LM's trainer."""
        return 2.0 if key.endswith("time_decay") else 1.0

    def kernels(self, *, trains_weights: bool) -> tuple[Kernel, ...]:
        """See ModelShape."""
        mixes = ((1, False), (5, True), (2, False))
        of_layers = elementwise_cuda.layer_kernels(
            self.n_embd,
            mixes,
            modulation_width=self.mix_lora_width,
            head_size=self.head_size,
            gates_channels=True,
            sums=trains_weights,
        )
        return (*of_layers, *wkv6_cuda.kernels_for(self.head_size, trains_weights=trains_weights))

    def kept_values(self, *, inputs_again: bool, fused: bool, trained: Collection[str]) -> int:
        """See ModelShape.

        What enters both mixers, r, k, v, w_raw and the operator's checkpoints (with its kernel also how a tile's tokens
        weigh), y and gate, the feed-forward's hidden layer and its gate, the decay's hidden layer. Where inputs are not
        made again, besides: the first norm's output, the hidden layer that makes the modulation of its five mixes, and
        norms' statistics. Where element-wise operators are not `fused` they keep more: the gated value and its gate,
        and the modulation. Checkpoints are then the starts of sequences, of 128 tokens or more.
        """
        C, A, F, H = self.n_embd, self.dim_att, self.dim_ffn, self.n_head
        kept = (3 * C + 7 * A + H * wkv6_cuda.TILE_TOKENS) if fused else (4 * C + 9 * A + 2 * H)
        kept += F + self.decay_lora_width
        if inputs_again:
            return kept
        return kept + (1 if fused else 6) * C + 5 * self.mix_lora_width + 8

    def trained_inputs(self, *, inputs_again: bool, fused: bool) -> list[tuple[int, frozenset[str]]]:
        """See ModelShape; where element-wise operators are not `fused` a mixer's inputs lie in one piece."""
        C = self.n_embd
        matrices = ("receptance.weight", "key.weight", "value.weight", "gate.weight")
        mixed = [f"att.{name}" for name in ("time_decay_w1", *matrices)]
        fed = ["ffn.key.weight", "ffn.receptance.weight"]
        inputs = [(C, {name}) for name in (*mixed, *fed)] if fused else [(5 * C, set(mixed)), (2 * C, set(fed))]
        inputs += [(self.dim_att, {"att.output.weight"}), (self.dim_ffn, {"ffn.value.weight"})]
        if not inputs_again:
            inputs += [(C, {"att.time_maa_w1"}), (C, {"ffn.time_maa_k", "ffn.time_maa_r"})]
            # What the modulated mixes keep in any case serves this one, too, where it is the norm's output.
            inputs += [] if fused else [(C, {"att.time_maa_x"})]
        return [(values, frozenset(names)) for values, names in inputs]

    def kept_casts(self, recompute: Recompute, trained: Collection[str], *, fused: bool) -> list[str]:
        """See ModelShape; of what makes inputs none where these are made again, and where that is fused one at most."""
        kept = super().kept_casts(recompute, trained, fused=fused)
        if recompute is Recompute.NOTHING and not fused:
            return kept
        of_inputs = ("time_maa_w1",) if recompute is Recompute.NOTHING else ()
        return [name for name in kept if "time_maa_" not in name or name.endswith(of_inputs)]

    def dropped_values(self, *, fused: bool) -> int:
        """See ModelShape; the feed-forward's kernel keeps its result, which dropout makes another one of."""
        return super().dropped_values(fused=fused) + (self.n_embd if fused else 0)

    def passing_bytes_again(self, adapters: str) -> int:
        """See ModelShape.

        Of states most is there in the time mix's backward, or with a wide feed-forward in that one's. Adapters keep
        their matrices' inputs, LoRA and Bat whole: most is there in the feed-forward's backward, which comes first.
        """
        C, F = self.n_embd, self.dim_ffn
        narrow = 5 * self.mix_lora_width + self.decay_lora_width + self.n_head * wkv6_cuda.TILE_TOKENS
        if not adapters:
            return int(2 * (max(22.5 * C, 15.5 * C + 2 * F) + narrow))
        return int(2 * ({"bone": 20, "bat": 30.5}.get(adapters, 25) * C + 2 * F + narrow))

    def fresh_mixer_value(self, layer: int, name: str, key_shape: Shape, generator: torch.Generator) -> Tensor:
        """See ModelShape.

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
        | ln_x | weight ((i+1)/L)^0.7 |
        | att receptance, value; ffn key | orthogonal, gain 1 |
        | att key, gate | orthogonal, gain 0.1 |
        | att output; ffn value, receptance | 0 |

        Source: the initialisation of RWKV-LM's x060 trainer.
        """
        depth = layer / (self.n_layer - 1) if self.n_layer > 1 else 0.0
        rest = 1 - layer / self.n_layer

        def mixing(power: float, offset: float = 0.0) -> Tensor:
            channel = torch.arange(self.n_embd, dtype=torch.float32) / self.n_embd
            return (1 - (channel**power + offset)).reshape(key_shape)

        along_attention = torch.arange(self.dim_att, dtype=torch.float32) / max(self.dim_att - 1, 1)
        match name:
            case "att.time_maa_x" | "att.time_maa_w" | "att.time_maa_k" | "ffn.time_maa_k" | "ffn.time_maa_r":
                return mixing(rest)
            case "att.time_maa_v":
                return mixing(rest, offset=0.3 * depth)
            case "att.time_maa_r" | "att.time_maa_g":
                return mixing(0.5 * rest)
            case "att.time_decay":
                return (-6 + 5 * along_attention ** (0.7 + 1.3 * depth)).reshape(key_shape)
            case "att.time_faaaa":
                zigzag = 0.1 * ((torch.arange(self.dim_att) + 1) % 3 - 1)
                return (depth * (1 - along_attention) + zigzag).reshape(key_shape)
            case "att.time_maa_w2" | "att.time_decay_w2":
                return uniform(key_shape, 0.01, generator)
            case "att.receptance.weight" | "att.value.weight" | "ffn.key.weight":
                return orthogonal(key_shape, 1.0, generator)
            case "att.key.weight" | "att.gate.weight":
                return orthogonal(key_shape, 0.1, generator)
            case "att.ln_x.weight":
                return torch.full(key_shape, ((layer + 1) / self.n_layer) ** 0.7)
        zeros = ("att.time_maa_w1", "att.time_decay_w1", "att.output.weight", "ffn.receptance.weight")
        assert name in (*zeros, "ffn.value.weight"), name
        return torch.zeros(key_shape)


class TimeMix(TimeMixer):
    """Token shift, the recurrence, and its gate: z = ln1 x [B, T, C] -> what is added to x."""

    matrices = ("receptance", "key", "value", "gate", "output")
    mixed = matrices[:-1]
    stacks = (("time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g"),)
    products = ("time_maa_w1", "time_maa_w2", "time_decay", "time_decay_w1", "time_decay_w2")
    time_maa_w1: nn.Parameter
    time_maa_w2: nn.Parameter
    time_decay: nn.Parameter
    time_decay_w1: nn.Parameter
    time_decay_w2: nn.Parameter
    time_faaaa: nn.Parameter
    receptance: Linear
    key: Linear
    value: Linear
    gate: Linear

    def __init__(self, shape: RWKV6Shape, head_size_divisor: int) -> None:
        super().__init__(shape.time_mix_shapes(0))
        H, N = shape.n_head, shape.head_size
        self.head_count, self.head_size = H, N
        self.ln_x = nn.GroupNorm(H, shape.dim_att, eps=1e-5 * head_size_divisor**2)
        self.time_state = nn.Parameter(torch.empty(H, N, N, dtype=torch.float32))

    def mixing_parameters(self) -> list[nn.Parameter]:
        """See TimeMixer."""
        return [parameter for name, parameter in self._parameters.items() if parameter is not None and "_maa_" in name]

    def has_kernel(self, device: torch.device) -> bool:
        """See TimeMixer."""
        return self.head_size == CUDA_HEAD_SIZE and kernel_is_available(device)

    def mixed_inputs(
        self, z: Tensor, shift: Tensor | None, layout: SegmentLayout | None, *, keeps_modulation: bool = False
    ) -> tuple[Tensor, ...]:
        """z [B, T, C] -> the inputs of decay, key, value, receptance and gate, [B, T, C] each; see TimeMixer."""
        previous = None if layout is None else layout.previous
        (base,) = shift_mixes(z, shift, self.stacked(("time_maa_x",), z), None, previous)
        hidden = torch.tanh(self.product(base, "time_maa_w1"))
        maa = self.stacked(self.stacks[0], z)
        r, k, v, g = mixed = self._mixed
        rooms = (0, k.room, v.room, r.room, g.room)
        return modulated_shift_mixes(
            *(z, shift, maa, hidden, self.time_maa_w2, previous),
            places=mix_places(((3, 1, 2, 4),) if join(mixed) else (), rooms),
            keeps_modulation=keeps_modulation,
            narrow_up=self.narrow("time_maa_w2", z.dtype),
        )

    def attend(
        self, inputs: tuple[Tensor, ...], start: Tensor | None, layout: SegmentLayout | None, handed: Tensor | None
    ) -> tuple[Tensor, Tensor, None]:
        """See TimeMixer."""
        self.dequantize()
        own: Any = self._modules  # an attribute of a module takes ten times as long
        z_w, z_k, z_v, z_r, z_g = inputs
        B, T, _ = z_w.shape
        decay_hidden = torch.tanh(self.product(z_w, "time_decay_w1"))
        w_raw = self.product(decay_hidden, "time_decay_w2", bias="time_decay")
        heads = (B, T, self.head_count, self.head_size)
        *tokens, gate = together(self._mixed, (z_r, z_k, z_v, z_g))
        r, k, v = [each.view(heads) for each in tokens]
        # Where the gradients of what is computed at once lie side by side.
        places = Places(4) if join(self._mixed) else None
        start = self.time_state if start is None else start
        y, final = self._recur(r, k, v, w_raw.view(heads), start, layout, places)
        norm = own["ln_x"]
        gated = group_norm_silu_gate(y, gate, norm.weight, norm.bias, norm.eps, places=places)
        return gated, final, None

    def _recur(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        w_raw: Tensor,
        start: Tensor,
        layout: SegmentLayout | None,
        places: Places | None,
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over rows, packed roots, or roots and then the segments that continue them."""
        u = self.time_faaaa
        if layout is None:
            return wkv6(r, k, v, w_raw, u, start, places=places)
        if not layout.has_children:
            return wkv6(r, k, v, w_raw, u, start, layout.root_borders, places=places)
        borders = (layout.root_borders, layout.child_borders)
        rest = (*borders, layout.parents, layout.root_tokens)
        return wkv6_branching(r, k, v, w_raw, u, start, *rest, places=places)


class ChannelMix(ChannelMixer):
    """Token shift and a gated squared-ReLU feed-forward: x + sigmoid(W_r z_r) · W_v relu(W_k z_k)²."""

    mixed = ("key", "receptance")
    stacks = (("time_maa_k", "time_maa_r"),)
    key: Linear
    receptance: Linear
    value: Linear

    def __init__(self, shape: RWKV6Shape) -> None:
        super().__init__(shape.channel_mix_shapes())

    def mixing_parameters(self) -> list[nn.Parameter]:
        """See ChannelMixer."""
        return list(self.parameters(recurse=False))

    def mixed_inputs(self, z: Tensor, shift: Tensor | None, layout: SegmentLayout | None) -> tuple[Tensor, ...]:
        """z [B, T, C] -> the inputs of key and receptance, [B, T, C] each; see ChannelMixer."""
        previous = None if layout is None else layout.previous
        key, receptance = mixed = self._mixed
        places = mix_places(((0, 1),) if join(mixed) else (), (key.room, receptance.room))
        return shift_mixes(z, shift, self.stacked(self.stacks[0], z), None, previous, places=places)

    def feed(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """See ChannelMixer."""
        key, receptance = together(self._mixed, inputs)
        # Last, because a backward that follows at once begins with this matrix: it finds it still dequantised.
        value = self.value(squared_relu(key))
        return sigmoid_gated_residual(x, receptance, value)

    def feed_again(self, x: Tensor, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """See ChannelMixer."""
        trained = [parameter for matrix in self._matrices for parameter in matrix.trained()]
        again: Tensor = _FeedAgain.apply(self, x, *inputs, result, *trained)
        return again

    def can_feed_again(self) -> bool:
        """See ChannelMixer."""
        return not any(isinstance(matrix, Linear) and matrix.weight.requires_grad for matrix in self._matrices)

    @property
    def _matrices(self) -> tuple[Linear, Linear, Linear]:
        return self.receptance, self.value, self.key


class _FeedAgain(Node):
    """The backward of `ChannelMix.feed` from what goes in and what came out.

    Two of three products are computed again, and every matrix is dequantised once: the gradient of the hidden layer
    needs no hidden layer, so the key's two products stand next to each other. What adapters need of it comes last.
    """

    @staticmethod
    def forward(
        ctx: Any, mixer: ChannelMix, x: Tensor, z_k: Tensor, z_r: Tensor, result: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.mixer = mixer
        ctx.known = [matrix.remembers() for matrix in (*mixer._mixed, mixer.value)]
        ctx.save_for_backward(x, z_k, z_r, result)
        return result.view_as(result)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z_k, z_r, result = ctx.saved_tensors
        mixer: ChannelMix = ctx.mixer
        rows_k, rows_r = z_k.flatten(0, 1), z_r.flatten(0, 1)
        *of_mixed, known_of_value = ctx.known
        kept_k, kept_r = kept_together(mixer._mixed, (rows_k, rows_r), of_mixed)
        r = mixer.receptance.product(rows_r, kept_r).view_as(x)
        grad_r, grad_value = sigmoid_gated_residual_gradients(x, r, result, grad)
        del r
        grad_z_r, of_receptance = mixer.receptance.gradients(grad_r.flatten(0, 1))
        of_trained = of_receptance(kept_r)
        grad_hidden, of_value = mixer.value.gradients(grad_value.flatten(0, 1))
        del grad_r, grad_value, of_receptance
        key = mixer.key.product(rows_k, kept_k)
        grad_key, of_squared_relu = squared_relu_gradients(mixer.value, key, grad_hidden, known_of_value, of_value)
        del of_value, key, grad_hidden
        grad_z_k, of_key = mixer.key.gradients(grad_key)
        of_trained += of_squared_relu + of_key(kept_k)
        return None, grad, grad_z_k.view_as(z_k), grad_z_r.view_as(z_r), None, *of_trained
