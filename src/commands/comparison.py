"""How far two models' expectations are apart, on a text or on random tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from src.errors import DataError
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.tokenizer import tokenizer_for_vocabulary

COMPARED_TOKENS = 256


@torch.no_grad()
def logits_on(model: LanguageModel, tokens: Tensor) -> Tensor:
    """[T, V] fp32 on the CPU."""
    hidden, _ = model(tokens[None])
    return model.logits(hidden)[0].float().cpu()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def compared_tokens(text_file: str) -> Callable[[ModelShape], Tensor]:
    """From the model's sizes to int64 [T]: the text's first tokens, or random ones.

    Raises:
        DataError: the file cannot be read, or is empty.
    """
    if not text_file:
        return lambda shape: torch.randint(
            shape.vocab_size, (COMPARED_TOKENS,), generator=torch.Generator().manual_seed(0)
        )
    try:
        text = Path(text_file).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--verify_text {text_file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--verify_text {text_file} is no UTF-8 text: convert it") from error
    if not text:
        raise DataError(f"--verify_text {text_file} is empty: name another text")
    return lambda shape: torch.tensor(tokenizer_for_vocabulary(shape.vocab_size).encode(text)[:COMPARED_TOKENS])
