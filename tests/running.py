"""Runs the program's scripts in tests: in this process where that is enough, because imports take seconds."""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from binidx_files import write_binidx
from torch import Tensor

from src.training import lightning

lightning.ready()  # as the program imports it, which takes half the time

from src.training import stopper as stopping  # noqa: E402
from src.training.host_adam import missing_tools  # noqa: E402
from src.training.objectives import Staged  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


PICTURE = {"loss.png"} if importlib.util.find_spec("matplotlib") else set()
"""What a run leaves besides, but for `--plot 0`, which `train` gives: to draw takes as long as a short run."""


OFFLOADS = pytest.mark.skipif(
    bool(missing_tools()), reason=f"DeepSpeed's Adam for the host cannot be built: {' and '.join(missing_tools())}"
)
"""For what steps with `--strategy deepspeed_*_offload` on a GPU."""


def left_by_run(*checkpoints: str) -> set[str]:
    """Names of what a finished run leaves that wrote these `rwkv-{epoch}.pth`; a JSON file stands beside each."""
    written = {"rwkv-final.pth", *checkpoints}
    return {
        *written,
        *(name.replace(".pth", ".json") for name in written),
        "train_log.txt",
        "metrics.jsonl",
        "run.toml",
    }


@dataclass(frozen=True)
class Ended:
    """How a script ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


def run_script(script: str, *arguments: object, **flags: object) -> Ended:
    """Runs a script of the repository's root in this process, as `python SCRIPT ...` would.

    Args:
        script: its file name.
        arguments: words of the command line.
        flags: `name=value` becomes `--name value`.
    """
    words = [str(word) for word in arguments]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        unittest.mock.patch.dict(os.environ),  # Lightning leaves its port there
    ):
        patch.setattr(sys, "argv", [script, *words])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code: Any = 0
        except SystemExit as end:
            code = end.code
        finally:
            torch.use_deterministic_algorithms(deterministic)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(code, int), code
    return Ended(code, out.getvalue(), err.getvalue())


def train(folder: Path, **flags: object) -> Ended:
    """Runs train.py on the CPU, unquantised unless asked, with results in `folder`; it must end well."""
    ended = try_train(folder, **flags)
    assert ended.code == 0, ended.err
    return ended


def try_train(folder: Path, **flags: object) -> Ended:
    """As `train`, whatever the end; with a document a row, so that tests can count steps."""
    rows = {} if {"orpo", "dpo", "simpo", "train_type"} & flags.keys() else {"dataload": "pad"}
    return run_script("train.py", **{"proj_dir": folder, "accelerator": "cpu", "quant": 0, "plot": 0, **rows, **flags})


@contextlib.contextmanager
def after_step(step: int, act: Callable[[Any], None]) -> Iterator[None]:
    """Does something once a step of a run is complete, before anybody asks whether to stop."""
    ask = stopping.Stopper.on_train_batch_end

    def acting(self: stopping.Stopper, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate == 0 and self.start.steps + trainer.global_step == step:
            act(self)
        ask(self, trainer, module, outputs, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping.Stopper, "on_train_batch_end", acting)
        yield


def interrupt(stopper: stopping.Stopper) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stopped(step: int, folder: Path, **flags: object) -> Ended:
    """A run that gets a Ctrl-C in this step."""
    with after_step(step, interrupt):
        ended = train(folder, **flags)
    assert "stopped by SIGINT" in ended.out
    assert {"rwkv-resume.pth", "rwkv-final.pth"} <= files_in(folder)
    return ended


def go_on(folder: Path, **flags: object) -> Ended:
    ended = run_script("train.py", proj_dir=folder, resume=1, **flags)
    assert ended.code == 0, ended.err
    return ended


def refusal(ended: Ended, folder: Path) -> str:
    """The sentence that refused; checks how the program ended and what it left."""
    assert ended.code == 2, ended.out + ended.err
    assert "Traceback" not in ended.err + ended.out
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    message = ended.err[ended.err.index("error: ") + len("error: ") :].strip()
    assert "\n" not in message
    assert len(message) > 20
    left = files_in(folder) if folder.is_dir() else set()
    assert not [name for name in left if "pth" in name], left
    return message


@contextlib.contextmanager
def started(
    script: str, *words: object, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The same in a process of its own, which is gone afterwards, and its pipes are closed."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class GivenLoss:
    """An objective whose loss is a function of (model, batch); its batches are staged as they are."""

    recordable = False

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        self.function = function

    def stage(self, model: Any, batch: Any) -> Staged:
        return Staged({}, batch)

    def compute(self, model: Any, staged: Staged) -> tuple[Tensor, Any]:
        return self.function(model, staged.source), None

    def logs(self, result: Any) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` says of steps."""
    return [record for record in records(folder) if "loss" in record]


def records(folder: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`; a line that is still being written is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]


def files_in(folder: Path) -> set[str]:
    """Names of everything in a folder, hidden files included."""
    return {entry.name for entry in folder.iterdir()}


def write_documents(
    prefix: Path, lengths: list[int], vocab_size: int = 257, seed: int = 0, dtype: Any = np.uint16
) -> Path:
    """Writes a binidx of documents with some regularity: each a short random phrase, repeated; 0 at the end."""
    generator = np.random.default_rng(seed)
    documents = []
    for length in lengths:
        phrase = generator.integers(1, vocab_size, size=7)
        documents.append([*np.resize(phrase, length - 1).tolist(), 0])
    write_binidx(prefix, documents, dtype)
    return prefix


def wait_until(condition: Callable[[], bool], seconds: float, every: float = 0.05) -> None:
    """Polls until the condition holds, `every` so many seconds.

    Raises:
        TimeoutError: after so many seconds.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(every)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Records without what differs between any two runs."""
    return [{k: v for k, v in row.items() if k not in ("run", "seconds", "tokens_per_s")} for row in records(folder)]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from tensors_in(part)


def epoch_lines(folder: Path) -> list[list[str]]:
    lines = (folder / "train_log.txt").read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines if line[0].isdigit()]
    return [[*line[:4], line[-1]] for line in words]


def assert_same_end(one: Path, other: Path) -> None:
    """Same files, same bits in every checkpoint, same records."""
    assert files_in(one) == files_in(other)
    for name in sorted(files_in(one)):
        if name.endswith(".pth"):
            first, second = (torch.load(folder / name, weights_only=True) for folder in (one, other))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), name
    assert steps_of(one) == steps_of(other)
    assert epoch_lines(one) == epoch_lines(other)
    assert len({row["run"] for row in records(other)}) == 1
