"""What a step changes, for every way of training: exactly what the method names, and its file holds exactly that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import ARCHITECTURES, tiny_checkpoint, tiny_parameters, tiny_shape
from tables import covering
from torch import Tensor

from src.adapters.method import method_of
from src.config import TrainConfig
from src.errors import CheckpointError, ConfigError
from src.identity import FileIdentity
from src.loading import build_model
from src.model.language_model import LanguageModel
from src.training.engine import resolve_hardware
from src.training.module import parameter_groups
from src.training.run import load_options

SHAPE = tiny_shape(n_embd=64)
WEIGHTS = SHAPE.parameter_shapes()
PARTS = {
    "time,ln": {name for name in WEIGHTS if "time" in name or "ln" in name},
    "[]": set(),
    "emb,head": {"emb.weight", "head.weight"},
}
SUFFIXES = {"lora": ("lora_A", "lora_B"), "pissa": ("lora_A", "lora_B"), "bone": ("bone",), "bat": ("bone",)}


def config(**flags: object) -> TrainConfig:
    given = {"load_model": "b", "data_file": "d", "accelerator": "cpu", "lora_r": 8, "pissa_r": 8, "bone_r": 8, **flags}
    return TrainConfig.from_flags({name: str(value) for name, value in given.items()})


def model_of(chosen: TrainConfig) -> LanguageModel:
    options = load_options(chosen, method_of(chosen), resolve_hardware(chosen), SHAPE)
    return build_model(tiny_parameters(SHAPE), SHAPE, options)


def contents(model: LanguageModel) -> dict[str, Tensor]:
    """Everything there is: parameters, packed bytes, the table on the host."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if model.emb.host_table is not None:
        held["emb.weight"] = model.emb.host_table  # type: ignore[assignment]
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def take_steps(model: LanguageModel, count: int = 2) -> None:
    """LoRA's A has no gradient before its B has moved."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    tokens = torch.arange(1, 25)[None] % SHAPE.vocab_size
    for _ in range(count):
        optimizer.zero_grad()
        hidden, _ = model(tokens[:, :-1])
        logits = model.logits(hidden).float()
        torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("peft", "parts", "train_type", "quant"),
    [
        *covering(["none", *SUFFIXES], PARTS, ["states"], [0, 1]),
        *covering(SUFFIXES, PARTS, ["none"], [1, 0]),
    ],
)
def test_exactly_what_is_trained_changes_and_is_written(
    peft: str, parts: str, train_type: str, quant: int, tmp_path: Path
) -> None:
    chosen = config(peft=peft, train_parts=parts, train_type=train_type, quant=quant)
    method, model = method_of(chosen), model_of(chosen)
    expected = set(PARTS[parts])
    if train_type == "states":
        expected |= set(SHAPE.state_shapes())
    for matrix in SHAPE.matrix_names():
        expected |= {matrix.replace("weight", suffix) for suffix in SUFFIXES.get(peft, ())}
    assert set(method.trained_names(SHAPE)) == expected
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected

    before = contents(model)
    take_steps(model)
    after = contents(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected
    assert {after[name].dtype for name in expected} == ({torch.float32} if expected else set())

    path = tmp_path / "rwkv-0.pth"
    method.save(model, path)
    written = torch.load(path, weights_only=True)
    assert set(written) == expected
    assert all(torch.equal(values, after[name].bfloat16()) for name, values in written.items())
    first_factors = sum(values.numel() for name, values in written.items() if "lora" in name) if peft == "pissa" else 0
    assert method.file_bytes(SHAPE) == sum(values.nbytes for values in written.values()) + 4 * first_factors


@pytest.mark.parametrize("quant", [0, 1])
@pytest.mark.parametrize("peft", SUFFIXES)
def test_in_bf16_what_is_trained_and_its_gradients_are_fp32(peft: str, quant: int) -> None:
    chosen = config(peft=peft, precision="bf16", quant=quant, train_type="states")
    model, trained = model_of(chosen), set(method_of(chosen).trained_names(SHAPE))
    before = contents(model)
    take_steps(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
        assert (parameter.grad is not None) == (name in trained), name
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    after = contents(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained


class TestPlan:
    def test_says_how_many_values_each_adds(self) -> None:
        said = method_of(config(peft="lora", train_parts="ln,time", train_type="states", lora_alpha=4)).describe(SHAPE)
        count = {part: sum(torch.Size(s).numel() for n, s in WEIGHTS.items() if part in n) for part in ("ln", "time")}
        adapters = sum(8 * sum(WEIGHTS[name]) for name in SHAPE.matrix_names())
        assert said == (
            f"LoRA r 8 (scale 0.5) on 16 matrices: {adapters:,}, states: {SHAPE.state_parameter_count:,}, "
            f"ln: {count['ln']:,}, time: {count['time']:,} values; all other weights frozen"
        )

    def test_parts_that_overlap_are_counted_once(self) -> None:
        said = method_of(config(peft="bone", train_parts="ln,ln1,ln_out")).describe(SHAPE)
        assert "ln1: 0, ln_out: 0 values" in said


class TestParts:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"train_parts": "time,lnn"}, "--train_parts lnn is part of no weight's name: use time, ln, emb, head"),
            ({"train_parts": "ffn.key"}, "--train_parts ffn.key names only matrices that have an adapter"),
            ({"train_parts": "key", "targets": "value", "quant": 1}, "which is packed and cannot be trained"),
            ({"train_parts": "head", "quant": 1, "quant_head": 1}, "names head.weight, which is packed"),
            ({"targets": "att.keys"}, "--targets att.keys is no matrix"),
        ],
    )
    def test_what_cannot_be_trained_is_refused(self, flags: dict[str, object], expected: str) -> None:
        with pytest.raises(ConfigError) as refused:
            method_of(config(peft="lora", **flags)).trained_names(SHAPE)
        assert expected in str(refused.value)

    def test_matrices_without_an_adapter_can_be_parts(self) -> None:
        names = method_of(config(peft="lora", targets="att.key", train_parts="blocks.1.ffn")).trained_names(SHAPE)
        assert {"blocks.1.ffn.key.weight", "blocks.1.ffn.time_maa_k", "blocks.0.att.key.lora_A"} <= set(names)


class TestRates:
    def rates(self, **flags: object) -> dict[str, float]:
        chosen = config(**flags)
        method, model = method_of(chosen), model_of(chosen)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        factors = {name: method.rate_factor(SHAPE, name) for name, _ in named}
        groups = parameter_groups(named, factors, chosen)
        return {
            name: next(group["lr"] for group in groups if any(p is parameter for p in group["params"]))
            for name, parameter in named
        }

    def test_states_have_their_own(self) -> None:
        rates = self.rates(peft="lora", train_type="states", lr_init=1e-4, lr_state=0.5, lora_plus=16)
        assert rates["blocks.0.att.time_state"] == pytest.approx(0.5)
        assert rates["blocks.0.att.key.lora_A"] == pytest.approx(1e-4)
        assert rates["blocks.0.att.key.lora_B"] == pytest.approx(16e-4)
        assert rates["blocks.0.att.time_decay"] == pytest.approx(2e-4)
        assert rates["ln_out.bias"] == pytest.approx(1e-4)

    def test_layerwise_rates_can_be_off(self) -> None:
        assert set(self.rates(peft="bone", layerwise_lr=0).values()) == {2e-5}


def test_only_dropout_keeps_steps_from_being_recorded() -> None:
    assert method_of(config(peft="lora")).recordable
    assert method_of(config(peft="bat", train_type="states")).recordable
    assert not method_of(config(peft="lora", lora_dropout=0.1)).recordable


class TestGoingOn:
    @pytest.fixture
    def base(self, tmp_path: Path) -> FileIdentity:
        tiny_checkpoint(tmp_path / "base.pth", n_embd=64)
        return FileIdentity(tmp_path / "base.pth")

    def saved(self, folder: Path, base: FileIdentity, **flags: object) -> Path:
        """A file of one step, and what stands beside it."""
        chosen = config(**flags)
        method, model = method_of(chosen), model_of(chosen)
        folder.mkdir()
        method.begin(model, folder, base, {})
        take_steps(model, 1)
        method.save(model, folder / "rwkv-0.pth")
        return folder / "rwkv-0.pth"

    def start(self, path: Path, base: FileIdentity, **flags: object) -> dict[str, Tensor]:
        method = method_of(config(load_adapter=path, **flags))
        return dict(method.start(SHAPE, path.parent / "new", base))

    def test_every_tensor_of_the_file_is_taken(self, base: FileIdentity, tmp_path: Path) -> None:
        flags = {"peft": "bone", "train_type": "states"}
        path = self.saved(tmp_path / "a", base, **flags)
        start = self.start(path, base, **flags)
        written = torch.load(path, weights_only=True)
        assert start.keys() == written.keys()
        assert all(torch.equal(start[name], written[name]) for name in written)

    @pytest.mark.parametrize("prefix", ["model.", "_forward_module.", "_forward_module.model."])
    def test_other_writers_keys(self, base: FileIdentity, tmp_path: Path, prefix: str) -> None:
        path = self.saved(tmp_path / "a", base, peft="bat")
        written = torch.load(path, weights_only=True)
        torch.save({prefix + name.replace(".bone", ".disha"): t for name, t in written.items()}, path)
        start = self.start(path, base, peft="bat")
        assert start.keys() == written.keys()

    def test_parts_that_the_file_lacks_start_at_the_base(self, base: FileIdentity, tmp_path: Path) -> None:
        path = self.saved(tmp_path / "a", base, peft="bone", train_parts="[]")
        assert not any("time" in name for name in self.start(path, base, peft="bone"))

    def test_pissa_s_first_factors_come_along(self, base: FileIdentity, tmp_path: Path) -> None:
        path = self.saved(tmp_path / "a", base, peft="pissa")
        start = self.start(path, base, peft="pissa")
        first = torch.load(path.with_name("init_pissa.pth"), weights_only=True)
        assert {name for name in start if "init" in name} == set(first)
        assert {t.dtype for t in first.values()} == {torch.float32}

    @pytest.mark.parametrize(
        ("made", "used", "expected"),
        [
            ({"peft": "bone"}, {"peft": "bone", "train_parts": "[]"}, "that this run does not train"),
            ({"peft": "bone"}, {"peft": "lora"}, "tensors that this run does not train, blocks."),
            ({"peft": "bone", "targets": "key"}, {"peft": "bone"}, "adapter tensors that this run trains"),
            ({"peft": "bone"}, {"peft": "bone", "bone_r": 16}, "has shape [8, 64], and this run needs [16, 64]"),
            ({"peft": "bat"}, {"peft": "bone"}, "has shape [8, 8, 8], and this run needs [8, 64]"),
            ({"peft": "pissa"}, {"peft": "pissa", "svd_niter": 7}, "was made with svd_niter 4"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, made: dict[str, object], used: dict[str, object], expected: str, base: FileIdentity, tmp_path: Path
    ) -> None:
        path = self.saved(tmp_path / "a", base, **made)
        with pytest.raises(CheckpointError) as refused:
            self.start(path, base, **used)
        assert expected in str(refused.value)
        assert "\n" not in str(refused.value)

    def test_pissa_needs_its_first_factors(self, base: FileIdentity, tmp_path: Path) -> None:
        path = self.saved(tmp_path / "a", base, peft="pissa")
        path.with_name("init_pissa.pth").unlink()
        with pytest.raises(CheckpointError, match="needs the factors it began with"):
            self.start(path, base, peft="pissa")
        with pytest.raises(CheckpointError, match="needs the factors it began with"):
            self.check(path, base)

    @staticmethod
    def check(path: Path, base: FileIdentity) -> None:
        """What is done before a folder is made, or results that lie in it go."""
        tuned = method_of(config(peft="pissa", load_adapter=str(path)))
        tuned.check_files(SHAPE, base)

    def test_first_factors_of_another_model_are_refused(self, base: FileIdentity, tmp_path: Path) -> None:
        path = self.saved(tmp_path / "a", base, peft="pissa")
        tiny_checkpoint(tmp_path / "other.pth", n_embd=64, seed=9)
        other = FileIdentity(tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="was made with base_sha256"):
            self.start(path, other, peft="pissa")
        with pytest.raises(CheckpointError, match="was made with base_sha256"):
            self.check(path, other)


@pytest.mark.parametrize("peft", ["lora", "pissa", "bone", "bat", "lisa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_that_are_trained_unless_others_are_named_are_parts_of_every_architecture(
    architecture: str, peft: str
) -> None:
    """Of RWKV-7 `time` is what RWKV-6 calls so, and nothing that no computation uses."""
    shape = tiny_shape(architecture=architecture, holds_idle=architecture == "x070")
    found = {name for name in method_of(config(peft=peft)).trained_names(shape) if name in shape.parameter_shapes()}
    if peft == "lisa":
        assert found == {"emb.weight", "head.weight"}
        return
    matrices = {*shape.matrix_names(), "emb.weight", "head.weight"}
    in_channel_mixers = {name for name in shape.parameter_shapes() if "ffn." in name} - matrices
    assert found | in_channel_mixers | shape.idle_names() == shape.parameter_shapes().keys() - matrices
    assert not found & shape.idle_names()
