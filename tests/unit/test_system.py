"""What stands in where a system lacks a call must do the same."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from running import ROOT

from src import system


@pytest.fixture(params=["posix", "without"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":
        monkeypatch.delattr(os, "pread")
        monkeypatch.delattr(os, "preadv")


@pytest.mark.usefixtures("calls")
def test_reads_at_a_position_leave_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16)
    with open(system.open_to_read(path), "rb") as file:
        assert file.read(3) == b"\0\1\2"
        assert system.read_at(file.fileno(), 4, 250) == bytes((250, 251, 252, 253))
        assert system.read_at(file.fileno(), 4, 4094) == b"\xfe\xff"
        assert system.read_at(file.fileno(), 4, 4096) == b""
        buffer = bytearray(5)
        assert system.read_into(file.fileno(), memoryview(buffer), 254) == 5
        assert buffer == b"\xfe\xff\0\1\2"
        assert system.read_into(file.fileno(), memoryview(buffer), 5000) == 0
        assert file.read(2) == b"\3\4"


@pytest.mark.usefixtures("calls")
def test_threads_read_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * 100 for number in range(100)))
    wrong: list[int] = []
    with open(path, "rb") as file:

        def read() -> None:
            for number in range(100):
                if system.read_at(file.fileno(), 100, 100 * number) != bytes([number]) * 100:
                    wrong.append(number)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_lock_is_one_processs(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        system.lock(first)
        with pytest.raises(OSError, match=r".*"):
            system.lock(second)


def test_the_machine_has_memory() -> None:
    assert system.memory_bytes() is None or system.memory_bytes() > 2**28  # type: ignore[operator]


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    monkeypatch.setenv(name, str(tmp_path))
    assert system.cache_folder() == tmp_path / system.CACHE_NAME
    monkeypatch.setenv(name, "relative")
    assert system.cache_folder() is None


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
def test_commands_to_copy_work_where_the_user_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert system.command_here("train.py", "--proj_dir", "a b") == "python train.py --proj_dir 'a b'"
    assert system.command_here("-m", "src.commands.chat") == "python -m src.commands.chat"
    elsewhere = tmp_path / "my data"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert system.command_here("train.py", "--resume", "1") == f"python {ROOT}/train.py --resume 1"
    command = system.command_here("-m", "src.commands.state", "-h").replace("python", sys.executable, 1)
    assert subprocess.run(["sh", "-c", command], capture_output=True, check=False).returncode == 0
    elsewhere.rmdir()
    assert system.command_here("train.py") == f"python {ROOT}/train.py"


WAITS = {
    "in Python": "time.sleep(60)",
    "in a call that lets go of Python's lock": "ctypes.CDLL(None).sleep(60)",
    "in a call that keeps it": "ctypes.PyDLL(None).sleep(60)",
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
@pytest.mark.parametrize("ends", ["by SIGKILL", "by itself"])
@pytest.mark.parametrize("waits", WAITS)
def test_a_process_ends_with_the_one_that_started_it(waits: str, ends: str) -> None:
    if waits == "in a call that keeps it" and sys.platform != "linux":
        pytest.skip("only Linux ends it then")
    child = (
        f"import ctypes, sys, time; sys.path.insert(0, {str(ROOT)!r}); from src.system import end_with_parent; "
        f"end_with_parent(0.01); print('watches', flush=True); {WAITS[waits]}"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); sys.stdin.readline()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", parent], text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        assert process.stdout.readline() == "watches\n"
        time.sleep(0.1)  # the child is within its call
        begin = time.monotonic()
        if ends == "by SIGKILL":
            process.kill()
        out, _ = process.communicate("\n" if ends == "by itself" else None, timeout=50)  # until both have let go of it
        assert not out
        assert time.monotonic() - begin < 40
        assert process.wait() == (-signal.SIGKILL if ends == "by SIGKILL" else 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends it then")
def test_it_ends_although_no_thread_of_it_looks() -> None:
    child = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from src.system import end_with_parent; "
        "end_with_parent(60); print('watches', flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); sys.stdin.readline()"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"watches\n"
        process.kill()
        process.communicate(timeout=40)
