"""What a training step costs the host, where a step is issued kernel by kernel: needs no GPU.

    python tests/bench/bench_host.py                              every row
    python tests/bench/bench_host.py --rows states-x060 --steps 20

The program's own steps of a model of true depth and tiny width: forward, recomputation, backward. Kernels are launched
by way of the launcher on a driver that does nothing, so that what is measured is Python, autograd and torch's share of
issuing, and products of 72 rows and 64 columns. A GPU's own operators cost other numbers of microseconds; the counts
are the same. First table: CPU milliseconds of a step (the least of `--steps`), launches, calls of torch operators and
of Python functions. Then for each row where the microseconds of one layer go, in the shortest of the steps: each line
without those lines that it calls.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="by comma; all if none is named")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--operators", type=int, default=0, help="so many of a row's torch operators by calls")
    options = parser.parse_args()
    import torch
    from host_cost import COLUMNS, LAYERS, REST, ROWS, measured, watched_places, where_it_goes

    names = options.rows.split(",") if options.rows else list(ROWS)
    torch.set_num_threads(1)
    print("| row | CPU ms a step | launches | torch operators | Python functions |\n|---|---|---|---|---|")
    for name in names:
        figures = measured(ROWS[name], options.steps)
        operators = sum(figures.operators.values())
        print(f"| {name} | {figures.milliseconds:.1f} | {figures.launches} | {operators} | {figures.functions} |")
        for operator, calls in figures.operators.most_common(options.operators):
            print(f"    {calls / LAYERS:6.2f} a layer  {operator}")
    for name in names:
        cost = where_it_goes(ROWS[name], options.steps)
        print(f"\n{name}, us a layer\n\n| | {' | '.join(COLUMNS)} | sum |\n|---|" + "---|" * (len(COLUMNS) + 1))
        lines = {line: [cost.get((line, column), 0.0) for column in COLUMNS] for line in (*watched_places(), REST)}
        for line, values in sorted(lines.items(), key=lambda item: -sum(item[1])):
            if sum(values) >= 0.5:
                print(f"| {line} | " + " | ".join(f"{value:.0f}" for value in (*values, sum(values))) + " |")
        totals = [sum(column) for column in zip(*lines.values(), strict=True)]
        print("| all | " + " | ".join(f"{value:.0f}" for value in (*totals, sum(totals))) + " |")


if __name__ == "__main__":
    main()
