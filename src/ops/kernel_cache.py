"""Compiled kernels on disk, in the user's own cache folder.

An entry is written whole or not at all and carries its own checksum, so any number of processes may share the folder,
and what a power cut left is taken for absent. Where there is no folder to write to, nothing is kept and nothing fails.
It is never a folder that others may write to: what is read here runs on the GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from src.storage import replacing
from src.system import cache_folder

MOST_BYTES = 64 * 2**20
"""Beyond it the entries that were not used for longest go. One card's kernels take 3 MiB."""
_HEAD = b"rwkv kernel 1\n"
_DIGEST_BYTES = 32


def folder() -> Path | None:
    """Where entries are kept; None where the user has no home."""
    cache = cache_folder()
    return cache and cache / "kernels"


def read(key: str) -> bytes | None:
    """What was written under this key; None if that is nothing, or damaged."""
    path = _path(key)
    try:
        content = path.read_bytes() if path else b""
    except OSError:
        return None
    payload = content[len(_HEAD) + _DIGEST_BYTES :]
    if content != _HEAD + hashlib.sha256(payload).digest() + payload:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # type: ignore[arg-type]
    return payload


def write(key: str, payload: bytes) -> None:
    """Keeps bytes under a key, if there is a place to keep them, and drops the oldest beyond `MOST_BYTES`."""
    path = _path(key)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(_HEAD + hashlib.sha256(payload).digest() + payload)
        _drop_oldest(path.parent)


def _path(key: str) -> Path | None:
    place = folder()
    return place / f"{key}.bin" if place else None


def _drop_oldest(place: Path) -> None:
    """Other processes may be dropping the same ones."""
    entries = []
    for path in place.iterdir():
        with contextlib.suppress(OSError):
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    left = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if left <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        left -= size
