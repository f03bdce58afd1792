"""States for clients against the table: container, names, orientation, dtype; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from assertions import assert_same_tensors, refusal
from factories import tiny_shape, tiny_states
from torch import Tensor

from src import safetensors
from src.config.state import ARCHITECTURES, CLIENT_NAMES
from src.errors import ConfigError
from src.export import CLIENTS, converted, refuse_name, write

STATES = tiny_states(tiny_shape(), dtype=torch.bfloat16)

TABLE = {
    # client: (dtype, [head, key, value] for RWKV-6, for RWKV-7)
    "runner": (torch.bfloat16, False, False),
    "ai00": (torch.float16, True, True),
    "web-rwkv": (torch.float16, True, True),
    "rwkv-pip": (torch.float32, False, False),  # RWKV-6: inside of a model, whose matrices the client swaps
    "rwkvcpp": (torch.float32, True, False),
    "hf": (torch.float32, True, True),
}
"""What the clients' readers take, each read in its source, and stated here once more by hand."""


def expected(name: str, architecture: str) -> dict[str, Tensor]:
    dtype, *turned = TABLE[name]
    swap = turned[ARCHITECTURES.index(architecture)]
    return {key: (state.transpose(1, 2) if swap else state).to(dtype) for key, state in STATES.items()}


def test_every_client_has_a_row() -> None:
    assert tuple(CLIENTS) == CLIENT_NAMES == tuple(TABLE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", TABLE)
def test_orientation_and_dtype(name: str, architecture: str) -> None:
    client = CLIENTS[name]
    found = converted(client, STATES, architecture)
    assert_same_tensors(found, expected(name, architecture))
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert list(found) == list(STATES)
    asks = [TABLE[name][1] != TABLE[name][2], name == "rwkv-pip"]
    assert client.asks_architecture == any(asks)
    if not client.asks_architecture:
        assert_same_tensors(converted(client, STATES, ""), expected(name, architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["runner", "rwkv-pip"])
def test_a_pth_file_holds_the_layers_and_nothing_else(name: str, architecture: str, tmp_path: Path) -> None:
    client = CLIENTS[name]
    if architecture in client.merged:
        return  # this client takes it inside of a model
    write(str(tmp_path / "s.pth"), client, STATES, architecture)
    content = torch.load(tmp_path / "s.pth", weights_only=True)
    assert list(content) == [f"blocks.{layer}.att.time_state" for layer in range(2)]
    assert_same_tensors(content, expected(name, architecture))


@pytest.mark.parametrize("name", ["ai00", "web-rwkv", "hf"])
def test_a_safetensors_file(name: str, tmp_path: Path) -> None:
    write(str(tmp_path / "s.st"), CLIENTS[name], STATES, "x070")
    assert_same_tensors(safetensors.load(tmp_path / "s.st", "state file"), expected(name, "x070"))
    content = (tmp_path / "s.st").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert header["blocks.0.att.time_state"]["shape"] == [4, 8, 8]


@pytest.mark.parametrize(("n_embd", "channels"), [(0, 32), (48, 48)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_of_floats(architecture: str, n_embd: int, channels: int, tmp_path: Path) -> None:
    write(str(tmp_path / "s.bin"), CLIENTS["rwkvcpp"], STATES, architecture, n_embd)
    floats = np.fromfile(tmp_path / "s.bin", dtype="<f4").reshape(2, 2 * channels + 32 * 8)
    assert not floats[:, : 2 * channels].any()
    for row, matrix in zip(floats, expected("rwkvcpp", architecture).values(), strict=True):
        np.testing.assert_array_equal(row[2 * channels :], matrix.numpy().ravel())


def test_what_overflows_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    states = {key: state.clone() for key, state in STATES.items()}
    states["blocks.1.att.time_state"][2, 3, 4] = -66048.0
    message = refusal(lambda: write(str(tmp_path / "s.st"), CLIENTS["ai00"], states, ""))
    assert "blocks.1.att.time_state holds 66048, and Ai00 reads float16, which ends at 65504" in message
    assert list(tmp_path.iterdir()) == []
    write(str(tmp_path / "s.pth"), CLIENTS["runner"], states, "")
    states["blocks.1.att.time_state"][2, 3, 4] = -65280.0  # the largest number of bf16 below the limit
    write(str(tmp_path / "s.st"), CLIENTS["ai00"], states, "")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    assert "create it first" in refusal(lambda: write(str(tmp_path / "a" / "b"), CLIENTS["rwkvcpp"], STATES, "x060"))


@pytest.mark.parametrize(
    ("name", "path", "better"),
    [
        ("runner", "s.state", "s.pth"),
        ("ai00", "a/s.pth", "a/s.state"),
        ("web-rwkv", "s", "s.st"),
        ("rwkv-pip", "s.bin", "s.pth"),
        ("hf", "s.pth", "s.safetensors"),
    ],
)
def test_a_name_that_the_client_does_not_find_is_refused(name: str, path: str, better: str) -> None:
    with pytest.raises(ConfigError, match=f"call it {better}"):
        refuse_name(CLIENTS[name], path)
    refuse_name(CLIENTS[name], better)


def test_any_name_does_for_floats() -> None:
    refuse_name(CLIENTS["rwkvcpp"], "state")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_next_step_is_said_for_every_architecture(architecture: str) -> None:
    for client in CLIENTS.values():
        text = client.use[architecture].format(file="name")
        assert "{" not in text.replace("{i}", "")
