"""Micro-batches of pairs: what each position scores, and that all layouts give the same loss."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from factories import tiny_parameters, tiny_shape, tiny_states
from torch import Tensor

from src.data.preference_batches import PairForm, PreferenceBatch, PreferenceDataset
from src.data.preferences import PreferencePair
from src.errors import DataError
from src.loading import LoadOptions, build_model
from src.losses import (
    IGNORED_TARGET,
    PreferenceLoss,
    Role,
    group_number,
    orpo_loss,
    orpo_loss_released,
    targets_after,
)
from src.model.language_model import LanguageModel
from src.ops.token_logps import token_logps
from src.tokenizer import ByteTokenizer


def random_pairs(lengths: list[tuple[int, int, int]], vocabulary: int = 257) -> list[PreferencePair]:
    generator = random.Random(0)
    return [
        PreferencePair(*([generator.randrange(1, vocabulary) for _ in range(count)] for count in triple))
        for triple in lengths
    ]


def dataset(
    pairs: list[PreferencePair], form: PairForm = PairForm.SHARED_PROMPT, **changes: object
) -> PreferenceDataset:
    settings = {"source": "some.save", "form": form, "longest": 600, "micro_bsz": 2, "seed": 7, **changes}
    return PreferenceDataset(pairs, **settings)  # type: ignore[arg-type]


def test_shared_prompt_batch_token_by_token() -> None:
    pairs = [PreferencePair([1, 2, 3], [4, 5], [6]), PreferencePair([7], [8, 9], [10, 11])]
    batch = dataset(pairs).batch([0, 1])
    # Roots: pair 0's prompt without its last token, then both answers to the one-token prompt.
    assert batch.tokens.tolist() == [[1, 2, 7, 8, 7, 10, 3, 4, 3]]
    assert batch.targets.tolist() == [2, 3, 8, 9, 10, 11, 4, 5, 6]
    prompt, chosen, rejected = (group_number(0, role) for role in Role)
    other = [group_number(1, Role.CHOSEN)] * 2 + [group_number(1, Role.REJECTED)] * 2
    assert batch.groups.tolist() == [prompt, prompt, *other, chosen, chosen, rejected]
    assert batch.layout.lengths == (2, 2, 2, 2, 1)
    assert batch.layout.roots == 3
    assert batch.layout.parents.tolist() == [0, 0]
    assert batch.reject_lengths.tolist() == [1, 2]
    assert (batch.pairs, batch.token_count) == (2, 9)


def test_the_released_form_wants_rejects_of_five_tokens() -> None:
    rejects = [[], [33, 34, 35, 36], [33, 34, 35, 36, 37], [33] * 8]  # 33 is the byte tokenizer's space
    pairs = [PreferencePair([1, 2], [4, 5], reject) for reject in rejects]
    data = dataset(pairs, PairForm.RELEASED, tokenizer=ByteTokenizer())
    assert data.plan.statements() == (
        "2 of 4 pairs have no reject of 5 tokens or more and train on the chosen answer.",
    )
    assert data.batch(range(4)).reject_lengths.tolist() == [0, 0, 5, 8]


def test_the_released_form_compares_equal_answers_and_cuts_the_end_of_prompts() -> None:
    pairs = [PreferencePair([1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8], [4, 5, 6, 7, 8])]
    data = dataset(pairs, PairForm.RELEASED, longest=5)
    assert data.plan.statements() == (
        "warning: --rlhf_max_corpus_len 5 cuts 1 prompts (at their end, as the original does) and 0 answers (at their "
        "end).",
    )
    batch = data.batch([0])
    assert batch.reject_lengths.tolist() == [5]
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 4, 5, 6, 7] * 2]


@pytest.mark.parametrize("form", [PairForm.SHARED_PROMPT, PairForm.TWO_ROWS])
def test_a_reject_equal_to_its_chosen_answer_is_no_preference(form: PairForm) -> None:
    pairs = [
        PreferencePair([1, 2], [3, 4], [3, 4]),
        PreferencePair([1, 2], [3, 4], [3, 5]),
        PreferencePair([1, 2], [3, 4, 5, 6], [3, 4, 5, 7]),  # equal as far as they are trained
        PreferencePair([1, 2], [3, 4], []),
    ]
    made = dataset(pairs, form, longest=3, micro_bsz=4)
    assert made.plan.statements()[:2] == (
        "1 of 4 pairs have no reject and train on the chosen answer.",
        "2 of 4 pairs have a reject that is their chosen answer and train on that alone.",
    )
    batch = made.batch(range(4))
    assert batch.reject_lengths.tolist() == [0, 2, 0, 0]
    rejected = {group_number(pair, Role.REJECTED) for pair in range(4)}
    assert set(batch.groups.tolist()) & rejected == {group_number(1, Role.REJECTED)}
    assert made.plan.positions_per_pass == batch.tokens.numel()


def test_two_rows_batch_token_by_token() -> None:
    batch = dataset([PreferencePair([1, 2, 3], [4, 5], [6])], PairForm.TWO_ROWS).batch([0])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 1, 2, 3]]
    assert batch.targets.tolist() == [2, 3, 4, 5, IGNORED_TARGET, IGNORED_TARGET, 6]
    prompt, chosen, rejected = (group_number(0, role) for role in Role)
    uncounted = group_number(1, Role.PROMPT)
    assert batch.groups.tolist() == [prompt, prompt, chosen, chosen, uncounted, uncounted, rejected]
    assert batch.layout.lengths == (4, 3)
    assert batch.token_count == 7


def test_released_batch_is_padded_with_zero_to_the_longer_row() -> None:
    pairs = [PreferencePair([1, 2], [3, 4], [5, 4, 3]), PreferencePair([1], [2], [])]
    batch = dataset(pairs, PairForm.RELEASED).batch([0, 1])
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 1, 2, 5, 4, 1, 0]]
    assert batch.targets.tolist() == [2, 3, 4, 0, 2, 5, 4, 3, 2, 0]
    assert batch.groups.tolist() == [0] * 4 + [1] * 4 + [2, 3]
    assert batch.layout.lengths == (4, 4, 1, 1)
    assert batch.token_count == 8


def test_blank_rejects_get_no_positions() -> None:
    tokens = ByteTokenizer().encode
    pairs = [
        PreferencePair([1, 2], [3, 4], []),
        PreferencePair([1, 2], [3, 4], tokens(" \n\n\u3000")),
        PreferencePair([1, 2], [3, 4], tokens(" 0\n\n")),
    ]
    with_tokenizer = dataset(pairs, tokenizer=ByteTokenizer(), micro_bsz=3)
    assert with_tokenizer.plan.plain_pairs == 2
    batch = with_tokenizer.batch([0, 1, 2])
    assert not set(batch.groups.tolist()) & {group_number(0, Role.REJECTED), group_number(1, Role.REJECTED)}
    assert group_number(2, Role.REJECTED) in batch.groups
    assert dataset(pairs).plan.plain_pairs == 1
    assert "2 of 3 pairs have no reject" in with_tokenizer.plan.statements()[0]


def test_longest_shortens_and_counts() -> None:
    pairs = random_pairs([(9, 3, 8), (2, 5, 2)])
    cut = dataset(pairs, longest=4)
    assert cut.batch([0]).layout.lengths == (3, 3, 4)
    assert cut.batch([0]).tokens[0, :3].tolist() == pairs[0].prompt[-4:-1]
    plan = cut.plan
    assert (plan.shortened_prompts, plan.shortened_answers) == (1, 2)
    assert "cuts 1 prompts (at their beginning) and 2 answers" in plan.statements()[0]
    assert dataset(pairs).plan.statements() == ()
    with pytest.raises(DataError, match="save: the shortest has 3 tokens"):
        dataset(pairs, longest=2)


@pytest.mark.parametrize("form", list(PairForm))
def test_plan_counts_the_positions_of_a_pass(form: PairForm) -> None:
    made = dataset(random_pairs([(9, 3, 8), (1, 5, 2), (4, 2, 0)]), form, micro_bsz=3)
    assert made.plan.positions_per_pass == made.batch([0, 1, 2]).tokens.numel()


@pytest.mark.parametrize(("count", "micro_bsz", "ranks"), [(11, 2, 1), (11, 2, 2), (12, 3, 2), (5, 1, 4), (2, 4, 3)])
def test_passes_are_permutations_shared_by_the_ranks(count: int, micro_bsz: int, ranks: int) -> None:
    pairs = random_pairs([(2, 2, 2)] * count)
    sets = [dataset(pairs, micro_bsz=micro_bsz, rank=rank, world_size=ranks) for rank in range(ranks)]
    batches = [each[step].sample_indices for step in range(3 * len(sets[0])) for each in sets]
    stream = [index for batch in batches for index in batch]
    for number in range(3):
        assert sorted(stream[number * count : (number + 1) * count]) == list(range(count))
    assert stream[:count] != stream[count : 2 * count] or count < 3
    alone = dataset(pairs, micro_bsz=micro_bsz)
    assert [alone[step].sample_indices for step in range(len(batches))] == batches


def test_batches_weigh_by_their_pairs_within_an_optimizer_step() -> None:
    pairs = random_pairs([(2, 2, 2)] * 5)
    made = dataset(pairs, accumulate=2)
    assert len(made) == 4
    sizes = [made[step].pairs for step in range(4)]
    assert sizes == [2, 2, 1, 2]
    assert [made[step].step_weight for step in range(4)] == [1, 1, pytest.approx(2 / 3), pytest.approx(4 / 3)]
    assert dataset(pairs)[2].step_weight == 1
    shared = [dataset(pairs, rank=rank, world_size=2)[1] for rank in range(2)]
    assert [batch.step_weight for batch in shared] == [pytest.approx(2 / 3), pytest.approx(4 / 3)]


def test_a_reject_equal_to_the_chosen_answer_is_no_preference() -> None:
    pairs = [PreferencePair([5], [1, 2], [1, 2]), PreferencePair([5], [1, 2, 3], [1, 2]), PreferencePair([5], [1], [])]
    made = dataset(pairs)
    assert made.batch([0, 1, 2]).reject_lengths.tolist() == [0, 2, 0]
    assert made.plan.statements() == (
        "1 of 3 pairs have no reject and train on the chosen answer.",
        "1 of 3 pairs have a reject that is their chosen answer and train on that alone.",
    )
    assert dataset(pairs, PairForm.RELEASED).plan.equal_pairs == 0


@pytest.mark.parametrize("form", PairForm)
def test_tokens_of_a_pass_are_those_of_its_batches(form: PairForm) -> None:
    made = dataset(random_pairs([(17, 5, 9), (1, 4, 3), (6, 3, 0), (2, 8, 6)]), form)
    assert made.tokens_per_pass == sum(made[step].token_count for step in range(made.batches_per_pass))


def test_an_epoch_streams_through_passes() -> None:
    made = dataset(random_pairs([(2, 2, 2)] * 5), micro_bsz=1, epoch_steps=3)
    assert len(made) == 3
    seen = [made[step].sample_indices[0] for step in range(2 * len(made))]
    assert sorted(seen[:5]) == [0, 1, 2, 3, 4]


def test_batches_in_order_and_names() -> None:
    made = dataset(random_pairs([(2, 2, 2)] * 5))
    assert [batch.sample_indices for batch in made.batches_in_order()] == [(0, 1), (2, 3), (4,)]
    assert made.describe(made.batch([3, 0])) == "pairs 4, 1 of some.save"
    assert made.describe(made.batch([2])) == "pair 3 of some.save"


def tiny_model() -> LanguageModel:
    shape = tiny_shape()
    tensors = {**tiny_parameters(shape), **tiny_states(shape)}
    return build_model(tensors, shape, LoadOptions(torch.device("cpu"), torch.float32))


def loss_and_gradients(model: LanguageModel, batch: PreferenceBatch) -> tuple[PreferenceLoss, list[Tensor]]:
    states = [block.att.time_state for block in model.blocks]
    hidden, _ = model(batch.tokens, layout=batch.layout)
    logp, max_logit = token_logps(hidden[0], model.head.weight, batch.targets)
    result = orpo_loss(logp, max_logit, batch.groups, batch.pairs, 0.5)
    return result, list(torch.autograd.grad(result.loss, states))


def test_prompt_computed_once_equals_two_rows_in_loss_and_state_gradient() -> None:
    pairs = random_pairs([(17, 5, 9), (1, 4, 3), (2, 1, 40), (6, 3, 0), (33, 16, 1)])
    model = tiny_model()
    indices = range(len(pairs))
    shared, shared_gradients = loss_and_gradients(model, dataset(pairs).batch(indices))
    rows, rows_gradients = loss_and_gradients(model, dataset(pairs, PairForm.TWO_ROWS).batch(indices))
    torch.testing.assert_close(shared.loss, rows.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(shared.log_odds, rows.log_odds, rtol=1e-5, atol=1e-5)
    for one, other in zip(shared_gradients, rows_gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
        assert other.norm() > 0


def test_a_batch_of_pairs_equals_each_pair_alone() -> None:
    pairs = random_pairs([(17, 5, 9), (1, 4, 3), (6, 3, 0)])
    model = tiny_model()
    made = dataset(pairs)
    together, gradients = loss_and_gradients(model, made.batch([0, 1, 2]))
    alone = [loss_and_gradients(model, made.batch([index])) for index in range(3)]
    losses = torch.stack([result.loss.detach() for result, _ in alone])
    torch.testing.assert_close(together.pair_losses, losses, rtol=1e-5, atol=0)
    for layer, gradient in enumerate(gradients):
        mean = torch.stack([each[layer] for _, each in alone]).mean(0)
        assert (gradient - mean).norm() <= 1e-5 * mean.norm()


def test_released_batch_feeds_the_released_loss() -> None:
    pairs = random_pairs([(5, 7, 9), (3, 12, 6)])
    model = tiny_model()
    made = dataset(pairs, PairForm.RELEASED)

    def released(indices: list[int]) -> PreferenceLoss:
        batch = made.batch(indices)
        hidden, _ = model(batch.tokens, layout=batch.layout)
        logp, max_logit = token_logps(hidden[0], model.head.weight, batch.targets)
        after, _ = token_logps(hidden[0], model.head.weight, targets_after(batch.targets, batch.groups))
        return orpo_loss_released(logp, after, max_logit, batch.targets, batch.groups, batch.reject_lengths, 0.1)

    together = released([0, 1])
    separate = torch.stack([released([index]).loss.detach() for index in range(2)])
    torch.testing.assert_close(together.pair_losses, separate, rtol=1e-5, atol=0)
    nll = dataset(pairs, PairForm.TWO_ROWS)
    torch.testing.assert_close(together.nll, loss_and_gradients(model, nll.batch([0, 1]))[0].nll)


class TestComparisons:
    """Data for losses that compare two answers."""

    def made(self, **options: int) -> PreferenceDataset:
        """Seven pairs, of which the second has no reject and the last one equal to the chosen answer."""
        pairs = random_pairs([(2, 2, 2), (2, 2, 0), *[(3, 4, 5)] * 4, (2, 3, 3)])
        pairs[-1] = replace(pairs[-1], rejected=pairs[-1].chosen)
        return dataset(pairs, seed=1, compares=True, **options)

    def test_pairs_without_a_reject_of_their_own_are_left_out(self) -> None:
        made = self.made()
        assert made.visited == [0, 2, 3, 4, 5]
        assert [batch.sample_indices for batch in made.batches_in_order()] == [(0, 2), (3, 4), (5,)]
        assert made.batches_per_pass == 3
        assert sorted(index for step in range(3) for index in made[step].sample_indices) == made.visited
        assert made.plan.statements() == (
            "1 of 7 pairs have no reject and are left out: the loss compares two answers.",
            "1 of 7 pairs have a reject that is their chosen answer and are left out.",
        )
        assert made.describe(made.batch([2])) == "pair 3 of some.save"

    def test_which_pairs_a_rank_sees(self) -> None:
        assert self.made().seen_in(range(0)) == []
        assert self.made().seen_in(range(1)) == sorted(self.made()[0].sample_indices)
        assert self.made().seen_in(range(1, 2)) == sorted(self.made()[1].sample_indices)
        assert self.made().seen_in(range(1000)) == self.made().visited
        halves = [set(self.made(rank=rank, world_size=3).seen_in(range(1))) for rank in range(3)]
        assert set.union(*halves) == set(self.made().visited)
        assert sum(map(len, halves)) == 5

    def test_batches_bring_their_references(self) -> None:
        made = self.made()
        assert made.batch([3, 0]).reference is None
        made.references = torch.arange(14, dtype=torch.float64).view(7, 2)
        reference = made.batch([3, 0]).reference
        assert reference is not None
        assert reference.tolist() == [[6.0, 7.0], [0.0, 1.0]]
