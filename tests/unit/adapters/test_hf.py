"""Folders of Hugging Face's `peft`: what is written, read, and asked about. The package itself is asked elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from assertions import refusal
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_states
from torch import Tensor

from src import safetensors
from src.adapters.hf import read_hf
from src.adapters.lora import lora_weight
from src.adapters.trained import Told, read_trained
from src.merge import export_hf, merge

SHAPE = tiny_shape()
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "init_lora_weights": True}
MISS = {"peft_type": "MISS", "r": 8, "bias": "none", "init_weights": True}


def folder_of(folder: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> Path:
    path = folder / "hf"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.save(path / "adapter_model.safetensors", tensors)
    return path


def as_hf(content: dict[str, Tensor], prefix: str = "base_model.model.") -> dict[str, Tensor]:
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "bone": "miss_block"}
    split = {key: key.rpartition(".") for key in content}
    return {f"{prefix}{split[key][0]}.{names[split[key][2]]}": tensor for key, tensor in content.items()}


@pytest.mark.parametrize("kind", ["lora", "bone"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.model."])
def test_what_peft_writes_is_read(kind: str, prefix: str, tmp_path: Path) -> None:
    content = tiny_adapter(tmp_path / "own.pth", SHAPE, kind)
    path = folder_of(tmp_path, LORA if kind == "lora" else MISS, as_hf(content, prefix))
    for named in (path, path / "adapter_model.safetensors"):
        trained = read_trained(named, SHAPE)
        assert (trained.kind, trained.r, trained.scale) == (kind, 8, 2.0 if kind == "lora" else 1.0)
        held = {
            f"{key.removesuffix('weight')}{name}": tensor
            for key, adapter in trained.adapters.items()
            for name, tensor in adapter.parameters.items()
        }
        assert held.keys() == content.keys()
        assert all(torch.equal(held[key], tensor) for key, tensor in content.items())


@pytest.mark.parametrize("kind", ["lora", "bone"])
def test_adapters_of_rwkv7_s_hugging_face_form_are_read(kind: str, tmp_path: Path) -> None:
    shape = tiny_shape(architecture="x070")
    content = tiny_adapter(tmp_path / "own.pth", shape, kind)
    theirs = {
        "blocks": "model.layers", "att.receptance": "attn.r_proj", "att.key": "attn.k_proj", "att.value": "attn.v_proj",
        "att.output": "attn.o_proj",
    }  # fmt: skip
    named = as_hf(content)
    for own, hf in theirs.items():
        named = {key.replace(own, hf): tensor for key, tensor in named.items()}
    assert "base_model.model.model.layers.1.attn.k_proj." in "".join(named)
    trained = read_trained(folder_of(tmp_path, LORA if kind == "lora" else MISS, named), shape)
    assert list(trained.adapters) == list(shape.matrix_names())
    for key, adapter in trained.adapters.items():
        for name, tensor in adapter.parameters.items():
            assert torch.equal(tensor, content[key.removesuffix("weight") + name])


def test_scale_by_the_root(tmp_path: Path) -> None:
    content = tiny_adapter(tmp_path / "own.pth", SHAPE, "lora")
    path = folder_of(tmp_path, {**LORA, "use_rslora": True}, as_hf(content))
    assert read_trained(path, SHAPE).scale == pytest.approx(16 / 8**0.5)


def test_without_its_configuration_the_flags_are_asked_for(tmp_path: Path) -> None:
    content = tiny_adapter(tmp_path / "own.pth", SHAPE, "lora")
    file = folder_of(tmp_path, LORA, as_hf(content)) / "adapter_model.safetensors"
    file.with_name("adapter_config.json").unlink()
    assert "give --type lora or" in refusal(lambda: read_trained(file, SHAPE))
    assert read_trained(file, SHAPE, Told("lora", alpha=16)).scale == 2.0
    assert "without adapter_config.json" in refusal(lambda: read_trained(file.parent, SHAPE))


def test_some_layers(tmp_path: Path) -> None:
    content = tiny_adapter(tmp_path / "own.pth", SHAPE, "lora")
    first = {key: tensor for key, tensor in as_hf(content).items() if ".0." in key}
    path = folder_of(tmp_path, {**LORA, "layers_to_transform": [0]}, first)
    assert len(read_trained(path, SHAPE).adapters) == 8


@pytest.mark.parametrize("key", ["blocks.0.att.time_state", "ln_out.bias"])
def test_other_tensors_are_not_taken_from_there(key: str, tmp_path: Path) -> None:
    """States in such files, as made for web-rwkv, are transposed."""
    content = as_hf(tiny_adapter(tmp_path / "own.pth", SHAPE, "lora"))
    path = folder_of(tmp_path, LORA, {**content, key: torch.zeros(4, 8, 8)})
    assert f"no place for, {key} among them" in refusal(lambda: read_trained(path, SHAPE))


class TestBat:
    """peft's belongs to rows of tiles, RWKV-PEFT's to columns; on square matrices the shapes are the same."""

    def blocks(self, by_output: bool) -> dict[str, Tensor]:
        sizes = SHAPE.parameter_shapes()
        axis = 0 if by_output else 1
        return {
            f"{key.removesuffix('weight')}bone": torch.randn(sizes[key][axis] // 8, 8, 8) * 0.05
            for key in SHAPE.matrix_names()
        }

    def test_the_writer_is_asked_for(self, tmp_path: Path) -> None:
        path = folder_of(tmp_path, {**MISS, "init_weights": "bat"}, as_hf(self.blocks(True)))
        assert "give --writer hf or --writer rwkv-peft" in refusal(lambda: read_trained(path, SHAPE))
        assert read_trained(path, SHAPE, Told(writer="hf")).by_output
        message = refusal(lambda: read_trained(path, SHAPE, Told(writer="rwkv-peft")))
        assert "as peft writes them: give --writer hf" in message

    def test_both_merge_by_their_own_formula(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth")
        square = {key: tensor for key, tensor in self.blocks(True).items() if "att" in key}
        path = folder_of(tmp_path, {**MISS, "init_weights": "bat"}, as_hf(square))
        for writer in ("hf", "rwkv-peft"):
            merge(tmp_path / "base.pth", path, tmp_path / f"{writer}.pth", Told(writer=writer))
        base, hf, rwkv = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in ("base", "hf", "rwkv-peft"))
        key = "blocks.0.att.key.weight"
        weight, block = base[key], square["blocks.0.att.key.bone"]
        tile = weight[8:16, :8]
        assert torch.allclose(hf[key][8:16, :8], tile + tile @ block[1] + block[1], atol=1e-6)
        assert torch.allclose(rwkv[key][8:16, :8], tile + tile @ block[0] + block[0], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**LORA, "peft_type": "ADALORA"}, "peft_type ADALORA is unknown here"),
        ({**LORA, "use_dora": True}, "use_dora is true, which cannot be read here"),
        ({**LORA, "bias": "all"}, 'bias is "all"'),
        ({**LORA, "alpha_pattern": {"att.key": 3}}, "alpha_pattern is"),
        ({**LORA, "modules_to_save": ["head"]}, 'modules_to_save is ["head"]'),
        ({**LORA, "init_lora_weights": "pissa"}, 'started as "pissa", which changes the base model'),
        ({**MISS, "init_weights": "mini"}, 'started as "mini"'),
        ({**LORA, "r": 0}, "r is 0, expected a whole number from 1"),
        ({**LORA, "r": True}, "r is true, expected a whole number from 1"),
        ({**LORA, "lora_alpha": None}, "lora_alpha is null, expected a number"),
        ({**LORA, "lora_alpha": math.nan}, "lora_alpha is NaN, expected a number"),
        ({**LORA, "lora_alpha": math.inf}, "lora_alpha is Infinity, expected a number"),
        ({**LORA, "lora_alpha": True}, "lora_alpha is true, expected a number"),
        ({**LORA, "use_rslora": "yes"}, 'use_rslora is "yes", expected true or false'),
        ({**LORA, "r": 4}, "r 8, and what stands beside it says r 4"),
        ({**MISS}, "holds LoRA tensors, not bone (what stands beside it)"),
    ],
)
def test_what_cannot_be_read_is_refused(config: dict[str, object], expected: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path, config, as_hf(tiny_adapter(tmp_path / "own.pth", SHAPE, "lora")))
    assert expected in refusal(lambda: read_trained(path, SHAPE))


class TestExport:
    def exported(self, folder: Path, kind: str) -> dict[str, Tensor]:
        tiny_checkpoint(folder / "base.pth", dtype=torch.bfloat16)
        content = tiny_adapter(folder / "own.pth", SHAPE, kind)
        export_hf(folder / "base.pth", folder / "own.pth", folder / "hf", told(kind))
        assert {path.name for path in (folder / "hf").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        return content

    @pytest.mark.parametrize("kind", ["lora", "bone"])
    def test_names_values_and_configuration(self, kind: str, tmp_path: Path) -> None:
        content = self.exported(tmp_path, kind)
        tensors = safetensors.load(tmp_path / "hf" / "adapter_model.safetensors", "adapter file")
        assert tensors.keys() == as_hf(content).keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in as_hf(content).items())
        config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
        assert config["peft_type"] == ("LORA" if kind == "lora" else "MISS")
        assert config["base_model_name_or_path"] == "base.pth"
        assert config["r"] == 8
        assert config["target_modules"] == [
            *(f"att.{name}" for name in ("receptance", "key", "value", "output", "gate")),
            *(f"ffn.{name}" for name in ("key", "receptance", "value")),
        ]
        if kind == "lora":
            assert config["lora_alpha"] == 16

    @pytest.mark.parametrize("kind", ["lora", "pissa", "bone"])
    def test_rwkv7_s_has_the_names_of_its_hugging_face_form(self, kind: str, tmp_path: Path) -> None:
        shape = tiny_shape(architecture="x070")
        tiny_checkpoint(tmp_path / "base.pth", architecture="x070", dtype=torch.bfloat16)
        tiny_adapter(tmp_path / "own.pth", shape, kind)
        exported = export_hf(tmp_path / "base.pth", tmp_path / "own.pth", tmp_path / "hf", told(kind))
        assert "rwkv7-hf" in exported.names
        last = "miss_block" if kind == "bone" else "lora_A.weight"
        held = safetensors.load(tmp_path / "hf" / "adapter_model.safetensors", "adapter file")
        modules = (*(f"attn.{letter}_proj" for letter in "rkvo"), "ffn.key", "ffn.value")
        expected = {f"base_model.model.model.layers.{n}.{module}.{last}" for n in range(2) for module in modules}
        assert {key for key in held if not key.endswith("lora_B.weight")} == expected
        config = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
        assert sorted(config["target_modules"]) == sorted(modules)
        merge(tmp_path / "base.pth", tmp_path / "own.pth", tmp_path / "a.pth", told(kind))
        merge(tmp_path / "base.pth", tmp_path / "hf", tmp_path / "b.pth")
        a, b = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in "ab")
        assert all(torch.allclose(a[key].float(), b[key].float(), atol=1e-6, rtol=1e-2) for key in a)

    @pytest.mark.parametrize("kind", ["lora", "bone", "pissa"])
    def test_the_folder_merges_like_the_file(self, kind: str, tmp_path: Path) -> None:
        self.exported(tmp_path, kind)
        merge(tmp_path / "base.pth", tmp_path / "own.pth", tmp_path / "a.pth", told(kind))
        merge(tmp_path / "base.pth", tmp_path / "hf", tmp_path / "b.pth")
        a, b = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in "ab")
        assert all(torch.allclose(a[key].float(), b[key].float(), atol=1e-6, rtol=1e-2) for key in a)
        if kind == "pissa":
            _, said = read_hf(tmp_path / "hf")
            assert said == {"method": "lora", "r": 16, "alpha": 16.0, "scale": 1.0}

    @pytest.mark.parametrize(
        ("kind", "further", "expected"),
        [
            ("bat", {}, "holds a Bat, which peft computes otherwise"),
            ("bone", {"ln_out.bias": torch.zeros(32)}, "holds 1 tensors beside its adapter, ln_out.bias among them"),
            ("bone", tiny_states(SHAPE), "holds 2 tensors beside its adapter, blocks.0.att.time_state among them"),
        ],
    )
    def test_what_has_no_place_is_refused(
        self, kind: str, further: dict[str, Tensor], expected: str, tmp_path: Path
    ) -> None:
        tiny_checkpoint(tmp_path / "base.pth")
        tiny_adapter(tmp_path / "own.pth", SHAPE, kind, further=further)
        assert expected in refusal(lambda: export_hf(tmp_path / "base.pth", tmp_path / "own.pth", tmp_path / "hf"))
        assert not (tmp_path / "hf").exists()

    def test_places_that_cannot_be(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth")
        tiny_adapter(tmp_path / "own.pth", SHAPE, "bone")
        (tmp_path / "hf").write_text("")
        assert "is a file" in refusal(lambda: export_hf(tmp_path / "base.pth", tmp_path / "own.pth", tmp_path / "hf"))
        nowhere = tmp_path / "nowhere" / "hf"
        assert "cannot be made" in refusal(lambda: export_hf(tmp_path / "base.pth", tmp_path / "own.pth", nowhere))


def told(kind: str) -> Told:
    return Told(kind, alpha=16.0 if kind == "lora" else 0.0)


def test_the_residual_and_the_first_factors_are_the_base_model() -> None:
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    assert torch.allclose(lora_weight(lora_weight(weight, a, b, -1.0), a, b), weight, atol=1e-6)
