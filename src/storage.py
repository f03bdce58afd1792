"""Files of tensors, and files that are complete or not there.

The only caller of `torch.load` and `torch.save`, and the only place that replaces files. A file of tensors is
opened with `weights_only`, never in any other way: that runs no code which the file brings along. torch reads the
names, sizes and strides; where the bytes of a tensor lie and that they are those that were written is found out here
(`src.archive`). They are read when they are asked for, so that a large file costs no memory. They are not mapped: a
map whose file is cut short meanwhile ends the process, whatever it could have saved. A file is written beside its
target, is flushed to the disk and then takes the target's place in one step.
"""

import errno
import io
import itertools
import math
import os
import re
import secrets
import stat
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from src.archive import PICKLE, Entry, check, conversion, read_directory, read_entry
from src.errors import CheckpointError, ConfigError
from src.identity import change_between, fingerprint
from src.system import flush_folder, read_into

PathLike: TypeAlias = str | os.PathLike[str]

UNFINISHED = ".unfinished"
"""How the names of files end that are still being written; they begin with a dot and the name to be."""

_REFUSED_GLOBAL = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
"""How torch names a Python object that it does not load with `weights_only`."""

_BYTE_ORDER, _DATA = "byteorder", "data/"
_PIECE_BYTES = 1 << 28
_MOST_TUPLES = 4
"""How deep tuples lie in each other in which tensors are looked for."""
_PROTOCOL = b"\x80\x02"
_HUGE_ON_REQUEST = re.compile(rb"c(?:builtins|__builtin__)\n(bytearray)\n")
"""What torch would load, though it takes as much memory as a number in the file says."""
_DEEP_TUPLES = re.compile(rb"(?:N?[\x85-\x87]){5000}")
"""The pickle of what Python cannot hash without the end of its stack, and so of the process."""


def one(role: str) -> str:
    """A role with its article: "a model file", "an adapter file"."""
    return f"{'an' if role[0] in 'aeiou' else 'a'} {role}"


class TensorFile:
    """An open file written by `torch.save`.

    It stays the same file if another one takes its name; when it is written to, reading on is refused.

    Args:
        path: of the file.
        role: what the file should be, for messages: "model file".
        writer: what writes such files, for messages.

    Attributes:
        content: what it holds; its tensors are outlines on the meta device, without bytes.

    Raises:
        CheckpointError: The file is missing, damaged, of another format, or holds more than plain data and tensors.
    """

    def __init__(self, path: PathLike, role: str, writer: str = "torch.save (.pth)") -> None:
        self._path = name = os.fspath(path)
        with _opened(path, role) as file:
            self._as_opened = fingerprint(os.fstat(file.fileno()))
            _refuse_other_formats(file, name, role, writer)
            entries = read_directory(file, name)
            _refuse_other_byte_order(file, name, entries)
            check(file, name, entries)
            content, self._entry_of = _skeleton(name, read_entry(file, entries[PICKLE]), entries)
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._refuse_changes()

        def checked(key: str, outline: Tensor) -> Tensor:
            _check_fit(name, self._entry_of(outline), key, outline)
            return outline

        self.content: Any = _map_tensors(content, checked)

    def read(self, outline: Tensor, *, pinned: bool = False) -> Tensor:
        """The plain tensor that an outline of `content` stands for, in memory of its own.

        Args:
            pinned: whether that memory is one that a GPU reads by itself.

        Raises:
            CheckpointError: the file was changed since it was opened.
            RuntimeError: no more memory can be pinned.
        """
        entry = self._entry_of(outline)
        assert entry is not None, "not an outline of this file, or none of a plain tensor"
        if not outline.numel():
            return torch.empty(outline.shape, dtype=outline.dtype)
        reach = _reach(outline)
        flat = torch.empty(reach, dtype=outline.dtype, pin_memory=pinned)
        self._read_into(flat, entry.start + int(outline.storage_offset()) * outline.itemsize)
        return flat.as_strided(outline.shape, outline.stride())

    def whole(self, content: Any) -> Any:
        """`content`, or a part of it, changed to hold its tensors; those that share bytes in the file do so in memory.

        Raises:
            CheckpointError: the file was changed since it was opened.
        """
        known: dict[Entry, Tensor] = {}

        def tensor_of(key: str, outline: Tensor) -> Tensor:
            if not _is_plain(outline):
                return outline  # which no reader takes
            entry = self._entry_of(outline)
            assert entry is not None, "not an outline of this file"
            if not outline.numel():
                return torch.empty(outline.shape, dtype=outline.dtype)
            if entry not in known:
                known[entry] = torch.empty(entry.size_bytes, dtype=torch.uint8)
                self._read_into(known[entry], entry.start)
            first = int(outline.storage_offset()) * outline.itemsize
            flat = known[entry][first : first + _reach(outline) * outline.itemsize].view(outline.dtype)
            return flat.as_strided(outline.shape, outline.stride())

        return _map_tensors(content, tensor_of)

    def _read_into(self, flat: Tensor, start: int) -> None:
        """Fills a flat tensor with the file's bytes from `start` on."""
        left = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            while left and (count := read_into(self._descriptor, left[:_PIECE_BYTES], start)):
                left, start = left[count:], start + count
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read any more: {error.strerror}") from error
        self._refuse_changes()
        if left:
            raise CheckpointError(f"{self._path} became shorter while it was read; copy or download it again")

    def _refuse_changes(self) -> None:
        now = fingerprint(os.fstat(self._descriptor))
        if now != self._as_opened:
            raise CheckpointError(
                f"{self._path} was changed while the program reads it: {change_between(self._as_opened, now)}; leave "
                "it alone until the program ends, and copy or download it again if it is damaged"
            )


class StoredDict(Mapping[str, Any]):
    """A dict in a file, whose tensors, and those of dicts in it, are read when they are asked for."""

    def __init__(self, file: TensorFile, content: Mapping[str, Any]) -> None:
        self._file = file
        self._content = content

    def __getitem__(self, key: str) -> Any:
        value = self._content[key]
        if isinstance(value, dict):
            return StoredDict(self._file, value)
        return self._file.read(value) if isinstance(value, Tensor) else value

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


def load(path: PathLike, role: str, writer: str = "torch.save (.pth)") -> Any:
    """All that a file written by `torch.save` holds, each tensor a plain one.

    Args:
        role: what the file should be, for messages: "model file".
        writer: what writes such files, for messages.

    Raises:
        CheckpointError: See `TensorFile`.
    """
    file = TensorFile(path, role, writer)
    return file.whole(file.content)


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
            raise CheckpointError(unwritable(path, cause, content, unit)) from error
        if cause is not None and not isinstance(cause, Exception):
            raise cause from None  # an interrupt
        raise


def refuse_overlap(inputs: Mapping[str, PathLike], outputs: Mapping[str, PathLike]) -> None:
    """Refuses to write what is read, and two outputs into one file; links and hard links are seen through.

    Args:
        inputs: what a file is for the user ("--load_model") -> its path, "" where none was given.
        outputs: the same of the files that will be written.

    Raises:
        ConfigError: naming both.
    """
    for output, written in outputs.items():
        for name, read in inputs.items():
            if read and _is_same_file(read, written):
                raise ConfigError(
                    f"{name} {read} would be written over, because it is the same file as {output} {written}: choose "
                    "another for one of them"
                )
    for (first, path), (second, other) in itertools.combinations(outputs.items(), 2):
        if _is_same_file(path, other):
            raise ConfigError(f"{first} {path} and {second} {other} are one file: choose another for one of them")


def refuse_existing(outputs: Mapping[str, PathLike]) -> None:
    """Refuses to write over files that are there, whose content would be lost.

    Args:
        outputs: what a file is for the user ("--output_save") -> its path.

    Raises:
        ConfigError: naming all of them.
    """
    there = [f"{name} {path}" for name, path in outputs.items() if os.path.isfile(path)]
    if there:
        verb, them = ("exists", "it") if len(there) == 1 else ("exist", "them")
        raise ConfigError(f"{' and '.join(there)} {verb} already: remove {them}, or choose another name")


def _is_same_file(first: PathLike, second: PathLike) -> bool:
    """Whether two paths name one file, by links too; neither need exist."""
    try:
        if os.path.realpath(first) == os.path.realpath(second):
            return True
        return os.path.samefile(first, second)
    except (OSError, ValueError):  # one of them cannot exist
        return False


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
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a zero byte
        raise OSError(errno.EINVAL, "no file has such a name", str(path)) from error
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
        flush_folder(target.parent)
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


@contextmanager
def _opened(path: PathLike, role: str) -> Iterator[BinaryIO]:
    """An existing ordinary file, opened for reading.

    Raises:
        CheckpointError: it is missing, a folder, a device or a pipe, or cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{role} {path} is a directory; name the file itself")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise CheckpointError(f"{role} {path} is a device or pipe; name an ordinary file")
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise CheckpointError(f"{role} {path} does not exist; {_what_is_there(Path(path))}") from None
    except OSError as error:
        raise CheckpointError(f"{role} {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a zero byte
        raise CheckpointError(f"{role} {os.fspath(path)!r} cannot be read: no file has such a name") from error
    with file:
        try:
            yield file
        except OSError as error:
            raise CheckpointError(f"{role} {path} cannot be read: {error.strerror}") from error


def _refuse_other_byte_order(file: BinaryIO, path: str, entries: Mapping[str, Entry]) -> None:
    """Refuses what a machine of another kind wrote.

    Raises:
        CheckpointError: naming its byte order.
    """
    order = read_entry(file, entries[_BYTE_ORDER]) if _BYTE_ORDER in entries else b"little"
    if order != b"little":
        raise CheckpointError(
            f"{path} has byte order {order[:16]!r} instead of b'little'; write it again on an ordinary (little-endian) "
            "machine, or download it again"
        )


def _skeleton(path: str, pickled: bytes, entries: Mapping[str, Entry]) -> tuple[Any, Callable[[Tensor], Entry | None]]:
    """What a file holds, its tensors without bytes, and the function from such a tensor to its entry.

    torch sees an archive of the pickle and empty entries: nothing else in the file can mislead it. It notes where in
    that archive the bytes of a storage would begin, which tells the entry by name.

    Args:
        pickled: the entry `data.pkl`.

    Raises:
        CheckpointError: the pickle is damaged or holds more than plain data and tensors.
    """
    if not pickled.startswith(_PROTOCOL):
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint; it holds no pickle of protocol 2, which torch.save writes unless "
            "told otherwise"
        )
    if _DEEP_TUPLES.search(pickled):
        raise CheckpointError(f"{path} is damaged or not a checkpoint; it holds tuples in tuples, thousands deep")
    refused = _HUGE_ON_REQUEST.search(pickled)
    if refused:
        raise CheckpointError(_python_object(path, f"builtins.{refused[1].decode()}"))
    outline = io.BytesIO()
    with zipfile.ZipFile(outline, "w") as archive:
        archive.writestr(f"outline/{PICKLE}", pickled)
        archive.writestr("outline/version", "3\n")
        place = {}
        for name in entries:
            if name.startswith(_DATA):
                archive.writestr(f"outline/{name}", b"")
                place[outline.tell()] = name
    outline.seek(0)
    try:
        content = torch.load(outline, map_location="meta", weights_only=True)
    except Exception as error:
        # Whatever the reader trips over is a property of the file: a damaged or hostile pickle, an entry that is
        # not there, sizes that no tensor has.
        raise CheckpointError(_unreadable(path, error)) from error

    def entry_of(tensor: Tensor) -> Entry | None:
        if not tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            return None
        name = place.get(getattr(tensor.untyped_storage(), "_checkpoint_offset", -1))
        return entries[name] if name else None

    return content, entry_of


def _map_tensors(content: Any, tensor_of: Callable[[str, Tensor], Tensor]) -> Any:
    """`content` with `tensor_of(name, tensor)` for every tensor in its dicts, lists and tuples.

    It may be nested as deep as a file likes, and hold one part in many places or itself.
    """
    whole = [content]
    waiting: list[dict[Any, Any] | list[Any]] = [whole]
    seen = set()

    def of_tuple(parts: tuple[Any, ...], levels: int) -> tuple[Any, ...]:
        return tuple(of(str(number), part, levels) for number, part in enumerate(parts))

    def of(name: str, part: Any, levels: int = _MOST_TUPLES) -> Any:
        if isinstance(part, Tensor):
            return tensor_of(name, part)
        if isinstance(part, (dict, list)):
            waiting.append(part)
        return of_tuple(part, levels - 1) if type(part) is tuple and levels else part

    while waiting:
        parts = waiting.pop()
        if id(parts) in seen:
            continue
        seen.add(id(parts))
        found = [  # of a list of numbers, which may be long, nothing
            (key, part)
            for key, part in (parts.items() if isinstance(parts, dict) else enumerate(parts))
            if isinstance(part, (Tensor, dict, list, tuple))
        ]
        for key, part in found:
            parts[key] = of(key if isinstance(key, str) else f"a {type(key).__name__}", part)
    return whole[0]


def _is_plain(outline: Tensor) -> bool:
    return outline.layout == torch.strided and not outline.is_quantized


def _reach(outline: Tensor) -> int:
    """Values from a tensor's first to its last, those between them included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(outline.shape, outline.stride(), strict=True))


def _check_fit(path: str, entry: Entry | None, name: str, outline: Tensor) -> None:
    """Refuses an outline that does not fit the bytes of its entry.

    Args:
        entry: None if the file has no bytes for it.
        outline: a tensor on the meta device, of any kind.

    Raises:
        CheckpointError: naming both.
    """
    if not _is_plain(outline):
        return  # which no reader takes
    if entry is None or outline.is_neg() or outline.is_conj():
        raise CheckpointError(
            f"{path}: {name} has no values of its own in the file (a meta tensor, or one that is computed); save the "
            "tensors themselves"
        )
    item_bytes, count = outline.itemsize, outline.numel()
    needed_bytes = (outline.storage_offset() + max(_reach(outline), count)) * item_bytes if count else 0
    if outline.untyped_storage().nbytes() != entry.size_bytes or needed_bytes > entry.size_bytes:
        raise CheckpointError(
            f"{path} is damaged: {name} of shape {list(outline.shape)} and {outline.dtype} does not fit the "
            f"{entry.size_bytes} bytes that are there for it; copy or download it again"
        )


def _refuse_other_formats(file: BinaryIO, path: str, role: str, writer: str) -> None:
    """Refuses what is not a zip archive written by `torch.save`, by the file's first bytes."""
    head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"):
        raise CheckpointError(
            f"{path} is a .pth file in the format of torch before 1.6, whose tensors cannot be read one by one; "
            f"convert it once with {conversion(weights_only=True)}"
        )
    if head[257:262] == b"ustar":
        raise CheckpointError(
            f"{path} is a tar archive as torch wrote before 0.1.10, whose tensors cannot be read one by one; if you "
            "trust its origin, because loading this format can run code, convert it once with "
            f"{conversion(weights_only=False)}"
        )
    raise CheckpointError(f"{path} is {_describe(head)}, not {one(role)} written by {writer}")


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
    place = "this folder" if folder == Path() else folder
    names = sorted(entry.name for entry in folder.glob("*.pth"))
    if not names:
        return f"there is no .pth file in {place}"
    return f"{place} holds {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"


def _unreadable(path: PathLike, error: Exception) -> str:
    """One sentence for what `torch.load` said in many."""
    reason = str(error)
    global_ = _REFUSED_GLOBAL.search(reason)
    if global_:
        return _python_object(path, global_[1])
    if isinstance(error, MemoryError):
        return f"{path} holds more than there is memory for; use a machine with more, or an undamaged file"
    first_line = reason.strip().splitlines()[0] if reason.strip() else type(error).__name__
    return f"{path} is damaged or not a checkpoint; copy or download it again (torch: {first_line[:200]})"


def _python_object(path: PathLike, name: str) -> str:
    return (
        f"{path} holds a Python object ({name}) beside tensors, and loading it could run foreign code; save the dict "
        "of tensors alone"
    )


def unwritable(path: PathLike, error: OSError, content: Mapping[str, Any] | list[Any], unit: str = "entries") -> str:
    """Why a file of this content cannot be written, a sentence; `unit` as in `save`."""
    if error.errno == errno.EINVAL:
        return f"{path} cannot be written: {error.strerror}"
    folder = Path(os.path.realpath(path)).parent
    no_folder = f"cannot be written: there is no folder {folder}; create it first"
    known = {
        errno.EISDIR: "is a directory; give the name of the file to write",
        errno.ENODEV: "is a device or pipe; give the name of an ordinary file",
        errno.ENOENT: no_folder,
        errno.ENOTDIR: no_folder,
    }
    needed = f"cannot be written: {error.strerror}; {_size(content, unit)} are needed in {folder}"
    return f"{path} {known.get(error.errno or 0, needed)}"


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
    return _amount(size_bytes)


def _amount(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**27 else f"{size_bytes / 2**20:.2f} MiB"
