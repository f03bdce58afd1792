"""Flags of rlhf_generate_reject.py to a configuration."""

import dataclasses

import pytest

from src.config import RejectConfig
from src.errors import ConfigError

FLAGS = (
    # files
    "load_model", "load_state", "input_csv", "output_csv", "overwrite",
    # sampling
    "temperature", "top_p", "alpha_presence", "alpha_frequency", "alpha_decay", "max_tokens", "seed", "template",
    "stop", "allow_end",
    # hardware
    "batch", "accelerator", "precision", "quant", "quant_type",
)  # fmt: skip
"""Every flag of rlhf_generate_reject.py. Adding one is a decision: it belongs here too."""

FILES = {"load_model": "base.pth", "input_csv": "in.csv"}


def test_what_has_to_be_given_is_named() -> None:
    """The original's files are defaults that nobody has; as they were given, readers say what they miss."""
    with pytest.raises(ConfigError, match="2 problems") as caught:
        RejectConfig.from_flags({})
    for name in ("--load_model is missing: name the file", "--input_csv is missing: name the file"):
        assert name in str(caught.value)
    assert RejectConfig.from_flags({"load_model": "gone.pth", "input_csv": "gone.csv"}).input_csv == "gone.csv"


def test_the_flags_are_these() -> None:
    assert tuple(spec.name for spec in dataclasses.fields(RejectConfig)) == FLAGS


def test_defaults_are_the_originals() -> None:
    config = RejectConfig()
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
        ({"temperature": "-1"}, "--temperature -1 must not be negative"),
        ({"alpha_decay": "1.1"}, "--alpha_decay 1.1 must lie between 0 and 1"),
        ({"max_tokens": "0"}, "--max_tokens 0 must be at least 1"),
        ({"batch": "0"}, "--batch 0 must be at least 1"),
        ({"seed": "-1"}, "--seed -1 must not be negative"),
        ({"template": "mixed"}, "--template mixed is unknown: use one of user, question, input"),
        ({"load_model": ""}, "--load_model is empty: give a path, or leave the flag out"),
        ({"output_csv": "./in.csv"}, "--output_csv ./in.csv is the input: give another name"),
    ],
)
def test_refusals(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RejectConfig.from_flags({**FILES, **flags})
    assert str(refused.value) == message


def test_flags_are_checked_together() -> None:
    with pytest.raises(ConfigError, match="4 problems") as caught:
        RejectConfig.from_flags({**FILES, "top_p": "2", "seed": "x", "quant": "3", "output_csv": "in.csv"})
    for part in ("--top_p 2", "--seed 'x'", "--quant 3", "is the input"):
        assert part in str(caught.value)
