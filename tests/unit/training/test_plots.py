"""`loss.png`: what is drawn, when, and what happens where it cannot be."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.config import TrainConfig
from src.training import plots
from src.training.logs import FileSink, HeldOutLog, StepLog
from src.training.plots import Course, PlotSink, draw, limits, smoothed, thinned

has_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="no matplotlib here")
CONFIG = TrainConfig.from_flags({"load_model": "base.pth", "data_file": "data"})
PNG = b"\x89PNG\r\n\x1a\n"


def step_log(step: int, loss: float = 2.5, extra: dict[str, float] | None = None) -> StepLog:
    return StepLog(step, 0, loss, lr=0.5, weight_decay=0.0, grad_norm=0.1, seconds=0.25, tokens=9, extra=extra or {})


def logs(*, preferences: bool = False) -> list[StepLog | HeldOutLog]:
    """Nine steps and three measurements."""
    made: list[StepLog | HeldOutLog] = []
    for step in range(10):
        extra = {"accuracy": 0.5, "log_odds": step / 10} if preferences else {}
        made += [step_log(step, loss=3 - step / 10, extra=extra)] if step else []
        if step in (0, 5, 9):
            values = {"loss": 3.0, "accuracy": 0.6, "log_odds": 0.1} if preferences else {"overall": 3.0, "start": 2.0}
            made.append(HeldOutLog(step, {**values, "rest": math.nan}, "text", best=False))
    return made


@pytest.mark.parametrize("preferences", [False, True])
def test_a_course_is_read_back_from_the_metrics(preferences: bool, tmp_path: Path) -> None:
    course, sink = Course(), FileSink(tmp_path, CONFIG, None, "mine")
    for log in logs(preferences=preferences):
        if isinstance(log, StepLog):
            sink.step(log)
            course.add(log.step, {"loss": log.loss, "lr": log.lr, **log.extra})
        else:
            sink.held_out(log)
            course.measured(log.step, log.values)
    sink.close()
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"run": "other", "step": 99, "loss": 1.0}) + '\n{"run"\n[]\n')
    back = Course.of_run(tmp_path / "metrics.jsonl", "mine")
    assert back.steps == list(range(1, 10))
    assert back.values == course.values
    assert back.points_held_out("loss") == course.points_held_out("loss") == ([0, 5, 9], [3.0] * 3)
    assert back.points_held_out("rest") == ([], [])
    assert Course.of_run(tmp_path / "nothing.jsonl", "mine") == Course.of_run(tmp_path, "mine") == Course()


def test_what_only_some_steps_have() -> None:
    course = Course()
    course.add(1, {"loss": 1.0})
    course.add(2, {"loss": 1.0, "accuracy": 0.5})
    course.add(3, {"loss": 1.0})
    assert np.isnan(course.values["accuracy"]).tolist() == [True, False, True]


def test_the_running_mean_has_no_lag_at_the_beginning() -> None:
    assert smoothed(np.full(100, 2.5)) == pytest.approx(2.5)
    falling = np.linspace(3, 1, 200)
    assert smoothed(falling)[0] == 3
    assert abs(smoothed(falling)[-1] - falling[-1]) < 0.15
    assert smoothed(np.array([])).shape == (0,)


def test_long_runs_keep_their_extremes() -> None:
    values = np.zeros(100_000)
    values[[777, 88_888]] = 5, -5
    steps, shown = thinned(np.arange(100_000), values)
    assert len(steps) <= 1500
    assert (shown.max(), shown.min()) == (5, -5)
    assert (np.diff(steps) > 0).all()


def test_a_spike_does_not_flatten_the_rest() -> None:
    values = np.linspace(2, 1, 1000)
    values[3] = 400.0
    low, high = limits(values[10:].tolist(), values)
    assert 0.8 < low < 1
    assert 2 < high < 2.2
    assert limits([], np.array([])) == pytest.approx((-0.16, 1.16))
    low, high = limits([1.0], np.array([1.0]))
    assert low < 1 < high


@has_matplotlib
@pytest.mark.parametrize("preferences", [False, True])
def test_a_picture_is_drawn_at_the_end(preferences: bool, tmp_path: Path) -> None:
    said: list[str] = []
    left_out: list[float] = []
    sink = PlotSink(tmp_path / "loss.png", "a run", Course(), said.append, left_out.append)
    for log in logs(preferences=preferences):
        sink.step(log) if isinstance(log, StepLog) else sink.held_out(log)
    assert not list(tmp_path.iterdir())
    sink.close()
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert not said
    assert len(left_out) == 1
    sink.close()  # nothing new
    assert len(left_out) == 1


@has_matplotlib
def test_one_step_and_nothing_else_is_a_picture_too(tmp_path: Path) -> None:
    course = Course()
    course.add(1, {"loss": 2.0, "lr": 1.0, "accuracy": math.nan, "margin": math.nan})
    draw(course, tmp_path / "one.png", "")
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)
    dots = shown_in(tmp_path / "one.png", "#1f5fa8")
    assert all(dots[part].sum() > 10 for part in (slice(40, 320), slice(320, 640)))  # of the loss and of the rate


@has_matplotlib
@pytest.mark.parametrize("ends_at", [1.0, 4.0])
def test_what_was_measured_last_is_never_hidden(ends_at: float, tmp_path: Path) -> None:
    course = Course()
    for step in range(1, 31):
        course.add(step, {"loss": 2 - step / 60, "lr": 1.0})
    for step, value in ((0, 2.0), (10, 2.1), (30, ends_at)):
        course.measured(step, {"overall": value})
    draw(course, tmp_path / "held-out.png", "a long title " * 20)
    held_out = shown_in(tmp_path / "held-out.png", "#d1580b")
    columns = np.flatnonzero(held_out[110:400].any(axis=0))  # below the legend
    assert columns.max() > 870


@has_matplotlib
def test_losses_of_many_sizes_are_drawn_by_their_logarithm(tmp_path: Path) -> None:
    course = Course()
    for step in range(1, 200):
        course.add(step, {"loss": 2 + 1000 * math.exp(-step / 5), "lr": 1.0})
    draw(course, tmp_path / "wide.png", "")
    rows = np.flatnonzero(shown_in(tmp_path / "wide.png", "#1f5fa8")[60:400, 700:880].any(axis=1))
    assert rows.max() < 335  # the long end does not lie on the axis


def shown_in(picture: Path, colour: str) -> np.ndarray[Any, Any]:
    """Which pixels have a colour."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    return np.abs(imread(picture)[..., :3] - np.array(to_rgb(colour))).max(axis=-1) < 0.02


@pytest.mark.parametrize(
    ("value", "beside", "below"),
    [(1.5, 1.2, False), (1.5, 1.8, True), (1.98, 1.2, True), (1.02, 1.5, False)],
)
def test_numbers_stand_away_from_the_line(value: float, beside: float, below: bool) -> None:
    assert plots._is_below(value, beside, 1.0, 2.0) == below


def test_it_is_redrawn_rarely_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], []
    monkeypatch.setattr(plots.time, "monotonic", lambda: now[0])

    def take_a_second(course: Course, path: Path, title: str) -> None:
        drawn.append(now[0])
        now[0] += 1

    monkeypatch.setattr(plots, "draw", take_a_second)
    sink = PlotSink(tmp_path / "loss.png", "", Course(), lambda text: None)
    for step in range(1, 301):
        now[0] += 1
        sink.step(step_log(step))
    assert drawn == [10, 111, 212]


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(28, "No space left on device"), "cannot be written (No space"), (ValueError("odd"), "cannot be drawn")],
)
def test_a_picture_ends_no_run(error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(plots, "draw", fail)
    warnings: list[str] = []
    sink = PlotSink(tmp_path / "loss.png", "", Course(), warnings.append)
    for step in (1, 2):
        sink.step(step_log(step))
        sink.close()
    (warning,) = warnings
    assert said in warning
    assert "--plot 0" in warning
