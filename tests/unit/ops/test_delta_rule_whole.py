"""RWKV-7's joined node and its small maps at once, emulated on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from delta_rule_whole_cases import (
    CASES,
    CHOICES,
    NAMES,
    check_small_maps,
    check_that_maps_without_gradients_are_the_same,
    check_that_sums_are_rounded_once,
    check_whole,
    joined,
    results_of,
    tensors_of,
)
from emulator.kernels import emulated, has_compiler
from operators import poisoned_memory
from tables import covering

from src.ops import products

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs g++")]

CPU = "cpu"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor is said to be on a GPU. Fresh memory is NaN: a kernel that forgets an element fails loudly."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    card = SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with poisoned_memory(), emulated():
        yield


@pytest.mark.parametrize(
    ("name", "choice", "used"), covering(list(CASES), list(CHOICES), ["gated and final", "gated", "final"])
)
def test_it_is_what_its_parts_are(name: str, choice: str, used: str) -> None:
    if choice == "first" and name == "the first layer":
        choice = "value"
    if used == "final" and choice in ("gate", "bonus"):
        used = "gated"
    check_whole(name, choice, used, CPU)


def test_sums_are_rounded_once() -> None:
    check_that_sums_are_rounded_once(CPU)


def test_a_second_backward_is_refused() -> None:
    """The first one has used up memory of the node's own."""
    tensors = tensors_of(CPU, **CASES["packed"])
    gated, _ = joined(CASES["packed"], CPU)(*(x if x is None else x.requires_grad_() for x in tensors.values()))
    gated.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gated.sum().backward()


@pytest.mark.parametrize(
    ("rows", "count", "gate_width", "apart"), covering([1, 40], [2, 3], [16, 20, 3], [False, True])
)
def test_small_maps_are_those_of_each(rows: int, count: int, gate_width: int, apart: bool) -> None:
    check_small_maps(rows, count, gate_width, CPU, apart=apart)


def test_small_maps_without_gradients_are_the_same() -> None:
    check_that_maps_without_gradients_are_the_same(CPU)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_threads_in_another_order_give_the_same_bits(order: int) -> None:
    case = CASES["packed"]
    expected = results_of(joined(case, CPU), case, NAMES, "gated and final", CPU)
    with emulated(order=order):
        check_that_sums_are_rounded_once(CPU)
        again = results_of(joined(case, CPU), case, NAMES, "gated and final", CPU)
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_gradients_lie_side_by_side() -> None:
    case = CASES["rows"]
    found = results_of(joined(case, CPU), case, NAMES, "gated", CPU)
    for names in (("w_raw", "rate", "amount"), ("r", "k")):
        assert products._goes_on([found[name].flatten(0, -2) for name in names])
