"""A run's folder: one run at a time, nothing written over unasked, and where to save when it fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO

from src.config import run_file
from src.errors import CheckpointError, ConfigError
from src.storage import UNFINISHED, refuse_overlap
from src.system import lock

LOCK = ".rwkv-lock"
RESUME = "rwkv-resume.pth"
PREVIOUS = "rwkv-resume-previous.pth"
_RESULT = re.compile(r"rwkv-(\d+|final)\.pth")
_WRITTEN = re.compile(
    r"rwkv-(\d+|final|best|init|last-good|resume|resume-previous)\.(?:pth|json)|init_pissa\.(?:pth|json)"
)
_KEPT = re.compile(r"dpo-reference(?:-held-out)?\.pth")
"""What is compared before it is used, and so stays for the next run."""
LOSS_PLOT = "loss.png"
SAMPLES = "samples.jsonl"
_LOGS = ("train_log.txt", "metrics.jsonl", SAMPLES, LOSS_PLOT, run_file.NAME)
_LEFT = re.compile(
    rf"\.(?:{_WRITTEN.pattern}|{_KEPT.pattern}|{re.escape(LOSS_PLOT)})\.[0-9a-f]{{8}}(-old)?{re.escape(UNFINISHED)}"
)


def new_run_id() -> str:
    """A name for a run, which sorts by time."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, until the block or the process ends, however it does.

    Raises:
        ConfigError: another run has it; names it.
    """
    path = folder / LOCK
    file = _locked_file(path)
    if file is None:
        yield
        return
    try:
        file.truncate()
        json.dump(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}, file
        )
        file.flush()
    except OSError:
        pass  # the lock holds without a name on it, on a full disk
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                file.close()
            path.unlink()  # while it is locked: whoever waits for it looks whether it is still there
        with contextlib.suppress(OSError):
            file.close()


def _locked_file(path: Path) -> IO[str] | None:
    """The lock file, locked; None where the file system has no locks."""
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"--proj_dir {path.parent} cannot be written ({error.strerror}): choose another folder"
            ) from error
        file.seek(0)
        try:
            lock(file)
        except (BlockingIOError, PermissionError):
            holder = _holder(file)
            file.close()
            raise ConfigError(
                f"--proj_dir {path.parent} belongs to a run that is going on ({holder}): wait for its end, or choose "
                "another folder"
            ) from None
        except OSError as error:
            print(f"warning: {path} cannot be locked ({error.strerror}): see that no other run has this folder")
            file.close()
            return None
        with contextlib.suppress(OSError):
            if _is_at(file, path):
                return file
        file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one with this name."""
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def _holder(file: IO[str]) -> str:
    try:
        told = json.loads(file.read())
        return f"process {told['pid']} on {told['host']}, since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has just begun"


def refuse_results(folder: Path) -> None:
    """Refuses a folder that holds a run's results.

    Raises:
        ConfigError: with the ways out.
    """
    if any((folder / name).exists() for name in (RESUME, PREVIOUS)):
        raise ConfigError(
            f"--proj_dir {folder} holds a run that was stopped: --resume 1 goes on with it, --overwrite 1 removes it "
            "and begins anew, another --proj_dir leaves it alone"
        )
    results = sorted(path.name for path in folder.glob("rwkv-*.pth") if _RESULT.fullmatch(path.name))
    if results:
        named = "rwkv-final.pth" if "rwkv-final.pth" in results else results[0]
        raise ConfigError(
            f"--proj_dir {folder} holds the results of an earlier run ({named}): choose another --proj_dir, or "
            "--overwrite 1 to remove them"
        )


def spare_inputs(folder: Path, inputs: Mapping[str, str], epochs: range) -> None:
    """Refuses a folder in which the run would write over what it reads, or through a link over what lies elsewhere.

    Args:
        folder: need not exist.
        inputs: paths by flag, "" where none was given; of binidx data the common part of two files' names.
        epochs: numbers of those whose files the run will write.

    Raises:
        ConfigError: naming the file.
    """
    read = dict(inputs)
    for flag, path in inputs.items():
        read |= {f"a file of {flag}": f"{path}.bin", f"the index of {flag}": f"{path}.idx"} if path else {}
    try:
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    except OSError as error:
        raise ConfigError(f"--proj_dir {folder} cannot be read ({error.strerror}): choose another folder") from error
    for name in names:
        written = _WRITTEN.fullmatch(name)
        number = written and written[1]
        of_other_epoch = bool(number and number.isdecimal() and int(number) not in epochs)
        if of_other_epoch or not (written or name in _LOGS or _KEPT.fullmatch(name)):
            continue
        refuse_overlap(read, {"a result in --proj_dir,": folder / name})
        if (folder / name).is_symlink():
            raise ConfigError(
                f"{folder / name} is a link to {os.readlink(folder / name)}, which the run would write over: remove "
                "the link, or choose another --proj_dir"
            )


def clean(folder: Path, *, results: bool, inputs: Iterable[str]) -> list[str]:
    """Removes what killed runs were writing, and on request what earlier runs wrote; returns the names.

    Args:
        folder: the run's.
        results: whether checkpoints go, too.
        inputs: files that stay whatever their name is.
    """
    kept = [Path(path) for path in inputs if path and Path(path).exists()]
    removed = []
    for path in sorted(folder.iterdir()):
        unwanted = _LEFT.fullmatch(path.name) or (results and _WRITTEN.fullmatch(path.name))
        if unwanted and path.is_file() and not any(path.samefile(other) for other in kept):
            path.unlink()
            removed.append(path.name)
    return removed


class Places:
    """Where a run saves: its folder, and when that fails another place, which it says.

    Args:
        folder: the run's.
        run: the run's name.
        warn: tells the user.
    """

    def __init__(self, folder: Path, run: str, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._warn = warn
        self._said: set[tuple[str, str]] = set()
        name = f"{folder.resolve().name or 'rwkv'}-saved-{run}"
        self._others = [folder.resolve().parent / name, Path(tempfile.gettempdir()) / name]

    def save(self, write: Callable[[Path], None], name: str) -> Path:
        """Has a file written where it can be; returns where.

        Raises:
            CheckpointError: nowhere; or what is to be written is wrong.
        """
        problems: list[CheckpointError] = []
        for folder in (self.folder, *self._others):
            try:
                if folder != self.folder:
                    with contextlib.suppress(OSError):  # `write` says why it failed
                        folder.mkdir(exist_ok=True)
                write(folder / name)
            except CheckpointError as problem:
                if problem.__cause__ is None:  # not about the place
                    raise
                problems.append(problem)
                if folder != self.folder:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                continue
            if problems:
                self.say(name, str(folder), f"{problems[0]}; saved as {folder / name}")
            return folder / name
        raise CheckpointError("; ".join(map(str, problems)))

    def say(self, name: str, what: str, text: str) -> None:
        """Warns of something that happened to a file, once: a run may try the same save every minute."""
        if (name, what) not in self._said:
            self._said.add((name, what))
            self._warn(text)

    def remove(self, path: Path) -> None:
        """Removes a file that is no longer needed, if it can be."""
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if path.parent != self.folder:
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # if it is empty


class LineFile:
    """A file that gets whole lines or nothing; when that fails it is said once, and tried again at the next.

    Args:
        path: of the file, to which lines are appended.
        warn: tells the user.
        unwanted: whether a line at the end goes; half lines always do.
    """

    def __init__(
        self, path: Path, warn: Callable[[str], None], unwanted: Callable[[str], bool] = lambda line: False
    ) -> None:
        self._path = path
        self._warn = warn
        self._warned = False
        self._file: IO[bytes] | None = None
        self._good_bytes = 0
        try:
            if path.exists() and not (path.is_file() or path.is_dir() or path.is_char_device()):
                raise OSError(errno.ENODEV, "it is no file")  # to open a pipe would wait for a reader
            self._file = path.open("ab", buffering=0)
            if path.is_file():
                self._good_bytes = _wanted_bytes(path, unwanted)
                self._restore()
        except OSError as error:
            self._say(error)

    def write(self, lines: str) -> None:
        """Appends."""
        if self._file is None:
            return
        content = lines.encode()
        try:
            written = self._file.write(content)
            if written != len(content):
                self._file.write(content[written:])  # which tells what is wrong
            self._good_bytes += len(content)
        except OSError as error:
            self._say(error)
            self._restore()

    def close(self) -> None:
        """Closes the file, once."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _restore(self) -> None:
        with contextlib.suppress(OSError):  # a device, such as /dev/full, has no length
            os.truncate(self._file.fileno(), self._good_bytes)  # type: ignore[union-attr]

    def _say(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"{self._path} cannot be written ({error.strerror}); training goes on")


def _wanted_bytes(path: Path, unwanted: Callable[[str], bool]) -> int:
    """Length of a file up to its last whole line that is wanted."""
    lines = path.read_bytes().splitlines(keepends=True)
    while lines and (not lines[-1].endswith(b"\n") or unwanted(lines[-1].decode("utf-8", "replace"))):
        lines.pop()
    return sum(map(len, lines))
