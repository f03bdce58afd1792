"""Runs that are disturbed at random moments: nothing is lost but the steps since the last save."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint
from running import ROOT, metrics, run_script, train, wait_until, write_documents

TIMES = 3
"""How often each disturbance is tried."""

STEPS = 90
FLAGS = {
    "epoch_steps": STEPS // 3,
    "epoch_count": 3,
    "dropout": 0.1,
    "dataload": "pad",
    "accelerator": "cpu",
    "quant": 0,
}

pytestmark = pytest.mark.slow
each_time = pytest.mark.parametrize("number", range(TIMES))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_checkpoint(folder / "base.pth", dtype=torch.bfloat16)
    data = write_documents(folder / "documents", [30, 12, 25, 18, 9, 33])
    return {"load_model": folder / "base.pth", "data_file": data, **FLAGS}


@pytest.fixture(scope="module")
def undisturbed(inputs: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, **inputs)
    return folder


def tmp_path_of(folder: Path) -> Path:
    """The test's own folder, of which the run's is somewhere below."""
    return folder.parents[1] if folder.parent.name == "disk" else folder.parent


class Run:
    """A run in a process of its own, up to a random step.

    Args:
        folder: its --proj_dir.
        number: of the trial, which seeds the moment.
        last: step before which the moment is.
        often: whether the run is saved all the time.
    """

    def __init__(
        self, folder: Path, number: int, *, often: bool = True, last: int = STEPS // 2, **flags: object
    ) -> None:
        self.folder = folder
        given = {**flags, "proj_dir": folder, **({"save_minutes": 1e-9} if often else {})}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path_of(folder))},
        )
        moment = random.Random(number)
        step = moment.randrange(2, last)
        wait_until(lambda: len(metrics(folder)) >= step or self.process.poll() is not None, seconds=60)
        time.sleep(moment.random() * 0.02)

    def ended(self) -> tuple[str, str]:
        """What it printed; it must end well."""
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, err
        assert "Traceback" not in err
        return out, err

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream
            stream.close()


def same_final(one: Path, other: Path) -> bool:
    first, second = (torch.load(folder / "rwkv-final.pth", weights_only=True) for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def goes_on(folder: Path, undisturbed: Path) -> None:
    """Continues, and ends as if nothing had been."""
    ended = run_script("train.py", proj_dir=folder, resume=1)
    assert ended.code == 0, ended.err
    assert same_final(folder, undisturbed)
    assert [row["step"] for row in metrics(folder)] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in metrics(folder)] == [row["loss"] for row in metrics(undisturbed)]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not list(folder.glob("rwkv-resume*"))


@each_time
def test_killed(number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path) -> None:
    """In half of the trials while the run is being saved."""
    folder = tmp_path / "out"
    with Run(folder, number, **inputs) as run:
        if number % 2:
            wait_until(lambda: bool(list(folder.glob(".*.unfinished"))) or run.process.poll() is not None, seconds=60)
        run.process.kill()
        run.process.wait()
    torch.load(folder / "rwkv-resume.pth", weights_only=True)
    goes_on(folder, undisturbed)


@each_time
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_asked_to_end(name: str, number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Run(folder, number, often=False, **inputs) as run:
        run.process.send_signal(signal.Signals[name])
        out, _ = run.ended()
    assert f"stopped by {name} after {len(metrics(folder))} steps" in out
    goes_on(folder, undisturbed)


@each_time
def test_asked_to_save(number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Run(folder, number, often=False, last=STEPS // 6, **inputs) as run:
        before = len(metrics(folder))
        run.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: (folder / "rwkv-resume.pth").exists() or run.process.poll() is not None, seconds=60)
        run.process.kill()
        run.process.wait()
    saved = torch.load(folder / "rwkv-resume.pth", weights_only=True)
    assert saved["steps"] >= before
    goes_on(folder, undisturbed)


@each_time
def test_a_dead_reader(number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Run(folder, number, **inputs) as run:
        assert run.process.stdout
        assert run.process.stderr
        run.process.stdout.close()
        if number % 2:
            run.process.stderr.close()
        assert run.process.wait(timeout=120) == 0
    assert same_final(folder, undisturbed)
    assert len(metrics(folder)) == STEPS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(path: Path) -> None:
    """Writes to a file what its disk takes."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1024))


@each_time
def test_a_full_disk(
    number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path, small_disk: Path
) -> None:
    """Which also takes the folder's parent; the run ends elsewhere, and says why and where."""
    folder = small_disk / "out"
    with Run(folder, number, **inputs) as run:
        fill(small_disk / "filler")
        out, err = run.ended()
    (saved,) = set(re.findall(r"No space left on device; .*; saved as (\S+/rwkv-final\.pth)", err))
    assert f"saved as {saved}" in err
    assert saved in out
    assert same_final(Path(saved).parent, undisturbed)


@each_time
def test_a_folder_that_vanishes(number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path) -> None:
    """The run is stopped then, and goes on where it says."""
    change = ("removed", "renamed", "replaced")[number % 3]
    folder = tmp_path / "out"
    with Run(folder, number, **inputs) as run:
        if change == "removed":
            while folder.exists():  # the run may write while this removes
                shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.rename(tmp_path / "renamed")
        if change == "replaced":
            folder.write_text("a file")
        time.sleep(0.05)
        run.process.send_signal(signal.SIGTERM)
        out, err = run.ended()
    assert "cannot be written" in err
    (command,) = re.findall(r"python train\.py (--proj_dir .* --resume 1)", out)
    elsewhere = Path(shlex.split(command)[1])
    assert elsewhere != folder
    ended = run_script("train.py", *shlex.split(command))
    assert ended.code == 0, ended.err
    assert same_final(elsewhere, undisturbed)


def test_two_runs_in_one_folder(inputs: dict[str, object], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Run(folder, 0, **inputs) as run:
        second = run_script("train.py", **inputs, proj_dir=folder, overwrite=1)
        assert second.code == 2
        assert f"belongs to a run that is going on (process {run.process.pid} on " in second.err
        run.ended()
    assert same_final(folder, undisturbed)
