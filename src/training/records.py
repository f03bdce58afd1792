"""Where the numbers of a run go: progress bar, files, Weights & Biases, an HTTP address.

`TrainingMonitor` (callbacks.py) makes one `StepRecord` per optimizer step and hands it to every sink.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from src.config import TrainConfig
from src.errors import TrainingError

TIMESTAMP = "%Y-%m-%d-%H-%M-%S"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: number of the step, from 1.
        epoch: number of the epoch, `epoch_begin` included.
        loss: mean over the step's micro-batches on this device.
        lr, weight_decay: what the optimizer used.
        grad_norm: global norm before clipping.
        seconds: time since the end of the step before.
        tokens: tokens of the step on all devices, padding not counted.
        nominal_tokens: ctx_len times samples, as the original counts.
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
    nominal_tokens: int
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: its number, the mean loss of its micro-batches and the last learning rate."""

    epoch: int
    local_epoch: int
    loss: float
    lr: float


class Sink(Protocol):
    """Takes records; `close` is called at every end of a run."""

    def step(self, record: StepRecord) -> None: ...

    def epoch(self, record: EpochRecord) -> None: ...

    def close(self) -> None: ...


class ProgressSink:
    """A bar over the optimizer steps of the run: loss, learning rate, tokens/s, time left."""

    def __init__(self, total_steps: int) -> None:
        self._bar = tqdm(total=total_steps, unit="step", desc="training", file=sys.stderr, dynamic_ncols=True)
        self._mean = 0.0
        self._count = 0

    def step(self, record: StepRecord) -> None:
        self._count += 1
        self._mean += (record.loss - self._mean) / self._count
        self._bar.set_postfix_str(
            f"loss {self._mean:.4f}, lr {record.lr:.3g}, {record.tokens_per_s:,.0f} tokens/s", refresh=False
        )
        self._bar.update()

    def epoch(self, record: EpochRecord) -> None:
        self._bar.write(f"epoch {record.epoch}: mean loss {record.loss:.4f}", file=sys.stderr)
        self._mean, self._count = 0.0, 0

    def close(self) -> None:
        self._bar.close()


class FileSink:
    """`train_log.txt` in the original's format and `metrics.jsonl`, one record per step."""

    def __init__(self, folder: Path, config: TrainConfig, deepspeed_config: dict[str, Any] | None) -> None:
        self._folder = folder
        self._log = (folder / "train_log.txt").open("a", encoding="utf-8")
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        engine = f"{deepspeed_config}\n" if deepspeed_config else ""
        self._write(self._log, f"NEW RUN {datetime.now().strftime(TIMESTAMP)}\n{asdict(config)}\n{engine}")

    def step(self, record: StepRecord) -> None:
        row = {**asdict(record), "tokens_per_s": record.tokens_per_s}
        row.update(row.pop("extra"))
        self._write(self._metrics, json.dumps(row) + "\n")

    def epoch(self, record: EpochRecord) -> None:
        self._write(
            self._log,
            f"{record.epoch} {record.loss:.6f} {_exponential(record.loss):.4f} {record.lr:.8f} "
            f"{datetime.now()} {record.local_epoch}\n",
        )

    def close(self) -> None:
        for file in (self._log, self._metrics):
            # What a full disk did not take is tried once more here; `_write` has reported it.
            with contextlib.suppress(OSError):
                file.close()

    def _write(self, file: TextIO, text: str) -> None:
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            self.close()
            raise TrainingError(
                f"{file.name} cannot be written ({error.strerror}): free some space in {self._folder}"
            ) from error


class WandbSink:
    """Weights & Biases with the original's names; offline, with a warning, when it cannot be reached."""

    def __init__(self, config: TrainConfig, run_name: str) -> None:
        import wandb

        options: dict[str, Any] = {
            "project": config.wandb,
            "name": f"{run_name} {datetime.now().strftime(TIMESTAMP)}",
            "config": asdict(config),
            "dir": config.proj_dir,
        }
        try:
            self._run = wandb.init(**options, settings=wandb.Settings(init_timeout=30))
        except wandb.errors.Error as error:
            print(f"warning: wandb is not reachable ({error}); logging offline, see `wandb sync`", file=sys.stderr)
            self._run = wandb.init(**options, mode="offline")
        self._tokens = 0

    def step(self, record: StepRecord) -> None:
        self._tokens += record.nominal_tokens
        row = {"loss": record.loss, "lr": record.lr, "wd": record.weight_decay, "Gtokens": self._tokens / 1e9}
        if record.step > 1:
            row["kt/s"] = record.nominal_tokens / record.seconds / 1000
        self._run.log({**row, **record.extra}, step=record.step)

    def epoch(self, record: EpochRecord) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


class HttpSink:
    """Posts four numbers to `<address>LoggingCallback` after every step, as the original did."""

    def __init__(self, address: str) -> None:
        self._url = f"{address.rstrip('/')}/LoggingCallback"
        self._warned = False

    def step(self, record: StepRecord) -> None:
        body = {
            "step": record.step,
            "loss": record.loss,
            "loss2": record.extra.get("loss_2_odds_ratio", 0.0),
            "pref": record.extra.get("pref_percentage", 0.0),
        }
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            urllib.request.urlopen(request, timeout=2).close()
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if not self._warned:
                print(f"warning: {self._url} does not answer ({error}); training goes on", file=sys.stderr)
            self._warned = True

    def epoch(self, record: EpochRecord) -> None:
        pass

    def close(self) -> None:
        pass


def _exponential(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
