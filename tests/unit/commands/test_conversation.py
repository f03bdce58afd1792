"""The chat's commands and prompts, on a model that answers from a script."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from src.commands import conversation
from src.commands.conversation import Talk
from src.config import ChatConfig
from src.errors import DataError
from src.generate import SamplingSettings
from src.tokenizer import ByteTokenizer


class Scripted:
    """In the place of `generate.Conversation`: answers with what it was asked, and keeps the text so far."""

    def __init__(self, model: Any, tokenizer: Any, settings: SamplingSettings, tokens: str = "") -> None:
        self.model, self.settings, self.tokens = model, settings, tokens

    def answer(self, text: str, number: int) -> Iterator[str]:
        self.model.asked.append((self.model.voice, self.tokens, text, number))
        self.tokens += text
        for piece in (" one", " \x1b[2Jtwo\r\n", f"{number}"):
            if piece in self.model.interrupts:
                raise KeyboardInterrupt
            self.tokens += piece
            yield piece
        if not self.model.cut:
            self.tokens += self.settings.stop

    def missing(self, ending: str) -> str:
        return "" if not self.tokens or self.tokens.endswith(ending) else ending


class Voices:
    """In the place of `Tuned` and its model."""

    def __init__(self, *, differs: bool = True) -> None:
        self.model, self.differs = self, differs
        self.voice = "tuned"
        self.asked: list[tuple[str, str, str, int]] = []
        self.interrupts: list[str] = []
        self.cut = False

    def use(self, *, tuned: bool) -> None:
        self.voice = "tuned" if tuned else "base"


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "Conversation", Scripted)


def talk(voices: Voices, *, terminal: bool = True, **flags: str) -> Talk:
    config = ChatConfig.from_flags({"load_model": "m", **flags})
    return Talk(config, voices, ByteTokenizer(), is_terminal=terminal)  # type: ignore[arg-type]


ANSWER = " one \ufffd[2Jtwo\ufffd\n"
"""As it is shown: what moves a cursor is not."""


def test_turns_are_rendered_as_training_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    voices = Voices()
    chat = talk(voices)
    assert all(chat.take(line) for line in ("hello", "", "  ", "two\n\nlines "))
    first = "User: hello\n\nAssistant:"
    said = f"{first} one \x1b[2Jtwo\r\n0\n\n"
    assert voices.asked == [("tuned", "", first, 0), ("tuned", said, "User: two\nlines\n\nAssistant:", 1)]
    assert capsys.readouterr().out == f"Assistant:{ANSWER}0\n\nAssistant:{ANSWER}1\n\n"


def test_a_turn_that_was_cut_off_is_ended_before_the_next() -> None:
    voices = Voices()
    voices.cut = True
    chat = talk(voices)
    chat.take("a")
    chat.take("b")
    assert voices.asked[1][2] == "\n\nUser: b\n\nAssistant:"


@pytest.mark.parametrize(
    ("template", "asked", "prompt"),
    [("question", "Question: a\n\nAnswer:", "Question: "), ("input", "Input: a\n\nResponse:", "Input: ")],
)
def test_other_templates(template: str, asked: str, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    voices = Voices()
    chat = talk(voices, template=template)
    chat.take("a")
    assert voices.asked[0][2] == asked
    assert chat.prompt == prompt
    assert capsys.readouterr().out.startswith(asked.split()[-1])


def test_without_a_template_every_prompt_is_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    voices = Voices()
    chat = talk(voices, template="text")
    chat.take("Once")
    chat.take("Twice ")
    assert [(before, text) for _, before, text, _ in voices.asked] == [("", "Once"), ("", "Twice ")]
    assert chat.prompt == "> "
    assert capsys.readouterr().out == f"Once{ANSWER}0\n\nTwice {ANSWER}1\n\n"


def test_piped_answers_stand_alone(capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(Voices(), terminal=False)
    chat.take("a")
    chat.take("b")
    chat.take("/reset")
    printed = capsys.readouterr()
    assert printed.out == f"{ANSWER[1:]}0\n\n{ANSWER[1:]}1\n"
    assert printed.err == "the conversation begins anew\n"


def test_compare_asks_both_once(capsys: pytest.CaptureFixture[str]) -> None:
    voices = Voices()
    chat = talk(voices)
    for line in ("a", "/compare", "b", "c"):
        chat.take(line)
    assert [(voice, text[6], number) for voice, _, text, number in voices.asked] == [
        ("tuned", "a", 0), ("base", "b", 1), ("tuned", "b", 1), ("tuned", "c", 2),
    ]  # fmt: skip
    assert voices.asked[1][1] == voices.asked[2][1]  # the same conversation before
    assert voices.asked[3][1].endswith("User: b\n\nAssistant: one \x1b[2Jtwo\r\n1\n\n")
    assert f"Assistant (base):{ANSWER}1\n\nAssistant (tuned):{ANSWER}1\n\n" in capsys.readouterr().out


def test_compare_needs_something_trained(capsys: pytest.CaptureFixture[str]) -> None:
    voices = Voices(differs=False)
    chat = talk(voices)
    chat.take("/compare")
    chat.take("a")
    assert "nothing to compare: start with --load_state or --load_adapter" in " ".join(capsys.readouterr().out.split())
    assert [voice for voice, *_ in voices.asked] == ["tuned"]


def test_reset_begins_the_same_conversation_again() -> None:
    voices = Voices()
    chat = talk(voices)
    for line in ("a", "/reset", "a"):
        chat.take(line)
    assert voices.asked[0] == voices.asked[1]


def test_quit_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(Voices())
    assert chat.take("/help")
    shown = capsys.readouterr().out
    assert all(command in shown for command in conversation.COMMANDS)
    assert "Ctrl-C stops an answer" in shown
    assert not chat.take(" /quit ")


def test_an_unknown_command_is_named_and_a_path_is_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    voices = Voices()
    chat = talk(voices)
    assert chat.take("/rest")
    assert "/rest is no command: /compare, /reset, /help, /quit" in " ".join(capsys.readouterr().out.split())
    assert not voices.asked
    chat.take("/etc/passwd is a file")
    assert voices.asked[0][2].startswith("User: /etc/passwd is")


@pytest.mark.parametrize("interrupts", [[" one"], ["0"]])
def test_an_interrupt_stops_the_answer_and_keeps_the_chat(
    interrupts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    voices = Voices()
    chat = talk(voices)
    voices.interrupts = interrupts
    assert chat.take("a")
    assert " [stopped]\n" in capsys.readouterr().out
    voices.interrupts = []
    assert chat.take("b")
    assert voices.asked[1][2] == "\n\nUser: b\n\nAssistant:"


def test_an_interrupt_while_comparing_leaves_the_tuned_voice() -> None:
    voices = Voices()
    chat = talk(voices)
    chat.take("/compare")
    voices.interrupts = [" one"]
    chat.take("a")
    assert [voice for voice, *_ in voices.asked] == ["base", "tuned"]
    assert voices.voice == "tuned"


def test_an_interrupt_between_two_voices_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    voices = Voices()
    chat = talk(voices)
    chat.take("/compare")

    def use(*, tuned: bool) -> None:
        voices.voice = "neither"
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voices, "use", use)
        with pytest.raises(KeyboardInterrupt):
            chat.take("a")
    chat.take("b")
    assert [(voice, text[6]) for voice, _, text, _ in voices.asked] == [("tuned", "b")]


def test_an_interrupt_ends_what_is_piped() -> None:
    voices = Voices()
    voices.interrupts = [" one"]
    with pytest.raises(KeyboardInterrupt):
        talk(voices, terminal=False).take("a")


def test_half_a_character_is_an_error_that_a_chat_survives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Scripted, text: str, number: int) -> Iterator[str]:
        raise DataError("The text holds half of a pair.")
        yield ""

    monkeypatch.setattr(Scripted, "answer", refuse)
    assert talk(Voices()).take("\ud800")
    assert "error: The text holds half of a pair." in capsys.readouterr().out
    with pytest.raises(DataError):
        talk(Voices(), terminal=False).take("\ud800")


def test_lines_are_prompts_and_a_backslash_joins_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb \\\nc\\\nd\ne\\"))
    assert [conversation._next_prompt(None) for _ in range(4)] == ["a", "", "b \nc\nd", "e"]
    with pytest.raises(EOFError):
        conversation._next_prompt(None)


def test_other_encodings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="standard input is no UTF-8 text"):
        conversation._next_prompt(None)


def test_what_is_said_fits_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    talk(Voices()).take("/help")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert len(lines) > 5


class TestCtrlC:
    """As a signal of the system, which nothing that drops exceptions can lose."""

    @pytest.fixture
    def chat(self) -> Iterator[Talk]:
        """A chat where Ctrl-C does what it does in Python."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield talk(Voices())
        assert signal.signal(signal.SIGINT, before) is signal.default_int_handler

    @staticmethod
    def strike_at(monkeypatch: pytest.MonkeyPatch, piece: str, *, drops: bool) -> None:
        """Ctrl-C comes before a piece, in code that drops exceptions, or twice in code that does not."""
        answer = Scripted.answer

        def struck(self: Scripted, text: str, number: int) -> Iterator[str]:
            for said in answer(self, text, number):
                if said == piece:
                    with contextlib.suppress(*[KeyboardInterrupt] if drops else []):
                        signal.raise_signal(signal.SIGINT)
                        if not drops:
                            signal.raise_signal(signal.SIGINT)
                yield said

        monkeypatch.setattr(Scripted, "answer", struck)

    @pytest.mark.parametrize(
        ("drops", "shown"), [(True, "Assistant: one [stopped]\n\n"), (False, "Assistant: [stopped]\n\n")]
    )
    def test_stops_an_answer(
        self,
        chat: Talk,
        drops: bool,
        shown: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.strike_at(monkeypatch, " one", drops=drops)
        assert chat.take("a")
        assert capsys.readouterr().out == shown

    def test_stops_each_of_two_voices(
        self, chat: Talk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        chat.take("/compare")
        self.strike_at(monkeypatch, "0", drops=True)
        assert chat.take("a")
        assert capsys.readouterr().out.count(" [stopped]\n") == 2


@pytest.mark.parametrize(
    ("template", "asked", "terminal", "shown"),
    [
        ("think", "User: a\n\nAssistant: <think", True, "Assistant: <think>x"),
        ("think", "User: a\n\nAssistant: <think", False, "<think>x"),
        ("no-think", "User: a\n\nAssistant: <think>\n</think", True, "Assistant: x"),
        ("no-think", "User: a\n\nAssistant: <think>\n</think", False, "x"),
    ],
)
def test_templates_of_reasoning_models(
    template: str,
    asked: str,
    terminal: bool,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(self: Scripted, text: str, number: int) -> Iterator[str]:
        self.model.asked.append(text)
        yield from (">", "\n", "x", ">") if template == "no-think" else (">", "x")

    monkeypatch.setattr(Scripted, "answer", answer)
    voices = Voices()
    assert talk(voices, terminal=terminal, template=template).take("a")
    assert voices.asked == [asked]  # type: ignore[comparison-overlap]
    assert capsys.readouterr().out.startswith(shown)
