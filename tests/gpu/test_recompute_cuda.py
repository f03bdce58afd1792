"""Recomputation on a GPU in bf16, with every kernel: gradients of whatever is trained, carried and wrapped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factories import ARCHITECTURES
from kept_tensors import kept_and_estimated
from recompute_cases import CASES, Gradients, errors_of_allowed, medians, model_of

from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.ops import delta_rule, delta_rule_cuda, elementwise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

Case = Callable[[LanguageModel], Gradients]


def gradients(
    case: Case, mode: Recompute, quant_type: str | None, dtype: torch.dtype, architecture: str = "x060"
) -> Gradients:
    model = model_of(mode, quant_type, "cuda", dtype, architecture)
    return {name: tensor.double() for name, tensor in case(model).items()}


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_as_close_to_fp32_as_those_of_plain_bf16(
    architecture: str, case: Case, quant_type: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against fp32 at most twice the error of plain torch operations in bf16, plus 2 % of the gradient's norm."""

    def measured() -> dict[str, float]:
        exact = gradients(case, Recompute.NOTHING, quant_type, torch.float32, architecture)
        with monkeypatch.context() as plain:
            plain.setattr(elementwise, "fused_kernels", lambda: None)
            plain.setattr(delta_rule_cuda, "can_take", lambda *_: False)
            rounded = gradients(case, Recompute.NOTHING, quant_type, torch.bfloat16, architecture)
        found = {mode: gradients(case, mode, quant_type, torch.bfloat16, architecture) for mode in Recompute}
        return {
            f"{name}, {mode}": error
            for mode, again in found.items()
            for name, error in errors_of_allowed(again, rounded, exact).items()
        }

    assert {name: error for name, error in medians(5, measured).items() if error > 1} == {}


@pytest.mark.parametrize("mode", list(Recompute))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trained_time_and_norm_parameters_switch_no_kernel_off(
    architecture: str, mode: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallen_back: list[str] = []
    for module in (elementwise, delta_rule):
        for name in (name for name in vars(module) if name.endswith("_torch")):
            monkeypatch.setattr(module, name, lambda *_, name=name: fallen_back.append(name))  # and fails after that
    case = next(case for case in CASES if case.__name__ == "time_and_norm_parameters")
    gradients(case, mode, "nf4", torch.bfloat16, architecture)
    assert fallen_back == []


@pytest.mark.parametrize(
    "run",
    [
        "states", "states dropout", "lora", "lora dense", "lora dropout", "bone", "bat", "lora time ln", "bone time ln",
        "parts", "full", "full bf16",
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", Recompute)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kept_bytes_cover_what_kernels_keep(architecture: str, mode: Recompute, run: str) -> None:
    kept, estimate = kept_and_estimated("cuda", torch.bfloat16, mode, run, architecture)
    assert 0.98 * estimate < kept <= estimate
