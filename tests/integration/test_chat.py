"""python -m src.commands.chat, as a user runs it: with lines from a pipe, and in a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_state_file
from running import ROOT, Ended, run_script

from src.checkpoint import open_checkpoint
from src.generate import SamplingSettings, generate
from src.loading import LoadOptions, open_model
from src.tokenizer import ByteTokenizer

SHAPE = tiny_shape()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, a state and an adapter."""
    tiny_checkpoint(tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    tiny_adapter(tmp_path / "bone.pth", SHAPE, "bone")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def piped(lines: str, *words: object, **flags: object) -> Ended:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        given = {"load_model": "base.pth", "accelerator": "cpu", "max_tokens": 12, **flags}
        return run_script("src/commands/chat.py", *words, **given)


def expected(prompt: str, state: str = "", number: int = 0) -> str:
    """What `generate` answers, shown: without outer white space and control characters."""
    model = open_model(
        open_checkpoint("base.pth"), LoadOptions(torch.device("cpu"), torch.float32), state_file=state, quiet=True
    )
    settings = SamplingSettings(top_p=0.6, frequency_penalty=0.0, max_tokens=12, stop="\n\n", forbidden_tokens=())
    (text,) = generate(model, ByteTokenizer(), [prompt], settings, row_numbers=[number])
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in text).lstrip()


@pytest.mark.parametrize("state", ["", "state.pth"])
def test_lines_are_answered(folder: Path, state: str) -> None:
    ended = piped("hello\n", **({"load_state": state} if state else {}))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == expected("User: hello\n\nAssistant:", state) + "\n"


def test_two_prompts_are_one_conversation_and_two_texts_are_not(folder: Path) -> None:
    first, second = piped("hello\nagain\n").out, piped("again\n").out
    assert second.strip() not in first
    first, second = (piped(lines, template="text", temperature=0).out for lines in ("a\nb\n", "b\n"))
    assert first.endswith(second)
    assert first.startswith("a")


def test_commands_work_piped(folder: Path) -> None:
    ended = piped("/compare\nhello\n/reset\nhello\n/quit\nnever\n", load_adapter="bone.pth")
    assert ended.code == 0
    assert ended.out.startswith("Assistant (base):")
    assert "\n\nAssistant (tuned):" in ended.out
    tuned = ended.out.split("(tuned):")[1]
    compared, alone = tuned.split("\n\n", 1)
    assert compared.strip() == alone.strip()
    base = ended.out.split("(base):")[1].split("\n\nAssistant (tuned)")[0].strip()
    assert base == expected("User: hello\n\nAssistant:").strip()
    assert "the conversation begins anew" in ended.err


def test_packed_and_other_notes(folder: Path) -> None:
    (folder / "state.json").write_text('{"method": "states", "quant": "nf4", "base": {"file": "x", "size_bytes": 5}}')
    ended = piped("hello\n", load_state="state.pth")
    assert "note: state.pth was trained on nf4 weights: --quant nf4 has the model as it was trained" in ended.err
    assert "note: state.pth was trained on x of 5 bytes, another model" in ended.err
    assert ended.out
    ended = piped("hello\n", load_state="state.pth", quant="nf4")
    assert "was trained on nf4" not in ended.err
    assert ended.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"load_model": "gone.pth"}, "model file gone.pth does not exist"),
        ({"load_model": "state.pth"}, "state.pth holds only the time_state of 2 layers"),
        ({"load_state": "bone.pth"}, "bone.pth holds no blocks.*.att.time_state, it is an adapter, for --load_adapter"),
        ({"load_adapter": "lora.pth"}, "give --type lora or --type pissa"),
        ({"load_adapter": "lora.pth", "type": "lora"}, "give --lora_alpha"),
        ({"load_state": "state.pth", "load_adapter": "state.pth"}, "both hold states: leave the former out"),
        ({"precision": "fp16"}, "--precision fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_is_one_sentence(folder: Path, flags: dict[str, str], message: str) -> None:
    tiny_adapter(folder / "lora.pth", SHAPE, "lora")
    ended = piped("hello\n", **flags)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert ended.err.count("\n") == 1


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._here, there = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "src.commands.chat", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "40", "TERM": "dumb", "OMP_NUM_THREADS": "1"},
            stdin=there, stdout=there, stderr=there, start_new_session=True, close_fds=True,
            preexec_fn=self._take_terminal,
        )  # fmt: skip
        os.close(there)

    @staticmethod
    def _take_terminal() -> None:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C there is a signal here,
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which who runs the tests may have chosen to ignore

    def type(self, text: str) -> None:
        os.write(self._here, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What is shown up to a text, which is then passed."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self._here], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._here, 4096).decode("utf-8", errors="replace")
                except OSError:  # it has ended
                    assert text in self.shown, self.shown
        before, self.shown = self.shown.split(text, 1)
        return before

    def close(self) -> None:
        """Ends it, if it has not ended."""
        self.process.kill()
        self.process.wait()
        os.close(self._here)


def never_ending(path: Path) -> None:
    """Makes a model's end of a document so improbable that no answer ends by itself."""
    weights = torch.load(path, weights_only=True)
    weights["ln_out.bias"][0] = 100.0
    weights["head.weight"][:, 0] = 0.0
    weights["head.weight"][0, 0] = -100.0
    torch.save(weights, path)


@pytest.mark.slow
def test_in_a_terminal(folder: Path) -> None:
    """By keyboard: an answer, one that Ctrl-C stops, a line that Ctrl-C takes back, a command, Ctrl-D."""
    never_ending(folder / "base.pth")
    words = ("--load_model", "base.pth", "--load_state", "state.pth", "--accelerator", "cpu", "--stop", "never said")
    terminal = Terminal(folder, *words, "--max_tokens", "100000")
    try:
        introduction = terminal.wait_for("User: ")
        assert "/help" in introduction
        assert max(map(len, introduction.splitlines())) <= 40
        terminal.type("hello\n")
        terminal.wait_for("Assistant:")
        terminal.type("\x03")
        terminal.wait_for(" [stopped]")
        terminal.wait_for("User: ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        time.sleep(0.5)  # Python's `input` sees a signal at the next key only that comes just before it waits for one
        terminal.type("\x03")
        terminal.wait_for("User: ")
        terminal.type("/compare\n")
        terminal.wait_for("the next prompt is answered by the base")
        terminal.wait_for("User: ")
        terminal.type("again\n")
        for whose in ("base", "tuned"):
            terminal.wait_for(f"Assistant ({whose}):")
            terminal.type("\x03")
            terminal.wait_for(" [stopped]")
        terminal.wait_for("User: ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=600) == 0
        assert "Traceback" not in terminal.shown
    finally:
        terminal.close()
