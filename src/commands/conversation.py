"""The chat: prompts from a terminal or a file, answers as they come, and the base model's beside them."""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import Any

from src.adapters.trained import Told, Trained, read_tuned
from src.checkpoint import Checkpoint, open_checkpoint
from src.config import ChatConfig
from src.config.templates import NO_THINK, TEXT, THINK
from src.data.inputs import unix_lines
from src.data.preferences import TEMPLATES, clean_prompt, in_template
from src.data.templates import CHAT_TEMPLATES, WORLD_CHAT, Turn
from src.device import Device, apply_device, resolve_device, without_memory
from src.errors import DataError
from src.generate import Conversation, SamplingSettings
from src.identity import size_of_model
from src.loading import LoadOptions
from src.tokenizer import Tokenizer, tokenizer_for_vocabulary
from src.tuned import Tuned

COMMANDS = {
    "/compare": "answers the next prompt with the base model, too",
    "/reset": "forgets the conversation",
    "/help": "shows this",
    "/quit": "ends, as Ctrl-D does",
}
_KEYS = "Ctrl-C stops an answer. A line that ends in \\ goes on in the next."
_WIDEST = 100
"""Columns of what is said about the chat; answers are not broken into lines."""


def chat(config: ChatConfig) -> None:
    """Reads prompts until they end, and answers them; see `ChatConfig`.

    Raises:
        UserError: for everything the user can put right.
    """
    checkpoint = open_checkpoint(config.load_model)
    tokenizer = tokenizer_for_vocabulary(checkpoint.info.shape.vocab_size)
    trained = _trained(config, checkpoint)
    device = resolve_device(config.accelerator, config.precision)
    apply_device(device)
    quant = None if config.quant == "none" else config.quant
    with without_memory(lambda: "no memory left for the model: use --quant nf4, or a smaller model"):
        tuned = Tuned(checkpoint, trained, LoadOptions(device.device, device.compute_dtype, quant))
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if not is_terminal and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig")
    for line in _notes(config, trained):
        _say(line, aside=not is_terminal)
    talk = Talk(config, tuned, tokenizer, is_terminal=is_terminal)
    if is_terminal:
        for line in _introduction(config, checkpoint, trained, device):
            _say(line)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` keys for editing, and a history)
    goes_on = True
    while goes_on:
        try:
            prompt = _next_prompt(talk.prompt if is_terminal else None)
            with without_memory(lambda: "no memory left for the prompt: use --quant nf4, or --accelerator cpu"):
                goes_on = talk.take(prompt)
        except KeyboardInterrupt:  # just before or after an answer
            if not is_terminal:
                raise
            _write("\n")
        except EOFError:
            goes_on = False
            if is_terminal:
                _write("\n")


class _Stop:
    """Takes Ctrl-C while answers are given, as a wish that is asked about between tokens.

    The exception that Ctrl-C usually raises can be lost in code that drops exceptions: numpy's random numbers, loaded
    with the first answer, do so while they register their types. So it is raised for a second Ctrl-C only, which ends
    what takes long.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> _Stop:
        self._before = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before or signal.default_int_handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt, once, where an answer is to end."""
        if self._asked:
            self._asked = False
            raise KeyboardInterrupt

    def _take(self, number: int, frame: object) -> None:
        if self._asked:
            self._asked = False
            raise KeyboardInterrupt
        self._asked = True


class Talk:
    """A chat's memory, and what its commands and prompts do.

    Args:
        config: template and sampling.
        tuned: the model.
        tokenizer: of its vocabulary.
        is_terminal: whether somebody types; else answers alone are printed.
    """

    def __init__(self, config: ChatConfig, tuned: Tuned, tokenizer: Tokenizer, *, is_terminal: bool) -> None:
        self._template = config.template
        self._tuned, self._tokenizer, self._is_terminal = tuned, tokenizer, is_terminal
        self._turn_end = "" if config.template == TEXT else WORLD_CHAT.turn_end
        stop = config.stop.replace("\\n", "\n") or self._turn_end
        self._settings = SamplingSettings.by(config, stop=stop, may_end=True)
        self._compares = False
        self._has_answered = False
        self._reset()

    @property
    def prompt(self) -> str:
        """What stands before a line that is typed."""
        return "> " if self._template == TEXT else f"{CHAT_TEMPLATES[self._template].speakers['user']}: "

    def take(self, line: str) -> bool:
        """Does what a line says; False if that is to end."""
        word = line.strip()
        if not word:
            return True
        if word in COMMANDS:
            return self._obey(word)
        if word.startswith("/") and word[1:].isalpha():
            _say(f"{word} is no command: {', '.join(COMMANDS)}", aside=not self._is_terminal)
            return True
        try:
            self._answer(line)
        except DataError as error:  # half of a character
            if not self._is_terminal:
                raise
            _say(f"error: {error}")
        return True

    def _obey(self, command: str) -> bool:
        if command == "/reset":
            self._reset()
            self._remark("the conversation begins anew")
        elif command == "/compare" and not self._tuned.differs:
            self._remark("there is nothing to compare: start with --load_state or --load_adapter")
        elif command == "/compare":
            self._compares = True
            self._remark("the next prompt is answered by the base model, too")
        elif command == "/help":
            for name, meaning in COMMANDS.items():
                self._remark(f"{name:9} {meaning}")
            self._remark(_KEYS)
        return command != "/quit"

    def _reset(self) -> None:
        self._conversation = self._begun()
        self._answers = 0

    def _begun(self) -> Conversation:
        return Conversation(self._tuned.model, self._tokenizer, self._settings)

    def _answer(self, prompt: str) -> None:
        """Prints what is answered; the conversation goes on with the tuned model's."""
        if self._template == TEXT:
            self._conversation = self._begun()
        text = self._conversation.missing(self._turn_end) + _rendered(self._template, prompt)
        compares, self._compares = self._compares, False
        with _Stop() if self._is_terminal else contextlib.nullcontext() as stop:
            if compares:
                self._tuned.use(tuned=False)
                of_base = Conversation(
                    self._tuned.model, self._tokenizer, self._settings, tokens=self._conversation.tokens
                )
                self._print(of_base, text, stop, "base")
            self._tuned.use(tuned=True)
            self._print(self._conversation, text, stop, "tuned" if compares else "")
        self._answers += 1

    def _print(self, conversation: Conversation, text: str, stop: _Stop | None, whose: str = "") -> None:
        """Prints one answer as it comes."""
        if self._has_answered and not self._is_terminal:
            _write("\n")
        self._has_answered = True
        label = self._label(whose)
        hidden = self._hidden(label)
        try:
            _write(label)
            if self._template == TEXT:
                _write(f"\n{text}" if label else text)
            for piece in conversation.answer(text, self._answers):
                shown = piece.lstrip(hidden)
                hidden = "" if shown else hidden
                _write(_visible(shown))
                if stop is not None:
                    stop.check()
            _write("\n")
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            _write(" [stopped]\n")
        if self._is_terminal:
            _write("\n")

    def _label(self, whose: str) -> str:
        """What stands before an answer: nothing before one that is piped, unless there are two."""
        if self._template == TEXT:
            return f"{whose}:" if whose else ""
        speaker = CHAT_TEMPLATES[self._template].speakers["assistant"]
        opening = {THINK: " <think", NO_THINK: " "}.get(self._template, "")
        if whose:
            return f"{speaker} ({whose}):{opening}"
        return f"{speaker}:{opening}" if self._is_terminal else opening.strip()

    def _hidden(self, label: str) -> str:
        """Characters that an answer may begin with and that are not shown."""
        if self._template in (TEXT, THINK):
            return ""
        if self._template == NO_THINK:
            return "> \n"  # the end of the sign that there is no reasoning
        return "" if label else " \t\r\n"  # the space that would stand behind the label

    def _remark(self, text: str) -> None:
        _say(text, aside=not self._is_terminal)


def _trained(config: ChatConfig, checkpoint: Checkpoint) -> Trained | None:
    """What is put into the model."""
    return read_tuned(config.load_state, config.load_adapter, checkpoint.info.shape, Told.by(config))


def _notes(config: ChatConfig, trained: Trained | None) -> Iterator[str]:
    """What a user should know of a file before it speaks."""
    if trained is None:
        return
    if trained.quant not in (None, "none", config.quant):
        yield (
            f"note: {trained.path} was trained on {trained.quant} weights: --quant {trained.quant} has the model as it "
            "was trained"
        )
    if trained.beside:
        yield f"note: {trained.path} was trained beside the states of {trained.beside}: give them with --load_state"
    made_on = trained.base.get("size_bytes")
    if made_on not in (None, size_of_model(config.load_model)):
        yield f"note: {trained.path} was trained on {trained.base.get('file')} of {made_on} bytes, another model"


def _introduction(config: ChatConfig, checkpoint: Checkpoint, trained: Trained | None, device: Device) -> Iterator[str]:
    yield f"{config.load_model}: {checkpoint.info.shape.parameter_count / 1e6:,.0f} M parameters, {device.describe()}"
    if trained is not None:
        yield f"with {' and '.join(filter(None, (config.load_state, config.load_adapter)))}"
    yield f"{', '.join(COMMANDS)}. {_KEYS}"


def _rendered(template: str, prompt: str) -> str:
    """A prompt as training writes it, up to where the answer begins."""
    if template == TEXT:
        return unix_lines(prompt)[0]
    if template not in TEMPLATES or template == "user":
        return CHAT_TEMPLATES[template].asked(Turn("user", prompt))
    return in_template(template, clean_prompt(prompt))


def _next_prompt(prompt: str | None) -> str:
    """The next line of standard input, with those that a backslash at its end joins to it.

    Args:
        prompt: what stands before it; None if nobody types.

    Raises:
        EOFError: there is none.
        DataError: it is not UTF-8.
    """
    lines: list[str] = []
    while True:
        try:
            if prompt is None:
                line = "" if sys.stdin is None else sys.stdin.readline()
            else:
                line = f"{input('... ' if lines else prompt)}\n"
        except KeyboardInterrupt:
            if prompt is None:
                raise
            _write("\n")
            lines = []
            continue
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is no UTF-8 text ({error.reason}): convert it") from error
        if not line and not lines:
            raise EOFError
        text = line.removesuffix("\n")
        if line:
            lines.append(text.removesuffix("\\"))
        if not text.endswith("\\"):
            return "\n".join(lines)


def _visible(text: str) -> str:
    """A text that moves no cursor: control characters but line breaks and tabs become U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter for letter in text
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str, *, aside: bool = False) -> None:
    """Prints a line about the chat, broken where the terminal ends.

    Args:
        text: of it.
        aside: to standard error, unbroken.
    """
    if aside:
        print(text, file=sys.stderr, flush=True)
        return
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    _write("\n".join(textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False)) + "\n")
