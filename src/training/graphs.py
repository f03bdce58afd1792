"""Training steps as CUDA graphs: recorded once per shape, replayed without Python.

A small model's step is over a thousand kernels of a few microseconds; issued one by one, the GPU waits for
the host most of the time. `GraphedObjective` records forward, recomputation and backward of an objective for
a shape of its staged batch when that shape comes the second time, and replays it from then on. The replay
is an ordinary autograd node that holds the states' gradients, so that gradient accumulation and DeepSpeed's
hooks see nothing unusual.

Batches are padded a little (`padded`) so that few shapes occur: padding comes after what counts, in
segments of its own in packed rows, and has no target.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from src.data.batches import Batch
from src.data.preference_batches import PreferenceBatch
from src.layout import SegmentLayout
from src.losses import IGNORED_TARGET, Role, slot
from src.model.rwkv6 import RWKV6
from src.quant import SHARED_WORKSPACE
from src.training.objectives import Objective, Outcome, Staged

_MOST_GRAPHS = 12
_TOKEN_GRAIN = 128
_SEGMENT_GRAIN = 8

Key = tuple[Any, ...]
AnyBatch = TypeVar("AnyBatch", Batch, PreferenceBatch)


class GraphedObjective:
    """Runs an objective, replaying recorded graphs where a shape repeats.

    Args:
        objective: stages and computes.
        model: on a GPU, with trained states only and without dropout.
    """

    def __init__(self, objective: Objective, model: RWKV6) -> None:
        assert model.device.type == "cuda"
        assert model.dropout == 0
        self.objective = objective
        self.model = model
        self._states = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._graphs: OrderedDict[Key, _RecordedStep] = OrderedDict()
        self._seen: set[Key] = set()
        self._pool: Any = None
        self._works = True

    def __call__(self, batch: Any) -> Outcome:
        """Loss of one micro-batch, ready for `backward`."""
        staged = self.objective.stage(self.model, padded(batch), _TOKEN_GRAIN)
        recorded = self._recorded(staged) if self._works else None
        if recorded is None:
            loss, result = self.objective.compute(self.model, staged)
            return Outcome(loss, lambda: self.objective.logs(result))
        recorded.load(staged)
        loss = _Replay.apply(recorded, *self._states.values())
        return Outcome(loss, lambda: self.objective.logs(recorded.result))

    def _recorded(self, staged: Staged) -> _RecordedStep | None:
        key = (*_key(staged), *(state.data_ptr() for state in self._states.values()))
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key not in self._seen:
            self._seen.add(key)
            return None
        if len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            self._graphs[key] = _RecordedStep(self.objective, self.model, self._states, staged, self._pool)
        except RuntimeError as error:  # out of memory is one of them: what runs unrecorded need not fit twice
            self._works = False
            self._graphs.clear()
            torch.cuda.empty_cache()
            first_line = str(error).splitlines()[0]
            warnings.warn(f"no CUDA graph can be recorded ({first_line}); steps run unrecorded", stacklevel=2)
            return None
        return self._graphs[key]


class _Step(nn.Module):
    """Loss and gradients in one call, so that recomputation, too, happens while the states are swapped."""

    def __init__(self, objective: Objective, model: RWKV6) -> None:
        super().__init__()
        self.objective = objective
        self.model = model

    def forward(self, staged: Staged, states: list[Tensor]) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
        loss, result = self.objective.compute(self.model, staged)
        return loss.detach(), result, torch.autograd.grad(loss, states)


class _RecordedStep:
    """One recorded computation with its fixed inputs, loss and gradients."""

    def __init__(
        self,
        objective: Objective,
        model: RWKV6,
        states: Mapping[str, nn.Parameter],
        staged: Staged,
        pool: Any,
    ) -> None:
        tensors = {name: tensor.clone() for name, tensor in staged.tensors.items()}
        layout = None if staged.layout is None else _cloned(staged.layout)
        self.inputs = replace(staged, tensors=tensors, layout=layout)
        # What the workspace holds now is unknown to the recording, and what the recording leaves there is unknown
        # to later eager work: forget both.
        SHARED_WORKSPACE.clear()
        torch.cuda.synchronize(model.device)
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        try:
            with _undisturbed(), torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                # Aliases of the states, born on the recording's stream: the parameters' own gradient accumulators
                # belong to another stream, and waiting for that one cannot be recorded.
                aliases = {f"model.{name}": state.detach().requires_grad_() for name, state in states.items()}
                step = _Step(objective, model)
                self.loss, self.result, self.gradients = functional_call(
                    step, aliases, (self.inputs, list(aliases.values()))
                )
        finally:
            SHARED_WORKSPACE.clear()  # after a failure, too: what was only recorded was never computed

    def load(self, staged: Staged) -> None:
        """Copies a batch of the same shapes into the recording's inputs."""
        sources = list(staged.tensors.values())
        targets = list(self.inputs.tensors.values())
        if staged.layout is not None and self.inputs.layout is not None:
            sources += _tensors(staged.layout)
            targets += _tensors(self.inputs.layout)
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)


class _Replay(torch.autograd.Function):
    """Replays a recording; its gradients stand ready for the backward."""

    @staticmethod
    def forward(ctx: Any, recorded: _RecordedStep, *states: Tensor) -> Tensor:
        recorded.graph.replay()
        ctx.gradients = recorded.gradients
        loss: Tensor = recorded.loss.clone()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        torch._foreach_mul_(ctx.gradients, gradient)  # in place: the next replay writes them anew
        return (None, *ctx.gradients)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection: what it frees on the GPU, an older recording for example, would break a recording."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _key(staged: Staged) -> Key:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in staged.tensors.items())
    layout = staged.layout
    borders = None if layout is None else (layout.roots, layout.root_tokens, len(layout.lengths))
    return (shapes, borders, staged.pairs)


def _tensors(layout: SegmentLayout) -> list[Tensor]:
    return [layout.root_borders, layout.child_borders, layout.parents, layout.previous]


def _cloned(layout: SegmentLayout) -> SegmentLayout:
    root_borders, child_borders, parents, previous = (tensor.clone() for tensor in _tensors(layout))
    return replace(layout, root_borders=root_borders, child_borders=child_borders, parents=parents, previous=previous)


def _up(count: int, grain: int) -> int:
    return -(-count // grain) * grain


def padded(batch: AnyBatch) -> AnyBatch:
    """The batch with its tokens and segments filled up to round numbers; nothing that counts changes.

    Args:
        batch: a `Batch` or `PreferenceBatch` on the host, of a recordable objective.
    """
    if batch.layout is None:
        missing = _up(batch.tokens.shape[1], _TOKEN_GRAIN) - batch.tokens.shape[1]
        return replace(
            batch,
            tokens=F.pad(batch.tokens, (0, missing)),
            targets=F.pad(batch.targets, (0, missing), value=IGNORED_TARGET),
        )
    layout, split = batch.layout, batch.layout.root_tokens
    roots, children = list(layout.lengths[: layout.roots]), list(layout.lengths[layout.roots :])
    parents = layout.parents.tolist()
    root_padding = _up(split, _TOKEN_GRAIN) - split
    child_padding = _up(layout.tokens - split, _TOKEN_GRAIN) - (layout.tokens - split)
    roots = _filled(roots, root_padding)
    if children:
        children = _filled(children, child_padding)
        parents += [0] * (len(children) - len(parents))

    def spread(values: Tensor, fill: int) -> Tensor:
        return torch.cat(
            [
                F.pad(values[..., :split], (0, root_padding), value=fill),
                F.pad(values[..., split:], (0, child_padding), value=fill),
            ],
            dim=-1,
        )

    filled = replace(
        batch,
        tokens=spread(batch.tokens, 0),
        targets=spread(batch.targets, IGNORED_TARGET),
        layout=SegmentLayout.branching(roots, children, parents),
    )
    if isinstance(filled, PreferenceBatch):
        return replace(filled, groups=spread(filled.groups, slot(filled.pairs, Role.PROMPT)))
    return filled


def _filled(lengths: list[int], padding: int) -> list[int]:
    """Segment lengths with one of padding and then empty ones, a multiple of `_SEGMENT_GRAIN` in all."""
    filled = [*lengths, padding]
    return filled + [0] * (_up(len(filled), _SEGMENT_GRAIN) - len(filled))
