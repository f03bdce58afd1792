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

TIMES = int(os.environ.get("RWKV_FAULT_TIMES", "1"))
"""How often each disturbance is tried, kills three times as often; but each of its variants at least once."""

STEPS = 90
SECONDS_TO_START = 6
FLAGS = {
    "epoch_steps": STEPS // 3,
    "epoch_count": 3,
    "dropout": 0.1,
    "dataload": "pad",
    "accelerator": "cpu",
    "quant": 0,
}

READERS = ("head -1", "tee, which is killed", "both ends closed")
DISKS = ("the run ends", "SIGTERM", "SIGKILL")
FOLDERS = ("removed", "renamed", "replaced")

pytestmark = pytest.mark.slow


def each_time(variants: int = 1, times: int = TIMES) -> pytest.MarkDecorator:
    """Numbers of trials."""
    return pytest.mark.parametrize("number", range(max(variants, times)))


class Ledger:
    """What was tried, and how many steps had to be done again; printed at the end (`pytest -s`)."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}

    def note(self, kind: str, *, lost: int) -> None:
        self.rows.setdefault(kind, []).append(lost)

    def __str__(self) -> str:
        lines = ["| disturbance | trials | steps done again, of 90: most | mean |", "|---|---|---|---|"]
        for kind, lost in self.rows.items():
            lines.append(f"| {kind} | {len(lost)} | {max(lost)} | {sum(lost) / len(lost):.1f} |")
        return "\n".join(lines)


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    kept = Ledger()
    yield kept
    print(f"\n{kept}")


@pytest.fixture(scope="module", autouse=True)
def ordinary_signals() -> Iterator[None]:
    """Programs that a shell starts behind its back, or nohup, ignore some, and so would what they start."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


def is_early(number: int) -> bool:
    """Whether a trial's moment is a random one while the program starts, before there is anything to lose."""
    return number % 5 == 4


class Run:
    """A run in a process of its own, up to a random moment: of every five trials one before the first step.

    Args:
        folder: its --proj_dir.
        number: of the trial, which seeds the moment; of those that save often every second one is while saving.
        last: step before which the moment is.
        often: whether the run is saved all the time.
        early: whether moments before the first step are wanted.
        reader: what reads its output instead of this.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        *,
        often: bool = True,
        last: int = STEPS // 2,
        early: bool = False,
        reader: str = "",
        **flags: object,
    ) -> None:
        self.folder = folder
        given = {**flags, "proj_dir": folder, **({"save_minutes": 1e-9} if often else {})}
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if reader else subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path_of(folder))},
        )
        self.reader: subprocess.Popen[bytes] | None = None
        if reader:
            assert self.process.stdout
            self.reader = subprocess.Popen(
                shlex.split(reader), stdin=self.process.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            self.process.stdout.close()
        moment = random.Random(number)
        step = moment.randrange(2, last)
        if early and is_early(number):
            time.sleep(moment.random() * SECONDS_TO_START)
            return
        wait_until(lambda: len(metrics(folder)) >= step or self.over(), seconds=300)
        time.sleep(moment.random() * 0.02)
        if often and number % 2:
            wait_until(lambda: bool(list(folder.glob(".*.unfinished"))) or self.over(), seconds=300, every=0.0005)

    def over(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def ended(self) -> tuple[str, str]:
        """What it printed; it must end well."""
        out, err = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, err
        assert "Traceback" not in err
        return out, err

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        for process in (self.process, self.reader):
            if process is not None:
                process.kill()
                process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()


def same_final(one: Path, other: Path) -> bool:
    first, second = (torch.load(folder / "rwkv-final.pth", weights_only=True) for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def steps_saved(folder: Path) -> int:
    """Those from which a run goes on."""
    steps = torch.load(folder / "rwkv-resume.pth", weights_only=True)["steps"]
    assert isinstance(steps, int)
    return steps


def goes_on(folder: Path, undisturbed: Path) -> int:
    """Continues, and ends as if nothing had been; returns how many steps are done again."""
    done = len(metrics(folder))
    lost = done - steps_saved(folder)
    ended = run_script("train.py", proj_dir=folder, resume=1)
    assert ended.code == 0, ended.err
    assert same_final(folder, undisturbed)
    assert [row["step"] for row in metrics(folder)] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in metrics(folder)] == [row["loss"] for row in metrics(undisturbed)]
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not list(folder.glob("rwkv-resume*"))
    return lost


def begins_again(folder: Path, inputs: dict[str, object], undisturbed: Path) -> None:
    """Nothing was saved because no step was taken: the command itself does it, and needs no --overwrite."""
    assert not metrics(folder)
    train(folder, **inputs)
    assert same_final(folder, undisturbed)


@each_time(2, 3 * TIMES)
def test_killed(number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path, ledger: Ledger) -> None:
    folder = tmp_path / "out"
    with Run(folder, number, early=True, **inputs) as run:
        run.process.kill()
        run.process.wait()
    if is_early(number) and not list(folder.glob("rwkv-resume*.pth")):
        begins_again(folder, inputs, undisturbed)
        ledger.note("SIGKILL before the first step", lost=0)
        return
    kind = "SIGKILL while saving" if number % 2 else "SIGKILL"
    ledger.note(f"{kind} (saved as often as it can be)", lost=goes_on(folder, undisturbed))


@each_time()
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_asked_to_end(
    name: str, number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path, ledger: Ledger
) -> None:
    folder = tmp_path / "out"
    with Run(folder, number, often=bool(number % 2), early=True, **inputs) as run:
        run.process.send_signal(signal.Signals[name])
        out, err = run.process.communicate(timeout=600)
    assert "Traceback" not in err
    if is_early(number) and run.process.returncode:
        assert run.process.returncode == (130 if name == "SIGINT" else -signal.Signals[name]), err
        begins_again(folder, inputs, undisturbed)
        ledger.note(f"{name} before the first step", lost=0)
        return
    assert run.process.returncode == 0, err
    assert f"stopped by {name} after {len(metrics(folder))} steps" in out
    lost = goes_on(folder, undisturbed)
    assert lost == 0
    ledger.note(name, lost=lost)


@each_time()
def test_asked_to_save(
    number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path, ledger: Ledger
) -> None:
    """And then killed: what was asked for is there."""
    folder = tmp_path / "out"
    with Run(folder, number, often=False, last=STEPS // 6, **inputs) as run:
        before = len(metrics(folder))
        run.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: (folder / "rwkv-resume.pth").exists() or run.over(), seconds=300)
        assert not run.over()
        run.process.kill()
        run.process.wait()
    assert steps_saved(folder) >= before
    ledger.note("SIGUSR1, then SIGKILL", lost=goes_on(folder, undisturbed))


@each_time(len(READERS))
def test_a_dead_reader(
    number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path, ledger: Ledger
) -> None:
    folder = tmp_path / "out"
    kind = READERS[number % len(READERS)]
    command = {"head -1": kind, "tee, which is killed": f"tee {tmp_path / 'log'}"}.get(kind, "")
    with Run(folder, number, often=bool(number % 2), reader=command, **inputs) as run:
        if run.reader is not None:
            if kind != "head -1":
                run.reader.kill()
            run.reader.wait()
        else:
            assert run.process.stdout
            assert run.process.stderr
            run.process.stdout.close()
            run.process.stderr.close()
        assert run.process.wait(timeout=600) == 0
    assert same_final(folder, undisturbed)
    assert len(metrics(folder)) == STEPS
    ledger.note(f"dead reader: {kind}", lost=0)


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
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # this process may still hold a file in it


def fill(path: Path) -> None:
    """Writes to a file what its disk takes."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1024))


def command_to_go_on(out: str) -> list[str]:
    (command,) = re.findall(r"python train\.py (--proj_dir .* --resume 1)", out)
    return shlex.split(command)


@each_time(len(DISKS))
def test_a_full_disk(
    number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path, small_disk: Path, ledger: Ledger
) -> None:
    """Which also takes the folder's parent; the run goes on elsewhere, and says why and where."""
    folder = small_disk / "out"
    end = DISKS[number % len(DISKS)]
    with Run(folder, number, **inputs) as run:
        run.process.send_signal(signal.SIGSTOP)  # or it may be through before the disk is full
        fill(small_disk / "filler")
        run.process.send_signal(signal.SIGCONT)
        time.sleep(0.1)
        if end == "SIGKILL":
            run.process.kill()
            run.process.wait()
        else:
            if end == "SIGTERM":
                run.process.send_signal(signal.SIGTERM)
            out, err = run.ended()
    (small_disk / "filler").unlink()
    kind = f"full disk, {end}"
    if end == "SIGKILL":  # what was saved elsewhere is newer, what is here is enough
        ledger.note(kind, lost=goes_on(folder, undisturbed))
        return
    places = set(re.findall(r"No space left on device; .*; saved as (\S+/rwkv-final\.pth)", err))
    assert len(places) == 1, err
    (saved,) = places
    assert saved in out
    if end == "SIGTERM":
        words = command_to_go_on(out)
        ended = run_script("train.py", *words)
        assert ended.code == 0, ended.err
        saved = f"{words[1]}/rwkv-final.pth"
    assert same_final(Path(saved).parent, undisturbed)
    ledger.note(kind, lost=0)


@each_time(len(FOLDERS))
def test_a_folder_that_vanishes(
    number: int, inputs: dict[str, object], undisturbed: Path, tmp_path: Path, ledger: Ledger
) -> None:
    """The run ends elsewhere, or is stopped then, and goes on where it says."""
    change = FOLDERS[number % len(FOLDERS)]
    is_stopped = number // len(FOLDERS) % 2 == 0
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
        if is_stopped:
            run.process.send_signal(signal.SIGTERM)
        out, err = run.ended()
    assert "cannot be written" in err
    if is_stopped:
        words = command_to_go_on(out)
        elsewhere = Path(words[1])
        ended = run_script("train.py", *words)
        assert ended.code == 0, ended.err
    else:
        (elsewhere,) = {Path(path).parent for path in re.findall(r"saved as (\S+/rwkv-final\.pth)", err)}
    assert elsewhere != folder
    assert same_final(elsewhere, undisturbed)
    ledger.note(f"folder {change}", lost=0)


def test_two_runs_in_one_folder(inputs: dict[str, object], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Run(folder, 0, **inputs) as run:
        second = run_script("train.py", **inputs, proj_dir=folder, overwrite=1)
        assert second.code == 2
        assert f"belongs to a run that is going on (process {run.process.pid} on " in second.err
        run.ended()
    assert same_final(folder, undisturbed)
