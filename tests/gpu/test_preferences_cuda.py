"""Preference loss and sampling through the CUDA operators."""

from __future__ import annotations

import random

import pytest
import torch
from factories import tiny_parameters, tiny_shape, tiny_states
from torch import Tensor

from src.data.preference_batches import PairForm, PreferenceDataset
from src.data.preferences import PreferencePair
from src.generate import SamplingSettings, generate, read_prompts
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.tokenizer import ByteTokenizer
from src.training.objectives import PreferenceObjective

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DEVICE = torch.device("cuda")
SHAPE = tiny_shape(n_layer=2, n_embd=256, head_size=64)


def model_on(device: torch.device, dtype: torch.dtype, quant_type: str | None = None) -> LanguageModel:
    tensors = {**tiny_parameters(SHAPE), **tiny_states(SHAPE)}
    return build_model(tensors, SHAPE, LoadOptions(device, dtype, quant_type))


def pairs() -> list[PreferencePair]:
    generator = random.Random(0)
    lengths = [(300, 130, 77), (1, 40, 33), (64, 16, 0), (17, 5, 200)]
    return [
        PreferencePair(*([generator.randrange(1, 257) for _ in range(count)] for count in triple)) for triple in lengths
    ]


def loss_and_gradient(model: LanguageModel, form: PairForm) -> tuple[Tensor, Tensor]:
    """The loss of all pairs and its state gradients, flat, in fp32 on the host."""
    made = PreferenceDataset(pairs(), source="", form=form, longest=600, micro_bsz=4, seed=0)
    result = PreferenceObjective(0.5, 0).evaluate(model, made.batch(range(4)))
    states = [block.att.time_state for block in model.blocks]
    gradients = torch.autograd.grad(result.loss, states)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return result.loss.detach().float().cpu(), flat.float().cpu()


def test_prompt_computed_once_is_as_close_to_fp32_as_two_rows() -> None:
    """Error against fp32 on the CPU, at most twice that of the form without the shared prompt."""
    exact = loss_and_gradient(model_on(torch.device("cpu"), torch.float32), PairForm.TWO_ROWS)
    model = model_on(DEVICE, torch.bfloat16)
    shared = loss_and_gradient(model, PairForm.SHARED_PROMPT)
    rows = loss_and_gradient(model, PairForm.TWO_ROWS)
    shared_error, rows_error = ((gradient - exact[1]).norm() / exact[1].norm() for _, gradient in (shared, rows))
    assert rows_error < 0.1
    assert shared_error <= 2 * rows_error
    torch.testing.assert_close(shared[0], exact[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(rows[0], exact[0], rtol=1e-2, atol=0)


def test_prompts_are_read_as_on_the_cpu() -> None:
    prompts = [ByteTokenizer().encode(text) for text in ("a", "User: hello there\n\nAssistant:", "b" * 200)]
    exact, _ = read_prompts(model_on(torch.device("cpu"), torch.float32).eval(), prompts)
    with torch.no_grad():
        logits, _ = read_prompts(model_on(DEVICE, torch.float32), prompts)
    torch.testing.assert_close(logits.cpu(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "quant_type"),
    [(torch.bfloat16, None), (torch.bfloat16, "nf4"), (torch.bfloat16, "int8"), (torch.float32, None)],
)
def test_rows_are_generated_to_their_limit(dtype: torch.dtype, quant_type: str | None) -> None:
    settings = SamplingSettings(max_tokens=20, stop="", top_p=0.9)
    finished: list[tuple[int, int]] = []
    prompts = ["a", "User: hello\n\nAssistant:", "b" * 100]
    answers = generate(
        model_on(DEVICE, dtype, quant_type),
        ByteTokenizer(),
        prompts,
        settings,
        on_finished=lambda *row: finished.append(row),
    )
    assert finished == [(0, 20), (1, 20), (2, 20)]
    assert all(answers)
