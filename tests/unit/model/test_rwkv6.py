"""What RWKV-6 alone has."""

from typing import Any

import pytest
import torch
from factories import tiny_parameters, tiny_shape
from torch import Tensor

from src.loading import LoadOptions, build_model
from src.model import rwkv6
from src.model.recompute import Recompute


@pytest.mark.parametrize("recompute", list(Recompute))
def test_modulation_is_kept_for_no_longer_than_a_layers_backward(
    recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: set[bool] = set()
    mix = rwkv6.modulated_shift_mixes

    def noting(*inputs: Tensor, keeps_modulation: bool, **options: Any) -> tuple[Tensor, ...]:
        kept.add(keeps_modulation)
        return mix(*inputs, keeps_modulation=keeps_modulation, **options)

    monkeypatch.setattr(rwkv6, "modulated_shift_mixes", noting)
    shape = tiny_shape()
    model = build_model(tiny_parameters(shape), shape, LoadOptions(torch.device("cpu"), torch.float32))
    model.set_recomputation([recompute] * shape.n_layer)
    model(torch.arange(9)[None])[0].sum().backward()
    assert kept == {recompute is not Recompute.NOTHING}
