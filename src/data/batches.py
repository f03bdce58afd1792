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
from src.data.rounding import EXACT, PADDING_TOKEN, Rounding
from src.layout import SegmentLayout
from src.losses import IGNORED_TARGET


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
        rounding: to which it is filled up.
        step_weight: factor on the batch's mean loss that makes the plain mean over all batches of an
            optimizer step (accumulated ones, all ranks) the mean over the step's targets.
    """

    tokens: Tensor
    targets: Tensor
    sample_indices: tuple[int, ...]
    layout: SegmentLayout | None
    token_count: int
    rounding: Rounding = EXACT
    step_weight: float = 1.0


def padded_batch(
    documents: Sequence[Tokens],
    counted: Sequence[Mask | None],
    sample_indices: Sequence[int],
    rounding: Rounding = EXACT,
) -> Batch:
    """One document per row, padded on the right as far as the longest needs.

    Args:
        documents: tokens of each, two or more; the last is a target only.
        counted: aligned with them, whether a token counts as a target; None = all.
        sample_indices: number of each.
        rounding: of the row's length.
    """
    width = rounding.tokens(max(len(tokens) for tokens in documents) - 1)
    inputs = np.full((len(documents), width), PADDING_TOKEN, dtype=np.int64)
    targets = np.full((len(documents), width), IGNORED_TARGET, dtype=np.int64)
    for row, (tokens, mask) in enumerate(zip(documents, counted, strict=True)):
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = _targets(tokens, mask)
    token_count = sum(len(tokens) - 1 for tokens in documents)
    rows = (torch.from_numpy(inputs), torch.from_numpy(targets))
    return Batch(*rows, tuple(sample_indices), None, token_count, rounding)


def packed_batch(
    documents: Sequence[Tokens],
    counted: Sequence[Mask | None],
    sample_indices: Sequence[int],
    rounding: Rounding = EXACT,
) -> Batch:
    """All documents one after the other in a single row, with their borders; padded only as `rounding` asks.

    Arguments as for `padded_batch`.
    """
    lengths = [len(tokens) - 1 for tokens in documents]
    padding = rounding.padding(lengths)
    filling = np.full(sum(padding), PADDING_TOKEN)
    inputs = np.concatenate([*(tokens[:-1] for tokens in documents), filling])
    targets = np.concatenate([*map(_targets, documents, counted), np.full_like(filling, IGNORED_TARGET)])
    row = (torch.from_numpy(inputs[None]), torch.from_numpy(targets[None]))
    layout = SegmentLayout.packed([*lengths, *padding])
    return Batch(*row, tuple(sample_indices), layout, sum(lengths), rounding)


def _targets(tokens: Tokens, mask: Mask | None) -> Tokens:
    return tokens[1:] if mask is None else np.where(mask[1:], tokens[1:], IGNORED_TARGET)
