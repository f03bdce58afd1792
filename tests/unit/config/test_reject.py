"""Flags of rlhf_generate_reject.py to a configuration."""

import dataclasses

import pytest

from src.config import RejectConfig
from src.errors import ConfigError

FLAGS = (
    # files
    "load_model", "load_state", "input_csv", "output_csv", "overwrite",
    # sampling
    "template", "temperature", "top_p", "alpha_presence", "alpha_frequency", "alpha_decay", "max_tokens", "stop",
    "allow_end", "seed",
    # hardware
    "batch", "accelerator", "precision", "quant", "quant_type",
)  # fmt: skip
"""Every flag of rlhf_generate_reject.py. Adding one is a decision: it belongs here too."""


def test_the_flags_are_these() -> None:
    assert tuple(spec.name for spec in dataclasses.fields(RejectConfig)) == FLAGS


def test_defaults_are_the_originals() -> None:
    config = RejectConfig.from_flags({})
    assert (config.load_model, config.input_csv, config.output_csv) == (
        "base_model/Anarchy-RWKV-2B-68.pth",
        "example.csv",
        "rlhfoutput.csv",
    )
    sampling = (config.temperature, config.top_p, config.alpha_presence, config.alpha_frequency, config.alpha_decay)
    assert sampling == (1.0, 0.3, 0.0, 1.0, 0.996)
    assert (config.max_tokens, config.stop, config.allow_end, config.template) == (1000, r"\n\n", 0, "user")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": "-1"}, "--temperature -1.0 must not be negative"),
        ({"alpha_decay": "1.1"}, "--alpha_decay 1.1 must lie between 0 and 1"),
        ({"max_tokens": "0"}, "--max_tokens 0 must be at least 1"),
        ({"batch": "0"}, "--batch 0 must be at least 1"),
        ({"seed": "-1"}, "--seed -1 must not be negative"),
        ({"template": "mixed"}, "--template mixed is unknown: use one of user, question, input"),
        ({"load_model": ""}, "--load_model is empty: name a .pth file"),
        ({"output_csv": "./example.csv"}, "--output_csv ./example.csv is the input: give another name"),
    ],
)
def test_refusals(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RejectConfig.from_flags(flags)
    assert str(refused.value) == message


def test_flags_are_checked_together() -> None:
    with pytest.raises(ConfigError, match="4 problems") as caught:
        RejectConfig.from_flags({"top_p": "2", "seed": "x", "quant": "3", "output_csv": "a", "input_csv": "a"})
    for part in ("--top_p 2.0", "--seed 'x'", "--quant 3", "is the input"):
        assert part in str(caught.value)
