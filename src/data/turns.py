"""Prompts in which the turns of a conversation are written out already."""

from __future__ import annotations

import re

_FORMATTED = re.compile(r"(System|User|Assistant|Question|Input):.*\n\n(Assistant|Answer|Response):", re.DOTALL)


def is_formatted(prompt: str) -> bool:
    """Whether a prompt, with Unix lines, stands in a template: `User: hi`, a blank line, `Assistant:`."""
    return _FORMATTED.fullmatch(prompt.strip()) is not None


def formatted_statement(count: int) -> str:
    """Says that such prompts get no template."""
    prompts = "1 prompt" if count == 1 else f"{count} prompts"
    return f"Taken as they are, since the template (User: …, Assistant:) stands in them: {prompts}."
