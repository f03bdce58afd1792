"""What the model answers to a user's own prompts while a run goes on (`--sample_prompts`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_checkpoint
from running import (
    Ended,
    assert_same_end,
    files_in,
    go_on,
    left_by_run,
    refusal,
    stopped,
    train,
    try_train,
    write_documents,
)
from tables import some

from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.generate import SamplingSettings

pytestmark = pytest.mark.usefixtures("architecture")

LARGE_RATE = {"lr_init": 3, "lr_final": 3}
"""Which states need to be seen in so few steps."""
METHODS: dict[str, dict[str, object]] = {
    "states": {"dropout": 0.2, **LARGE_RATE},
    "nf4": {"quant": 1, "quant_head": 1, "accumulate_grad_batches": 2, "epoch_steps": 12, **LARGE_RATE},
    "lora": {"peft": "lora", "lora_r": 4, "lora_dropout": 0.1, "quant": 1},
    "bone": {"peft": "bone", "bone_r": 8, "grad_cp": 2},
    "lisa": {"peft": "lisa", "lisa_r": 1, "lisa_k": 3},
    "full": {"train_type": "none", "dataload": "pad", "weights": "bf16", "fused_update": 1},
    "chunks": {"chunk_ctx": 8, **LARGE_RATE},
    "orpo": {"orpo": 1, **LARGE_RATE},
}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.training.samples._SETTINGS", SamplingSettings(top_p=0.9, max_tokens=8, stop=""))


@pytest.fixture(scope="module")
def files(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pth`, `documents`, `pairs.save`, and `prompts`."""
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "base.pth", dtype=torch.bfloat16)
    write_documents(folder / "documents", [30, 12, 25, 18, 9, 33])
    pairs = [PreferencePair(list(range(n, 2 * n)), [60 + n] * n, [90 + n] * (n + 1)) for n in range(3, 9)]
    save_pairs(folder / "pairs.save", pairs)
    (folder / "prompts").write_text('Who?\n{"prompt": "What is it?"}\n{"text": "A text"}\nAgain?\n', encoding="utf-8")
    return folder


def run(files: Path, folder: Path, **flags: object) -> Ended:
    given = {"load_model": files / "base.pth", "epoch_count": 1, "epoch_save": 0, "lr_init": 3e-2, "lr_final": 3e-2}
    data = {"rlhf_train_file": files / "pairs.save"} if "orpo" in flags else {"data_file": files / "documents"}
    return train(folder, **{**given, **data, **flags})


def samples(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "run"} for line in lines]


@pytest.mark.parametrize("name", some(METHODS, "nf4", "lisa", "chunks", "orpo"))
def test_it_changes_no_step(name: str, files: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "without", **METHODS[name])
    ended = run(files, tmp_path / "with", sample_prompts=files / "prompts", sample_steps=4, **METHODS[name])
    one, other = (torch.load(tmp_path / n / "rwkv-final.pth", weights_only=True) for n in ("without", "with"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert files_in(tmp_path / "with") == left_by_run("rwkv-0.pth") | {"samples.jsonl"}
    found = samples(tmp_path / "with")
    assert [row["step"] for row in found] == [4] * 4 + [6] * 4
    assert [row["prompt"] for row in found] == ["Who?", "What is it?", "A text", "Again?"] * 2
    assert found[0]["before"] == found[4]["before"]  # the base model, with the same random numbers
    assert any(row["before"] != row["now"] for row in found)
    assert ended.err.count(": samples\n") == 2
    assert "  > What is it?\n    before  " in ended.err
    assert "and 1 more in samples.jsonl" in ended.err


def test_a_run_that_goes_on_compares_with_the_same(files: Path, tmp_path: Path) -> None:
    flags = {"sample_prompts": files / "prompts", "sample_steps": 2, "peft": "lora", "lora_r": 4}
    run(files, tmp_path / "whole", **flags)
    given = {"load_model": files / "base.pth", "epoch_count": 1, "epoch_save": 0, "lr_init": 3e-2, "lr_final": 3e-2}
    stopped(3, tmp_path / "two", data_file=files / "documents", **given, **flags)
    go_on(tmp_path / "two")
    assert_same_end(tmp_path / "whole", tmp_path / "two")
    assert samples(tmp_path / "whole") == samples(tmp_path / "two")


def test_prompts_that_come_later_are_compared_with_the_start(files: Path, tmp_path: Path) -> None:
    run(files, tmp_path / "whole", sample_prompts=files / "prompts")
    given = {"load_model": files / "base.pth", "epoch_count": 1, "epoch_save": 0, "lr_init": 3e-2, "lr_final": 3e-2}
    stopped(3, tmp_path / "two", data_file=files / "documents", **given)
    go_on(tmp_path / "two", sample_prompts=files / "prompts")
    assert samples(tmp_path / "whole") == samples(tmp_path / "two")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"sample_steps": 5}, "--sample_steps 5 has nothing to answer"),
        ({"sample_prompts": "/nowhere/prompts"}, "/nowhere/prompts does not exist"),
    ],
)
def test_what_cannot_be_answered_is_refused(flags: dict[str, object], said: str, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    given = {"load_model": files / "base.pth", "data_file": files / "documents"}
    assert said in refusal(try_train(folder, **given, **flags), folder)
