"""The model against its definition, written out token by token and head by head in fp64."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from factories import tiny_parameters, tiny_shape, tiny_states
from torch import Tensor

from src.checkpoint import open_checkpoint
from src.loading import LoadOptions, build_model
from src.model.recompute import Recompute
from src.model.shape import ModelShape

SHAPES = {
    "x060": tiny_shape(n_layer=2, n_embd=32, head_size=8, dim_att=16, vocab_size=40),
    "x070": tiny_shape(n_layer=3, n_embd=32, head_size=8, vocab_size=40, holds_idle=True, architecture="x070"),
}
TOLERANCE = 1e-12
"""Both ways in fp64, relative to the largest logit. Measured: 5e-16 at most, torch 2.13 on an x86-64 CPU. Anything
narrower inside, an epsilon that is off or a transposed state are far beyond it."""


def layer_norm(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def before(z: Tensor) -> Tensor:
    """What stands before each token of [T, C]; zero before the first."""
    return torch.cat((torch.zeros_like(z[:1]), z[:-1]))


def time_mix_6(z: Tensor, tensors: Mapping[str, Tensor], divisor: int) -> Tensor:
    """Source: "Eagle and Finch" (arXiv 2404.05892), section 4.2."""
    heads, size = tensors["time_faaaa"].shape
    delta = before(z) - z
    hidden = torch.tanh((z + delta * tensors["time_maa_x"].view(-1)) @ tensors["time_maa_w1"]).view(len(z), 5, -1)
    inputs = {
        group: z + delta * (tensors[f"time_maa_{group}"].view(-1) + hidden[:, place] @ tensors["time_maa_w2"][place])
        for place, group in enumerate("wkvrg")
    }
    r, k, v = (
        (inputs[group] @ tensors[f"{name}.weight"].t()).view(-1, heads, size)
        for group, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    w_raw = (
        tensors["time_decay"].view(-1) + torch.tanh(inputs["w"] @ tensors["time_decay_w1"]) @ tensors["time_decay_w2"]
    )
    decay = torch.exp(-torch.exp(w_raw)).view(-1, heads, size)
    rows = []
    state = tensors["time_state"].clone()  # head, value, key
    for t in range(len(z)):
        outer = v[t][:, :, None] * k[t][:, None, :]
        rows.append(((state + tensors["time_faaaa"][:, None, :] * outer) * r[t][:, None, :]).sum(-1))
        state = decay[t][:, None, :] * state + outer
    y = torch.stack(rows)
    centred = y - y.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5 * divisor**2)
    normed = scaled.view(len(z), -1) * tensors["ln_x.weight"] + tensors["ln_x.bias"]
    gate = inputs["g"] @ tensors["gate.weight"].t()
    return (normed * gate * torch.sigmoid(gate)) @ tensors["output.weight"].t()


def channel_mix_6(z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    z_k, z_r = (z + (before(z) - z) * tensors[f"time_maa_{group}"].view(-1) for group in "kr")
    hidden = torch.relu(z_k @ tensors["key.weight"].t()).square()
    return torch.sigmoid(z_r @ tensors["receptance.weight"].t()) * (hidden @ tensors["value.weight"].t())


def time_mix_7(z: Tensor, tensors: Mapping[str, Tensor], first: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is added, and the values that the layers after the first one take.

    Source: "RWKV-7 Goose" (arXiv 2503.14456), section 4.
    """
    heads, size = tensors["r_k"].shape
    delta = before(z) - z
    inputs = {letter: z + delta * tensors[f"x_{letter}"].view(-1) for letter in "rwkvag"}

    def base(name: str) -> Tensor:
        return tensors[name].view(-1)

    def sigmoid(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    r, k, own = (
        inputs[letter] @ tensors[f"{name}.weight"].t()
        for letter, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
    )
    decay = torch.exp(-math.exp(-0.5) * sigmoid(base("w0") + torch.tanh(inputs["w"] @ tensors["w1"]) @ tensors["w2"]))
    rate = sigmoid(base("a0") + inputs["a"] @ tensors["a1"] @ tensors["a2"])
    gate = sigmoid(inputs["g"] @ tensors["g1"]) @ tensors["g2"]
    v = own
    if first is not None:
        v = own + (first - own) * sigmoid(base("v0") + inputs["v"] @ tensors["v1"] @ tensors["v2"])
    by_head = (len(z), heads, size)
    removal = (k * base("k_k")).view(by_head)
    removal = removal / removal.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    k = (k * (1 + (rate - 1) * base("k_a"))).view(by_head)
    r, v, decay, rate = (part.view(by_head) for part in (r, v, decay, rate))
    rows = []
    state = tensors["time_state"].clone()  # head, value, key
    for t in range(len(z)):
        held = (state * removal[t][:, None, :]).sum(-1, keepdim=True)
        state = state * decay[t][:, None, :] - held * (rate * removal)[t][:, None, :]
        state = state + v[t][:, :, None] * k[t][:, None, :]
        rows.append((state * r[t][:, None, :]).sum(-1))
    y = torch.stack(rows)
    centred = y - y.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 64e-5)
    normed = scaled.view(len(z), -1) * tensors["ln_x.weight"] + tensors["ln_x.bias"]
    bonus = (r * k * tensors["r_k"]).sum(-1, keepdim=True) * v
    return ((normed + bonus.view(len(z), -1)) * gate) @ tensors["output.weight"].t(), own


def channel_mix_7(z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    mixed = z + (before(z) - z) * tensors["x_k"].view(-1)
    return torch.relu(mixed @ tensors["key.weight"].t()).square() @ tensors["value.weight"].t()


def definition(shape: ModelShape, tensors: Mapping[str, Tensor], tokens: Tensor, divisor: int = 8) -> Tensor:
    """Logits [T, V] of one row of tokens [T]."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    x = layer_norm(tensors["emb.weight"][tokens], tensors, "blocks.0.ln0")
    first: Tensor | None = None
    for layer in range(shape.n_layer):
        block = f"blocks.{layer}."
        z = layer_norm(x, tensors, f"{block}ln1")
        if shape.architecture == "x060":
            x = x + time_mix_6(z, under(f"{block}att."), divisor)
        else:
            added, own = time_mix_7(z, under(f"{block}att."), first)
            first = own if first is None else first
            x = x + added
        channel_mix = channel_mix_6 if shape.architecture == "x060" else channel_mix_7
        x = x + channel_mix(layer_norm(x, tensors, f"{block}ln2"), under(f"{block}ffn."))
    return layer_norm(x, tensors, "ln_out") @ tensors["head.weight"].t()


def parameters(shape: ModelShape, scale: float) -> dict[str, Tensor]:
    """Weights and states in fp64; with a small scale every norm's input is so small that its epsilon counts."""
    tensors = {**tiny_parameters(shape), **tiny_states(shape)}
    for name, tensor in tensors.items():
        if name.endswith(("emb.weight", "ln0.weight", "ln0.bias", "output.weight", "ffn.value.weight", "time_state")):
            tensor.mul_(scale)
        if name.endswith("att.value.weight"):
            tensor.mul_(scale)
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize(("architecture", "divisor"), [("x060", 1), ("x060", 4), ("x060", 8), ("x070", 8)])
@pytest.mark.parametrize("scale", [1.0, 0.003])
def test_logits_and_state_gradients_are_those_of_the_definition(
    scale: float, architecture: str, divisor: int, recompute: Recompute
) -> None:
    shape = SHAPES[architecture]
    tokens = torch.randint(shape.vocab_size, (21,), generator=torch.Generator().manual_seed(3))
    tensors = parameters(shape, scale)
    states = [tensors[name].requires_grad_() for name in shape.state_shapes()]
    expected = definition(shape, tensors, tokens, divisor)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * cotangent).sum(), states)

    options = LoadOptions(torch.device("cpu"), torch.float64, head_size_divisor=divisor)
    model = build_model({name: tensor.detach() for name, tensor in tensors.items()}, shape, options)
    model.set_recomputation([recompute] * shape.n_layer)
    logits = model.logits(model(tokens[None])[0])[0]
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()
    (logits * cotangent).sum().backward()
    for name, gradient in zip(shape.state_shapes(), wanted, strict=True):
        found = model.get_parameter(name).grad
        assert found is not None
        assert found.dtype == torch.float32
        assert (found - gradient).norm() < 1e-6 * gradient.norm()


def reversal_of(digits: Tensor) -> Tensor:
    """What the reversal models were trained on: the digits, a comma, the digits reversed, an end."""
    return torch.cat((digits, torch.tensor([10]), digits.flip(0), torch.tensor([11])))


DRAWN = torch.randint(10, (60,), generator=torch.Generator().manual_seed(3))
REAL = [
    pytest.param("834k-bytes", DRAWN, 1e-6, id="text model"),
    pytest.param("reverse-n16", DRAWN, 2e-6, id="reversal model, digits"),
    pytest.param("reverse-n16", reversal_of(DRAWN[:50]), 4e-5, id="reversal model at work"),
]


@pytest.mark.parametrize(("name", "tokens", "in_fp32"), REAL)
def test_a_real_models_logits_are_those_of_the_definition(
    name: str, tokens: Tensor, in_fp32: float, real_inputs: Path
) -> None:
    """Measured, of the largest logit: fp64 4e-15 at most; fp32 3e-7, 8e-7, and 8e-6 at work, whose logits reach 40."""
    checkpoint = open_checkpoint(real_inputs / f"tiny-rwkv7-{name}.pth")
    shape = checkpoint.info.shape
    tensors = {**checkpoint, **tiny_states(shape, scale=0.0)}
    expected = definition(shape, {key: tensor.double() for key, tensor in tensors.items()}, tokens)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, in_fp32)):
        model = build_model(checkpoint, shape, LoadOptions(torch.device("cpu"), dtype))
        with torch.no_grad():
            logits = model.logits(model(tokens[None])[0])[0]
        assert (logits - expected).abs().max() < tolerance * expected.abs().max()
