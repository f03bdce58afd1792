"""The safetensors format, by its description: 8 bytes of length, a JSON header, bytes."""

import json
from pathlib import Path

import pytest
import torch
from assertions import assert_same_tensors, refusal

from src import safetensors

TENSORS = {
    "a.lora_A.weight": torch.randn(3, 5).bfloat16(),
    "b": torch.randn(2, 2, 2),
    "c": torch.randn(4).half(),
    "d": torch.empty(0, 3),
}


def written(folder: Path) -> Path:
    safetensors.save(folder / "a.safetensors", TENSORS)
    return folder / "a.safetensors"


def with_header(folder: Path, header: object, content: bytes = bytes(16)) -> Path:
    text = json.dumps(header).encode()
    (folder / "b.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    return folder / "b.safetensors"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert_same_tensors(safetensors.load(written(tmp_path), "adapter file"), TENSORS)


def test_the_layout(tmp_path: Path) -> None:
    content = written(tmp_path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header["b"] == {"dtype": "F32", "shape": [2, 2, 2], "data_offsets": [30, 62]}
    assert content[8 + length + 30 : 8 + length + 62] == TENSORS["b"].numpy().tobytes()
    assert len(content) == 8 + length + 70


def test_the_package_reads_it_and_is_read(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch", reason="comes with the package peft")
    assert_same_tensors(package.load_file(written(tmp_path)), TENSORS)
    package.save_file(TENSORS, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert_same_tensors(safetensors.load(tmp_path / "theirs.safetensors", "adapter file"), TENSORS)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ([1], "its header is no JSON object"),
        ({"a": 3}, "a is not described as a tensor"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}}, "a is not described as a tensor"),
        ({"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}}, "a is of I64, expected BF16, F16, F32, F64"),
        ({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}, "a has no 5 values in it"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}}, "a has no 4 values in it"),
        ({"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}, "is damaged: a has no 4 values"),
    ],
)
def test_damage_is_named(tmp_path: Path, header: object, expected: str) -> None:
    path = with_header(tmp_path, header)
    assert expected in refusal(lambda: safetensors.load(path, "adapter file"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"12345678", b"PK\3\4" + bytes(100), (3).to_bytes(8, "little") + b"abc"):
        (tmp_path / "c").write_bytes(content)
        assert "copy or download it again" in refusal(lambda: safetensors.load(tmp_path / "c", "adapter file"))
    assert "does not exist" in refusal(lambda: safetensors.load(tmp_path / "d", "adapter file"))
