"""How far two models' expectations are apart, on a text or on random tokens."""

from __future__ import annotations

import os
import re

import numpy as np
import torch
from torch import Tensor

from src.config.recognition import files_of, recognise
from src.data.sources import open_documents
from src.errors import DataError
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.tokenizer import END_OF_DOCUMENT

COMPARED_TOKENS = 256
_WAYS_OUT_OF_TRAINING = re.compile(": (?=say with --data_type|pairs go to --)")
"""What ends a problem of data with flags that only training has."""


@torch.no_grad()
def logits_on(model: LanguageModel, tokens: Tensor) -> Tensor:
    """[T, V] fp32 on the CPU."""
    hidden, _ = model(tokens[None])
    return model.logits(hidden)[0].float().cpu()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def compared_tokens(data_file: str, shape: ModelShape) -> Tensor:
    """int64 [T], `COMPARED_TOKENS` at most.

    Args:
        data_file: a text, or data of another kind that training takes; of documents one after the other, each with its
            end, as training reads them. "": random tokens.
        shape: of the model that is to read them.

    Raises:
        DataError: the file cannot be read, or as nothing this model reads, or is empty.
    """
    if not data_file:
        return torch.randint(shape.vocab_size, (COMPARED_TOKENS,), generator=torch.Generator().manual_seed(0))
    for file in files_of(data_file):
        if not (os.path.exists(file) or os.path.exists(f"{file}.idx")):
            raise DataError(f"--verify_text {file} does not exist: name a text, or data as --data_file takes them")
    found = recognise(data_file)
    if found.problem:
        said, *for_training = _WAYS_OUT_OF_TRAINING.split(found.problem, maxsplit=1)
        raise DataError(f"--verify_text {data_file} {said}{': name another text' if for_training else ''}")
    enough = slice(COMPARED_TOKENS)  # entries: each has a token, and its end
    documents = open_documents(found.data_type, data_file, shape.vocab_size, ctx_len=COMPARED_TOKENS, part=enough)
    tokens = torch.from_numpy(np.asarray(documents.stream[:COMPARED_TOKENS], dtype=np.int64))
    return tokens[:-1] if tokens[-1] == END_OF_DOCUMENT else tokens  # which nothing follows
