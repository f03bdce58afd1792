"""Where the numbers of a run go: progress bar, files, Weights & Biases, an HTTP address.

`TrainingMonitor` (callbacks.py) makes one `StepLog` per optimizer step and hands it to every sink.
"""

from __future__ import annotations

import http.client
import json
import math
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from src.config import TrainConfig
from src.errors import TrainingError, require_package
from src.training.console import warn
from src.training.folder import SAMPLES, LineFile

TIMESTAMP = "%Y-%m-%d-%H-%M-%S"
_SAMPLES_SHOWN, _SAMPLE_CHARACTERS = 3, 200
"""On the console: so many, and so much of each."""


@dataclass(frozen=True)
class StepLog:
    """One optimizer step.

    Attributes:
        step: number of the step, from 1.
        epoch: number of the epoch, `epoch_begin` included.
        loss: mean over the step's micro-batches on this device.
        lr, weight_decay: what the optimizer used.
        grad_norm: global norm before clipping.
        seconds: time since the end of the step before.
        tokens: tokens of the step on all devices, padding not counted.
        extra: further numbers of the objective by name.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    weight_decay: float
    grad_norm: float
    seconds: float
    tokens: int
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class EpochLog:
    """One epoch: its number, the mean loss of its steps, the last learning rate.

    Attributes:
        steps: that the mean is over; fewer than `of_steps` where the epoch was interrupted, 0 where nobody says.
    """

    epoch: int
    local_epoch: int
    loss: float
    lr: float
    steps: int = 0
    of_steps: int = 0

    @property
    def part(self) -> str:
        """Of how much of the epoch the mean is: "" of all of it."""
        return f" of {self.steps:,}/{self.of_steps:,} steps" if self.steps < self.of_steps else ""


@dataclass(frozen=True)
class HeldOutLog:
    """A measurement on held-out data while the run goes on.

    Attributes:
        step: optimizer steps done.
        values: the measurement's numbers by name; NaN where there is none.
        text: the measurement in words.
        best: whether it is the best so far.
        label: "untuned", "loaded" or "tuned" where the run says it itself; "" between its steps.
        worse: whether it is worse than before training.
    """

    step: int
    values: dict[str, float]
    text: str
    best: bool
    label: str = ""
    worse: bool = False


@dataclass(frozen=True)
class Sample:
    """A prompt, and what the model answered before training and answers now."""

    prompt: str
    before: str
    now: str


@dataclass(frozen=True)
class SamplesLog:
    """Samples after so many optimizer steps."""

    step: int
    samples: list[Sample]


class Sink(Protocol):
    """Takes logs; what it does not care for, it leaves out."""

    def step(self, log: StepLog) -> None:
        """Called after every optimizer step."""
        ...

    def epoch(self, log: EpochLog) -> None:
        """Called after every epoch."""
        return

    def held_out(self, log: HeldOutLog) -> None:
        """Called after every measurement: before the first step, between two, and after the last."""
        return

    def samples(self, log: SamplesLog) -> None:
        """Called with what the model answers now."""
        return

    def ended(self) -> None:
        """Called after the last step, before what comes then."""
        return

    def close(self) -> None:
        """Called at every end of a run."""
        return


class ProgressSink(Sink):
    """A bar over the optimizer steps of the run: loss, learning rate, tokens/s, time left."""

    def __init__(self, total_steps: int, done: int = 0) -> None:
        self._bar = tqdm(
            total=total_steps, initial=done, unit="step", desc="training", file=sys.stderr, dynamic_ncols=True
        )
        self._mean = 0.0
        self._count = 0

    def step(self, log: StepLog) -> None:
        self._count += 1
        self._mean += (log.loss - self._mean) / self._count
        self._bar.set_postfix_str(
            f"loss {self._mean:.4f}, lr {log.lr:.3g}, {log.tokens_per_s:,.0f} tokens/s", refresh=False
        )
        self._bar.update()

    def epoch(self, log: EpochLog) -> None:
        self._bar.write(f"epoch {log.epoch}: mean loss {log.loss:.4f}{log.part}", file=sys.stderr)
        self._mean, self._count = 0.0, 0

    def held_out(self, log: HeldOutLog) -> None:
        if log.label:
            return
        best = ", the best so far" if log.best else ""
        worse = f", {'but ' if best else ''}worse than before training" if log.worse else ""
        self._bar.write(f"step {log.step}: held out {log.text}{best}{worse}", file=sys.stderr)

    def samples(self, log: SamplesLog) -> None:
        for line in sample_lines(log):
            self._bar.write(line, file=sys.stderr)

    def ended(self) -> None:
        self._bar.close()

    def close(self) -> None:
        self._bar.close()


def sample_lines(log: SamplesLog) -> list[str]:
    """The first samples, as a person reads them; long ones are cut, and all of them stand in `samples.jsonl`."""

    def short(text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= _SAMPLE_CHARACTERS else f"{line[:_SAMPLE_CHARACTERS]}…"

    lines = [f"step {log.step}: samples"]
    for sample in log.samples[:_SAMPLES_SHOWN]:
        lines += [f"  > {short(sample.prompt)}", f"    before  {short(sample.before)}"]
        lines.append(f"    now     {short(sample.now)}")
    more = len(log.samples) - _SAMPLES_SHOWN
    return [*lines, *([f"  and {more} more in {SAMPLES}"] if more > 0 else [])]


class FileSink(Sink):
    """`train_log.txt` in the original's format, `metrics.jsonl`, one line per step, and samples; earlier lines stay.

    Args:
        folder: of the two.
        config: the flags.
        deepspeed_config: the engine's, if there is one.
        run: the run's name, which stands in every record.
        steps: of that run that are done; what the files say of later ones is cut off.
        epoch: number of the run's first epoch that is not done.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        deepspeed_config: dict[str, Any] | None,
        run: str = "",
        steps: int = 0,
        epoch: int = 0,
    ) -> None:
        def is_later_step(line: str) -> bool:
            try:
                row = json.loads(line)
                return bool(row["run"] == run and row["step"] > steps)
            except (ValueError, KeyError, TypeError):
                return False

        def is_later_epoch(line: str) -> bool:
            number = line.split(" ", 1)[0]
            return bool(steps) and number.isdecimal() and int(number) >= epoch

        self._run = run
        self._log = LineFile(folder / "train_log.txt", warn, is_later_epoch)
        self._metrics = LineFile(folder / "metrics.jsonl", warn, is_later_step)
        self._samples = LineFile(folder / SAMPLES, warn, is_later_step) if config.sample_prompts else None
        engine = f"{deepspeed_config}\n" if deepspeed_config else ""
        begins = f"RESUMED RUN at step {steps}," if steps else "NEW RUN"
        self._log.write(f"{begins} {datetime.now().strftime(TIMESTAMP)}\n{asdict(config)}\n{engine}")

    def step(self, log: StepLog) -> None:
        row = {"run": self._run, **asdict(log), "tokens_per_s": log.tokens_per_s}
        row.update(row.pop("extra"))
        self._metrics.write(json.dumps(row) + "\n")

    def held_out(self, log: HeldOutLog) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in log.values.items()}
        row = {"run": self._run, "step": log.step, "held_out": values, "best": log.best}
        row |= {"label": log.label} if log.label else {}
        self._metrics.write(json.dumps(row) + "\n")

    def samples(self, log: SamplesLog) -> None:
        assert self._samples is not None
        rows = [{"run": self._run, "step": log.step, **asdict(sample)} for sample in log.samples]
        self._samples.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def epoch(self, log: EpochLog) -> None:
        self._log.write(
            f"{log.epoch} {log.loss:.6f} {_exponential(log.loss):.4f} {log.lr:.8f} "
            f"{datetime.now()} {log.local_epoch}{log.part}\n",
        )

    def close(self) -> None:
        for file in (self._log, self._metrics, self._samples):
            if file is not None:
                file.close()


class WandbSink(Sink):
    """Weights & Biases with the original's names; offline, with a warning, when it cannot be reached."""

    def __init__(self, config: TrainConfig, run_name: str, tokens: int = 0) -> None:
        import wandb

        entity, project = config.wandb_names
        options: dict[str, Any] = {
            "entity": entity,
            "project": project,
            "name": f"{run_name} {datetime.now().strftime(TIMESTAMP)}",
            "config": asdict(config),
            "dir": config.proj_dir,
        }
        try:
            self._run = wandb.init(**options, settings=wandb.Settings(init_timeout=30))
        except wandb.errors.Error as error:
            warn(f"wandb is not reachable ({error}); logging offline, see `wandb sync`")
            try:
                self._run = wandb.init(**options, mode="offline")
            except wandb.errors.Error as error:
                raise TrainingError(f"--wandb {config.wandb} cannot be used ({error}): leave it out") from error
        self._tokens = tokens

    def step(self, log: StepLog) -> None:
        self._tokens += log.tokens
        row = {"loss": log.loss, "lr": log.lr, "wd": log.weight_decay, "Gtokens": self._tokens / 1e9}
        if log.step > 1:
            row["kt/s"] = log.tokens / log.seconds / 1000
        self._run.log({**row, **log.extra}, step=log.step)

    def held_out(self, log: HeldOutLog) -> None:
        # Of a step that was logged before: wandb takes it while no later one was.
        self._run.log({f"held_out/{name}": value for name, value in log.values.items()}, step=log.step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink(Sink):
    """Event files of TensorBoard, in a folder that bears the run's name; what they say of later steps is passed over.

    Args:
        folder: of the run.
        run: its name.
        steps: of it that are done.
    """

    def __init__(self, folder: Path, run: str, steps: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._warned = False
        self._writer: Any = None
        self._guarded(lambda: self._open(SummaryWriter, folder / "tensorboard" / run, steps))

    def _open(self, make: Callable[..., Any], place: Path, steps: int) -> None:
        self._writer = make(str(place), purge_step=steps + 1 if steps else None)

    def step(self, log: StepLog) -> None:
        row = {"loss": log.loss, "lr": log.lr, "grad_norm": log.grad_norm, "tokens_per_s": log.tokens_per_s}
        self._write({f"train/{name}": value for name, value in {**row, **log.extra}.items()}, log.step)

    def samples(self, log: SamplesLog) -> None:
        if self._writer is not None:
            text = "\n\n".join(f"**{s.prompt}**\n\nbefore: {s.before}\n\nnow: {s.now}" for s in log.samples)
            self._guarded(lambda: self._writer.add_text("samples", text, log.step))

    def held_out(self, log: HeldOutLog) -> None:
        self._write({f"held_out/{name}": value for name, value in log.values.items()}, log.step)

    def close(self) -> None:
        if self._writer is not None:
            self._guarded(self._writer.close)

    def _write(self, values: dict[str, float], step: int) -> None:
        def write() -> None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

        if self._writer is not None:
            self._guarded(write)

    def _guarded(self, action: Callable[[], None]) -> None:
        """Does something; where the system refuses that, it is said once, and nothing more is written."""
        try:
            action()
        except OSError as error:
            self._writer = None
            if not self._warned:
                warn(f"TensorBoard's files cannot be written ({error.strerror or error}); training goes on")
            self._warned = True


def require_loggers(config: TrainConfig) -> None:
    """Refuses a logger without its package, before anything else takes time.

    Raises:
        ConfigError: saying what to install.
    """
    same = "leave it out (metrics.jsonl and loss.png have the same numbers)"
    if config.tensorboard:
        require_package("--tensorboard 1", "tensorboard", same)
    if config.wandb:
        require_package(f"--wandb {config.wandb}", "wandb", same)


class HttpSink(Sink):
    """Posts four numbers to `<address>LoggingCallback` after every step, as the original did."""

    def __init__(self, address: str) -> None:
        self._url = f"{address.rstrip('/')}/LoggingCallback"
        self._warned = False

    def step(self, log: StepLog) -> None:
        body = {
            "step": log.step,
            "loss": log.loss,
            "loss2": log.extra.get("loss_2_odds_ratio", 0.0),
            "pref": log.extra.get("pref_percentage", 0.0),
        }
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            urllib.request.urlopen(request, timeout=2).close()
        except (OSError, http.client.HTTPException) as error:
            if not self._warned:
                warn(f"{self._url} does not answer ({error}); training goes on")
            self._warned = True


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
