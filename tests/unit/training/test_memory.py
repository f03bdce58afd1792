"""The memory plan: how many layers keep more, from the bytes at hand."""

from __future__ import annotations

import pytest
import torch
from factories import tiny_parameters, tiny_shape

from src.loading import LoadOptions, build_model
from src.model.parameters import ModelShape
from src.model.recompute import Recompute
from src.model.rwkv6 import RWKV6
from src.training.memory import MemoryPlan, kept_bytes, plan_memory

GIB = 2**30


@pytest.fixture
def model() -> RWKV6:
    shape = tiny_shape(n_layer=4)
    return build_model(tiny_parameters(shape), shape, LoadOptions(torch.device("cpu"), torch.float32))


def fake_device(monkeypatch: pytest.MonkeyPatch, free_gib: float, total_gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * GIB), int(total_gib * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)


def test_more_free_memory_keeps_more_layers(model: RWKV6, monkeypatch: pytest.MonkeyPatch) -> None:
    row_tokens = 1_000_000
    counts = []
    for free in (0.5, 4, 5, 24, 80):
        fake_device(monkeypatch, free, 80)
        counts.append(plan_memory(model, row_tokens, 0).light_layers)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 4
    assert any(0 < count < 4 for count in counts)


def test_limit_counts_what_others_use(model: RWKV6, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, 70, 80)
    assert plan_memory(model, 1_000_000, limit_gib=11).light_layers == 0
    assert plan_memory(model, 1_000_000, limit_gib=80).light_layers == 4


def test_apply_makes_the_last_layers_light(model: RWKV6) -> None:
    MemoryPlan(light_layers=1, layers=4, keep_dequantized=False).apply(model)
    assert [block.recompute for block in model.blocks] == [Recompute.ALL] * 3 + [Recompute.INPUTS]


def test_kept_bytes_of_the_7b_shape() -> None:
    shape = ModelShape.from_sizes(n_layer=32, n_embd=4096, vocab_size=65536, double_extra_dim=True)
    assert kept_bytes(shape, Recompute.ALL) == 2 * 4096
    assert kept_bytes(shape, Recompute.INPUTS) == 2 * (11 * 4096 + 14336 + 128)
