"""Flags of the chat to a configuration."""

import dataclasses

import pytest

from src.config import ChatConfig
from src.errors import ConfigError

FLAGS = (
    # files
    "load_model", "load_state", "load_adapter",
    # adapter
    "type", "lora_alpha", "lora_init", "writer",
    # sampling
    "temperature", "top_p", "alpha_presence", "alpha_frequency", "alpha_decay", "max_tokens", "seed", "template",
    "stop",
    # hardware
    "accelerator", "precision", "quant",
)  # fmt: skip
"""Every flag of src.commands.chat. Adding one is a decision: it belongs here too."""


def test_the_flags_are_these() -> None:
    assert tuple(spec.name for spec in dataclasses.fields(ChatConfig)) == FLAGS


def test_sampling_suits_reading() -> None:
    config = ChatConfig.from_flags({"load_model": "m.pth"})
    assert (config.temperature, config.top_p, config.alpha_frequency, config.template) == (1.0, 0.6, 0.0, "user")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--load_model is missing: name the model to chat with"),
        (
            {"load_model": "m", "template": "mixed"},
            "--template mixed is unknown: use one of user, question, input, think, no-think, text",
        ),
        ({"load_model": "m", "top_p": "2"}, "--top_p 2 must lie between 0 and 1"),
        ({"load_model": "m", "quant": "fp8"}, "--quant fp8 is unknown: use one of none, nf4, fp4, 4bit, int8"),
    ],
)
def test_what_cannot_be_is_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ChatConfig.from_flags(flags)
    assert str(refused.value) == message
