"""What `--dry_run 1` says of memory and time, beside what a run then takes: random weights of the true shapes.

    python tests/bench/bench_dry_run.py                              states, LoRA and ORPO in nf4, of 1.6B, 7B and 14B
    python tests/bench/bench_dry_run.py --rows sft-7b-1024,lora-7b
    python tests/bench/bench_dry_run.py --rows sft-0.1b-128 --accelerator cpu --steps 4

Rows are those of `bench_step.py`. Each is examined in a process of its own and trained in another. "estimated" comes
from flags and sizes alone, "tried" from the few steps that a dry run takes, "run" is what the run's device shows at
its end (on a CPU the process at its largest). Flags of train.py go at the end of the command.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))
sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))

from bench_step import ROWS, RandomTensors, Row, flags_of, run_row  # noqa: E402

DEFAULT_ROWS = "sft-1.6b-1024,sft-7b-1024,sft-14b-1024,qlora-1.6b,qlora-7b,qlora-14b,orpo-1.6b,orpo-7b,orpo-14b"
GIB = 2**30


def examine_row(row: Row, steps: int, strategy: str, extra: list[str]) -> dict[str, float]:
    """What a dry run finds, in this process."""
    from src.checkpoint import Checkpoint, CheckpointInfo
    from src.cli import given_train_flags
    from src.commands import dry_run
    from src.config import TrainConfig
    from src.device import resolve_device

    shape = row.shape()
    folder = Path(tempfile.mkdtemp())
    words = flags_of(row, folder, steps, strategy, extra)
    model = folder / "random.pth"
    model.touch()
    words[words.index("--load_model") + 1] = str(model)
    config = TrainConfig.from_flags(given_train_flags(words))
    tensors = RandomTensors(shape, resolve_device(config.accelerator, config.precision).device)

    class RandomCheckpoint(Checkpoint):
        """A model file whose tensors are made when they are asked for."""

        def __init__(self, outlines: Mapping[str, object]) -> None:
            super().__init__(CheckpointInfo(shape, "bfloat16", False), outlines, model)  # type: ignore[arg-type]

        def read(self, key: str, *, pinned: bool = False) -> object:  # type: ignore[override]
            tensor = self.outlines[key]
            return tensors[key] if tensor.is_meta else tensor

        def overlaid(self, others: Mapping[str, object]) -> RandomCheckpoint:  # type: ignore[override]
            return RandomCheckpoint({**self.outlines, **others})

    import torch

    outlines = {name: torch.empty(size, device="meta") for name, size in shape.parameter_shapes().items()}
    dry_run.open_checkpoint = lambda path: RandomCheckpoint(outlines)  # type: ignore[assignment]
    found = dry_run.examine(config)
    assert found.tried is not None, "it does not fit"
    trial = found.tried.trial
    return {
        "estimated_gib": (found.expected.total + found.beside_bytes) / GIB,
        "tried_gib": trial.used_bytes / GIB,
        "tried_peak_gib": trial.peak_bytes / GIB,
        "seconds": trial.step_seconds * trial.accumulation,
        "largest_ctx_len": found.largest.ctx_len,
        "largest_micro_bsz": found.largest.micro_bsz,
    }


def train_row(row: Row, steps: int, strategy: str, extra: list[str]) -> dict[str, float]:
    """What a run takes, in this process."""
    from src.system import process_bytes

    figures = run_row(row, steps, strategy, extra)
    if not figures["used_gib"]:
        figures["used_gib"] = figures["peak_gib"] = process_bytes()[1] / GIB
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=DEFAULT_ROWS)
    parser.add_argument("--steps", type=int, default=12, help="of the run")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options, extra = parser.parse_known_args()
    if options.one:
        work = {"examine": examine_row, "train": train_row}[options.one[0]]
        print("RESULT " + json.dumps(work(ROWS[options.one[1]], options.steps, options.strategy, extra)))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.rows.split(","):
        for work_name in ("examine", "train"):
            command = [sys.executable, __file__, "--one", work_name, name, "--steps", str(options.steps)]
            command += ["--strategy", options.strategy, *extra]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if lines:
                results.setdefault(name, {})[work_name] = json.loads(lines[0][7:])
            else:
                print(f"{name}: {work_name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}", file=sys.stderr)
        print(name, results.get(name), file=sys.stderr, flush=True)
    print("| work | estimated GiB | tried GiB | run GiB | s/step: tried / run |")
    print("|---|---|---|---|---|")
    for name, both in results.items():
        if both.keys() == {"examine", "train"}:
            before, run = both["examine"], both["train"]
            print(
                f"| {' '.join([ROWS[name].title, *extra])} "
                f"| {before['estimated_gib']:.2f} ({before['estimated_gib'] / run['used_gib'] - 1:+.1%}) "
                f"| {before['tried_gib']:.2f} ({before['tried_gib'] / run['used_gib'] - 1:+.1%}) "
                f"| {run['used_gib']:.2f} | {before['seconds']:.3f} / {run['seconds']:.3f} |"
            )
    if options.json:
        Path(options.json).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
