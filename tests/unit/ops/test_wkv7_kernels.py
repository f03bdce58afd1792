"""The CUDA kernels of wkv7, run on a CPU thread by thread, against float64.

What `tests/gpu/test_wkv7_cuda.py` shows on a GPU, without one, and that nothing in shared memory lacks an order. Of
time and of races in global memory it knows nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator.kernels import emulated, has_compiler
from operators import poisoned_memory, run_with_gradients
from torch import Tensor
from wkv7_inputs import (
    BRANCHES,
    INPUT_NAMES,
    KINDS,
    TOKEN_NAMES,
    as_kernels_take,
    assert_accurate,
    assert_reverses,
    branches_of,
    draw_inputs,
    trained_inputs,
)

from src.ops import wkv7 as operator_module
from src.ops import wkv7_cuda as kernels
from src.ops.wkv7 import wkv7, wkv7_branching
from src.ops.wkv7_cuda import wkv7_branching_cuda, wkv7_cuda

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs g++")]


@pytest.fixture(params=kernels.FORMS, ids=["halves", "wide", "small"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "_form_for", lambda heads, device: request.param)
    with emulated():
        yield


def kernel(*, backend: str, **arguments: Any) -> tuple[Tensor, Tensor]:
    """In the form of `wkv7`."""
    return wkv7_cuda(**arguments)


def results_and_truth(
    inputs: dict[str, Tensor], cu_seqlens: Tensor | None = None, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    low, double = as_kernels_take(inputs)
    with poisoned_memory():
        results = run_with_gradients(kernel, low, "cuda", cu_seqlens, **options)
    return results, run_with_gradients(wkv7, double, "chunked", cu_seqlens, **options)


@pytest.mark.parametrize("final_gradient", [False, True], ids=["y", "y and final state"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 60, 200])
def test_lengths(form: None, tokens: int, final_gradient: bool) -> None:
    assert_accurate(*results_and_truth(draw_inputs(1, tokens, 2, 64), final_gradient=final_gradient))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_inputs(form: None, kind: str) -> None:
    assert_accurate(*results_and_truth(draw_inputs(1, 256, 1, 64, kind=kind)))


@pytest.mark.parametrize("tokens", [None, 1, 15, 16, 17, 400])
def test_activations_of_a_trained_model(form: None, tokens: int | None, real_inputs: Path) -> None:
    for inputs in trained_inputs(real_inputs, 64, tokens=tokens):
        assert_accurate(*results_and_truth(inputs))


@pytest.mark.parametrize("states", [None, 3], ids=["shared state", "own states"])
def test_batches(form: None, states: int | None) -> None:
    assert_accurate(*results_and_truth(draw_inputs(3, 77, 2, 64, states=states)))


@pytest.mark.parametrize("lengths", [[0, 1, 15, 16, 17], [70, 0, 33, 24], [0, 0, 5], [17] * 9])
@pytest.mark.parametrize("own_states", [False, True], ids=["shared state", "own states"])
def test_packed_sequences(form: None, lengths: list[int], own_states: bool) -> None:
    inputs = draw_inputs(1, sum(lengths), 2, 64, states=len(lengths) if own_states else None)
    assert_accurate(*results_and_truth(inputs, torch.tensor([0, *lengths]).cumsum(0)))


@pytest.mark.parametrize("wanted", [INPUT_NAMES, TOKEN_NAMES, ("state",)], ids=["all", "tokens", "state"])
@pytest.mark.parametrize("name", BRANCHES)
def test_sequences_that_continue_others(form: None, name: str, wanted: tuple[str, ...]) -> None:
    roots, children, _ = BRANCHES[name]
    states = len(roots) if name == "uneven" else None
    low, double = as_kernels_take(draw_inputs(1, sum(roots) + sum(children), 1, 64, states=states))
    branches = branches_of(name)

    def exact(*, cu_seqlens: None, backend: str, **arguments: Any) -> tuple[Tensor, Tensor]:
        return wkv7_branching(**arguments, **branches)

    def found(*, cu_seqlens: None, backend: str, **arguments: Any) -> tuple[Tensor, Tensor]:
        return wkv7_branching_cuda(**arguments, **branches)

    truth = run_with_gradients(exact, double, "", wanted=wanted)
    with poisoned_memory():
        assert_accurate(run_with_gradients(found, low, "", wanted=wanted), truth)


@pytest.mark.parametrize("wanted", INPUT_NAMES)
def test_each_gradient_alone(form: None, wanted: str) -> None:
    assert_accurate(*results_and_truth(draw_inputs(2, 50, 1, 64), wanted=(wanted,)))


@pytest.mark.parametrize("order", range(1, 6))
@pytest.mark.parametrize("form", kernels.FORMS, ids=["halves", "wide", "small"])
def test_neither_form_nor_order_of_warps_changes_a_bit(
    form: kernels.Form, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    low, _ = as_kernels_take(draw_inputs(1, 150, 1, 64))
    runs = []
    for of_form, of_run in ((kernels.SMALL, 0), (form, order)):
        monkeypatch.setattr(kernels, "_form_for", lambda heads, device, form=of_form: form)
        with emulated(order=of_run):
            runs.append(run_with_gradients(kernel, low, "cuda"))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_an_infinite_decay_and_no_decay(form: None) -> None:
    inputs = draw_inputs(1, 40, 1, 64)
    inputs["w_raw"] = torch.where(inputs["w_raw"] > -1, torch.inf, -torch.inf)
    results, truth = results_and_truth(inputs)
    assert not results["dw_raw"].any()
    del results["dw_raw"]
    assert_accurate(results, truth)


def test_a_nan_does_not_hide(form: None) -> None:
    for name in INPUT_NAMES:
        low, _ = as_kernels_take(draw_inputs(1, 20, 1, 64))
        low[name].view(-1)[5] = torch.nan
        assert wkv7_cuda(**low)[0].isnan().any(), name


def test_the_reversal_model_reverses_in_bf16(form: None, monkeypatch: pytest.MonkeyPatch, real_inputs: Path) -> None:
    monkeypatch.setattr(operator_module, "_takes_kernel", lambda r: True)
    monkeypatch.setattr(operator_module, "_fits_kernel", lambda r: r.dtype == torch.bfloat16)
    assert_reverses(real_inputs, torch.device("cpu"))
