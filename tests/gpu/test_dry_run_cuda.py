"""What a dry run says of memory and time on a GPU, beside what the run then takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint
from running import ROOT, write_documents

from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

METHODS: dict[str, list[str]] = {
    "states, nf4": ["--quant", "1"],
    "lora": ["--quant", "0", "--peft", "lora", "--lora_r", "16"],
    "every weight": ["--train_type", "none", "--grad_cp", "0", "--accumulate_grad_batches", "2"],
    "orpo": ["--quant", "1", "--orpo", "1", "--rlhf_max_corpus_len", "256"],
}


def run(*words: object) -> str:
    """train.py in a process of its own, whose memory on the GPU is its own."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ},
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", METHODS)
def test_it_is_within_a_tenth_of_what_the_run_takes(name: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth", n_layer=6, n_embd=512, vocab_size=4096, head_size=64, dtype=torch.bfloat16)
    write_documents(tmp_path / "documents", [900] * 12 + [500] * 6, vocab_size=4096)
    pairs = [PreferencePair([n + 1] * 200, [n + 2] * 150, [n + 3] * 180) for n in range(16)]
    save_pairs(tmp_path / "pairs.save", pairs)
    data = ["--rlhf_train_file", tmp_path / "pairs.save"] if name == "orpo" else ["--data_file", tmp_path / "documents"]
    words = [
        *("--load_model", tmp_path / "base.pth", *data, "--ctx_len", 1024, "--epoch_count", 2, "--plot", 0),
        *("--proj_dir", tmp_path / "out", *METHODS[name]),
    ]
    before = run(*words, "--dry_run", 1)
    assert not (tmp_path / "out").exists()
    after = run(*words)
    unit, peak = re.search(r"by part, (\w+).*?allocator peak ([\d,.]+)", before, re.S).groups()  # type: ignore[union-attr]
    used = re.search(r"^ +measured +([\d,.]+)", before, re.M)
    assert used is not None
    scale = 1024 if unit == "MiB" else 1
    ran = re.search(r"allocator peak ([\d.]+) GiB, device used ([\d.]+) GiB", after)
    assert ran is not None
    said = [float(number.replace(",", "")) / scale for number in (peak, used[1])]
    compared = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # what a device uses in all is other tests', too
    assert said[:compared] == [pytest.approx(float(number), rel=0.1, abs=0.02) for number in ran.groups()[:compared]]
