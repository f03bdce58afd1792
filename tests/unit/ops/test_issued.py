"""Whole steps issued kernel by kernel without a GPU: they run through, and launch no more than they have to."""

from collections import Counter
from typing import Any

import pytest
from host_cost import ROWS, Operators, step_of
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


def operators(name: str, layers: int) -> Counter[str]:
    """Products and sums of the second step that are torch's."""
    with issued():
        step = step_of(ROWS[name], layers)
        step()
        with Operators() as counted:
            step()
    kinds = {"mm": "products", "bmm": "products", "addmm": "products", "addmm_": "products", "add": "sums"}
    found: Counter[str] = Counter()
    for operator, calls in counted.calls.items():
        if kind := kinds.get(operator.split(".")[1]):
            found[kind] += calls
    return found


# Of products three for each of six packed matrices, but for the feed-forward's second, whose result is known; of small
# maps in each of two passes four, and four in the backward. The sum is that of what goes to the value matrix's input
# and to its small map.
@pytest.mark.slow
def test_a_layer_of_rwkv7_takes_no_more_products_and_sums_than_this() -> None:
    of_a_layer = operators("states-x070", 3) - operators("states-x070", 2)
    assert of_a_layer == {"products": 29, "sums": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_bench_runs(name: str) -> None:
    assert launches(name, 2)
