"""Flags of merge_state.py to a configuration."""

import dataclasses

import pytest

from src.config import MergeConfig
from src.errors import ConfigError

FLAGS = (
    # files
    "base_model", "lora_checkpoint", "peft_checkpoint", "state_checkpoint", "output", "export",
    # adapter
    "type", "lora_alpha", "lora_init", "writer",
    # work
    "quant", "device", "verify", "verify_text",
)  # fmt: skip
"""Every flag of merge_state.py. Adding one is a decision: it belongs here too."""

THREE = {"base_model": "a", "peft_checkpoint": "b", "output": "c"}


def test_the_flags_are_these() -> None:
    assert tuple(spec.name for spec in dataclasses.fields(MergeConfig)) == FLAGS


@pytest.mark.parametrize("name", ["lora_checkpoint", "peft_checkpoint", "state_checkpoint"])
def test_the_file_by_any_name(name: str) -> None:
    assert MergeConfig.from_flags({"base_model": "a", name: "b", "output": "c"}).file == "b"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "BASE and FILE and OUTPUT missing: python merge_state.py BASE FILE OUTPUT"),
        ({"base_model": "a", "peft_checkpoint": "b"}, "OUTPUT missing"),
        ({**THREE, "lora_checkpoint": "d"}, "--lora_checkpoint and --peft_checkpoint both name FILE"),
        ({**THREE, "type": "dora"}, "--type dora is unknown: use one of lora, pissa, bone, bat, disha"),
        ({**THREE, "lora_alpha": "-1"}, "--lora_alpha -1 must be above 0"),
        ({**THREE, "quant": "fp8"}, "--quant fp8 is unknown"),
        ({**THREE, "export": "hf", "verify": "1"}, "leave one out"),
        (
            {**THREE, "export": "hf", "quant": "nf4"},
            "--quant nf4 changes the base model, which",
        ),
    ],
)
def test_what_cannot_be_is_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        MergeConfig.from_flags(flags)
    assert message in str(refused.value)


def test_a_text_without_verification_is_noted() -> None:
    (note,) = MergeConfig.from_flags({**THREE, "verify_text": "a.txt"}).notes()
    assert "--verify_text a.txt has no effect without --verify 1" in note
