"""Whole steps issued kernel by kernel without a GPU: they run through, and launch no more than they have to."""

from collections import Counter
from typing import Any

import pytest
import torch
from host_cost import ROWS, Operators, step_of
from without_gpu import issued

from src.ops.delta_rule_whole import Inputs, whole
from src.ops.wkv7_cuda import one_part

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


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (torch.zeros(2, 64, 64, dtype=torch.bfloat16), "state has dtype torch.bfloat16, expected float32"),
        (torch.zeros(3, 2, 64, 64), r"state has shape \[3, 2, 64, 64\], expected \[2, 64, 64\], alone or 1 times"),
        (torch.zeros(1, 64, 64), r"state has shape \[1, 64, 64\], expected"),
    ],
)
def test_a_start_that_kernels_would_misread_is_refused(state: torch.Tensor, expected: str) -> None:
    rows = torch.zeros(1, 5, 128, dtype=torch.bfloat16)
    heads, channels = torch.zeros(2, 64), torch.zeros(128)
    given = Inputs(*[rows] * 5, None, None, rows, channels, channels, heads, channels, channels, state)
    with issued(), pytest.raises(RuntimeError, match=expected):
        whole(given, 1e-5, one_part(5, None))
