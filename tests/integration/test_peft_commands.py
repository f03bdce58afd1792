"""The command lines of RWKV-PEFT, word for word: what they are understood as, and that they run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from binidx_files import write_binidx
from factories import tiny_checkpoint
from original_commands import replaced, words
from peft_commands import COMMANDS, PRETRAIN
from running import metrics, run_script, write_documents
from tables import some

from src.cli import given_train_flags
from src.config import TrainConfig, translated

COMMON = {
    "vocab_size": 65536, "ctx_len": 512, "epoch_steps": 1000, "epoch_count": 1, "micro_bsz": 8, "n_layer": 32,
    "n_embd": 2560, "lr_init": 2e-5, "lr_final": 2e-5, "warmup_steps": 0, "adam_eps": 1e-8, "accelerator": "gpu",
    "precision": "bf16", "strategy": "deepspeed_stage_1", "grad_cp": 1, "dataload": "pad", "quant": 0, "optim": "none",
    "data_type": "binidx", "lr_schedule": "exp", "data_shuffle": 1, "parts": ("time", "ln"), "trains_states": False,
}  # fmt: skip
STATES = {
    "method": "states", "trains_states": True, "micro_bsz": 2, "epoch_steps": 800, "epoch_count": 10, "lr_init": 1.0,
    "lr_final": 0.01, "warmup_steps": 10, "n_layer": 24, "n_embd": 2048, "parts": (),
}  # fmt: skip
LORA = {"method": "lora", "adapter_r": 32, "lora_alpha": 32.0, "lora_dropout": 0.0}
INFCTX = {"ctx_len": 2048, "chunk_ctx": 512, "bptt_chunks": 0}
EXPECTED: dict[str, dict[str, object]] = {
    "lora": LORA,
    "lora, packed": {**LORA, "quant": 1, "quant_type": "nf4"},
    "pissa": {"method": "pissa", "adapter_r": 32, "svd_niter": 4},
    "bone of the seed": {"method": "bat", "adapter_r": 64},
    "bone of December 2024": {
        "method": "bone", "adapter_r": 64, "data_shuffle": 0, "wandb": "peft-loss", "ctx_len": 1024, "epoch_steps": 200,
    },
    "states": STATES,
    "states, packed": {**STATES, "quant": 1, "quant_type": "int8"},
    "pretraining": {
        "method": "full", "data_type": "jsonl", "sft_field": "query response", "lr_init": 3e-4,
        "lines_used": slice(None, 1000), "lr_final": 1e-4, "load_model": "", "parts": (),
    },
    "infctx": {**INFCTX, "method": "full", "parts": ()},
    "infctx, lora": {**INFCTX, **LORA},
    "parts in brackets": LORA,
    "no parts": {**LORA, "parts": ()},
    "answers": {**STATES, "loss_mask": "qa"},
}  # fmt: skip
ANSWERS = "--data_type sft trains on answers alone, as there: --loss_mask pad has no effect"
FLA = "--fla has no effect: the operator is chosen by the device"
STATE = "--train_type state is --train_type states"
THEIRS = "--train_type state is RWKV-PEFT's spelling: unquantised without --quant, as there"
CHUNKS = (
    "--train_type infctx is --train_type none --chunk_ctx 512; the gradient passes from chunk to chunk, unlike there "
    "(--bptt_chunks 1)"
)
NOTES: dict[str, list[str]] = {
    "lora, packed": ["--quant nf4 is --quant 1 --quant_type nf4"],
    "states": [FLA, STATE, THEIRS],
    "answers": [FLA, STATE, THEIRS],
    "states, packed": [FLA, STATE, "--quant int8 is --quant 1 --quant_type int8"],
    "infctx": [CHUNKS],
    "infctx, lora": [CHUNKS],
    "pretraining": [
        ANSWERS,
        "--data_type sft is --data_type jsonl, written as chats of World models",
        "--data_type sft is RWKV-PEFT's spelling: unquantised without --quant, as there",
        "--data_type sft without --peft and --train_type trains every weight, as there",
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_it_is_understood_as(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("P").touch()
    given = given_train_flags(words(COMMANDS[name]))
    made = TrainConfig.from_flags(given)
    wanted = {**COMMON, **EXPECTED[name]}
    assert {key: getattr(made, key) for key in wanted} == wanted
    assert sorted(translated(given).notes) == sorted(NOTES.get(name, []))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a World-vocabulary model of two layers, a binidx, and questions with their answers."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny_checkpoint(folder / "base.pth", n_embd=64, dim_ffn=256, vocab_size=65536, dtype=torch.bfloat16)
    write_documents(folder / "data", [700, 54, 50, 20, 90, 33, 12, 25, 61], vocab_size=65536, dtype=np.int32)
    lines = [{"query": f"What comes after {n}?", "response": f"After {n} comes {n + 1}."} for n in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", some(COMMANDS, "pissa", "states, packed", "infctx", "answers"))
def test_it_runs(name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other paths, sizes and accelerator, and two steps of an epoch."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    sizes = {"n_layer": "2", "n_embd": "64", "epoch_steps": "2", "epoch_count": "1", "accelerator": "cpu"}
    sizes["micro_bsz"] = "2"
    arguments = words(COMMANDS[name])
    if COMMANDS[name] == PRETRAIN:
        pytest.importorskip("pyrwkv_tokenizer")
        paths = {"data_file": str(workplace / "data.jsonl")}
    else:
        paths = {"load_model": str(workplace / "base.pth"), "data_file": str(workplace / "data")}
    if name == "answers":
        tokenizer = pytest.importorskip("pyrwkv_tokenizer").RWKVTokenizer()
        chats = [f"User: What comes after {n}?\n\nAssistant: After {n} comes {n + 1}.\n\n" for n in range(9)]
        write_binidx(tmp_path / "chats", [[*tokenizer.encode(chat), 0] for chat in chats])
        paths["data_file"] = str(tmp_path / "chats")
    ended = run_script("train.py", *replaced(arguments, proj_dir=str(tmp_path), **paths, **sizes))
    assert ended.code == 0, ended.err
    for note in NOTES.get(name, []):
        assert f"note: {note}\n" in ended.out
    assert len(metrics(tmp_path)) == 2
    written = torch.load(tmp_path / "rwkv-final.pth", weights_only=True)
    endings = {"lora_A", "lora_B"} if "lora" in name or "parts" in name else set()
    found = {key.rpartition(".")[2] for key in written}
    assert endings <= found
    assert (found == {"time_state"}) == ("states" in name or name == "answers")
    assert ("loss       on answers only (--loss_mask qa): " in ended.out) == (name == "answers")
