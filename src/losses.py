"""What training minimises: next-token cross-entropy with L2Wrap; ORPO, DPO and SimPO on preference pairs.

Everything here starts from two numbers per position, as `src.ops.token_logps` delivers them: `logp`, the
log-probability of the target, and `max_logit`, the largest logit. The functions are pure torch, work on CPU
and GPU, and never wait for the device.

Letters: M positions of a micro-batch in any order, P preference pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_TARGET = -100
"""Target of a position that no loss counts."""

L2WRAP_FACTOR = 5e-5
"""Half of the 1e-4 that L2Wrap puts on the largest logit's gradient."""

LOGP_CEILING = -1e-6
"""Mean log-probabilities are lowered to this before log(1 - exp(·)): not far above, fp32 knows only 0."""

PLAIN_REJECT_TOKENS = 4
"""`orpo_loss_released` trains pairs whose reject is no longer than this without a preference term."""


class Role(IntEnum):
    """What a position of a preference pair scores: a token of the prompt or of one of the answers."""

    PROMPT = 0
    CHOSEN = 1
    REJECTED = 2


def group_number(pair: int, role: Role) -> int:
    """Number of the (pair, role) group that a position belongs to, for `orpo_loss`."""
    return len(Role) * pair + role


def l2wrap_penalty(max_logit: Tensor, counted: Tensor) -> Tensor:
    """5e-5 · mean(max_logit²) over the counted positions: a pull on the largest logit, to keep logits small.

    Its gradient is 1e-4 / count · max_logit at each position's arg-max entry. As an ordinary term of the loss
    it follows masks, loss scaling and gradient accumulation, which the backward hook it stems from did not.

    Args:
        max_logit: largest logit at each position, any shape.
        counted: bool, same shape; positions that count.

    Returns:
        0-d tensor in max_logit's dtype; 0 when nothing counts.

    Source: L2Wrap of RWKV-LM, written as the function whose gradient it returns.
    """
    count = counted.sum().clamp(min=1)
    return L2WRAP_FACTOR * (max_logit * counted).square().sum() / count


def with_gradient_of(loss: Tensor, penalty: Tensor) -> Tensor:
    """`loss` in value; in backward also the gradient of `penalty`."""
    return loss + (penalty - penalty.detach())


def sft_loss(logp: Tensor, max_logit: Tensor, counted: Tensor) -> Tensor:
    """Mean cross-entropy over the counted positions, with L2Wrap's gradient.

    Args:
        logp: log-probability of each target, fp32, any shape.
        max_logit: largest logit at each position, same shape.
        counted: bool, same shape.

    Returns:
        0-d tensor; exactly the cross-entropy in value, 0 when nothing counts.
    """
    cross_entropy = -(logp * counted).sum() / counted.sum().clamp(min=1)
    return with_gradient_of(cross_entropy, l2wrap_penalty(max_logit, counted))


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) for a < 0, accurate at both ends, with a finite gradient.

    Source: Mächler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    border = -math.log(2)
    # Clamped because where() multiplies the infinite slope that this branch has at 0 by 0, which is NaN.
    far = torch.log1p(-torch.exp(a.clamp(max=border)))
    near = torch.log(-torch.expm1(a))
    return torch.where(a < border, far, near)


def log_odds_ratio(logp_chosen: Tensor, logp_rejected: Tensor) -> Tensor:
    """Log of odds(chosen) / odds(rejected), odds(p) = p / (1 - p), from mean log-probabilities.

    Inside log(1 - exp(·)) log-probabilities are lowered to `LOGP_CEILING`, so that a perfectly known
    answer gives a large finite value; outside they stay as they are.

    Source: Hong et al. 2024, arXiv 2403.07691, equations 4 and 7.
    """
    log_not_chosen = log1mexp(logp_chosen.clamp(max=LOGP_CEILING))
    log_not_rejected = log1mexp(logp_rejected.clamp(max=LOGP_CEILING))
    return (logp_chosen - logp_rejected) - (log_not_chosen - log_not_rejected)


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a micro-batch of pairs and what it is made of.

    Everything but `loss` is detached. Pairs with `is_plain` have no preference term; their `logp_rejected`,
    `log_odds` and `odds_loss` hold no meaning.
    """

    loss: Tensor
    """0-d, to minimise."""
    alpha: float
    pair_losses: Tensor
    """[P]; their mean is the value of `loss`."""
    nll: Tensor
    """[P] mean cross-entropy over prompt and chosen answer."""
    logp_chosen: Tensor
    """[P] mean log-probability, the one that enters the odds."""
    logp_rejected: Tensor
    log_odds: Tensor
    odds_loss: Tensor
    """[P] -log sigmoid(log_odds), not yet times alpha; 0 where plain."""
    is_plain: Tensor
    """[P] bool: trained on the chosen answer alone, unweighted."""
    preferred_share: Tensor
    """0-d: share of pairs with log_odds > 0, for `running_preference`; NaN when all pairs are plain."""

    def averages(self) -> dict[str, float]:
        """Means over the micro-batch by log name; waits for the device once.

        `loss_1_token_chosen` and `loss_2_odds_ratio` are the original trainer's names. What only pairs with a
        rejected answer have is left out when there is none.
        """
        compared = ~self.is_plain
        comparisons = compared.sum()

        def over_compared(values: Tensor) -> Tensor:
            return torch.where(compared, values, 0).sum() / comparisons

        odds_term = self.alpha * self.odds_loss.mean()
        always = {
            "nll": self.nll.mean(),
            "loss_1_token_chosen": self.nll.mean(),
            "loss_2_odds_ratio": odds_term,
            "preference_share": odds_term / self.pair_losses.mean(),
            "plain_pairs": self.is_plain.sum(),
        }
        if_compared = {
            "log_odds": over_compared(self.log_odds),
            "logp_chosen": over_compared(self.logp_chosen),
            "logp_rejected": over_compared(self.logp_rejected),
            "margin": over_compared(self.logp_chosen - self.logp_rejected),
            "accuracy": over_compared((self.logp_chosen > self.logp_rejected).to(self.nll.dtype)),
        }
        named = {**always, **if_compared, "comparisons": comparisons}
        values = torch.stack([value.to(torch.float64) for value in named.values()]).tolist()
        averages = dict(zip(named, values, strict=True))
        if averages.pop("comparisons") == 0:
            averages = {name: value for name, value in averages.items() if name in always}
        return averages


def running_preference(before: float, preferred_share: float) -> float:
    """The log's `pref_percentage` after one more micro-batch; plain pairs alone leave it unchanged."""
    return before if math.isnan(preferred_share) else 0.9 * before + 0.1 * preferred_share


def orpo_loss(logp: Tensor, max_logit: Tensor, groups: Tensor, pairs: int, alpha: float) -> PreferenceLoss:
    """ORPO as published: mean over pairs of (1 - alpha)·NLL + alpha·L_OR.

    NLL is the mean cross-entropy over prompt and chosen answer; the odds ratio takes mean
    log-probabilities of the answers alone. A pair without rejected positions counts with its NLL,
    unweighted. Each pair's L2Wrap covers its prompt once and both answers.

    Args:
        logp: [M] log-probability of each target; fp32, or fp64 throughout. Sums are taken in fp64, so
            that the order of a GPU's additions does not show.
        max_logit: [M] largest logit at each position.
        groups: [M] int64, `group_number(pair, role)` of the token that the position predicts;
            `group_number(pairs, Role.PROMPT)`, the first number beyond the pairs, where nothing counts. Every
            pair has chosen positions.
        pairs: P, number of pairs.
        alpha: weight of the preference term, 0 to 1.

    Source: Hong et al. 2024, arXiv 2403.07691, equation 6, with (1 - alpha) on the first term as in
        RWKV-LM-State-4bit-Orpo.
    """
    sums, counts = _sums_and_counts(logp, groups, pairs)
    squares = _role_sums(max_logit.square(), groups, pairs)

    has_reject = counts[:, Role.REJECTED] > 0
    trained = slice(Role.PROMPT, Role.REJECTED)
    nll = (-sums[:, trained].sum(1) / counts[:, trained].sum(1)).to(logp.dtype)
    means = (sums / counts.clamp(min=1)).to(logp.dtype)
    logp_chosen, logp_rejected = means[:, Role.CHOSEN], means[:, Role.REJECTED]

    # A plain pair has no odds; an arbitrary finite pair of inputs keeps NaN out of its (zero) gradient.
    log_odds = log_odds_ratio(torch.where(has_reject, logp_chosen, -1.0), torch.where(has_reject, logp_rejected, -1.0))
    penalty = (L2WRAP_FACTOR * squares.sum(1) / counts.sum(1)).mean().to(logp.dtype)

    preferred = ((log_odds > 0) & has_reject).sum() / has_reject.sum()
    return _preference_loss(alpha, nll, logp_chosen, logp_rejected, log_odds, ~has_reject, penalty, preferred)


@dataclass(frozen=True)
class ComparisonLoss:
    """The loss of a micro-batch of pairs that compares their two answers, and what it is made of.

    The reward of an answer is beta times what the loss measures of it: with `dpo_loss` the log-probability gained over
    the reference, with `simpo_loss` the mean log-probability. Everything but `loss` is detached.
    """

    loss: Tensor
    """0-d, to minimise: the mean of -log sigmoid(margin - gamma)."""
    pair_losses: Tensor
    """[P]"""
    nll: Tensor
    """[P] mean cross-entropy over prompt and chosen answer; not a part of the loss."""
    logp_chosen: Tensor
    """[P] mean log-probability."""
    logp_rejected: Tensor
    reward_chosen: Tensor
    """[P] fp64."""
    reward_rejected: Tensor

    @property
    def margins(self) -> Tensor:
        """[P] reward of the chosen answer minus that of the rejected one."""
        return self.reward_chosen - self.reward_rejected

    def averages(self) -> dict[str, float]:
        """Means over the micro-batch by log name; waits for the device once."""
        named = {
            "nll": self.nll,
            "logp_chosen": self.logp_chosen,
            "logp_rejected": self.logp_rejected,
            "reward_chosen": self.reward_chosen,
            "reward_rejected": self.reward_rejected,
            "margin": self.margins,
            "accuracy": won(self.margins),
        }
        values = torch.stack([value.double().mean() for value in named.values()]).tolist()
        return dict(zip(named, values, strict=True))


def won(margins: Tensor) -> Tensor:
    """1 where the chosen answer has the larger reward, 0 where the rejected one has, a half where they are equal.

    Equal they are at DPO's start, where every reward is 0.
    """
    return (1 + margins.sign()) / 2


def dpo_loss(logp: Tensor, groups: Tensor, pairs: int, reference: Tensor, beta: float) -> ComparisonLoss:
    """DPO as published: mean over pairs of -log sigmoid(beta · ((log p_c - ref_c) - (log p_r - ref_r))).

    p_c and p_r are probabilities of whole answers, sums of log-probabilities over their tokens; ref_c and ref_r are
    the same under the reference model. No cross-entropy and no L2Wrap is added.

    Args:
        logp, groups, pairs: as for `orpo_loss`; every pair has rejected positions.
        reference: [P, 2] fp64, sums of log-probabilities of chosen and rejected answer.
        beta: how far the model may leave the reference for a preference: less for larger values.

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7.
    """
    sums, counts = _sums_and_counts(logp, groups, pairs)
    return _comparison_loss(logp, sums, counts, beta * (sums[:, Role.CHOSEN :] - reference), 0.0)


def simpo_loss(logp: Tensor, groups: Tensor, pairs: int, beta: float, gamma: float) -> ComparisonLoss:
    """SimPO as published: mean over pairs of -log sigmoid(beta · (mean log p_c - mean log p_r) - gamma).

    The means are over an answer's tokens. No cross-entropy and no L2Wrap is added.

    Args:
        logp, groups, pairs: as for `dpo_loss`.
        beta: factor on mean log-probabilities.
        gamma: margin between the two answers that is aimed for.

    Source: Meng et al. 2024, arXiv 2405.14734, equation 6.
    """
    sums, counts = _sums_and_counts(logp, groups, pairs)
    return _comparison_loss(logp, sums, counts, beta * (sums / counts)[:, Role.CHOSEN :], gamma)


def _comparison_loss(logp: Tensor, sums: Tensor, counts: Tensor, rewards: Tensor, gamma: float) -> ComparisonLoss:
    """From sums and counts [P, roles] and rewards [P, 2], all fp64: sums of hundreds of tokens cancel to a few nats."""
    chosen, rejected = rewards.unbind(1)
    pair_losses = -F.logsigmoid(chosen - rejected - gamma)
    trained = slice(Role.PROMPT, Role.REJECTED)
    means = (sums / counts).detach().to(logp.dtype)
    return ComparisonLoss(
        loss=pair_losses.mean().to(logp.dtype),
        pair_losses=pair_losses.detach(),
        nll=(-sums[:, trained].sum(1) / counts[:, trained].sum(1)).detach().to(logp.dtype),
        logp_chosen=means[:, Role.CHOSEN],
        logp_rejected=means[:, Role.REJECTED],
        reward_chosen=chosen.detach(),
        reward_rejected=rejected.detach(),
    )


def targets_after(targets: Tensor, rows: Tensor) -> Tensor:
    """Each position's target moved on by one token within its row: the tokens `orpo_loss_released` scores.

    Args:
        targets: [M] int64, whole rows one after the other.
        rows: [M] int64, the row of each position, constant over a row and different from its neighbours'.

    Returns:
        [M] int64: the next position's target; `IGNORED_TARGET` at the last position of each row.
    """
    return torch.where(_ends_row(rows), IGNORED_TARGET, targets.roll(-1))


def orpo_loss_released(
    logp: Tensor,
    logp_after: Tensor,
    max_logit: Tensor,
    targets: Tensor,
    rows: Tensor,
    reject_lengths: Tensor,
    alpha: float,
) -> PreferenceLoss:
    """The formula RWKV-LM-State-4bit-Orpo released on 2024-07-27, for runs that must go on as they began.

    Kept as it was: answers are scored one token too far (`logp_after`); the mask is that of the target,
    not of the token scored; prompt tokens count in the odds; target 0 counts as padding; rejects of at
    most `PLAIN_REJECT_TOKENS` tokens train plain NLL and add 1.5 - NLL to the count of preferred pairs;
    L2Wrap covers padding and is not divided by the number of pairs. Not kept: a NaN stays a NaN instead
    of turning into 0.

    Args:
        logp: [M] log-probability of each target, fp32 or fp64.
        logp_after: [M] log-probability of `targets_after(targets, rows)`.
        max_logit: [M] largest logit, at padding positions too.
        targets: [M] int64. Two rows per pair, chosen before rejected, prompt and answer in each, both
            padded with 0 to the length of the longer.
        rows: [M] int64, row numbers 0 to 2·P - 1.
        reject_lengths: [P] int64, tokens of each rejected answer.
        alpha: weight of the preference term.

    Source: formula and order of operations of RWKV-LM-State-4bit-Orpo, its last commit (2024-08-01).
    """
    pairs = reject_lengths.numel()
    counted = (targets != 0).to(logp.dtype)
    scored = counted * ~_ends_row(rows)

    def per_row(values: Tensor) -> Tensor:
        return _group_sums(values, rows, 2 * pairs).view(pairs, 2)

    is_plain = reject_lengths <= PLAIN_REJECT_TOKENS
    nll = (-per_row(logp * counted)[:, 0] / per_row(counted)[:, 0]).to(logp.dtype)
    # A plain pair may score nothing: 0 / 0, though unused, would put NaN into its gradient.
    scored_counts = torch.where(is_plain[:, None], per_row(scored).clamp(min=1), per_row(scored))
    logp_chosen, logp_rejected = (per_row(logp_after * scored) / scored_counts).to(logp.dtype).unbind(1)

    odds_chosen = torch.where(is_plain, -1.0, logp_chosen)
    odds_rejected = torch.where(is_plain, -1.0, logp_rejected)
    log_odds = (odds_chosen - odds_rejected) - (
        torch.log1p(-torch.exp(odds_chosen)) - torch.log1p(-torch.exp(odds_rejected))
    )
    penalties = L2WRAP_FACTOR * per_row(max_logit.square()).sum(1) / per_row(torch.ones_like(logp)).sum(1)
    preferred = torch.where(is_plain, 1.5 - nll, (log_odds > 0).to(nll.dtype))

    penalty = penalties.sum().to(logp.dtype)
    return _preference_loss(alpha, nll, logp_chosen, logp_rejected, log_odds, is_plain, penalty, preferred.mean())


def _preference_loss(
    alpha: float,
    nll: Tensor,
    logp_chosen: Tensor,
    logp_rejected: Tensor,
    log_odds: Tensor,
    is_plain: Tensor,
    penalty: Tensor,
    preferred_share: Tensor,
) -> PreferenceLoss:
    """(1 - alpha)·NLL + alpha·L_OR, where there is something to compare, with the gradient of a penalty."""
    odds_loss = torch.where(is_plain, 0.0, -F.logsigmoid(log_odds))
    pair_losses = torch.where(is_plain, nll, (1 - alpha) * nll + alpha * odds_loss)
    return PreferenceLoss(
        loss=with_gradient_of(pair_losses.mean(), penalty),
        alpha=alpha,
        pair_losses=pair_losses.detach(),
        nll=nll.detach(),
        logp_chosen=logp_chosen.detach(),
        logp_rejected=logp_rejected.detach(),
        log_odds=log_odds.detach(),
        odds_loss=odds_loss.detach(),
        is_plain=is_plain,
        preferred_share=preferred_share.detach(),
    )


def _sums_and_counts(logp: Tensor, groups: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """[P, roles] fp64: sums of log-probabilities, and over how many positions."""
    return _role_sums(logp, groups, pairs), _role_sums(torch.ones_like(logp), groups, pairs)


def answer_sums(logp: Tensor, groups: Tensor, pairs: int) -> Tensor:
    """[P, 2] fp64: log-probabilities [M] summed over the tokens of the chosen and of the rejected answer."""
    return _role_sums(logp, groups, pairs)[:, Role.CHOSEN :]


def _role_sums(values: Tensor, groups: Tensor, pairs: int) -> Tensor:
    """[P, roles] sums in fp64; what counts nowhere is in the group beyond them."""
    return _group_sums(values, groups, len(Role) * pairs + 1)[:-1].view(pairs, len(Role))


def _group_sums(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """[count] sums in fp64 of the values [M] that share a group number."""
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add(0, groups, values.double())


def _ends_row(rows: Tensor) -> Tensor:
    """[M] bool: the last position of each row."""
    ends = torch.ones_like(rows, dtype=torch.bool)
    ends[:-1] = rows[1:] != rows[:-1]
    return ends
