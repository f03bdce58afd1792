"""Chunks of rows as CUDA graphs: one recording serves all chunks of a shape, of all rows.

Recorded are the layers, not the head: which tokens have a target is no part of a shape. Of rows beside each other, and
of a stretch of one document, the last chunk is filled up to the full length and every chunk begins from a memory, a
row's beginning from one of its initial states; so the first, the last and all between are one shape. Chunks
in which documents of a packed row meet are of one shape if they have as many tokens, segments, and segments that are
carried.

Three graphs are recorded together when a second chunk of the shape comes: forward without autograd, forward with it,
and backward; between the last two the head is applied. Where the layers' inputs are kept there are two for each layer:
forward, and backward from its input. What is to be recorded is computed once before, on zeros.

Legend: B rows, N tokens of a chunk, C channels, L layers, K sequences.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from src.cutting import Chunk
from src.layout import Carry, SegmentLayout
from src.model.chunks import kept_of
from src.model.language_model import LanguageModel, Watch
from src.model.parking import Parking
from src.model.state import LayerState, ModelState, by_layer, stacked
from src.training.graphs import Key, Recordings, aliases_of, capturing, recording_of

_MOST_PARKED_INPUTS = 3
"""Of a layer's inputs so many are on the device: one that is read, one that is written, one that is copied."""


class ChunkRecorder(Recordings["RecordedChunk | RecordedLayers"]):
    """Recordings of chunks.

    Args:
        model, memory_gib, lends_gradients: see Recordings.
        tokens: of a whole chunk, of each row.
        by_layer: whether layers are recorded one by one, between which their inputs are parked.

    Attributes:
        gradients: where recordings add theirs, by the names of what is trained; empty before the first.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: int,
        memory_gib: float = 0.0,
        *,
        by_layer: bool = False,
        lends_gradients: bool = False,
    ) -> None:
        super().__init__(model, memory_gib, lends_gradients=lends_gradients)
        self.tokens = tokens
        self.by_layer = by_layer
        self.gradients: dict[str, Tensor] = {}

    def of_chunks(
        self, chunks: Sequence[Chunk], tokens: Tensor, states: Mapping[str, nn.Parameter], *, of_starts: bool
    ) -> list[RecordedChunk | RecordedLayers | None]:
        """For each chunk of a micro-batch its recording, made now where it is worth it; None: issue it.

        Args:
            chunks: on the device.
            tokens: int64 [B, T] on the host.
            states: what is trained.
            of_starts: whether the gradient of what chunks begin from is wanted.
        """
        if not chunks:
            return []
        if self.gradients and self.gradients.keys() != states.keys():  # recordings add to other gradients
            self._graphs.clear()
            self.gradients = {}
        sample = self.model.look_up(tokens[:1, :1])
        trained = (of_starts, *states, *(state.data_ptr() for state in states.values()))
        keys = [(*_shape_of(chunk, self.tokens), *trained) for chunk in chunks]
        times = Counter(keys)
        found: dict[Key, RecordedChunk | RecordedLayers | None] = {}
        for key, chunk in zip(keys, chunks, strict=True):
            if key not in found:
                record = partial(self._record, chunk, sample, states, of_starts)
                found[key] = self._found(key, record, times[key])
        if None in found.values():
            self._make_room()
        # Where one could not be made, or did not leave enough room, all are gone.
        return [found[key] if self._works else None for key in keys]

    def _record(
        self, chunk: Chunk, sample: Tensor, states: Mapping[str, nn.Parameter], of_starts: bool, pool: Any
    ) -> RecordedChunk | RecordedLayers:
        if not self.gradients:
            self.gradients = {name: torch.zeros_like(state) for name, state in states.items()}
        kind = RecordedLayers if self.by_layer else RecordedChunk
        return kind(self.model, chunk, sample, self.tokens, states, self.gradients, of_starts, pool)

    def _give_up(self, reason: str) -> None:
        self.gradients = {}
        super()._give_up(reason)


def _shape_of(chunk: Chunk, tokens: int) -> Key:
    layout = chunk.layout
    if layout is None:
        return (len(chunk.rows), _filled(chunk, tokens))
    lengths = (layout.tokens, layout.root_tokens)
    return (*lengths, layout.roots, len(layout.lengths), len(chunk.sources), len(chunk.kept))


def _filled(chunk: Chunk, tokens: int) -> int:
    """To how many tokens a chunk without borders is filled up: not where it leaves a memory, which would go on."""
    return chunk.end - chunk.start if chunk.kept else tokens


class _Places:
    """What goes into a recording of a chunk's shape, and the gradient of what the chunk begins from."""

    def __init__(
        self, model: LanguageModel, chunk: Chunk, sample: Tensor, tokens: int, gradients: Mapping[str, Tensor]
    ) -> None:
        layout, rows = chunk.layout, len(chunk.rows)
        self._model = model
        self._tokens = _filled(chunk, tokens) if layout is None else layout.tokens
        begins, keeps = (rows, rows) if layout is None else (len(chunk.sources), len(chunk.kept))
        # Two, since what kernels derive from a layout belongs to the graph that derived it.
        self._layouts = tuple(None if layout is None else _copy_of(layout) for _ in range(2))
        self._inputs = sample.new_zeros((rows, self._tokens, *sample.shape[2:]), device=model.device)
        self._start = _memory(model, begins) if begins else None
        self._after = _memory(model, keeps) if keeps else None
        self._of_start: LayerState | None = None
        self._of_states = [gradients.get(f"blocks.{layer}.att.time_state") for layer in range(model.shape.n_layer)]

    def _stream(self) -> Tensor:
        """Zeros in the shape of what enters a layer."""
        size = (self._inputs.shape[0], self._tokens, self._model.shape.n_embd)
        return torch.zeros(size, dtype=self._model.compute_dtype, device=self._model.device)

    def _load(self, inputs: Tensor, chunk: Chunk, start: LayerState | None, layout: SegmentLayout | None) -> None:
        """What is behind the last token stays what it was: tokens of earlier chunks, which nothing depends on."""
        self._inputs[:, : inputs.shape[1]].copy_(inputs, non_blocking=True)
        if layout is not None:
            assert chunk.layout is not None
            for target, source in zip(layout.tensors, chunk.layout.tensors, strict=True):
                target.copy_(source)
        if self._start is None:
            return
        if start is not None:
            torch._foreach_copy_(list(self._start), list(start))
            return
        initial = torch.stack([state.detach() for state in self._model.initial_states()])
        self._start.wkv.copy_(initial.unsqueeze(1).expand_as(self._start.wkv))
        torch._foreach_zero_([self._start.att_shift, self._start.ffn_shift])

    def _load_after(self, chunk: Chunk, after: LayerState | None) -> None:
        if self._after is None:
            return
        rows = self._after.wkv.shape[1]
        if after is None or len(chunk.kept) < rows:
            torch._foreach_zero_(list(self._after))
        if after is None:
            return
        if len(chunk.kept) == rows:
            torch._foreach_copy_(list(self._after), list(after))
            return
        for whole, own in zip(self._after, after, strict=True):
            for place, row in enumerate(chunk.kept):
                whole[:, row].copy_(own[:, place])

    def _kept(self, chunk: Chunk, memory: LayerState | None) -> LayerState | None:
        """Of what a replay left, what the chunk keeps, for longer than to the next one."""
        if not chunk.kept:
            return None
        assert memory is not None
        kept = kept_of(chunk, memory, rows_axis=1)
        return _memory_copy(memory) if kept is memory else kept

    def _hand_on(self, chunk: Chunk) -> LayerState | None:
        """The gradient of the memory the chunk began from; that of an initial state is added to the parameters'."""
        if self._of_start is None:
            return None
        if chunk.sources:
            return _memory_copy(self._of_start)
        of_rows = self._of_start.wkv.sum(1).unbind(0)
        trained = [(whole, own) for whole, own in zip(self._of_states, of_rows, strict=True) if whole is not None]
        if trained:
            torch._foreach_add_([whole for whole, _ in trained], [own for _, own in trained])
        return None


class RecordedChunk(_Places):
    """The layers over chunks of one shape: what goes in, three graphs, and what comes out.

    What it returns is overwritten by the next call, memories and their gradients excepted.
    """

    def __init__(
        self,
        model: LanguageModel,
        chunk: Chunk,
        sample: Tensor,
        tokens: int,
        states: Mapping[str, nn.Parameter],
        gradients: Mapping[str, Tensor],
        of_starts: bool,
        pool: Any,
    ) -> None:
        super().__init__(model, chunk, sample, tokens, gradients)
        self._gradient = self._stream()
        self._forward, self._again, self._backward = (torch.cuda.CUDAGraph() for _ in range(3))
        second = _SecondPass(model)
        # Kernels are loaded when they are first used, which cannot be recorded. With another layout, so that what is
        # derived from the recorded ones is not known yet.
        self._pass_by(chunk.layout)
        functional_call(second, aliases_of(states, gradients), (self, chunk.layout, of_starts, None))
        with recording_of(model):
            with capturing(self._forward, pool):
                self._hidden, self._memory = self._pass_by(self._layouts[0])
            _forget(model)
            aliases, own = aliases_of(states, gradients), (self, self._layouts[1], of_starts, pool)
            self._hidden_again, self._of_start = functional_call(second, aliases, own)
            self._dense = model.workspace.buffers()  # which the graphs write to

    def forward(self, inputs: Tensor, chunk: Chunk, start: LayerState | None) -> tuple[Tensor, LayerState | None]:
        """The first pass: what `model.chunks.run_chunk` gives for `look_up`'s inputs."""
        self._load(inputs, chunk, start, self._layouts[0])
        self._forward.replay()
        _forget(self._model)
        return self._hidden[:, : inputs.shape[1]], self._kept(chunk, self._memory)

    def again(self, inputs: Tensor, chunk: Chunk, start: LayerState | None) -> Tensor:
        """The second pass as far as the head: hidden [b, N, C]; `backward` is to follow."""
        self._load(inputs, chunk, start, self._layouts[1])
        self._again.replay()
        _forget(self._model)
        hidden: Tensor = self._hidden_again[:, : inputs.shape[1]]
        return hidden

    def backward(self, chunk: Chunk, gradient: Tensor | None, after: LayerState | None) -> LayerState | None:
        """Adds to the gradients of what is trained; returns that of the memory the chunk began from, if it is wanted.

        Args:
            chunk: that `again` was called with.
            gradient: of what that returned; None is zero.
            after: of the memory that the chunk leaves; None is zero.
        """
        _fill(self._gradient, gradient)
        self._load_after(chunk, after)
        self._backward.replay()
        _forget(self._model)
        return self._hand_on(chunk)

    @torch.no_grad()
    def _pass_by(self, layout: SegmentLayout | None) -> tuple[Tensor, LayerState | None]:
        start = None if self._start is None else by_layer(self._start)
        hidden, after = self._model(self._inputs, start, layout, return_state=self._after is not None)
        return hidden, None if after is None else stacked(after)


class RecordedLayers(_Places):
    """The layers over chunks of one shape one by one, each from its input: two graphs for each.

    What enters layers waits in host memory between the passes and takes turns with a few places on the device. What is
    returned is overwritten by the next call, memories and their gradients excepted.
    """

    def __init__(
        self,
        model: LanguageModel,
        chunk: Chunk,
        sample: Tensor,
        tokens: int,
        states: Mapping[str, nn.Parameter],
        gradients: Mapping[str, Tensor],
        of_starts: bool,
        pool: Any,
    ) -> None:
        super().__init__(model, chunk, sample, tokens, gradients)
        layers = len(model.blocks)
        self._of_starts = of_starts and self._start is not None
        # Whether what enters each layer depends on something trained, or on a memory.
        self._depends = [
            (self._of_starts and layer > 0) or any(part.requires_grad for part in model.parts_before(layer))
            for layer in range(layers + 1)
        ]
        self._entering = [self._stream() for _ in range(_MOST_PARKED_INPUTS)]
        self._gradients = [self._stream() for _ in range(2)]
        hands_on = any(True for _ in model.parts_of_handed())
        self._handed, self._of_handed = (self._stream() if hands_on else None for _ in range(2))
        self._handed_depends = self._of_starts or any(part.requires_grad for part in model.parts_of_handed())
        self._hidden = self._stream()
        self._memory = None if self._after is None else _memory_copy(self._after)
        if self._of_starts:
            assert self._start is not None
            self._of_start = _memory_copy(self._start)
        self._forward = [torch.cuda.CUDAGraph() for _ in range(layers)]
        self._second = [torch.cuda.CUDAGraph() for _ in range(layers)]
        again = _LayerAgain(model)
        # Autograd's thread gets its CUDA context from its first kernel; a product that came before it would warn.
        torch.ones((), device=model.device, requires_grad=True).mul(2).backward()
        for layer in range(layers):
            self._pass_by(layer, chunk.layout)
        for layer in reversed(range(layers)):
            functional_call(again, aliases_of(states, gradients), (self, layer, chunk.layout))
        with recording_of(model):
            for layer in range(layers):
                _forget(model)
                with capturing(self._forward[layer], pool):
                    self._pass_by(layer, self._layouts[0])
            for layer in reversed(range(layers)):
                _forget(model)
                aliases = aliases_of(states, gradients)
                with capturing(self._second[layer], pool):
                    functional_call(again, aliases, (self, layer, self._layouts[1]))
            self._dense = model.workspace.buffers()  # which the graphs write to

    def forward(
        self, inputs: Tensor, chunk: Chunk, start: LayerState | None, parking: Parking, watch: Watch
    ) -> tuple[Tensor, LayerState | None]:
        """The first pass: what `model.chunks.run_chunk` gives for `look_up`'s inputs.

        Args:
            parking: that `watch` parks in.
            watch: see `LanguageModel.forward`.
        """
        parking.settle()  # the chunk before may still be leaving
        self._load(inputs, chunk, start, self._layouts[0])
        for layer, graph in enumerate(self._forward):
            if layer:  # before that is written to for which this one has to be on its way
                watch(self._at(layer), self._handed)
            graph.replay()
            if not layer:
                watch(self._at(0), None)
        watch(self._at(len(self._forward)), self._handed)
        _forget(self._model)
        return self._hidden[:, : inputs.shape[1]], self._kept(chunk, self._memory)

    def backward(
        self,
        inputs: Tensor,
        chunk: Chunk,
        start: LayerState | None,
        after: LayerState | None,
        parking: Parking,
        parked: list[Tensor],
        handed: Tensor | None,
        gradient_of: Callable[[Tensor], Tensor | None],
    ) -> LayerState | None:
        """Adds to the gradients of what is trained; returns that of the memory the chunk began from, if it is wanted.

        Args:
            inputs, chunk, start: of `forward`.
            after: the gradient of the memory that the chunk leaves; None is zero.
            parking: where `parked` is.
            parked: what entered each layer, and then `ln_out`; taken from its end.
            handed: what the first layer handed on, likewise.
            gradient_of: what entered `ln_out` [b, N, C] -> its gradient; None is zero.
        """
        self._load(inputs, chunk, start, self._layouts[1])
        self._load_after(chunk, after)
        last = self._at(len(self._second))
        coming = parking.fetch(parked.pop(), last)
        if self._handed is not None:
            assert self._of_handed is not None
            assert handed is not None
            parking.fetch(handed, self._handed).arrived()
            self._of_handed.zero_()
        coming.arrived()
        coming = parking.fetch(parked.pop(), self._at(len(self._second) - 1))
        _fill(self._gradient_at(len(self._second)), gradient_of(last[:, : inputs.shape[1]]))
        _forget(self._model)
        for layer in reversed(range(len(self._second))):
            coming.arrived()
            if layer:  # while this one is computed
                coming = parking.fetch(parked.pop(), self._at(layer - 1))
            self._second[layer].replay()
        _forget(self._model)
        return self._hand_on(chunk)

    def _at(self, layer: int) -> Tensor:
        """Where what enters a layer is, or `ln_out`."""
        return self._entering[layer % len(self._entering)]

    def _gradient_at(self, layer: int) -> Tensor:
        return self._gradients[layer % len(self._gradients)]

    @torch.no_grad()
    def _pass_by(self, layer: int, layout: SegmentLayout | None) -> None:
        model = self._model
        if layer == 0:
            self._at(0).copy_(model.embed(self._inputs))
        carried = None if self._start is None else LayerState(*(part[layer] for part in self._start))
        handed = self._handed if layer else None
        x, after, own = model.layer(
            layer, self._at(layer), handed, carried, layout, return_state=self._memory is not None
        )
        self._at(layer + 1).copy_(x)
        if layer == 0 and self._handed is not None:
            assert own is not None
            self._handed.copy_(own)
        if self._memory is not None:
            assert after is not None
            for whole, part in zip(self._memory, after, strict=True):
                whole[layer].copy_(part)
        if layer + 1 == len(model.blocks):
            self._hidden.copy_(model.ln_out(x))

    def again(self, layer: int, layout: SegmentLayout | None) -> None:
        """One layer computed again, and its backward; what is trained has aliases in its place."""
        model = self._model
        with torch.enable_grad():
            x = self._at(layer).detach().requires_grad_(self._depends[layer])
            start = None
            if self._start is not None:
                start = LayerState(*(part[layer].detach().requires_grad_(self._of_starts) for part in self._start))
            handed = None
            if layer and self._handed is not None:
                handed = self._handed.detach().requires_grad_(self._handed_depends)
                handed.grad = self._of_handed if self._handed_depends else None  # which adds up, layer after layer
            result = self._at(layer + 1)
            out, kept, own = model.layer(
                layer, x, handed, start, layout, return_state=self._after is not None, result=result
            )
        ends = [(out, self._gradient_at(layer + 1))]
        if layer == 0 and own is not None and self._of_handed is not None:
            ends.append((own, self._of_handed))
        if self._after is not None:
            assert kept is not None
            ends += [(end, whole[layer]) for end, whole in zip(kept, self._after, strict=True)]
        asked = [(end, gradient) for end, gradient in ends if end.requires_grad]
        if asked:
            torch.autograd.backward([end for end, _ in asked], [gradient for _, gradient in asked])
        if start is not None and self._of_start is not None:
            for whole, leaf in zip(self._of_start, start, strict=True):
                whole[layer].copy_(_gradient_of(leaf))
        if self._depends[layer]:
            self._gradient_at(layer).copy_(_gradient_of(x))
        if layer == 0 and self._depends[0]:
            with torch.enable_grad():
                entering = model.embed(self._inputs)
            torch.autograd.backward([entering], [self._gradient_at(0)])


def _memory_copy(memory: LayerState) -> LayerState:
    """The same in tensors of its own."""
    return LayerState(*(part.clone() for part in memory))


def _fill(whole: Tensor, gradient: Tensor | None) -> None:
    """Gradients [b, n, C] of the first tokens; those behind them are 0."""
    tokens = 0
    if gradient is not None:
        tokens = gradient.shape[1]
        whole[:, :tokens].copy_(gradient)
    whole[:, tokens:].zero_()


class _LayerAgain(nn.Module):
    """`RecordedLayers.again`, while others stand in the parameters' places."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, recorded: RecordedLayers, layer: int, layout: SegmentLayout | None) -> None:
        """Nothing but what the recording's places hold afterwards."""
        recorded.again(layer, layout)


class _SecondPass(nn.Module):
    """Forward with autograd and backward, while others stand in the parameters' places; without a pool not recorded."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, recorded: RecordedChunk, layout: SegmentLayout | None, of_starts: bool, pool: Any
    ) -> tuple[Tensor, LayerState | None]:
        """Hidden [B, N, C], and the gradient of what it begins from."""
        start, gradients_of_kept = recorded._start, recorded._after
        leaves: LayerState | None = None
        kept: ModelState | None
        with torch.enable_grad(), _within(recorded._again, pool):
            if start is not None:
                leaves = LayerState(*(part.detach().requires_grad_(of_starts) for part in start))
            hidden, kept = self.model(
                recorded._inputs,
                None if leaves is None else by_layer(leaves),
                layout,
                return_state=gradients_of_kept is not None,
            )
        _forget(self.model)
        ends = [(hidden, recorded._gradient)]
        if gradients_of_kept is not None:
            assert kept is not None
            for layer, gradients in zip(kept, by_layer(gradients_of_kept), strict=True):
                ends += zip(layer, gradients, strict=True)
        asked = [(end, gradient) for end, gradient in ends if end.requires_grad]
        if not asked:
            raise RuntimeError("nothing in the layers is trained")
        with _within(recorded._backward, pool):
            torch.autograd.backward([end for end, _ in asked], [gradient for _, gradient in asked])
        of_start = None
        if leaves is not None and of_starts:
            of_start = LayerState(*(_gradient_of(leaf) for leaf in leaves))
        return hidden.detach(), of_start


def _within(graph: torch.cuda.CUDAGraph, pool: Any) -> Any:
    return contextlib.nullcontext() if pool is None else capturing(graph, pool)


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _forget(model: LanguageModel) -> None:
    """What dense copies of weights hold is unknown to others after a replay, and to a graph before it."""
    model.workspace.forget()
    model.casts.forget()


def _memory(model: LanguageModel, sequences: int) -> LayerState:
    """Zeros in the shape of a memory of K sequences, see `state.stacked`."""
    shape = model.shape
    shift = (shape.n_layer, sequences, shape.n_embd)
    matrix = (shape.n_layer, sequences, shape.n_head, shape.head_size, shape.head_size)
    return LayerState(
        torch.zeros(shift, dtype=model.compute_dtype, device=model.device),
        torch.zeros(matrix, dtype=torch.float32, device=model.device),
        torch.zeros(shift, dtype=model.compute_dtype, device=model.device),
    )


def _copy_of(layout: SegmentLayout) -> SegmentLayout:
    """The same in tensors of its own."""
    carry = None if layout.carry is None else Carry(*(tensor.clone() for tensor in layout.carry.tensors))
    return replace(
        layout,
        root_borders=layout.root_borders.clone(),
        child_borders=layout.child_borders.clone(),
        parents=layout.parents.clone(),
        previous=layout.previous.clone(),
        carry=carry,
    )
