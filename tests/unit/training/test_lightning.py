"""Lightning's import: what it brings, and what it leaves alone."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.training import lightning

REPOSITORY = Path(__file__).resolve().parents[3]

UNWANTED = ("torchmetrics", "transformers", "torchvision", "matplotlib", "deepspeed", "wandb", "tensorboard", "pandas")


@pytest.mark.slow
def test_a_run_imports_only_what_it_needs() -> None:
    code = f"""
import sys
import src.training.run
early = {(*UNWANTED, "pytorch_lightning", "torch._dynamo", "bitsandbytes")}
assert not sys.modules.keys() & set(early), sys.modules.keys() & set(early)
from src.training import lightning
lightning.begin()
lightning.begin()
lightning.ready()
lightning.ready()
import src.training.fitting
assert "pytorch_lightning" in sys.modules
unwanted = {UNWANTED}
assert not sys.modules.keys() & set(unwanted), sys.modules.keys() & set(unwanted)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Lightning and a library of metrics of our own, to be filled."""
    for name in ("own_lightning", "own_metrics"):
        (tmp_path / name).mkdir()
    (tmp_path / "own_metrics-2.5.dist-info").mkdir()
    (tmp_path / "own_metrics-2.5.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: own_metrics\nVersion: 2.5\n"
    )
    (tmp_path / "own_metrics" / "__init__.py").write_text("class Metric: real = True\nclass Accuracy(Metric): pass\n")
    monkeypatch.setattr(lightning, "_NAME", "own_lightning")
    monkeypatch.setattr(lightning, "_PACKAGES", ("own_lightning",))
    monkeypatch.setattr(lightning, "_METRICS", "own_metrics")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("own_lightning", "own_metrics"):
        sys.modules.pop(name, None)


def test_metrics_are_stood_in_for_and_come_back(packages: Path) -> None:
    (packages / "own_lightning" / "__init__.py").write_text(
        "import own_metrics\nfrom own_metrics import Metric, MetricCollection\nversion = own_metrics.__version__\n"
    )
    lightning.ready()
    imported = sys.modules["own_lightning"]
    assert imported.version == "2.5"
    assert not hasattr(imported.Metric, "real")
    assert importlib.import_module("own_metrics").Metric.real


def test_a_lightning_that_needs_more_gets_it(packages: Path) -> None:
    (packages / "own_lightning" / "__init__.py").write_text("from own_metrics import Accuracy, Metric\n")
    lightning.begin()
    lightning.ready()
    assert sys.modules["own_lightning"].Metric.real


def test_metrics_that_are_there_are_used(packages: Path) -> None:
    there = importlib.import_module("own_metrics")
    (packages / "own_lightning" / "__init__.py").write_text("from own_metrics import Metric\n")
    lightning.ready()
    assert sys.modules["own_metrics"] is there
    assert sys.modules["own_lightning"].Metric.real


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_wrong_with_it_is_said_in_the_run(packages: Path, ahead: bool) -> None:
    (packages / "own_lightning" / "__init__.py").write_text("raise ImportError('broken')\n")
    if ahead:
        lightning.begin()
    with pytest.raises(ImportError, match="broken"):
        lightning.ready()
