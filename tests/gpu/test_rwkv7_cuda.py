"""RWKV-7 on a GPU: whole runs, recorded, and logits against fp32 on the CPU."""

from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint
from running import metrics, train, write_documents

from src.checkpoint import open_checkpoint
from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.loading import LoadOptions, build_model

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

RUNS: dict[str, dict[str, object]] = {
    "states": {"quant": 1, "dataload": "pack", "lr_init": 0.5},
    "states, every layer kept": {"quant": 1, "dataload": "pack", "lr_init": 0.5, "grad_cp": 2},
    "lora": {"peft": "lora", "lora_r": 8, "lr_init": 1e-2, "quant": 1},
    "full": {"train_type": "none", "lr_init": 1e-3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    sizes = {"n_layer": 3, "n_embd": 128, "head_size": 64}
    tiny_checkpoint(path, dtype=torch.bfloat16, holds_idle=True, architecture="x070", **sizes)
    return path


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns(name: str, base: Path, tmp_path: Path) -> None:
    data = write_documents(tmp_path / "documents", [60, 31, 90, 47, 33, 71])
    train(tmp_path / "out", load_model=base, data_file=data, accelerator="gpu", ctx_len=96, epoch_count=8, **RUNS[name])
    losses = [record["loss"] for record in metrics(tmp_path / "out")]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_preferences(base: Path, tmp_path: Path) -> None:
    pairs = [PreferencePair(list(range(n, 2 * n)), [60 + n] * n, [90 + n] * (n + 1)) for n in range(3, 9)]
    save_pairs(tmp_path / "pairs.save", pairs)
    train(
        tmp_path / "out", load_model=base, orpo=1, orpo_alpha=0.5, rlhf_train_file=tmp_path / "pairs.save",
        accelerator="gpu", quant=1, micro_bsz=4, epoch_steps=4, epoch_count=1,
    )  # fmt: skip
    assert len(metrics(tmp_path / "out")) == 4


def test_logits_in_bf16_are_close_to_fp32_on_the_cpu(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    tokens = torch.randint(257, (1, 70), generator=torch.Generator().manual_seed(1))
    logits = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = build_model(checkpoint, checkpoint.info.shape, LoadOptions(torch.device(device), dtype)).eval()
        assert model.can_be_recorded == (device == "cuda")
        with torch.no_grad():
            logits.append(model.logits(model(tokens)[0]).float().cpu())
    assert (logits[1] - logits[0]).norm() < 0.05 * logits[0].norm()
