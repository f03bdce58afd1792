"""What a file is, by keys, shapes, the JSON beside it and the user; and what is not taken for another thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from assertions import refusal
from factories import tiny_adapter, tiny_parameters, tiny_shape, tiny_state_file, tiny_states
from torch import Tensor

from src.adapters.trained import Told, Trained, read_trained
from src.model.layers import Linear

SHAPE = tiny_shape()
KINDS = ("lora", "pissa", "bone", "bat")
SAID = {kind: {"method": kind, "r": 8, "quant": "none"} for kind in KINDS}
SAID["lora"] |= {"alpha": 16.0, "scale": 2.0}


def described(path: Path, **said: object) -> None:
    path.with_suffix(".json").write_text(json.dumps(said))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    torch.save(dict(change(torch.load(path, weights_only=True))), path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rwkv-0.pth"


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_by_the_json(self, kind: str, file: Path) -> None:
        content = tiny_adapter(file, SHAPE, kind)
        described(file, **SAID[kind])
        trained = read_trained(file, SHAPE)
        assert (trained.kind, trained.r, trained.quant) == (kind, 8, "none")
        assert trained.scale == (2.0 if kind == "lora" else 1.0)
        assert list(trained.adapters) == list(SHAPE.matrix_names())
        assert sum(len(adapter.parameters) for adapter in trained.adapters.values()) == len(content)
        assert not trained.weights
        assert not trained.states

    @pytest.mark.parametrize(
        ("kind", "told"),
        [
            ("lora", Told("lora", alpha=16)),
            ("pissa", Told("pissa")),
            ("pissa", Told("pissa", alpha=32)),
            ("bone", Told()),
            ("bone", Told("disha")),
            ("bat", Told("bat")),
            ("bat", Told("disha", writer="rwkv-peft")),
        ],
    )
    def test_by_what_is_said_without_json(self, kind: str, told: Told, file: Path) -> None:
        tiny_adapter(file, SHAPE, kind)
        trained = read_trained(file, SHAPE, told)
        assert (trained.kind, trained.quant) == (kind, None)
        assert trained.scale == (2.0 if kind == "lora" else 1.0)

    @pytest.mark.parametrize("prefix", ["", "model.", "_forward_module.", "_forward_module.model."])
    @pytest.mark.parametrize("kind", KINDS)
    def test_keys_of_both_generations(self, kind: str, prefix: str, file: Path) -> None:
        content = tiny_adapter(file, SHAPE, kind)
        for path in file.parent.glob("*.pth"):
            rewrite(path, lambda held: {prefix + key.replace(".bone", ".disha"): t for key, t in held.items()})
        trained = read_trained(file, SHAPE, Told(kind, alpha=16 if kind == "lora" else 0))
        for key, adapter in trained.adapters.items():
            for name, values in adapter.parameters.items():
                assert torch.equal(values, content[f"{key.removesuffix('weight')}{name}"])

    def test_states_alone_and_in_a_merged_model(self, file: Path) -> None:
        states = tiny_state_file(file, SHAPE)
        assert read_trained(file, SHAPE).states.keys() == states.keys()
        torch.save({**tiny_parameters(SHAPE), **states}, file)
        trained = read_trained(file, SHAPE)
        assert (trained.weights, trained.adapters) == ({}, {})
        assert trained.states.keys() == states.keys()

    def test_parts_states_and_an_adapter(self, file: Path) -> None:
        parts = {key: tensor for key, tensor in tiny_parameters(SHAPE).items() if "time" in key or "emb" in key}
        tiny_adapter(file, SHAPE, "bone", further={**tiny_states(SHAPE), **parts})
        trained = read_trained(file, SHAPE)
        assert trained.weights.keys() == parts.keys()
        assert len(trained.states) == 2
        assert len(trained.adapters) == 16

    def test_parts_alone(self, file: Path) -> None:
        torch.save({"ln_out.bias": torch.zeros(32)}, file)
        described(file, method="parts", quant="nf4")
        trained = read_trained(file, SHAPE)
        assert list(trained.weights) == ["ln_out.bias"]
        assert trained.quant == "nf4"

    def test_some_targets(self, file: Path) -> None:
        tiny_adapter(file, SHAPE, "bone")
        rewrite(file, lambda held: {key: tensor for key, tensor in held.items() if "ffn.key" in key})
        assert list(read_trained(file, SHAPE).adapters) == ["blocks.0.ffn.key.weight", "blocks.1.ffn.key.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_computes_with_the_merged_matrix(kind: str, file: Path) -> None:
    tiny_adapter(file, SHAPE, kind)
    trained: Trained = read_trained(file, SHAPE, Told(kind, alpha=16 if kind == "lora" else 0))
    for key, adapter in trained.adapters.items():
        weight, x = tiny_parameters(SHAPE)[key], torch.randn(3, SHAPE.parameter_shapes()[key][1])
        base = Linear(weight.shape[1], weight.shape[0])
        base.weight.data = adapter.frozen(weight)
        expected = x @ adapter.merged(adapter.frozen(weight)).t()
        assert torch.allclose(adapter.module(base)(x), expected, atol=2e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "told", "said", "expected"),
        [
            ("lora", Told(), {}, "no rwkv-0.json says whose: give --type lora or --type pissa"),
            ("lora", Told("lora"), {}, "no rwkv-0.json says its alpha: give --lora_alpha"),
            ("lora", Told("bone"), {}, "holds LoRA tensors, not bone (--type)"),
            ("bone", Told("bat"), {}, "holds Bone tensors, not bat (--type)"),
            ("bat", Told("bone"), {}, "holds Bat tensors, not bone (--type)"),
            ("bone", Told(), SAID["lora"], "holds Bone tensors, not lora (what stands beside it)"),
            ("lora", Told("pissa"), SAID["lora"], "was trained as lora by what stands beside it, not pissa"),
            ("lora", Told(alpha=8), SAID["lora"], "was trained with alpha 16.0"),
            ("lora", Told("lora", alpha=8, init="x"), {}, "--lora_init x says nothing about"),
            ("bone", Told(alpha=8), {}, "--lora_alpha 8 says nothing about"),
            ("bone", Told(writer="hf"), {}, "--writer hf says nothing about"),
            ("lora", Told(), {**SAID["lora"], "r": 4}, "r 8, and what stands beside it says r 4"),
            ("bat", Told(writer="hf"), {}, "as RWKV-PEFT writes them: give --writer rwkv-peft"),
        ],
    )
    def test_what_is_said_does_not_fit(
        self, kind: str, told: Told, said: dict[str, object], expected: str, file: Path
    ) -> None:
        tiny_adapter(file, SHAPE, kind)
        if said:
            described(file, **said)
        assert expected in refusal(lambda: read_trained(file, SHAPE, told))

    @pytest.mark.parametrize(
        ("kind", "change", "expected"),
        [
            (
                "bone",
                {"blocks.0.att.query.bone": torch.zeros(8, 32)},
                "1 of 17 tensors that this model has no place",
            ),
            ("bone", {"blocks.0.att.key.bone": torch.zeros(8, 33)}, "has shape [8, 33], and this model needs [8, 32]"),
            ("bone", {"blocks.0.att.key.bone": torch.zeros(8, 8, 8)}, "mixes 2-D bone and 3-D bone tensors"),
            ("bone", {"blocks.0.att.key.lora_A": torch.zeros(8, 32)}, "mixes 2-D bone and lora tensors"),
            ("bone", {"ln_out.bias": torch.zeros(31)}, "ln_out.bias has shape [31], and this model needs [32]"),
            ("bone", {"blocks.0.att.time_state": torch.zeros(4, 8, 8)}, "holds the time_state of 1 layers"),
            (
                "lora",
                {"blocks.1.ffn.key.lora_B": torch.zeros(112, 4)},
                "shape [112, 4], and this model needs [112, 8]",
            ),
            ("bone", {"blocks.1.ffn.key.bone": torch.full((8, 112), torch.nan)}, "that are not finite"),
        ],
    )
    def test_tensors_that_do_not_fit(self, kind: str, change: dict[str, Tensor], expected: str, file: Path) -> None:
        tiny_adapter(file, SHAPE, kind)
        rewrite(file, lambda held: {**held, **change})
        told = Told(kind, alpha=8.0 if kind == "lora" else 0)
        assert expected in refusal(lambda: read_trained(file, SHAPE, told))

    @pytest.mark.parametrize("name", ["lora_A", "lora_B"])
    def test_half_an_adapter(self, name: str, file: Path) -> None:
        for matrix in ("blocks.0.att.receptance", "blocks.1.ffn.key"):
            tiny_adapter(file, SHAPE, "lora")
            rewrite(file, lambda held: {key: t for key, t in held.items() if key != f"{matrix}.{name}"})  # noqa: B023
            assert f"{matrix} has no {name}" in refusal(lambda: read_trained(file, SHAPE, Told("lora", alpha=8)))

    def test_an_adapter_of_fewer_layers(self, file: Path) -> None:
        tiny_adapter(file, SHAPE, "bone")
        message = refusal(lambda: read_trained(file, tiny_shape(n_layer=3)))
        assert "adapters of att.receptance of 2 layers, but the model has 3" in message

    def test_blocks_that_do_not_divide(self, file: Path) -> None:
        shape = tiny_shape(dim_ffn=100)
        tiny_adapter(file, shape, "bat")
        assert "do not divide blocks.0.ffn.key.weight" in refusal(lambda: read_trained(file, shape))

    def test_json_that_is_none(self, file: Path) -> None:
        tiny_adapter(file, SHAPE, "bone")
        file.with_suffix(".json").write_text("{")
        assert "rwkv-0.json is damaged" in refusal(lambda: read_trained(file, SHAPE))


class TestFirstFactors:
    def test_elsewhere(self, file: Path) -> None:
        tiny_adapter(file, SHAPE, "pissa")
        other = file.with_name("other.pth")
        file.with_name("init_pissa.pth").rename(other)
        message = refusal(lambda: read_trained(file, SHAPE, Told("pissa")))
        assert "name that file with --lora_init" in message
        assert read_trained(file, SHAPE, Told("pissa", init=str(other))).adapters["blocks.0.att.key.weight"].first

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda held: dict(list(held.items())[1:]), "lacks blocks.0.att.receptance.init_lora_A"),
            (lambda held: {**held, "blocks.9.att.key.init_lora_A": torch.zeros(8, 32)}, "holds 1 tensors more"),
            (lambda held: {key: tensor[:, :4] for key, tensor in held.items()}, "it belongs to another training"),
        ],
    )
    def test_of_another_training(
        self, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], expected: str, file: Path
    ) -> None:
        tiny_adapter(file, SHAPE, "pissa")
        rewrite(file.with_name("init_pissa.pth"), change)
        assert expected in refusal(lambda: read_trained(file, SHAPE, Told("pissa")))

    def test_of_another_base_model(self, file: Path) -> None:
        tiny_adapter(file, SHAPE, "pissa")
        described(file, **SAID["pissa"], base={"file": "a.pth", "size_bytes": 5, "sha256": "ab"})
        described(file.with_name("init_pissa.pth"), r=8, base_size_bytes=5, base_sha256="cd")
        assert "they belong to two trainings" in refusal(lambda: read_trained(file, SHAPE))
        file.with_suffix(".json").unlink()
        assert read_trained(file, SHAPE, Told("pissa")).base == {"size_bytes": 5, "sha256": "cd"}
