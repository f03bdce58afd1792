"""A model with what was trained on it is what training had, and without it the base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_state_file, tiny_states
from torch import Tensor

from src.adapters.plan import AdapterPlan
from src.adapters.trained import Told, Trained, read_trained
from src.checkpoint import open_checkpoint
from src.errors import ConfigError
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.tuned import Tuned

SHAPE = tiny_shape()
FP32 = LoadOptions(torch.device("cpu"), torch.float32)
TOKENS = torch.randint(257, (1, 20), generator=torch.Generator().manual_seed(0))
FURTHER = {
    **tiny_states(SHAPE, 4, torch.bfloat16),
    "ln_out.weight": torch.full((32,), 1.25),
    "emb.weight": torch.randn(257, 32, generator=torch.Generator().manual_seed(1)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "base.pth"
    tiny_checkpoint(path)
    return path


@torch.no_grad()
def logits(model: LanguageModel) -> Tensor:
    return model.logits(model(TOKENS)[0])


def of_training(
    base: Path, kind: str, content: dict[str, Tensor], first: dict[str, Tensor], quant: str | None
) -> Tensor:
    """Logits as the trainer has them, from its own loader."""
    checkpoint = open_checkpoint(base)
    options = LoadOptions(
        FP32.device, FP32.compute_dtype, quant,
        trained={*content, *SHAPE.state_shapes()},
        adapters=AdapterPlan(kind, 8, alpha=16.0) if kind else None,
    )  # fmt: skip
    return logits(build_model({**checkpoint, **first, **content}, SHAPE, options).eval())


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("kind", ["lora", "pissa", "bone", "bat"])
def test_adapters_as_training_has_them_and_without(base: Path, kind: str, quant: str | None, tmp_path: Path) -> None:
    content = tiny_adapter(tmp_path / "trained.pth", SHAPE, kind, further=FURTHER)
    first = torch.load(tmp_path / "init_pissa.pth", weights_only=True) if kind == "pissa" else {}
    checkpoint = open_checkpoint(base)
    trained = read_trained(tmp_path / "trained.pth", SHAPE, Told(kind, 16.0 if kind == "lora" else 0.0))
    tuned = Tuned(checkpoint, trained, LoadOptions(FP32.device, FP32.compute_dtype, quant))
    assert tuned.differs
    expected = of_training(base, kind, content, first, quant)
    torch.testing.assert_close(logits(tuned.model), expected, rtol=1e-5, atol=1e-5)
    tuned.use(tuned=False)
    begun = {key.replace("init_", ""): tensor for key, tensor in first.items()}
    plain = of_training(base, kind if begun else "", begun, first, quant)
    torch.testing.assert_close(logits(tuned.model), plain, rtol=1e-5, atol=1e-5)
    if kind != "pissa" or quant is None:  # its residual is what is packed
        options = LoadOptions(FP32.device, FP32.compute_dtype, quant)
        of_base = logits(build_model(checkpoint, SHAPE, options).eval())
        torch.testing.assert_close(logits(tuned.model), of_base, rtol=1e-4, atol=1e-4)
    tuned.use(tuned=True)
    torch.testing.assert_close(logits(tuned.model), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_state_and_without(base: Path, quant: str | None, tmp_path: Path) -> None:
    states = tiny_state_file(tmp_path / "state.pth", SHAPE)
    checkpoint, options = open_checkpoint(base), LoadOptions(FP32.device, FP32.compute_dtype, quant)
    tuned = Tuned(checkpoint, read_trained(tmp_path / "state.pth", SHAPE), options)
    with_it, without = (logits(build_model({**checkpoint, **some}, SHAPE, options).eval()) for some in (states, {}))
    assert torch.equal(logits(tuned.model), with_it)
    tuned.use(tuned=False)
    assert torch.equal(logits(tuned.model), without)
    tuned.use(tuned=True)
    assert torch.equal(logits(tuned.model), with_it)


def test_without_a_state_a_merged_model_has_its_own(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "merged.pth", with_state=True)
    tiny_state_file(tmp_path / "state.pth", SHAPE, seed=9)
    checkpoint = open_checkpoint(tmp_path / "merged.pth")
    tuned = Tuned(checkpoint, read_trained(tmp_path / "state.pth", SHAPE), FP32)
    tuned.use(tuned=False)
    assert torch.equal(logits(tuned.model), logits(build_model(checkpoint, SHAPE, FP32).eval()))


def test_nothing_trained_is_the_model_itself(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    tuned = Tuned(checkpoint, None, FP32)
    assert not tuned.differs
    tuned.use(tuned=False)
    assert torch.equal(logits(tuned.model), logits(build_model(checkpoint, SHAPE, FP32).eval()))


def test_what_no_model_computes_is_refused(base: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(base)
    tiny_adapter(tmp_path / "bat.pth", SHAPE, "bat")
    theirs = {
        key: torch.randn(SHAPE.parameter_shapes()[f"{key.removesuffix('.bone')}.weight"][0] // 8, 8, 8)
        for key in torch.load(tmp_path / "bat.pth", weights_only=True)
    }
    torch.save(theirs, tmp_path / "hf.pth")
    with pytest.raises(ConfigError, match="a Bat of peft's, which no model here computes: merge it"):
        Tuned(checkpoint, read_trained(tmp_path / "hf.pth", SHAPE, Told(writer="hf")), FP32)
    name = "blocks.1.ffn.key.weight"
    parts = Trained(Path("parts.pth"), weights={name: checkpoint[name] * 2})
    with pytest.raises(ConfigError, match=r"--quant nf4 packs blocks\.1\.ffn\.key\.weight, which parts\.pth holds"):
        Tuned(checkpoint, parts, LoadOptions(FP32.device, FP32.compute_dtype, "nf4"))
    assert Tuned(checkpoint, parts, FP32).differs


def test_an_interrupted_change_is_made_whole(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    tuned = Tuned(open_checkpoint(base), read_trained(tmp_path / "state.pth", SHAPE), FP32)
    expected = logits(tuned.model)
    get, asked = tuned.model.get_parameter, []

    def interrupted(name: str) -> Tensor:
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return get(name)

    monkeypatch.setattr(tuned.model, "get_parameter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned.use(tuned=False)
    assert not torch.equal(logits(tuned.model), expected)
    tuned.use(tuned=True)
    assert torch.equal(logits(tuned.model), expected)
