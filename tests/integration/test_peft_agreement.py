"""Hugging Face's `peft`, which nobody here wrote, computes the same LoRA, PiSSA and Bone (MiSS there), and another Bat.

Both sides adapt the matrices of one small network in fp32. Slow, because the package loads transformers; skipped where
it is not installed (tests/requirements.txt).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_adapter, tiny_checkpoint, tiny_parameters, tiny_shape
from torch import Tensor, nn

from src.adapters.adapter import Adapter
from src.adapters.bone import Bat, Bone, bat_weight, bone_weight
from src.adapters.lora import LoRA, lora_weight, principal_factors
from src.adapters.trained import Told, read_trained
from src.merge import export_hf, merge
from src.model.layers import Linear
from src.model.rwkv7 import hf_name
from src.quant import DequantizationWorkspace, FrozenLinear

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Relative to the norm, fp32; less than 1e-6 was measured after five steps of Adam, torch 2.13 and peft 0.21.2."""

SHAPE = tiny_shape()
R = 8
INNER, OUTER = 48, 80
"""Neither is a multiple of 12."""


@pytest.fixture(scope="module")
def peft() -> Iterator[Any]:
    """The package; what it and transformers warn of at import is not this program's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("peft", reason="the reference for adapters is not installed")


class Network(nn.Module):
    """key, an activation, value: as a channel mix has them."""

    def __init__(self, key: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.key, self.value = key, value

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.value(torch.relu(self.key(x)) ** 2)
        return y


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(OUTER, INNER, generator=generator) / INNER**0.5,
        torch.randn(INNER, OUTER, generator=generator) / OUTER**0.5,
    )


def linear(kind: Callable[..., Any], weight: Tensor) -> Any:
    made = kind(weight.shape[1], weight.shape[0], **({"bias": False} if kind is nn.Linear else {}))
    made.weight.data = weight.clone()
    return made


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def config_of(peft: Any, kind: str, r: int) -> Any:
    targets = ["key", "value"]
    if kind in ("lora", "pissa"):
        start = "pissa" if kind == "pissa" else True
        alpha = r if kind == "pissa" else 2 * r
        return peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, init_lora_weights=start)
    return peft.MissConfig(r=r, target_modules=targets, init_weights="bat" if kind == "bat" else True)


def theirs(peft: Any, kind: str, r: int) -> Any:
    """Their network with parameters that are not the start's, where that would hide a half of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = peft.get_peft_model(
            Network(*(linear(nn.Linear, weight) for weight in weights())), config_of(peft, kind, r)
        )
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (kind != "pissa" or "lora_B" in name):
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def parameters_of(module: Any, kind: str) -> dict[str, Tensor]:
    """One adapted matrix's parameters by their names here."""
    if kind in ("lora", "pissa"):
        return {"lora_A": module.lora_A["default"].weight, "lora_B": module.lora_B["default"].weight}
    return {"bone": module.miss_block["default"]}


def ours(model: Any, kind: str, quant: str = "none") -> Network:
    """The same network here, with copies of their parameters and frozen matrices.

    If these are packed here, theirs become what is unpacked.
    """
    adapted = []
    for module in (model.base_model.model.key, model.base_model.model.value):
        parameters = {name: values.detach().clone() for name, values in parameters_of(module, kind).items()}
        frozen = module.base_layer.weight.data
        base = linear(Linear, frozen)
        if quant != "none":
            base = FrozenLinear.from_weight(frozen, quant, torch.float32, workspace=DequantizationWorkspace())
            frozen.copy_(base.dequantized())
        if kind in ("lora", "pissa"):
            adapted.append(LoRA(base, parameters, scale=2.0 if kind == "lora" else 1.0))
        else:
            adapted.append((Bone if kind == "bone" else Bat)(base, parameters))
    return Network(*adapted)


CASES = [("lora", 6), ("pissa", 6), ("bone", 8), ("bone", 12)]


@pytest.mark.parametrize(("kind", "r"), CASES)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_outputs_gradients_five_steps_and_merged_weights(
    kind: str, r: int, quant: str, optimizer: Any, peft: Any
) -> None:
    their_model = theirs(peft, kind, r)
    our_model = ours(their_model, kind, quant)
    pairs = [
        (parameter, parameters_of(getattr(their_model.base_model.model, name), kind)[part])
        for name in ("key", "value")
        for part, parameter in getattr(our_model, name).named_parameters()
        if not part.startswith("base")
    ]
    rate = 1e-2 if optimizer is torch.optim.SGD else 1e-3
    optimizers = [optimizer([pair[side] for pair in pairs], lr=rate) for side in (0, 1)]
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        x, target = torch.randn(3, 11, INNER, generator=generator), torch.randn(3, 11, INNER, generator=generator)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = [model(one) for model, one in zip((our_model, their_model), inputs, strict=True)]
        assert relative(outputs[0], outputs[1]) < TOLERANCE
        for output, one in zip(outputs, optimizers, strict=True):
            one.zero_grad()
            ((output - target) ** 2).mean().backward()
        assert relative(inputs[0].grad, inputs[1].grad) < TOLERANCE  # type: ignore[arg-type]
        for mine, other in pairs:
            assert relative(mine.grad, other.grad) < TOLERANCE  # type: ignore[arg-type]
        for one in optimizers:
            one.step()
    for mine, other in pairs:
        assert relative(mine, other) < TOLERANCE
    merged = their_model.merge_and_unload()
    for name in ("key", "value"):
        adapter: Adapter = getattr(our_model, name)
        own = [parameter.detach() for parameter in adapter.trained()]
        base = adapter.base.dequantized() if quant != "none" else adapter.base.weight.detach()
        scale = {"scale": 2.0} if kind == "lora" else {}
        mine = bone_weight(base, *own) if kind == "bone" else lora_weight(base, *own, **scale)
        assert relative(mine, getattr(merged, name).weight) < TOLERANCE


def test_pissa_starts_at_the_same_matrices(peft: Any) -> None:
    """The factors' signs and rotations are free; their product, and what is left of W, are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            Network(*(linear(nn.Linear, weight) for weight in weights())), config_of(peft, "pissa", 6)
        )
    for name, weight in zip(("key", "value"), weights(), strict=True):
        module = getattr(model.base_model.model, name)
        expected = module.lora_B["default"].weight @ module.lora_A["default"].weight
        a, b = principal_factors(weight, 6, 60, seed=0)
        assert relative(b @ a, expected) < 1e-4
        assert relative(weight - b @ a, module.base_layer.weight) < 1e-4


def test_their_bat_belongs_to_rows_of_tiles(peft: Any) -> None:
    model = theirs(peft, "bat", R)
    before = {name: getattr(model.base_model.model, name).base_layer.weight.clone() for name in ("key", "value")}
    blocks = {name: getattr(model.base_model.model, name).miss_block["default"].detach() for name in before}
    merged = model.merge_and_unload()
    for name, weight in before.items():
        expected = getattr(merged, name).weight
        assert relative(bat_weight(weight, blocks[name], by_output=True), expected) < TOLERANCE
        assert blocks[name].shape[0] == weight.shape[0] // R
    # On a square matrix theirs has the shape of RWKV-PEFT's and another meaning.
    square = torch.randn(48, 48)
    assert relative(bat_weight(square, blocks["value"]), bat_weight(square, blocks["value"], by_output=True)) > 0.01


class Model(nn.Module):
    """The matrices of a model under RWKV's names, for their loader."""

    def __init__(self, tensors: dict[str, Tensor], names: Iterable[str] = SHAPE.matrix_names()) -> None:
        super().__init__()
        for key in names:
            *path, name, _ = key.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            module.add_module(name, linear(nn.Linear, tensors[key]))


@pytest.mark.parametrize("kind", ["lora", "pissa", "bone"])
def test_their_loader_reads_what_export_writes(kind: str, peft: Any, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth")
    tiny_adapter(tmp_path / "own.pth", SHAPE, kind)
    told = Told(kind, alpha=4.0 if kind == "lora" else 0.0)
    export_hf(tmp_path / "base.pth", tmp_path / "own.pth", tmp_path / "hf", told)
    merge(tmp_path / "base.pth", tmp_path / "own.pth", tmp_path / "merged.pth", told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(Model(tiny_parameters(SHAPE)), str(tmp_path / "hf")).merge_and_unload()
    expected = torch.load(tmp_path / "merged.pth", weights_only=True)
    found = model.state_dict()
    assert found.keys() == set(SHAPE.matrix_names())
    for key, weight in found.items():
        assert relative(weight, expected[key]) < TOLERANCE


@pytest.mark.parametrize("kind", ["lora", "pissa", "bone"])
def test_their_loader_reads_it_on_rwkv7_in_hugging_face_s_form(kind: str, peft: Any, tmp_path: Path) -> None:
    shape = tiny_shape(architecture="x070")
    tiny_checkpoint(tmp_path / "base.pth", architecture="x070")
    tiny_adapter(tmp_path / "own.pth", shape, kind)
    told = Told(kind, alpha=4.0 if kind == "lora" else 0.0)
    export_hf(tmp_path / "base.pth", tmp_path / "own.pth", tmp_path / "hf", told)
    base, merged = {}, {}
    merge(tmp_path / "base.pth", tmp_path / "own.pth", tmp_path / "merged.pth", told)
    for path, held in (("base.pth", base), ("merged.pth", merged)):
        held |= {hf_name(key): tensor for key, tensor in torch.load(tmp_path / path, weights_only=True).items()}
    names = [hf_name(key) for key in shape.matrix_names()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(Model(base, names), str(tmp_path / "hf")).merge_and_unload()
    for key, weight in model.state_dict().items():
        assert relative(weight, merged[key]) < TOLERANCE
        assert relative(weight, base[key]) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["lora", "bone", "bat"])
def test_what_their_writer_writes_is_read(kind: str, peft: Any, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Model(tiny_parameters(SHAPE)), config_of(peft, kind, R))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(str(tmp_path / "hf"))
    told = Told(writer="hf") if kind == "bat" else Told()
    assert len(read_trained(tmp_path / "hf", SHAPE, told).adapters) == 8
    merge(tmp_path / "base.pth", tmp_path / "hf", tmp_path / "merged.pth", told)
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)
    for key, weight in model.merge_and_unload().state_dict().items():
        assert relative(merged[key], weight) < TOLERANCE
