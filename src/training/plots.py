"""`loss.png`: a run's course at a glance, redrawn as it goes.

Drawn by matplotlib, which is loaded at the first picture, by its figures alone, so that no setting or window of the
process is touched. What is drawn is a function of a `Course`, which a run that goes on reads back from `metrics.jsonl`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from src import storage
from src.training.logs import HeldOutLog, Sink, StepLog

FIRST_SECONDS = 10.0
"""After which a run draws for the first time; loading matplotlib takes about a second of that."""
_SHARE_OF_TIME = 100
_SHORTEST_SECONDS = 15.0
_MOST_POINTS = 1500
_TRAINING, _HELD_OUT, _FAINT, _TEXT = "#1f5fa8", "#d1580b", "#9ab8d9", "#333333"
_TITLE_CHARACTERS = (100, 135)
"""On a line of the title, without and with preferences."""
_COMPARED = ("log_odds", "margin")
"""What preferences are measured by beside their accuracy: the first that is there."""
_EDGE = 0.1
"""Of a panel's height: within it no number fits between a dot and the panel's end."""
_ROOM = 0.16
"""Of what a panel shows, beyond it on either side: for the numbers beside the outermost dots."""
_WIDE = 20
"""A loss whose largest value is so many times its smallest is drawn on a logarithmic scale."""
_NAMES = {
    "loss": "loss",
    "log_odds": "log odds ratio, chosen : rejected",
    "margin": "reward margin, chosen - rejected",
    "accuracy": "accuracy: chosen before rejected",
    "lr": "learning rate",
}


@dataclass
class Course:
    """The numbers of a run so far.

    Attributes:
        steps: that are logged, ascending.
        values: by name, one for each of these steps; NaN where there is none.
        held_out: (step, numbers by name) of each measurement on held-out data.
    """

    steps: list[int] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    held_out: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Takes note of a step."""
        for name in ("loss", "lr", "accuracy", *_COMPARED):
            if name in values or name in self.values:
                known = self.values.setdefault(name, [math.nan] * len(self.steps))
                known.append(values.get(name, math.nan))
        self.steps.append(step)

    def measured(self, step: int, values: Mapping[str, Any]) -> None:
        """Takes note of a measurement."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if "overall" in numbers:  # of text
            numbers["loss"] = numbers["overall"]
        self.held_out.append((step, numbers))

    def points_held_out(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of the measurements that have such a number."""
        found = [(step, values[name]) for step, values in self.held_out if math.isfinite(values.get(name, math.nan))]
        return [step for step, _ in found], [value for _, value in found]

    @classmethod
    def of_run(cls, metrics: Path, run: str) -> Course:
        """What `metrics.jsonl` says of a run; nothing where it cannot be read."""
        course = cls()
        try:
            lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        except (OSError, UnicodeDecodeError):
            return course
        for line in lines:
            try:
                row = json.loads(line)
                if row["run"] != run:
                    continue
                if "held_out" in row:
                    course.measured(row["step"], row["held_out"])
                else:
                    course.add(row["step"], row)
            except (ValueError, KeyError, TypeError):
                continue
        return course


class PlotSink(Sink):
    """Draws the run so far: after some seconds, then so rarely that it takes under 1 % of the time, and at the end.

    Args:
        path: of the picture.
        title: above it.
        course: of the run before.
        warn: tells the user, once, when it cannot be drawn or written; the run goes on.
        leave_out: is told the seconds that a picture took.
    """

    def __init__(
        self,
        path: Path,
        title: str,
        course: Course,
        warn: Callable[[str], None],
        leave_out: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._path = path
        self._title = title
        self._course = course
        self._warn = warn
        self._leave_out = leave_out
        self._next = time.monotonic() + FIRST_SECONDS
        self._works = True
        self._is_new = False

    def step(self, log: StepLog) -> None:
        self._course.add(log.step, {"loss": log.loss, "lr": log.lr, **log.extra})
        self._is_new = True
        if time.monotonic() >= self._next:
            self._draw()

    def held_out(self, log: HeldOutLog) -> None:
        self._course.measured(log.step, log.values)
        self._is_new = True

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        if not (self._works and self._is_new and self._course.steps):
            return
        begin = time.monotonic()
        try:
            draw(self._course, self._path, self._title)
        except OSError as error:
            self._stop(f"{self._path} cannot be written ({error.strerror or error})")
        except Exception as error:  # whatever another version of a library does: a picture ends no run
            self._stop(f"{self._path} cannot be drawn ({type(error).__name__}: {error})")
        seconds = time.monotonic() - begin
        self._is_new = False
        self._next = time.monotonic() + max(_SHORTEST_SECONDS, _SHARE_OF_TIME * seconds)
        self._leave_out(seconds)

    def _stop(self, text: str) -> None:
        self._works = False
        self._warn(f"{text}; training goes on, and --plot 0 leaves it out")


def can_draw() -> bool:
    """Whether matplotlib is installed; it is not loaded for that."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(course: Course, path: Path, title: str) -> None:
    """Writes a picture of a run, atomically.

    Args:
        course: at least one step.
        path: of the PNG file.
        title: above it.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compared = next((name for name in _COMPARED if name in course.values), None)
    figure = Figure(figsize=(12, 6.4) if compared else (9, 6.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    lines = textwrap.wrap(title, _TITLE_CHARACTERS[bool(compared)])
    figure.suptitle("\n".join(lines), fontsize=12, color=_TEXT, x=0.01, ha="left")
    columns = 2 if compared else 1
    grid = figure.add_gridspec(2, columns, height_ratios=[1, 1] if compared else [3, 1])
    loss = figure.add_subplot(grid[0, 0])
    _panel(loss, course, "loss")
    rate = figure.add_subplot(grid[1, 0], sharex=loss)
    rate.plot(course.steps, course.values["lr"], color=_TRAINING, linewidth=1.5, **_dot(course.steps))
    _dress(rate, "lr", course)
    rate.set_ylim(bottom=0)
    if compared:
        odds = figure.add_subplot(grid[0, 1], sharex=loss)
        _panel(odds, course, compared)
        odds.axhline(0, color=_TEXT, linewidth=0.8, alpha=0.5)
        accuracy = figure.add_subplot(grid[1, 1], sharex=loss)
        _panel(accuracy, course, "accuracy")
        accuracy.axhline(0.5, color=_TEXT, linewidth=0.8, alpha=0.5)
        accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    with storage.replacing(path) as file:
        figure.savefig(file, format="png")


def _panel(axes: Any, course: Course, name: str) -> None:
    """One number over the steps: every one faintly, their course, and held-out ones as a line with dots."""
    steps, values = np.array(course.steps), np.array(course.values.get(name, [math.nan] * len(course.steps)))
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    smooth = smoothed(values)
    held_steps, held_values = course.points_held_out(name)
    if len(steps):
        shown_steps, shown = thinned(steps, values)
        axes.plot(shown_steps, shown, color=_FAINT, linewidth=0.8, alpha=0.7)
        axes.plot(*thinned(steps, smooth), color=_TRAINING, linewidth=2, label="training (running mean)", **_dot(steps))
    if held_steps:
        # Two measurements say nothing of what was between them.
        line = "-" if len(held_steps) > 2 else ":"
        axes.plot(
            held_steps, held_values, line, color=_HELD_OUT, linewidth=2, marker="o", markersize=5, label="held out",
            clip_on=False,
        )  # fmt: skip
    every = [*smooth.tolist(), *held_values]
    is_wide = name == "loss" and min(every, default=0) > 0 and max(every) > _WIDE * min(every)
    placed = math.log if is_wide else float
    low, high = (-0.03, 1.03)
    if is_wide:
        axes.set_yscale("log")
        low, high = limits(np.log(every).tolist(), np.empty(0))
    elif name != "accuracy":
        low, high = limits(every, values)
    axes.set_ylim(*(np.exp((low, high)) if is_wide else (low, high)))
    for place in sorted({0, len(held_steps) - 1}) if held_steps else ():
        beside = held_values[min(place + 1, len(held_values) - 1) if place == 0 else place - 1]
        _number(
            axes,
            held_steps[place],
            held_values[place],
            name,
            is_first=place == 0,
            below=_is_below(placed(held_values[place]), placed(beside), low, high),
        )
    _dress(axes, name, course)
    if name == "loss" and (len(steps) or held_steps):
        # Above the panel, where it hides nothing; it holds for all of them.
        axes.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9, frameon=False, borderaxespad=0, borderpad=0.3
        )


def _dot(steps: Sequence[int] | np.ndarray[Any, Any]) -> dict[str, Any]:
    """How a line is drawn that has but one point, and would not be seen."""
    return {"marker": "o", "markersize": 4} if len(steps) == 1 else {}


def _is_below(value: float, beside: float, low: float, high: float) -> bool:
    """Whether a number stands under its dot: away from the line to the dot beside it, within the panel."""
    place = (value - low) / (high - low)
    return place > 1 - _EDGE or (value < beside and place > _EDGE)


def _number(axes: Any, step: int, value: float, name: str, *, is_first: bool, below: bool) -> None:
    """Writes a held-out number beside its dot, readable over any line."""
    from matplotlib.patheffects import withStroke

    axes.annotate(
        f"{value:.1%}" if name == "accuracy" else f"{value:#.4g}",
        (step, value),
        (7 if is_first else -4, -8 if below else 8),
        textcoords="offset points",
        va="top" if below else "bottom",
        ha="left" if is_first else "right",
        color=_HELD_OUT,
        fontweight="bold",
        path_effects=[withStroke(linewidth=4, foreground="white")],
        zorder=5,
    )


def _dress(axes: Any, name: str, course: Course) -> None:
    """Title, grid and frame of a panel."""
    scale = " (logarithmic)" if axes.get_yscale() == "log" else ""
    axes.set_title(f"{_NAMES[name]}{scale}", fontsize=10, color=_TEXT, loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("optimizer step", fontsize=9, color=_TEXT)
    axes.tick_params(labelsize=9, colors=_TEXT)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlim(0, max(course.steps[-1], *(step for step, _ in course.held_out), 1) * 1.02)


def smoothed(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Running mean over about a twentieth of the steps, without a lag at the beginning.

    Args:
        values: fp64 [n], finite.

    Returns:
        fp64 [n]: exponentially weighted means of what came before, each divided by the weights that there are.
    """
    keep = 1 - 1 / max(len(values) / 20, 1)
    mean = weight = 0.0
    means = np.empty(len(values))
    for place, value in enumerate(values.tolist()):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means[place] = mean / weight
    return means


def thinned(steps: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """So many points at most as a picture shows, of each stretch its smallest and its largest."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    chosen: list[int] = []
    for stretch in np.array_split(np.arange(len(steps)), _MOST_POINTS // 2):
        places = {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
        chosen += sorted(places)
    return steps[chosen], values[chosen]


def limits(course: Sequence[float], values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Between which values a panel reaches: all of the course, and of single steps all but the few outermost."""
    inner = np.quantile(values, [0.01, 0.99]).tolist() if len(values) else []
    every = [*course, *inner]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    room = _ROOM * (high - low) or 0.5
    return low - room, high + room
