"""Held-out loss of every way of training after equally many steps, each at several learning rates, on the bundled demo.

    python tests/bench/bench_methods.py                                      the table
    python tests/bench/bench_methods.py --methods states,lora --steps 40
    python tests/bench/bench_methods.py --one lora 1e-3                      one run, as JSON
    python tests/bench/bench_methods.py --json runs.json --quant 1           its flags, then those of train.py

Every run is train.py itself, in a process of its own, on an unquantised base: the same documents in the same order, the
rate warmed up over 10 steps and falling to a tenth. Adapters have r 16, because the matrices are narrow (192 x 192 and
672 x 192), and no further weights. `--load_model`, `--data_file`, `--val_file` and `--ctx_len` at the end put another
model or other texts in the demo's place.

With --json the runs are kept and not done again by the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "src" / "demo"

ADAPTER_RATES = ("2e-5", "2e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1")
WHOLE_RATES = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2")
R = "16"
FLAGS = {
    "load_model": str(DEMO / "base.pth"), "data_file": str(DEMO / "sft.jsonl"),
    "val_file": str(DEMO / "sft-held-out.jsonl"), "ctx_len": "512", "micro_bsz": "2", "epoch_count": "1",
    "epoch_save": "0", "plot": "0", "grad_cp": "0", "quant": "0", "accelerator": "cpu",
}  # fmt: skip
ALONE = {"train_parts": "[]"}
LORA = {"peft": "lora", "lora_r": R, "lora_alpha": R}


@dataclass(frozen=True)
class Way:
    """A way of training: its name in the table, its flags, and the rates it is tried at."""

    title: str
    flags: dict[str, str]
    rates: tuple[str, ...] = ADAPTER_RATES


METHODS = {
    "states": Way("states", {"train_type": "states"}, ("0.3", "1", "3", "10", "30", "100")),
    "lora": Way("LoRA", {**LORA, **ALONE}),
    "pissa": Way("PiSSA", {"peft": "pissa", "pissa_r": R, **ALONE}),
    "bone": Way("Bone", {"peft": "bone", "bone_r": R, **ALONE}),
    "bat": Way("Bat", {"peft": "bat", "bone_r": R, **ALONE}),
    "states-lora": Way(
        "states (`--lr_state 10`) + LoRA", {**LORA, **ALONE, "train_type": "states", "lr_state": "10"}, ("3e-3", "1e-2")
    ),
    "lisa": Way("LISA, 2 layers, others every 10 steps", {"peft": "lisa", "lisa_r": "2", "lisa_k": "10"}, WHOLE_RATES),
    "none": Way("every weight", {"train_type": "none"}, WHOLE_RATES),
}
HELD_OUT = re.compile(r" (before|after): +loss ([\d.]+|nan|inf) ")


def run_once(method: str, rate: str, steps: int, extra: list[str]) -> dict[str, Any]:
    """Trains once and returns the held-out losses, the number of trained values, and the size of the file.

    Raises:
        RuntimeError: the run failed; the message is its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        final = f"{float(rate) / 10:g}"
        flags = {
            **FLAGS, **METHODS[method].flags, "epoch_steps": str(steps), "lr_init": rate, "lr_final": final,
            "proj_dir": str(Path(folder) / "run"),
        }  # fmt: skip
        words = [word for name, value in flags.items() if f"--{name}" not in extra for word in (f"--{name}", value)]
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "train.py"), *words, *extra],
            capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        losses = {name: float(loss) for name, loss in HELD_OUT.findall(done.stdout)}
        if done.returncode or losses.keys() != {"before", "after"}:
            raise RuntimeError(f"{method} {rate}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
        file = Path(folder) / "run" / "rwkv-final.pth"
        return {**losses, "trained": _values_in(file), "bytes": file.stat().st_size}


def _values_in(file: Path) -> int:
    """Number of bf16 values in a .pth file."""
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename) // 2


def table(runs: dict[str, dict[str, Any]], steps: int) -> str:
    """The runs as a Markdown table, each method's best in bold; rates without a run are left out."""
    rows = []
    for name, way in METHODS.items():
        done = {rate: runs[f"{name} {rate}"] for rate in way.rates if f"{name} {rate}" in runs}
        if not done:
            continue
        best = min(run["after"] for run in done.values())
        after = {rate: run["after"] for rate, run in done.items()}
        losses = [f"{rate} **{x:.4f}**" if x == best else f"{rate} {x:.4f}" for rate, x in after.items()]
        run = next(iter(done.values()))
        rows.append(f"| {way.title} | {run['trained']:,} | {run['bytes'] / 1e3:,.0f} kB | {', '.join(losses)} |")
    before = next(iter(runs.values()))["before"]
    return "\n".join(
        [
            f"| trained | values | file | rate and held-out loss after {steps} steps; before: {before:.4f} |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--json", default="", help="a file that keeps the runs")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "RATE"), help="a single run")
    options, extra = parser.parse_known_args()
    if options.one:
        print(json.dumps(run_once(*options.one, options.steps, extra)))
        return
    kept = Path(options.json) if options.json else None
    runs: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    for method in options.methods.split(","):
        for rate in METHODS[method].rates:
            if f"{method} {rate}" in runs:
                continue
            runs[f"{method} {rate}"] = run_once(method, rate, options.steps, extra)
            print(method, rate, runs[f"{method} {rate}"], file=sys.stderr, flush=True)
            if kept:
                kept.write_text(json.dumps(runs, indent=1))
    print(table(runs, options.steps))


if __name__ == "__main__":
    main()
