"""Held-out measurements against a plain loop."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import tiny_parameters, tiny_shape, tiny_states
from running import write_documents

from src.data.binidx import read_binidx
from src.data.documents import Documents
from src.data.preference_batches import PairForm, PreferenceDataset
from src.data.preferences import PreferencePair
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.training.evaluation import START_POSITIONS, held_out_loss, held_out_preference
from src.training.objectives import PreferenceObjective

SHAPE = tiny_shape()


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A tiny model with a start state and dropout."""
    options = LoadOptions(torch.device("cpu"), torch.float32, dropout=0.5)
    return build_model({**tiny_parameters(SHAPE), **tiny_states(SHAPE)}, SHAPE, options)


@torch.no_grad()
def target_losses(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    """Cross-entropy of every token after the first, without dropout."""
    model.eval()
    hidden, _ = model(torch.tensor([tokens[:-1]]))
    losses = F.cross_entropy(model.logits(hidden)[0], torch.tensor(tokens[1:]), reduction="none")
    model.train()
    return losses


@pytest.mark.parametrize("chunk_tokens", [0, 32])
def test_the_loss_is_the_mean_over_all_targets(chunk_tokens: int, model: LanguageModel, tmp_path: Path) -> None:
    documents = read_binidx(str(write_documents(tmp_path / "d", [100, 5, 70, 65, 66])), SHAPE.vocab_size)
    result = held_out_loss(model, documents, 90, chunk_tokens)
    rows = [target_losses(model, documents.tokens(i, 91).tolist()) for i in range(5)]
    assert result.overall == pytest.approx(float(torch.cat(rows).mean()), rel=1e-5)
    assert result.start == pytest.approx(float(torch.cat([r[:START_POSITIONS] for r in rows]).mean()), rel=1e-5)
    assert result.rest == pytest.approx(float(torch.cat([r[START_POSITIONS:] for r in rows]).mean()), rel=1e-5)
    assert (result.targets, result.documents) == (90 + 4 + 69 + 64 + 65, 5)
    assert model.training


def test_only_counted_targets_enter(model: LanguageModel) -> None:
    stream = np.array([5, 6, 7, 8, 9, 0], dtype=np.uint16)
    counted = np.array([0, 0, 0, 1, 1, 0], dtype=np.bool_)
    documents = Documents.from_stream(
        "d", stream, np.zeros(1, np.int64), np.full(1, 6, np.int64), SHAPE.vocab_size, stream_counted=counted
    )
    result = held_out_loss(model, documents, ctx_len=10)
    assert result.targets == 2
    assert result.overall == pytest.approx(float(target_losses(model, stream.tolist())[2:4].mean()), rel=1e-5)


def test_short_documents_have_no_rest_and_say_so_in_words(model: LanguageModel, tmp_path: Path) -> None:
    documents = read_binidx(str(write_documents(tmp_path / "d", [10, 12])), SHAPE.vocab_size)
    result = held_out_loss(model, documents, ctx_len=90)
    assert np.isnan(result.rest)
    assert str(result).startswith(f"loss {result.overall:.4f} over 20 tokens of 2 documents")


def test_answers_behind_the_start_have_no_figure_for_it(model: LanguageModel, tmp_path: Path) -> None:
    documents = read_binidx(str(write_documents(tmp_path / "d", [80])), SHAPE.vocab_size)
    result = held_out_loss(model, documents.masked(np.arange(80) > 70), ctx_len=90)
    assert np.isnan(result.start)
    assert str(result) == f"loss {result.rest:.4f} over 9 tokens of 1 document (rest {result.rest:.4f})"


def test_preference_accuracy_and_margin(model: LanguageModel) -> None:
    pairs = [
        PreferencePair([5, 6, 7], [10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25]),
        PreferencePair([8, 9], [30, 31, 32, 33, 34], [40, 41, 42, 43, 44]),
        PreferencePair([1, 2, 3, 4], [50, 51, 52, 53, 54], [60, 61, 62, 63, 64, 65, 66]),
    ]
    dataset = PreferenceDataset(pairs, source="d", form=PairForm.SHARED_PROMPT, longest=64, micro_bsz=2, seed=1)
    result = held_out_preference(model, dataset, PreferenceObjective(0.5, 0))
    margins = []
    for pair in pairs:
        lp = [
            -float(target_losses(model, [*pair.prompt, *answer])[len(pair.prompt) - 1 :].mean())
            for answer in (pair.chosen, pair.rejected)
        ]
        margins.append(lp[0] - lp[1])
    assert result.pairs == 3
    assert result.margin == pytest.approx(sum(margins) / 3, rel=1e-4)
    assert result.accuracy == pytest.approx(sum(m > 0 for m in margins) / 3)
