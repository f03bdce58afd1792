"""The commands of RWKV-LM-State-4bit's README, word for word."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_checkpoint
from running import RUN_FILES, files_in, metrics, run_script, write_documents

from src.cli import given_train_flags
from src.config import TrainConfig

COMMON = (
    "--train_type states --data_type binidx --vocab_size 65536 --ctx_len 4096 --epoch_steps 1000 --epoch_count 1000 "
    "--epoch_begin 0 --epoch_save 1 --micro_bsz 1 --lr_init 1 --lr_final 0.01 --beta1 0.9 --beta2 0.999 "
    "--adam_eps 1e-8 --accelerator gpu --devices 1 --precision bf16 --grad_cp 1 --my_testing x060 "
    "--strategy deepspeed_stage_1 --quant 1 --quant_type nf4 --double_extra_dim 0"
)
SFT = (
    'python train.py --load_model base_model/rwkv-16.pth --load_partial 1 --wandb "RWKV-LM State-tuning" '
    "--proj_dir 1B6-State-Tuning --data_file dataset/dataset --n_layer 24 --n_embd 2048 --warmup_steps 10 " + COMMON
)
ORPO = (
    'python train.py --load_model base_model/Anarchy-RWKV-2B-68.pth --wandb "RWKV-LM State-4bit Orpo 2B" '
    "--proj_dir 2BStateOrpo12 --data_file default_text_document --n_layer 32 --n_embd 2048 "
    "--weight_decay 0.000 --warmup_steps 100 --orpo 1 --orpo_alpha 0.0006 --rlhf_max_corpus_len 1024 "
    "--orpo_debug 0 --orpo_type 0 --rlhf_train_file orpotest.save " + COMMON + " \\\n"
)
"""Ends in a stray backslash, as it does there."""


def words(command: str) -> list[str]:
    """The command's words as a shell makes them, without `python train.py`."""
    joined = command.replace("\\\n", " ")
    python, script, *arguments = shlex.split(joined)
    assert (python, script) == ("python", "train.py")
    return arguments


def parsed(command: str) -> TrainConfig:
    """The configuration a command makes."""
    return TrainConfig.from_flags(given_train_flags(words(command)))


def test_sft_is_parsed() -> None:
    config = parsed(SFT)
    assert config == TrainConfig(
        load_model="base_model/rwkv-16.pth", load_partial=1, wandb="RWKV-LM State-tuning", proj_dir="1B6-State-Tuning",
        data_file="dataset/dataset", data_type="binidx", dataload="pad", vocab_size=65536, ctx_len=4096, n_layer=24,
        n_embd=2048, epoch_steps=1000, epoch_count=1000, beta2=0.999, accelerator="gpu", precision="bf16",
        strategy="deepspeed_stage_1", quant=1, warmup_steps=10,
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


def check_sft_runs(workplace: Path) -> None:
    """Runs the SFT command with accelerator, sizes and epochs replaced; two steps."""
    replaced = {"--accelerator": "cpu", "--n_layer": "2", "--n_embd": "64", "--epoch_steps": "2", "--epoch_count": "1"}
    arguments = words(SFT)
    for flag, value in replaced.items():
        arguments[arguments.index(flag) + 1] = value
    ended = run_script("train.py", *arguments)
    assert ended.code == 0, ended.err
    folder = workplace / "1B6-State-Tuning"
    assert files_in(folder) - {"wandb"} == {*RUN_FILES, "rwkv-0.pth"}
    assert len(metrics(folder)) == 2
    assert "--strategy deepspeed_stage_1 needs a GPU: running on a single device instead" in ended.out
    assert "--load_partial 1 is not needed" in ended.out


def test_sft_runs(workplace: Path) -> None:
    check_sft_runs(workplace)


def test_sft_runs_on_the_originals_sample(workplace: Path, test_data: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(test_data / f"default_text_document{suffix}", workplace / "dataset" / f"dataset{suffix}")
    check_sft_runs(workplace)


def test_the_sft_command_refuses_a_model_of_another_size(workplace: Path) -> None:
    arguments = words(SFT)
    arguments[arguments.index("--accelerator") + 1] = "cpu"
    ended = run_script("train.py", *arguments)
    assert ended.code == 2
    assert "--n_layer 24 contradicts the checkpoint, which has 2" in ended.err
    assert "--n_embd 2048 contradicts the checkpoint, which has 64" in ended.err
