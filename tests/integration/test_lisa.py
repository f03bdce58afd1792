"""Whole runs of LISA: what changes in each period, what is written, and going on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint, tiny_shape
from running import (
    after_step,
    assert_same_end,
    files_in,
    go_on,
    left_by_run,
    metrics,
    refusal,
    stopped,
    tensors_in,
    train,
    try_train,
    write_documents,
)
from torch import Tensor

from src.adapters.lisa import Draw
from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.training.saver import RunSaver

LENGTHS = [30, 12, 25, 18, 9, 33]
LAYERS = 4
SHAPE = tiny_shape(n_layer=LAYERS)
COMMON: dict[str, object] = {"peft": "lisa", "lisa_r": 2, "lisa_k": 3, "lr_init": 1e-2, "lr_final": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, n_layer=LAYERS, dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data") / "documents", LENGTHS)


def weights_in(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def drawn(periods: int, layers: int = 2, steps: int = 3, seed: int = 42) -> list[set[int]]:
    """The layers of each period."""
    places: list[tuple[int, ...]] = [()]
    for period in range(periods):
        places.append(Draw(layers, steps, seed).after(places[-1], period, LAYERS))
    return [set(layers) for layers in places[1:]]


def changed_between(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys() == SHAPE.parameter_shapes().keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize(
    ("quant", "grad_cp", "parts"),
    [
        (0, 1, "emb,head"),
        (1, 1, "[]"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product((0, 1), (0, 2), ("emb,head,ln",))),
    ],
)
def test_in_each_period_its_layers_and_the_parts_change(
    quant: int, grad_cp: int, parts: str, base: Path, data: Path, tmp_path: Path
) -> None:
    """Epochs as long as periods; the file holds every layer's training, and of others the very bits of the base."""
    flags = {**COMMON, "quant": quant, "grad_cp": grad_cp, "train_parts": parts, "warmup_steps": 0}
    ended = train(tmp_path, load_model=base, data_file=data, epoch_steps=3, epoch_count=3, **flags)
    assert "LISA: 2 of 4 layers at a time" in ended.out
    assert files_in(tmp_path) == left_by_run(*(f"rwkv-{n}.pth" for n in range(3)))
    files = [weights_in(path) for path in (base, *(tmp_path / f"rwkv-{n}.pth" for n in range(3)))]
    assert {tensor.dtype for tensor in files[-1].values()} == {torch.bfloat16}
    periods = drawn(3)
    assert len(set().union(*periods)) > 2  # or the test shows little
    for before, after, layers in zip(files, files[1:], periods, strict=False):
        changed = changed_between(before, after)
        throughout = {n for n in SHAPE.parameter_shapes() if any(p in n for p in parts.strip("[]").split(",") if p)}
        allowed = {n for n in SHAPE.parameter_shapes() if n.startswith(tuple(f"blocks.{layer}." for layer in layers))}
        assert changed <= throughout | allowed
        matrices = {name for name in allowed if name.endswith(".weight")} | (throughout & {"emb.weight", "head.weight"})
        assert matrices <= changed
    said = json.loads((tmp_path / "rwkv-final.json").read_text())
    assert (said["method"], said["lisa_r"], said["lisa_k"]) == ("lisa", 2, 3)


def test_a_file_is_a_model_that_trains_on(base: Path, data: Path, tmp_path: Path) -> None:
    common = {"data_file": data, "val_file": data, "epoch_steps": 6, "epoch_count": 1, "warmup_steps": 0}
    ended = train(tmp_path / "one", load_model=base, **COMMON, **common)
    assert "tune a state on it" in ended.out
    final = tmp_path / "one" / "rwkv-final.pth"
    again = train(tmp_path / "two", load_model=final, **common)

    def held_out(out: str, label: str) -> float:
        line = next(line for line in out.splitlines() if line.startswith(f"held out   {label}"))
        return float(line.partition("loss ")[2].split()[0])

    assert held_out(ended.out, "tuned") < held_out(ended.out, "untuned") - 0.1
    assert held_out(again.out, "untuned") == pytest.approx(held_out(ended.out, "tuned"), abs=0.02)


def test_adams_memory_is_that_of_the_drawn_layers(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, whatever was drawn before; and gradients are theirs."""
    held: list[tuple[int, int]] = []
    look = RunSaver.on_train_batch_end

    def looking(self: RunSaver, trainer: object, module: object, *rest: object) -> None:
        states = trainer.optimizers[0].state.values()  # type: ignore[attr-defined]
        moments = sum(value.numel() for state in states for value in state.values() if value.ndim)
        trained = sum(parameter.numel() for _, parameter in module.trained())  # type: ignore[attr-defined]
        held.append((moments, trained))
        look(self, trainer, module, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RunSaver, "on_train_batch_end", looking)
    train(tmp_path, load_model=base, data_file=data, epoch_steps=7, epoch_count=1, **{**COMMON, "lisa_k": 2})
    assert len(held) == 7
    assert all(moments == 2 * trained for moments, trained in held)
    whole = SHAPE.parameter_count
    assert all(trained < 0.7 * whole for _, trained in held)


KINDS: dict[str, dict[str, object]] = {
    "unpacked": {"quant": 0},
    "nf4": {"quant": 1},
    "parked": {"quant": 1, "lisa_moments": "park"},
    "8 bits, parked": {"optim": "adamw8bit", "lisa_moments": "park"},
    "accumulated, dropout": {"accumulate_grad_batches": 2, "epoch_steps": 10, "dropout": 0.1},
    "states, weight decay": {"train_type": "states", "lr_state": 0.1, "weight_decay": 0.1, "dataload": "pad"},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("8 bits, parked", 6),
        *(pytest.param(kind, step, marks=pytest.mark.slow) for kind in KINDS for step in (1, 6, 7)),
    ],
)
def test_going_on_ends_with_the_same_bits(kind: str, step: int, base: Path, data: Path, tmp_path: Path) -> None:
    """After a step that ends a period (6), and after others."""
    flags = {"load_model": base, "data_file": data, "epoch_steps": 5, "epoch_count": 3, **COMMON, **KINDS[kind]}
    train(tmp_path / "whole", **flags)
    stopped(step, tmp_path / "parts", **flags)
    go_on(tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_parked_moments_are_kept_with_the_run_and_used(base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "epoch_steps": 12, "epoch_count": 1, **COMMON}
    for moments in ("drop", "park"):
        train(tmp_path / moments, lisa_moments=moments, **flags)
    one, other = (weights_in(tmp_path / moments / "rwkv-final.pth") for moments in ("drop", "park"))
    assert changed_between(one, other)
    stopped(7, tmp_path / "parts", lisa_moments="park", **flags)
    saved = torch.load(tmp_path / "parts" / "rwkv-resume.pth", weights_only=True)
    waiting = set().union(*drawn(2)) - drawn(3)[2]
    assert {int(key.split(".")[1]) for key in saved["parts"]["parked"]} == waiting


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "orpo", "simpo"])
def test_preferences(kind: str, base: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.save"
    save_pairs(pairs, [PreferencePair(list(range(n, 2 * n)), [60 + n] * n, [90 + n] * (n + 1)) for n in range(3, 9)])
    flags = {"load_model": base, kind: 1, "rlhf_train_file": pairs, "epoch_count": 1, **COMMON, "quant": 1}
    flags |= {"lisa_k": 2, "lr_init": 1e-3}
    train(tmp_path / "whole", **flags)
    stopped(4, tmp_path / "parts", **flags)
    go_on(tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_the_last_good_weights_are_those_of_all_layers(base: Path, data: Path, tmp_path: Path) -> None:
    """Saved at the end of step 4; step 8, in another period, spoils the weights, which shows in step 9."""

    def spoil(stopper: object) -> None:
        module = torch.nn.Module
        for found in [thing for thing in spoiled if isinstance(thing, module)]:
            with torch.no_grad():
                found.head.weight.fill_(float("nan"))

    spoiled: list[object] = []
    remember = RunSaver.on_train_start

    def remembering(self: RunSaver, trainer: object, module: object) -> None:
        spoiled.append(module.model)  # type: ignore[attr-defined]
        remember(self, trainer, module)  # type: ignore[arg-type]

    flags = {"load_model": base, "data_file": data, "epoch_steps": 4, "epoch_count": 4, **COMMON}
    with pytest.MonkeyPatch.context() as patch, after_step(7, spoil):
        patch.setattr(RunSaver, "on_train_start", remembering)
        ended = try_train(tmp_path, **flags)
    assert ended.code == 2
    assert "the weights after step 4, which gave a finite loss and gradient" in ended.err
    good, saved = weights_in(tmp_path / "rwkv-last-good.pth"), weights_in(tmp_path / "rwkv-0.pth")
    assert not changed_between(good, saved)


def test_the_run_file_holds_what_was_trained(base: Path, data: Path, tmp_path: Path) -> None:
    stopped(4, tmp_path, load_model=base, data_file=data, epoch_count=2, **{**COMMON, "train_parts": "[]"})
    saved = torch.load(tmp_path / "rwkv-resume.pth", weights_only=True)
    layers = set().union(*drawn(2))
    assert {int(key.split(".")[1]) for key in saved["parts"]["trained"]} == layers
    assert {tensor.dtype for tensor in tensors_in(saved["parts"]["trained"])} == {torch.float32}
    assert {int(key.split(".")[1]) for key in saved["parts"]["optimizer"]} == drawn(2)[1]
    assert len(metrics(tmp_path)) == 4


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"lisa_r": 9}, "--lisa_r 9 is more than the model's 4 layers: lower it"),
        ({"lisa_config": '{"lisa_r": 0}'}, "--lisa_config: lisa_r 0 must be at least 1"),
        ({"load_adapter": "a.pth"}, "has no use with --peft lisa, whose results are whole models"),
        ({"quant": 1, "train_parts": "ffn.key"}, "is packed and cannot be trained: use --quant 0, or leave it out"),
    ],
)
def test_refusals(flags: dict[str, object], expected: str, base: Path, data: Path, tmp_path: Path) -> None:
    ended = try_train(tmp_path / "out", load_model=base, data_file=data, peft="lisa", **flags)
    assert expected in refusal(ended, tmp_path / "out")
