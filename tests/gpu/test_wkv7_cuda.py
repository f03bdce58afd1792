"""wkv7 on a GPU against float64 there, which unit tests hold to the token loop within 1e-13.

The CUDA kernels are held to KERNEL_LIMITS; the torch form, which float32 and other head sizes take, is nearly exact.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_operators import fresh_leaves
from operators import assert_close, poisoned_memory, relative_rms, run_with_gradients
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
    in_float32,
    trained_inputs,
)

from src.errors import KernelError
from src.ops import wkv7_cuda as kernels
from src.ops.wkv7 import wkv7, wkv7_branching

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def check(inputs: dict[str, Tensor], cu_seqlens: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """Holds the kernels against float64, in memory that starts as NaN; returns their results."""
    low, double = as_kernels_take(inputs, "cuda")
    with poisoned_memory():
        results = run_with_gradients(wkv7, low, "cuda", cu_seqlens, **options)
    assert_accurate(results, run_with_gradients(wkv7, double, "chunked", cu_seqlens, **options))
    return results


@pytest.mark.parametrize("final_gradient", [False, True], ids=["y", "y and final state"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 60, 500, 4096])
def test_lengths(tokens: int, final_gradient: bool) -> None:
    check(draw_inputs(1, tokens, 8, 64), final_gradient=final_gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [200, 4096])
def test_kinds_of_inputs(tokens: int, kind: str) -> None:
    check(draw_inputs(1, tokens, 4, 64, kind=kind))


@pytest.mark.parametrize("tokens", [None, 1, 15, 16, 17, 60, 500, 4096])
def test_activations_of_a_trained_model_in_the_kernels(tokens: int | None, real_inputs: Path) -> None:
    for inputs in trained_inputs(real_inputs, 64, tokens=tokens):
        check(inputs)


def test_the_reversal_model_reverses_in_bf16(real_inputs: Path) -> None:
    assert_reverses(real_inputs, torch.device("cuda"))


@pytest.mark.parametrize("heads", [1, 32, 64, 300])
@pytest.mark.parametrize("states", [None, 3], ids=["shared state", "own states"])
def test_batches(heads: int, states: int | None) -> None:
    check(draw_inputs(3, 77, heads, 64, states=states))


@pytest.mark.parametrize("lengths", [[0, 1, 15, 16, 17], [300, 0, 700, 24], [0, 0, 5], [17] * 20, [1500]])
@pytest.mark.parametrize("own_states", [False, True], ids=["shared state", "own states"])
def test_packed_sequences(lengths: list[int], own_states: bool) -> None:
    inputs = draw_inputs(1, sum(lengths), 4, 64, states=len(lengths) if own_states else None)
    check(inputs, torch.tensor([0, *lengths], device="cuda").cumsum(0))


@pytest.mark.parametrize("wanted", [INPUT_NAMES, TOKEN_NAMES, ("state",)], ids=["all", "tokens", "state"])
@pytest.mark.parametrize("final_gradient", [False, True], ids=["y", "y and final state"])
@pytest.mark.parametrize("name", BRANCHES)
def test_sequences_that_continue_others(name: str, final_gradient: bool, wanted: tuple[str, ...]) -> None:
    roots, children, _ = BRANCHES[name]
    states = len(roots) if name == "uneven" else None
    low, double = as_kernels_take(draw_inputs(1, sum(roots) + sum(children), 4, 64, states=states), "cuda")
    branches = branches_of(name, "cuda")

    def operator(*, cu_seqlens: None, backend: str, **arguments: Any) -> tuple[Tensor, Tensor]:
        return wkv7_branching(**arguments, **branches)

    truth = run_with_gradients(operator, double, "", final_gradient=final_gradient, wanted=wanted)
    with poisoned_memory():
        results = run_with_gradients(operator, low, "", final_gradient=final_gradient, wanted=wanted)
    assert_accurate(results, truth)


@pytest.mark.parametrize("wanted", INPUT_NAMES)
def test_each_gradient_alone(wanted: str) -> None:
    check(draw_inputs(2, 200, 4, 64), wanted=(wanted,))


def test_state_gradient_alone_keeps_neither_k_nor_v() -> None:
    low, double = as_kernels_take(draw_inputs(2, 1100, 4, 64), "cuda")
    gradients = []
    for inputs in (low, double):
        leaves = {name: tensor.clone().requires_grad_(name == "state") for name, tensor in inputs.items()}
        y, _ = wkv7(**leaves)
        for name in ("k", "v"):
            leaves[name].fill_(torch.nan)
        gradients += torch.autograd.grad(y, leaves["state"], double["r"].to(y.dtype))
    assert_accurate({"dstate": gradients[0]}, {"dstate": gradients[1]})


@pytest.mark.parametrize("batch", [1, 8])
def test_results_repeat_bit_for_bit(batch: int) -> None:
    low, _ = as_kernels_take(draw_inputs(batch, 1024, 32, 64), "cuda")
    first = run_with_gradients(wkv7, low, "cuda")
    for _ in range(3):
        again = run_with_gradients(wkv7, low, "cuda")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_all_forms_of_the_scans_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    low, _ = as_kernels_take(draw_inputs(1, 700, 8, 64), "cuda")
    results = []
    for form in kernels.FORMS:
        if form is kernels.SMALL or form.fits(kernels._limits(low["r"].device)[1]):
            monkeypatch.setattr(kernels, "_form_for", lambda heads, device, form=form: form)
            results.append(run_with_gradients(wkv7, low, "cuda"))
    assert all(torch.equal(results[-1][name], other[name]) for other in results for name in other)


def test_without_gradients_nothing_is_saved() -> None:
    low, _ = as_kernels_take(draw_inputs(1, 4096, 32, 64), "cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in low.items()}
    with torch.no_grad():
        wkv7(**leaves)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y, final = wkv7(**leaves)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= y.numel() * 2 + final.numel() * 4 + 2**20
    assert torch.equal(wkv7(**leaves)[0], y)


def test_other_stream_and_strided_inputs() -> None:
    low, double = as_kernels_take(draw_inputs(2, 130, 4, 64), "cuda")
    truth = run_with_gradients(wkv7, double, "chunked")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        strided = {name: low[name].transpose(1, 2).contiguous().transpose(1, 2) for name in TOKEN_NAMES}
        y, final = wkv7(**strided, state=low["state"])
    stream.synchronize()
    assert_accurate({"y": y, "final state": final}, truth)


def test_graph_capture_of_packed_sequences_with_gradients() -> None:
    low, _ = as_kernels_take(draw_inputs(1, 700, 4, 64), "cuda")
    borders = torch.tensor([0, 100, 100, 700], dtype=torch.int32, device="cuda")
    dy = torch.randn_like(low["r"])

    def step() -> tuple[Tensor, ...]:
        leaves = fresh_leaves(low.values())
        y, _ = wkv7(**dict(zip(low, leaves, strict=True)), cu_seqlens=borders)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


def test_what_the_kernels_do_not_take() -> None:
    single, _ = in_float32(on_gpu(draw_inputs(1, 20, 2, 64)))
    with pytest.raises(KernelError, match=r"takes bfloat16 on a GPU at head size 64, got torch\.float32"):
        wkv7(**single, backend="cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 17, 500, 4096])
def test_float32(tokens: int, kind: str) -> None:
    single, double = in_float32(on_gpu(draw_inputs(1, tokens, 4, 64, kind=kind)))
    truth = run_with_gradients(wkv7, double, "chunked")
    # As on a CPU; where nothing is ever forgotten no error is either.
    assert_close(run_with_gradients(wkv7, single, "chunked"), truth, 1e-5 if kind == "repeated delta rule" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [None, [700, 0, 1, 16, 83]])
def test_low_precision_packed_sequences(lengths: list[int] | None, dtype: torch.dtype) -> None:
    inputs = on_gpu(draw_inputs(1, 800, 4, 64, states=None if lengths is None else len(lengths)))
    low = {name: tensor.float() if name == "state" else tensor.to(dtype) for name, tensor in inputs.items()}
    borders = None if lengths is None else torch.tensor([0, *lengths], device="cuda").cumsum(0)
    truth = run_with_gradients(wkv7, {name: tensor.double() for name, tensor in low.items()}, "chunked", borders)
    results, again = (run_with_gradients(wkv7, low, "chunked", borders) for _ in range(2))
    assert_close(results, truth, torch.finfo(dtype).eps)
    assert relative_rms(results["dstate"], truth["dstate"]) < 2e-6
    assert all(torch.equal(results[name], again[name]) for name in results)


def test_branches_are_those_of_a_cpu() -> None:
    inputs, _ = in_float32(draw_inputs(1, 140, 2, 64))
    borders = (torch.tensor([0, 70, 100]), torch.tensor([0, 5, 40]), torch.tensor([1, 0]))
    expected = wkv7_branching(*inputs.values(), *borders, 100)
    found = wkv7_branching(*on_gpu(inputs).values(), *(tensor.cuda() for tensor in borders), 100)
    for own, other in zip(found, expected, strict=True):
        assert relative_rms(own.cpu(), other) < 1e-6


@pytest.mark.parametrize("size", [16, 64])
def test_activations_of_a_trained_model(size: int, real_inputs: Path) -> None:
    for inputs in trained_inputs(real_inputs, size):
        single, double = in_float32(on_gpu(inputs))
        truth = run_with_gradients(wkv7, double, "chunked")
        assert_close(run_with_gradients(wkv7, single, "chunked"), truth, 4e-6)
