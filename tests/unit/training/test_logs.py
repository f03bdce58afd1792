"""Where the numbers of a run go."""

import http.client
import importlib.util
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.config import TrainConfig
from src.errors import ConfigError
from src.training.console import warn
from src.training.logs import (
    EpochLog,
    FileSink,
    HeldOutLog,
    HttpSink,
    ProgressSink,
    StepLog,
    TensorBoardSink,
    WandbSink,
    require_loggers,
)


def step_log(step: int = 1, **changes: Any) -> StepLog:
    """A log of plausible numbers."""
    values = {
        "step": step, "epoch": 0, "loss": 2.5, "lr": 0.5, "weight_decay": 0.0, "grad_norm": 0.1, "seconds": 0.25,
        "tokens": 100, **changes,
    }  # fmt: skip
    return StepLog(**values)


def config(**flags: object) -> TrainConfig:
    """A configuration from the two necessary flags and these."""
    given = {"load_model": "base.pth", "data_file": "data", **{name: str(v) for name, v in flags.items()}}
    return TrainConfig.from_flags(given)


def test_speed_counts_real_tokens() -> None:
    assert step_log().tokens_per_s == 400
    assert step_log(seconds=0.0).tokens_per_s == 0


class TestFiles:
    def test_lines_of_both_files(self, tmp_path: Path) -> None:
        sink = FileSink(tmp_path, config(), {"zero_optimization": {"stage": 1}})
        sink.step(step_log(1, extra={"pref_percentage": 0.5}))
        sink.step(step_log(2))
        sink.epoch(EpochLog(3, 1, 2.5, 0.5))
        sink.close()
        lines = (tmp_path / "train_log.txt").read_text(encoding="utf-8").splitlines()
        assert lines[2] == "{'zero_optimization': {'stage': 1}}"
        assert lines[3].startswith("3 2.500000 12.1825 0.50000000 ")
        assert lines[3].endswith(" 1")
        first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
        assert first["pref_percentage"] == 0.5
        assert "extra" not in first
        assert second["tokens_per_s"] == 400

    def test_an_enormous_loss_is_written_too(self, tmp_path: Path) -> None:
        sink = FileSink(tmp_path, config(), None)
        sink.epoch(EpochLog(0, 0, 1000.0, 0.5))
        sink.close()
        assert " inf " in (tmp_path / "train_log.txt").read_text(encoding="utf-8")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
    def test_a_full_disk_is_said_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        sink = FileSink(tmp_path, config(), None)
        for step in (1, 2):
            sink.step(step_log(step))
        sink.close()
        said = capsys.readouterr().err
        assert said.count("metrics.jsonl cannot be written (No space left on device); training goes on") == 1

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
    def test_a_disk_full_from_the_start(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "train_log.txt").symlink_to("/dev/full")
        FileSink(tmp_path, config(), None).close()
        assert "train_log.txt cannot be written (No space left on device)" in capsys.readouterr().err

    def test_a_log_that_is_a_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "train_log.txt").mkdir()
        sink = FileSink(tmp_path, config(), None)
        sink.epoch(EpochLog(3, 1, 2.5, 0.5))
        sink.close()
        assert "train_log.txt cannot be written (Is a directory)" in capsys.readouterr().err

    def test_a_run_that_goes_on_writes_over_what_it_will_do_again(self, tmp_path: Path) -> None:
        for run in ("other", "mine"):
            sink = FileSink(tmp_path, config(), None, run)
            for step in (1, 2, 3):
                sink.step(step_log(step))
            for epoch in (0, 1):
                sink.epoch(EpochLog(epoch, epoch, 2.5, 0.5))
            sink.close()
        for name in ("metrics.jsonl", "train_log.txt"):
            with (tmp_path / name).open("a") as file:
                file.write("half a li")
        FileSink(tmp_path, config(), None, "mine", steps=1, epoch=1).close()
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(row["run"], row["step"]) for row in rows] == [("other", 1), ("other", 2), ("other", 3), ("mine", 1)]
        lines = (tmp_path / "train_log.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines if line[0].isdigit()] == ["0", "1", "0"]
        assert lines[-2].startswith("RESUMED RUN at step 1, ")

    @pytest.mark.parametrize("name", ["train_log.txt", "metrics.jsonl"])
    @pytest.mark.parametrize(("make", "what"), [(Path.mkdir, "Is a directory"), (os.mkfifo, "it is no file")])
    def test_a_log_that_is_no_file_stops_nothing(
        self, make: Callable[[Path], None], what: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make(tmp_path / name)
        sink = FileSink(tmp_path, config(), None)
        sink.step(step_log())
        sink.close()
        assert f"{name} cannot be written ({what})" in capsys.readouterr().err

    def test_a_line_is_there_as_soon_as_its_step_is_done(self, tmp_path: Path) -> None:
        sink = FileSink(tmp_path, config(), None)
        sink.step(step_log())
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
        sink.close()


def test_the_bar_shows_the_mean_of_the_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(4)
    sink.step(step_log(1, loss=1.0))
    sink.step(step_log(2, loss=2.0))
    sink.epoch(EpochLog(0, 0, 1.5, 0.5))
    sink.step(step_log(3, loss=4.0))
    sink.close()
    shown = capsys.readouterr().err
    assert "epoch 0: mean loss 1.5000\n" in shown
    assert "3/4" in shown
    assert "loss 4.0000, lr 0.5, 400 tokens/s" in shown


class FakeWandb:
    """Stands for the `wandb` package: remembers what it is told."""

    def __init__(self, *, reachable: bool) -> None:
        self.reachable = reachable
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0
        self.errors = SimpleNamespace(Error=ConnectionError)

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **options: Any) -> "FakeWandb":
        self.started.append(options)
        if not self.reachable and options.get("mode") != "offline":
            raise ConnectionError("no network")
        return self

    def log(self, row: dict[str, float], step: int) -> None:
        self.logged.append((row, step))

    def finish(self) -> None:
        self.finished += 1


class TestWandb:
    @pytest.fixture
    def reachable(self, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
        """A reachable server."""
        fake = FakeWandb(reachable=True)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    def test_the_originals_names(self, reachable: FakeWandb) -> None:
        sink = WandbSink(config(wandb="my project", proj_dir="there"), "257 ctx1024 L2 D32")
        sink.step(step_log(1))
        sink.step(step_log(2, extra={"pref_percentage": 0.6}))
        sink.epoch(EpochLog(0, 0, 1.0, 0.5))
        sink.close()
        (options,) = reachable.started
        assert (options["entity"], options["project"], options["dir"]) == (None, "my project", "there")
        assert options["name"].startswith("257 ctx1024 L2 D32 20")
        assert options["config"]["ctx_len"] == 1024
        (first, one), (second, two) = reachable.logged
        assert (one, two) == (1, 2)
        assert first.keys() == {"loss", "lr", "wd", "Gtokens"}
        assert second.keys() == {"loss", "lr", "wd", "Gtokens", "kt/s", "pref_percentage"}
        assert second["Gtokens"] == pytest.approx(2 * 100 / 1e9)
        assert second["kt/s"] == pytest.approx(100 / 0.25 / 1000)
        assert reachable.finished == 1

    def test_what_is_measured_on_held_out_data(self, reachable: FakeWandb) -> None:
        sink = WandbSink(config(wandb="p"), "run")
        sink.held_out(HeldOutLog(0, {"overall": 2.0}, "", best=False, label="untuned"))
        sink.step(step_log(1))
        sink.held_out(HeldOutLog(1, {"overall": 1.5, "accuracy": 0.75}, "", best=True))
        sink.close()
        first, _, last = reachable.logged
        assert first == ({"held_out/overall": 2.0}, 0)
        assert last == ({"held_out/overall": 1.5, "held_out/accuracy": 0.75}, 1)

    def test_a_project_of_an_entity(self, reachable: FakeWandb) -> None:
        WandbSink(config(wandb="me/mine"), "run").close()
        (options,) = reachable.started
        assert (options["entity"], options["project"]) == ("me", "mine")

    def test_without_network_it_goes_on_offline_and_says_so(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fake = FakeWandb(reachable=False)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        sink = WandbSink(config(wandb="p"), "run")
        sink.step(step_log())
        sink.close()
        assert [options.get("mode") for options in fake.started] == [None, "offline"]
        assert fake.started[0]["settings"]["init_timeout"] <= 60
        assert len(fake.logged) == 1
        assert "warning: wandb is not reachable (no network); logging offline" in capsys.readouterr().err


def test_the_mean_of_an_interrupted_epoch_says_of_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar, files = ProgressSink(4), FileSink(tmp_path, config(), None)
    for sink in (bar, files):
        for log in (EpochLog(0, 0, 1.5, 0.5, 130, 130), EpochLog(1, 1, 1.4, 0.5, 40, 130)):
            sink.epoch(log)
        sink.close()
    shown = capsys.readouterr().err
    assert "epoch 0: mean loss 1.5000\n" in shown
    assert "epoch 1: mean loss 1.4000 of 40/130 steps\n" in shown
    first, second = (tmp_path / "train_log.txt").read_text(encoding="utf-8").splitlines()[-2:]
    assert first.endswith(" 0")
    assert second.endswith(" 1 of 40/130 steps")
    FileSink(tmp_path, config(), None, steps=170, epoch=1).close()
    assert "of 40/130" not in (tmp_path / "train_log.txt").read_text(encoding="utf-8")


def test_the_bar_leaves_to_the_run_what_it_says_itself(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(4)
    sink.held_out(HeldOutLog(0, {}, "loss 2", best=False, label="untuned"))
    sink.held_out(HeldOutLog(2, {}, "loss 1", best=True))
    sink.held_out(HeldOutLog(3, {}, "loss 5", best=True, worse=True))
    sink.held_out(HeldOutLog(3, {}, "loss 6", best=False, worse=True))
    sink.ended()
    sink.held_out(HeldOutLog(4, {}, "loss 3", best=False, label="tuned"))
    sink.close()
    said = capsys.readouterr().err
    assert "step 2: held out loss 1, the best so far\n" in said
    assert "step 3: held out loss 5, the best so far, but worse than before training\n" in said
    assert "step 3: held out loss 6, worse than before training\n" in said
    assert "loss 2" not in said
    assert "loss 3" not in said


class TestTensorBoard:
    def test_every_number_is_there_under_its_step(self, tmp_path: Path) -> None:
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        for steps in (0, 2):  # a run, and the same from step 2 on
            sink = TensorBoardSink(tmp_path, "mine", steps)
            if not steps:
                sink.held_out(HeldOutLog(0, {"overall": 3.0}, "", best=False, label="untuned"))
            for step in (1, 2, 3) if not steps else (3, 4):
                sink.step(step_log(step, loss=float(step), extra={"accuracy": 0.5}))
            sink.close()
        found = events.EventAccumulator(str(tmp_path / "tensorboard" / "mine")).Reload()
        assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(n, n) for n in (1, 2, 3, 4)]
        assert [(event.step, event.value) for event in found.Scalars("held_out/overall")] == [(0, 3.0)]
        assert set(found.Tags()["scalars"]) == {
            *("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "train/accuracy"),
            "held_out/overall",
        }

    def test_a_folder_that_cannot_be_made_is_said_once(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("tensorboard")
        (tmp_path / "tensorboard").touch()
        sink = TensorBoardSink(tmp_path, "mine")
        sink.step(step_log(1))
        sink.close()
        assert capsys.readouterr().err.count("TensorBoard's files cannot be written (Not a directory)") == 1

    def test_without_the_package_the_run_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        require_loggers(config())
        with pytest.raises(ConfigError, match="pip install tensorboard"):
            require_loggers(config(tensorboard=1))
        with pytest.raises(ConfigError, match=r"--wandb mine needs the package wandb, .* pip install wandb, or leave"):
            require_loggers(config(wandb="mine"))


class TestHttp:
    def test_four_fields_are_posted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[urllib.request.Request] = []

        def accept(request: urllib.request.Request, timeout: float) -> SimpleNamespace:
            sent.append(request)
            return SimpleNamespace(close=lambda: None)

        monkeypatch.setattr(urllib.request, "urlopen", accept)
        for address in ("http://host:5000/", "http://host:5000"):
            extra = {"loss_2_odds_ratio": 0.25, "pref_percentage": 0.75}
            HttpSink(address).step(step_log(7, extra=extra))
        assert {request.full_url for request in sent} == {"http://host:5000/LoggingCallback"}
        assert {request.method for request in sent} == {"POST"}
        assert isinstance(sent[0].data, bytes)
        assert json.loads(sent[0].data) == {"step": 7, "loss": 2.5, "loss2": 0.25, "pref": 0.75}

    @pytest.mark.parametrize(
        "error",
        [
            urllib.error.URLError("refused"),
            TimeoutError("slow"),
            ConnectionResetError("gone"),
            http.client.BadStatusLine("not http"),
        ],
    )
    def test_an_address_that_does_not_answer_is_said_once(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(urllib.request, "urlopen", fail)
        sink = HttpSink("http://host/")
        sink.step(step_log(1))
        sink.step(step_log(2))
        assert capsys.readouterr().err.count("does not answer") == 1


def test_warnings_stand_by_themselves_beside_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(4)
    sink.step(StepLog(1, 0, 2.5, lr=0.5, weight_decay=0.0, grad_norm=0.1, seconds=0.25, tokens=9, extra={}))
    warn("the loss goes up")
    sink.close()
    assert "\rwarning: the loss goes up\n" in capsys.readouterr().err
