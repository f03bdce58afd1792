"""How long a run's saves hold the training thread, and how long they take in the background.

    python tests/bench/bench_save.py --size 7b --folder /disk

Makes states of the true shapes on the CPU (fp32, with Adam's two moments) and saves them as a run does. A save on a GPU
differs in its snapshot only, which is then a copy to pinned memory. Prints the mean and the largest of both times, what
`--save_minutes 0` makes of them, and the share of a run's time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))

import torch  # noqa: E402
from bench.bench_step import SIZES  # noqa: E402
from torch import nn  # noqa: E402

from src.model.rwkv6 import RWKV6Shape  # noqa: E402
from src.training.folder import RESUME, Places  # noqa: E402
from src.training.resume import (  # noqa: E402
    OptimizerMoments,
    RandomState,
    RunWriter,
    SavedRun,
    TrainedTensors,
    seconds_between_saves,
)


def states_of(size: str) -> dict[str, nn.Parameter]:
    """Fresh states of every layer by checkpoint key."""
    layers, channels = SIZES[size]
    shape = RWKV6Shape.from_sizes(n_layer=layers, n_embd=channels, vocab_size=65536, double_extra_dim=channels == 4096)
    return {key: nn.Parameter(torch.randn(state)) for key, state in shape.state_shapes().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the system's for such files")
    parser.add_argument("--saves", type=int, default=10)
    options = parser.parse_args()

    named = states_of(options.size)
    optimizer = torch.optim.AdamW(named.values())
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    parts = {
        "trained": TrainedTensors(named.items()),
        "optimizer": OptimizerMoments(named.items(), optimizer, engine=False),
        "random": RandomState(torch.device("cpu")),
    }
    held, taken = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        writer = RunWriter(Places(Path(folder), "bench", print))
        for step in range(options.saves):
            begun = time.perf_counter()
            states = {name: part.state() for name, part in parts.items()}
            writer.write(SavedRun(Path(folder), "bench", step, {}, {}, {}, states, None))
            held.append(time.perf_counter() - begun)
            writer.wait()
            taken.append(writer.seconds)
        size_bytes = (Path(folder) / RESUME).stat().st_size
    every = seconds_between_saves(writer.bytes, statistics.mean(taken))
    print(
        f"states of {options.size}: {sum(p.numel() for p in named.values()):,} values, {size_bytes / 1e6:.0f} MB a save"
    )
    for what, seconds in (("training thread held", held), ("until it is on the disk", taken)):
        print(f"{what:24} {statistics.mean(seconds):.3f} s, at most {max(seconds):.3f}")
    print(
        f"saved every {every:.0f} s: {statistics.mean(held) / every:.2%} of the time in the training thread, "
        f"{statistics.mean(taken) / every:.2%} with the writing beside it"
    )


if __name__ == "__main__":
    main()
