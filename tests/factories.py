"""Small models and states, made on the spot."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from src.checkpoint import save_model, save_state
from src.model.rwkv6 import RWKV6Shape
from src.model.rwkv7 import RWKV7Shape
from src.model.shape import ModelShape

ARCHITECTURES = ("x060", "x070")
DEFAULT_ARCHITECTURE = "x060"
"""What `tiny_shape` makes unless it is told; tests of every architecture set it."""


def tiny_shape(
    n_layer: int = 2,
    n_embd: int = 32,
    head_size: int = 8,
    vocab_size: int = 257,
    *,
    dim_att: int = 0,
    dim_ffn: int = 0,
    mix_lora_width: int = 8,
    decay_lora_width: int = 16,
    holds_idle: bool = False,
    architecture: str = "",
) -> ModelShape:
    """Sizes of a model small enough for a unit test; 0 means the usual rule, "" DEFAULT_ARCHITECTURE."""
    if (architecture or DEFAULT_ARCHITECTURE) == "x070":
        assert not dim_att
        assert n_embd % head_size == 0
        return RWKV7Shape(
            n_layer=n_layer,
            n_embd=n_embd,
            dim_att=n_embd,
            dim_ffn=dim_ffn or 4 * n_embd,
            vocab_size=vocab_size,
            n_head=n_embd // head_size,
            head_size=head_size,
            decay_width=decay_lora_width,
            rate_width=12,
            value_width=6,
            gate_width=20,
            holds_idle=holds_idle,
        )
    dim_att = dim_att or n_embd
    assert dim_att % head_size == 0
    return RWKV6Shape(
        n_layer=n_layer,
        n_embd=n_embd,
        dim_att=dim_att,
        dim_ffn=dim_ffn or n_embd * 7 // 2,
        vocab_size=vocab_size,
        n_head=dim_att // head_size,
        head_size=head_size,
        mix_lora_width=mix_lora_width,
        decay_lora_width=decay_lora_width,
    )


def tiny_parameters(shape: ModelShape, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of a model in which every part matters: a fresh model's zeros and tiny values are random.

    A freshly initialised model is blind to most mistakes, because its output matrices, LoRAs and
    biases are zero.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    parameters = {}
    for key, tensor in shape.fresh_parameters(seed, torch.float32).items():
        if not tensor.any() or key == "emb.weight":
            scale = 1 / math.sqrt(tensor.shape[-1]) if tensor.dim() > 1 else 0.1
            tensor = torch.randn(tensor.shape, generator=generator) * scale
        elif key.endswith(("_w2", ".w2", ".a2", ".v2", ".g2", "r_k")):
            tensor = tensor * 10
        elif key.endswith((".k_k", ".k_a")):
            tensor = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        elif key.endswith(("ln0.weight", "ln1.weight", "ln2.weight", "ln_out.weight", "ln_x.weight")):
            tensor = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        if shape.architecture == "x070" and key in shape.matrix_names():
            # A fresh model's are up to thirty times smaller, and with them what the recurrence adds.
            tensor = torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor.shape[-1])
        parameters[key] = tensor.to(dtype)
    return parameters


def tiny_states(
    shape: ModelShape, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.5
) -> dict[str, Tensor]:
    """A random initial state for every layer, [H, N, N], not symmetric."""
    generator = torch.Generator().manual_seed(seed + 2)
    return {
        key: (torch.randn(wanted, generator=generator) * scale).to(dtype)
        for key, wanted in shape.state_shapes().items()
    }


def tiny_checkpoint(
    path: str | os.PathLike[str],
    n_layer: int = 2,
    n_embd: int = 32,
    head_size: int = 8,
    vocab_size: int = 257,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    with_state: bool = False,
    **sizes: Any,
) -> ModelShape:
    """Writes a model file of `tiny_parameters`, with `tiny_states` when asked for.

    Args:
        sizes: the keyword arguments of `tiny_shape`.
    """
    shape = tiny_shape(n_layer, n_embd, head_size, vocab_size, **sizes)
    states = tiny_states(shape, seed) if with_state else {}
    save_model(path, {**tiny_parameters(shape, seed), **states}, dtype)
    return shape


def tiny_state_file(
    path: str | os.PathLike[str], shape: ModelShape, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Writes a state file of `tiny_states` and returns what it holds."""
    states = tiny_states(shape, seed, dtype)
    save_state(path, states, dtype)
    return states


def tiny_adapter(
    path: str | os.PathLike[str],
    shape: ModelShape,
    kind: str,
    r: int = 8,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    scale: float = 0.2,
    further: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Writes a random adapter on every matrix under RWKV-PEFT's keys, without JSON; of PiSSA also `init_pissa.pth`.

    Args:
        kind: lora, pissa, bone or bat.
        scale: size of what it adds to a matrix's result.
        further: other tensors of the file.

    Returns:
        What the file holds.
    """
    generator = torch.Generator().manual_seed(seed + 3)
    sizes = shape.parameter_shapes()

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) * scale / math.sqrt(size[-1])

    tensors, first = {}, {}
    for key in shape.matrix_names():
        module, (out_features, in_features) = key.removesuffix(".weight"), sizes[key]
        if kind in ("lora", "pissa"):
            for name, size in (("lora_A", (r, in_features)), ("lora_B", (out_features, r))):
                tensors[f"{module}.{name}"] = drawn(*size) * 2
                first[f"{module}.init_{name}"] = drawn(*size) * 2
        else:
            tensors[f"{module}.bone"] = drawn(*((r, out_features) if kind == "bone" else (in_features // r, r, r)))
    if kind == "pissa":
        torch.save(first, os.path.join(os.path.dirname(path), "init_pissa.pth"))
    content = {key: tensor.to(dtype) for key, tensor in tensors.items()} | dict(further or {})
    torch.save(content, path)
    return content
