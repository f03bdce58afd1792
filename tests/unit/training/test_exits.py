"""Ends that come from outside, without a run."""

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from src.schedule import Schedule
from src.training.exits import unharmed_by_save_requests
from src.training.progress import Start
from src.training.stopper import Stopper

SCHEDULE = Schedule(lr_init=1.0, lr_final=0.1, warmup_steps=0, total_steps=10, weight_decay=0.5)
TAKEN = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def loop_of(**changes: object) -> Any:
    """What the callback reads of a trainer."""
    return SimpleNamespace(**{"global_step": 0, "world_size": 1, "should_stop": False, "strategy": None, **changes})


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Puts the signals back."""
    before = {number: signal.getsignal(number) for number in TAKEN}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestStopper:
    @pytest.mark.parametrize("number", TAKEN[:3], ids=lambda number: number.name)
    def test_a_signal_asks_to_stop_after_the_step(self, number: signal.Signals) -> None:
        stopper, made = Stopper(SCHEDULE), None
        loop = loop_of()
        stopper.on_train_start(loop, made)
        stopper.on_train_batch_end(loop, made, None, None, 0)
        assert not loop.should_stop
        os.kill(os.getpid(), number)
        assert not loop.should_stop
        stopper.on_train_batch_end(loop, made, None, None, 1)
        assert loop.should_stop
        assert stopper.signal_name == number.name

    def test_an_accumulated_step_is_finished(self) -> None:
        stopper, made = Stopper(SCHEDULE, accumulate=3), None
        stopper.signal_name = "SIGINT"
        loop = loop_of()
        for batch_idx in (3, 4):
            stopper.on_train_batch_end(loop, made, None, None, batch_idx)
            assert not loop.should_stop
        stopper.on_train_batch_end(loop, made, None, None, 5)
        assert loop.should_stop

    def test_a_second_ctrl_c_stops_at_once(self, capfd: pytest.CaptureFixture[str]) -> None:
        stopper, made = Stopper(SCHEDULE), None
        stopper.on_train_start(loop_of(), made)
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err.count("a second Ctrl-C stops at once, without saving") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    @pytest.mark.parametrize("way", ["end", "exception"])
    def test_the_signals_are_given_back(self, way: str) -> None:
        stopper, made = Stopper(SCHEDULE), None
        before = [signal.getsignal(number) for number in TAKEN]
        stopper.on_train_start(loop_of(), made)
        assert signal.getsignal(signal.SIGINT) != before[0]
        if way == "end":
            stopper.on_train_end(loop_of(), made)
        else:
            stopper.on_exception(loop_of(), made, RuntimeError())
        assert [signal.getsignal(number) for number in TAKEN] == before

    def test_the_end_of_a_token_schedule(self) -> None:
        schedule = Schedule(1.0, 0.1, 0, 10, exit_tokens=100, tokens_per_step=10)
        stopper, made = Stopper(schedule), None
        loop = loop_of(global_step=9)
        stopper.on_train_batch_end(loop, made, None, None, 8)
        assert not loop.should_stop
        loop.global_step = 10
        stopper.on_train_batch_end(loop, made, None, None, 9)
        assert loop.should_stop

    def test_one_rank_stops_all(self) -> None:
        stopper, made = Stopper(SCHEDULE), None
        asked: list[bool] = []

        def decide(wish: bool, all: bool) -> bool:
            asked.append(wish)
            assert not all
            return True

        loop = loop_of(world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=decide))
        stopper.on_train_batch_end(loop, made, None, None, 0)
        assert asked == [False]
        assert loop.should_stop

    def test_the_steps_before_a_resumed_run_count(self) -> None:
        schedule = Schedule(1.0, 0.1, 0, 10, exit_tokens=100, tokens_per_step=10)
        loop = loop_of(global_step=2)
        Stopper(schedule, start=Start(steps=8)).on_train_batch_end(loop, None, None, None, 0)
        assert loop.should_stop

    def test_what_is_ignored_stays_ignored(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stopper = Stopper(SCHEDULE)
        stopper.on_train_start(loop_of(), None)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopper.signal_name is None
        stopper.on_train_end(loop_of(), None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    def test_a_save_is_asked_for_once(self) -> None:
        stopper, loop = Stopper(SCHEDULE), loop_of()
        stopper.on_train_start(loop, None)
        os.kill(os.getpid(), signal.SIGUSR1)
        stopper.on_train_batch_end(loop, None, None, None, 0)
        assert not loop.should_stop
        assert stopper.wants_save()
        assert not stopper.wants_save()

    def test_a_terminal_that_is_gone_is_no_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(descriptor: int, text: bytes) -> int:
            raise OSError("gone")

        stopper = Stopper(SCHEDULE)
        stopper.on_train_start(loop_of(), None)
        monkeypatch.setattr(os, "write", fail)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopper.signal_name == "SIGHUP"


def test_a_request_to_save_ends_nothing() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with unharmed_by_save_requests():
        assert signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL  # which would end this process
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == before
