"""Objectives on a tiny model: both layouts of a preference pair, packed and padded rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_training import PAIRS, preference_batch, state_gradients, tiny_model

from src.data.batches import packed_batch, padded_batch
from src.data.preference_batches import PairForm
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.training.objectives import Objective, Outcome, PreferenceObjective, SFTObjective, outcome_of


def outcome(objective: Objective, model: LanguageModel, batch: object) -> Outcome:
    return outcome_of(objective, model, objective.stage(model, batch))


@pytest.mark.parametrize("recompute", list(Recompute))
def test_shared_prompt_and_two_full_rows_agree(recompute: Recompute) -> None:
    results = []
    for form in (PairForm.SHARED_PROMPT, PairForm.TWO_ROWS):
        model = tiny_model(recompute)
        result = outcome(PreferenceObjective(0.3, 0), model, preference_batch(form, PAIRS))
        results.append((result.loss.item(), result.logs(), state_gradients(model, result.loss)))
    (loss, logs, gradient), (loss_two, logs_two, gradient_two) = results
    assert loss == pytest.approx(loss_two, rel=1e-5)
    assert logs == pytest.approx(logs_two, rel=1e-4, abs=1e-6)
    difference = (gradient - gradient_two).norm() / gradient_two.norm()
    assert difference < 1e-5
    assert logs["plain_pairs"] == 1


def test_micro_batch_of_pairs_is_the_mean_of_its_pairs() -> None:
    together = outcome(PreferenceObjective(0.3, 0), tiny_model(), preference_batch(PairForm.SHARED_PROMPT, PAIRS))
    alone = [
        outcome(PreferenceObjective(0.3, 0), tiny_model(), preference_batch(PairForm.SHARED_PROMPT, [pair])).loss
        for pair in PAIRS
    ]
    assert together.loss.item() == pytest.approx(sum(alone).item() / len(alone), rel=1e-5)


def test_released_formula_runs_on_padded_rows_and_logs_the_original_names() -> None:
    result = outcome(PreferenceObjective(0.1, 1), tiny_model(), preference_batch(PairForm.RELEASED, PAIRS[:3]))
    assert torch.isfinite(result.loss)
    assert {"pref_percentage", "loss_1_token_chosen", "loss_2_odds_ratio"} <= set(result.logs())


@pytest.mark.parametrize("debug", [True, False])
def test_debugging_prints_the_weighted_preference_term_of_every_pair(
    debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = PreferenceObjective(0.3, 0, debug=debug)
    result = outcome(objective, tiny_model(), preference_batch(PairForm.SHARED_PROMPT, PAIRS))
    mean = result.logs()["loss_2_odds_ratio"]
    printed = capsys.readouterr().out
    if not debug:
        assert not printed
        return
    terms = [float(term) for term in printed.removeprefix("preference terms: ").split(", ")]
    assert len(terms) == len(PAIRS)
    assert sum(terms) / len(terms) == pytest.approx(mean, abs=1e-6)


def test_packed_and_padded_rows_agree() -> None:
    rng = np.random.default_rng(3)
    documents = [rng.integers(1, 257, size) for size in (9, 33, 2, 70)]
    masks = [None, rng.random(33) < 0.5, None, None]
    results = []
    for make in (packed_batch, padded_batch):
        model = tiny_model()
        loss = outcome(SFTObjective(), model, make(documents, masks, range(4))).loss
        results.append((loss.item(), state_gradients(model, loss)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)


def test_step_weight_scales_the_loss() -> None:
    batch = packed_batch([np.arange(1, 20)], [None], [0])
    plain = outcome(SFTObjective(), tiny_model(), batch).loss.item()
    weighted = outcome(SFTObjective(), tiny_model(), replace(batch, step_weight=0.25)).loss.item()
    assert weighted == pytest.approx(plain / 4, rel=1e-6)
