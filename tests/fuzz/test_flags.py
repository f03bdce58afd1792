"""Flags of every script at values nobody tried: a sentence or a run, never a traceback, never a wait.

Inputs are drawn from tables of what breaks programs, by a seeded generator, so that a failure can be had again. Most
go through the configuration; some through the scripts themselves, stopped where the work would begin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from factories import tiny_checkpoint, tiny_state_file
from running import run_script, write_documents

import src.commands.demo
import src.commands.preparation
from src.config import STATE_COMMANDS, ChatConfig, PairConfig, RejectConfig, TrainConfig
from src.config.flags import Flags
from src.config.state import ExportConfig, StateFlags
from src.errors import ConfigError

SEED = 11
SECONDS = 15

NUMBERS = (
    "", " ", "\t", "0", "-0", "1", "-1", "2", "3", "7", "-2", "1.5", "-1.5", "1e-3", "1e-320", "5e-324", "1e308",
    "1e400", "-1e400", "nan", "NaN", "inf", "-inf", "infinity", "0x10", "1_000", "1,000", "1k", "٣", "３", "½", "一",
    "1\0", "\0", "1 2", "+1", "--1", "1e", "true", "None", "[]", "{}", "$HOME", "%s", "1;2", "1\n", "9" * 20,
    "9" * 50, "9" * 400, "-" + "9" * 400, "9" * 4299, "9" * 4301, "9" * 6000, "1" + "0" * 12, "0" * 5000 + "1",
    str(2**31 - 1), str(2**31), str(2**32), str(2**63 - 1), str(2**63), str(2**64), "1000000000", "1000000", "1024",
    "0.999999", "1.0000001",
)  # fmt: skip
WORDS = (
    "", " ", "x", "\0", "a\0b", "é", "日本", "\udcff", "\ud800", "\n", "a\nb", "%d%n", "'; --", "-", "x" * 300,
    "x" * 10_000, "auto ", "AUTO", "cpu", "bf16", "nf4", "pack", "states", "me/project", "me/", "/me", "a/b/c",
    "../x", "a#b", "localhost:5000", "//host", "http://", "http:///x", "http://[", "http://h:99999/", "http://h:x/",
    "file:///etc/passwd", "ftp://h/", "http://a b/", "http://é/", "http://" + "a" * 70 + "/", "http://localhost:1/",
    "HTTP://localhost:1", "http://a..b/", "http://h/?q", "javascript:1", "qa", "se", '{"mask0":"a","mask1":"b"}',
    '{"mask0":"a"}', '{"mask0":"","mask1":[]}', '{"mask0":"\\ud800","mask1":"\\u0000"}', "{" * 9999, "[" * 99_999,
)  # fmt: skip


class Reached(BaseException):
    """Raised where the work would begin."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of every kind, by what they are; the good ones are `base`, `state`, `data`, `rows` and `pairs`."""
    folder = tmp_path_factory.mktemp("places")
    shape = tiny_checkpoint(folder / "base.pth")
    tiny_state_file(folder / "state.pth", shape)
    write_documents(folder / "data", [20, 30, 9])
    (folder / "rows.csv").write_text("prompt,chosen,reject\na,b,c\nd,e,\n", encoding="utf-8")
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)) * 20)
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "broken").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "logs").mkdir()
    (folder / "logs" / "train_log.txt").mkdir()
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "metrics.jsonl")
    (folder / "closed").mkdir(mode=0o000)
    names = (
        "base.pth", "state.pth", "data", "data.", "data.idx", "data.bin", "rows.csv", "empty", "binary", "a folder",
        "pipe", "pipe.jsonl", "broken", "loop", "missing", "missing/below", "base.pth/below", "closed/x", "x" * 255,
        "x" * 256, "d/" * 2500, "logs", "pipes", "new\nline", "new\udcff",
    )  # fmt: skip
    named = {name: str(folder / name) for name in names}
    return {**named, **{device: device for device in ("/dev/null", "/dev/zero", "/dev/full", "/dev/stdin", "/", "")}}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what takes longer, a wait inside the system included."""

    def end(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def base_flags(config_class: type[Flags], places: dict[str, str], folder: Path) -> dict[str, str]:
    """A command that works."""
    if config_class is TrainConfig:
        files = {"load_model": places["base.pth"], "data_file": places["data"], "proj_dir": str(folder / "out")}
        return {**files, "accelerator": "cpu", "epoch_steps": "1", "epoch_count": "1", "ctx_len": "16"}
    if config_class is ChatConfig:
        files = {"load_model": places["base.pth"], "load_state": places["state.pth"]}
        return {**files, "max_tokens": "3", "accelerator": "cpu"}
    if issubclass(config_class, StateFlags):
        words = dict.fromkeys(config_class.words, places["state.pth"])
        own = {"output": str(folder / "x.st"), "states": f"{places['state.pth']}:1", "base": places["base.pth"]}
        further = {"to": "ai00"} if config_class is ExportConfig else {}
        return {**words, **{name: text for name, text in own.items() if name in words}, **further}
    files = {"load_model": places["base.pth"], "input_csv": places["rows.csv"]}
    if config_class is PairConfig:
        return {**files, "output_save": str(folder / "x.save"), "target_pair_count": "3", "accelerator": "cpu"}
    return {**files, "output_csv": str(folder / "x.csv"), "max_tokens": "3", "accelerator": "cpu"}


def changes(config_class: type[Flags], places: dict[str, str], generator: random.Random) -> dict[str, str]:
    """One to four flags and values for them, mostly of their kind."""
    fields = dataclasses.fields(config_class)
    specs = generator.sample(fields, min(generator.choice((1, 1, 1, 2, 3, 4)), len(fields)))
    drawn = {}
    for spec in specs:
        kinds: list[Any] = [NUMBERS, WORDS, list(places.values())]
        own = NUMBERS if isinstance(spec.default, (int, float)) else list(places.values()) + list(WORDS)
        choices = [str(choice) for choice in spec.metadata["choices"]]
        table = generator.choice([own, own, own, own, choices or own, choices or own, generator.choice(kinds)])
        drawn[spec.name] = generator.choice(table)
    if config_class is TrainConfig and generator.random() < 0.02:
        drawn[generator.choice(list(TrainConfig.unsupported))] = generator.choice(NUMBERS + WORDS)
    return drawn


def unlike_a_sentence(message: str) -> str:
    """What keeps a refusal from being one sentence for each problem, of a length that can be read; "" if nothing."""
    lines = message.splitlines() if "problems:" in message[:20] else [message]
    wrong = [line for line in lines if not 10 < len(line) < 1200 or "Traceback" in line]
    return f"no sentence: {wrong[0][:2000]!r}" if wrong else ""


def fuzz_configuration(count: int, seed: int, places: dict[str, str], folder: Path) -> list[str]:
    """Builds so many configurations; what went wrong."""
    generator = random.Random(seed)
    failures = []
    for number in range(count):
        config_class: type[Flags] = generator.choice(
            (*[TrainConfig] * 4, *[RejectConfig, PairConfig, ChatConfig] * 2, *STATE_COMMANDS.values())
        )
        given = {**base_flags(config_class, places, folder), **changes(config_class, places, generator)}
        with time_limit(SECONDS):
            try:
                config = config_class.from_flags(given)
                config.notes()
            except ConfigError as error:
                if problem := unlike_a_sentence(str(error)):
                    failures.append(f"input {number} of seed {seed}: {given}: {problem}")
            except Exception as error:
                failures.append(f"input {number} of seed {seed}: {given}: {error!r}")
    return failures


SCRIPTS: dict[str, type[Flags] | None] = {
    "train.py": TrainConfig,
    "rlhf_generate_reject.py": RejectConfig,
    "PrepareOrpoDataset.py": PairConfig,
    "merge_state.py": None,
    "src/commands/chat.py": ChatConfig,
    "src/commands/state.py": None,
}


def command(script: str, places: dict[str, str], folder: Path, generator: random.Random) -> list[str]:
    """Words of a command line with something odd in it."""
    config_class = SCRIPTS[script]
    if script == "src/commands/state.py":
        name = generator.choice(list(STATE_COMMANDS))
        config_class = STATE_COMMANDS[name]
        given = {**base_flags(config_class, places, folder), **changes(config_class, places, generator)}
        return [name, *(f"--{flag}={text}" for flag, text in given.items())]
    if config_class is None:
        words = [places["base.pth"], places["state.pth"], str(folder / "merged.pth")]
        words[generator.randrange(3)] = generator.choice([*places.values(), *WORDS])
        return words[: generator.choice((3, 3, 3, 3, 2))]
    given = {**base_flags(config_class, places, folder), **changes(config_class, places, generator)}
    if script == "train.py" and generator.random() < 0.1:
        given = {"demo": generator.choice(("sft", "orpo")), **changes(config_class, places, generator)}
        given.setdefault("proj_dir", str(folder / "demo"))
    return [f"--{name}={text}" for name, text in given.items()]


def fuzz_scripts(
    count: int, seed: int, places: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Runs so many commands; what went wrong."""

    def begin(*_: object, **__: object) -> None:
        raise Reached

    for module, name in (
        (pl.Trainer, "fit"),
        (src.commands.preparation, "generate"),
        (src.commands.preparation, "make_pairs"),
        (src.commands.demo, "joined"),
    ):
        monkeypatch.setattr(module, name, begin)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    generator = random.Random(seed)
    failures = []
    for number in range(count):
        script = generator.choice(list(SCRIPTS))
        words = command(script, places, folder, generator)
        shown = f"input {number} of seed {seed}: {script} {words}"
        started = time.monotonic()
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        try:
            # A demonstration has measured the model before it begins to train.
            with time_limit(4 * SECONDS if words[0].startswith("--demo") else SECONDS):
                ended = run_script(script, *words)
        except Reached:
            continue
        except Exception as error:
            failures.append(f"{shown}, after {time.monotonic() - started:.1f} s: {error!r}")
            continue
        before, _, message = ended.err.partition("error: ")
        if ended.code not in (0, 2) or bool(message) != bool(ended.code) or "Traceback" in ended.out + before:
            failures.append(f"{shown}: code {ended.code}, {ended.err[-2000:]}")
        elif problem := unlike_a_sentence(message.strip()) if message else "":
            failures.append(f"{shown}: {problem}")
    return failures


def test_a_thousand_configurations(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fuzz_configuration(1000, SEED, places, tmp_path) == []


def test_sixty_commands(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz_scripts(60, SEED, places, tmp_path, monkeypatch) == []


@pytest.mark.slow
def test_ten_thousand_configurations(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fuzz_configuration(10_000, SEED + 1, places, tmp_path) == []


@pytest.mark.slow
def test_a_thousand_commands(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz_scripts(1000, SEED + 1, places, tmp_path, monkeypatch) == []
