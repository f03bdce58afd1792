"""The model against its definition, written out token by token and head by head in fp64."""

from collections.abc import Mapping

import pytest
import torch
from factories import tiny_parameters, tiny_shape, tiny_states
from torch import Tensor

from src.loading import LoadOptions, build_model
from src.model.recompute import Recompute

SHAPE = tiny_shape(n_layer=2, n_embd=32, head_size=8, dim_att=16, vocab_size=40)
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


def time_mix(z: Tensor, tensors: Mapping[str, Tensor], divisor: int) -> Tensor:
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


def channel_mix(z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    z_k, z_r = (z + (before(z) - z) * tensors[f"time_maa_{group}"].view(-1) for group in "kr")
    hidden = torch.relu(z_k @ tensors["key.weight"].t()).square()
    return torch.sigmoid(z_r @ tensors["receptance.weight"].t()) * (hidden @ tensors["value.weight"].t())


def definition(tensors: Mapping[str, Tensor], tokens: Tensor, divisor: int) -> Tensor:
    """Logits [T, V] of one row of tokens [T].

    Source: "Eagle and Finch" (arXiv 2404.05892), section 4.2.
    """

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    x = layer_norm(tensors["emb.weight"][tokens], tensors, "blocks.0.ln0")
    for layer in range(SHAPE.n_layer):
        block = f"blocks.{layer}."
        x = x + time_mix(layer_norm(x, tensors, f"{block}ln1"), under(f"{block}att."), divisor)
        x = x + channel_mix(layer_norm(x, tensors, f"{block}ln2"), under(f"{block}ffn."))
    return layer_norm(x, tensors, "ln_out") @ tensors["head.weight"].t()


def parameters(scale: float) -> dict[str, Tensor]:
    """Weights and states in fp64; with a small scale every norm's input is so small that its epsilon counts."""
    tensors = {**tiny_parameters(SHAPE), **tiny_states(SHAPE)}
    for name, tensor in tensors.items():
        if name.endswith(("emb.weight", "ln0.weight", "ln0.bias", "output.weight", "ffn.value.weight", "time_state")):
            tensor.mul_(scale)
        if name.endswith("att.value.weight"):
            tensor.mul_(scale)
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("divisor", [1, 4, 8])
@pytest.mark.parametrize("scale", [1.0, 0.003])
def test_logits_and_state_gradients_are_those_of_the_definition(
    scale: float, divisor: int, recompute: Recompute
) -> None:
    tokens = torch.randint(SHAPE.vocab_size, (21,), generator=torch.Generator().manual_seed(3))
    tensors = parameters(scale)
    states = [tensors[name].requires_grad_() for name in SHAPE.state_shapes()]
    expected = definition(tensors, tokens, divisor)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * cotangent).sum(), states)

    options = LoadOptions(torch.device("cpu"), torch.float64, head_size_divisor=divisor)
    model = build_model({name: tensor.detach() for name, tensor in tensors.items()}, SHAPE, options)
    model.set_recomputation([recompute] * SHAPE.n_layer)
    logits = model.logits(model(tokens[None])[0])[0]
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()
    (logits * cotangent).sum().backward()
    for name, gradient in zip(SHAPE.state_shapes(), wanted, strict=True):
        found = model.get_parameter(name).grad
        assert found is not None
        assert found.dtype == torch.float32
        assert (found - gradient).norm() < 1e-6 * gradient.norm()
