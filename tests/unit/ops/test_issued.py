"""Whole steps issued kernel by kernel without a GPU: they run through, and launch no more than they have to."""

from typing import Any

import pytest
from host_cost import ROWS, step_of
from without_gpu import issued

pytest.importorskip("bitsandbytes")


def launches(name: str, layers: int) -> int:
    """Of the second step, when all that is prepared once is there."""
    count = 0

    def launch(*arguments: Any) -> int:
        nonlocal count
        count += 1
        return 0

    with issued(launch):
        step = step_of(ROWS[name], layers)
        step()
        count = 0
        step()
    return count


# With grad_cp 1, of states on 4-bit matrices: the time mix's are dequantised by one launch in each pass, the
# feed-forward's one by one, as they share a buffer.
@pytest.mark.parametrize(
    ("name", "of_a_layer"),
    [("states-x060", 36), pytest.param("states-x070", 33, marks=pytest.mark.slow)],
)
def test_a_layer_launches_no_more_than_this(name: str, of_a_layer: int) -> None:
    assert launches(name, 3) - launches(name, 2) == of_a_layer


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_bench_runs(name: str) -> None:
    assert launches(name, 2)
