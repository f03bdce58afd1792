"""The kernels around RWKV-7's recurrence, emulated on the CPU: what can be wrong without a GPU to see it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from delta_rule_cases import (
    SHAPES,
    Heads,
    check_a_key_of_zeros,
    check_keys,
    check_keys_with_unused_outputs,
    check_readout,
    check_that_wrong_arguments_are_named,
    check_values,
    check_values_near_saturation,
    combinations,
    layer,
    layer_gradients,
    strided,
)
from emulator.kernels import emulated, has_compiler
from operators import poisoned_memory
from torch.utils.checkpoint import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs g++")]

CPU = "cpu"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor is said to be on a GPU. Fresh memory is NaN: a kernel that forgets an element fails loudly."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with poisoned_memory(), emulated():
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_and_readout(shape: Heads) -> None:
    for wide in (False, True):
        check_keys(shape, (0, 1, 2, 3), CPU, wide=wide)
        check_readout(shape, tuple(range(8)), CPU, wide=wide)


def test_every_choice_of_gradients() -> None:
    for wanted in combinations(4):
        check_keys((2, 5, 3, 64), wanted, CPU)
    for wanted in combinations(8):
        check_readout((2, 5, 3, 64), wanted, CPU)


def test_outputs_that_are_not_used() -> None:
    for used in combinations(3):
        check_keys_with_unused_outputs(used, CPU)


def test_a_key_of_zeros_removes_nothing() -> None:
    check_a_key_of_zeros(CPU)


def test_values() -> None:
    for shape in ((1, 1, 8), (2, 15, 64), (3, 7, 2048)):
        for wanted in combinations(3):
            check_values(shape, wanted, CPU)
    check_values_near_saturation(CPU)


def test_wrong_arguments_are_named() -> None:
    check_that_wrong_arguments_are_named(CPU)


def test_a_readout_of_a_large_mean_is_exact() -> None:
    check_readout((1, 4, 2, 64), (0, 1, 2, 3, 4), CPU, mean=256.0)


def test_two_runs_checkpoints_and_strided_inputs_give_the_same_bits() -> None:
    expected = layer_gradients(layer, CPU)
    for run in (layer, partial(checkpoint, layer, use_reentrant=False), strided):
        for first, second in zip(expected, layer_gradients(run, CPU), strict=True):
            assert torch.equal(first, second)


def test_threads_in_another_order_give_the_same_bits() -> None:
    expected = layer_gradients(layer, CPU)
    with emulated(order=1):
        for first, second in zip(expected, layer_gradients(layer, CPU), strict=True):
            assert torch.equal(first, second)
