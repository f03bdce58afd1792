"""What files are, and the sizes of what they hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from assertions import refusal
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_state_file

from src import safetensors
from src.inspection import ADAPTER, MODEL, PARTS, REST, STATE, differences, layers_of, read_content, together

SHAPE = tiny_shape()


def test_kinds(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model.pth")
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    tiny_adapter(tmp_path / "lora.pth", SHAPE, "lora", further={"ln_out.weight": torch.ones(32)})
    torch.save({"ln_out.weight": torch.ones(32)}, tmp_path / "parts.pth")
    kinds = {path.stem: read_content(str(path)).kind for path in tmp_path.glob("*.pth")}
    assert kinds == {"model": MODEL, "state": STATE, "lora": ADAPTER, "parts": PARTS}
    model = read_content(str(tmp_path / "model.pth"))
    assert model.model is not None
    assert (model.model.info.shape, model.size_bytes) == (SHAPE, (tmp_path / "model.pth").stat().st_size)


def test_a_merged_model_is_a_model_with_a_state(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "merged.pth", with_state=True)
    content = read_content(str(tmp_path / "merged.pth"))
    assert content.kind == MODEL
    assert content.model is not None
    assert content.model.info.has_state


def test_a_clients_state_is_seen(tmp_path: Path) -> None:
    states = tiny_state_file(tmp_path / "state.pth", SHAPE)
    for name in ("a.st", "a.state", "a.safetensors"):
        safetensors.save(tmp_path / name, {key: state.half() for key, state in states.items()})
        content = read_content(str(tmp_path / name))
        assert (content.kind, content.for_clients) == (STATE, True)
    assert not read_content(str(tmp_path / "state.pth")).for_clients


def test_what_stands_beside_a_file_is_read(tmp_path: Path) -> None:
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    assert read_content(str(tmp_path / "state.pth")).said == {}
    (tmp_path / "state.json").write_text('{"method": "states"}')
    assert read_content(str(tmp_path / "state.pth")).said == {"method": "states"}


def test_what_is_none_of_these_is_refused(tmp_path: Path) -> None:
    tiny_adapter(tmp_path / "pissa.pth", SHAPE, "pissa")
    message = refusal(lambda: read_content(str(tmp_path / "init_pissa.pth")))
    assert "the factors that PiSSA began with: name the adapter's own file" in message
    torch.save([1, 2], tmp_path / "pairs.save")
    assert "holds a list" in refusal(lambda: read_content(str(tmp_path / "pairs.save")))
    safetensors.save(tmp_path / "model.st", {"emb.weight": torch.ones(3, 4)})
    assert "none is a state's or an adapter's" in refusal(lambda: read_content(str(tmp_path / "model.st")))
    assert "does not exist" in refusal(lambda: read_content(str(tmp_path / "gone.pth")))
    (tmp_path / "folder").mkdir()
    assert "is a folder without adapter_config.json" in refusal(lambda: read_content(str(tmp_path / "folder")))


def test_numbers_by_layer() -> None:
    tensors = {
        "ln_out.weight": torch.tensor([1.0, -7.0]),
        "blocks.1.a": torch.tensor([3.0, 4.0]),
        "blocks.0.a": torch.zeros(2, 2),
        "blocks.1.b": torch.tensor([-5.0]).bfloat16(),
        "blocks.10.a": torch.tensor([2.0]),
    }
    layers = layers_of(tensors)
    assert list(layers) == [0, 1, 10, REST]
    assert (layers[1].tensors, layers[1].count, layers[1].largest) == (2, 3, 5.0)
    assert layers[1].rms == pytest.approx(math.sqrt(50 / 3))
    assert layers[REST].largest == 7.0
    total = together(layers)
    assert (total.tensors, total.count, total.largest) == (5, 10, 7.0)
    assert total.squares == pytest.approx(104)


def test_differences_by_layer() -> None:
    first = {"blocks.0.a": torch.tensor([3.0, 4.0]), "blocks.1.a": torch.zeros(2), "blocks.2.a": torch.ones(2)}
    second = {"blocks.0.a": torch.tensor([4.0, -3.0]), "blocks.1.a": torch.ones(2), "blocks.2.a": torch.ones(2)}
    layers = differences(first, second)
    assert layers[0].distance == pytest.approx(math.sqrt(2))
    assert layers[0].cosine == pytest.approx(0)
    assert (layers[1].distance, layers[1].cosine) == (math.inf, 0.0)
    assert (layers[2].distance, layers[2].cosine) == (0.0, pytest.approx(1))
    zeros = differences({"blocks.0.a": torch.zeros(2)}, {"blocks.0.a": torch.zeros(2)})[0]
    assert (zeros.distance, zeros.cosine, zeros.rms, zeros.other_rms) == (0.0, 1.0, 0.0, 0.0)
