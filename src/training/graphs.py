"""Training steps as CUDA graphs: recorded once per shape, replayed without Python.

A small model's step is over a thousand kernels of a few microseconds; issued one by one, the GPU waits for
the host most of the time. `GraphedObjective` records forward, recomputation and backward of an objective for
a shape of its staged batch when that shape comes the second time, and replays it from then on. It keeps the
shapes that come most often. The replay is an ordinary autograd node that holds the gradients of what is trained, so
that gradient accumulation and DeepSpeed's hooks see nothing unusual.

Batches are to be filled up a little (`src.data.rounding`), so that few shapes occur.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from src.model.language_model import LanguageModel
from src.training.objectives import Objective, Outcome, Staged, outcome_of

_MOST_GRAPHS = 12
_SPARE_BYTES = 256 * 2**20

Key = tuple[Any, ...]


Recording = TypeVar("Recording")


class Recordings(Generic[Recording]):
    """Recordings by what they are of, and the room that they take.

    Args:
        model: one that `can_be_recorded`, without dropout, trained by a method that is `recordable`.
        memory_gib: device memory the run may use in all; 0 is the whole device.
        lends_gradients: whether the gradients a backward gives are the recordings' own, not copies: for steps of one
            micro-batch, whose gradients nobody wants any more when the next one begins.
    """

    def __init__(self, model: LanguageModel, memory_gib: float = 0.0, *, lends_gradients: bool = False) -> None:
        assert model.device.type == "cuda"
        assert model.dropout == 0
        self.model = model
        self._graphs: dict[Key, Recording] = {}
        self._uses: Counter[Key] = Counter()
        self._pool: Any = None
        self._works = True
        self._limit = int(memory_gib * 2**30)
        self.lends_gradients = lends_gradients
        self._others_fit = True

    def _found(self, key: Key, record: Callable[[Any], Recording], times: int = 1) -> Recording | None:
        """The recording of what comes now, made if it is worth it; None: it is to be issued.

        Args:
            key: of what it is.
            record: makes it, in this pool of memory.
            times: how often it comes now.
        """
        if not self._works:
            return None
        self._uses[key] += times
        if key in self._graphs:
            return self._graphs[key]
        worth, given_up = worth_recording(key, self._uses, self._graphs)
        if not worth:
            return None
        if given_up is not None:
            del self._graphs[given_up]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            self._graphs[key] = record(self._pool)
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


class GraphedObjective(Recordings["_RecordedStep"]):
    """Runs an objective, replaying recorded graphs where a shape and the choice of trained parameters repeat.

    Args:
        objective: computes.
        model, memory_gib, lends_gradients: see Recordings.
    """

    def __init__(
        self,
        objective: Objective,
        model: LanguageModel,
        memory_gib: float = 0.0,
        *,
        lends_gradients: bool = False,
    ) -> None:
        super().__init__(model, memory_gib, lends_gradients=lends_gradients)
        self.objective = objective
        self._parameters = list(model.named_parameters())  # to walk through the modules would take a millisecond

    def __call__(self, staged: Staged) -> Outcome:
        """Loss of one micro-batch, ready for `backward`."""
        states = {name: parameter for name, parameter in self._parameters if parameter.requires_grad}
        recorded = None if staged.in_chunks else self._recorded(staged, states)
        if recorded is None:
            self._make_room()
            return outcome_of(self.objective, self.model, staged)
        recorded.load(staged)
        loss = _Replay.apply(recorded, self.lends_gradients, *states.values())
        return Outcome(loss, lambda: self.objective.logs(recorded.result))

    def _recorded(self, staged: Staged, states: Mapping[str, nn.Parameter]) -> _RecordedStep | None:
        key = (staged.key, *states, *(state.data_ptr() for state in states.values()))
        return self._found(
            key,
            lambda pool: _RecordedStep(self.objective, self.model, states, self._gradients_of(states), staged, pool),
        )

    def _gradients_of(self, states: Mapping[str, nn.Parameter]) -> Mapping[str, Tensor] | None:
        """Where a recording that trains these leaves their gradients: where earlier ones do, if there are any."""
        known = (graph.gradients for graph in self._graphs.values() if graph.gradients.keys() == states.keys())
        return next(known, None)


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

    def __init__(self, objective: Objective, model: LanguageModel) -> None:
        super().__init__()
        self.objective = objective
        self.model = model

    def forward(self, staged: Staged) -> tuple[Tensor, Any]:
        loss, result = self.objective.compute(self.model, staged)
        loss.backward()
        return loss.detach(), result


class _RecordedStep:
    """One recorded computation with its fixed inputs and loss.

    `gradients` are where all recordings that train the same states leave theirs: where the first one's backward made
    them, to which later ones add.

    The workspace of dense matrices is that of unrecorded work.
    """

    def __init__(
        self,
        objective: Objective,
        model: LanguageModel,
        states: Mapping[str, nn.Parameter],
        gradients: Mapping[str, Tensor] | None,
        staged: Staged,
        pool: Any,
    ) -> None:
        self.inputs = staged.to(model.device)
        self.workspace = model.workspace
        self.graph = torch.cuda.CUDAGraph()
        with recording_of(model), capturing(self.graph, pool):
            if gradients is not None:
                torch._foreach_zero_(list(gradients.values()))
            aliases = aliases_of(states, gradients or {})
            self.loss, self.result = functional_call(_Step(objective, model), aliases, (self.inputs,))
            made = (torch.zeros_like(a) if a.grad is None else a.grad for a in aliases.values())
            self.gradients = gradients or dict(zip(states, made, strict=True))
            self.dense = model.workspace.buffers()  # which the graph writes to

    def load(self, staged: Staged) -> None:
        """Copies a batch of the same shapes into the recording's inputs."""
        for target, source in zip(self.inputs.all_tensors(), staged.all_tensors(), strict=True):
            target.copy_(source, non_blocking=True)


class _Replay(torch.autograd.Function):
    """Replays a recording; its gradients stand ready for the backward."""

    @staticmethod
    def forward(ctx: Any, recorded: _RecordedStep, lends: bool, *states: Tensor) -> Tensor:
        recorded.graph.replay()
        recorded.workspace.forget()
        ctx.gradients, ctx.lends = list(recorded.gradients.values()), lends
        loss: Tensor = recorded.loss.clone()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.lends:
            return (None, None, *torch._foreach_mul(ctx.gradients, gradient))
        torch._foreach_mul_(ctx.gradients, gradient)
        return (None, None, *(own.detach() for own in ctx.gradients))  # a tensor nobody else has becomes `.grad`


@contextlib.contextmanager
def recording_of(model: LanguageModel) -> Iterator[None]:
    """What a recording needs around it; the device is idle when it begins.

    What the model's workspace holds now is unknown to a recording, and what a replay leaves there is unknown to later
    eager work: both are forgotten.
    """
    model.workspace.forget()
    torch.cuda.synchronize(model.device)
    torch.cuda.empty_cache()
    stream = torch.cuda.current_stream(model.device)
    try:
        with _undisturbed():
            yield
    finally:
        # After a failure, too: what was only recorded was never computed, and torch may stay on its stream.
        model.workspace.forget()
        torch.cuda.set_stream(stream)


def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Any:
    """A context in which work is recorded into a graph instead of being done."""
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


def aliases_of(states: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a recording trains in the parameters' places, under `model.`; made while it is recorded.

    They are born on the recording's stream: the parameters' own gradient accumulators belong to another stream, and
    waiting for that one cannot be recorded. The backward adds to `gradients` where there are some, layer after layer.
    """
    aliases = {}
    for name, state in states.items():
        alias = aliases[f"model.{name}"] = state.detach().requires_grad_()
        alias.grad = gradients.get(name)
    return aliases


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
