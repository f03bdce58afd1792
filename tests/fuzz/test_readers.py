"""Damaged files: every reader takes them or says in one sentence what is wrong, in five seconds at most."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest
from fuzz.mutation import damaged
from fuzz.readers import Reader, readers

from src.errors import UserError

SECONDS = 5
IN_CI, IN_ALL = 2_000, 100_000


class TooSlow(BaseException):
    """Raised out of a reader that hangs; no `except Exception` stops it."""


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Reader]:
    """The readers by name."""
    (tmp_path / "seeds").mkdir()
    return readers(tmp_path / "seeds")


def attempt(reader: Reader, folder: Path, content: bytes) -> str:
    """What the reader says to this content; "" if it takes it."""
    for name, other in reader.beside.items():
        (folder / name).write_bytes(other)
    path = folder / reader.name
    path.write_bytes(content)
    try:
        reader.read(path)
    except UserError as error:
        return str(error)
    return ""


def try_all(table: dict[str, Reader], folder: Path, inputs: int, seconds: float = SECONDS) -> None:
    """Gives every reader its share of so many inputs."""

    def give_up(number: int, frame: FrameType | None) -> NoReturn:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, give_up)
    failures = []
    try:
        for name, reader in table.items():
            for number in range(inputs // len(table) + 1):
                content = damaged(reader.seeds, number)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                try:
                    said = attempt(reader, folder, content)
                except (Exception, TooSlow) as error:
                    failures.append(f"{name}, input {number}: {error!r} from {content[:300]!r}")
                    continue
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                if "\n" in said or len(said) > 2000:
                    failures.append(f"{name}, input {number}: says {said[:300]!r}")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not failures, f"{len(failures)} of {inputs}:\n" + "\n".join(failures[:20])


def test_seeds_are_taken(table: dict[str, Reader], tmp_path: Path) -> None:
    for name, reader in table.items():
        for seed in reader.seeds:
            assert attempt(reader, tmp_path, seed) == "", name


def test_damaged_files(table: dict[str, Reader], tmp_path: Path) -> None:
    try_all(table, tmp_path, IN_CI)


@pytest.mark.slow
def test_many_damaged_files(table: dict[str, Reader], tmp_path: Path) -> None:
    try_all(table, tmp_path, IN_ALL)


def test_a_traceback_and_a_hang_are_found(tmp_path: Path) -> None:
    """The harness itself."""

    def broken(path: Path) -> None:
        raise KeyError(path.name)

    with pytest.raises(AssertionError, match="broken, input 0: KeyError"):
        try_all({"broken": Reader(broken, (b"a",), "x")}, tmp_path, 1)
    with pytest.raises(AssertionError, match="TooSlow"):
        try_all({"waiting": Reader(lambda path: signal.pause(), (b"a",), "x")}, tmp_path, 0, seconds=0.05)
