"""Held-out loss of a model: the mean over all documents, and the start of documents apart from the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from src.data.documents import Documents
from src.data.evaluation import evaluation_batches
from src.model.rwkv6 import RWKV6
from src.training.objectives import counted_logps

START_POSITIONS = 64
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy in nats per target.

    Attributes:
        overall: over all targets.
        start: over the first 64 positions of documents.
        rest: over the others; NaN when there are none.
        targets: how many targets there are.
        documents: how many documents.
    """

    overall: float
    start: float
    rest: float
    targets: int
    documents: int


def held_out_loss(model: RWKV6, documents: Documents, ctx_len: int) -> HeldOutLoss:
    """Runs every document once from its first token, cut at ctx_len, without gradients.

    Args:
        model: evaluated with its current `time_state`.
        documents: held-out documents.
        ctx_len: tokens of a row at most.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)
    seen = 0
    with torch.no_grad():
        for item in evaluation_batches(documents, ctx_len=ctx_len, batch_tokens=_BATCH_TOKENS):
            hidden, _ = model(item.batch.tokens)
            logp, _ = counted_logps(model, hidden, item.batch.targets)
            late = (item.positions.reshape(-1)[item.batch.targets.reshape(-1) >= 0] >= START_POSITIONS).long()
            sums.index_add_(0, late, -logp.cpu().double())
            counts += torch.bincount(late, minlength=2)
            seen += len(item.batch.sample_indices)
    model.train(was_training)
    start, rest = (sums / counts).tolist()
    return HeldOutLoss(float(sums.sum() / counts.sum()), start, rest, int(counts.sum()), seen)
