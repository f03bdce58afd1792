"""Files written tensor by tensor are those that torch writes."""

import zipfile
from pathlib import Path

import pytest
import torch
from assertions import assert_same_tensors, refusal
from torch import Tensor

from src import storage
from src.errors import CheckpointError
from src.streaming import save_one_by_one

TENSORS = {
    "matrix": torch.arange(6).view(2, 3).float(),
    "transposed": torch.randn(5, 7).t(),
    "part": torch.randn(9, 4)[3:5, 1:],
    "16 bits": torch.arange(-16, 16, dtype=torch.int16).view(torch.bfloat16),
    "half": torch.randn(3, 1, 2).half(),
    "double": torch.randn(2).double(),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 4),
}


def outlines(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in tensors.items()}


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_one_by_one(path, outlines(tensors), tensors.__getitem__)


def test_torch_reads_them_mapped_and_not(tmp_path: Path) -> None:
    save(tmp_path / "a.pth", TENSORS)
    numbers = {key: tensor for key, tensor in TENSORS.items() if key != "16 bits"}
    for content in (
        torch.load(tmp_path / "a.pth", weights_only=True),
        torch.load(tmp_path / "a.pth", weights_only=True, mmap=True),
        storage.load(tmp_path / "a.pth", "model file"),
    ):
        assert type(content) is dict
        assert list(content) == list(TENSORS)
        assert torch.equal(content["16 bits"].view(torch.int16), TENSORS["16 bits"].view(torch.int16))
        assert_same_tensors({key: content[key] for key in numbers}, numbers)
        assert all(tensor.is_contiguous() for tensor in content.values())


def test_every_tensor_lies_at_a_multiple_of_64_bytes_with_its_checksum(tmp_path: Path) -> None:
    save(tmp_path / "a.pth", TENSORS)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        for info in archive.infolist():
            with open(tmp_path / "a.pth", "rb") as file:
                file.seek(info.header_offset + 26)
                lengths = file.read(4)
            name_bytes, padding_bytes = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
            assert (info.header_offset + 30 + name_bytes + padding_bytes) % 64 == 0


def test_tensors_are_asked_for_one_by_one_in_order(tmp_path: Path) -> None:
    asked = []

    def tensor_of(key: str) -> Tensor:
        asked.append(key)
        return TENSORS[key]

    save_one_by_one(tmp_path / "a.pth", outlines(TENSORS), tensor_of)
    assert asked == list(TENSORS)


def test_what_raises_on_the_way_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"old")

    def tensor_of(key: str) -> Tensor:
        if key == "part":
            raise CheckpointError("this part is damaged")
        return TENSORS[key]

    with pytest.raises(CheckpointError, match="damaged"):
        save_one_by_one(tmp_path / "a.pth", outlines(TENSORS), tensor_of)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert (tmp_path / "a.pth").read_bytes() == b"old"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    assert "create it first" in refusal(lambda: save(tmp_path / "nowhere" / "a.pth", TENSORS))
    assert "is a directory" in refusal(lambda: save(tmp_path, TENSORS))
