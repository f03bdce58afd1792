"""Held-out data: every document once, from its first token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from src.data.batches import Batch, padded_batch
from src.data.documents import Documents
from src.errors import DataError


@dataclass(frozen=True, eq=False)
class EvaluationBatch:
    """A batch whose loss is told apart by place.

    Attributes:
        batch: documents from their first token, one per row.
        positions: int64 [B, T], how many tokens of its document precede each target's input: the
            first 64 targets of a document have 0 to 63. Padding, too, is numbered on; its targets
            are -100.
    """

    batch: Batch
    positions: Tensor


def evaluable(documents: Documents, ctx_len: int) -> np.ndarray:
    """int64, the documents with a target that counts among their first ctx_len + 1 tokens.

    Raises:
        DataError: there is none.
    """
    found = np.flatnonzero(documents.counted_targets(ctx_len + 1))
    if not len(found):
        raise DataError(
            f"{documents.source} holds nothing to evaluate with --ctx_len {ctx_len}: nothing that the loss is "
            "taken on stands within so many tokens; use a larger --ctx_len."
        )
    return found


def evaluation_batches(documents: Documents, *, ctx_len: int, batch_tokens: int) -> Iterator[EvaluationBatch]:
    """All documents once, the longest first, each cut to ctx_len + 1 tokens.

    Documents in which what the loss is taken on lies beyond the cut are left out. No random number is used.

    Args:
        documents: held-out documents.
        ctx_len: tokens of a row at most.
        batch_tokens: positions of a batch at most, padding included; a longer row comes alone.

    Raises:
        DataError: no document has a target that counts before the cut.
    """
    limit = ctx_len + 1
    visited = evaluable(documents, ctx_len)
    lengths = np.minimum(documents.sizes[visited], limit) - 1
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = int(lengths[order[start]])
        indices = visited[order[start : start + max(1, batch_tokens // width)]]
        start += len(indices)
        batch = padded_batch(
            [documents.tokens(index, limit) for index in indices],
            [documents.counted(index, limit) for index in indices],
            indices.tolist(),
        )
        yield EvaluationBatch(batch, torch.arange(width).expand(len(indices), width))
