"""What the model is given: rows of tokens and the targets they are to predict.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src.data.documents import Mask, Tokens
from src.layout import SegmentLayout
from src.losses import IGNORED_TARGET

PADDING_TOKEN = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and next-token targets of one step on one device.

    Attributes:
        tokens: int64 [B, T].
        targets: int64 [B, T], the token after each input; -100 where no loss is taken.
        sample_indices: where the data came from, one number per document (per window with `get`);
            `BatchDataset.describe` puts it in words.
        layout: borders of the documents in a packed row (B = 1); None when a row is one document.
        token_count: positions that are not padding.
        target_count: targets that are not -100.
        step_weight: factor on the batch's mean loss that makes the plain mean over all batches of an
            optimizer step (accumulated ones, all ranks) the mean over the step's targets.
    """

    tokens: Tensor
    targets: Tensor
    sample_indices: tuple[int, ...]
    layout: SegmentLayout | None
    token_count: int
    target_count: int
    step_weight: float = 1.0


def padded_batch(documents: Sequence[Tokens], counted: Sequence[Mask | None], sample_indices: Sequence[int]) -> Batch:
    """One document per row, padded on the right as far as the longest needs.

    Args:
        documents: tokens of each, two or more; the last is a target only.
        counted: aligned with them, whether a token counts as a target; None = all.
        sample_indices: number of each.
    """
    width = max(len(tokens) for tokens in documents) - 1
    inputs = np.full((len(documents), width), PADDING_TOKEN, dtype=np.int64)
    targets = np.full((len(documents), width), IGNORED_TARGET, dtype=np.int64)
    for row, (tokens, mask) in enumerate(zip(documents, counted, strict=True)):
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = _targets(tokens, mask)
    token_count = sum(len(tokens) - 1 for tokens in documents)
    return _batch(inputs, targets, sample_indices, None, token_count)


def packed_batch(documents: Sequence[Tokens], counted: Sequence[Mask | None], sample_indices: Sequence[int]) -> Batch:
    """All documents one after the other in a single row, with their borders; no padding.

    Arguments as for `padded_batch`.
    """
    inputs = np.concatenate([tokens[:-1] for tokens in documents])
    targets = np.concatenate([_targets(*document) for document in zip(documents, counted, strict=True)])
    layout = SegmentLayout.packed([len(tokens) - 1 for tokens in documents])
    return _batch(inputs[None], targets[None], sample_indices, layout, inputs.size)


def _targets(tokens: Tokens, mask: Mask | None) -> Tokens:
    return tokens[1:] if mask is None else np.where(mask[1:], tokens[1:], IGNORED_TARGET)


def _batch(
    inputs: Tokens,
    targets: Tokens,
    sample_indices: Sequence[int],
    layout: SegmentLayout | None,
    token_count: int,
) -> Batch:
    return Batch(
        tokens=torch.from_numpy(inputs.astype(np.int64, copy=False)),
        targets=torch.from_numpy(targets.astype(np.int64, copy=False)),
        sample_indices=tuple(int(index) for index in sample_indices),
        layout=layout,
        token_count=token_count,
        target_count=int((targets != IGNORED_TARGET).sum()),
    )
