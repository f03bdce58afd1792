"""The RWKV-6 (x060, "Finch") language model.

What is unusual about it:
  - no attention: every head keeps one N x N matrix that decays per key channel and token
    (`ops.wkv6`); its learned start, `time_state`, is what state tuning trains;
  - token shift: each mixer sees its input blended with the token before, by amounts that
    themselves depend on the input (`time_maa_*`, a small two-layer map);
  - the decay depends on the input too (`time_decay` plus a low-rank term);
  - no positions, no biases in the matrices, embedding and head never tied.

Parameter names and shapes are the checkpoint's. Zero, learned and carried states are one code path.
Weights may be stored wider than the computation (fp32 masters in full training); they are cast on use.

Legend: B rows, T tokens, C channels, A = H·N attention width, H heads, N head size, F feed-forward
width, V vocabulary, S segments of a packed row.

Source: "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (arXiv 2404.05892).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.layout import SegmentLayout
from src.model.parameters import ModelShape
from src.model.recompute import Recompute, Recomputed, Results
from src.model.state import LayerState, ModelState, last_tokens
from src.ops.elementwise import (
    add_norm,
    group_norm_silu_gate,
    modulated_shift_mixes,
    shift_mixes,
    sigmoid_gated_residual,
    sigmoid_gated_residual_gradients,
    squared_relu,
    squared_relu_gradient,
)
from src.ops.token_logps import HeadWeight
from src.ops.wkv6 import wkv6, wkv6_branching
from src.quant import FrozenHead

LAYER_NORM_EPS = 1e-5


class Linear(nn.Module):
    """y = x Wᵀ with W [out, in] in the file's orientation, cast to x's dtype when it is stored wider."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def input_gradient(self, grad_output: Tensor) -> Tensor:
        """The gradient of x from that of y, outside autograd."""
        return grad_output @ self.weight.to(grad_output.dtype)


class Norm(nn.LayerNorm):
    """LayerNorm over C whose weights may be stored wider than its input."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_sum(x, None)[1]

    def of_sum(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, its norm), [B, T, C] each; None adds nothing."""
        return add_norm(x, delta, self.weight, self.bias, self.eps)


class Embedding(nn.Module):
    """Token embedding that may stay on the host.

    A frozen table is read only T rows at a time, so it can remain a memory-mapped host tensor
    (`keep_on_host`); it is then not registered with the module and never copied whole.
    """

    def __init__(self, vocab_size: int, channels: int) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(vocab_size, channels))
        self.host_table: Tensor | None = None

    def keep_on_host(self, table: Tensor) -> None:
        """Serves from `table` [V, C] on the CPU and drops the registered parameter."""
        self.weight = None
        self.host_table = table

    def look_up(self, tokens: Tensor, *, pinned: bool) -> Tensor:
        """tokens int64 [B, T] -> [B, T, C] of a table on the host; the tokens themselves of one on the device."""
        table = self.host_table
        if table is None:
            return tokens
        rows = torch.empty(tokens.numel(), table.shape[1], dtype=table.dtype, pin_memory=pinned)
        torch.index_select(table, 0, tokens.reshape(-1).cpu(), out=rows)
        return rows.view(*tokens.shape, -1)

    def forward(self, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """tokens int64 [B, T], or what `look_up` made of them -> [B, T, C] on `device`."""
        if self.weight is not None:
            return F.embedding(tokens.to(self.weight.device), self.weight).to(device, dtype)
        rows = tokens if tokens.is_floating_point() else self.look_up(tokens, pinned=device.type == "cuda")
        return rows.to(device, non_blocking=True).to(dtype)


class MixingWeights(nn.Module):
    """Base of the two mixers: stacks several `time_maa_*` vectors, once if they are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self._stacks: dict[tuple[str, ...], Tensor] = {}

    def stacked(self, names: tuple[str, ...], like: Tensor) -> Tensor:
        """The named [1, 1, C] vectors as one [G, C] tensor in `like`'s dtype."""
        stack = self._stacks.get(names)
        if stack is not None and stack.device == like.device and stack.dtype == like.dtype:
            return stack
        vectors = [getattr(self, name) for name in names]
        stack = torch.stack([vector.view(-1) for vector in vectors]).to(like.dtype)
        if not any(vector.requires_grad for vector in vectors):
            self._stacks[names] = stack
        return stack


class TimeMix(MixingWeights):
    """Token shift, the recurrence, and its gate: z = ln1 x [B, T, C] -> what is added to x."""

    def __init__(self, shape: ModelShape, head_size_divisor: int) -> None:
        super().__init__()
        C, A, H, N = shape.n_embd, shape.dim_att, shape.n_head, shape.head_size
        self.head_count, self.head_size = H, N
        self.group_norm_eps = 1e-5 * head_size_divisor**2
        for name in ("x", "w", "k", "v", "r", "g"):
            self.register_parameter(f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * shape.mix_lora_width))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, shape.mix_lora_width, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, A))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, shape.decay_lora_width))
        self.time_decay_w2 = nn.Parameter(torch.empty(shape.decay_lora_width, A))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        self.receptance = Linear(C, A)
        self.key = Linear(C, A)
        self.value = Linear(C, A)
        self.gate = Linear(C, A)
        self.output = Linear(A, C)
        self.ln_x = nn.GroupNorm(H, A, eps=self.group_norm_eps)
        self.time_state = nn.Parameter(torch.empty(H, N, N, dtype=torch.float32))

    def forward(
        self, z: Tensor, state: LayerState | None = None, layout: SegmentLayout | None = None
    ) -> tuple[Tensor, Tensor]:
        """One pass over T tokens.

        Args:
            z: [B, T, C], normalised input; B is 1 with a layout.
            state: carried memory; None starts from `time_state` and no token before.
            layout: segments of a packed row; excludes `state`.

        Returns:
            (out [B, T, C], final recurrence matrices [B, H, N, N] fp32, or [roots, H, N, N] with a
            layout: those of the root segments).
        """
        gated, final = self.attend(self.mixed_inputs(z, state, layout), state, layout)
        return self.output(gated), final

    def mixed_inputs(
        self,
        z: Tensor,
        state: LayerState | None = None,
        layout: SegmentLayout | None = None,
        *,
        keeps_modulation: bool = False,
    ) -> tuple[Tensor, ...]:
        """z [B, T, C] -> the inputs of decay, key, value, receptance and gate, [B, T, C] each.

        Element-wise work and narrow products: cheap to compute again, five times z to keep; so is the modulation.
        """
        carry = None if state is None else state.att_shift
        previous = None if layout is None else layout.previous
        (base,) = shift_mixes(z, carry, self.stacked(("time_maa_x",), z), None, previous)
        hidden = torch.tanh(base @ self.time_maa_w1.to(z.dtype))
        maa = self.stacked(("time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g"), z)
        return modulated_shift_mixes(
            z, carry, maa, hidden, self.time_maa_w2, previous, keeps_modulation=keeps_modulation
        )

    def attend(
        self, inputs: tuple[Tensor, ...], state: LayerState | None = None, layout: SegmentLayout | None = None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence and its gate on `mixed_inputs`: what `output` is applied to, and the final matrices."""
        z_w, z_k, z_v, z_r, z_g = inputs
        dtype = z_w.dtype
        B, T, _ = z_w.shape
        decay_hidden = torch.tanh(z_w @ self.time_decay_w1.to(dtype))
        base = self.time_decay.to(dtype).view(-1)
        w_raw = torch.addmm(base, decay_hidden.view(B * T, -1), self.time_decay_w2.to(dtype))
        heads = (B, T, self.head_count, self.head_size)
        r, k, v = self.receptance(z_r).view(heads), self.key(z_k).view(heads), self.value(z_v).view(heads)
        start = self.time_state if state is None else state.wkv
        y, final = self._recur(r, k, v, w_raw.view(heads), start, layout)

        weight, bias = self.ln_x.weight.to(dtype), self.ln_x.bias.to(dtype)
        return group_norm_silu_gate(y, self.gate(z_g), weight, bias, self.group_norm_eps), final

    def _recur(
        self, r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, start: Tensor, layout: SegmentLayout | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence over rows, packed roots, or roots and then the segments that continue them."""
        u = self.time_faaaa
        if layout is None:
            return wkv6(r, k, v, w_raw, u, start)
        if not layout.has_children:
            return wkv6(r, k, v, w_raw, u, start, layout.root_borders)
        borders = (layout.root_borders, layout.child_borders)
        return wkv6_branching(r, k, v, w_raw, u, start, *borders, layout.parents, layout.root_tokens)


class ChannelMix(MixingWeights):
    """Token shift and a gated squared-ReLU feed-forward: x + sigmoid(W_r z_r) · W_v relu(W_k z_k)²."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        C = shape.n_embd
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, shape.dim_ffn)
        self.receptance = Linear(C, C)
        self.value = Linear(shape.dim_ffn, C)

    def forward(
        self, x: Tensor, z: Tensor, state: LayerState | None = None, layout: SegmentLayout | None = None
    ) -> Tensor:
        """x [B, T, C] residual stream, z = ln2 x -> the new residual stream."""
        return self.feed(x, self.mixed_inputs(z, state, layout))

    def mixed_inputs(
        self, z: Tensor, state: LayerState | None = None, layout: SegmentLayout | None = None
    ) -> tuple[Tensor, ...]:
        """z [B, T, C] -> the inputs of key and receptance, [B, T, C] each."""
        carry = None if state is None else state.ffn_shift
        previous = None if layout is None else layout.previous
        maa = self.stacked(("time_maa_k", "time_maa_r"), z)
        return shift_mixes(z, carry, maa, None, previous)

    def feed(self, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """The matrices on `mixed_inputs`; returns what `forward` returns."""
        z_k, z_r = inputs
        receptance = self.receptance(z_r)
        # Last, because a backward that follows at once begins with this matrix: it finds it still dequantised.
        value = self.value(squared_relu(self.key(z_k)))
        return sigmoid_gated_residual(x, receptance, value)

    def feed_again(self, x: Tensor, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
        """`feed` when its result is known and the matrices are frozen: computes what the backward needs, and there."""
        z_k, z_r = inputs
        again: Tensor = _FeedAgain.apply(x, z_k, z_r, self, result)
        return again

    def has_frozen_matrices(self) -> bool:
        """Whether `feed_again` can take the place of `feed`."""
        matrices = (self.key, self.receptance, self.value)
        return not any(p.requires_grad for matrix in matrices for p in matrix.parameters())


class _FeedAgain(torch.autograd.Function):
    """The backward of `ChannelMix.feed` from what goes in and what came out.

    Two of three products are computed again, and every matrix is dequantised once: the gradient of the hidden layer
    needs no hidden layer, so the key's two products stand next to each other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z_k: Tensor, z_r: Tensor, mixer: ChannelMix, result: Tensor) -> Tensor:
        ctx.mixer = mixer
        ctx.save_for_backward(x, z_k, z_r, result)
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z_k, z_r, result = ctx.saved_tensors
        mixer: ChannelMix = ctx.mixer
        grad_r, grad_value = sigmoid_gated_residual_gradients(x, mixer.receptance(z_r), result, grad)
        grad_z_r = mixer.receptance.input_gradient(grad_r)
        grad_hidden = mixer.value.input_gradient(grad_value)
        del grad_r, grad_value
        grad_z_k = mixer.key.input_gradient(squared_relu_gradient(mixer.key(z_k), grad_hidden))
        return grad, grad_z_k, grad_z_r, None, None


class Block(nn.Module):
    """One layer; layer 0 also normalises the embedding (`ln0`)."""

    def __init__(self, shape: ModelShape, layer: int, head_size_divisor: int, recompute: Recompute) -> None:
        super().__init__()
        self.ln0 = Norm(shape.n_embd) if layer == 0 else None
        self.ln1 = Norm(shape.n_embd)
        self.ln2 = Norm(shape.n_embd)
        self.att = TimeMix(shape, head_size_divisor)
        self.ffn = ChannelMix(shape)
        self.recompute = recompute
        self._layer_again = Recomputed(self.ln1, self.att, self.ln2, self.ffn)
        self._time_inputs_again = Recomputed(self.ln1, self.att, unused=("time_state",))
        self._channel_inputs_again = Recomputed(self.ln2, self.ffn)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None,
        layout: SegmentLayout | None,
        *,
        remembers: bool,
        ends: Tensor | None,
        dropout: float,
    ) -> tuple[Tensor, LayerState | None]:
        """x [B, T, C] -> (x [B, T, C], memory after the last token of every row or root segment if it `remembers`)."""
        level = self.recompute if torch.is_grad_enabled() else Recompute.NOTHING

        # What a second pass keeps lives as long as its layer's backward, what the only pass keeps much longer.
        time_inputs = partial(
            self.att.mixed_inputs, state=state, layout=layout, keeps_modulation=level is not Recompute.NOTHING
        )
        channel_inputs = partial(self.ffn.mixed_inputs, state=state, layout=layout)

        def enter(
            norm: Norm,
            mixed_inputs: Callable[[Tensor], tuple[Tensor, ...]],
            again: Recomputed,
            x: Tensor,
            delta: Tensor | None,
        ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
            """The residual stream x + delta, a mixer's inputs, and its memory of tokens if that is wanted."""

            def inputs_of(z: Tensor) -> tuple[Tensor, ...]:
                # A view of z: kept without need, it would keep all of it.
                return *mixed_inputs(z), *([last_tokens(z, ends)] if remembers else [])

            if level is Recompute.INPUTS:
                x = x if delta is None else x + delta
                outputs = again(lambda stream: inputs_of(norm(stream)), x)
            else:
                x, z = norm.of_sum(x, delta)
                outputs = inputs_of(z)
            count = len(outputs) - remembers
            return x, outputs[:count], outputs[count:]

        def layer(x: Tensor, *known: Tensor) -> Results:
            x, inputs, att_shift = enter(self.ln1, time_inputs, self._time_inputs_again, x, None)
            gated, final = self.att.attend(inputs, state, layout)
            delta = F.dropout(self.att.output(gated), dropout, self.training)
            x, inputs, ffn_shift = enter(self.ln2, channel_inputs, self._channel_inputs_again, x, delta)
            feed = self.ffn.feed_again if known else self.ffn.feed
            mixed = feed(x, inputs, *known)
            if dropout:
                mixed = x + F.dropout(mixed - x, dropout, self.training)
            return (mixed, *att_shift, final, *ffn_shift) if remembers else (mixed,)

        if level is Recompute.ALL:
            # The result, from which the feed-forward can take its gradients.
            kept = 1 if dropout == 0 and self.ffn.has_frozen_matrices() else 0
            mixed, *memory = self._layer_again(layer, x, kept=kept, draws_random=dropout > 0)
        else:
            mixed, *memory = layer(x)
        return mixed, LayerState(*memory) if remembers else None


class RWKV6(nn.Module):
    """The whole model. `forward` returns hidden states; `logits` applies the head to those one wants."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        compute_dtype: torch.dtype = torch.float32,
        head_size_divisor: int = 8,
        recompute: Recompute = Recompute.NOTHING,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.compute_dtype = compute_dtype
        self.dropout = dropout
        self.emb = Embedding(shape.vocab_size, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape, i, head_size_divisor, recompute) for i in range(shape.n_layer))
        self.ln_out = Norm(shape.n_embd)
        self.head: Linear | FrozenHead = Linear(shape.n_embd, shape.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the computation happens."""
        return self.ln_out.weight.device

    def look_up(self, tokens: Tensor) -> Tensor:
        """What can be done for tokens int64 [B, T] without the device: `forward` takes tokens or this.

        Returns:
            [B, T, C] if the embedding table is on the host, in pinned memory if the model is not; else the tokens.
        """
        return self.emb.look_up(tokens, pinned=self.device.type == "cuda")

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        layout: SegmentLayout | None = None,
        *,
        return_state: bool = False,
    ) -> tuple[Tensor, ModelState | None]:
        """Runs the layers over T tokens.

        Args:
            tokens: int64 [B, T], or what `look_up` made of them, on any device.
            state: memory carried from earlier tokens; None starts every row from `time_state`.
            layout: segments of a packed row (B = 1); excludes `state`.
            return_state: also return the memory after the last token of each row, or of each segment
                of a packed row without continuations.

        Returns:
            (hidden [B, T, C] after `ln_out` in the computation dtype, state or None).
        """
        assert state is None or layout is None, "a carried state and a packed layout exclude each other"
        assert layout is None or (tokens.shape[0] == 1 and tokens.shape[1] == layout.tokens)
        assert not (return_state and layout is not None and layout.has_children)
        x = self.emb(tokens, self.device, self.compute_dtype)
        x = F.dropout(self.blocks[0].ln0(x), self.dropout, self.training)  # type: ignore[operator]
        ends = layout.last_positions if return_state and layout is not None else None
        new_state: ModelState = []
        for i, block in enumerate(self.blocks):
            carried = None if state is None else state[i]
            x, after = block(x, carried, layout, remembers=return_state, ends=ends, dropout=self.dropout)
            if after is not None:
                new_state.append(after)
        return self.ln_out(x), new_state if return_state else None

    def head_weight(self) -> HeadWeight:
        """The head as `ops.token_logps` takes it: [V, C] in the computation dtype, or its parts when it is packed."""
        if isinstance(self.head, FrozenHead):
            return self.head.dense_parts()
        return self.head.weight.to(self.compute_dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> unnormalised log-probabilities [..., V] in the computation dtype."""
        return self.head(hidden)  # type: ignore[no-any-return]
