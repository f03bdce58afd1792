"""The language model around an architecture's mixers: layers, their recomputation, the dense matrices they share.

Legend: B rows, T tokens, C channels, V vocabulary, S segments of a packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.layout import SegmentLayout
from src.model.casts import CastBuffer, LayerCasts
from src.model.first_pass import FirstPass
from src.model.layers import Embedding, Linear, Mixer, Norm, TimeMixer
from src.model.recompute import Recompute, Results, parameters_of, recomputed
from src.model.shape import ModelShape
from src.model.state import LayerState, ModelState, last_tokens
from src.ops.elementwise import fused_kernels
from src.ops.token_logps import HeadWeight
from src.quant import DequantizationWorkspace, FrozenHead, FrozenLinear

Watch = Callable[[Tensor, Tensor | None], None]
"""Is shown the residual stream [B, T, C] before a layer, and what an earlier layer handed on."""


class Block(nn.Module):
    """One layer; layer 0 also normalises the embedding (`ln0`).

    Attributes:
        first_pass: what its adapters compute in it for the second one.
        recompute: what is computed again in the backward pass.
        draws_random: whether one of its adapters does, so that a second pass has to draw the same.
    """

    def __init__(self, shape: ModelShape, layer: int, head_size_divisor: int) -> None:
        super().__init__()
        self.ln0 = Norm(shape.n_embd) if layer == 0 else None
        self.ln1 = Norm(shape.n_embd)
        self.ln2 = Norm(shape.n_embd)
        self.att = shape.time_mixer(layer, head_size_divisor)
        self.ffn = shape.channel_mixer()
        self.first_pass = FirstPass()
        self.recompute = Recompute.NOTHING
        self.draws_random = False

    def forward(
        self,
        x: Tensor,
        state: LayerState | None,
        layout: SegmentLayout | None,
        handed: Tensor | None,
        *,
        remembers: bool,
        ends: Tensor | None,
        dropout: float,
        result: Tensor | None = None,
    ) -> tuple[Tensor, LayerState | None, Tensor | None]:
        """x [B, T, C], what an earlier layer handed on -> (x [B, T, C], memory, what is handed on from here).

        The memory is that after the last token of every row or root segment, if it `remembers`; `ends` are the
        positions of those tokens in a packed row, and a carry names the segments. Where the `result` is known from an
        earlier pass and the backward follows at once, only what that needs is computed, and once.
        """
        carry = None if layout is None else layout.carry
        level = self.recompute if torch.is_grad_enabled() and result is None else Recompute.NOTHING

        def enter(
            norm: Norm,
            mixer: Any,
            x: Tensor,
            delta: Tensor | None,
            shift: Tensor | None,
            **options: bool,
        ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
            """The residual stream x + delta, a mixer's inputs, and its memory of tokens if that is wanted."""

            def inputs_of(z: Tensor, shift: Tensor | None) -> Results:
                mixed = _carried_inputs(mixer, z, shift, layout, **options)
                return *mixed, *([last_tokens(z, ends)] if remembers else [])

            if level is Recompute.INPUTS:
                x = x if delta is None else x + delta
                used = (*norm.parameters(), *mixer.mixing_parameters())
                outputs = recomputed(
                    lambda stream, shift: inputs_of(norm(stream), shift), (x, shift), used, uses_once=carry is None
                )
            else:
                x, z = norm.of_sum(x, delta)
                outputs = inputs_of(z, shift)
            count = len(outputs) - remembers
            return x, outputs[:count], outputs[count:]

        def layer(
            x: Tensor,
            handed: Tensor | None,
            att_shift: Tensor | None,
            start: Tensor | None,
            ffn_shift: Tensor | None,
            *known: Tensor,
        ) -> Results:
            # What a second pass keeps lives as long as its layer's backward, what the only pass keeps much longer.
            keeps = result is not None or level is not Recompute.NOTHING
            x, inputs, att_last = enter(self.ln1, self.att, x, None, att_shift, keeps_modulation=keeps)
            gated, final, own = self.att.attend(inputs, _starts(self.att, start, layout), layout, handed)
            if remembers and carry is not None:
                final = final.index_select(0, carry.kept)
            delta = self.att.output(gated)
            if dropout:
                x, delta = F.dropout(x + delta, dropout, self.training), None
            x, inputs, ffn_last = enter(self.ln2, self.ffn, x, delta, ffn_shift)
            feed = self.ffn.feed_again if known else self.ffn.feed
            mixed = feed(x, inputs, *known)
            if dropout:
                mixed = F.dropout(mixed, dropout, self.training)
            results = (mixed,) if own is None else (mixed, own)
            return (*results, *att_last, final, *ffn_last) if remembers else results

        random = dropout > 0 or self.draws_random

        def can_feed_again() -> bool:
            return not random and self.ffn.can_feed_again()

        inputs = (x, handed, *(state or (None, None, None)))
        if level is Recompute.ALL:
            remembered = 0 if random else self.first_pass.count
            count = len(inputs)  # autograd holds the function below to its end, but not what comes in

            def either_pass(*tensors: Tensor) -> Results:
                given, known = tensors[:count], tensors[count:]
                with self.first_pass.of(known[:remembered]) as narrow:
                    results = layer(*given, *known[remembered:])
                return *narrow, *results

            function = either_pass if remembered else layer
            # The result, from which the feed-forward can take its gradients, and what adapters have left.
            kept = remembered + (1 if can_feed_again() else 0)
            outputs = recomputed(
                function, inputs, parameters_of(self), kept=kept, draws_random=random, uses_once=carry is None
            )
            mixed, *rest = outputs[remembered:]
        elif result is not None and can_feed_again():
            mixed, *rest = layer(*inputs, result)
        else:
            mixed, *rest = layer(*inputs)
        if self.att.hands_on:
            handed, *rest = rest
            sources = (x, None if state is None else state.att_shift)
            used = (*self.ln1.parameters(), *self.att.handed_parameters())
            if not any(tensor is not None and tensor.requires_grad for tensor in (*sources, *used)):
                # A recomputed layer's results all ask for a gradient, and nobody needs that of this one.
                handed = handed.detach()
        return mixed, LayerState(*rest) if remembers else None, handed


class LanguageModel(nn.Module):
    """The whole model. `forward` returns hidden states; `logits` applies the head to those one wants.

    Attributes:
        workspace: holds the dense matrices of the packed ones while they are used.
        casts: holds what adapters train in the computation dtype while it is used.
        lays_out: whether weights of mixers may become strided, to lie where they are used best.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        compute_dtype: torch.dtype = torch.float32,
        head_size_divisor: int = 8,
        dropout: float = 0.0,
        lays_out: bool = True,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.lays_out = lays_out
        self.compute_dtype = compute_dtype
        self.dropout = dropout
        self.workspace = DequantizationWorkspace()
        self.casts = CastBuffer()
        self._casts_of_layers: dict[str, LayerCasts] = {}
        self.emb = Embedding(shape.vocab_size, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape, i, head_size_divisor) for i in range(shape.n_layer))
        self.ln_out = Norm(shape.n_embd)
        self.head: Linear | FrozenHead = Linear(shape.n_embd, shape.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the computation happens."""
        return self.ln_out.weight.device

    @property
    def _first_block(self) -> Block:
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block

    @property
    def draws_random(self) -> bool:
        """Whether a pass draws random numbers."""
        return self.training and (self.dropout > 0 or any(block.draws_random for block in self.blocks))

    @property
    def reserves_room(self) -> bool:
        """Whether there is memory for room behind dense matrices; see `take_room`."""
        return any(isinstance(module, Linear) and module.reserved for module in self._first_block.modules())

    @property
    def is_fused(self) -> bool:
        """Whether element-wise operators are kernels."""
        return self.compute_dtype is torch.bfloat16 and fused_kernels() is not None

    @property
    def can_be_recorded(self) -> bool:
        """Whether nothing in a step waits for the GPU: in bf16 with the operator's kernel.

        The operator in torch reads segment borders on the host. And fp16 could not hold the unscaled loss's gradients.
        """
        on_gpu = self.device.type == "cuda" and self.compute_dtype == torch.bfloat16
        return on_gpu and self._first_block.att.has_kernel(self.device)

    def pack(self, name: str, weight: Tensor, quant_type: str) -> None:
        """Puts a matrix of a layer, or the head, into its place in 4 or 8 bits.

        Args:
            name: its file key.
            weight: [out, in] on the device in the computation dtype; not kept.
            quant_type: one of `quant.QUANT_TYPES`.
        """
        if name == "head.weight":
            self.head = FrozenHead.from_weight(weight, quant_type, self.compute_dtype, self.workspace)
            return
        parent_name, _, child = name.removesuffix(".weight").rpartition(".")
        parent = self.get_submodule(parent_name)
        # The backward of a recomputed layer comes back to the time mix after the feed-forward, with whose matrices it
        # is done one by one (`feed_again`): the former gain by buffers of their own, the latter do not.
        kind = child if isinstance(parent, TimeMixer) else ""
        packed = FrozenLinear.from_weight(weight, quant_type, self.compute_dtype, kind=kind, workspace=self.workspace)
        setattr(parent, child, packed)

    def place(self, name: str, weight: nn.Parameter) -> None:
        """Puts a weight into its place by its file key; a matrix that was packed there is dense from then on."""
        module_name, _, last = name.rpartition(".")
        module = self.get_submodule(module_name)
        if isinstance(module, FrozenLinear):
            parent_name, _, child = module_name.rpartition(".")
            with torch.device("meta"):
                module = Linear(module.in_features, module.out_features)
            setattr(self.get_submodule(parent_name), child, module)
        if self.lays_out and isinstance(module, Mixer):
            weight = module.placed(last, weight)
        module.register_parameter(last, weight)

    def lay_in_one_piece(self) -> None:
        """Moves trained vectors to where those that are used as one tensor follow each other."""
        for block in self.blocks:
            for mixer in (block.att, block.ffn):
                mixer.lay_in_one_piece()  # type: ignore[operator, union-attr]

    def take_room(self) -> None:
        """Has adapters compute by one product what two are for, where room was reserved behind dense matrices.

        For weights that nobody sends to other processes any more: they become strided.
        """
        for block in self.blocks:
            for mixer in (block.att, block.ffn):
                mixer.take_room()  # type: ignore[operator, union-attr]

    def adapt(self, name: str, adapter: Callable[[Any], Any]) -> None:
        """Puts an adapter around a matrix of a layer, which is then frozen.

        Args:
            name: the matrix's file key.
            adapter: gives the module for the matrix that takes its place, and answers what `layers.Linear` does.
        """
        parent_name, _, child = name.removesuffix(".weight").rpartition(".")
        parent = self.get_submodule(parent_name)
        adapted = adapter(getattr(parent, child))
        setattr(parent, child, adapted)
        layer = ".".join(parent_name.split(".")[:2])
        block: Any = self.get_submodule(layer)
        casts = self._casts_of_layers.setdefault(layer, LayerCasts(self.casts))
        block.att.cast_with(casts)  # first: those of adapters are to follow each other
        adapted.cast_with(casts)
        adapted.remember_with(block.first_pass)
        block.draws_random = block.draws_random or adapted.draws_random

    def set_recomputation(self, modes: Sequence[Recompute], *, keep_dequantized: bool = False) -> None:
        """Sets what each layer computes again, and reserves the room its dense matrices need meanwhile.

        Args:
            modes: one per layer.
            keep_dequantized: whether recomputation and backward share one dequantisation of a layer's time mix, for
                which its dense matrices are kept.
        """
        for block, mode in zip(self.blocks, modes, strict=True):
            block.recompute = mode  # type: ignore[assignment]
        self.workspace.keep_dequantized = keep_dequantized
        self.workspace.reserve(_packed_in(self._first_block, self.head))

    @property
    def dense_time_mix_bytes(self) -> int:
        """Bytes of one layer's time-mix matrices in 16 bits, 0 when they are not packed."""
        return sum(2 * m.out_features * m.in_features for m in _packed_in(self._first_block.att))

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
        watch: Watch | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """Runs the layers over T tokens.

        Args:
            tokens: int64 [B, T], or what `look_up` made of them, on any device.
            state: memory carried from earlier tokens; None starts every row from `time_state`.
            layout: segments of a packed row (B = 1); its carry says which of them start from `state`.
            return_state: also return the memory after the last token of each row, or of each segment
                of a packed row without continuations, or of those that its carry names.
            watch: is shown what enters each layer, and then `ln_out`, and what an earlier layer handed on.

        Returns:
            (hidden [B, T, C] after `ln_out` in the computation dtype, state or None).
        """
        carry = None if layout is None else layout.carry
        assert state is None or layout is None or carry is not None, "whose memory is it?"
        assert layout is None or (tokens.shape[0] == 1 and tokens.shape[1] == layout.tokens)
        assert not (return_state and layout is not None and layout.has_children)
        self.casts.forget()  # of what an optimizer has moved since
        x = self.embed(tokens)
        new_state: ModelState = []
        handed: Tensor | None = None
        for i in range(len(self.blocks)):
            if watch is not None:
                watch(x, handed)
            carried = None if state is None else state[i]
            x, after, handed = self.layer(i, x, handed, carried, layout, return_state=return_state)
            if after is not None:
                new_state.append(after)
        if watch is not None:
            watch(x, handed)
        return self.ln_out(x), new_state if return_state else None

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T], or what `look_up` made of them -> what enters the first layer [B, T, C]."""
        x = self.emb(tokens, self.device, self.compute_dtype)
        assert self._first_block.ln0 is not None
        entering: Tensor = self._first_block.ln0(F.dropout(x, self.dropout, self.training))
        return entering

    def parts_before(self, index: int) -> Iterator[nn.Parameter]:
        """Parameters of the embedding and of the layers before one: what its input depends on."""
        assert self._first_block.ln0 is not None
        for part in (self.emb, self._first_block.ln0, *self.blocks[:index]):
            yield from part.parameters()

    def parts_of_handed(self) -> Iterator[nn.Parameter]:
        """Parameters that what the first layer hands on depends on; none where it hands on nothing."""
        first = self._first_block
        if first.att.hands_on:
            yield from self.parts_before(0)
            yield from (*first.ln1.parameters(), *first.att.handed_parameters())

    def layer(
        self,
        index: int,
        x: Tensor,
        handed: Tensor | None,
        carried: LayerState | None,
        layout: SegmentLayout | None,
        *,
        return_state: bool,
        result: Tensor | None = None,
    ) -> tuple[Tensor, LayerState | None, Tensor | None]:
        """One layer of `forward`: x [B, T, C] -> (x [B, T, C], its memory or None, what it hands on).

        Args:
            handed: what an earlier layer handed on.
            result: what it gives, if that is known and its backward follows at once.
        """
        ends = None
        if return_state and layout is not None:
            ends = layout.last_positions if layout.carry is None else layout.carry.last
        block = self.blocks[index]
        after: LayerState | None
        options = {"remembers": return_state, "ends": ends, "dropout": self.dropout, "result": result}
        x, after, handed = block(x, carried, layout, handed, **options)
        return x, after, handed

    def initial_states(self) -> list[nn.Parameter]:
        """Each layer's `time_state`, [H, N, N] fp32."""
        return [block.att.time_state for block in self.blocks]  # type: ignore[union-attr, misc]

    def head_weight(self) -> HeadWeight:
        """The head as `ops.token_logps` takes it: [V, C] in the computation dtype, or its parts when it is packed."""
        if isinstance(self.head, FrozenHead):
            return self.head.dense_parts()
        return self.head.weight.to(self.compute_dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> unnormalised log-probabilities [..., V] in the computation dtype."""
        return self.head(hidden)  # type: ignore[no-any-return]


def _carried_inputs(
    mixer: Any, z: Tensor, shift: Tensor | None, layout: SegmentLayout | None, **options: bool
) -> Results:
    """`mixed_inputs` where some segments of a packed row continue rows of a memory.

    Only their first tokens see it: these are mixed on their own, each a row of one token, and put in place.
    """
    mixed: Results
    if shift is None or layout is None:
        mixed = mixer.mixed_inputs(z, shift, layout, **options)
        return mixed
    assert layout.carry is not None
    first = layout.carry.first
    mixed = mixer.mixed_inputs(z, None, layout, **options)
    continued: Results = mixer.mixed_inputs(z[0].index_select(0, first).unsqueeze(1), shift, None, **options)
    return tuple(row.index_copy(1, first, part.transpose(0, 1)) for row, part in zip(mixed, continued, strict=True))


def _starts(mixer: TimeMixer, carried: Tensor | None, layout: SegmentLayout | None) -> Tensor | None:
    """Where the recurrence starts: what is carried; in a packed row the other roots start anew."""
    if carried is None or layout is None or carried.shape[0] == layout.roots:
        return carried
    assert layout.carry is not None
    anew = mixer.time_state.to(carried.dtype).expand(layout.roots, *carried.shape[1:])
    return anew.index_copy(0, layout.carry.roots, carried)


def _packed_in(*modules: nn.Module) -> list[FrozenLinear]:
    return [part for module in modules for part in module.modules() if isinstance(part, FrozenLinear)]
