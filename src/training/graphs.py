"""Training steps as CUDA graphs: recorded once per shape, replayed without Python.

A small model's step is over a thousand kernels of a few microseconds; issued one by one, the GPU waits for
the host most of the time. `GraphedObjective` records forward, recomputation and backward of an objective for
a shape of its staged batch when that shape comes the second time, and replays it from then on. It keeps the
shapes that come most often. The replay is an ordinary autograd node that holds the states' gradients, so that
gradient accumulation and DeepSpeed's hooks see nothing unusual.

Batches are padded a little (`padded`, `room_for_targets`) so that few shapes occur: padding comes after what
counts, in segments of its own in packed rows, and has no target.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from src.data.batches import Batch
from src.data.passes import ceil_div
from src.data.preference_batches import PreferenceBatch
from src.layout import SegmentLayout
from src.losses import IGNORED_TARGET, Role, slot
from src.model.rwkv6 import RWKV6
from src.ops.wkv6_cuda import CUDA_HEAD_SIZE, kernel_is_available
from src.quant import SHARED_WORKSPACE
from src.training.objectives import Objective, Outcome, Staged

_MOST_GRAPHS = 12
_SPARE_BYTES = 256 * 2**20

Key = tuple[Any, ...]
AnyBatch = TypeVar("AnyBatch", Batch, PreferenceBatch)


def can_be_recorded(model: RWKV6) -> bool:
    """Whether nothing in a step waits for the GPU: in bf16 with the operator's kernel.

    The operator in torch reads segment borders on the host. And fp16 could not hold the unscaled loss's gradients.
    """
    if model.device.type != "cuda" or model.compute_dtype != torch.bfloat16:
        return False
    return model.shape.head_size == CUDA_HEAD_SIZE and kernel_is_available(model.device)


class GraphedObjective:
    """Runs an objective, replaying recorded graphs where a shape repeats.

    Args:
        objective: stages and computes.
        model: one that `can_be_recorded`, with trained states only and without dropout.
        memory_gib: device memory the run may use in all; 0 is the whole device.
    """

    def __init__(self, objective: Objective, model: RWKV6, memory_gib: float = 0.0) -> None:
        assert model.device.type == "cuda"
        assert model.dropout == 0
        self.objective = objective
        self.model = model
        self._states = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._graphs: dict[Key, _RecordedStep] = {}
        self._uses: Counter[Key] = Counter()
        self._gradients: list[Tensor] = []
        self._pool: Any = None
        self._works = True
        self._limit = int(memory_gib * 2**30)
        self._others_fit = True
        self._ahead: tuple[Any, Staged] | None = None

    def __call__(self, batch: Any) -> Outcome:
        """Loss of one micro-batch, ready for `backward`."""
        staged = self._staged(batch)
        recorded = self._recorded(staged) if self._works else None
        if recorded is None:
            self._make_room()
            loss, result = self.objective.compute(self.model, staged.to(self.model.device))
            return Outcome(loss, lambda: self.objective.logs(result))
        recorded.load(staged)
        loss = _Replay.apply(recorded, *self._states.values())
        return Outcome(loss, lambda: self.objective.logs(recorded.result))

    def look_ahead(self, batch: Any) -> None:
        """Stages a batch while the GPU works; a call with that very object will find it."""
        self._ahead = (batch, self._stage(batch))

    def _stage(self, batch: Any) -> Staged:
        return self.objective.stage(self.model, padded(batch), room_for_targets)

    def _staged(self, batch: Any) -> Staged:
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] is batch else self._stage(batch)

    def _recorded(self, staged: Staged) -> _RecordedStep | None:
        key = (*_key(staged), *(state.data_ptr() for state in self._states.values()))
        self._uses[key] += 1
        if key in self._graphs:
            return self._graphs[key]
        worth, given_up = worth_recording(key, self._uses, self._graphs)
        if not worth:
            return None
        if given_up is not None:
            del self._graphs[given_up]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._gradients = self._gradients or [torch.empty_like(state) for state in self._states.values()]
        try:
            self._graphs[key] = _RecordedStep(
                self.objective, self.model, self._states, self._gradients, staged, self._pool
            )
            self._others_fit = False
            return self._graphs[key]
        except RuntimeError as error:  # out of memory is one of them: what runs unrecorded need not fit twice
            reason = str(error).splitlines()[0]
        self._give_up(reason)  # not above: the error holds the failed recording's memory
        return None

    def _make_room(self) -> None:
        """Before a step that is not replayed: gives the recordings up if it does not fit beside their memory.

        Looked at once after every recording, with what a step has needed at most so far.
        """
        if self._others_fit:
            return
        device = self.model.device
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        if self._limit:
            free -= max(total - self._limit, 0)
        step_bytes = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        if free < step_bytes + _SPARE_BYTES:
            self._give_up("steps of other shapes do not fit beside the recordings")
        self._others_fit = True

    def _give_up(self, reason: str) -> None:
        """Goes on without recordings, and frees their memory."""
        self._works = False
        self._graphs.clear()
        with contextlib.suppress(RuntimeError):  # torch 2.11 refuses after a recording that failed
            torch.cuda.empty_cache()
        warnings.warn(f"steps run unrecorded from here on: {reason}", stacklevel=2)


def worth_recording(
    key: Key, uses: Mapping[Key, int], recorded: Collection[Key], most: int = _MOST_GRAPHS
) -> tuple[bool, Key | None]:
    """Whether a shape is to be recorded now, and which recording is given up for it.

    Recording takes as long as several steps. A shape that takes another's place must have come twice as often, so
    that shapes which come in turn do not push each other out for ever.

    Args:
        key: a shape without a recording.
        uses: how often each shape has come.
        recorded: shapes with a recording.
        most: recordings that are kept.
    """
    if uses[key] < 2:
        return False, None
    if len(recorded) < most:
        return True, None
    rarest = min(recorded, key=uses.__getitem__)
    return uses[key] >= 2 * uses[rarest], rarest


class _Step(nn.Module):
    """Loss and backward in one call, so that recomputation, too, happens while the states are swapped."""

    def __init__(self, objective: Objective, model: RWKV6) -> None:
        super().__init__()
        self.objective = objective
        self.model = model

    def forward(self, staged: Staged) -> tuple[Tensor, Any]:
        loss, result = self.objective.compute(self.model, staged)
        loss.backward()
        return loss.detach(), result


class _RecordedStep:
    """One recorded computation with its fixed inputs and loss; `gradients` are where all recordings leave theirs.

    The workspace of dense matrices is that of unrecorded work.
    """

    def __init__(
        self,
        objective: Objective,
        model: RWKV6,
        states: Mapping[str, nn.Parameter],
        gradients: list[Tensor],
        staged: Staged,
        pool: Any,
    ) -> None:
        self.inputs = staged.to(model.device)
        self.gradients = gradients
        # What the workspace holds now is unknown to the recording, and what a replay leaves there is unknown to
        # later eager work: forget both.
        SHARED_WORKSPACE.forget()
        torch.cuda.synchronize(model.device)
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(model.device)
        try:
            with _undisturbed(), torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                # Aliases of the states, born on the recording's stream: the parameters' own gradient accumulators
                # belong to another stream, and waiting for that one cannot be recorded.
                aliases = {f"model.{name}": state.detach().requires_grad_() for name, state in states.items()}
                torch._foreach_zero_(gradients)
                for alias, gradient in zip(aliases.values(), gradients, strict=True):
                    alias.grad = gradient  # the backward adds to it, layer after layer
                self.loss, self.result = functional_call(_Step(objective, model), aliases, (self.inputs,))
            self.workspace = SHARED_WORKSPACE.buffers()
        finally:
            # After a failure, too: what was only recorded was never computed, and torch may stay on its stream.
            SHARED_WORKSPACE.forget()
            torch.cuda.set_stream(stream)

    def load(self, staged: Staged) -> None:
        """Copies a batch of the same shapes into the recording's inputs."""
        for target, source in zip(_all_tensors(self.inputs), _all_tensors(staged), strict=True):
            target.copy_(source, non_blocking=True)


class _Replay(torch.autograd.Function):
    """Replays a recording; its gradients stand ready for the backward."""

    @staticmethod
    def forward(ctx: Any, recorded: _RecordedStep, *states: Tensor) -> Tensor:
        recorded.graph.replay()
        SHARED_WORKSPACE.forget()
        ctx.gradients = recorded.gradients
        loss: Tensor = recorded.loss.clone()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *torch._foreach_mul(ctx.gradients, gradient))


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


def _all_tensors(staged: Staged) -> list[Tensor]:
    return [*staged.tensors.values(), *([] if staged.layout is None else _tensors(staged.layout))]


def shared_size(count: int, least: int, sizes: int) -> int:
    """The next size that many counts share: a multiple of `least`, of at most `sizes` between powers of two."""
    power_below = 1 << (count - 1).bit_length() >> 1 if count > 1 else 1
    grain = max(least, power_below // sizes)
    return ceil_div(count, grain) * grain


# Padded tokens cost as much as others; targets only a row of the head, and segments next to nothing.
_room_for_tokens = partial(shared_size, least=128, sizes=8)
room_for_targets = partial(shared_size, least=256, sizes=2)
_room_for_segments = partial(shared_size, least=8, sizes=2)


def padded(batch: AnyBatch) -> AnyBatch:
    """The batch with its tokens and segments filled up to round numbers; nothing that counts changes.

    Args:
        batch: a `Batch` or `PreferenceBatch` on the host, of a recordable objective.
    """
    if batch.layout is None:
        missing = _room_for_tokens(batch.tokens.shape[1]) - batch.tokens.shape[1]
        return replace(
            batch,
            tokens=F.pad(batch.tokens, (0, missing)),
            targets=F.pad(batch.targets, (0, missing), value=IGNORED_TARGET),
        )
    layout, split = batch.layout, batch.layout.root_tokens
    roots, children = list(layout.lengths[: layout.roots]), list(layout.lengths[layout.roots :])
    parents = layout.parents.tolist()
    root_padding = _room_for_tokens(split) - split
    child_padding = _room_for_tokens(layout.tokens - split) - (layout.tokens - split)
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
    """Segment lengths with one of padding and then empty ones."""
    filled = [*lengths, padding]
    return filled + [0] * (_room_for_segments(len(filled)) - len(filled))
