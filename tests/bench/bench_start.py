"""Where the seconds from a command to its first training step go.

    python tests/bench/bench_start.py --size 1.6b --folder /data         on a random model of the true shape
    python tests/bench/bench_start.py --demo sft                         the demonstration, whole

Starts `train.py` in a process of its own: first with an empty folder for compiled kernels, then again with what the
first start left there. Each row's seconds are the main thread's, without those of the rows that it calls: "imports" are
all import statements, wherever they stand; "kernels" is what is waited for them. Flags of train.py go at the end.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))

WATCHED = {
    "src.ops.kernels": {"Kernel.load": "kernels", "_use_primary_context": "GPU's context"},
    "src.training.run": {
        "resolve_hardware": "GPU's context",
        "apply_hardware": "GPU's context",
        "prepare_work": "data",
        "open_model": "model read",
        "_evaluate": "held-out data",
        "measure_unpacked": "held-out data",
        "fit": "training loop",
    },
    "src.training.fitting": {"fit": "training loop"},
    "src.training.lightning": {"ready": "imports"},
    "src.training.graphs": {"_RecordedStep.__init__": "recording"},
    "src.commands.demo": {"_sampled": "samples"},
}
"""Functions by module, and the row of the table that their time is counted in."""
ROWS = (
    *("Python", "imports", "GPU's context", "data", "model read", "kernels", "held-out data"),
    *("training loop", "recording", "samples", "else"),
)


class Stopwatch:
    """Adds up the main thread's seconds by what it is busy with, innermost first."""

    def __init__(self, begin: float) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._seconds["Python"] = time.time() - begin
        self._begin = begin
        self._stack = ["else"]
        self._last = time.time()
        self.steps: list[dict[str, float]] = []

    def wrap(self, function: Callable[..., Any], row: str) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*arguments, **named)
            self._turn()
            self._stack.append(row)
            try:
                return function(*arguments, **named)
            finally:
                self._turn()
                self._stack.pop()

        return watched

    def note_step(self) -> None:
        """Called after every training step."""
        self.steps.append(self.seconds())

    def seconds(self) -> dict[str, float]:
        """So far, by row; "whole" is since the command."""
        self._turn()
        return {**self._seconds, "whole": time.time() - self._begin}

    def _turn(self) -> None:
        now = time.time()
        self._seconds[self._stack[-1]] += now - self._last
        self._last = now


class Watcher(importlib.abc.MetaPathFinder):
    """Puts a stopwatch around functions of modules when these are imported, without importing any itself."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name not in WATCHED and name != "src.training.callbacks":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def watched(module: ModuleType) -> None:
            execute(module)
            for place, row in WATCHED.get(name, {}).items():
                *owner, function = place.split(".")
                holder = getattr(module, owner[0]) if owner else module
                if hasattr(holder, function):
                    setattr(holder, function, self._watch.wrap(getattr(holder, function), row))
            if name == "src.training.callbacks":
                self._note_steps(module.TrainingMonitor)

        spec.loader.exec_module = watched  # type: ignore[method-assign]
        return spec

    def _note_steps(self, monitor: Any) -> None:
        after_step = monitor.on_train_batch_end

        def noted(*arguments: Any, **named: Any) -> None:
            after_step(*arguments, **named)
            self._watch.note_step()

        monitor.on_train_batch_end = noted


def run_watched(result: Path, begin: float, flags: list[str]) -> int | None:
    """`train.py` with these flags in this process; leaves seconds by row in a file."""
    watch = Stopwatch(begin)
    sys.meta_path.insert(0, Watcher(watch))
    builtins.__import__ = watch.wrap(builtins.__import__, "imports")
    sys.argv = ["train.py", *flags]
    import train

    code = train.main()
    result.write_text(json.dumps([*watch.steps, watch.seconds()]))
    return code


def measured(flags: list[str], cache: Path) -> list[dict[str, float]]:
    """Seconds by row after every step, and at the end."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        command = [sys.executable, __file__, "--result", str(result), "--begin", str(time.time()), *flags]
        variables = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=variables)
        if done.returncode or not result.exists():
            sys.exit(done.stdout + done.stderr)
        found: list[dict[str, float]] = json.loads(result.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.6b", help="of the model, as bench_load.py names it")
    parser.add_argument("--folder", type=Path, help="where the model is, or is written to")
    parser.add_argument("--demo", help="a demonstration instead")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=float, help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.result:
        if options.demo:
            flags += ["--demo", options.demo]
        sys.exit(run_watched(options.result, options.begin, flags))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if options.demo:
            flags = ["--demo", options.demo, "--proj_dir", str(place / "out"), "--overwrite", "1", *flags]
        else:
            flags = [*flags_for_model(options.size, options.folder or place, place), *flags]
        starts = [measured(flags, place / "cache") for _ in range(options.starts)]
    print_table(starts, at_end=bool(options.demo))


def flags_for_model(size: str, folder: Path, place: Path) -> list[str]:
    """Three steps on random text."""
    model = folder / f"random-{size}.pth"
    if not model.exists():
        writing = [sys.executable, str(REPOSITORY / "tests/bench/bench_load.py"), "--write-only"]
        subprocess.run([*writing, "--size", size, "--folder", str(folder)], check=True)
    import numpy as np
    from binidx_files import write_binidx

    documents = [np.random.default_rng(i).integers(1, 65529, 1025) for i in range(4)]
    write_binidx(str(place / "data"), documents, np.int32)
    return [
        "--load_model", str(model), "--data_file", str(place / "data"), "--proj_dir", str(place / "out"),
        "--overwrite", "1", "--epoch_steps", "3", "--epoch_count", "1",
    ]  # fmt: skip


def print_table(starts: list[list[dict[str, float]]], *, at_end: bool) -> None:
    """Seconds by row up to the first step, or at the end."""
    chosen = [seconds[-1 if at_end else 0] for seconds in starts]
    titles = ["empty cache", *(f"warm {number}" for number in range(1, len(starts)))]
    print(
        f"{'seconds ' + ('of the whole run' if at_end else 'to the first step'):<26}"
        + "".join(f"{t:>13}" for t in titles)
    )
    for row in ROWS:
        values = [seconds.get(row, 0.0) for seconds in chosen]
        if any(value >= 0.005 for value in values):
            print(f"  {row:<24}" + "".join(f"{value:>13.2f}" for value in values))
    print(f"  {'whole':<24}" + "".join(f"{seconds['whole']:>13.2f}" for seconds in chosen))
    if not at_end:
        beyond = (seconds["whole"] - seconds["model read"] for seconds in chosen)
        print(f"  {'beyond reading the model':<24}" + "".join(f"{value:>13.2f}" for value in beyond))
        print(f"  {'whole, after step 3':<24}" + "".join(f"{seconds[2]['whole']:>13.2f}" for seconds in starts))


if __name__ == "__main__":
    main()
