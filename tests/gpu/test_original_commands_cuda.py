"""The original's training commands, word for word, on random models of the true sizes, stopped by Ctrl-C."""

import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.bench_step import RandomTensors
from original_commands import ORPO, SFT, words
from running import metrics, started, wait_until, write_documents

from src.checkpoint import load_state, open_checkpoint, save_model
from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.model.rwkv6 import RWKV6Shape
from src.model.shape import ModelShape

pytest.importorskip("bitsandbytes")
pytest.importorskip("wandb")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def random_model(path: Path, n_layer: int, n_embd: int) -> ModelShape:
    """Writes a bf16 checkpoint with a World vocabulary."""
    shape = RWKV6Shape.from_sizes(n_layer=n_layer, n_embd=n_embd, vocab_size=65536)
    path.parent.mkdir(exist_ok=True)
    tensors = RandomTensors(shape, torch.device("cuda"))
    save_model(path, {name: tensors[name].cpu() for name in tensors}, torch.bfloat16)
    torch.cuda.empty_cache()
    return shape


def check_stopped_run(command: str, folder: Path, shape: ModelShape) -> None:
    """Runs the command, stops it after 20 steps and looks at what it leaves; prints seconds and memory."""
    with started("train.py", *words(command)) as process:
        wait_until(lambda: len(metrics(folder)) >= 20 or process.poll() is not None, seconds=300)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    print(out)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    lines = metrics(folder)
    assert f"stopped by SIGINT after {len(lines)} steps" in out
    assert 20 <= len(lines) < 1000
    states = load_state(folder / "rwkv-final.pth", shape)
    assert len(states) == shape.n_layer
    assert all(state.isfinite().all() and state.any() for state in states.values())


def test_sft_on_the_1_6b_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shape = random_model(Path("base_model/rwkv-16.pth"), 24, 2048)
    assert open_checkpoint(Path("base_model/rwkv-16.pth")).info.shape == shape
    Path("dataset").mkdir()
    write_documents(Path("dataset/dataset"), [4097, 300, 1500, 5000] * 5, vocab_size=65536, dtype=np.int32)
    check_stopped_run(SFT, Path("1B6-State-Tuning"), shape)
    shutil.rmtree("base_model")


def test_orpo_on_the_2b_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    shape = random_model(Path("base_model/Anarchy-RWKV-2B-68.pth"), 32, 2048)
    lengths = [[draw.randrange(20, 400) for _ in range(3)] for _ in range(40)]
    pairs = [PreferencePair(*([draw.randrange(1, 65529) for _ in range(n)] for n in triple)) for triple in lengths]
    save_pairs(Path("orpotest.save"), pairs)
    check_stopped_run(ORPO, Path("2BStateOrpo12"), shape)
    shutil.rmtree("base_model")
