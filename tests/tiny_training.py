"""A tiny model and preference pairs for tests of training, without a run around them."""

from __future__ import annotations

import torch
from factories import tiny_parameters, tiny_shape

from src.data.preference_batches import PairForm, PreferenceBatch, PreferenceDataset
from src.data.preferences import PreferencePair
from src.data.rounding import EXACT, Rounding
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute


def tiny_model(recompute: Recompute = Recompute.NOTHING) -> LanguageModel:
    shape = tiny_shape()
    model = build_model(tiny_parameters(shape), shape, LoadOptions(torch.device("cpu"), torch.float32))
    model.set_recomputation([recompute] * shape.n_layer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.copy_(torch.randn(block.att.time_state.shape, generator=generator) * 0.3)
    return model


def state_gradients(model: LanguageModel, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return torch.cat([block.att.time_state.grad.flatten() for block in model.blocks])


def preference_batch(form: PairForm, pairs: list[PreferencePair], rounding: Rounding = EXACT) -> PreferenceBatch:
    dataset = PreferenceDataset(pairs, source="test", form=form, longest=64, micro_bsz=len(pairs), seed=1)
    return dataset.batch(range(len(pairs)), rounding)


PAIRS = [
    PreferencePair([5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]),
    PreferencePair([21], [22, 23], [24]),
    PreferencePair(list(range(30, 55)), [60] * 17, [61, 62]),
    PreferencePair([70, 71], [72, 73, 74], []),
]
