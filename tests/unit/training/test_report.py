"""What a plan says of an engine that was asked for where there is one GPU."""

from __future__ import annotations

import pytest

from src.adapters.method import method_of
from src.config import TrainConfig
from src.model.rwkv6 import RWKV6Shape
from src.training.report import engine_alone

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
