"""Files of tensors: what is read, what is refused and in which words; and files that are complete or not there."""

import errno
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_same_tensors, refusal
from torch import Tensor

from src import storage


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """What a file may hold; 40 kB, so that a write can fail half way."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(32, 128, generator=generator) for name in ("emb.weight", "head.weight", "ln.weight")}


def read(path: Path) -> Any:
    """The content of a file that should be a model."""
    return storage.load(path, "model file")


def test_writing_into_a_mapped_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    storage.save(tmp_path / "model.pth", tensors())
    before = (tmp_path / "model.pth").read_bytes()
    read(tmp_path / "model.pth")["emb.weight"].zero_()
    assert (tmp_path / "model.pth").read_bytes() == before
    assert read(tmp_path / "model.pth")["emb.weight"].any()


@pytest.fixture
def no_reservation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses to reserve memory for a map, as it does for a file larger than memory."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 28138176512 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)


@pytest.mark.usefixtures("no_reservation")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_larger_than_memory_is_mapped_all_the_same(tmp_path: Path, wrapped: bool) -> None:
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


@pytest.mark.usefixtures("no_reservation")
def test_a_member_whose_place_is_in_doubt_is_refused(tmp_path: Path) -> None:
    """A rewritten archive, its members no longer where torch computes them."""
    storage.save(tmp_path / "model.pth", tensors())
    with (
        zipfile.ZipFile(tmp_path / "model.pth") as archive,
        zipfile.ZipFile(tmp_path / "rewritten.pth", "w") as rewritten,
    ):
        for member in archive.infolist():
            rewritten.writestr(member.filename, archive.read(member))
    message = refusal(lambda: read(tmp_path / "rewritten.pth"))
    assert "damaged or not a checkpoint" in message
    assert "values of torch.float32 begins at byte" in message


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    assert refusal(lambda: read(path)) == (f"model file {path} does not exist; there is no .pth file in {tmp_path}")
    for name in "abcd":
        (tmp_path / f"{name}.pth").touch()
    assert f"{tmp_path} holds a.pth, b.pth, c.pth and more" in refusal(lambda: read(path))
    assert "state file" in refusal(lambda: storage.load(path, "state file"))
    nowhere = tmp_path / "nowhere" / "model.pth"
    assert f"there is no folder {nowhere.parent} either" in refusal(lambda: read(nowhere))


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
    assert "cannot be memory-mapped" in message
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
    assert "damaged or not a checkpoint" in refusal(lambda: read(tmp_path / "model.pth"))


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
