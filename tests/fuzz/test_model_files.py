"""Files of tensors with something wrong in them: refused in one sentence, or read as if nothing were.

Inputs are drawn by number, so that a failure can be had again: `changed(kind, content, number)` is the same always.
Damage that leaves the checksums as they were must never give other values. What was written with right checksums
is another file, which may hold other values; then it is enough that nothing but a UserError is raised, in time.
"""

import io
import math
import pickletools
import random
import re
import signal
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_checkpoint, tiny_shape, tiny_state_file
from torch import Tensor

from src import storage
from src.checkpoint import load_state, open_checkpoint
from src.data.pair_file import load_pairs, save_pairs
from src.data.preferences import PreferencePair
from src.errors import UserError

SEED = 11
SECONDS = 5
SHAPE = tiny_shape(n_layer=1, n_embd=32, vocab_size=40)

NUMBERS = [2**power + step for power in (0, 3, 6, 7, 8, 15, 16, 31, 32, 63) for step in (-1, 0)]
GLOBALS = (
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch._utils _rebuild_qtensor"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_sparse_tensor", "torch Tensor"),
    *("torch._tensor _rebuild_from_type_v2", "torch.nn Parameter", "torch FloatTensor", "torch Size", "torch device"),
    *("torch FloatStorage", "torch BFloat16Storage", "torch LongStorage", "torch.storage UntypedStorage"),
    *("torch float32", "torch int8", "collections OrderedDict", "collections Counter", "_codecs encode"),
    *("builtins set", "builtins bytearray", "builtins complex", "builtins getattr", "builtins eval", "builtins exec"),
    *("os system", "posix system"),
)


@dataclass(frozen=True)
class Subject:
    """A kind of file, how it is read, and what is then found."""

    content: bytes
    read: Callable[[Path], Any]
    values: Any


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    """A model, a state, pairs, and a nested file as adapters and interrupted runs have it."""
    folder = tmp_path_factory.mktemp("subjects")
    tiny_checkpoint(folder / "model", n_layer=1, vocab_size=40, dtype=torch.bfloat16)
    tiny_state_file(folder / "state", SHAPE)
    save_pairs(folder / "pairs", [PreferencePair([1, 2, 30], [4], [5, 6], -1.5, -2.25), PreferencePair([7], [8], [])])
    whole = torch.arange(60.0).view(6, 10)
    nested = {
        "state_dict": {"lora_A": whole, "part": whole[1:3, ::2], "marked": torch.nn.Parameter(torch.ones(3))},
        "parts": [{"step": 3, "moments": (torch.ones(4), torch.zeros(4, dtype=torch.uint8))}],
    }
    with open(folder / "nested", "wb") as file:
        torch.save(nested, file)
    readers: dict[str, Callable[[Path], Any]] = {
        "model": lambda path: dict(open_checkpoint(path)),
        "state": lambda path: load_state(path, SHAPE),
        "pairs": lambda path: load_pairs(path, 40),
        "nested": lambda path: storage.load(path, "adapter file"),
    }
    return [Subject((folder / name).read_bytes(), read, read(folder / name)) for name, read in readers.items()]


def flip(content: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def cut(content: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(content))
    del content[start : draw.choice([len(content), start + 1, start + draw.randrange(1, 2000)])]


def insert(content: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(content))
    length = draw.choice([1, 4, 64, 1000])
    source = draw.randrange(len(content))
    content[start:start] = draw.choice([bytes(length), draw.randbytes(length), content[source : source + length]])


def swap(content: bytearray, draw: random.Random) -> None:
    length = draw.choice([1, 8, 64, 300])
    first, second = sorted(draw.randrange(max(1, len(content) - length)) for _ in range(2))
    one, other = content[first : first + length], content[second : second + length]
    content[first : first + length], content[second : second + length] = other, one


def overwrite(content: bytearray, draw: random.Random) -> None:
    start, length = draw.randrange(len(content)), draw.choice([1, 16, 64, 1000])
    content[start : start + length] = bytes([draw.choice([0, 255, draw.randrange(256)])]) * length


def edit_headers(content: bytearray, draw: random.Random) -> None:
    """A number of 1 to 8 bytes in the directory, at the end, or in an entry's own header."""
    magics = [b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\3\4", b"PK\7\x08"]
    for _ in range(draw.choice([1, 1, 2, 4])):
        magic = draw.choice(magics)
        places = [place for place in range(len(content)) if content.startswith(magic, place)]
        if places:
            size = draw.choice([1, 2, 4, 8])
            start = draw.choice(places) + draw.randrange(60)
            content[start : start + size] = struct.pack("<Q", draw.choice(NUMBERS))[:size]


def swap_entries(content: bytearray, draw: random.Random) -> None:
    """Two names in the directory, or in the directory and in the headers."""
    names = sorted(set(re.findall(rb"archive/[\w./]+", content)))
    if len(names) < 2 or b"PK\1\2" not in content:
        return
    first, second = draw.sample(names, 2)
    start = draw.choice([0, content.index(b"PK\1\2")])
    content[start:] = content[start:].replace(first, b"\xff").replace(second, first).replace(b"\xff", second)


DAMAGES = (flip, flip, cut, insert, swap, overwrite, edit_headers, edit_headers, swap_entries)


def edit_pickle(pickled: bytes, draw: random.Random) -> bytes:
    """Operations changed, repeated, removed and put in."""
    places = [place for _, _, place in pickletools.genops(pickled) if place is not None]
    parts = [pickled[start:end] for start, end in zip(places, [*places[1:], len(pickled)], strict=True)]
    for _ in range(draw.choice([1, 1, 2, 5])):
        where = draw.randrange(2, len(parts))
        match draw.randrange(6):
            case 0:
                del parts[where]
            case 1:
                parts.insert(where, draw.choice(parts))
            case 2:
                parts[where] = draw.choice(parts)
            case 3:
                number = draw.choice([*NUMBERS, -1, -5, 2**2030 - 1, draw.randrange(300)])
                raw = number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)
                parts[where : where + draw.randrange(2)] = [b"\x8a" + bytes([len(raw)]) + raw]
            case 4:
                module, _, name = draw.choice(GLOBALS).partition(" ")
                parts[where : where + draw.randrange(2)] = [f"c{module}\n{name}\n".encode()]
            case 5:
                operation = draw.choice(b"()]}tluesabR.Q0N\x81\x85\x86\x87\x88\x89hqrj\x94")
                parts.insert(where, bytes([operation]) + draw.randbytes(draw.choice([0, 1, 4])))
        if len(parts) < 4:
            break
    return b"".join(parts)


def rewritten(content: bytes, draw: random.Random) -> bytes:
    """The archive of other entries, with right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    where = draw.randrange(len(entries))
    name, data = entries[where]
    match draw.randrange(8):
        case 0:
            del entries[where]
        case 1:
            entries[where] = (name, data[: draw.randrange(len(data) + 1)])
        case 2:
            entries[where] = (name, data + draw.randbytes(draw.choice([1, 2, 64])))
        case 3:
            entries[where] = (draw.choice(entries)[0], data)
        case 4:
            entries[where] = (draw.choice(["x", "/", "a/b/c", "../x", "é/data.pkl", name + "0", "data.pkl"]), data)
        case _:
            where = next(number for number, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
            entries[where] = (entries[where][0], edit_pickle(entries[where][1], draw))
    result = io.BytesIO()
    kind = draw.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(result, "w", kind) as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
        for name, data in entries:
            archive.writestr(name, data)
    return result.getvalue()


def changed(content: bytes, draw: random.Random) -> tuple[bytes, bool]:
    """A damaged or rewritten file, and whether its checksums are still those of the original."""
    if draw.random() < 0.4:
        return rewritten(content, draw), False
    damaged = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2])):
        if len(damaged) > 400:
            draw.choice(DAMAGES)(damaged, draw)
    return bytes(damaged), True


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal in every bit and every type, but that a parameter is a tensor."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


class HangError(BaseException):
    """No `except Exception` takes it for something else."""


@contextmanager
def in_time() -> Iterator[None]:
    """Interrupts what takes longer than SECONDS."""

    def interrupt(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(subject: Subject, number: int, path: Path) -> str:
    """What became of one input: "refused", "same", "other" (with other checksums), or what should not be."""
    content, checksums_kept = changed(subject.content, random.Random(f"{SEED} {number}"))
    path.write_bytes(content)
    try:
        with in_time():
            found = subject.read(path)
    except UserError as error:
        message = str(error)
        return "refused" if "\n" not in message and 20 < len(message) < 2000 else f"ill told: {message!r}"
    except HangError:
        return "a hang"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if same(found, subject.values):
        return "same"
    return "other values" if checksums_kept else "other"


def run(subjects: list[Subject], numbers: range, path: Path) -> dict[str, int]:
    """Counts of what became of the inputs; fails on what should not be, by number."""
    counts: dict[str, int] = {}
    wrong = {}
    for number in numbers:
        outcome = attempt(subjects[number % len(subjects)], number, path)
        if outcome in ("refused", "same", "other"):
            counts[outcome] = counts.get(outcome, 0) + 1
        else:
            wrong[number] = outcome
    assert wrong == {}
    return counts


def test_a_thousand_files(subjects: list[Subject], tmp_path: Path) -> None:
    counts = run(subjects, range(1000), tmp_path / "input")
    assert counts["refused"] > 500
    assert counts["same"] > 20


@pytest.mark.slow
def test_fifty_thousand_files(subjects: list[Subject], tmp_path: Path) -> None:
    counts = run(subjects, range(1000, 51_000), tmp_path / "input")
    assert counts["refused"] > 25_000
