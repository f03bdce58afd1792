"""What a batch costs: objectives map (model, batch) to a loss and the numbers to log.

An objective works in two parts. `stage` prepares on the host everything the device needs: the only place that
looks at the batch, and work that can be done while the device computes. `compute` then is a function of
device tensors alone, without a copy from the host or a wait for the device, so that `graphs.py` can record it
once and replay it. Adding an objective is adding a class
here; the Lightning module knows none of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from src.data.batches import Batch
from src.data.preference_batches import PairForm, PreferenceBatch
from src.data.rounding import EXACT, Rounding
from src.layout import SegmentLayout
from src.losses import (
    IGNORED_TARGET,
    PLAIN_REJECT_TOKENS,
    ComparisonLoss,
    PreferenceLoss,
    Role,
    dpo_loss,
    group_number,
    orpo_loss,
    orpo_loss_released,
    running_preference,
    sft_loss,
    simpo_loss,
    targets_after,
)
from src.model.chunks import Scores, scores_in_chunks
from src.model.language_model import LanguageModel
from src.ops.token_logps import head_sft_loss, token_logps
from src.training.console import tell
from src.training.joined import Joined


@dataclass(frozen=True)
class Outcome:
    """Result of an objective on one micro-batch.

    Attributes:
        loss: 0-d, to minimise.
        logs: gives further numbers by name; called after the step, because it may wait for the device.
    """

    loss: Tensor
    logs: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Staged:
    """A batch as the device gets it.

    Attributes:
        tensors: by name; shapes and dtypes are what a recorded computation depends on.
        source: the batch it was made of.
        layout: of a packed row, or None; of it only tensors, number of roots and their tokens matter.
        pairs: preference pairs of the batch.
        in_chunks: whether it is computed piece by piece.
        arrives: when tensors that are on their way to a GPU are there; None if none are.
    """

    in_chunks: ClassVar[bool] = False
    tensors: dict[str, Tensor]
    source: Any
    layout: SegmentLayout | None = None
    pairs: int = 0
    arrives: torch.cuda.Event | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for batches that differ in the values of `all_tensors` only."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in self.tensors.items())
        layout = self.layout
        borders = None if layout is None else (layout.roots, layout.root_tokens, len(layout.lengths))
        return (shapes, borders, self.pairs)

    def all_tensors(self) -> list[Tensor]:
        """The layout's, too, always in the same order."""
        return [*self.tensors.values(), *([] if self.layout is None else self.layout.tensors)]

    def to(self, device: torch.device) -> Staged:
        """The same with its tensors on `device`, where what is issued from now on waits for them."""
        self.await_arrival()
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        layout = None if self.layout is None else self.layout.to(device)
        return replace(self, tensors=tensors, layout=layout, arrives=None)

    def sent(self, device: torch.device, stream: torch.cuda.Stream) -> Staged:
        """The same on its way to a GPU, on a stream of its own, while the GPU goes on with what it does."""
        with torch.cuda.stream(stream):
            moving = self.to(device)
        for tensor in moving.all_tensors():
            tensor.record_stream(torch.cuda.current_stream(device))  # on which it is going to be read
        return replace(moving, arrives=stream.record_event())

    def await_arrival(self) -> None:
        """What is issued from now on waits until the tensors are there."""
        if self.arrives is not None:
            torch.cuda.current_stream().wait_event(self.arrives)


class Looker(Protocol):
    """What `stage` needs of a model."""

    def look_up(self, tokens: Tensor) -> Tensor:
        """See `LanguageModel.look_up`."""
        ...


class TokensAlone:
    """Stands for a model where a row's embeddings are looked up piece by piece."""

    def look_up(self, tokens: Tensor) -> Tensor:
        """The tokens themselves."""
        return tokens


class Objective(Protocol):
    """A training loss.

    Attributes:
        recordable: whether positions without a target leave the loss as it is, so that batches may be filled up to
            few shapes and recorded.
    """

    recordable: bool

    def stage(self, model: Looker, batch: Any) -> Staged:
        """Makes on the host what `compute` needs on the device."""
        ...

    def compute(self, model: LanguageModel, staged: Staged) -> tuple[Tensor, Any]:
        """The loss, and what `logs` needs."""
        ...

    def logs(self, result: Any) -> dict[str, float]:
        """Further numbers from what `compute` returned; waits for the device."""
        ...

    def state(self) -> dict[str, Any]:
        """See `resume.Part`."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `resume.Part`."""
        ...


class Scored(Objective, Protocol):
    """A loss that is a function of the scores of targets, wherever these come from."""

    def target_sets(self, staged: Staged) -> tuple[Tensor, ...]:
        """The targets that are scored at the staged positions, int64 [M] each, of a batch on any device."""
        ...

    def loss_of(self, staged: Staged, scores: Scores) -> tuple[Tensor, Any]:
        """What `compute` returns, from the scores of each set, in order."""
        ...


def outcome_of(objective: Objective, model: LanguageModel, staged: Staged, joined: Joined | None = None) -> Outcome:
    """Loss of one micro-batch, ready for `backward`, which gives wholes their gradients if there are some."""
    loss, result = objective.compute(model, staged.to(model.device))
    return Outcome(joined.loss(loss) if joined else loss, lambda: objective.logs(result))


def counted_positions(targets: Tensor, rounding: Rounding = EXACT) -> tuple[Tensor, Tensor]:
    """Places and values of the targets that count.

    Args:
        targets: int64 of any shape, on the host; negative ones do not count.
        rounding: to how many places so many are filled up, as far as there are targets.

    Returns:
        (positions int64 [M], targets int64 [M]) in row-major order; filled-up places are position 0 with a
        target that does not count.
    """
    flat = targets.reshape(-1)
    positions = (flat >= 0).nonzero().squeeze(1)
    values = flat[positions]
    missing = min(rounding.targets(positions.numel()), flat.numel()) - positions.numel()
    if missing:
        positions = torch.cat([positions, positions.new_zeros(missing)])
        values = torch.cat([values, values.new_full((missing,), IGNORED_TARGET)])
    return positions, values


def rows_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """hidden [B, T, C] -> [M, C], the positions the head is to be applied to."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)


def counted_logps(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p and largest logit of the counted targets only.

    Args:
        model: gives the head.
        hidden: [B, T, C] after `ln_out`.
        targets: int64 [B, T], on the host; negative ones are left out before the head is applied.

    Returns:
        (logp [M], max_logit [M]) fp32, M the number of counted targets, in row-major order.
    """
    positions, counted = counted_positions(targets)
    rows = rows_at(hidden, positions.to(hidden.device))
    return token_logps(rows, model.head_weight(), counted.to(hidden.device))


class SFTObjective:
    """Next-token cross-entropy with L2Wrap over the counted targets."""

    recordable = True

    def stage(self, model: Looker, batch: Batch) -> Staged:
        """See Objective."""
        positions, targets = counted_positions(batch.targets, batch.rounding)
        tensors = {
            "x": model.look_up(batch.tokens),
            "positions": positions,
            "targets": targets,
            "weight": torch.tensor(batch.step_weight),
        }
        return Staged(tensors, batch, batch.layout)

    def compute(self, model: LanguageModel, staged: Staged) -> tuple[Tensor, Any]:
        """See Objective."""
        hidden, _ = model(staged.tensors["x"], layout=staged.layout)
        rows = rows_at(hidden, staged.tensors["positions"])
        loss = head_sft_loss(rows, model.head_weight(), staged.tensors["targets"])
        return loss * staged.tensors["weight"], None

    def target_sets(self, staged: Staged) -> tuple[Tensor, ...]:
        """See Scored."""
        return (staged.tensors["targets"],)

    def loss_of(self, staged: Staged, scores: Scores) -> tuple[Tensor, Any]:
        """See Scored."""
        ((logp, max_logit),) = scores
        return sft_loss(logp, max_logit, staged.tensors["targets"] >= 0) * staged.tensors["weight"], None

    def logs(self, result: Any) -> dict[str, float]:
        """See Objective."""
        return {}

    def state(self) -> dict[str, Any]:
        """None: the loss depends on model and batch alone."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Objective."""


class PairObjective(ABC):
    """A loss on packed preference pairs.

    Attributes:
        recordable: see Objective.
        chunk_tokens: rows of more tokens are evaluated in chunks of so many; 0: none is.
    """

    recordable = True

    def __init__(self) -> None:
        self.chunk_tokens = 0
        self._running_preference = 0.5

    @abstractmethod
    def result_of(self, scores: Scores, staged: Staged) -> Any:
        """The loss and what it is made of, from the scores of every set of targets; `loss` is what counts."""

    @abstractmethod
    def logs(self, result: Any) -> dict[str, float]:
        """See Objective."""

    def stage(self, model: Looker, batch: PreferenceBatch) -> Staged:
        """See Objective."""
        positions, targets = counted_positions(batch.targets, batch.rounding)
        groups = batch.groups[positions].masked_fill(targets < 0, group_number(batch.pairs, Role.PROMPT))
        tensors = {
            "x": model.look_up(batch.tokens),
            "positions": positions,
            "targets": targets,
            "groups": groups,
            "reject_lengths": batch.reject_lengths,
            "weight": torch.tensor(batch.step_weight),
        }
        return Staged(tensors, batch, batch.layout, batch.pairs)

    def compute(self, model: LanguageModel, staged: Staged) -> tuple[Tensor, Any]:
        """See Objective."""
        hidden, _ = model(staged.tensors["x"], layout=staged.layout)
        rows = rows_at(hidden, staged.tensors["positions"])
        sets = self.target_sets(staged)
        return self.loss_of(staged, [token_logps(rows, model.head_weight(), targets) for targets in sets])

    def target_sets(self, staged: Staged) -> tuple[Tensor, ...]:
        """See Scored."""
        return (staged.tensors["targets"],)

    def loss_of(self, staged: Staged, scores: Scores) -> tuple[Tensor, Any]:
        """See Scored."""
        result = self.result_of(scores, staged)
        return result.loss * staged.tensors["weight"], result

    def evaluate(self, model: LanguageModel, batch: PreferenceBatch) -> Any:
        """The loss and its parts, outside of training; of a row that is read in chunks without gradients."""
        if not 0 < self.chunk_tokens < batch.layout.tokens:
            return self.compute(model, self.stage(model, batch).to(model.device))[1]
        on_host = self.stage(TokensAlone(), batch)
        staged, positions = on_host.to(model.device), on_host.tensors["positions"]
        sets = self.target_sets(staged)
        scores = scores_in_chunks(model, batch.tokens, batch.layout, positions, sets, self.chunk_tokens)
        return self.loss_of(staged, scores)[1]

    def state(self) -> dict[str, Any]:
        """The mean that goes along with the run."""
        return {"running_preference": self._running_preference}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Objective."""
        self._running_preference = state["running_preference"]


class PreferenceObjective(PairObjective):
    """ORPO on packed pairs: `orpo_type` 0 as published, 1 as the original released it.

    Args:
        alpha: weight of the preference term.
        orpo_type: 0 or 1.
        debug: print each pair's weighted preference term.
    """

    def __init__(self, alpha: float, orpo_type: int, *, debug: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.orpo_type = orpo_type
        self.debug = debug
        self.recordable = orpo_type == 0  # as released, the loss depends on what padding there is

    @staticmethod
    def form(orpo_type: int, shared_prompt: bool) -> PairForm:
        """How pairs are laid out for a type of loss."""
        if orpo_type == 1:
            return PairForm.RELEASED
        return PairForm.SHARED_PROMPT if shared_prompt else PairForm.TWO_ROWS

    def target_sets(self, staged: Staged) -> tuple[Tensor, ...]:
        """See Scored; as released, also the targets one token further on."""
        targets = staged.tensors["targets"]
        return (targets,) if self.orpo_type == 0 else (targets, targets_after(targets, staged.tensors["groups"]))

    def result_of(self, scores: Scores, staged: Staged) -> PreferenceLoss:
        """See PairObjective."""
        tensors = staged.tensors
        targets, groups = tensors["targets"], tensors["groups"]
        (logp, max_logit), *further = scores
        if self.orpo_type == 0:
            return orpo_loss(logp, max_logit, groups, staged.pairs, self.alpha)
        ((logp_after, _),) = further
        return orpo_loss_released(logp, logp_after, max_logit, targets, groups, tensors["reject_lengths"], self.alpha)

    def logs(self, result: PreferenceLoss) -> dict[str, float]:
        """See Objective."""
        self._running_preference = running_preference(self._running_preference, float(result.preferred_share))
        if self.debug:
            terms = ", ".join(f"{self.alpha * term:.6f}" for term in result.odds_loss.tolist())
            tell(f"preference terms: {terms}")
        return {**result.averages(), "pref_percentage": self._running_preference}

    def compares(self, batch: PreferenceBatch) -> bool:
        """Whether a pair of the batch has a preference term."""
        if self.orpo_type == 1:
            return bool((batch.reject_lengths > PLAIN_REJECT_TOKENS).any())
        rejected = torch.tensor([group_number(pair, Role.REJECTED) for pair in range(batch.pairs)])
        return bool(torch.isin(batch.groups, rejected).any())


class ComparisonObjective(PairObjective):
    """A loss that compares the answers of a pair; every pair has both."""

    def logs(self, result: ComparisonLoss) -> dict[str, float]:
        """See Objective."""
        averages = result.averages()
        self._running_preference = running_preference(self._running_preference, averages["accuracy"])
        return {**averages, "pref_percentage": self._running_preference}


class DPOObjective(ComparisonObjective):
    """DPO; batches bring the reference's log-probabilities.

    Args:
        beta: see `dpo_loss`.
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def stage(self, model: Looker, batch: PreferenceBatch) -> Staged:
        """See Objective."""
        staged = super().stage(model, batch)
        assert batch.reference is not None
        return replace(staged, tensors={**staged.tensors, "reference": batch.reference})

    def result_of(self, scores: Scores, staged: Staged) -> ComparisonLoss:
        """See PairObjective."""
        tensors = staged.tensors
        ((logp, _),) = scores
        return dpo_loss(logp, tensors["groups"], staged.pairs, tensors["reference"], self.beta)


class SimPOObjective(ComparisonObjective):
    """SimPO.

    Args:
        beta, gamma: see `simpo_loss`.
    """

    def __init__(self, beta: float, gamma: float) -> None:
        super().__init__()
        self.beta = beta
        self.gamma = gamma

    def result_of(self, scores: Scores, staged: Staged) -> ComparisonLoss:
        """See PairObjective."""
        ((logp, _),) = scores
        return simpo_loss(logp, staged.tensors["groups"], staged.pairs, self.beta, self.gamma)
