"""States in the forms that inference clients take: the one table of them, and its functions.

A state file holds [head, value, key] matrices; a client may want [head, key, value], another container or another
dtype. In the square axes a wrong orientation loads everywhere and gives nonsense, so that none is ever guessed.

Source: the clients' own readers (ChatRWKV's `rwkv` package 0.8.32, RWKV-Runner 1.9.11, Ai00 0.4.9 with web-rwkv); of
rwkv.cpp its kernels.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from src import safetensors, storage
from src.checkpoint import save_state
from src.errors import CheckpointError, ConfigError
from src.model.shape import state_key
from src.streaming import bytes_of


class Container(enum.Enum):
    """How tensors lie in a file."""

    PTH = "torch.save"
    SAFETENSORS = "safetensors"
    FLOATS = "numbers alone"


_BOTH = ("x060", "x070")


@dataclass(frozen=True)
class Client:
    """What one client takes.

    Attributes:
        title: how people call it.
        container: of the file.
        dtype: in the file; None leaves it as it is.
        key_first: architectures whose matrices it wants as [head, key, value]; of all others [head, value, key].
        suffixes: how names of files end that it takes; none: any.
        merged: architectures whose state it takes inside of a model only.
        use: how the file gets into it, by architecture where that differs; {file} stands for its name.
    """

    title: str
    container: Container
    dtype: torch.dtype | None
    key_first: tuple[str, ...]
    suffixes: tuple[str, ...]
    use: Mapping[str, str]
    merged: tuple[str, ...] = ()

    @property
    def asks_architecture(self) -> bool:
        """Whether the file depends on the model's architecture."""
        return len(self.key_first) == 1 or bool(self.merged)

    def turns(self, architecture: str) -> bool:
        """Whether matrices stand in its file as [head, key, value]; x060, x070, or "" where it does not ask."""
        return len(self.key_first) == len(_BOTH) or architecture in self.key_first


def _always(use: str) -> dict[str, str]:
    return dict.fromkeys(_BOTH, use)


CLIENTS: dict[str, Client] = {
    "runner": Client(
        "RWKV-Runner", Container.PTH, None, (), (".pth",),
        _always("put {file} into state-models/ and choose it in Configs, beside a .pth model and the Python backend"),
    ),
    "ai00": Client(
        "Ai00", Container.SAFETENSORS, torch.float16, _BOTH, (".state", ".st"),
        _always("put {file} into the model folder and name it in Config.toml: [[state]] with name, path and default"),
    ),
    "web-rwkv": Client(
        "web-rwkv", Container.SAFETENSORS, torch.float16, _BOTH, (".st", ".state", ".safetensors"),
        _always("read {file} with read_state of the model's version, and load what that gives"),
    ),
    "rwkv-pip": Client(
        "the PyPI package rwkv", Container.PTH, torch.float32, (), (".pth",),
        {
            "x060": "load {file} as the model: every conversation starts from the state (0.8.26 and later)",
            "x070": "states = torch.load('{file}'); state = model.generate_zero_state();\n"
            "           state[3 * i + 1] = states['blocks.{{i}}.att.time_state'] for every layer i, on its device\n"
            "           (a state inside of the model is ignored)",
        },
        merged=("x060",),
    ),
    "rwkvcpp": Client(
        "rwkv.cpp", Container.FLOATS, torch.float32, ("x060",), (),
        _always("read {file} into the floats that rwkv_eval takes as state_in"),
    ),
    "hf": Client(
        "flash-linear-attention and Hugging Face", Container.SAFETENSORS, torch.float32, _BOTH, (".safetensors",),
        _always("give each layer's matrices, expanded to the batch, as initial_state"),
    ),
}  # fmt: skip
"""Every client that a state can be written for, by its name for `--to`."""


def refuse_name(client: Client, path: str) -> None:
    """Refuses a name under which a client does not find the file.

    Raises:
        ConfigError: with one that it does.
    """
    if client.suffixes and Path(path).suffix not in client.suffixes:
        endings = " or ".join(client.suffixes)
        raise ConfigError(
            f"OUTPUT {path}: names for {client.title} end in {endings}; call it "
            f"{Path(path).with_suffix(client.suffixes[0])}"
        )


def converted(client: Client, states: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """States as they stand in a client's file, by the same keys.

    Args:
        client: one of `CLIENTS`.
        states: [H, N, N] (head, value, key) of every layer.
        architecture: x060 or x070; "" where the client does not ask.

    Returns:
        Contiguous tensors in the client's orientation and dtype.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    assert architecture or not client.asks_architecture
    written = {}
    for key, state in states.items():
        turned = (state.transpose(1, 2) if client.turns(architecture) else state).contiguous()
        rounded = turned if client.dtype is None else turned.to(client.dtype)
        if not torch.isfinite(rounded).all():
            limit, dtype = torch.finfo(rounded.dtype).max, str(rounded.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{key} holds {float(state.abs().max()):g}, and {client.title} reads {dtype}, which ends at {limit:g}: "
                "train with a lower --lr_init, or use a client that takes bf16"
            )
        written[key] = rounded
    return written


def write(path: str, client: Client, states: Mapping[str, Tensor], architecture: str, n_embd: int = 0) -> None:
    """Writes states for a client, atomically; one that takes a merged model is not written for here.

    Args:
        path: of the file.
        client: one of `CLIENTS`.
        states: as `converted`.
        architecture: as `converted`.
        n_embd: channels of the model, for a client whose file also holds what token shift remembers; 0 is H·N.

    Raises:
        CheckpointError: as `converted`, or the file cannot be written. An existing file is then unchanged.
    """
    assert architecture not in client.merged
    tensors = converted(client, states, architecture)
    match client.container:
        case Container.PTH:
            save_state(path, tensors, tensors[state_key(0)].dtype)
        case Container.SAFETENSORS:
            safetensors.save(Path(path), tensors)
        case Container.FLOATS:
            _write_floats(path, tensors, n_embd)


def _write_floats(path: str, tensors: Mapping[str, Tensor], n_embd: int) -> None:
    """Per layer 2·n_embd zeros, the tokens before the first as the two mixers saw them, then the matrices."""
    heads, size, _ = tensors[state_key(0)].shape
    before = bytes(2 * (n_embd or heads * size) * tensors[state_key(0)].itemsize)
    try:
        with storage.replacing(path) as file:
            for tensor in tensors.values():
                file.write(before)
                file.write(bytes_of(tensor))
    except OSError as error:
        raise CheckpointError(storage.unwritable(path, error, tensors)) from error
