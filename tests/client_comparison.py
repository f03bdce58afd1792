"""What comparisons with an inference client need: our logits, at once and step by step, and merged files."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.checkpoint import open_checkpoint
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
LENGTH_TOKENS = 32


def merge(base: Path, file: Path, output: Path, *flags: str) -> Path:
    """What merge_state.py writes."""
    command = ["merge_state.py", str(base), str(file), str(output), *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "merge_state.py"), run_name="__main__")
    assert ended.value.code == 0
    return output


def load(path: Path) -> LanguageModel:
    """The model as this program has it, on the CPU in fp32."""
    checkpoint = open_checkpoint(path)
    return build_model(checkpoint, checkpoint.info.shape, LoadOptions(torch.device("cpu"), torch.float32)).eval()


def random_tokens(vocab_size: int) -> list[int]:
    """Some tokens, the vocabulary's first and last among them."""
    generator = torch.Generator().manual_seed(11)
    return [0, vocab_size - 1, *torch.randint(vocab_size, (LENGTH_TOKENS - 2,), generator=generator).tolist()]


@torch.no_grad()
def logits_at_once(model: LanguageModel, tokens: list[int]) -> Tensor:
    """[T, V] from one pass over the sequence."""
    hidden, _ = model(torch.tensor([tokens]))
    return model.logits(hidden)[0]


@torch.no_grad()
def logits_step_by_step(model: LanguageModel, tokens: list[int]) -> Tensor:
    """[T, V] from one pass per token with a carried state."""
    rows, state = [], None
    for token in tokens:
        hidden, state = model(torch.tensor([[token]]), state, return_state=True)
        rows.append(model.logits(hidden)[0, 0])
    return torch.stack(rows)


def largest_relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Over the positions: largest difference over largest expected magnitude."""
    return float(((actual - expected).abs().amax(1) / expected.abs().amax(1)).max())
