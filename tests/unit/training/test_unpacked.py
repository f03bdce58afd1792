"""When held-out data are measured on the unpacked base, and when a note stands for it."""

from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint, tiny_states
from running import write_documents
from torch import Tensor

from src.checkpoint import open_checkpoint
from src.config import TrainConfig
from src.loading import LoadOptions
from src.training import unpacked
from src.training.evaluation import HeldOutLoss
from src.training.unpacked import SLOW_SECONDS, free_bytes, measure_unpacked
from src.training.work import Work, prepare_work

CPU = torch.device("cpu")
OPTIONS = LoadOptions(CPU, torch.float32, quant_type="nf4", quant_head=True)


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[str, Tensor], Work]:
    """Base, states and held-out data of a run."""
    shape = tiny_checkpoint(tmp_path / "base.pth")
    states = tiny_states(shape)
    data = str(write_documents(tmp_path / "documents", [10, 12]))
    work = prepare_work(TrainConfig.from_flags({"load_model": "base.pth", "data_file": data, "val_file": data}), shape)
    return tmp_path / "base.pth", states, work


def test_it_is_measured_where_it_costs_little(run: tuple[Path, dict[str, Tensor], Work]) -> None:
    base, states, work = run
    assert isinstance(measure_unpacked(open_checkpoint(base), states, OPTIONS, work, 1.0), HeldOutLoss)


def test_a_slow_evaluation_is_not_repeated(run: tuple[Path, dict[str, Tensor], Work]) -> None:
    base, states, work = run
    reason = measure_unpacked(open_checkpoint(base), states, OPTIONS, work, SLOW_SECONDS + 11)
    assert reason == "on the packed one it took 71 s, and more than 60 are too many"


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_it_wants_room_for_every_weight(
    spare: int, fits: bool, run: tuple[Path, dict[str, Tensor], Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, states, work = run
    checkpoint = open_checkpoint(base)
    needed = 4 * checkpoint.info.shape.parameter_count + 2**30
    monkeypatch.setattr(unpacked, "free_bytes", lambda device: needed + spare)
    measured = measure_unpacked(checkpoint, states, OPTIONS, work, 1.0)
    assert measured == "it needs 1.0 GiB beside the packed one and 1.0 are free" or fits
    assert isinstance(measured, HeldOutLoss) == fits


def test_a_full_gpu_is_a_reason_and_no_error(
    run: tuple[Path, dict[str, Tensor], Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, states, work = run

    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(unpacked, "open_model", full)
    assert "too little" in str(measure_unpacked(open_checkpoint(base), states, OPTIONS, work, 1.0))


def test_free_memory_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   17 kB\n")
    monkeypatch.setattr(unpacked, "_MEMORY_FILE", tmp_path / "meminfo")
    assert free_bytes(CPU) == 17 * 1024
    monkeypatch.setattr(unpacked, "_MEMORY_FILE", tmp_path / "none")
    assert free_bytes(CPU) == float("inf")
