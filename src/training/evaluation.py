"""What a model makes of held-out data, measured the same way before and after a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from src.data.batches import Batch
from src.data.documents import Documents
from src.data.evaluation import evaluation_batches
from src.data.preference_batches import PreferenceDataset
from src.generate import inference
from src.losses import won
from src.model.chunks import scores_in_chunks
from src.model.language_model import LanguageModel
from src.output import several
from src.training.objectives import ComparisonObjective, PreferenceObjective, counted_logps, counted_positions

START_POSITIONS = 64
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy in nats per target.

    Attributes:
        overall: over all targets.
        start: over those among the first 64 positions of documents; NaN when there are none.
        rest: over the others; NaN when there are none.
        targets: how many targets there are.
        documents: how many documents.
    """

    overall: float
    start: float
    rest: float
    targets: int
    documents: int

    @property
    def score(self) -> float:
        """What is to become smaller."""
        return self.overall

    def __str__(self) -> str:
        named = ((f"first {START_POSITIONS} positions", self.start), ("rest", self.rest))
        parts = ", ".join(f"{name} {loss:.4f}" for name, loss in named if not math.isnan(loss))
        amount = f"{several(self.targets, 'token')} of {several(self.documents, 'document')}"
        return f"loss {self.overall:.4f} over {amount} ({parts})"


@dataclass(frozen=True)
class HeldOutPreference:
    """Means over held-out pairs.

    Attributes:
        nll: cross-entropy of prompt and chosen answer, nats per token.
        accuracy: share of pairs whose chosen answer has the larger mean log-probability; NaN without pairs.
        margin: mean log-probability per token of the chosen answer minus the rejected one's; NaN without pairs.
        pairs: compared pairs, those without a reject left out: what accuracy and margin are over.
        all_pairs: what nll is over.
        log_odds: log of the odds ratio of the two answers; NaN without pairs.
        loss: the training loss, of all pairs.
    """

    nll: float
    accuracy: float
    margin: float
    pairs: int
    all_pairs: int
    log_odds: float = math.nan
    loss: float = math.nan

    @property
    def score(self) -> float:
        """What is to become smaller: the margin's negative, or without pairs nll."""
        return -self.margin if self.pairs else self.nll

    def __str__(self) -> str:
        if not self.pairs:
            return f"nll {self.nll:.4f} over {self.all_pairs} pairs, none has a reject to compare with"
        return (
            f"accuracy {self.accuracy:.1%}, margin {self.margin:+.4f} over {self.pairs} pairs, "
            f"nll {self.nll:.4f} over {self.all_pairs}"
        )


@dataclass(frozen=True)
class HeldOutComparison:
    """Means over held-out pairs of a loss that compares rewards, DPO's or SimPO's.

    Attributes:
        loss: the loss.
        accuracy: share of pairs whose chosen answer has the larger reward; equal ones, as at DPO's start, count half.
        margin: reward of the chosen answer minus the rejected one's.
        nll: cross-entropy of prompt and chosen answer, nats per token.
        pairs: how many.
    """

    loss: float
    accuracy: float
    margin: float
    nll: float
    pairs: int

    @property
    def score(self) -> float:
        """What is to become smaller."""
        return self.loss

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, accuracy {self.accuracy:.1%}, reward margin {self.margin:+.4f}, nll {self.nll:.4f} "
            f"over {self.pairs} pairs"
        )


HeldOut = HeldOutLoss | HeldOutPreference | HeldOutComparison


def held_out_comparison(
    model: LanguageModel, dataset: PreferenceDataset, objective: ComparisonObjective
) -> HeldOutComparison:
    """Scores every pair that has both answers once, without gradients."""
    with inference(model):
        results = [objective.evaluate(model, batch) for batch in dataset.batches_in_order()]
    margins = torch.cat([result.margins for result in results])
    return HeldOutComparison(
        loss=float(torch.cat([result.pair_losses for result in results]).mean()),
        accuracy=float(won(margins).mean()),
        margin=float(margins.mean()),
        nll=float(torch.cat([result.nll for result in results]).mean()),
        pairs=margins.numel(),
    )


def kept_held_out(measured: HeldOut | None) -> dict[str, Any] | None:
    """A measurement as plain values, for a run file."""
    return None if measured is None else {"of": type(measured).__name__, "values": asdict(measured)}


def restored_held_out(kept: Mapping[str, Any] | None) -> HeldOut | None:
    """What `kept_held_out` was given."""
    kinds: dict[str, Callable[..., HeldOut]] = {kind.__name__: kind for kind in get_args(HeldOut)}
    return None if kept is None else kinds[kept["of"]](**kept["values"])


def held_out_preference(
    model: LanguageModel, dataset: PreferenceDataset, objective: PreferenceObjective
) -> HeldOutPreference:
    """Scores every pair of the data set once, without gradients."""
    with inference(model):
        results = [objective.evaluate(model, batch) for batch in dataset.batches_in_order()]
    compared = [~result.is_plain for result in results]
    margins = [result.logp_chosen - result.logp_rejected for result in results]
    margin = torch.cat([values[kept] for values, kept in zip(margins, compared, strict=True)])
    log_odds = torch.cat([result.log_odds[kept] for result, kept in zip(results, compared, strict=True)])
    every_nll = torch.cat([result.nll for result in results])
    return HeldOutPreference(
        nll=float(every_nll.mean()),
        accuracy=float((margin > 0).float().mean()),
        margin=float(margin.mean()),
        pairs=margin.numel(),
        all_pairs=every_nll.numel(),
        log_odds=float(log_odds.mean()),
        loss=float(torch.cat([result.pair_losses for result in results]).mean()),
    )


def held_out_loss(model: LanguageModel, documents: Documents, ctx_len: int, chunk_tokens: int = 0) -> HeldOutLoss:
    """Runs every document once from its first token, cut at ctx_len, without gradients.

    Args:
        model: evaluated with its current `time_state`.
        documents: held-out documents.
        ctx_len: tokens of a row at most.
        chunk_tokens: longer rows are read in chunks of so many; 0: none is.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.int64)
    seen = 0
    with inference(model):
        for item in evaluation_batches(documents, ctx_len=ctx_len, batch_tokens=_BATCH_TOKENS):
            logp = _target_logps(model, item.batch, chunk_tokens)
            late = (item.positions.reshape(-1)[item.batch.targets.reshape(-1) >= 0] >= START_POSITIONS).long()
            sums.index_add_(0, late, -logp.cpu().double())
            counts += torch.bincount(late, minlength=2)
            seen += len(item.batch.sample_indices)
    start, rest = (sums / counts).tolist()
    return HeldOutLoss(float(sums.sum() / counts.sum()), start, rest, int(counts.sum()), seen)


def _target_logps(model: LanguageModel, batch: Batch, chunk_tokens: int) -> Tensor:
    """log p of the targets that count in padded rows, in their order."""
    if not 0 < chunk_tokens < batch.tokens.shape[1]:
        hidden, _ = model(batch.tokens)
        return counted_logps(model, hidden, batch.targets)[0]
    positions, targets = counted_positions(batch.targets)
    sets = [targets.to(model.device)]
    ((logp, _),) = scores_in_chunks(model, batch.tokens, None, positions, sets, chunk_tokens)
    return logp
