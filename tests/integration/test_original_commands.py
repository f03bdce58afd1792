"""The commands of RWKV-LM-State-4bit's README, word for word."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_checkpoint
from original_commands import ORPO, PAIRS, REJECTS, SFT, replaced, words
from running import PICTURE, Ended, files_in, left_by_run, metrics, run_script, write_documents

from src.cli import given_train_flags
from src.config import TrainConfig


def parsed(command: str) -> TrainConfig:
    """The configuration a command makes."""
    return TrainConfig.from_flags(given_train_flags(words(command)))


def test_sft_is_parsed() -> None:
    config = parsed(SFT)
    assert config == TrainConfig(
        my_testing="x060", load_model="base_model/rwkv-16.pth", load_partial=1, wandb="RWKV-LM State-tuning",
        proj_dir="1B6-State-Tuning", data_file="dataset/dataset", data_type="binidx", dataload="pack",
        vocab_size=65536, ctx_len=4096, n_layer=24, n_embd=2048, epoch_steps=1000, epoch_count=1000, beta2=0.999,
        accelerator="gpu", precision="bf16", strategy="deepspeed_stage_1", quant=1, warmup_steps=10,
        train_type="states", lr_init=1.0, lr_final=0.01,
    )  # fmt: skip
    assert config.notes() == ["--load_partial 1 is not needed: states missing in a base model start at zero"]


def test_orpo_is_parsed() -> None:
    config = parsed(ORPO)
    assert (config.orpo, config.orpo_type, config.orpo_alpha, config.rlhf_max_corpus_len) == (1, 0, 0.0006, 1024)
    assert (config.rlhf_train_file, config.weight_decay, config.warmup_steps) == ("orpotest.save", 0.0, 100)
    assert (config.n_layer, config.n_embd, config.fapi_logging_callback) == (32, 2048, 0)
    assert any("--data_file default_text_document is ignored" in note for note in config.notes())


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder with the files the SFT command names: a World-vocabulary model of two layers, and a data set."""
    (tmp_path / "base_model").mkdir()
    (tmp_path / "dataset").mkdir()
    tiny_checkpoint(
        tmp_path / "base_model" / "rwkv-16.pth", n_layer=2, n_embd=64, vocab_size=65536, dtype=torch.bfloat16
    )
    write_documents(tmp_path / "dataset" / "dataset", [700, 54, 5000], vocab_size=65536, dtype=np.int32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def two_steps(command: str, folder: Path, n_embd: str) -> Ended:
    """Runs a training command with accelerator, sizes and epochs replaced, and looks at what it leaves in `folder`."""
    sizes = {"n_layer": "2", "n_embd": n_embd, "epoch_steps": "2", "epoch_count": "1"}
    arguments = replaced(words(command), accelerator="cpu", **sizes)
    ended = run_script("train.py", *arguments)
    assert ended.code == 0, ended.err
    assert files_in(folder) - {"wandb"} == left_by_run("rwkv-0.pth") | PICTURE
    assert len(metrics(folder)) == 2
    return ended


def check_sft_runs(workplace: Path) -> None:
    """Runs the SFT command."""
    ended = two_steps(SFT, workplace / "1B6-State-Tuning", n_embd="64")
    assert "--strategy deepspeed_stage_1 needs a GPU: running on a single device instead" in ended.out
    assert "--load_partial 1 is not needed" in ended.out


@pytest.mark.slow
def test_sft_runs(workplace: Path) -> None:
    check_sft_runs(workplace)


@pytest.mark.slow
def test_sft_runs_on_the_originals_sample(workplace: Path, real_inputs: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(real_inputs / f"default_text_document{suffix}", workplace / "dataset" / f"dataset{suffix}")
    check_sft_runs(workplace)


def test_the_sft_command_refuses_a_model_of_another_size(workplace: Path) -> None:
    ended = run_script("train.py", *replaced(words(SFT), accelerator="cpu"))
    assert ended.code == 2
    assert "--n_layer 24 contradicts the checkpoint, which has 2" in ended.err
    assert "--n_embd 2048 contradicts the checkpoint, which has 64" in ended.err


CSV = """prompt,chosen,reject
"What is rain?","Water that falls from clouds.

It fills rivers, lakes and wells.",
雨是什么？,从云里落下的水。,
"Say ""yes"", please.",Yes.,
"""


@pytest.fixture
def preference_workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a World-vocabulary model where the ORPO command looks for it, and a CSV without rejects."""
    pytest.importorskip("pyrwkv_tokenizer")
    (tmp_path / "base_model").mkdir()
    tiny_checkpoint(
        tmp_path / "base_model" / "Anarchy-RWKV-2B-68.pth", n_embd=32, vocab_size=65536, dtype=torch.bfloat16
    )
    (tmp_path / "answers.csv").write_text(CSV, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def test_the_three_orpo_commands_run_one_after_the_other(preference_workplace: Path) -> None:
    model = "base_model/Anarchy-RWKV-2B-68.pth"
    arguments = words(REJECTS, "rlhf_generate_reject.py")
    arguments = replaced(arguments, load_model=model, input_csv="answers.csv", output_csv="preferences.csv")
    ended = run_script("rlhf_generate_reject.py", *arguments, accelerator="cpu", max_tokens=6)
    assert ended.code == 0, ended.err
    with open("preferences.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with open("answers.csv", encoding="utf-8", newline="") as file:
        given = list(csv.DictReader(file))
    assert [(row["prompt"], row["chosen"]) for row in rows] == [(row["prompt"], row["chosen"]) for row in given]
    assert all(row["reject"].strip() for row in rows)

    arguments = words(PAIRS, "PrepareOrpoDataset.py")
    arguments = replaced(arguments, load_model=model, input_csv="preferences.csv", output_save="orpotest.save")
    ended = run_script("PrepareOrpoDataset.py", *arguments)
    assert ended.code == 0, ended.err
    pairs = torch.load("orpotest.save", weights_only=True)
    assert len(pairs) == 1000
    assert {(type(pair), len(pair), *pair[3:]) for pair in pairs} == {(tuple, 5, 0.5, 0.5)}
    assert all(len(prompt) > 3 and chosen and reject for prompt, chosen, reject, *_ in pairs)
    texts = Path("orpotest.texts.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(texts[1]) == {"text": "User: 雨是什么？\n\nAssistant: 从云里落下的水。\n\n"}
    assert len(texts) == 1000

    folder = preference_workplace / "2BStateOrpo12"
    ended = two_steps(ORPO, folder, n_embd="32")
    states = torch.load(folder / "rwkv-final.pth", weights_only=True)
    assert set(states) == {"blocks.0.att.time_state", "blocks.1.att.time_state"}
    assert all(state.isfinite().all() and state.any() for state in states.values())
    assert "--data_file default_text_document is ignored" in ended.out
    assert "warning: under 1 % the run is plain SFT" in ended.out
    left = {"base_model", "answers.csv", "preferences.csv", "preferences.csv.run.json", "orpotest.save"}
    assert files_in(preference_workplace) == left | {"orpotest.texts.jsonl", "2BStateOrpo12"}
