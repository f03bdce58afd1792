"""Rows of any length: what a step needs on the device does not grow with them (`--chunk_ctx`).

A row is computed in chunks (`src.cutting`), twice. The first pass goes forward without autograd, keeps the memory that
each chunk begins from, and scores the targets. From the scores follow the loss and its gradient with respect to each of
them. The second pass goes from the last chunk to the first: each is computed again, now with autograd, and its backward
begins from the gradients of its scores and of the memory it leaves, which the chunks after it have handed to it; the
gradient of the memory it began from goes to the chunks before. So loss and gradient are those of the whole row, also of
the initial state, whatever the size of a chunk, unless they are to be cut (`bptt_chunks`).

If the first pass leaves what entered each layer in host memory, the second begins at every layer at once: it computes
nothing that only leads to the next one.

On a GPU chunks of like shape are replayed (`chunk_graphs.py`), and what waits on the host is copied there and back
while others are computed.

Legend: M targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from src.cutting import Chunk, cut, on_device
from src.model.chunks import Memories, by_source, chunk_scores, index_on, kept_of, read_scores, run_chunk
from src.model.language_model import LanguageModel, Watch
from src.model.parking import Coming, Parking
from src.model.recompute import Draws
from src.model.state import LayerState, by_layer, stacked
from src.ops.token_logps import token_logps_gradient
from src.training.chunk_graphs import ChunkRecorder, RecordedChunk, RecordedLayers
from src.training.objectives import Looker, Scored, Staged, TokensAlone


@dataclass(frozen=True)
class ChunkOptions:
    """How rows are cut.

    Attributes:
        tokens: most tokens of a chunk, of each row.
        bptt_chunks: gradients pass the borders within so many chunks, counted from the row's start, and no others;
            0: they pass all.
        on_host: whether memories wait in host memory.
        with_inputs: whether each layer's inputs wait there, too.
    """

    tokens: int
    bptt_chunks: int = 0
    on_host: bool = False
    with_inputs: bool = False

    def passes(self, earlier: Chunk, later: Chunk) -> bool:
        """Whether the gradient of a memory goes from one chunk to the one that left it."""
        return not self.bptt_chunks or earlier.number // self.bptt_chunks == later.number // self.bptt_chunks


@dataclass(frozen=True, kw_only=True)
class StagedChunks(Staged):
    """A batch to be computed in chunks.

    Attributes:
        tokens: int64 [B, T], which stay on the host.
        chunks: what is computed, in order.
    """

    in_chunks: ClassVar[bool] = True
    tokens: Tensor
    chunks: tuple[Chunk, ...]

    def to(self, device: torch.device) -> StagedChunks:
        """See Staged."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved, chunks=on_device(self.chunks, device))


class ChunkedObjective:
    """An objective that computes rows of more than so many tokens in chunks; others it leaves as they are.

    Args:
        objective: whose loss it is.
        options: how rows are cut.
        recorder: replays chunks, by layer where these' inputs are kept; None: all are issued.
    """

    def __init__(self, objective: Scored, options: ChunkOptions, recorder: ChunkRecorder | None = None) -> None:
        assert recorder is None or recorder.by_layer == options.with_inputs
        self.objective = objective
        self.options = options
        self.recorder = recorder
        self.recordable = objective.recordable

    def stage(self, model: Looker, batch: Any) -> Staged:
        """See Objective."""
        rows, width = batch.tokens.shape
        if width <= self.options.tokens:
            return self.objective.stage(model, batch)
        staged = self.objective.stage(TokensAlone(), batch)
        tensors = dict(staged.tensors)
        tokens = tensors.pop("x")
        chunks = cut(rows, width, staged.layout, tensors["positions"], self.options.tokens)
        return StagedChunks(tensors, staged.source, pairs=staged.pairs, tokens=tokens, chunks=tuple(chunks))

    def compute(self, model: LanguageModel, staged: Staged) -> tuple[Tensor, Any]:
        """See Objective."""
        if not isinstance(staged, StagedChunks):
            return self.objective.compute(model, staged)
        options, chunks = self.options, staged.chunks
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        parking = Parking(model.device)
        memories = Memories(model.device, parking if options.on_host else None)
        passed_by = [_PassedBy(model, parking if options.with_inputs else None) for _ in chunks]
        recorded: list[RecordedChunk | RecordedLayers | None] = [None] * len(chunks)
        if self.recorder is not None:
            of_starts = options.bptt_chunks != 1 or any(name.endswith("time_state") for name in trained)
            recorded = self.recorder.of_chunks(chunks, staged.tokens, trained, of_starts=of_starts)

        def run(place: int, chunk: Chunk, start: LayerState | None) -> tuple[Tensor, LayerState | None]:
            watch = passed_by[place].begin()
            replayed = recorded[place]
            if replayed is None:
                return run_chunk(model, staged.tokens, chunk, start, watch)
            inputs = model.look_up(chunk.of(staged.tokens))
            if isinstance(replayed, RecordedChunk):
                return replayed.forward(inputs, chunk, start)
            assert watch is not None
            return replayed.forward(inputs, chunk, start, parking, watch)

        sets = self.objective.target_sets(staged)
        scores = read_scores(model, staged.tokens, chunks, sets, memories, run)
        parking.settle()
        leaves = [(logp.requires_grad_(), max_logit.requires_grad_()) for logp, max_logit in scores]
        loss, result = self.objective.loss_of(staged, leaves)
        every = [score for pair in leaves for score in pair]
        found = torch.autograd.grad(loss, every, allow_unused=True, materialize_grads=True)
        gradients = list(zip(found[::2], found[1::2], strict=True))
        second = _SecondPass(model, staged, sets, gradients, memories, parking, passed_by, options)
        if self.recorder is not None and any(recorded):
            second.replay(recorded, self.recorder)
        passed: Tensor = _BackwardInChunks.apply(loss.detach(), second, list(trained), *trained.values())
        return passed, result

    def logs(self, result: Any) -> dict[str, float]:
        """See Objective."""
        return self.objective.logs(result)

    def state(self) -> dict[str, Any]:
        """See Objective."""
        return self.objective.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Objective."""
        self.objective.restore(state)


class _PassedBy:
    """What the first pass leaves of a chunk besides its memory.

    Args:
        model: passes it.
        parking: where what enters the layers waits; None: it is not kept.

    Attributes:
        draws: where the random numbers stood when it began, and then at each layer; empty where none are drawn.
        inputs: what entered each layer, and then `ln_out`, on the host; empty where it is not kept.
        handed: what the first layer handed on to all others, with them; None where it hands on nothing.
    """

    def __init__(self, model: LanguageModel, parking: Parking | None) -> None:
        self.draws: list[Draws] = []
        self.inputs: list[Tensor] = []
        self.handed: Tensor | None = None
        self._model = model
        self._parking = parking

    def begin(self) -> Watch | None:
        """To be called before the chunk; gives what watches its layers."""
        self._draw()
        return None if self._parking is None else self._watch

    def _watch(self, x: Tensor, handed: Tensor | None) -> None:
        assert self._parking is not None
        self.inputs.append(self._parking.park(x))
        if handed is not None and self.handed is None:
            self.handed = self._parking.park(handed)
        self._draw()

    def _draw(self) -> None:
        if self._model.draws_random:
            self.draws.append(Draws.next(self._model.device))

    def drawing(self, layer: int) -> AbstractContextManager[None]:
        """A context that draws a layer's random numbers again; -1 is the chunk from its beginning."""
        return self.draws[layer + 1].again() if self.draws else contextlib.nullcontext()


class _BackwardInChunks(torch.autograd.Function):
    """A loss whose backward is the second pass. It gives all gradients at once: hooks see nothing unusual."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, second: _SecondPass, names: list[str], *trained: Tensor) -> Tensor:
        ctx.second, ctx.names = second, names
        ctx.save_for_backward(*trained)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Leaves in the parameters' places: their gradients add up in place, chunk after chunk.
        leaves = {
            name: tensor.detach().requires_grad_() for name, tensor in zip(ctx.names, ctx.saved_tensors, strict=True)
        }
        into = ctx.second.into
        if into:
            torch._foreach_zero_(list(into.values()))
            for name, leaf in leaves.items():
                leaf.grad = into[name]
        functional_call(ctx.second, {f"model.{name}": leaf for name, leaf in leaves.items()}, (gradient,))
        if into:  # which are the recordings' own
            own = [into[name] for name in leaves]
            given = [tensor.detach() for tensor in own] if ctx.second.lends else torch._foreach_mul(own, 1.0)
            return (None, None, None, *given)
        # Zeros where nothing arrived: an engine waits for every gradient.
        found = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values())
        return (None, None, None, *found)


ScoreGradients = Sequence[tuple[Tensor, Tensor]]
"""For each set of targets the loss's gradient with respect to log-probability and largest logit, [M] each."""
Ends = list[tuple[Tensor, Tensor | None]]
"""Results, and their gradients where there are any."""


class _SecondPass(nn.Module):
    """Backward through all chunks, last to first; a module, so that leaves can stand in its model's parameters' places.

    Args:
        model, staged, target_sets: of the first pass.
        gradients: of the loss with respect to the scores it gave.
        memories: that it left; each is dropped when nobody needs it any more.
        parking: where what else it left waits.
        passed_by: what else it left of each chunk.
        options: how rows are cut.

    Attributes:
        into: where recordings add gradients; empty where none are replayed.
        lends: see Recordings.
    """

    def __init__(
        self,
        model: LanguageModel,
        staged: StagedChunks,
        target_sets: Sequence[Tensor],
        gradients: ScoreGradients,
        memories: Memories,
        parking: Parking,
        passed_by: list[_PassedBy],
        options: ChunkOptions,
    ) -> None:
        super().__init__()
        self.model = model
        self.into: Mapping[str, Tensor] = {}
        self.lends = False
        self._staged = staged
        self._target_sets = target_sets
        self._gradients = gradients
        self._memories = memories
        self._parking = parking
        self._passed_by = passed_by
        self._recorded: list[RecordedChunk | RecordedLayers | None] = [None] * len(passed_by)
        self._options = options

    def replay(self, recorded: Sequence[RecordedChunk | RecordedLayers | None], recorder: ChunkRecorder) -> None:
        """Takes the recordings of chunks for those that have one."""
        self._recorded = list(recorded)
        self.into, self.lends = recorder.gradients, recorder.lends_gradients

    @cached_property
    def _depends(self) -> list[bool]:
        """Whether what enters each layer, and then `ln_out`, depends on something trained."""
        layers = range(len(self.model.blocks) + 1)
        return [any(part.requires_grad for part in self.model.parts_before(layer)) for layer in layers]

    def forward(self, scale: Tensor) -> None:
        """Adds to the parameters' gradients those of the loss times `scale`, 0-d."""
        chunks = self._staged.chunks
        handed: dict[int, LayerState] = {}
        while self._passed_by:
            index, passed_by, recorded = len(self._passed_by) - 1, self._passed_by.pop(), self._recorded.pop()
            chunk = chunks[index]
            after = handed.pop(index, None)
            if len(chunk.scored) or after is not None:
                start = self._memories.start_of(chunk)
                if index:
                    self._memories.begin_to_fetch(chunks[index - 1])
                with torch.enable_grad():
                    if isinstance(recorded, RecordedChunk):
                        of_start = self._replayed(recorded, chunk, start, after, scale)
                    elif recorded is not None:
                        of_start = self._replayed_by_layer(recorded, chunk, passed_by, start, after, scale)
                    elif passed_by.inputs:
                        of_start = self._layer_by_layer(chunk, passed_by, start, after, scale)
                    else:
                        of_start = self._at_once(chunk, passed_by, start, after, scale)
                self._hand_on(chunk, of_start, handed)
            self._memories.drop(index)
        self._memories.settle()

    def _goes_on(self, chunk: Chunk) -> bool:
        """Whether gradients of what a chunk begins from go on to earlier chunks."""
        return any(self._options.passes(self._staged.chunks[source], chunk) for source, _ in chunk.sources)

    def _replayed(
        self,
        recorded: RecordedChunk,
        chunk: Chunk,
        start: LayerState | None,
        after: LayerState | None,
        scale: Tensor,
    ) -> LayerState | None:
        """`_at_once` of a recorded chunk."""
        hidden = recorded.again(self.model.look_up(chunk.of(self._staged.tokens)), chunk, start)
        hidden = hidden.detach().requires_grad_()
        _backward_from(self._of_scores(chunk, hidden, scale))
        return recorded.backward(chunk, hidden.grad, after)

    def _replayed_by_layer(
        self,
        recorded: RecordedLayers,
        chunk: Chunk,
        passed_by: _PassedBy,
        start: LayerState | None,
        after: LayerState | None,
        scale: Tensor,
    ) -> LayerState | None:
        """`_layer_by_layer` of a recorded chunk."""

        def gradient_of(entering: Tensor) -> Tensor | None:
            last = entering.detach().requires_grad_(self._depends[-1] or self._goes_on(chunk))
            _backward_from(self._of_scores(chunk, self.model.ln_out(last), scale))
            return last.grad

        inputs = self.model.look_up(chunk.of(self._staged.tokens))
        parked = (passed_by.inputs, passed_by.handed)
        return recorded.backward(inputs, chunk, start, after, self._parking, *parked, gradient_of)

    def _at_once(
        self, chunk: Chunk, passed_by: _PassedBy, start: LayerState | None, after: LayerState | None, scale: Tensor
    ) -> LayerState | None:
        """Backward through a whole chunk.

        Args:
            start: the memory it begins from.
            after: the gradient of the memory it leaves.
            scale: of the loss's gradient.

        Returns:
            The gradient of `start`, if it goes on to earlier chunks.
        """
        if start is not None:
            start = _leaves(start, self._goes_on(chunk))
        with passed_by.drawing(-1):
            hidden, memory = run_chunk(self.model, self._staged.tokens, chunk, start)
        ends = self._of_scores(chunk, hidden, scale)
        if after is not None:
            assert memory is not None
            ends += zip(memory, after, strict=True)
        _backward_from(ends)
        return None if start is None or not start.wkv.requires_grad else _gradients_of(start)

    def _layer_by_layer(
        self, chunk: Chunk, passed_by: _PassedBy, start: LayerState | None, after: LayerState | None, scale: Tensor
    ) -> LayerState | None:
        """The same from what entered each layer."""
        model, parking = self.model, self._parking
        goes_on = self._goes_on(chunk)
        starts = None if start is None else [_leaves(layer, goes_on) for layer in by_layer(start)]
        gradients = None if after is None else by_layer(after)

        def leaf(coming: Coming, layer: int) -> Tensor:
            x = coming.arrived()
            return x.detach().requires_grad_(self._depends[layer] or (goes_on and layer > 0))

        coming = parking.fetch(passed_by.inputs.pop())
        handed: Tensor | None = None
        if passed_by.handed is not None:
            handed = parking.fetch(passed_by.handed).arrived().detach()
            handed.requires_grad_(goes_on or any(part.requires_grad for part in model.parts_of_handed()))
        last, coming = leaf(coming, len(model.blocks)), parking.fetch(passed_by.inputs.pop())
        _backward_from(self._of_scores(chunk, model.ln_out(last), scale))
        result, gradient = last.detach(), last.grad
        del last
        for layer in reversed(range(len(model.blocks))):
            x = leaf(coming, layer)
            if layer:  # while this one is computed
                coming = parking.fetch(passed_by.inputs.pop())
            with passed_by.drawing(layer):
                carried = None if starts is None else starts[layer]
                wanted = gradients is not None
                out, memory, own = model.layer(
                    layer, x, handed if layer else None, carried, chunk.layout, return_state=wanted, result=result
                )
            ends: Ends = [(out, gradient)]
            if layer == 0 and own is not None and handed is not None:
                ends.append((own, handed.grad))
            if gradients is not None:
                assert memory is not None
                ends += zip(kept_of(chunk, memory), gradients[layer], strict=True)
            _backward_from(ends)
            result, gradient = x.detach(), x.grad
        if gradient is not None:
            with passed_by.drawing(-1):
                _backward_from([(model.embed(model.look_up(chunk.of(self._staged.tokens))), gradient)])
        return None if starts is None or not goes_on else stacked([_gradients_of(layer) for layer in starts])

    def _of_scores(self, chunk: Chunk, hidden: Tensor, scale: Tensor) -> Ends:
        """What the loss depends on in a chunk, with gradients: scores of targets, or what the head is applied to."""
        if not len(chunk.scored):
            return []
        gradients = [
            tuple(gradient.index_select(0, chunk.scored) * scale for gradient in pair) for pair in self._gradients
        ]
        head = self.model.head_weight()
        if isinstance(head, Tensor) and not (head.requires_grad or hidden.requires_grad):
            return []
        if not isinstance(head, Tensor) or head.requires_grad:
            scores = chunk_scores(self.model, hidden, chunk, self._target_sets)
            return [end for pairs in zip(scores, gradients, strict=True) for end in zip(*pairs, strict=True)]
        rows = hidden.flatten(0, 1).index_select(0, chunk.places)
        return [
            (rows, token_logps_gradient(rows, head, targets.index_select(0, chunk.scored), *pair))
            for targets, pair in zip(self._target_sets, gradients, strict=True)
        ]

    def _hand_on(self, chunk: Chunk, of_start: LayerState | None, handed: dict[int, LayerState]) -> None:
        """Adds the gradient of the memory that a chunk began from to what the chunks that left it are handed."""
        row = 0
        for source, places in by_source(chunk.sources):
            rows = slice(row, row + len(places))
            row = rows.stop
            if not self._options.passes(self._staged.chunks[source], chunk):
                continue
            assert of_start is not None
            kept = len(self._staged.chunks[source].kept)
            index = None if places == list(range(kept)) else index_on(self.model.device, places)
            own = LayerState(*(_spread(part[:, rows], index, kept) for part in of_start))
            if source in handed:
                own = LayerState(*(one.add_(other) for one, other in zip(handed[source], own, strict=True)))
            handed[source] = own


def _leaves(memory: LayerState, wanted: bool) -> LayerState:
    """A memory of which gradients may be wanted."""
    return LayerState(*(part.detach().requires_grad_(wanted) for part in memory))


def _gradients_of(leaves: LayerState) -> LayerState:
    return LayerState(*(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves))


def _backward_from(ends: Ends) -> None:
    asked = [(end, gradient) for end, gradient in ends if gradient is not None and end.requires_grad]
    if asked:
        torch.autograd.backward([end for end, _ in asked], [gradient for _, gradient in asked])


def _spread(gradient: Tensor, index: Tensor | None, kept: int) -> Tensor:
    """The gradient of some rows of a memory [L, K, ...], at their places among those of the chunk that left it."""
    if index is None:
        return gradient
    spread = gradient.new_zeros((gradient.shape[0], kept, *gradient.shape[2:]))
    return spread.index_add_(1, index, gradient)
