"""Forward and backward of long rows in chunks: seconds, memory, and on what kernels the GPU spends its time.

    python tests/bench/bench_chunks.py
    python tests/bench/bench_chunks.py --rows long-7b-16k,long-7b-64k --kernels 16
    python tests/bench/bench_chunks.py --rows long-7b-64k --cuda_graph 0

Random weights of the true shapes, one row a step, the optimizer left out. Rows of one base share a process and the
model. Before its steps a row has one of four chunks, which records them, and pinned host memory as a first step leaves
it. Time is that of the last step, which waits for the GPU before and after; "peak" is torch's allocator, "used" what
the device reports, with nothing left of earlier rows. Flags of train.py go at the end of the command.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "bench")]

BASES = {
    "lora-1.6b": ("1.6b", ("--quant", "0", "--peft", "lora")),
    "1.6b": ("1.6b", ("--quant", "1")),
    "7b": ("7b", ("--quant", "1")),
}
"""Size, and the flags that say what is trained on what; the names begin those of rows."""


@dataclass(frozen=True)
class Row:
    """A row of tokens, computed in so many steps."""

    base: str
    tokens: int
    flags: str
    steps: int = 3


HOST = "--chunk_keep host"
ROWS = {
    "long-lora-1.6b-16k": Row("lora-1.6b", 16384, "--chunk_ctx 2048 --grad_cp 0"),
    "long-lora-1.6b-16k-short": Row("lora-1.6b", 16384, "--chunk_ctx 512 --grad_cp 0"),
    "long-lora-1.6b-16k-inputs": Row("lora-1.6b", 16384, "--chunk_ctx 4096 --chunk_keep inputs"),
    "long-7b-4k": Row("7b", 4096, f"--chunk_ctx 2048 {HOST}"),
    "long-7b-16k": Row("7b", 16384, f"--chunk_ctx 2048 {HOST}"),
    "long-7b-64k": Row("7b", 65536, f"--chunk_ctx 2048 {HOST}", steps=1),
    "long-7b-256k": Row("7b", 262144, f"--chunk_ctx 2048 {HOST}", steps=1),
    "long-7b-64k-again": Row("7b", 65536, f"--chunk_ctx 4096 {HOST}", steps=1),
    "long-7b-64k-inputs": Row("7b", 65536, "--chunk_ctx 4096 --chunk_keep inputs", steps=1),
    "long-1.6b-16k": Row("1.6b", 16384, f"--chunk_ctx 2048 --grad_cp 0 {HOST}"),
    "long-1.6b-1m": Row("1.6b", 1048576, f"--chunk_ctx 2048 --grad_cp 0 {HOST}", steps=1),
}


def run_base(names: list[str], kernels: int, extra: list[str]) -> None:
    """Runs rows of one base in this process and prints a line for each."""
    import torch
    from bench_step import SIZES, RandomTensors

    from src.adapters.method import method_of
    from src.loading import build_model
    from src.model.rwkv6 import RWKV6Shape
    from src.training.engine import apply_hardware, resolve_hardware
    from src.training.run import load_options

    size, of_base = BASES[ROWS[names[0]].base]
    layers, channels = SIZES[size]
    shape = RWKV6Shape.from_sizes(n_layer=layers, n_embd=channels, vocab_size=65536, double_extra_dim=channels == 4096)
    folder = Path(tempfile.mkdtemp())
    model: Any = None
    for name in names:
        row = ROWS[name]
        config = _config(folder, row, [*of_base, *extra])
        if model is None:
            hardware, method = resolve_hardware(config), method_of(config)
            apply_hardware(hardware, config, small_messages=method.small)
            model = build_model(
                RandomTensors(shape, hardware.device), shape, load_options(config, method, hardware, shape)
            )
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds, issued, memory, table = _run(model, row, config, kernels)
        per_token = seconds / row.tokens * 1e6
        print(
            f"| {name} {row.flags} | {row.tokens:,} | {seconds:.3f} | {per_token:.1f} | {issued:.3f} | {memory} |",
            flush=True,
        )
        print("".join(table), end="", flush=True)


def _config(folder: Path, row: Row, flags: list[str]) -> Any:
    from bench_step import _text_flags

    from src.cli import given_train_flags
    from src.config import TrainConfig

    data = folder / str(row.tokens)
    data.mkdir(exist_ok=True)
    given = [
        "--load_model", "random", "--proj_dir", str(folder), "--dataload", "pad", "--strategy", "auto",
        "--ctx_len", str(row.tokens), "--epoch_steps", "8", "--epoch_count", "1",
        *_text_flags(data, row.tokens, 2), *row.flags.split(), *flags,
    ]  # fmt: skip
    return TrainConfig.from_flags(given_train_flags(given))


def _run(model: Any, row: Row, config: Any, kernels: int) -> tuple[float, float, str, list[str]]:
    """Seconds of the last step, those after which all was issued, memory, and what a further step's kernels take."""
    import torch

    from src.adapters.method import method_of
    from src.training.module import TrainingModule
    from src.training.run import choose_recomputation
    from src.training.work import prepare_work

    work, method = prepare_work(config, model.shape), method_of(config)
    choose_recomputation(model, work, config, method)
    module = TrainingModule(model, work.objective, config, method, work.dataset)
    batches = iter(module.train_dataloader())
    module.training_step(module.objective.stage(model, _beginning(work, 4 * config.chunk_ctx)), 0).backward()
    _pin_once(config, model, row.tokens)

    def step(number: int) -> tuple[float, float]:
        batch = next(batches)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        module.training_step(batch, number).backward()
        issued = time.perf_counter() - begin
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        model.zero_grad()
        return seconds, issued

    for number in range(row.steps):
        seconds, issued = step(number)
    free, total = torch.cuda.mem_get_info()
    memory = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} / {(total - free) / 2**30:.2f}"
    if not kernels:
        return seconds, issued, memory, []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(row.steps)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:kernels]
    lines = [f"{e.self_device_time_total / 1e3:9.1f} ms {e.count:6d} {e.key[:100]}\n" for e in events]
    return seconds, issued, memory, lines


def _beginning(work: Any, tokens: int) -> Any:
    """A batch of the first row's beginning."""
    from src.data.batches import padded_batch
    from src.data.rounding import EXACT

    row = work.dataset.rounded(0, EXACT).tokens[0, : tokens + 1]
    return padded_batch([row.numpy()], [None], [0])


def _pin_once(config: Any, model: Any, tokens: int) -> None:
    """Has the allocator pin what waits on the host, which it keeps."""
    import torch

    chunks = -(-tokens // config.chunk_ctx) if config.chunk_keep != "device" else 0
    shape = model.shape
    sizes = [4 * shape.n_layer * shape.n_head * shape.head_size**2, *[2 * shape.n_layer * shape.n_embd] * 2]
    if config.chunk_keep == "inputs":
        sizes += [2 * config.chunk_ctx * shape.n_embd] * (shape.n_layer + 1)
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes * chunks]
    del held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--kernels", type=int, default=0, help="so many kernels of each row, with their times")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options, extra = parser.parse_known_args()
    names = options.rows.split(",")
    if options.here:
        run_base(names, options.kernels, extra)
        return
    import torch

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| row | tokens | s | µs a token | s until issued | peak / used GiB |\n|---|---|---|---|---|---|", flush=True)
    for _, group in itertools.groupby(names, key=lambda name: ROWS[name].base):
        command = [sys.executable, __file__, "--here", "--rows", ",".join(group), "--kernels", str(options.kernels)]
        subprocess.run([*command, *extra], cwd=REPOSITORY, check=False)


if __name__ == "__main__":
    main()
