"""On a GPU the chat's model says what it says on a CPU, tuned and not, unpacked and packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_states

from src.adapters.trained import Told, read_trained
from src.checkpoint import open_checkpoint
from src.generate import Conversation, SamplingSettings
from src.loading import LoadOptions
from src.tokenizer import ByteTokenizer
from src.tuned import Tuned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SHAPE = tiny_shape(n_embd=128, head_size=64)
SETTINGS = SamplingSettings(temperature=0.0, frequency_penalty=0.0, max_tokens=12, stop="")
"""The most probable token: sums in another order choose another one only where two are nearly equal."""


def answers(tuned: Tuned) -> list[str]:
    """Two turns of the tuned model, and two of the base model."""
    said = []
    for is_tuned in (True, False):
        tuned.use(tuned=is_tuned)
        conversation = Conversation(tuned.model, ByteTokenizer(), SETTINGS)
        said += ["".join(conversation.answer(text, number)) for number, text in enumerate(("hello", "and?"))]
    return said


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("kind", ["lora", "pissa", "bone", "bat"])
def test_answers_are_those_of_a_cpu(kind: str, quant: str | None, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth", n_embd=128, head_size=64)
    further = {**tiny_states(SHAPE, 4, torch.bfloat16), "ln_out.weight": torch.full((128,), 1.25)}
    tiny_adapter(tmp_path / "trained.pth", SHAPE, kind, further=further)
    base = open_checkpoint(tmp_path / "base.pth")
    trained = read_trained(tmp_path / "trained.pth", SHAPE, Told(kind, 16.0 if kind == "lora" else 0.0))
    on_cpu, on_gpu = (
        answers(Tuned(base, trained, LoadOptions(torch.device(device), torch.float32, quant)))
        for device in ("cpu", "cuda")
    )
    assert quant or on_gpu == on_cpu  # what is packed there may be rounded otherwise
    assert all(on_gpu)
    assert on_gpu[:2] != on_gpu[2:]


def test_in_bf16_it_answers(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth", n_embd=128, head_size=64)
    base = open_checkpoint(tmp_path / "base.pth")
    tuned = Tuned(base, None, LoadOptions(torch.device("cuda"), torch.bfloat16, "nf4"))
    assert all(answers(tuned))
