"""A tiny model and preference pairs for tests of training, without a run around them."""

from __future__ import annotations

import torch
from factories import tiny_parameters, tiny_shape

from src.data.preference_batches import PairForm, PreferenceBatch, PreferenceDataset
from src.data.preferences import PreferencePair
from src.loading import LoadOptions, build_model
from src.model.recompute import Recompute
from src.model.rwkv6 import RWKV6


def tiny_model(recompute: Recompute = Recompute.NOTHING) -> RWKV6:
    shape = tiny_shape()
    options = LoadOptions(torch.device("cpu"), torch.float32, recompute=recompute)
    model = build_model(tiny_parameters(shape), shape, options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.copy_(torch.randn(block.att.time_state.shape, generator=generator) * 0.3)
    return model


def state_gradients(model: RWKV6, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return torch.cat([block.att.time_state.grad.flatten() for block in model.blocks])


def preference_batch(form: PairForm, pairs: list[PreferencePair]) -> PreferenceBatch:
    dataset = PreferenceDataset(pairs, source="test", form=form, longest=64, micro_bsz=len(pairs), seed=1)
    return dataset.batch(range(len(pairs)))


PAIRS = [
    PreferencePair([5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]),
    PreferencePair([21], [22, 23], [24]),
    PreferencePair(list(range(30, 55)), [60] * 17, [61, 62]),
    PreferencePair([70, 71], [72, 73, 74], []),
]
