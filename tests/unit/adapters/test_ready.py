"""The commands at the end of a run are ones that their programs accept."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from src.adapters.full import FullTraining
from src.adapters.lisa import Draw, Lisa
from src.adapters.method import Method
from src.adapters.plan import AdapterPlan
from src.adapters.ready import chat_command, export_command, merge_command
from src.adapters.states import StateTuning
from src.adapters.tuning import Rates, Tuning
from src.cli import given_flags, given_merge_flags, given_state_flags, given_train_flags
from src.config import STATE_COMMANDS, ChatConfig, MergeConfig, TrainConfig

RESULT = Path("my folder/rwkv-final.pth")

METHODS: dict[str, tuple[Method, list[str]]] = {
    "states": (StateTuning(), ["src.commands.chat", "merge_state.py", "src.commands.state"]),
    "lora": (Tuning(AdapterPlan("lora", 8)), ["src.commands.chat", "merge_state.py", "src.commands.state"]),
    "bat": (Tuning(AdapterPlan("bat", 8)), ["src.commands.chat", "merge_state.py"]),  # which peft has not
    "bone and parts": (Tuning(AdapterPlan("bone", 8), parts=("ln",)), ["src.commands.chat", "merge_state.py"]),
    "lora and states": (Tuning(AdapterPlan("lora", 8), states=True), ["src.commands.chat", "merge_state.py"]),
    "parts": (Tuning(None, parts=("ln",)), ["src.commands.chat", "merge_state.py"]),
    "lora beside states": (
        Tuning(AdapterPlan("lora", 8), beside="the state.pth"),
        ["src.commands.chat", "merge_state.py", "merge_state.py"],
    ),
    "full": (FullTraining(layerwise_rates=True), ["src.commands.chat", "train.py"]),
    "lisa": (Lisa(Draw(1, 2, 3), rates=Rates()), ["src.commands.chat", "train.py"]),
    "lisa and states": (Lisa(Draw(1, 2, 3), states=True, rates=Rates()), ["src.commands.chat", "train.py"]),
    "lisa beside states": (Lisa(Draw(1, 2, 3), loads_states=True, rates=Rates()), ["src.commands.chat", "train.py"]),
}
WHOLE = ("full", "lisa", "lisa and states", "lisa beside states")


@pytest.mark.parametrize("name", METHODS)
def test_every_command_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, programs = METHODS[name]
    lines = method.next_steps("the base.pth", RESULT, "my folder/", "text", "")
    assert 3 <= len(lines) <= 5
    commands = [shlex.split(line) for line in lines if line.strip().startswith("python ")]
    called = [words[2] if words[1] == "-m" else words[1] for words in commands]
    assert called == programs
    for program, words in zip(called, commands, strict=True):
        given = words[3:] if words[1] == "-m" else words[2:]
        match program:
            case "src.commands.chat":
                monkeypatch.setattr("sys.argv", ["chat", *given])
                config = ChatConfig.from_flags(given_flags(ChatConfig, "chat", ""))
                assert config.template == "text"
                assert config.load_model == (str(RESULT) if name in WHOLE else "the base.pth")
                if name not in WHOLE:
                    assert (config.load_state if name == "states" else config.load_adapter) == str(RESULT)
                assert name != "lora beside states" or config.load_state == "the state.pth"
            case "src.commands.state":
                command, flags = given_state_flags(given)
                assert STATE_COMMANDS[command].from_flags(flags).file == str(RESULT)  # type: ignore[attr-defined]
            case "merge_state.py":
                merging = MergeConfig.from_flags(given_merge_flags(given))
                second = ("my folder/merged.pth", "the state.pth")
                assert (merging.base_model, merging.file) in (("the base.pth", str(RESULT)), second)
            case _:
                TrainConfig.from_flags(given_train_flags(given))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
@pytest.mark.parametrize("name", METHODS)
def test_every_command_works_where_the_user_stands(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    method, programs = METHODS[name]
    monkeypatch.chdir(tmp_path)
    lines = [line for line in method.next_steps("b.pth", RESULT, "f", "user", "") if "python " in line]
    assert len(lines) == len(programs)
    assert all(str(Path(__file__).parents[3]) in line for line in lines)


def test_a_chat_needs_no_flag_for_the_template_of_chats() -> None:
    assert not re.search("--template", " ".join(StateTuning().next_steps("b.pth", RESULT, "f", "user", "")))


@pytest.mark.parametrize("name", METHODS)
def test_there_is_no_chat_where_no_text_becomes_tokens(name: str) -> None:
    lines = METHODS[name][0].next_steps("b.pth", RESULT, "f", None, "")
    assert not [line for line in lines if "chat" in line]
    assert lines[0].startswith("next       ")


@pytest.mark.parametrize("name", METHODS)
def test_what_clients_leave_out_of_a_merged_model_is_said_where_there_is_a_state(name: str) -> None:
    said = "\n".join(METHODS[name][0].next_steps("b.pth", RESULT, "f", "user", "They ignore it."))
    assert ("They ignore it." in said) == ("states" in name)
    assert ("clients take it as it is" in said) == (name in ("full", "lisa"))
    assert ("which every client takes" in said) == (name in ("lora", "bat", "bone and parts", "parts"))


def test_names_are_quoted() -> None:
    assert shlex.split(merge_command("a b.pth", RESULT, "c d"))[2:] == ["a b.pth", str(RESULT), "c d/merged.pth"]
    assert shlex.split(chat_command("a b.pth", "user", adapter=RESULT))[-1] == str(RESULT)
    assert shlex.split(export_command(RESULT, Path("c d"), "hf", "a b.pth"))[-1] == "a b.pth"
