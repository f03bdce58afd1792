"""Which steps are recorded, and when recordings have to go. Recording itself is tested on a GPU."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
import torch
from factories import tiny_shape
from running import GivenLoss
from tiny_training import tiny_model
from torch import Tensor, nn

from src.model import rwkv6, rwkv7
from src.model.language_model import LanguageModel
from src.training import graphs
from src.training.chunks import StagedChunks
from src.training.graphs import GraphedObjective, worth_recording
from src.training.joined import Joined
from src.training.objectives import Outcome, SFTObjective, Staged


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"device": torch.device("cpu")}, False),
        ({"compute_dtype": torch.float16}, False),
        ({"head_size": 32}, False),
        ({"kernel": False}, False),
    ],
)
@pytest.mark.parametrize("architecture", ["x060", "x070"])
def test_a_model_can_be_recorded_in_bf16_with_the_kernel(
    architecture: str, changes: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "device": torch.device("cuda"),
        "compute_dtype": torch.bfloat16,
        "kernel": True,
        "head_size": 64,
        **changes,
    }
    shape = tiny_shape(n_embd=64, head_size=values["head_size"], architecture=architecture)
    module = rwkv6 if architecture == "x060" else rwkv7
    monkeypatch.setattr(module, "kernel_is_available", lambda device: values["kernel"])
    mixer = rwkv6.TimeMix(shape, 8) if architecture == "x060" else rwkv7.TimeMix(shape, 0)
    model = SimpleNamespace(**values, _first_block=SimpleNamespace(att=mixer))
    assert LanguageModel.can_be_recorded.fget(model) == expected


def recordings(shapes: list[int], most: int) -> list[int]:
    """Shapes in the order in which they are recorded."""
    uses: Counter[tuple[int]] = Counter()
    recorded: set[tuple[int]] = set()
    order = []
    for shape in shapes:
        key = (shape,)
        uses[key] += 1
        if key not in recorded:
            worth, given_up = worth_recording(key, uses, recorded, most)
            if worth:
                recorded.discard(given_up)  # type: ignore[arg-type]
                recorded.add(key)
                order.append(shape)
    return order


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    assert recordings([1, 2, 3, 2, 1, 1, 2], most=4) == [2, 1]


def test_more_shapes_in_turn_than_recordings_do_not_push_each_other_out() -> None:
    assert recordings(list(range(10)) * 20, most=4) == [0, 1, 2, 3]


def test_a_shape_that_comes_much_more_often_takes_the_rarest_ones_place() -> None:
    assert recordings([1, 2, 1, 2, 2, 3, 3, 3, 3], most=2) == [1, 2, 3]


class TestRoom:
    """A GPU of 10 GiB, on which a step has needed 3 beside the 2 that stay allocated; imagined."""

    @pytest.fixture
    def graphed(self, monkeypatch: pytest.MonkeyPatch) -> GraphedObjective:
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**30)
        monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
        made = GraphedObjective(SFTObjective(), tiny_model())
        made._graphs[("recorded",)] = None  # type: ignore[assignment]
        made._others_fit = False
        return made

    @pytest.mark.parametrize(("free", "limit", "fits"), [(4, 0, True), (3, 0, False), (6, 8, True), (6, 6, False)])
    def test_recordings_go_when_other_steps_need_their_memory(
        self, free: int, limit: int, fits: bool, graphed: GraphedObjective, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 10 * 2**30))
        graphed._limit = limit * 2**30
        with contextlib.nullcontext() if fits else pytest.warns(UserWarning, match="do not fit beside the recordings"):
            graphed._make_room()
        assert bool(graphed._graphs) == graphed._works == fits
        assert graphed._others_fit

    def test_it_is_looked_at_once(self, graphed: GraphedObjective, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (2**34, 2**34))[1])
        graphed._make_room()
        graphed._make_room()
        assert len(asked) == 1


RECORDED_STEP = graphs._RecordedStep


class FakeRecording:
    """A recorded step that leaves 1 in every gradient; `made` has them all."""

    made: list[FakeRecording]

    def __init__(self, objective: Any, model: Any, sink: Any, *_: Any) -> None:
        self.sink = sink
        for name, state in sink.states.items():
            self.sink.gradients.setdefault(name, torch.empty_like(state))
        self.loss, self.result = torch.zeros(()), None
        self.made.append(self)

    def load(self, staged: Staged) -> None:
        pass

    def replay(self) -> None:
        for gradient in self.sink.gradients.values():
            gradient.fill_(1)


class TestGradientsOfWholes:
    """What a recording's backward does, done at once: gradients go to their places in wholes."""

    SHAPES: ClassVar = {f"p{number}": (number % 5 + 1, 3) for number in range(70)}

    def run(self, sink: graphs._HandedOutJoined, states: dict[str, nn.Parameter], used: set[str]) -> dict[str, Tensor]:
        """Gradients of one backward, of the states that it uses."""
        aliases = {name: state.detach().requires_grad_() for name, state in states.items()}
        sink.prepare(aliases)
        loss = torch.stack([(alias.square() * len(used)).sum() for name, alias in aliases.items() if name in used])
        loss.sum().backward()
        sink.finish(aliases)
        assert all(alias.grad is None for alias in aliases.values()), "they have no memory of their own any more"
        return {n: 2 * len(used) * s.detach() if n in used else torch.zeros(s.shape) for n, s in states.items()}

    def test_they_are_moved_there(self) -> None:
        generator = torch.Generator().manual_seed(1)
        states = {n: nn.Parameter(torch.randn(shape, generator=generator)) for n, shape in self.SHAPES.items()}
        first, *others = states.values()
        names = {state: name for name, state in states.items()}
        joined = Joined([{"params": [first]}, {"params": others}], names, multiple=64)
        sink = graphs._HandedOutJoined(states, joined, whole_steps=True)
        assert [gradient.shape for gradient in sink.handed] == [whole.shape for whole in joined.pieces]
        for used in (set(states), {"p0", "p7", "p69"}, {"p1"}, set(states)):
            expected = self.run(sink, states, used)
            for whole, gradient in zip(joined.pieces, sink.handed, strict=True):
                for piece in joined.pieces[whole]:
                    assert torch.equal(piece.of(gradient), expected[piece.name]), piece.name

    def test_a_replay_hands_them_to_the_wholes(self) -> None:
        state = nn.Parameter(torch.ones(3))
        joined = Joined([{"params": [state]}], {state: "state"}, multiple=4)
        sink = graphs._HandedOutJoined({"state": state}, joined, whole_steps=True)
        sink.handed[0].fill_(5)
        recorded: Any = SimpleNamespace(sink=sink, loss=torch.tensor(2.0), replay=lambda: None)
        (whole,) = joined.pieces
        graphs._Replayed.apply(recorded, True, whole).backward()
        assert state.grad is None
        assert whole.grad is not None
        assert whole.grad.data_ptr() == sink.handed[0].data_ptr()

    def test_an_engine_that_has_wholes_is_handed_theirs(self) -> None:
        model = tiny_model()
        states = {n: p for n, p in model.named_parameters() if p.requires_grad}
        names = {state: name for name, state in states.items()}
        graphed = GraphedObjective(GivenLoss(lambda model, batch: None), model, lends_gradients=True)
        assert type(graphed._sink(states)) is graphs._HandedOut
        graphed.joined = Joined([{"params": list(states.values())}], names)
        assert isinstance(graphed._sink(states), graphs._HandedOutJoined)


@pytest.mark.parametrize("share", [1.0, 0.5, None])
@pytest.mark.parametrize("loss", [math.nan, math.inf, 2.0])
def test_a_loss_that_is_not_finite_shows_in_what_is_recorded(loss: float, share: float | None) -> None:
    """Of whole steps nothing else tells the optimizer so; what is handed out of others is scaled by the loss's factor,
    which is not finite either."""
    model = tiny_model()
    state = model.get_parameter("blocks.0.att.time_state")
    # A gradient that does not know: the number is added to it.
    objective = GivenLoss(lambda model, batch: model.get_parameter("blocks.0.att.time_state").sum() + loss)
    graphs._Step(objective, model)(Staged({}, None), share)
    assert state.grad is not None
    assert state.grad.isfinite().all() == (math.isfinite(loss) or share is None)


class TestTrainedParameters:
    @pytest.fixture
    def graphed(self, monkeypatch: pytest.MonkeyPatch) -> GraphedObjective:
        monkeypatch.setattr(FakeRecording, "made", [], raising=False)
        monkeypatch.setattr(graphs, "_RecordedStep", FakeRecording)
        monkeypatch.setattr(graphs, "outcome_of", lambda *given: Outcome(torch.ones(())))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
        monkeypatch.setattr(GraphedObjective, "_make_room", lambda self: None)
        monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
        return GraphedObjective(GivenLoss(lambda model, batch: None), tiny_model())

    @staticmethod
    def trained_by(graphed: GraphedObjective, *sizes: int) -> list[set[str]]:
        """Names of the parameters that get a gradient from each step, of batches of these sizes."""
        found = []
        for size in sizes:
            loss = graphed(Staged({"x": torch.zeros(size)}, None)).loss
            if loss.requires_grad:
                loss.backward()
            found.append({name for name, parameter in graphed.model.named_parameters() if parameter.grad is not None})
            graphed.model.zero_grad()
        return found

    def test_another_choice_of_them_replays_no_stale_recording(self, graphed: GraphedObjective) -> None:
        states = {name for name, parameter in graphed.model.named_parameters() if parameter.requires_grad}
        assert self.trained_by(graphed, 3, 3, 3) == [set(), states, states]
        graphed.model.requires_grad_(False)
        graphed.model.ln_out.weight.requires_grad_()
        assert self.trained_by(graphed, 3, 3, 3) == [set(), {"ln_out.weight"}, {"ln_out.weight"}]
        graphed.model.requires_grad_(False)
        for name in states:
            graphed.model.get_parameter(name).requires_grad_()
        assert self.trained_by(graphed, 3) == [states], "the first recording is still there"
        assert len(FakeRecording.made) == 2

    def test_recordings_of_one_choice_share_their_gradients(self, graphed: GraphedObjective) -> None:
        self.trained_by(graphed, 3, 3, 4, 4)
        graphed.model.ln_out.weight.requires_grad_()
        self.trained_by(graphed, 3, 3)
        first, second, third = (recording.sink.gradients for recording in FakeRecording.made)
        assert first is second
        assert third.keys() == {*first, "ln_out.weight"}

    @pytest.mark.parametrize("lends", [False, True])
    def test_gradients_are_lent_only_where_no_step_adds_to_them(self, graphed: GraphedObjective, lends: bool) -> None:
        graphed.lends_gradients = lends
        states = {n: p for n, p in graphed.model.named_parameters() if p.requires_grad}
        self.trained_by(graphed, 3)
        graphed(Staged({"x": torch.zeros(3)}, None)).loss.mul(3).backward()
        (recording,) = FakeRecording.made
        for name, state in states.items():
            assert state.grad is not None
            assert (state.grad.data_ptr() == recording.sink.gradients[name].data_ptr()) == lends
            assert (state.grad == (1 if lends else 3)).all(), "those of a whole step are what they were recorded as"
        if not lends:
            graphed(Staged({"x": torch.zeros(3)}, None)).loss.mul(2).backward()
            assert all((state.grad == 5).all() for state in states.values() if state.grad is not None)

    def test_the_device_goes_on_with_what_comes_next(
        self, graphed: GraphedObjective, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once, if it is recorded, and only if that very batch comes and everything still is where it was."""
        done: list[str] = []
        monkeypatch.setattr(FakeRecording, "load", lambda self, staged: done.append(f"load {staged.source}"))
        monkeypatch.setattr(FakeRecording, "replay", lambda self: done.append("replay"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Mock(synchronize=lambda: done.append("wait")))

        def batch(name: str, size: int = 3) -> Staged:
            return Staged({"x": torch.zeros(size)}, name)

        def happened() -> list[str]:
            found = done.copy()
            done.clear()
            return found

        monkeypatch.setattr(graphs.Aside, "mark", lambda self, device: None)
        first, second, third, other = batch("first"), batch("second"), batch("third"), batch("other", 4)
        for staged in (first, None, StagedChunks({}, None, tokens=torch.zeros(1, 1, dtype=torch.int64), chunks=())):
            graphed.go_on(staged)
        assert happened() == [], "nothing is recorded yet"
        graphed(first)
        graphed(first)
        assert happened() == ["load first", "replay"]
        graphed.go_on(second)
        assert happened() == ["load second", "replay"]
        assert graphed(second).loss.requires_grad
        assert happened() == [], "it has begun"
        graphed(second)
        assert happened() == ["load second", "replay"], "once"
        graphed.go_on(other)
        assert happened() == [], "of another shape"
        graphed.go_on(second)
        graphed(third)
        assert happened() == ["load second", "replay", "wait", "load third", "replay"]
        graphed.go_on(third)
        graphed.model.ln_out.weight.requires_grad_()
        graphed(third)
        assert happened() == ["load third", "replay", "wait"], "something else is trained"
        graphed.model.ln_out.weight.requires_grad_(False)
        graphed.go_on(third)
        graphed.look_again()
        assert happened() == ["load third", "replay", "wait"]
        assert graphed._begun is None

    def test_it_does_not_where_gradients_are_used_up(self, graphed: GraphedObjective) -> None:
        staged = Staged({"x": torch.zeros(3)}, None)
        graphed(staged)
        graphed(staged)
        graphed.updates, graphed._share = Mock(), 1.0
        graphed.go_on(staged)
        assert graphed._begun is None

    def test_gradients_that_add_up_begin_at_0(self, graphed: GraphedObjective, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of a step's first micro-batch, whether the device has begun with it or not."""

        class Adding(FakeRecording):
            def __init__(self, objective: Any, model: Any, sink: Any, *rest: Any) -> None:
                sink.gradients = sink._gradients
                super().__init__(objective, model, sink, *rest)

            def replay(self) -> None:
                for gradient in self.sink.gradients.values():
                    gradient.add_(1)

        monkeypatch.setattr(graphs, "_RecordedStep", Adding)
        monkeypatch.setattr(graphs.Aside, "mark", lambda self, device: None)
        graphed._share = 0.5
        states = [state for _, state in graphed.model.named_parameters() if state.requires_grad]
        staged = Staged({"x": torch.zeros(3)}, None)
        graphed(staged)
        for step in range(6):
            if step % 2:
                graphed.go_on(staged)
            for state in states:
                state.grad = None
            for number in (1, 2):
                graphed(staged)
                assert all((state.grad == number).all() for state in states if state.grad is not None), step

    def test_logs_are_of_the_step_before_when_the_device_has_gone_on(self, graphed: GraphedObjective) -> None:
        @dataclass(frozen=True)
        class Result:
            loss: torch.Tensor
            factor: float

        staged = Staged({"x": torch.zeros(3)}, None)
        graphed.objective.logs = lambda result: {"loss": result.loss.item() * result.factor}  # type: ignore[method-assign]
        graphed(staged)
        graphed(staged)
        (recording,) = FakeRecording.made
        recording.result = Result(torch.tensor(2.0), 3.0)
        outcome = graphed(staged)
        with contextlib.suppress(RuntimeError):  # without a GPU there is no place to mark
            graphed.go_on(staged)
        recording.result.loss.fill_(5)
        assert outcome.logs() == {"loss": 6}
        assert graphed(staged).logs() == {"loss": 15}

    def test_what_is_on_its_way_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before it is read, by a recording or by a step that is issued."""
        stream, arrives = Mock(), Mock()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        staged = Staged({"x": torch.ones(3)}, None, arrives=arrives)
        there = staged.to(torch.device("cpu"))
        stream.wait_event.assert_called_once_with(arrives)
        assert there.arrives is None, "once"
        stream.reset_mock()
        recording: Any = SimpleNamespace(inputs=Staged({"x": torch.zeros(3)}, None))
        RECORDED_STEP.load(recording, staged)
        stream.wait_event.assert_called_once_with(arrives)
        assert (recording.inputs.tensors["x"] == 1).all()

    def test_results_of_a_recording_do_not_outlast_it(self, graphed: GraphedObjective) -> None:
        """They are in its memory, which a step that is not recorded may need."""
        staged = Staged({"x": torch.zeros(3)}, None)
        graphed(staged)
        graphed(staged)
        (recording,) = FakeRecording.made
        recording.result = torch.zeros(3)
        outcome: Outcome | None = graphed(staged)
        result = weakref.ref(recording.result)
        recording.result = None
        assert outcome is not None
        assert result() is not None
        outcome = None  # as a training step does
        graphed(Staged({"x": torch.zeros(4)}, None))
        assert result() is None

    def test_what_comes_next_is_not_sent_where_it_cannot_be_used(
        self, graphed: GraphedObjective, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent = Staged({}, None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(Staged, "sent", lambda self, device, stream: sent)
        staged = Staged({"x": torch.zeros(3)}, None)
        assert graphed.send(staged) is sent
        in_chunks = StagedChunks({"x": torch.zeros(3)}, None, tokens=torch.zeros(1, 3, dtype=torch.int64), chunks=())
        assert graphed.send(in_chunks) is in_chunks
        monkeypatch.setattr(Staged, "sent", Mock(side_effect=torch.OutOfMemoryError))
        assert graphed.send(staged) is staged
        graphed._works = False
        monkeypatch.setattr(Staged, "sent", Mock(side_effect=AssertionError("nothing is recorded any more")))
        assert graphed.send(staged) is staged

    @pytest.mark.parametrize("share", [1.0, 0.5])
    def test_a_recording_finds_no_gradients_that_it_replaces(
        self, graphed: GraphedObjective, share: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or both would need memory at once: its own, and those of the step before."""
        found: list[bool] = []

        class Left(FakeRecording):
            def __init__(self, objective: Any, model: Any, sink: Any, *rest: Any) -> None:
                found.append(any(state.grad is not None for state in sink.states.values()))
                self.sink = type("Sink", (), {"states": sink.states, "gradients": {}})()
                super().__init__(objective, model, self.sink, *rest)

        monkeypatch.setattr(graphs, "_RecordedStep", Left)
        graphed._share = share
        for _ in range(2):
            for _, state in graphed.model.named_parameters():
                state.grad = torch.ones_like(state) if state.requires_grad else None
            graphed(Staged({"x": torch.zeros(3)}, None))
        assert found == [share != 1]

    def test_gradients_that_are_added_to_are_those_of_the_micro_batches_before(
        self, graphed: GraphedObjective, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Adding(FakeRecording):
            def __init__(self, objective: Any, model: Any, sink: Any, *rest: Any) -> None:
                sink.gradients = sink._gradients
                super().__init__(objective, model, sink, *rest)

        monkeypatch.setattr(graphs, "_RecordedStep", Adding)
        graphed._share = 0.5
        states = {name: state for name, state in graphed.model.named_parameters() if state.requires_grad}
        first, *others = states
        graphed(Staged({"x": torch.zeros(3)}, None))
        before = {name: torch.full_like(states[name], 3.0) for name in others}
        for name in others:
            states[name].grad = before[name]
        monkeypatch.setattr(FakeRecording, "replay", lambda self: None)
        graphed(Staged({"x": torch.zeros(3)}, None))
        assert all(graphed._gradients[name] is states[name].grad is before[name] for name in others)
        assert all((gradient == 3).all() for gradient in before.values())
        assert not graphed._gradients[first].any()
