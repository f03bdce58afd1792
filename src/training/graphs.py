"""Training steps as CUDA graphs: recorded once per shape, replayed without Python.

A small model's step is over a thousand kernels of a few microseconds; issued one by one, the GPU waits for
the host most of the time. `GraphedObjective` records forward, recomputation and backward of an objective for
a shape of its staged batch when that shape comes the second time, and replays it from then on. It keeps the
shapes that come most often. The replay is an ordinary autograd node that holds the gradients of what is trained, so
that gradient accumulation and DeepSpeed's hooks see nothing unusual. Where gigabytes are trained and no engine waits
for gradients, it leaves them in the parameters instead, or uses them up in its backward as the optimizer does.

Batches are to be filled up a little (`src.data.rounding`), so that few shapes occur.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from src.adapters.method import Method
from src.config import TrainConfig
from src.model.language_model import LanguageModel
from src.training.aside import Aside
from src.training.joined import Joined
from src.training.objectives import Objective, Outcome, Staged, outcome_of
from src.training.updates import UnitUpdates

_MOST_GRAPHS = 12
_SPARE_BYTES = 256 * 2**20
_MOVED_TOGETHER = 32

Key = tuple[Any, ...]


Recording = TypeVar("Recording")


def may_record(config: TrainConfig, method: Method) -> bool:
    """Whether steps may be recorded as CUDA graphs, as far as flags and method decide."""
    wanted = config.cuda_graph and method.recordable and not config.dropout and not config.offload_activations
    gathered_by_python = config.shards_weights
    return bool(wanted) and not gathered_by_python


def may_record_chunks(config: TrainConfig, method: Method) -> bool:
    """The same for chunks, where rows have some: not where gradients are left in the parameters."""
    return bool(config.chunk_ctx) and may_record(config, method) and not method.in_place


class Recordings(Generic[Recording]):
    """Recordings by what they are of, and the room that they take.

    Args:
        model: one that `can_be_recorded`, without dropout, trained by a method that is `recordable`.
        memory_gib: device memory the run may use in all; 0 is the whole device.
        lends_gradients: whether the gradients a backward gives are the recordings' own, not copies: for steps of one
            micro-batch, whose gradients nobody wants any more when the next one begins.
    """

    def __init__(self, model: LanguageModel, memory_gib: float = 0.0, *, lends_gradients: bool = False) -> None:
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
        share: of a micro-batch in a step's gradient. Gradients then are left in the parameters, whose `grad` is to be
            None before a step's first of several micro-batches; None: autograd hands them out.

    Attributes:
        updates: what uses gradients up in the backward, if something does.
        joined: wholes of which an engine is to be handed gradients, in place of what is trained, if there are some.
    """

    def __init__(
        self,
        objective: Objective,
        model: LanguageModel,
        memory_gib: float = 0.0,
        *,
        lends_gradients: bool = False,
        share: float | None = None,
    ) -> None:
        super().__init__(model, memory_gib, lends_gradients=lends_gradients)
        self.objective = objective
        self.updates: UnitUpdates | None = None
        self.joined: Joined | None = None
        self._sending: torch.cuda.Stream | None = None
        self._begun: tuple[Key, Staged] | None = None
        self._result: _Result | None = None
        self._share = share
        self._gradients: dict[str, Tensor] = {}  # that recordings leave in the parameters
        self._parameters = list(model.named_parameters())  # to walk through the modules would take a millisecond

    def __call__(self, staged: Staged) -> Outcome:
        """Loss of one micro-batch, ready for `backward`."""
        self._result = None  # of the step before, in the memory of a recording that may have to go
        states = self._states
        gone_on = self._took_up(staged, states)
        recorded = None if staged.in_chunks else self._recorded(staged, states)
        if recorded is None:
            self._make_room()
            self._drop_replaced(states)
        if recorded is None or not self.replaces_gradients:
            self._lend_gradients(states, cleared=(recorded is None or self._adds) and not gone_on)
        if recorded is None:
            return outcome_of(self.objective, self.model, staged, self.joined)
        if not gone_on:
            recorded.load(staged)
            recorded.replay()
        loss: Tensor
        if self._share is None:
            if self.joined:
                self.joined.check()
            handed = self.joined.pieces if self.joined else states.values()
            loss = _Replayed.apply(recorded, self.lends_gradients, *handed)
        else:
            loss = recorded.loss.clone().requires_grad_()  # its backward has been
            if self.replaces_gradients:
                for name, gradient in self._gradients.items():  # while the device works
                    states[name].grad = gradient
        self._result = _Result(self.objective, recorded.result)
        return Outcome(loss, self._result.logs)

    @property
    def _states(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._parameters if parameter.requires_grad}

    def go_on(self, staged: Staged | None) -> None:
        """Has the device begin with the micro-batch that comes next, if it is recorded, before it is asked for.

        To be called when all that reads the gradients of the step before has been issued; weights stay what they are.
        """
        if staged is None or staged.in_chunks or self.updates:
            return
        key = self._key(staged, self._states)
        recorded = self._graphs.get(key)
        if recorded is None:
            return
        if self._result:
            self._result.keep(self.model.device)
        if self._adds:
            torch._foreach_zero_(list(self._gradients.values()))
        recorded.load(staged)
        recorded.replay()
        self._begun = key, staged

    def turn_back(self) -> None:
        """What was begun is of no use: recordings may go once it is over."""
        if self._begun and self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()
        self._begun = None

    def _took_up(self, staged: Staged, states: Mapping[str, nn.Parameter]) -> bool:
        """Whether the device has begun with this very micro-batch, as things are now."""
        if self._begun is None:
            return False
        key, begun = self._begun
        if begun is staged and key == self._key(staged, states):
            self._begun = None
            return True
        self.turn_back()
        return False

    def send(self, staged: Staged) -> Staged:
        """The micro-batch that comes next, on its way to the device while this one is computed there."""
        if staged.in_chunks or not self._works or self.model.device.type != "cuda":
            return staged
        self._sending = self._sending or torch.cuda.Stream(self.model.device)
        with contextlib.suppress(torch.OutOfMemoryError):
            return staged.sent(self.model.device, self._sending)
        return staged

    def look_again(self) -> None:
        """Forgets all recordings, after parameters have taken others' places."""
        self.turn_back()
        self._parameters = list(self.model.named_parameters())
        self._graphs.clear()
        self._uses.clear()
        self._gradients.clear()
        self._pool = None

    def _lend_gradients(self, states: Mapping[str, nn.Parameter], *, cleared: bool) -> None:
        """Puts what recordings leave gradients in where parameters have theirs, with those that are there."""
        fresh = []
        for name, gradient in self._gradients.items():
            there = states[name].grad
            if there is None:
                fresh.append(gradient)
            elif there is not gradient:
                gradient.copy_(there)
            states[name].grad = gradient
        if fresh and cleared:
            torch._foreach_zero_(fresh)

    @property
    def replaces_gradients(self) -> bool:
        """Whether what parameters have for gradients before a step is of no interest: nobody has to clear them."""
        return self._share == 1

    @property
    def _adds(self) -> bool:
        """Whether a recording adds its gradients to those that are there, and does not take their place."""
        return self._share is not None and self._share != 1

    def _recorded(self, staged: Staged, states: Mapping[str, nn.Parameter]) -> _RecordedStep | None:
        def record(pool: Any) -> _RecordedStep:
            self._drop_replaced(states)  # a recording has gradients of its own, and need not find room beside these
            return _RecordedStep(self.objective, self.model, self._sink(states), staged, pool)

        return self._found(self._key(staged, states), record)

    @staticmethod
    def _key(staged: Staged, states: Mapping[str, nn.Parameter]) -> Key:
        """Of a recording: shapes, what is trained, and where it is."""
        return (staged.key, *states, *(state.data_ptr() for state in states.values()))

    def _drop_replaced(self, states: Mapping[str, nn.Parameter]) -> None:
        """Lets go of gradients of the step before that nobody adds to."""
        if self.replaces_gradients:
            for state in states.values():
                state.grad = None

    def _sink(self, states: Mapping[str, nn.Parameter]) -> _Sink:
        """What a recording that trains these does with their gradients: what earlier ones do, if there are any."""
        if self.updates:
            return _UsedUp(states, self.updates)
        if self._share is not None:
            if self._adds and not self._gradients:
                # Those of micro-batches before this one are added to, and need no copy.
                self._gradients.update(
                    (n, torch.zeros_like(s) if s.grad is None else s.grad) for n, s in states.items()
                )
            return _Left(states, self._gradients, self._share)
        for graph in self._graphs.values():
            if isinstance(graph.sink, _HandedOut) and graph.sink.states.keys() == states.keys():
                return graph.sink
        if self.joined is not None:
            return _HandedOutJoined(states, self.joined, whole_steps=self.lends_gradients)
        return _HandedOut(states, whole_steps=self.lends_gradients)

    def _give_up(self, reason: str) -> None:
        self.turn_back()
        self._gradients.clear()
        if self.updates:
            self.updates.forget_arrived()
        super()._give_up(reason)


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

    def forward(self, staged: Staged, share: float | None) -> tuple[Tensor, Any]:
        loss, result = self.objective.compute(self.model, staged)
        # A loss that is not finite makes gradients so, as in a step that is not recorded.
        loss.backward(None if share is None else share + 0 * loss.detach())
        return loss.detach(), result


class _Sink:
    """Where the gradients of a recorded backward go.

    Attributes:
        states: what is trained, by name.
        share: factor on gradients; None is 1.
    """

    share: float | None = None

    def __init__(self, states: Mapping[str, nn.Parameter]) -> None:
        self.states = states

    def prepare(self, aliases: Mapping[str, Tensor]) -> None:
        """Called in the recording before its forward, with the leaves that stand in the states' places."""

    def finish(self, aliases: Mapping[str, Tensor]) -> None:
        """Called after its backward."""


class _HandedOut(_Sink):
    """`gradients` are where all recordings that train the same states leave theirs, for autograd to hand out: where
    the first one's backward made them, to which later ones add.

    Args:
        states: what is trained, by name.
        whole_steps: whether these are a step's and not to be scaled when they are handed out.
    """

    def __init__(self, states: Mapping[str, nn.Parameter], *, whole_steps: bool) -> None:
        super().__init__(states)
        self.share = 1.0 if whole_steps else None
        self.gradients: dict[str, Tensor] = {}

    @property
    def handed(self) -> list[Tensor]:
        """What autograd hands out."""
        return list(self.gradients.values())

    def prepare(self, aliases: Mapping[str, Tensor]) -> None:
        if self.gradients:
            torch._foreach_zero_(list(self.gradients.values()))
            for name, alias in aliases.items():
                alias.grad = self.gradients[name]  # the backward adds to it, layer after layer

    def finish(self, aliases: Mapping[str, Tensor]) -> None:
        if not self.gradients:
            self.gradients.update((n, torch.zeros_like(a) if a.grad is None else a.grad) for n, a in aliases.items())


class _HandedOutJoined(_HandedOut):
    """The same for wholes: what the backward made is moved there, a few tensors at a time.

    Args:
        states, whole_steps: see there.
        joined: of whose pieces `states` are.
    """

    def __init__(self, states: Mapping[str, nn.Parameter], joined: Joined, *, whole_steps: bool) -> None:
        super().__init__(states, whole_steps=whole_steps)
        self._wholes = [torch.zeros_like(whole) for whole in joined.pieces]
        for pieces, whole in zip(joined.pieces.values(), self._wholes, strict=True):
            self.gradients.update((piece.name, piece.of(whole)) for piece in pieces)
        self._waiting: dict[str, Tensor] = {}
        self._arrived: dict[str, Tensor] = {}

    @property
    def handed(self) -> list[Tensor]:
        """See _HandedOut."""
        return self._wholes

    def prepare(self, aliases: Mapping[str, Tensor]) -> None:
        self._waiting = dict(aliases)
        self._arrived.clear()
        for name, alias in aliases.items():
            alias.register_post_accumulate_grad_hook(partial(self._take, name))

    def finish(self, aliases: Mapping[str, Tensor]) -> None:
        self._move()
        if self._waiting:
            torch._foreach_zero_([self.gradients[name] for name in self._waiting])

    def _take(self, name: str, leaf: Tensor) -> None:
        del self._waiting[name]  # a gradient comes once
        self._arrived[name] = leaf
        if len(self._arrived) == _MOVED_TOGETHER:
            self._move()

    def _move(self) -> None:
        if not self._arrived:
            return
        gradients = [leaf.grad for leaf in self._arrived.values() if leaf.grad is not None]
        torch._foreach_copy_([self.gradients[name] for name in self._arrived], gradients)
        for leaf in self._arrived.values():
            leaf.grad = None
        self._arrived.clear()


class _Left(_Sink):
    """Gradients stay where the parameters have them.

    Args:
        states: what is trained, by name.
        gradients: where they are; if there are none yet, where this recording makes them.
        share: see `GraphedObjective`; unless it is 1, gradients are added to those that are there.
    """

    def __init__(self, states: Mapping[str, nn.Parameter], gradients: dict[str, Tensor], share: float) -> None:
        super().__init__(states)
        self.share = share
        self._gradients = gradients

    def prepare(self, aliases: Mapping[str, Tensor]) -> None:
        for name, alias in aliases.items():
            if self.share != 1:
                alias.grad = self._gradients[name]
            elif name in self._gradients:
                alias.register_post_accumulate_grad_hook(partial(_move_gradient, self._gradients[name]))

    def finish(self, aliases: Mapping[str, Tensor]) -> None:
        # Those that the backward made lie in the recordings' memory, where they stay for as long as they are held.
        self._gradients.update((name, alias.grad) for name, alias in aliases.items() if alias.grad is not None)


class _UsedUp(_Sink):
    """An optimizer updates each layer in the backward, which is then recorded with it."""

    share = 1.0

    def __init__(self, states: Mapping[str, nn.Parameter], updates: UnitUpdates) -> None:
        super().__init__(states)
        self._updates = updates

    def prepare(self, aliases: Mapping[str, Tensor]) -> None:
        for name, alias in aliases.items():
            self._updates.watch(self.states[name], alias)

    def finish(self, aliases: Mapping[str, Tensor]) -> None:
        self._updates.finish_backward()


def _move_gradient(to: Tensor, leaf: Tensor) -> None:
    assert leaf.grad is not None
    to.copy_(leaf.grad)
    leaf.grad = None


class _RecordedStep:
    """One recorded computation with its fixed inputs and loss.

    The workspace of dense matrices is that of unrecorded work.
    """

    def __init__(self, objective: Objective, model: LanguageModel, sink: _Sink, staged: Staged, pool: Any) -> None:
        self.inputs = staged.to(model.device)
        self.sink = sink
        self.workspace = model.workspace
        self.graph = torch.cuda.CUDAGraph()
        with recording_of(model), capturing(self.graph, pool):
            self._compute(objective, model)
            self.dense = model.workspace.buffers()  # which the graph writes to

    def _compute(self, objective: Objective, model: LanguageModel) -> None:
        swapped = aliases_of(self.sink.states, {})
        aliases = dict(zip(self.sink.states, swapped.values(), strict=True))
        self.sink.prepare(aliases)
        self.loss, self.result = functional_call(_Step(objective, model), swapped, (self.inputs, self.sink.share))
        self.sink.finish(aliases)

    def replay(self) -> None:
        """Computes on what was loaded; loss and gradients then stand ready."""
        self.graph.replay()
        self.workspace.forget()

    def load(self, staged: Staged) -> None:
        """Copies a batch of the same shapes into the recording's inputs."""
        staged.await_arrival()
        for target, source in zip(self.inputs.all_tensors(), staged.all_tensors(), strict=True):
            target.copy_(source, non_blocking=True)


class _Result:
    """What an objective makes its logs of, in a recording's memory until that is replayed anew."""

    def __init__(self, objective: Objective, result: Any) -> None:
        self._objective = objective
        self._result = result
        self._aside = Aside()

    def keep(self, device: torch.device) -> None:
        """Before the next replay: in memory of its own, from where it is read while that runs."""
        if self._result is not None:
            tensors = [field.name for field in dataclasses.fields(self._result)]
            values = {name: getattr(self._result, name) for name in tensors}
            own = {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
            self._result = dataclasses.replace(self._result, **own)
        self._aside.mark(device)

    def logs(self) -> dict[str, float]:
        """See Outcome."""
        with self._aside.reading():
            return self._objective.logs(self._result)


class _Replayed(torch.autograd.Function):
    """Loss of a recording that has been replayed; its gradients stand ready for the backward."""

    @staticmethod
    def forward(ctx: Any, recorded: _RecordedStep, lends: bool, *states: Tensor) -> Tensor:
        assert isinstance(recorded.sink, _HandedOut)
        ctx.gradients, ctx.lends = recorded.sink.handed, lends
        loss: Tensor = recorded.loss.clone()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.lends:
            return (None, None, *torch._foreach_mul(ctx.gradients, gradient))
        # Of the loss of a whole step, which nothing scales. A tensor nobody else has becomes `.grad`.
        return (None, None, *(own.detach() for own in ctx.gradients))


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
