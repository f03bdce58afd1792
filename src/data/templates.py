"""Conversations as text: who speaks is named before each turn, and a blank line ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from src.config.templates import NO_THINK, THINK
from src.data.inputs import unix_lines
from src.data.turns import is_formatted

_BLANK_LINES = re.compile(r"\n{2,}")
_REASONING = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_THINK_OPENING = " <think"
_NO_THINK_OPENING = " <think>\n</think"


class Turn(NamedTuple):
    """What somebody says in a conversation.

    Attributes:
        role: system, user or assistant.
        content: of it.
        reasoning: that precedes an answer, where the data have it apart.
        counted: whether an answer is one to learn from, and not only part of what precedes others.
    """

    role: str
    content: str
    reasoning: str = ""
    counted: bool = True


class Part(NamedTuple):
    """A stretch of text tokenised on its own, and whether the loss is taken on it."""

    text: str
    counted: bool


@dataclass
class Rendering:
    """What was met while conversations were written, in numbers.

    Attributes:
        blank_lines: runs of them inside turns, replaced by a line break.
        line_ends: of another kind than LF, replaced by it.
        formatted: prompts that stand in a template already and were taken as they are.
        named: turns that begin with their speaker's name themselves.
        empty_systems: system messages without text, left out.
        thought: answers with reasoning.
        unthought: answers without, in the template think.
        reasoning_left_out: answers whose reasoning the template has no place for.
        uncounted: answers that only precede others.
        unanswered: conversations that end in a question.
        unasked: conversations that begin with an answer.
    """

    blank_lines: int = 0
    line_ends: int = 0
    formatted: int = 0
    named: int = 0
    empty_systems: int = 0
    thought: int = 0
    unthought: int = 0
    reasoning_left_out: int = 0
    uncounted: int = 0
    unanswered: int = 0
    unasked: int = 0


@dataclass(frozen=True)
class ChatTemplate:
    """Writes a conversation as text: `Name: content` per turn, a blank line after each.

    Because clients take a blank line for the end of a turn, none may stand inside one: runs of
    line breaks within a turn become a single one.

    Attributes:
        name: for the user.
        speakers: names by role.
        thinking: THINK, where answers begin with reasoning; NO_THINK, where they begin with the sign that there is
            none; "": an answer is what the data say. Source: `RWKV7-G1x-templates.txt` of RWKV-LM (2026-07).
    """

    name: str
    speakers: dict[str, str] = field(hash=False)
    thinking: str = ""
    answering: str = "assistant"
    turn_end: str = "\n\n"

    def render(self, turns: Sequence[Turn], met: Rendering) -> list[Part]:
        """Parts of a conversation.

        An uncounted part ends in "Assistant:" as a client's prompt does; the answer that follows
        begins with the space. A question in which that stands already is taken as it is, and a system
        message without text is left out.
        """
        parts: list[Part] = []
        prompt = ""
        ready = False
        for place, (role, content, reasoning, learnt) in enumerate(turns):
            text, line_ends = unix_lines(content)
            text = text.strip()
            met.line_ends += line_ends
            is_answered = turns[place + 1 : place + 2] and turns[place + 1].role == self.answering
            if role == "user" and is_answered and is_formatted(text):
                met.formatted += 1
                prompt += text
                ready = True
                continue
            if role == self.answering:
                opening, answer = self._opened(text, reasoning, met)
                answer = self._joined(answer, met)
                met.named += answer.lstrip().startswith(f"{self.speakers[role]}:")
                parts.append(Part((prompt if ready else f"{prompt}{self.speakers[role]}:") + opening, counted=False))
                parts.append(Part(f"{answer}{self.turn_end}", counted=learnt))
                met.uncounted += not learnt
                prompt, ready = "", False
                continue
            turn = self._joined(text, met)
            met.named += turn.startswith(f"{self.speakers[role]}:")
            if role == "system" and not turn:
                met.empty_systems += 1
            else:
                prompt += f"{self.speakers[role]}: {turn}{self.turn_end}"
        if prompt:
            parts.append(Part(prompt, counted=False))
            met.unanswered += 1
        said = next((turn.role for turn in turns if turn.role != "system"), "")
        met.unasked += said == self.answering
        return parts

    def asked(self, *turns: Turn) -> str:
        """A conversation as a model reads it before it answers, up to and with "Assistant:" and what opens the answer.

        Args:
            turns: the last one is a question.
        """
        parts = self.render([*turns, Turn(self.answering, "")], Rendering())
        prompt = "".join(part.text for part in parts[:-1])
        return prompt.removesuffix(_NO_THINK_OPENING) + _THINK_OPENING if self.thinking == THINK else prompt

    def said(self, answer: str) -> str:
        """What a model wrote after that, for a reader: with the opening of reasoning, without the sign for none."""
        if self.thinking == THINK:
            return _THINK_OPENING.lstrip() + answer.rstrip()
        return (answer.removeprefix(">") if self.thinking == NO_THINK else answer).strip()

    @property
    def shown(self) -> str:
        """A question and its answer in it, as one line."""
        user, assistant = self.speakers["user"], self.speakers[self.answering]
        opening = {THINK: " <think>\\n…\\n</think>\\n…", NO_THINK: " <think>\\n</think>\\n…"}.get(self.thinking, " …")
        return f"{user}: …\\n\\n{assistant}:{opening}\\n\\n"

    def _joined(self, text: str, met: Rendering) -> str:
        joined, blank_lines = _BLANK_LINES.subn("\n", text)
        met.blank_lines += blank_lines
        return joined

    def _opened(self, text: str, reasoning: str, met: Rendering) -> tuple[str, str]:
        """What opens an answer, which a client writes itself, and what the model says after it."""
        inline = _REASONING.match(text)
        if not self.thinking:
            met.thought += inline is not None
            met.reasoning_left_out += bool(reasoning.strip())
            return "", f" {text}"
        if inline:
            reasoning, text = inline.group(1), text[inline.end() :].strip()
        reasoning = unix_lines(reasoning)[0].strip()
        if self.thinking == THINK and reasoning:
            met.thought += 1
            return _THINK_OPENING, f">\n{reasoning}\n</think>\n{text}"
        met.unthought += self.thinking == THINK
        met.reasoning_left_out += bool(reasoning)
        return _NO_THINK_OPENING, f">\n{text}"


CHAT_TEMPLATES = {
    "user": ChatTemplate("World chat", {"system": "System", "user": "User", "assistant": "Assistant"}),
    "question": ChatTemplate("question", {"system": "System", "user": "Question", "assistant": "Answer"}),
    "input": ChatTemplate("input", {"system": "System", "user": "Input", "assistant": "Response"}),
    THINK: ChatTemplate("think", {"system": "System", "user": "User", "assistant": "Assistant"}, THINK),
    NO_THINK: ChatTemplate("no-think", {"system": "System", "user": "User", "assistant": "Assistant"}, NO_THINK),
}
"""By the name that --template has for it."""
WORLD_CHAT = CHAT_TEMPLATES["user"]
