"""Seconds from the command to the first training step, and the host memory that takes.

    python tests/bench/bench_load.py --size 14b --folder /data

Writes a random bf16 checkpoint of the true shape to the folder, unless it is there already, and starts
`train.py` on it. "host memory" is the largest amount of anonymous and shared memory the process had; the system's
cache of the file, which it can drop at any time, is not in it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))

from bench.bench_step import SIZES, RandomTensors  # noqa: E402


def write_model(path: Path, size: str) -> None:
    """A random checkpoint, made on the GPU in a process of its own."""
    import torch

    from src.checkpoint import save_model
    from src.model.rwkv6 import RWKV6Shape

    layers, channels = SIZES[size]
    shape = RWKV6Shape.from_sizes(n_layer=layers, n_embd=channels, vocab_size=65536, double_extra_dim=channels == 4096)
    tensors = RandomTensors(shape, torch.device("cuda"))
    save_model(path, {name: tensors[name].cpu() for name in tensors}, torch.bfloat16)  # type: ignore[attr-defined]


def own_memory(process_id: int) -> int:
    """Bytes of anonymous and shared memory of a process, without mapped libraries; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="14b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--write-only", action="store_true", help=argparse.SUPPRESS)
    options, extra = parser.parse_known_args()
    model = options.folder / f"random-{options.size}.pth"
    if options.write_only:
        write_model(model, options.size)
        return
    if not model.exists():
        subprocess.run([sys.executable, __file__, "--write-only", *sys.argv[1:]], check=True)

    import numpy as np
    from binidx_files import write_binidx

    folder = Path(tempfile.mkdtemp())
    documents = [np.random.default_rng(i).integers(1, 65529, 1025) for i in range(4)]
    write_binidx(str(folder / "data"), documents, np.int32)
    command = [
        sys.executable, str(REPOSITORY / "train.py"), "--load_model", str(model), "--data_file", str(folder / "data"),
        "--proj_dir", str(folder / "out"), "--epoch_count", "1", *extra,
    ]  # fmt: skip
    metrics = folder / "out" / "metrics.jsonl"
    start = time.perf_counter()
    first_step, most = None, 0
    with (folder / "log.txt").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            most = max(most, own_memory(process.pid))
            if first_step is None and metrics.exists() and metrics.stat().st_size:
                first_step = time.perf_counter() - start
            time.sleep(0.02)
    if process.returncode or first_step is None:
        sys.exit((folder / "log.txt").read_text())
    file_gib, host_gib = model.stat().st_size / 2**30, most / 2**30
    print(f"{options.size}, {file_gib:.1f} GiB: first step after {first_step:.1f} s, host memory {host_gib:.2f} GiB")


if __name__ == "__main__":
    main()
