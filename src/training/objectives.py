"""What a batch costs: objectives map (model, batch) to a loss and the numbers to log.

Adding an objective is adding a class here; the Lightning module knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from src.data.batches import Batch
from src.losses import sft_loss
from src.model.rwkv6 import RWKV6
from src.ops.token_logps import token_logps


@dataclass(frozen=True)
class Outcome:
    """Result of an objective on one micro-batch.

    Attributes:
        loss: 0-d, to minimise.
        logs: numbers to log by name; tensors are detached and read after the step.
    """

    loss: Tensor
    logs: dict[str, Any] = field(default_factory=dict)


class Objective(Protocol):
    """A training loss."""

    def __call__(self, model: RWKV6, batch: Any) -> Outcome:
        """Computes the loss of one micro-batch."""
        ...


def head_of(model: RWKV6) -> Any:
    """The head as `token_logps` wants it: its weight in the computation dtype."""
    return model.head.weight.to(model.compute_dtype)


def counted_logps(model: RWKV6, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p and largest logit of the counted targets only.

    Args:
        model: gives the head.
        hidden: [B, T, C] after `ln_out`.
        targets: int64 [B, T], on the host; negative ones are left out before the head is applied.

    Returns:
        (logp [M], max_logit [M]) fp32, M the number of counted targets, in row-major order.
    """
    flat = targets.reshape(-1)
    positions = (flat >= 0).nonzero().squeeze(1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if positions.numel() < flat.numel():
        rows = rows.index_select(0, positions.to(rows.device, non_blocking=True))
        flat = flat[positions]
    return token_logps(rows, head_of(model), flat.to(rows.device, non_blocking=True))


class SFTObjective:
    """Next-token cross-entropy with L2Wrap over the counted targets."""

    def __call__(self, model: RWKV6, batch: Batch) -> Outcome:
        layout = None if batch.layout is None else batch.layout.to(model.device)
        hidden, _ = model(batch.tokens, layout=layout)
        logp, max_logit = counted_logps(model, hidden, batch.targets)
        return Outcome(sft_loss(logp, max_logit, torch.ones_like(logp, dtype=torch.bool)))
