"""What POSIX systems have and Windows has not, or has in another way: nothing else calls it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

CACHE_NAME = "rwkv-state-tuning"
_PROGRAM = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when the thread that started it ends."""
_POSITION = threading.Lock()
"""Where there are no reads at a position, one thread moves a file's own at a time."""


def cache_folder() -> Path | None:
    """This program's folder among the user's caches, which may not exist yet; None where the user has no home."""
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    base = base or os.path.expanduser("~/.cache")
    return Path(base, CACHE_NAME) if os.path.isabs(base) else None


def command_here(*words: str) -> str:
    """A command of this program, ready to be copied to where the user stands.

    Args:
        words: of the command behind `python`, as they are in the program's own folder: a script, or -m and a module.
    """
    try:
        here = Path.cwd()
    except OSError:  # a folder that is gone
        here = Path(os.sep)
    if here == _PROGRAM or sys.platform == "win32":
        return shlex.join(["python", *words])
    if words[0] == "-m":
        return shlex.join(["env", f"PYTHONPATH={_PROGRAM}", "python", *words])
    return shlex.join(["python", str(_PROGRAM / words[0]), *words[1:]])


def open_to_read(path: str | os.PathLike[str]) -> int:
    """A descriptor of a file as it is, without waiting for a pipe that nobody writes to.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))


def read_at(descriptor: int, size_bytes: int, position: int) -> bytes:
    """At most so many bytes from a position on; the file's own position stays, for all threads.

    Raises:
        OSError: they cannot be read.
    """
    if hasattr(os, "pread"):
        return os.pread(descriptor, size_bytes, position)
    with _moved(descriptor, position):
        return os.read(descriptor, size_bytes)


def read_into(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fills a buffer, or a part of it, from a position on; returns how many bytes, 0 at the file's end.

    Raises:
        OSError: they cannot be read.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], position)
    content = read_at(descriptor, len(buffer), position)
    buffer[: len(content)] = content
    return len(content)


@contextlib.contextmanager
def _moved(descriptor: int, position: int) -> Iterator[None]:
    with _POSITION:
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, position, os.SEEK_SET)
        try:
            yield
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)


def flush_folder(folder: Path) -> None:
    """Makes a rename in this folder survive a power cut; Windows has no such call.

    Raises:
        OSError: the folder cannot be flushed, though its file system could.
    """
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def lock(file: IO[str]) -> None:
    """Locks an open file against other processes, until it is closed.

    Raises:
        OSError: another has it, or the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def can_reserve() -> bool:
    """Whether `reserve` exists here."""
    return hasattr(os, "posix_fallocate")


def reserve(descriptor: int, size_bytes: int) -> None:
    """Gives a new file its size and every page of it a place on the disk.

    Raises:
        OSError: there is no room, or the file system cannot promise it.
    """
    os.posix_fallocate(descriptor, 0, size_bytes)


def memory_bytes() -> int | None:
    """The machine's memory; None where the system does not say."""
    if sys.platform == "win32":
        status = _MemoryStatus()
        status.length = ctypes.sizeof(status)
        return int(status.total) if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def process_bytes() -> tuple[int, int]:
    """(memory that this process has now, the most it has had), of the host; (0, 0) where the system does not say."""
    try:
        import resource

        now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    except (ImportError, OSError):
        return 0, 0


def end_with_parent(every_seconds: float = 1.0) -> None:
    """From now on this process ends, with nothing more said or saved, when the one that started it is gone.

    A process of a run on several GPUs would wait for the others for as long as their library does, with its memory on
    the card, if the first one was killed. Linux ends it whatever it does, also within a call that keeps Python's lock,
    as that of a kernel does while a card's queue is full; and as soon as the other's thread that started it is gone:
    its memory on a card goes later. Elsewhere, and under a debugger, a thread looks.

    Args:
        every_seconds: how often it looks. Windows does not tell, so that there nothing happens.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *(ctypes.c_ulong(0),) * 3)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_seconds)
        os._exit(1)

    threading.Thread(target=watch, name="watches the first process", daemon=True).start()


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "free", "total_page", "free_page", "total_virtual")),
        *((name, ctypes.c_uint64) for name in ("free_virtual", "free_extended")),
    )
