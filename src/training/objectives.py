"""What a batch costs: objectives map (model, batch) to a loss and the numbers to log.

Adding an objective is adding a class here; the Lightning module knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from src.data.batches import Batch
from src.data.preference_batches import PairForm, PreferenceBatch
from src.losses import (
    PreferenceLoss,
    orpo_loss,
    orpo_loss_released,
    running_preference,
    sft_loss,
    targets_after,
)
from src.model.rwkv6 import RWKV6
from src.ops.token_logps import token_logps


@dataclass(frozen=True)
class Outcome:
    """Result of an objective on one micro-batch.

    Attributes:
        loss: 0-d, to minimise.
        logs: gives further numbers by name; called after the step, because it may wait for the device.
    """

    loss: Tensor
    logs: Callable[[], dict[str, float]] = dict


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


def _weighted(loss: Tensor, weight: float) -> Tensor:
    return loss if weight == 1.0 else loss * weight


class SFTObjective:
    """Next-token cross-entropy with L2Wrap over the counted targets."""

    def __call__(self, model: RWKV6, batch: Batch) -> Outcome:
        layout = None if batch.layout is None else batch.layout.to(model.device)
        hidden, _ = model(batch.tokens, layout=layout)
        logp, max_logit = counted_logps(model, hidden, batch.targets)
        loss = sft_loss(logp, max_logit, torch.ones_like(logp, dtype=torch.bool))
        return Outcome(_weighted(loss, batch.step_weight))


class PreferenceObjective:
    """ORPO on packed pairs: `orpo_type` 0 as published, 1 as the original released it.

    Args:
        alpha: weight of the preference term.
        orpo_type: 0 or 1.
        debug: print each pair's weighted preference term.
    """

    def __init__(self, alpha: float, orpo_type: int, *, debug: bool = False) -> None:
        self.alpha = alpha
        self.orpo_type = orpo_type
        self.debug = debug
        self._running_preference = 0.5

    @staticmethod
    def form(orpo_type: int, shared_prompt: bool) -> PairForm:
        """How pairs are laid out for a type of loss."""
        if orpo_type == 1:
            return PairForm.RELEASED
        return PairForm.SHARED_PROMPT if shared_prompt else PairForm.TWO_ROWS

    def __call__(self, model: RWKV6, batch: PreferenceBatch) -> Outcome:
        result = self.evaluate(model, batch)
        return Outcome(_weighted(result.loss, batch.step_weight), lambda: self._logs(result))

    def evaluate(self, model: RWKV6, batch: PreferenceBatch) -> PreferenceLoss:
        """The loss and its parts."""
        device = model.device
        hidden, _ = model(batch.tokens, layout=batch.layout.to(device))
        if self.orpo_type == 0:
            logp, max_logit = counted_logps(model, hidden, batch.targets)
            groups = batch.groups[batch.targets >= 0].to(device)
            return orpo_loss(logp, max_logit, groups, batch.pairs, self.alpha)
        rows, targets, groups = hidden[0], batch.targets.to(device), batch.groups.to(device)
        logp, max_logit = token_logps(rows, head_of(model), targets)
        logp_after, _ = token_logps(rows, head_of(model), targets_after(targets, groups))
        reject_lengths = batch.reject_lengths.to(device)
        return orpo_loss_released(logp, logp_after, max_logit, targets, groups, reject_lengths, self.alpha)

    def _logs(self, result: PreferenceLoss) -> dict[str, float]:
        self._running_preference = running_preference(self._running_preference, float(result.preferred_share))
        if self.debug:
            terms = ", ".join(f"{self.alpha * term:.6f}" for term in result.odds_loss.tolist())
            print(f"preference terms: {terms}", flush=True)
        return {**result.averages(), "pref_percentage": self._running_preference}
