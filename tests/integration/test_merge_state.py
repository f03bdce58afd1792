"""The merge command, as a user runs it."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint, tiny_shape, tiny_state_file, tiny_states
from running import Ended, run_script

from src.checkpoint import load_state, open_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "merge_state.py")


def merge(folder: Path, *arguments: str) -> Ended:
    """In this process, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_script("merge_state.py", *arguments)


def merge_by_itself(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as a shell has it."""
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with base.pth and a state.pth that fits it."""
    tiny_checkpoint(tmp_path / "base.pth", dtype=torch.bfloat16)
    tiny_state_file(tmp_path / "state.pth", tiny_shape())
    return tmp_path


def test_help_is_printed(tmp_path: Path) -> None:
    run = merge(tmp_path, "-h")
    assert run.code == 0
    assert "BASE FILE OUTPUT [flags]" in run.out
    assert run.err == ""


def test_of_rwkv7_it_says_which_clients_ignore_the_state(tmp_path: Path) -> None:
    shape = tiny_checkpoint(tmp_path / "base.pth", holds_idle=True, architecture="x070", dtype=torch.bfloat16)
    states = tiny_state_file(tmp_path / "state.pth", shape)
    run = merge(tmp_path, "base.pth", "state.pth", "merged.pth", "--verify", "1")
    assert (run.code, run.err) == (0, "")
    assert "the rwkv package (0.8.32) and RWKV-Runner (1.9.11) ignore a state inside an RWKV-7 model" in run.out
    base, merged = open_checkpoint(tmp_path / "base.pth"), open_checkpoint(tmp_path / "merged.pth")
    assert list(merged) == [*base, *states]
    assert {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"} <= set(merged)
    assert all(torch.equal(merged[key], tensor) for key, tensor in {**base, **states}.items())


def test_a_merge_writes_the_model_and_says_what_it_did(inputs: Path) -> None:
    run = merge(inputs, "base.pth", "state.pth", "merged.pth")
    assert (run.code, run.err) == (0, "")
    size_bytes = (inputs / "merged.pth").stat().st_size
    for part in (
        "2 layers of state [4, 8, 8] in bfloat16",
        f"{tiny_shape().parameter_count:,} weights in bfloat16, copied bit for bit",
        f"merged.pth ({size_bytes:,} bytes)",
        "next",
    ):
        assert part in run.out
    assert "replacing" not in run.out
    assert sorted(os.listdir(inputs)) == ["base.pth", "merged.pth", "state.pth"]
    base, merged = open_checkpoint(inputs / "base.pth"), open_checkpoint(inputs / "merged.pth")
    states = tiny_states(tiny_shape(), dtype=torch.bfloat16)
    assert list(merged) == [*base, *states]
    assert all(torch.equal(merged[key], tensor) for key, tensor in {**base, **states}.items())

    tiny_state_file(inputs / "state.pth", tiny_shape(), seed=1)
    again = merge(inputs, "merged.pth", "state.pth", "again.pth")
    assert again.code == 0
    assert "replacing the one that was there" in again.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.pth", "state.pth", "merged.pth"), "model file missing.pth does not exist"),
        (("base.pth", "missing.pth", "merged.pth"), "state or adapter file missing.pth does not exist"),
        (("state.pth", "base.pth", "merged.pth"), "state.pth holds only the time_state of 2 layers"),
        (("base.pth", "base.pth", "merged.pth"), "time_state, it is a whole model, which --load_model takes"),
        (("base.pth", "state.pth", "base.pth"), "base model base.pth would be written over"),
        (("base.pth", "state.pth", "state.pth"), "trained file state.pth would be written over"),
        (("base.pth", "state.pth", "."), ". is a directory"),
        (("base.pth", "state.pth", "nowhere/merged.pth"), "nowhere; create it first"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    inputs: Path,
    arguments: tuple[str, str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, for speed."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(sys, "argv", ["merge_state.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(SCRIPT, run_name="__main__")
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(os.listdir(inputs)) == ["base.pth", "state.pth"]


def test_a_refusal_reaches_the_shell(inputs: Path) -> None:
    run = merge_by_itself(inputs, "base.pth", "state.pth", "base.pth")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        "error: base model base.pth would be written over, because it is the same file as output base.pth: choose "
        "another for one of them\n"
    )


def test_a_missing_argument_is_code_2(inputs: Path) -> None:
    run = merge(inputs, "base.pth", "state.pth")
    assert run.code == 2
    assert "OUTPUT missing" in run.err


@pytest.mark.slow
def test_a_file_that_may_not_grow_so_large_leaves_nothing(inputs: Path) -> None:
    """A real limit of the system, where the tests of `save_state` only pretend one."""
    limited = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", limited, "base.pth", "state.pth", "merged.pth"],
        cwd=inputs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: merged.pth cannot be written: File too large; ")
    assert run.stderr.count("\n") == 1
    assert sorted(os.listdir(inputs)) == ["base.pth", "state.pth"]


@pytest.mark.parametrize(
    ("number", "code", "leftovers"),
    [
        pytest.param(signal.SIGINT, 130, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, 0, marks=pytest.mark.slow),
        (signal.SIGKILL, -9, 1),
    ],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_an_ended_merge_leaves_no_output(inputs: Path, number: signal.Signals, code: int, leftovers: int) -> None:
    """Stopped when all is written but the new file has not yet taken its name."""
    stalled = (
        "import os, runpy, time; "
        "os.fsync = lambda descriptor: (print('written', flush=True), time.sleep(60)); "
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", stalled, "base.pth", "state.pth", "merged.pth"],
        cwd=inputs,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(number)
        _, error_text = process.communicate(timeout=600)
    assert process.returncode == code
    assert "Traceback" not in error_text
    unfinished = sorted(set(os.listdir(inputs)) - {"base.pth", "state.pth"})
    assert len(unfinished) == leftovers
    assert all(name.startswith(".merged.pth.") for name in unfinished)
    # The next attempt is not in the way of the last one's remains.
    assert merge(inputs, "base.pth", "state.pth", "merged.pth").code == 0
    assert load_state(inputs / "merged.pth", tiny_shape())


@pytest.mark.slow
def test_the_real_model_is_merged(tmp_path: Path, real_inputs: Path) -> None:
    base = real_inputs / "tiny-rwkv6-3m-utf16.pth"
    shape = open_checkpoint(base).info.shape
    states = tiny_state_file(tmp_path / "state.pth", shape)
    run = merge(tmp_path, str(base), "state.pth", "merged.pth")
    assert (run.code, run.err) == (0, "")
    assert "12 layers of state [16, 8, 8]" in run.out
    merged = open_checkpoint(tmp_path / "merged.pth")
    assert all(torch.equal(merged[key], tensor) for key, tensor in {**open_checkpoint(base), **states}.items())
