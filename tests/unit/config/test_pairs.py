"""Flags of PrepareOrpoDataset.py to a configuration."""

import dataclasses

import pytest

from src.config import PairConfig
from src.errors import ConfigError

FLAGS = (
    # files
    "load_model", "input_csv", "output_save",
    # pairs
    "target_pair_count", "template", "max_len", "seed",
    # log-probabilities
    "base_logp", "accelerator", "precision", "quant", "quant_type",
    # logs
    "fapi_logging_callback", "fapi_logging_callback_step", "fapi_logging_address",
)  # fmt: skip
"""Every flag of PrepareOrpoDataset.py. Adding one is a decision: it belongs here too."""


def test_the_flags_are_these() -> None:
    assert tuple(spec.name for spec in dataclasses.fields(PairConfig)) == FLAGS


def test_defaults_are_the_originals() -> None:
    config = PairConfig()
    assert (config.input_csv, config.output_save) == ("ojousamatalkscript200.csv", "ojousama.save")
    assert (config.target_pair_count, config.seed, config.template) == (10000, 100, "mixed")
    assert (config.fapi_logging_callback, config.fapi_logging_callback_step) == (0, 1000)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target_pair_count": "0"}, "--target_pair_count 0 must be at least 1"),
        ({"max_len": "-1"}, "--max_len -1 must not be negative"),
        ({"fapi_logging_callback_step": "0"}, "--fapi_logging_callback_step 0 must be at least 1"),
        ({"base_logp": "1"}, "--base_logp 1 needs --load_model"),
        (
            {"input_csv": "a.texts.jsonl", "output_save": "a.save"},
            "--output_save a.save cannot be used: it, the texts in a.texts.jsonl and the input must be three files",
        ),
    ],
)
def test_refusals(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PairConfig.from_flags({"input_csv": "in.csv", **flags})
    assert str(refused.value) == message


def test_flags_are_checked_together() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        PairConfig.from_flags({"input_csv": "in.csv", "target_pair_count": "0", "seed": "x"})
