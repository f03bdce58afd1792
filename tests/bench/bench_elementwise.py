"""Element-wise operators of RWKV-7's layers beside their definitions in torch, forward and backward.

    python tests/bench/bench_elementwise.py
    python tests/bench/bench_elementwise.py --tokens 4096 --channels 2560

Microseconds on the GPU, median of many; in brackets how fast the kernel moves what it has to read and write. Rows of
activations, nothing trained but what comes before them; head size 64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.ops import delta_rule, elementwise

Function = Callable[..., Any]


def cases(tokens: int, channels: int) -> dict[str, tuple[Function, Function, list[Tensor], list[Any], int, int]]:
    """Name -> fused, definition, activations, the other arguments, tensors moved forward, and backward."""

    def rows() -> Tensor:
        return torch.randn(1, tokens, channels, dtype=torch.bfloat16, device="cuda")

    def by_head() -> Tensor:
        return rows().view(1, tokens, -1, 64)

    def row(count: int = 1) -> Tensor:
        return torch.randn(count, channels, dtype=torch.bfloat16, device="cuda")

    def six(function: Function) -> Function:
        return lambda z, maa: function(z, None, maa, None, None)

    vectors = [row().view(-1, 64), row().flatten(), row().flatten(), 64e-5]
    return {
        "six mixes": (six(elementwise.shift_mixes), six(elementwise.shift_mixes_torch), [rows()], [row(6)], 7, 7),
        "keys": (delta_rule.removal_and_replacement, delta_rule.removal_and_replacement_torch,
                 [by_head(), by_head()], [row(), row()], 5, 7),
        "values": (delta_rule.value_residual, delta_rule.value_residual_torch, [rows() for _ in range(3)], [], 4, 7),
        "readout": (delta_rule.group_norm_bonus_gate, delta_rule.group_norm_bonus_gate_torch,
                    [*(by_head() for _ in range(4)), rows()], vectors, 6, 11),
        "squared ReLU": (elementwise.squared_relu, elementwise.squared_relu_torch, [rows()], [], 2, 3),
    }  # fmt: skip


def microseconds(run: Callable[[], object], repeats: int = 30) -> float:
    """Of the GPU alone: a recorded run, replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    cache = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    found = []
    for _ in range(repeats):
        cache.zero_()  # what a kernel reads has left the cache by then in a layer, too
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(found)


def measured(function: Function, activations: list[Tensor], others: list[Any]) -> tuple[float, float]:
    """Forward and backward."""
    with torch.no_grad():
        forward = microseconds(lambda: function(*activations, *others))
    leaves = [tensor.detach().requires_grad_() for tensor in activations]

    def both() -> object:
        outputs = function(*leaves, *others)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return torch.autograd.grad(outputs, leaves, outputs)

    return forward, microseconds(both) - forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=4096)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, [{options.tokens}, {options.channels}], us\n")
    print("| operator | torch forward | fused | torch backward | fused |\n|---|---|---|---|---|")
    for name, (fused, definition, activations, others, *moved) in cases(options.tokens, options.channels).items():
        times = measured(definition, activations, others), measured(fused, activations, others)
        cells = []
        for plain, ours, tensors in zip(*times, moved, strict=True):
            speed = tensors * activations[0].nbytes / ours / 1e6
            cells += [f"{plain:.1f}", f"{ours:.1f} ({speed:.2f} TB/s)"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
