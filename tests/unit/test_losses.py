"""Losses against published check values and against formulations written here from the definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.losses import (
    IGNORED_TARGET,
    ComparisonLoss,
    PreferenceLoss,
    Role,
    dpo_loss,
    group_number,
    l2wrap_penalty,
    log1mexp,
    log_odds_ratio,
    orpo_loss,
    orpo_loss_released,
    running_preference,
    sft_loss,
    simpo_loss,
    targets_after,
    won,
)


def scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, max_logit) as `token_logps` delivers them; zeros where the target is negative."""
    counted = targets >= 0
    logp = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logp * counted, logits.max(-1).values * counted


class Pair:
    """Random logits of both rows of one pair, and the loss of the paper spelled out token by token."""

    def __init__(self, prompt: int, chosen: int, rejected: int, seed: int, vocabulary: int = 11) -> None:
        generator = torch.Generator().manual_seed(seed)

        def tokens(length: int) -> Tensor:
            return torch.randint(vocabulary, (length,), generator=generator)

        self.lengths = (prompt, chosen, rejected)
        self.prompt, self.chosen, self.rejected = tokens(prompt), tokens(chosen), tokens(rejected)
        shape = (prompt - 1 + chosen + rejected, vocabulary)
        self.logits = (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    @property
    def targets(self) -> Tensor:
        return torch.cat([self.prompt[1:], self.chosen, self.rejected])

    def groups(self, pair: int) -> Tensor:
        prompt, chosen, rejected = self.lengths
        roles = [Role.PROMPT] * (prompt - 1) + [Role.CHOSEN] * chosen + [Role.REJECTED] * rejected
        return torch.tensor([group_number(pair, role) for role in roles])

    def plain_formula(self, alpha: float) -> Tensor:
        """The definition, with probabilities instead of logarithms wherever fp64 allows it."""
        prompt, chosen, rejected = self.lengths
        cross_entropy = F.cross_entropy(self.logits, self.targets, reduction="none")
        shared = prompt - 1
        nll = cross_entropy[: shared + chosen].mean()
        if rejected:
            p_chosen = cross_entropy[shared : shared + chosen].mean().neg().exp()
            p_rejected = cross_entropy[shared + chosen :].mean().neg().exp()
            odds_ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
            value = (1 - alpha) * nll + alpha * -(odds_ratio / (1 + odds_ratio)).log()
        else:
            value = nll
        penalty = 5e-5 * self.logits.amax(-1).square().mean()
        return value + penalty - penalty.detach()


def test_log1mexp_matches_high_precision_on_both_branches() -> None:
    points = [-1e-12, -1e-6, -0.1, -math.log(2), -0.7, -1.0, -5.0, -50.0]
    a = torch.tensor(points, dtype=torch.float32, requires_grad=True)
    expected = [math.log(-math.expm1(x)) if x > -0.5 else math.log1p(-math.exp(x)) for x in a.tolist()]
    value = log1mexp(a)
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor(expected), rtol=2e-6, atol=0)
    slopes = torch.tensor([1 / -math.expm1(-x) for x in a.tolist()])
    torch.testing.assert_close(a.grad, slopes, rtol=1e-5, atol=0)
    double = torch.tensor([-1e-3, -0.6, -0.75, -4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log1mexp, double)


@pytest.mark.parametrize(
    ("chosen", "rejected", "log_odds", "odds_loss"),
    [
        (-1.0, -1.5, 0.706193, 0.401135),
        (-2.0, -2.0, 0.0, 0.693147),
        (-0.5, -3.0, 3.381683, 0.033425),
        (-1e-6, -2.0, 15.670097, 1.6e-7),
    ],
)
def test_log_odds_ratio_check_values(chosen: float, rejected: float, log_odds: float, odds_loss: float) -> None:
    value = log_odds_ratio(torch.tensor(chosen), torch.tensor(rejected))
    assert value.item() == pytest.approx(log_odds, abs=2e-6)
    assert -F.logsigmoid(value).item() == pytest.approx(odds_loss, abs=1e-6)


def test_sft_loss_is_cross_entropy_with_the_gradient_of_l2wrap() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 7, 13, dtype=torch.float64, generator=generator)).requires_grad_()
    targets = torch.randint(13, (2, 7), generator=generator)
    targets[0, :3] = IGNORED_TARGET
    logp, max_logit = scores(logits, targets)
    loss = sft_loss(logp, max_logit, targets >= 0)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(plain.item(), rel=1e-14)

    gradient = torch.autograd.grad(2.5 * loss, logits)[0] / 2.5
    expected = torch.autograd.grad(plain, logits)[0]
    largest = logits.detach().max(-1, keepdim=True)
    counted = (targets >= 0)[..., None]
    expected.scatter_add_(-1, largest.indices, largest.values * 1e-4 / 11 * counted)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_sft_loss_without_counted_positions_is_zero() -> None:
    logp = torch.zeros(3, requires_grad=True)
    loss = sft_loss(logp, torch.zeros(3), torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logp.grad, torch.zeros(3))
    assert l2wrap_penalty(torch.ones(3), torch.zeros(3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_orpo_loss_matches_the_plain_formula_in_value_and_gradient(alpha: float) -> None:
    lengths = [(1, 1, 1), (5, 3, 17), (4, 15, 2), (3, 6, 0), (1, 2, 0), (60, 7, 1)]
    pairs = [Pair(*each, seed=seed) for seed, each in enumerate(lengths)]
    expected = torch.stack([pair.plain_formula(alpha) for pair in pairs]).mean()
    expected_gradients = torch.autograd.grad(expected, [pair.logits for pair in pairs])

    logits = torch.cat([pair.logits for pair in pairs])
    targets = torch.cat([pair.targets for pair in pairs])
    groups = torch.cat([pair.groups(index) for index, pair in enumerate(pairs)])
    # Any order, and positions that do not count among the others.
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    logp, max_logit = scores(logits[order], targets[order])
    ignored = torch.tensor([group_number(len(pairs), Role.PROMPT)] * 2)
    zeros = torch.zeros(2, dtype=torch.float64)
    result = orpo_loss(
        torch.cat([logp, zeros]),
        torch.cat([max_logit, zeros]),
        torch.cat([groups[order], ignored]),
        len(pairs),
        alpha,
    )
    gradients = torch.autograd.grad(result.loss, [pair.logits for pair in pairs])

    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-13)
    assert result.is_plain.tolist() == [False, False, False, True, True, False]
    torch.testing.assert_close(result.pair_losses.mean(), result.loss.detach())


def test_orpo_loss_passes_gradcheck() -> None:
    pairs = [Pair(2, 3, 2, 7), Pair(3, 2, 0, 8)]
    groups = torch.cat([pair.groups(index) for index, pair in enumerate(pairs)])
    logp = torch.cat([scores(pair.logits, pair.targets)[0] for pair in pairs]).detach().requires_grad_()
    silent = torch.zeros_like(logp)
    assert torch.autograd.gradcheck(lambda values: orpo_loss(values, silent, groups, 2, 0.3).loss, (logp,))


def test_orpo_loss_of_a_perfect_model_and_of_extreme_logits_is_finite() -> None:
    groups = torch.tensor([group_number(pair, role) for pair in range(2) for role in Role for _ in range(3)])
    perfect = torch.zeros(18)
    perfect[6:9] = -2.0
    perfect[15:] = -1e4
    logp = perfect.clone().requires_grad_()
    max_logit = torch.full((18,), 3e4, requires_grad=True)
    result = orpo_loss(logp, max_logit, groups, 2, 0.1)
    result.loss.backward()
    assert math.isfinite(result.loss.item())
    assert torch.isfinite(logp.grad).all()
    assert torch.isfinite(max_logit.grad).all()
    assert result.log_odds[0].item() == pytest.approx(15.6701, abs=1e-3)

    hopeless = torch.full((9,), -1e4)
    hopeless[6:] = 0.0
    logp = hopeless.requires_grad_()
    result = orpo_loss(logp, torch.zeros(9), groups[:9], 1, 0.1)
    result.loss.backward()
    assert result.odds_loss.item() == pytest.approx(1e4 + 13.8155, rel=1e-4)
    assert (logp.grad[3:6] < 0).all()


def test_orpo_loss_shows_a_nan() -> None:
    groups = torch.tensor([group_number(0, role) for role in Role])
    result = orpo_loss(torch.tensor([-1.0, math.nan, -1.0]), torch.zeros(3), groups, 1, 0.1)
    assert math.isnan(result.loss.item())


def check_value_rows() -> tuple[Tensor, Tensor]:
    row, position, token = torch.arange(2)[:, None, None], torch.arange(4)[None, :, None], torch.arange(6)
    logits = ((3 * row + 2 * position + token**2) % 7).float() / 2
    return logits.requires_grad_(), torch.tensor([[2, 3, 4, 0], [2, 5, 4, 3]])


def test_orpo_loss_check_values() -> None:
    logits, targets = check_value_rows()
    ignored = group_number(1, Role.PROMPT)
    groups = torch.tensor([Role.PROMPT, Role.CHOSEN, Role.CHOSEN, ignored, ignored] + [Role.REJECTED] * 3)
    logp, max_logit = scores(logits, targets)
    result = orpo_loss(logp.flatten(), max_logit.flatten(), groups, 1, 0.1)
    assert result.nll.item() == pytest.approx(1.467615, abs=1e-6)
    assert result.logp_chosen.item() == pytest.approx(-1.636654, abs=1e-6)
    assert result.logp_rejected.item() == pytest.approx(-2.313514, abs=1e-6)
    assert result.log_odds.item() == pytest.approx(0.789160, abs=2e-6)
    assert result.odds_loss.item() == pytest.approx(0.374474, abs=1e-6)
    assert result.loss.item() == pytest.approx(0.9 * 1.467615 + 0.1 * 0.374474, abs=1e-6)


def released(logits: Tensor, targets: Tensor, reject_lengths: list[int]) -> PreferenceLoss:
    rows = torch.arange(len(targets)).repeat_interleave(targets.shape[1])
    flat, flat_logits = targets.flatten(), logits.flatten(0, 1)
    after = targets_after(flat, rows)
    logp, max_logit = scores(flat_logits, flat)
    logp_after, _ = scores(flat_logits, after)
    return orpo_loss_released(logp, logp_after, max_logit, flat, rows, torch.tensor(reject_lengths), 0.1)


def test_orpo_loss_released_check_values() -> None:
    logits, targets = check_value_rows()
    result = released(logits, targets, [5])
    assert result.nll.item() == pytest.approx(1.467615, abs=1e-6)
    assert result.logp_chosen.item() == pytest.approx(-2.134282, abs=1e-6)
    assert result.logp_rejected.item() == pytest.approx(-3.151592, abs=1e-6)
    assert result.log_odds.item() == pytest.approx(1.099521, abs=2e-6)
    assert result.loss.item() == pytest.approx(1.349599, abs=1e-6)
    assert result.preferred_share.item() == 1


def test_targets_after_stops_at_row_ends() -> None:
    targets, rows = torch.tensor([2, 3, 4, 7, 8, 9]), torch.tensor([0, 0, 0, 1, 1, 2])
    assert targets_after(targets, rows).tolist() == [3, 4, IGNORED_TARGET, 8, IGNORED_TARGET, IGNORED_TARGET]


def test_orpo_loss_released_keeps_l2wrap_over_padding_and_undivided_by_pairs() -> None:
    logits, targets = check_value_rows()
    loss = released(torch.cat([logits, logits]), torch.cat([targets, targets]), [5, 5]).loss
    assert loss.item() == pytest.approx(1.349599, abs=1e-6)
    gradient = torch.autograd.grad(loss, logits)[0]

    def value(values: Tensor) -> Tensor:
        rows_logp = values.log_softmax(-1)
        counted = targets != 0
        nll = -(rows_logp[0].gather(-1, targets[0][:, None])[:, 0] * counted[0]).sum() / counted[0].sum()
        following = torch.tensor([[3, 4, 0], [5, 4, 3]])
        scored = rows_logp[:, :3].gather(-1, following[..., None])[..., 0]
        lp = (scored * counted[:, :3]).sum(1) / counted[:, :3].sum(1)
        odds = lp.exp() / (1 - lp.exp())
        # Two equal pairs: the mean of the losses is one pair's; L2Wrap's sum is twice one pair's.
        return 0.9 * nll - 0.1 * torch.log((odds[0] / odds[1]) / (1 + odds[0] / odds[1]))

    values = logits.detach().clone().requires_grad_()
    expected = torch.autograd.grad(value(values), values)[0]
    largest = logits.detach().max(-1, keepdim=True)
    expected.scatter_add_(-1, largest.indices, 2 * largest.values * 1e-4 / 8)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_orpo_loss_released_trains_short_rejects_plainly() -> None:
    logits, targets = check_value_rows()
    result = released(logits, targets, [4])
    assert result.loss.item() == pytest.approx(1.467615, abs=1e-6)
    assert result.preferred_share.item() == pytest.approx(1.5 - 1.467615, abs=1e-6)
    assert result.averages()["loss_2_odds_ratio"] == 0


def test_orpo_loss_released_trains_a_plain_pair_of_which_nothing_is_scored() -> None:
    """A prompt of one token and no reject leave the rejected row without targets."""
    logits, _ = check_value_rows()
    result = released(logits, torch.tensor([[3, 4, 0, 0], [0, 0, 0, 0]]), [0])
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-logits[0].log_softmax(-1)[[0, 1], [3, 4]].mean().item(), abs=1e-6)
    assert torch.isfinite(logits.grad).all()


def test_orpo_loss_released_does_not_hide_a_nan() -> None:
    logits, _ = check_value_rows()
    nothing_counted = torch.tensor([[2, 3, 4, 0], [0, 0, 0, 0]])
    assert math.isnan(released(logits, nothing_counted, [5]).loss.item())


def test_averages_names_and_values() -> None:
    pairs = [Pair(3, 2, 4, 20), Pair(2, 5, 1, 21), Pair(2, 2, 0, 22)]
    logits = torch.cat([pair.logits for pair in pairs])
    logp, max_logit = scores(logits, torch.cat([pair.targets for pair in pairs]))
    groups = torch.cat([pair.groups(index) for index, pair in enumerate(pairs)])
    result = orpo_loss(logp, max_logit, groups, 3, 0.25)
    averages = result.averages()
    assert averages["plain_pairs"] == 1
    assert averages["loss_1_token_chosen"] == pytest.approx(result.nll.mean().item())
    assert averages["loss_2_odds_ratio"] == pytest.approx(0.25 * result.odds_loss[:2].sum().item() / 3)
    assert averages["margin"] == pytest.approx(averages["logp_chosen"] - averages["logp_rejected"])
    assert averages["logp_chosen"] == pytest.approx(result.logp_chosen[:2].mean().item())
    wins = (result.logp_chosen > result.logp_rejected)[:2].double()
    assert averages["accuracy"] == pytest.approx(wins.mean().item())
    assert averages["preference_share"] == pytest.approx(averages["loss_2_odds_ratio"] / result.loss.item())
    assert result.preferred_share.item() == averages["accuracy"]

    alone = Pair(2, 2, 0, 22)
    logp, max_logit = scores(alone.logits, alone.targets)
    result = orpo_loss(logp, max_logit, alone.groups(0), 1, 0.25)
    always = {"nll", "loss_1_token_chosen", "loss_2_odds_ratio", "preference_share", "plain_pairs"}
    assert set(result.averages()) == always
    assert running_preference(0.5, result.preferred_share.item()) == 0.5
    assert running_preference(0.5, 1.0) == pytest.approx(0.55)


class TestComparisons:
    """DPO and SimPO against the formulas of their papers, spelled out with probabilities."""

    LENGTHS = ((1, 1, 1), (5, 3, 17), (4, 15, 2), (60, 7, 1))

    def pairs(self) -> list[Pair]:
        return [Pair(*each, seed=30 + seed) for seed, each in enumerate(self.LENGTHS)]

    def answers(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens of both answers."""
        prompt, chosen, _ = pair.lengths
        logp = F.cross_entropy(pair.logits, pair.targets, reduction="none").neg()[prompt - 1 :]
        return logp[:chosen], logp[chosen:]

    def gathered(self, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """logp and groups of all positions in any order, two that do not count among them."""
        logits = torch.cat([pair.logits for pair in pairs])
        logp, _ = scores(logits, torch.cat([pair.targets for pair in pairs]))
        groups = torch.cat([pair.groups(index) for index, pair in enumerate(pairs)])
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
        ignored = torch.tensor([group_number(len(pairs), Role.PROMPT)] * 2)
        return torch.cat([logp[order], logp.new_zeros(2)]), torch.cat([groups[order], ignored])

    def check(self, pairs: list[Pair], result: ComparisonLoss, expected: Tensor) -> None:
        wanted = torch.autograd.grad(expected, [pair.logits for pair in pairs], retain_graph=True)
        gradients = torch.autograd.grad(result.loss, [pair.logits for pair in pairs])
        torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(result.pair_losses.mean(), expected.detach(), rtol=1e-12, atol=0)
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)

    @pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
    def test_dpo(self, beta: float) -> None:
        pairs = self.pairs()
        generator = torch.Generator().manual_seed(1)
        reference = -20 * torch.rand(len(pairs), 2, generator=generator, dtype=torch.float64)
        terms = []
        for pair, (ref_chosen, ref_rejected) in zip(pairs, reference, strict=True):
            chosen, rejected = self.answers(pair)
            ratio = (chosen.sum() - ref_chosen).exp() / (rejected.sum() - ref_rejected).exp()
            terms.append(-torch.log(ratio**beta / (1 + ratio**beta)))
        result = dpo_loss(*self.gathered(pairs), len(pairs), reference, beta)
        self.check(pairs, result, torch.stack(terms).mean())
        gained = torch.stack([torch.stack([part.sum() for part in self.answers(pair)]) for pair in pairs]) - reference
        torch.testing.assert_close(result.reward_chosen, beta * gained[:, 0].detach())
        torch.testing.assert_close(result.margins, beta * (gained[:, 0] - gained[:, 1]).detach())

    def test_dpo_begins_at_ln_2_and_with_a_gradient(self) -> None:
        pairs = self.pairs()
        logp, groups = self.gathered(pairs)
        reference = torch.stack([torch.stack([part.sum() for part in self.answers(pair)]) for pair in pairs]).detach()
        result = dpo_loss(logp, groups, len(pairs), reference, 0.1)
        assert result.loss.item() == pytest.approx(math.log(2), rel=1e-14)
        averages = result.averages()
        assert averages["margin"] == pytest.approx(0, abs=1e-13)
        gradient = torch.autograd.grad(result.loss, logp)[0]
        weights = torch.zeros_like(gradient)
        for pair in range(len(pairs)):
            weights[groups == group_number(pair, Role.CHOSEN)] = -0.1 / 2 / len(pairs)
            weights[groups == group_number(pair, Role.REJECTED)] = 0.1 / 2 / len(pairs)
        torch.testing.assert_close(gradient, weights)

    @pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (2.5, 0.0), (10.0, 3.0)])
    def test_simpo(self, beta: float, gamma: float) -> None:
        pairs = self.pairs()
        terms, margins = [], []
        for pair in pairs:
            chosen, rejected = self.answers(pair)
            difference = beta / len(chosen) * chosen.sum() - beta / len(rejected) * rejected.sum()
            terms.append(-torch.log(1 / (1 + torch.exp(-(difference - gamma)))))
            margins.append(difference.detach())
        result = simpo_loss(*self.gathered(pairs), len(pairs), beta, gamma)
        self.check(pairs, result, torch.stack(terms).mean())
        torch.testing.assert_close(result.margins, torch.stack(margins))

    def test_what_is_logged(self) -> None:
        pairs = self.pairs()
        result = simpo_loss(*self.gathered(pairs), len(pairs), 2.0, 1.0)
        averages = result.averages()
        assert averages["margin"] == pytest.approx(averages["reward_chosen"] - averages["reward_rejected"])
        assert averages["reward_chosen"] == pytest.approx(2 * averages["logp_chosen"])
        assert averages["accuracy"] == pytest.approx((result.margins > 0).double().mean().item())
        nll = [-torch.cat([scores(p.logits, p.targets)[0][: p.lengths[0] - 1 + p.lengths[1]]]).mean() for p in pairs]
        assert averages["nll"] == pytest.approx(sum(nll).item() / len(nll))

    def test_equal_rewards_are_half_won(self) -> None:
        assert won(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [0.0, 0.5, 1.0]

    def test_extreme_log_probabilities_stay_finite_and_a_nan_shows(self) -> None:
        groups = torch.tensor(
            [group_number(0, Role.CHOSEN), group_number(0, Role.REJECTED), group_number(0, Role.PROMPT)]
        )
        logp = torch.tensor([-1e4, -1e-6, -1.0], requires_grad=True)
        result = dpo_loss(logp, groups, 1, torch.zeros(1, 2, dtype=torch.float64), 1.0)
        result.loss.backward()
        assert result.loss.item() == pytest.approx(1e4)
        assert torch.isfinite(logp.grad).all()
        assert math.isnan(simpo_loss(torch.tensor([math.nan, -1.0, -1.0]), groups, 1, 2.0, 1.0).loss.item())
