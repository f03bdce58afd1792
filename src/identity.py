"""Which file a base model is: its size and SHA-256, found while other work goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from pathlib import Path

from src.errors import CheckpointError

_CHUNK_BYTES = 1 << 24
_SHOWN_CHARACTERS = 60
_SHARD_NAME = re.compile(r"[^/\\\0]{1,200}\.safetensors")
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def fingerprint(status: os.stat_result) -> tuple[int, int]:
    """What changes when a file is written to: its size in bytes, and the time of the last change."""
    return status.st_size, status.st_mtime_ns


def change_between(before: tuple[int, int], now: tuple[int, int]) -> str:
    """What tells two fingerprints of a file apart, for a sentence about it."""
    if before[0] == now[0]:
        return f"it was written to, and has {now[0]:,} bytes as before"
    return f"it had {before[0]:,} bytes, now it has {now[0]:,}"


def files_of_model(path: str | Path) -> list[Path]:
    """The files that hold a model's tensors: one, or its shards in the order of their names.

    Args:
        path: a file; of a model in shards its index (`NAME.safetensors.index.json`), one of them
            (`NAME-00001-of-00003.safetensors`), or the folder that holds them, or one `.safetensors` file.

    Raises:
        CheckpointError: the index is damaged, or a shard is missing.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob(f"*{_INDEX}")) or sorted(path.glob("*.safetensors"))
        stems = {_SHARD.sub(r"\1", file.name) for file in found}
        if len(stems) != 1:
            kinds = "several models" if stems else "no model"
            raise CheckpointError(f"{path} is a directory that holds {kinds} (.safetensors); name one file")
        path = found[0]
    if path.name.endswith(_INDEX):
        return _shards_of(path)
    shard = _SHARD.fullmatch(path.name)
    if shard is None or not path.exists():
        return [path]
    index = index_beside(path)
    if index is not None:
        return _shards_of(index)
    count = int(shard[2])
    return _all_there([path.with_name(f"{shard[1]}-{n:05d}-of-{count:05d}.safetensors") for n in range(1, count + 1)])


def index_beside(path: Path) -> Path | None:
    """The index of the shards that a file is one of; None if there is none."""
    shard = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{shard[1]}{_INDEX}") if shard else path
    return index if index.name.endswith(_INDEX) and index.is_file() else None


def _shards_of(index: Path) -> list[Path]:
    return _all_there([index.with_name(name) for name in sorted(set(index_of_shards(index).values()))])


def index_of_shards(index: Path) -> dict[str, str]:
    """Which shard holds a tensor, by name.

    Raises:
        CheckpointError: the file cannot be read, or is no such index.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"model file {index} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged, or no index of shards; copy or download it again") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} is no index of shards: it has no weight_map; copy or download it again")
    for name in shards.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"{index} names {str(name)[:_SHOWN_CHARACTERS]!r}, which is no file beside it; copy or download it "
                "again"
            )
    return shards


def _all_there(files: list[Path]) -> list[Path]:
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise CheckpointError(
            f"{missing[0]} is missing, one of the {len(files)} files that hold the model: copy or download it, too"
        )
    return files


def size_of_model(path: str | Path) -> int:
    """Bytes of all files that hold a model; see `files_of_model`."""
    return sum(file.stat().st_size for file in files_of_model(path))


class FileIdentity:
    """Size and SHA-256 of a file that exists, of a model in shards of all of them; the latter is computed once.

    A thread does that.

    Args:
        path: of the file, or of the model.
        at_once: whether the thread starts now, or when the SHA-256 is asked for.

    Attributes:
        name: of the file, without its folder.
        size_bytes: when it was looked at.
    """

    def __init__(self, path: str | Path, *, at_once: bool = True) -> None:
        self.name = Path(path).name
        self._files = files_of_model(path)
        self._as_named = [fingerprint(file.stat()) for file in self._files]
        self.size_bytes = sum(size for size, _ in self._as_named)
        self._path = path
        self._digest = ""
        self._problem = ""
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._started = at_once
        if at_once:
            self._thread.start()

    @property
    def sha256(self) -> str:
        """In hexadecimal digits; waits for it.

        Raises:
            CheckpointError: the file could not be read, or was changed.
        """
        if not self._started:
            self._started = True
            self._thread.start()
        self._thread.join()
        if self._problem:
            raise CheckpointError(f"{self._path} {self._problem}")
        return self._digest

    def as_dict(self) -> dict[str, str | int]:
        """What is written beside results."""
        return {"file": self.name, "size_bytes": self.size_bytes, "sha256": self.sha256}

    def _compute(self) -> None:
        digest = hashlib.sha256()
        try:
            for path, as_named in zip(self._files, self._as_named, strict=True):
                with open(path, "rb") as file:
                    while chunk := file.read(_CHUNK_BYTES):
                        digest.update(chunk)
                    if fingerprint(os.fstat(file.fileno())) != as_named:
                        self._problem = "was changed since the program began: leave it alone until the program ends"
        except OSError as error:
            self._problem = f"cannot be read: {error.strerror}"
        self._digest = digest.hexdigest()
