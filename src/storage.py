"""Files of tensors, and files that are complete or not there.

The only caller of `torch.load` and `torch.save`, and the only place that replaces files. A file of tensors is
opened by memory map and with `weights_only`, never in any other way: reading it costs address space, not memory,
and runs no code that the file brings along. A file is written beside its target, is flushed to the disk and then
takes the target's place in one step.
"""

import errno
import math
import mmap
import os
import re
import secrets
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from src.errors import CheckpointError

PathLike: TypeAlias = str | os.PathLike[str]

UNFINISHED = ".unfinished"
"""How the names of files end that are still being written; they begin with a dot and the name to be."""

_REFUSED_GLOBAL = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
"""How torch names a Python object that it does not load with `weights_only`."""


def load(path: PathLike, role: str, writer: str = "torch.save (.pth)") -> Any:
    """What a file written by `torch.save` holds, its tensors mapped.

    Args:
        role: what the file should be, for messages: "model file".
        writer: what writes such files, for messages.

    Raises:
        CheckpointError: The file is missing, damaged, of another format, or holds more than plain data and tensors.
    """
    _refuse_other_formats(Path(path), role, writer)
    try:
        return _load_mapped(path)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        # Whatever the reader trips over is a property of the file: a damaged archive, a broken or
        # hostile pickle, a member beyond the end.
        raise CheckpointError(_unreadable(path, error)) from error


def save(
    path: PathLike, content: Mapping[str, Any] | list[Any], unit: str = "entries", previous: PathLike | None = None
) -> None:
    """Writes tensors and plain values by name, or a list, with `torch.save`; see `replacing`.

    Args:
        previous: see `replacing`.
        unit: what the entries of a list are, for messages.

    Raises:
        CheckpointError: The file cannot be written. An existing file is then unchanged.
    """
    try:
        with replacing(path, previous) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch.save puts an error of its own in place of one raised by the file it writes to.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise CheckpointError(f"{path} {_unwritable(path, cause, _size(content, unit))}") from error
        if cause is not None and not isinstance(cause, Exception):
            raise cause from None  # an interrupt
        raise


@contextmanager
def replacing(path: PathLike, previous: PathLike | None = None) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end of the block.

    `path` is at every moment the old file or the whole new one. A link is followed, and what it names is replaced.
    When the block raises anything, an interrupt included, nothing is left beside the old file.

    Args:
        previous: the name that the old file takes, in the same folder; without, it is gone.

    Raises:
        OSError: The file cannot be written: EISDIR if it is a folder, ENODEV if it is a device or pipe.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        code = errno.EISDIR if target.is_dir() else errno.ENODEV
        raise OSError(code, os.strerror(code), str(path))
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and target.exists():
            _keep(
                target, unfinished.with_name(f"{unfinished.name[: -len(UNFINISHED)]}-old{UNFINISHED}"), Path(previous)
            )
        os.replace(unfinished, target)
        _flush_folder(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _keep(path: Path, passing: Path, name: Path) -> None:
    """Gives a file a second name, so that it is at no moment without one, where the file system can do that."""
    try:
        os.link(path, passing)
    except OSError:
        os.replace(path, name)
        return
    try:
        os.replace(passing, name)
    finally:
        passing.unlink(missing_ok=True)


def _load_mapped(path: PathLike) -> Any:
    """What the file holds, its tensors mapped.

    The map is private and writable, and Linux counts such a map as memory it may have to provide:
    by default it refuses one that is larger than memory and swap together, such as a 14B file on a
    host of 16 GB. Then the file is mapped without that reservation.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
    return _load_without_reservation(path)


def _load_without_reservation(path: PathLike) -> Any:
    """As `torch.load` by memory map, with tensors over a map that reserves no memory.

    torch tells at which byte of the file each storage begins. It computes that from the order of
    its members, so each position is compared with the archive's own directory before it is used.
    """
    skeleton = torch.load(path, map_location="meta", weights_only=True)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    with open(path, "rb") as file:
        mapping = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    member_sizes = _member_sizes(path)

    def mapped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: mapped(entry) for key, entry in value.items()}
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
            return value
        member = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if member is None:
            raise CheckpointError(
                f"{path} is larger than memory and swap together, and this version of torch cannot map such "
                "a file; update torch, or add swap"
            )
        first = int(value.storage_offset()) * value.itemsize
        count = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        if first + count * value.itemsize > member_sizes.get(member, 0):
            raise ValueError(f"no record of {count} values of {value.dtype} begins at byte {member}")
        flat = torch.frombuffer(mapping, dtype=value.dtype, count=count, offset=member + first)
        return flat.as_strided(value.shape, value.stride())

    return mapped(skeleton)


def _member_sizes(path: PathLike) -> dict[int, int]:
    """First byte -> size in bytes of every uncompressed member of a zip archive."""
    fixed_bytes, lengths_at = 30, 26  # of a member's own header; then follow its name and its padding
    sizes = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            if member.compress_type == zipfile.ZIP_STORED:
                file.seek(member.header_offset + lengths_at)
                name_bytes, padding_bytes = struct.unpack("<HH", file.read(4))
                sizes[member.header_offset + fixed_bytes + name_bytes + padding_bytes] = member.file_size
    return sizes


def _refuse_other_formats(path: Path, role: str, writer: str) -> None:
    """Refuses what is not a zip archive written by `torch.save`, by the file's first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            size_bytes = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{role} {path} does not exist; {_what_is_there(path)}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{role} {path} is a directory; name the file itself") from None
    except OSError as error:
        raise CheckpointError(f"{role} {path} cannot be read: {error.strerror}") from error
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} is incomplete: its {size_bytes} bytes begin like a .pth file, but the directory at "
                "its end is missing; copy or download it again"
            )
        return
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):
        raise CheckpointError(
            f"{path} is a .pth file in the format of torch before 1.6, which cannot be memory-mapped; "
            f"convert it once with {_conversion(weights_only=True)}"
        )
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} is a tar archive as torch wrote before 0.1.10, which cannot be memory-mapped; if you "
            "trust its origin, because loading this format can run code, convert it once with "
            f"{_conversion(weights_only=False)}"
        )
    raise CheckpointError(f"{path} is {_describe(head)}, not a {role} written by {writer}")


def _conversion(weights_only: bool) -> str:
    """The command that rewrites a file of an old format."""
    load = f"torch.load('OLD.pth', map_location='cpu', weights_only={weights_only})"
    return f"python -c \"import torch; torch.save({load}, 'NEW.pth')\""


def _describe(head: bytes) -> str:
    """What a file that is no archive of torch looks like, by its first bytes."""
    if not head:
        return "an empty file"
    if head.startswith(b"GGUF"):
        return "a GGUF file (llama.cpp)"
    if head.startswith((b"fmgg", b"lmgg")):
        return "a ggml file (rwkv.cpp)"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        return "a safetensors file (as converted for web-rwkv and Ai00, with other names and orientations)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull fetches the real file)"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "a web page, probably saved instead of the download"
    if head.startswith(b"\x80"):
        return "a Python pickle"
    if not head.strip(b"\0"):
        return "a file of zero bytes, probably an unfinished download"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "a text file"
    return "a file of unknown format"


def _what_is_there(path: Path) -> str:
    """What a user who named a missing file might have meant."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(entry.name for entry in folder.glob("*.pth"))
    if not names:
        return f"there is no .pth file in {folder}"
    return f"{folder} holds {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"


def _unreadable(path: PathLike, error: Exception) -> str:
    """One sentence for what `torch.load` said in many."""
    reason = str(error)
    if "TorchScript" in reason:
        return f"{path} is a TorchScript program, not a dict of tensors"
    global_ = _REFUSED_GLOBAL.search(reason)
    if global_:
        return (
            f"{path} holds a Python object ({global_[1]}) beside tensors, and loading it could run foreign code; "
            "save the dict of tensors alone"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{path} cannot be read: {error.strerror}"
    first_line = reason.strip().splitlines()[0] if reason.strip() else type(error).__name__
    return f"{path} is damaged or not a checkpoint; copy or download it again (torch: {first_line[:200]})"


def _unwritable(path: PathLike, error: OSError, size: str) -> str:
    """Why a file of this size cannot be written, as the end of a sentence."""
    folder = Path(os.path.realpath(path)).parent
    no_folder = f"cannot be written: there is no folder {folder}; create it first"
    known = {
        errno.EISDIR: "is a directory; give the name of the file to write",
        errno.ENODEV: "is a device or pipe; give the name of an ordinary file",
        errno.ENOENT: no_folder,
        errno.ENOTDIR: no_folder,
    }
    return known.get(error.errno or 0, f"cannot be written: {error.strerror}; {size} are needed in {folder}")


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in a value, mappings and lists looked into."""
    if isinstance(content, Tensor):
        return math.prod(content.shape) * content.itemsize
    if isinstance(content, Mapping):
        return sum(map(tensor_bytes, content.values()))
    return sum(map(tensor_bytes, content)) if isinstance(content, list | tuple) else 0


def _size(content: Mapping[str, Any] | list[Any], unit: str) -> str:
    if isinstance(content, list):
        return f"{len(content)} {unit}"
    size_bytes = tensor_bytes(content)
    if size_bytes < 2**20 / 100:
        return f"{size_bytes:,} bytes"
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**27 else f"{size_bytes / 2**20:.2f} MiB"


def _flush_folder(folder: Path) -> None:
    """Makes a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)
