"""Commands that make something of a result, ready to be copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from src.config.templates import TEMPLATE_NAMES
from src.system import command_here


def next_lines(tasks: Sequence[tuple[str, str]], ending: str = "") -> list[str]:
    """Lines of commands for tasks in words; a task without a command is left out.

    Args:
        tasks: words and command of each.
        ending: of the first line, which lists the words.
    """
    there = [(words, command) for words, command in tasks if command]
    return [
        f"next       {'; '.join(words for words, _ in there)}{ending}:",
        *(f"           {command}" for _, command in there),
    ]


def chat_command(base: str, template: str | None, *, state: Path | None = None, adapter: Path | None = None) -> str:
    """A chat with a model.

    Args:
        base: the model's file.
        template: for `--template`; None: of the model's vocabulary there is no tokenizer, and no command.
        state: a state file for it.
        adapter: a file of adapters, or of parts of the weights.
    """
    if template is None:
        return ""
    words = ["-m", "src.commands.chat", "--load_model", base]
    words += [] if state is None else ["--load_state", str(state)]
    words += [] if adapter is None else ["--load_adapter", str(adapter)]
    return command_here(*words, *(["--template", template] if template != TEMPLATE_NAMES[0] else []))


def merge_command(base: str, result: Path, folder: str, output: str = "merged.pth") -> str:
    """The model that contains a result."""
    return command_here("merge_state.py", base, str(result), str(Path(folder) / output))


def export_command(result: Path, output: Path, client: str, base: str = "") -> str:
    """A file for a client; `base` where it is needed."""
    words = ["-m", "src.commands.state", "export", str(result), str(output), "--to", client]
    return command_here(*words, *(["--base", base] if base else []))
