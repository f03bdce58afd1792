"""Words and flags of the state tool's commands to configurations."""

import dataclasses
import math

import pytest

from src.config import STATE_COMMANDS
from src.config.state import CLIENT_NAMES, BlendConfig, ExportConfig, Share, VerifyConfig
from src.errors import ConfigError

TOLD = ("type", "lora_alpha", "lora_init", "writer")
FLAGS = {
    "inspect": ("file",),
    "export": ("file", "output", "to", "base", "my_testing", *TOLD),
    "blend": ("states", "output"),
    "diff": ("first", "second"),
    "verify": ("file", "base", "verify_text", *TOLD, "accelerator", "precision", "quant"),
}
"""Every flag of every command. Adding one is a decision: it belongs here too."""


def test_the_flags_are_these() -> None:
    assert {
        name: tuple(spec.name for spec in dataclasses.fields(command)) for name, command in STATE_COMMANDS.items()
    } == FLAGS


def test_words_are_flags() -> None:
    for name, command in STATE_COMMANDS.items():
        assert set(command.words) <= set(FLAGS[name])


def test_shares_are_files_with_weights() -> None:
    config = BlendConfig.from_flags({"states": "'a b.pth:0.3' c:d.pth:-2e-1", "output": "o.pth"})
    assert config.shares == [Share("a b.pth", 0.3), Share("c:d.pth", -0.2)]


@pytest.mark.parametrize("text", ["a.pth", "a.pth:", "a.pth:x", ":0.3", "a.pth:inf", "a.pth:nan", "a.pth:1e-400"])
def test_a_share_without_file_or_weight_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no state with a weight: write FILE:WEIGHT, as in a\.pth:0\.3"):
        BlendConfig.from_flags({"states": text, "output": "o.pth"})


@pytest.mark.parametrize("text", [" ", "\n\t"])
def test_words_that_name_no_state_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="names no state"):
        BlendConfig.from_flags({"states": text, "output": "o.pth"})


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("inspect", {}, "FILE missing: give FILE"),
        ("export", {"file": "a", "output": "b"}, f"--to is missing: name the client, one of {', '.join(CLIENT_NAMES)}"),
        ("export", {"file": "a", "output": "b", "to": "ollama"}, "--to ollama is unknown: use one of runner, ai00"),
        ("export", {"file": "a", "output": "b", "to": "hf", "my_testing": "x052"}, "use one of x060, x070"),
        ("blend", {"states": "a:1"}, "OUTPUT missing: give FILE:WEIGHT ... OUTPUT"),
        ("blend", {"states": "a:1", "output": "b/"}, "ends like a folder"),
        ("diff", {"first": "a"}, "SECOND missing: give FIRST SECOND"),
        ("verify", {"file": "a"}, "BASE missing: give FILE BASE"),
        ("verify", {"file": "a", "base": "b", "quant": "fp8"}, "--quant fp8 is unknown"),
    ],
)
def test_what_cannot_be_is_refused(command: str, flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        STATE_COMMANDS[command].from_flags(flags)
    assert message in str(refused.value)


def test_what_is_not_said_of_an_adapter_is_nothing() -> None:
    assert ExportConfig().alpha == 0.0
    assert VerifyConfig(lora_alpha=16.0).alpha == 16.0
    assert math.isinf(ExportConfig().lora_alpha)
