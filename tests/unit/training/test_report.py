"""What a plan says of rates, and of an engine that was asked for where there is one GPU."""

from __future__ import annotations

import re

import pytest
from torch import nn

from src.adapters.method import method_of
from src.config import TrainConfig
from src.model.rwkv6 import RWKV6Shape
from src.schedule import Schedule
from src.training.module import parameter_groups
from src.training.report import engine_alone, other_rates

SHAPE = RWKV6Shape.from_sizes(n_layer=24, n_embd=2048, vocab_size=65536)
MILLIONS = 66 + 22.8
"""LoRA's values at rank 64, and those of `time` and `ln`."""


@pytest.mark.parametrize(
    ("flags", "gib"),
    [
        ({"peft": "lora", "strategy": "deepspeed_stage_1"}, 0),
        ({"peft": "lora", "strategy": "deepspeed_stage_1", "optim": "paged_adamw8bit"}, 8 * MILLIONS * 1e6 / 2**30),
        ({"peft": "lora", "strategy": "deepspeed_stage_1", "devices": "2"}, 0),
        ({"peft": "lora", "strategy": "deepspeed_stage_2_offload"}, 0),
        ({"peft": "lora"}, 0),
        ({"strategy": "deepspeed_stage_1"}, 0),
        ({"train_type": "none", "strategy": "deepspeed_stage_1"}, 8 * 1600e6 / 2**30),
    ],
)
def test_an_engine_on_one_gpu(flags: dict[str, str], gib: float) -> None:
    config = TrainConfig.from_flags({"load_model": "m.pth", "data_file": "data", **flags})
    lines = engine_alone(config, method_of(config), SHAPE)
    assert len(lines) == (gib > 0)
    if lines:
        (said,) = [float(word) for word in lines[0].split() if word[0].isdigit()]
        assert said == pytest.approx(gib, rel=0.02)
        assert "--strategy auto" in lines[0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, []),
        ({"peft": "lora", "train_parts": "[]"}, []),
        ({"peft": "lora", "train_type": "states", "layerwise_lr": "0"}, ["states"]),
        ({"peft": "lora", "lora_plus": "16"}, ["LoRA's B", "time_decay"]),
        ({"peft": "bone", "train_type": "states", "lr_state": "3"}, ["states", "time_decay"]),
        ({"peft": "lisa", "train_type": "states", "train_parts": "time"}, ["states", "time_decay"]),
        ({"peft": "lisa", "train_type": "states"}, ["states", "time_decay"]),
        ({"train_type": "none"}, ["time_decay"]),
        ({"train_type": "none", "layerwise_lr": "0"}, []),
    ],
)
def test_rates_are_those_of_the_optimizers_groups(flags: dict[str, str], named: list[str]) -> None:
    shape = RWKV6Shape.from_sizes(n_layer=2, n_embd=64, vocab_size=16)
    config = TrainConfig.from_flags({"load_model": "m.pth", "data_file": "data", **flags})
    method = method_of(config)
    names = [*method.trained_names(shape), *(shape.parameter_shapes() if config.method == "lisa" else ())]
    groups = parameter_groups(
        [(name, nn.Parameter()) for name in names], {name: method.rate_factor(shape, name) for name in names}, config
    )
    lines = other_rates(method, shape, Schedule(config.lr_init, config.lr_init, 0, 3), 3)
    assert len(lines) == (len(named) > 0)
    found = dict(re.findall(r"([A-Za-z_'][A-Za-z_' ]*): ([^ ,]+), ", "".join(lines)))
    assert sorted(what.strip() for what in found) == sorted(named)
    said = {float(rate) for rate in found.values()} | {config.lr_init}
    assert sorted(said) == pytest.approx(sorted({group["lr"] for group in groups} | {config.lr_init}), rel=1e-3)
