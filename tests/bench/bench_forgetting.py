"""What fine-tuning teaches and what it makes a model forget: the demonstration's base model, equal tokens for each way.

    python tests/bench/bench_forgetting.py --old base/base-held-out.jsonl

`base-held-out.jsonl` is text of the kind the base model was raised on; src/demo/README.md says how it is made. The loss
is in nats per byte, on the first 512 bytes of each document, of the held-out passages in the new style and of that.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from src.checkpoint import open_checkpoint  # noqa: E402
from src.data.sources import open_documents  # noqa: E402
from src.device import spare_threads  # noqa: E402
from src.loading import LoadOptions, open_model  # noqa: E402
from src.training.evaluation import held_out_loss  # noqa: E402

DEMO = ROOT / "src" / "demo"
CTX_LEN = 512
COMMON = {
    "load_model": DEMO / "base.pth", "data_file": DEMO / "sft.jsonl", "ctx_len": CTX_LEN, "micro_bsz": 2,
    "epoch_count": 1, "epoch_save": 0, "plot": 0, "quant": 0, "grad_cp": 0, "accelerator": "cpu", "save_minutes": 1000,
}  # fmt: skip
WEIGHTS = {"lr_init": 5e-4, "lr_final": 5e-5}
ROWS: dict[str, dict[str, object]] = {
    "states": {"lr_init": 5, "lr_final": 0.1},
    "full": {"train_type": "none", **WEIGHTS},
    "full-bf16": {"train_type": "none", "weights": "bf16", "fused_update": 1, **WEIGHTS},
    "full-bf16-8bit": {"train_type": "none", "weights": "bf16", "fused_update": 1, "optim": "adamw8bit", **WEIGHTS},
    "lisa": {"peft": "lisa", "lisa_r": 2, "lisa_k": 10, **WEIGHTS},
    "lisa-layers": {"peft": "lisa", "lisa_r": 2, "lisa_k": 10, "train_parts": "[]", **WEIGHTS},
}


def losses(result: Path | None, is_state: bool, old: Path) -> tuple[float, float]:
    """On held-out text of the new style and of the old."""
    base = open_checkpoint(DEMO / "base.pth" if result is None or is_state else result)
    options = LoadOptions(torch.device("cpu"), torch.float32, trained=())
    model = open_model(base, options, state_file=result if result is not None and is_state else "", quiet=True)
    model.eval()
    found = []
    for path in (DEMO / "sft-held-out.jsonl", old):
        documents = open_documents("jsonl", str(path), base.info.shape.vocab_size, ctx_len=CTX_LEN)
        found.append(held_out_loss(model, documents=documents, ctx_len=CTX_LEN).overall)
    return found[0], found[1]


def main() -> None:
    """Trains each way in a process of its own and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=130)
    parser.add_argument("--rows", default=",".join(ROWS))
    chosen = parser.parse_args()
    spare_threads(torch.device("cpu"), open_checkpoint(DEMO / "base.pth").info.shape)
    print("| way | new style | old style | s/step |\n|---|---|---|---|", flush=True)
    new, old = losses(None, False, chosen.old)
    print(f"| base | {new:.4f} | {old:.4f} | |", flush=True)
    for name in chosen.rows.split(","):
        with tempfile.TemporaryDirectory() as folder:
            flags = {**COMMON, **ROWS[name], "proj_dir": folder, "epoch_steps": chosen.steps}
            words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
            begin = time.perf_counter()
            subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=True, capture_output=True)
            seconds = (time.perf_counter() - begin) / chosen.steps
            new, old = losses(Path(folder) / "rwkv-final.pth", name == "states", chosen.old)
            print(f"| {name} | {new:.4f} | {old:.4f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
