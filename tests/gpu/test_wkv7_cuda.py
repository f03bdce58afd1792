"""The torch form of wkv7 on a GPU against float64 there, which unit tests hold to the token loop within 1e-13."""

from pathlib import Path

import pytest
import torch
from operators import assert_close, relative_rms, run_with_gradients
from torch import Tensor
from wkv7_inputs import KINDS, draw_inputs, in_float32, trained_inputs

from src.ops.wkv7 import wkv7, wkv7_branching

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


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
