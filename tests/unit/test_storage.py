"""Files of tensors: what is read, what is refused and in which words; and files that are complete or not there."""

import collections
import contextlib
import errno
import gc
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_same_tensors, refusal
from torch import Tensor

from src import archive, storage
from src.checkpoint import open_checkpoint
from src.data.pair_file import load_pairs
from src.errors import CheckpointError, ConfigError, UserError

ROOT = Path(__file__).parents[2]


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """What a file may hold; 40 kB, so that a write can fail half way."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(32, 128, generator=generator) for name in ("emb.weight", "head.weight", "ln.weight")}


def read(path: Path) -> Any:
    """The content of a file that should be a model."""
    return storage.load(path, "model file")


def rewrite(
    path: Path,
    change: Callable[[str, bytes], bytes | None] = lambda name, content: content,
    *,
    reverse: bool = False,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Writes a file's archive again, with right checksums, its entries changed or (None) left out."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in reversed(members) if reverse else members:
            changed = change(name.partition("/")[2], content)
            if changed is not None:
                archive.writestr(name, changed)


def test_writing_into_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    storage.save(tmp_path / "model.pth", tensors())
    before = (tmp_path / "model.pth").read_bytes()
    read(tmp_path / "model.pth")["emb.weight"].zero_()
    assert (tmp_path / "model.pth").read_bytes() == before
    assert read(tmp_path / "model.pth")["emb.weight"].any()


@pytest.mark.parametrize("wrapped", [False, True])
def test_views_and_wrapped_dicts_are_read(tmp_path: Path, wrapped: bool) -> None:
    weights = {key: tensor.bfloat16() for key, tensor in tensors().items()}
    # A view and a transposed tensor, as foreign writers leave them in files.
    weights["ln.weight"] = torch.randn(100).bfloat16()[40:72]
    weights["head.weight"] = torch.randn(32, 257).bfloat16().T
    torch.save({"state_dict": weights} if wrapped else weights, tmp_path / "model.pth")
    before = (tmp_path / "model.pth").read_bytes()
    content = read(tmp_path / "model.pth")
    content = content["state_dict"] if wrapped else content
    assert_same_tensors(content, weights)
    content["emb.weight"].zero_()
    assert (tmp_path / "model.pth").read_bytes() == before


class TestChanges:
    """Files that are written to while they are read; a map of them would end the process."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        storage.save(tmp_path / "model.pth", tensors())
        return tmp_path / "model.pth"

    @pytest.mark.parametrize("kept", [0.0, 0.4, 1.1])
    def test_another_length_is_noticed_at_the_next_tensor(self, kept: float, path: Path) -> None:
        checkpoint = storage.TensorFile(path, "model file")
        outlines = dict(checkpoint.content)
        assert_same_tensors(
            {"emb.weight": checkpoint.read(outlines["emb.weight"])}, {"emb.weight": tensors()["emb.weight"]}
        )
        size = path.stat().st_size
        os.truncate(path, int(kept * size))
        for read_on in (lambda: checkpoint.read(outlines["emb.weight"]), lambda: checkpoint.whole(outlines)):
            message = refusal(read_on)
            assert f"{path} was changed while the program reads it: it had {size:,} bytes, now it has " in message

    def test_other_values_of_the_same_length_are_noticed(self, path: Path) -> None:
        checkpoint = storage.TensorFile(path, "model file")
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"x")
        os.utime(path, ns=(0, 0))
        message = refusal(lambda: checkpoint.whole(checkpoint.content))
        assert (
            f"{path} was changed while the program reads it: it was written to, and has {len(content):,} bytes"
            in message
        )

    @pytest.mark.parametrize("how", ["replaced", "removed"])
    def test_an_open_file_stays_the_one_it_was(self, how: str, path: Path) -> None:
        checkpoint = storage.TensorFile(path, "model file")
        if how == "replaced":
            storage.save(path, tensors(1))
        else:
            path.unlink()
        assert_same_tensors(checkpoint.whole(checkpoint.content), tensors())

    def test_a_change_while_the_file_is_opened_is_noticed(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        check = storage.check

        def change(*arguments: Any) -> None:
            check(*arguments)
            with path.open("ab") as file:
                file.write(b"more")

        monkeypatch.setattr(storage, "check", change)
        assert "was changed while the program reads it" in refusal(lambda: read(path))

    def test_a_disk_that_fails_later_is_told(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        checkpoint = storage.TensorFile(path, "model file")
        monkeypatch.setattr(os, "preadv", fail)
        message = refusal(lambda: checkpoint.whole(checkpoint.content))
        assert message == f"{path} cannot be read any more: Input/output error"

    def test_files_are_closed(self, path: Path) -> None:
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            checkpoint = storage.TensorFile(path, "model file")
            checkpoint.read(checkpoint.content["emb.weight"])
        del checkpoint
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_dict_is_read_piece_by_piece(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage.save(path, {"moments": {name: {"exp_avg": tensor, "step": 3} for name, tensor in tensors().items()}})
        file = storage.TensorFile(path, "run file")
        stored = storage.StoredDict(file, file.content)
        calls = []
        once = storage.TensorFile.read

        def noted(self: storage.TensorFile, outline: Tensor, **options: Any) -> Tensor:
            calls.append(tuple(outline.shape))
            return once(self, outline, **options)

        monkeypatch.setattr(storage.TensorFile, "read", noted)
        moments = stored["moments"]
        assert (list(moments), len(moments), "emb.weight" in moments) == (list(tensors()), 3, True)
        assert moments["emb.weight"]["step"] == 3
        assert calls == []
        assert_same_tensors({"a": dict(moments["ln.weight"])["exp_avg"]}, {"a": tensors()["ln.weight"]})
        assert calls == [(32, 128)]


def test_tensors_of_one_storage_share_memory(tmp_path: Path) -> None:
    whole = torch.arange(100.0)
    storage.save(tmp_path / "model.pth", {"whole": whole, "part": whole[10:20]})
    found = read(tmp_path / "model.pth")
    found["whole"][10] = -1
    assert found["part"][0] == -1


def test_a_rewritten_archive_is_read_by_the_names_of_its_entries(tmp_path: Path) -> None:
    """In another order and at odd places, which torch computes wrongly."""
    storage.save(tmp_path / "model.pth", tensors())
    rewrite(tmp_path / "model.pth", reverse=True)
    assert_same_tensors(read(tmp_path / "model.pth"), tensors())


def test_every_flipped_byte_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    storage.save(path, tensors())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as opened:
        places = [info.header_offset + 200 for info in opened.infolist() if "/data/" in info.filename]
    assert len(places) == 3
    for place in [*places, places[-1] + 16_000]:
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert "do not have the checksum they were written with" in refusal(lambda: read(path))


def test_compressed_archives_are_refused_with_a_conversion_that_works(tmp_path: Path) -> None:
    storage.save(tmp_path / "model.pth", tensors())
    rewrite(tmp_path / "model.pth", compression=zipfile.ZIP_DEFLATED)
    message = refusal(lambda: read(tmp_path / "model.pth"))
    assert "was compressed or encrypted" in message
    run_conversion(message, tmp_path / "model.pth", tmp_path / "new.pth")
    assert_same_tensors(read(tmp_path / "new.pth"), tensors())


@pytest.mark.parametrize(
    ("entry", "changed", "expected"),
    [
        ("data/1", b"", "does not fit the 0 bytes that are there for it"),
        ("data/1", bytes(16_383), "head.weight of shape [32, 128] and torch.float32 does not fit the 16383 bytes"),
        ("data/1", bytes(16_385), "does not fit the 16385 bytes"),
        ("data/1", None, "damaged or not a checkpoint"),
        ("byteorder", b"big", "has byte order b'big' instead of b'little'"),
        ("data.pkl", None, "a zip archive without data.pkl"),
        ("data.pkl", b"", "it holds no pickle of protocol 2"),
    ],
)
def test_entries_that_do_not_fit_are_refused(tmp_path: Path, entry: str, changed: bytes | None, expected: str) -> None:
    """With right checksums, as a program that rewrites archives leaves them."""
    storage.save(tmp_path / "model.pth", tensors())
    rewrite(tmp_path / "model.pth", lambda name, content: changed if name == entry else content)
    assert expected in refusal(lambda: read(tmp_path / "model.pth"))


class Rebuilt:
    """What is pickled as a tensor with these numbers over a storage of 100 values, or as another call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def rebuilt(offset: Any, shape: Any, stride: Any, *more: Any) -> Rebuilt:
    rebuild: Any = torch._utils._rebuild_tensor_v2
    return Rebuilt(
        rebuild, torch.arange(100.0)._typed_storage(), offset, shape, stride, False, collections.OrderedDict(), *more
    )


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (101,), (1,)),
        (1, (100,), (1,)),
        (0, (2, 50), (51, 1)),
        (-1, (5,), (1,)),
        (0, (-5,), (1,)),
        (2**62, (5,), (1,)),
        (0, (2**62,), (1,)),
        (0, (2**62, 2**62), (0, 0)),
        (0, (2**40,), (0,)),
        (0, (5,), (2**61,)),
        (10**100, (5,), (1,)),
        (0, (10**100,), (1,)),
        (0, (5, 5), (1,)),
        (0, ("a",), (1,)),
        ("a", None, 3),
        (0, (5,) * 100_000, (0,) * 100_000),
    ],
)
def test_tensors_that_lie_outside_of_their_entry_are_refused(
    tmp_path: Path, offset: Any, shape: Any, stride: Any
) -> None:
    torch.save({"emb.weight": rebuilt(offset, shape, stride)}, tmp_path / "model.pth")
    assert len(refusal(lambda: read(tmp_path / "model.pth"))) < 1000


def test_a_negative_stride_stands_for_that_of_a_tensor_without_gaps(tmp_path: Path) -> None:
    torch.save({"emb.weight": rebuilt(0, (2, 5), (-7, 1))}, tmp_path / "model.pth")
    assert_same_tensors(read(tmp_path / "model.pth"), {"emb.weight": torch.arange(10.0).view(2, 5)})


def test_tensors_of_odd_places_are_read(tmp_path: Path) -> None:
    """Views, shared bytes, no values at all."""
    whole = torch.arange(100.0)
    content = {
        "whole": whole,
        "part": whole[7:29:3],
        "square": whole.view(10, 10).T,
        "none": whole[:0],
        "one": whole[5],
    }
    torch.save(content, tmp_path / "model.pth")
    assert_same_tensors(read(tmp_path / "model.pth"), content)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3, device="meta"),
        rebuilt(0, (5,), (1,), {"neg": True}),
        Rebuilt(torch.FloatTensor, 1 << 40),
        Rebuilt(torch.FloatTensor, 3),
    ],
)
def test_tensors_without_values_of_their_own_are_refused(tmp_path: Path, value: Any) -> None:
    torch.save({"emb.weight": value}, tmp_path / "model.pth")
    message = refusal(lambda: read(tmp_path / "model.pth"))
    assert "emb.weight has no values of its own in the file" in message or "damaged or not a checkpoint" in message


def test_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    content: dict[str, Any] = {name: torch.nn.Parameter(tensor) for name, tensor in tensors().items()}
    content["marked"] = torch.nn.Parameter(torch.ones(3))
    content["marked"].remark = "a state of its own"
    torch.save(content, tmp_path / "model.pth")
    found = read(tmp_path / "model.pth")
    assert {type(tensor) for tensor in found.values()} == {Tensor}
    assert not any(tensor.requires_grad for tensor in found.values())
    assert_same_tensors(found, {name: parameter.detach() for name, parameter in content.items()})


def test_a_file_without_checksums_is_read_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        storage.save(tmp_path / "model.pth", tensors())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same_tensors(read(tmp_path / "model.pth"), tensors())
    assert "was written without checksums" in capsys.readouterr().err


class TestLargeFiles:
    """Their bytes are compared with the checksums the first time only."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The folder of the user's caches; every file counts as large."""
        monkeypatch.setattr(archive, "CHECKED_ONCE_BYTES", 1)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def damage(self, path: Path) -> None:
        """Flips a bit of the last tensor and keeps the file's time."""
        status = path.stat()
        content = bytearray(path.read_bytes())
        content[-2000] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def test_once_per_file(self, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "model.pth"
        storage.save(path, tensors())
        read(path)
        assert "against its checksums, once" in capsys.readouterr().err
        assert len(list(cache.rglob("*"))) == 3
        self.damage(path)
        assert not torch.equal(read(path)["ln.weight"], tensors()["ln.weight"]), "not looked at again"
        assert capsys.readouterr().err == ""
        os.utime(path)
        assert "do not have the checksum" in refusal(lambda: read(path))
        assert "do not have the checksum" in refusal(lambda: read(path)), "a damaged file is never taken as checked"

    def test_every_time_where_there_is_no_cache(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "model.pth"
        storage.save(path, tensors())
        cache.write_text("not a folder")
        assert_same_tensors(read(path), tensors())
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(os.path, "expanduser", lambda name: name)
        assert_same_tensors(read(path), tensors())
        self.damage(path)
        assert "do not have the checksum" in refusal(lambda: read(path))


@pytest.mark.parametrize("width", [1, 8])
def test_nothing_in_the_directory_gives_other_values(tmp_path: Path, width: int) -> None:
    """It ends with two records that say where it is, one of them with fields of 64 bits."""
    path = tmp_path / "model.pth"
    storage.save(path, {"emb.weight": torch.arange(8.0), "head.weight": torch.ones(8)})
    content = path.read_bytes()
    refused = 0
    for place in range(content.index(b"PK\1\2"), len(content) - width + 1, 2):
        for value in (0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1):
            damaged = bytearray(content)
            damaged[place : place + width] = value.to_bytes(width, "little")
            path.write_bytes(damaged)
            try:
                found = read(path)
            except CheckpointError:
                refused += 1
            else:
                assert_same_tensors(found, {"emb.weight": torch.arange(8.0), "head.weight": torch.ones(8)})
    assert refused > 300


def test_pipes_devices_and_impossible_names_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or pipe" in refusal(lambda: read(tmp_path / "pipe"))
    assert "is a device or pipe" in refusal(lambda: read(Path("/dev/zero")))
    assert "no file has such a name" in refusal(lambda: storage.load("a\0b", "model file"))
    assert "File name too long" in refusal(lambda: read(tmp_path / ("a" * 300)))
    assert "File name too long" in refusal(lambda: storage.save(tmp_path / ("a" * 300), tensors()))
    assert "no file has such a name" in refusal(lambda: storage.save("a\0b", tensors()))


def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    storage.save(tmp_path / "model.pth", tensors())
    for call in ("preadv", "pread"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            assert "cannot be read: Input/output error" in refusal(lambda: read(tmp_path / "model.pth"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter everywhere")
def test_a_folder_without_entry_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    assert "Permission denied" in refusal(lambda: read(tmp_path / "closed" / "model.pth"))
    assert "Permission denied" in refusal(lambda: storage.save(tmp_path / "closed" / "model.pth", tensors()))


def nested(depth: int, make: Callable[[Any], Any]) -> Any:
    value: Any = make(None)
    for _ in range(depth):
        value = make(value)
    return value


def write_pickle(path: Path, pickled: bytes) -> None:
    """A file with this pickle and one tensor's bytes."""
    torch.save({"emb.weight": torch.zeros(4)}, path)
    rewrite(path, lambda name, content: pickled if name == "data.pkl" else content)


@pytest.mark.parametrize(
    "pickled",
    [
        b"]" * 20_000 + b"a" * 19_999 + b".",  # lists in lists
        b"}" + b"U\1a}" * 10_000 + b"s" * 10_000 + b".",  # dicts in dicts
        b"N" + b"\x85" * 20_000 + b".",  # tuples in tuples
        pytest.param(b"]" * 200_000 + b"a" * 199_999 + b".", marks=pytest.mark.slow),
        pytest.param(b"}" + b"U\1a}" * 100_000 + b"s" * 100_000 + b".", marks=pytest.mark.slow),
        b"}N" + b"\x85" * 1_000_000 + b"K\1s.",  # as a key
        b"}q\0U\1aq\1h\0s.",  # a dict that holds itself
        b"]q\0" + b"".join(b"]q%c(h%ch%ce" % (n, n - 1, n - 1) for n in range(1, 100)) + b".",  # doubled 100 times
        b"}q\0" + b"".join(b"}q%c(U\1ah%cU\1bh%cu" % (n, n - 1, n - 1) for n in range(1, 100)) + b".",
        b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.",
        b"\x8a\xff" + b"\x7f" * 255 + b".",
        b"r\xff\xff\xff\x7f.",
        b"N" + b"r\xff\xff\xff\xff" + b".",
        b"}K\1K\2s.",  # keys that are no strings
        b"}}}s.",  # and cannot be keys
        b"X\xff\xff\xff\xffa.",
        b"(((((.",
        b"",
    ],
)
def test_odd_pickles_are_read_or_refused(tmp_path: Path, pickled: bytes) -> None:
    write_pickle(tmp_path / "model.pth", b"\x80\2" + pickled)
    with contextlib.suppress(CheckpointError):
        storage.load(tmp_path / "model.pth", "model file")
    assert len(refusal(lambda: open_checkpoint(tmp_path / "model.pth"))) < 1000
    with pytest.raises(UserError):
        load_pairs(tmp_path / "model.pth", 257)


@pytest.mark.parametrize(
    "call",
    [
        *("posix\nsystem", "os\nsystem", "nt\nsystem", "subprocess\nPopen", "builtins\ngetattr", "torch\nload"),
        *("builtins\neval", "builtins\nexec", "__builtin__\neval", "torch.hub\nload", "importlib\nimport_module"),
    ],
)
def test_malicious_pickles_are_refused(tmp_path: Path, call: str) -> None:
    payload = f"open({str(tmp_path / 'sprung')!r}, 'w')" if "eval" in call else f"touch {tmp_path / 'sprung'}"
    pickled = b"\x80\2c" + call.encode() + b"\nX" + struct.pack("<I", len(payload)) + payload.encode() + b"\x85R."
    write_pickle(tmp_path / "model.pth", pickled)
    assert "could run foreign code" in refusal(lambda: read(tmp_path / "model.pth"))
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pth"
    assert refusal(lambda: read(path)) == (f"model file {path} does not exist; there is no .pth file in {tmp_path}")
    for name in "abcd":
        (tmp_path / f"{name}.pth").touch()
    assert f"{tmp_path} holds a.pth, b.pth, c.pth and more" in refusal(lambda: read(path))
    assert "state file" in refusal(lambda: storage.load(path, "state file"))
    nowhere = tmp_path / "nowhere" / "model.pth"
    assert f"there is no folder {nowhere.parent} either" in refusal(lambda: read(nowhere))
    monkeypatch.chdir(tmp_path)
    assert "this folder holds a.pth, b.pth, c.pth and more" in refusal(lambda: read(Path("model.pth")))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} is a directory" in refusal(lambda: read(tmp_path))


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(lambda: read(tmp_path / "file" / "model.pth"))
    assert "cannot be read: Not a directory" in message


def safetensors() -> bytes:
    header = json.dumps({"emb.weight": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0\0"


@pytest.mark.parametrize(
    ("content", "description"),
    [
        (b"", "an empty file"),
        (b"hello\n" * 100, "a text file"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (safetensors(), "a safetensors file"),
        (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
        (b"fmgg\x65\0\0\0" + bytes(64), "a ggml file (rwkv.cpp)"),
        (bytes(1000), "a file of zero bytes"),
        (b"\x80\x04}\x94.", "a Python pickle"),
        (b"\x7fELF\2\1\1\0", "a file of unknown format"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path: Path, content: bytes, description: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    message = refusal(lambda: read(path))
    assert message.startswith(f"{path} is {description}")
    assert "not a model file written by torch.save (.pth)" in message


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "model.pth"
    storage.save(path, tensors())
    content = path.read_bytes()[: int(kept * path.stat().st_size)]
    path.write_bytes(content)
    message = refusal(lambda: read(path))
    assert f"is incomplete: its {len(content)} bytes" in message


def run_conversion(message: str, old: Path, new: Path) -> None:
    """Does what the message tells the user to do."""
    command = message.partition('python -c "')[2].rstrip('"')
    command = command.replace("OLD.pth", str(old)).replace("NEW.pth", str(new))
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)


def test_a_file_of_an_old_torch_is_refused_with_a_conversion_that_works(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    message = refusal(lambda: read(tmp_path / "old.pth"))
    assert "torch before 1.6" in message
    assert "cannot be read one by one" in message
    run_conversion(message, tmp_path / "old.pth", tmp_path / "new.pth")
    assert_same_tensors(read(tmp_path / "new.pth"), tensors())


def test_a_tar_file_is_refused_with_a_conversion(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    message = refusal(lambda: read(tmp_path / "old.pth"))
    assert "is a tar archive" in message
    assert "weights_only=False" in message
    assert "can run code" in message


def test_zip_archives_of_other_programs_are_refused(tmp_path: Path) -> None:
    for name, member in (("plain.pth", "a.txt"), ("nested.pth", "a/data.pkl")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(member, b"x")
        message = refusal(lambda name=name: read(tmp_path / name))
        assert "damaged or not a checkpoint" in message


@pytest.mark.filterwarnings("ignore:.*TorchScript archive:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "model.pth"))
    assert "is a TorchScript program" in refusal(lambda: read(tmp_path / "model.pth"))


class Trap:
    """An object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({**tensors(), "trap": Trap(tmp_path / "sprung")}, tmp_path / "model.pth")
    message = refusal(lambda: read(tmp_path / "model.pth"))
    assert "Python object (" in message
    assert "could run foreign code" in message
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    storage.save(tmp_path / "model.pth", tensors())
    content = bytearray((tmp_path / "model.pth").read_bytes())
    content[100:300] = bytes(200)
    (tmp_path / "model.pth").write_bytes(content)
    assert "the bytes of entry 'data.pkl' do not have the checksum" in refusal(lambda: read(tmp_path / "model.pth"))


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    storage.save(tmp_path / "first.pth", tensors())
    storage.save(tmp_path / "second.pth", tensors())
    assert (tmp_path / "first.pth").read_bytes() == (tmp_path / "second.pth").read_bytes()


def test_a_save_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    storage.save(tmp_path / "state.pth", tensors(0))
    storage.save(tmp_path / "state.pth", tensors(1))
    assert_same_tensors(read(tmp_path / "state.pth"), tensors(1))
    assert os.listdir(tmp_path) == ["state.pth"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "state.pth").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_save_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "state.pth").symlink_to(tmp_path / "disk" / "real.pth")
    storage.save(tmp_path / "state.pth", tensors())
    assert (tmp_path / "state.pth").is_symlink()
    assert_same_tensors(read(tmp_path / "disk" / "real.pth"), tensors())


def test_a_reader_keeps_the_old_file_while_it_is_replaced(tmp_path: Path) -> None:
    storage.save(tmp_path / "model.pth", tensors(0))
    reader = read(tmp_path / "model.pth")
    storage.save(tmp_path / "model.pth", tensors(1))
    assert_same_tensors(reader, tensors(0))
    assert_same_tensors(read(tmp_path / "model.pth"), tensors(1))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_changes_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, existing: bool
) -> None:
    path = tmp_path / "state.pth"
    if existing:
        path.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    message = refusal(lambda: storage.save(path, tensors()))
    assert message == f"{path} cannot be written: {os.strerror(code)}; 0.05 MiB are needed in {tmp_path}"
    assert (os.listdir(tmp_path), existing and path.read_bytes()) == (
        (["state.pth"], b"old") if existing else ([], False)
    )


class FullDisk(io.BytesIO):
    """A file that takes so many bytes and no more."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_recognised_behind_the_error_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda tensors, _: save(tensors, FullDisk()))
    message = refusal(lambda: storage.save(tmp_path / "model.pth", tensors()))
    assert "No space left on device" in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    class Interrupted(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 20_000:
                raise interrupt
            return io.BytesIO.write(self, data)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda tensors, _: save(tensors, Interrupted()))
    with pytest.raises(interrupt):
        storage.save(tmp_path / "model.pth", tensors())
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    storage.save(tmp_path / "state.pth", tensors())
    assert_same_tensors(read(tmp_path / "state.pth"), tensors())


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    missing, below = tmp_path / "missing" / "state.pth", tmp_path / "file" / "state.pth"
    for path, expected in (
        (tmp_path, "is a directory; give the name of the file to write"),
        (Path("/dev/null"), "is a device or pipe; give the name of an ordinary file"),
        (missing, f"cannot be written: there is no folder {missing.parent}; create it first"),
        (below, f"cannot be written: there is no folder {below.parent}; create it first"),
    ):
        assert refusal(lambda path=path: storage.save(path, tensors())) == f"{path} {expected}"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    message = refusal(lambda: storage.save(tmp_path / "state.pth", tensors()))
    tmp_path.chmod(0o700)
    assert "cannot be written: Permission denied" in message


def test_tensors_are_found_wherever_they_are(tmp_path: Path) -> None:
    one, two = torch.arange(3.0), torch.ones(2, dtype=torch.uint8)
    content = {"a": [{"b": (one, 3, [two])}, one], "c": {"d": {"e": {"f": two}}}}
    torch.save(content, tmp_path / "nested.pth")
    found = read(tmp_path / "nested.pth")
    pairs = [(found["a"][0]["b"][0], one), (found["a"][0]["b"][2][0], two), (found["a"][1], one)]
    pairs.append((found["c"]["d"]["e"]["f"], two))
    assert all(torch.equal(loaded, original) for loaded, original in pairs)


class TestOverlap:
    """Outputs that are inputs."""

    @pytest.mark.parametrize("link", [None, "symbolic", "hard", "folder", "chain"])
    def test_the_same_file_is_refused_by_any_name(self, tmp_path: Path, link: str | None) -> None:
        base, output = tmp_path / "base.pth", tmp_path / "out.pth"
        base.write_bytes(b"x")
        if link is None:
            output = tmp_path / "nowhere" / ".." / "base.pth"
        elif link == "hard":
            output.hardlink_to(base)
        elif link == "folder":
            (tmp_path / "folder").symlink_to(tmp_path)
            output = tmp_path / "folder" / "base.pth"
        else:
            (tmp_path / "middle").symlink_to(base)
            output.symlink_to(tmp_path / "middle" if link == "chain" else base)
        with pytest.raises(ConfigError) as refused:
            storage.refuse_overlap({"--load_state": "", "--load_model": base}, {"--output_save": output})
        assert str(refused.value) == (
            f"--load_model {base} would be written over, because it is the same file as --output_save {output}: choose "
            "another for one of them"
        )

    def test_two_outputs_are_two_files(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "b")
        with pytest.raises(ConfigError, match="are one file"):
            storage.refuse_overlap({}, {"--output_save": tmp_path / "a", "its texts": tmp_path / "b"})

    def test_others_pass(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x")
        storage.refuse_overlap({"--load_model": tmp_path / "a", "--load_state": "a\0b"}, {"output": tmp_path / "b"})
        storage.refuse_overlap({"--load_model": tmp_path / "a"}, {"output": tmp_path / ("b" * 300)})


class TestExisting:
    """Outputs that are there."""

    def test_all_of_them_are_named(self, tmp_path: Path) -> None:
        first, second = tmp_path / "a", tmp_path / "b"
        first.touch()
        with pytest.raises(ConfigError) as refused:
            storage.refuse_existing({"output": first, "its index": second})
        assert str(refused.value) == f"output {first} exists already: remove it, or choose another name"
        second.symlink_to(first)
        with pytest.raises(ConfigError) as refused:
            storage.refuse_existing({"output": first, "its index": second})
        assert str(refused.value) == (
            f"output {first} and its index {second} exist already: remove them, or choose another name"
        )

    def test_what_is_no_file_is_left_to_the_writer(self, tmp_path: Path) -> None:
        (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
        outputs = ["/dev/null", tmp_path, tmp_path / "nowhere", "a\0b", tmp_path / ("b" * 300)]
        storage.refuse_existing({f"output {number}": path for number, path in enumerate(outputs)})


def test_any_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with storage.replacing(path) as file:
        file.write(b"first")
        assert not path.exists()
        assert [name.startswith(".run.json.") for name in os.listdir(tmp_path)] == [True]
    with storage.replacing(path) as file:
        file.write(b"second")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, ValueError, OSError])
def test_whatever_a_writer_raises_the_old_file_stays(tmp_path: Path, raised: type[BaseException]) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"old")

    def write() -> None:
        with storage.replacing(path) as file:
            file.write(b"new")
            raise raised

    with pytest.raises(raised):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(("path", "code"), [("/dev/null", errno.ENODEV), ("/dev", errno.EISDIR)])
def test_only_ordinary_files_are_replaced(path: str, code: int) -> None:
    with pytest.raises(OSError, match=os.strerror(code)) as caught, storage.replacing(path):
        pytest.fail("was opened")
    assert caught.value.errno == code


@pytest.mark.parametrize("links", [True, False])
def test_the_old_file_can_keep_a_name(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system knows no second names."""

    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for number in range(3):
        storage.save(tmp_path / "new.pth", [number], previous=tmp_path / "old.pth")
    assert sorted(os.listdir(tmp_path)) == ["new.pth", "old.pth"]
    assert [storage.load(tmp_path / name, "file") for name in ("old.pth", "new.pth")] == [[1], [2]]
