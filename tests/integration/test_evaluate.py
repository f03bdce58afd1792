"""`--evaluate 1`: the numbers of a run, without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_checkpoint
from running import files_in, records, refusal, run_script, train, try_train, write_documents
from tables import some

from src.commands.evaluate import evaluate
from src.config import TrainConfig
from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair

pytestmark = pytest.mark.usefixtures("architecture")

METHODS: dict[str, dict[str, object]] = {
    "states": {"lr_init": 3},
    "states, nf4": {"quant": 1, "quant_head": 1, "lr_init": 3, "chunk_ctx": 8},
    "lora, nf4": {"peft": "lora", "lora_r": 4, "lora_alpha": 8, "quant": 1, "lr_init": 3e-2},
    "pissa": {"peft": "pissa", "pissa_r": 4, "lr_init": 3e-2},
    "bone and states": {"peft": "bone", "bone_r": 8, "train_type": "states", "lr_init": 3e-2},
    "orpo": {"orpo": 1, "lr_init": 3},
    "dpo": {"dpo": 1, "lr_init": 3, "quant": 1},
}


@pytest.fixture(scope="module")
def files(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pth`, `documents`, `held-out`, `pairs.save`, `held-out.save`."""
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "base.pth", dtype=torch.bfloat16)
    write_documents(folder / "documents", [30, 12, 25, 18, 9, 33])
    write_documents(folder / "held-out", [70, 14], seed=1)
    for name, first in (("pairs", 3), ("held-out", 40)):
        pairs = [PreferencePair(list(range(n, n + 6)), [60 + n] * 3, [90 + n] * 4) for n in range(first, first + 6)]
        save_pairs(folder / f"{name}.save", pairs)
    return folder


def held_out_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in records(folder) if "held_out" in row]


@pytest.mark.parametrize("name", some(METHODS, "states, nf4", "orpo", "dpo"))
def test_its_numbers_are_those_of_a_run(name: str, files: Path, tmp_path: Path) -> None:
    flags = METHODS[name]
    pairs = bool({"orpo", "dpo"} & flags.keys())
    held_out = files / ("held-out.save" if pairs else "held-out")
    data = {"rlhf_train_file": files / "pairs.save"} if pairs else {"data_file": files / "documents"}
    common = {"load_model": files / "base.pth", "val_file": held_out, "epoch_count": 1, "lr_final": 1e-2, **flags}
    train(tmp_path / "run", val_steps=2, epoch_steps=4, **common, **data)
    result = {"load_adapter" if "peft" in flags else "load_state": tmp_path / "run" / "rwkv-best.pth"}
    best = next(row for row in held_out_rows(tmp_path / "run")[::-1] if row["best"])
    if "dpo" not in flags:  # whose reference would be another one
        train(tmp_path / "again", epoch_steps=1, **common, **data, **result)
    given = {"accelerator": "cpu", "quant": 0, "dataload": "pad", **common, **result, "evaluate": 1}
    if pairs:
        del given["dataload"]
    before, after = evaluate(TrainConfig.from_flags({flag: str(value) for flag, value in given.items()}))
    assert after is not None
    untuned = held_out_rows(tmp_path / "run")[0]
    assert untuned["held_out"] == {k: pytest.approx(v) for k, v in dataclasses.asdict(before).items()}
    if "pissa" not in name:  # of which a run begins with factors beside what is left of the matrices
        assert untuned["held_out"] == dataclasses.asdict(before)
    if "dpo" not in flags:
        loaded = held_out_rows(tmp_path / "again")[0]
        assert loaded["label"] == "loaded"
        assert loaded["held_out"] == dataclasses.asdict(after)
    assert best["held_out"] == {k: pytest.approx(v, rel=0.03, abs=0.03) for k, v in dataclasses.asdict(after).items()}


def test_the_file_of_a_run_is_enough(files: Path, tmp_path: Path) -> None:
    """Its flags, with what it made; nothing is written."""
    share = {"val_share": 0.3, "epoch_count": 1, "lr_init": 3}
    run = train(tmp_path / "run", load_model=files / "base.pth", data_file=files / "documents", **share)
    left = files_in(tmp_path / "run")
    flags = {"config": tmp_path / "run" / "run.toml", "load_state": tmp_path / "run" / "rwkv-final.pth"}
    ended = run_script("train.py", evaluate=1, proj_dir=tmp_path / "none", **flags)
    assert ended.code == 0, ended.err
    first = next(line for line in run.out.splitlines() if line.startswith("held out   untuned: "))
    assert first in ended.out
    assert "held out   tuned: loss" in ended.out
    assert files_in(tmp_path / "run") == left
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "--evaluate 1 has nothing to measure"),
        ({"val_file": "/nowhere"}, "/nowhere"),
        ({"val_file": "held-out", "load_state": "base.pth"}, "base.pth"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: dict[str, object], said: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    folder = tmp_path / "out"
    assert said in refusal(try_train(folder, evaluate=1, load_model=files / "base.pth", **flags), folder)


def test_no_model_is_refused(tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_embd": 64, "vocab_size": 257}
    said = refusal(try_train(tmp_path / "out", evaluate=1, val_file="x", train_type="none", **sizes), tmp_path / "out")
    assert "--evaluate 1 measures a model" in said


@pytest.mark.parametrize("name", some(METHODS, "states, nf4", "lora, nf4"))
def test_weights_are_packed_as_they_were_in_the_run_unless_told(
    name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = METHODS[name]
    if {"orpo", "dpo"} & flags.keys():
        pytest.skip("pairs are measured in the same way")
    common = {"load_model": files / "base.pth", "val_file": files / "held-out"}
    train(
        tmp_path / "run",
        **{**common, "data_file": files / "documents", "epoch_count": 1, "epoch_steps": 1, "quant": 0, **flags},
    )
    flag = "load_adapter" if "peft" in flags else "load_state"
    given = {name: str(value) for name, value in {**common, flag: tmp_path / "run" / "rwkv-final.pth"}.items()}
    _, after = evaluate(TrainConfig.from_flags({**given, "evaluate": "1", "grad_cp": "1"}))
    assert "which was trained on" not in capsys.readouterr().out
    other = "0" if flags.get("quant") else "1"
    _, otherwise = evaluate(TrainConfig.from_flags({**given, "evaluate": "1", "quant": other}))
    assert f"which was trained on {'nf4' if flags.get('quant') else 'unpacked'} weights" in capsys.readouterr().out
    assert after is not None
    assert otherwise is not None
    measured = held_out_rows(tmp_path / "run")[-1]["held_out"]["overall"]
    away, further = (abs(dataclasses.asdict(found)["overall"] - measured) for found in (after, otherwise))
    assert away < 0.3 * further  # not 0: the file is bf16
