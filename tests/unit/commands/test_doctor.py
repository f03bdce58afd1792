"""What the doctor finds good, and what it does not."""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import ARCHITECTURES, tiny_checkpoint
from torch import Tensor

from src.commands import doctor
from src.commands.doctor import (
    OLDEST_PYTHON,
    elementwise_finding,
    findings,
    operator_finding,
    package_findings,
    packing_finding,
    python_finding,
    run_doctor,
)
from src.device import Device
from src.errors import EXIT_CODE

CPU = Device(torch.device("cpu"), "fp32")


def test_an_older_python_is_to_be_replaced() -> None:
    assert python_finding(OLDEST_PYTHON).mark == "good"
    old = python_finding((3, 9))
    assert (old.mark, old.advice) == ("BAD", "install Python 3.10 or newer")


@pytest.mark.parametrize(
    ("version", "mark"),
    [("2.11", "good"), ("2.13.1+cpu", "good"), ("2.9.1", "note"), ("2.14.0", "note"), (None, "BAD")],
)
def test_packages_are_held_against_the_requirements(version: str | None, mark: str, tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# a comment\n\ntorch>=2.11,<2.14               # why\n")

    def version_of(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    (found,) = package_findings(requirements, version_of)
    assert (found.subject, found.mark) == ("torch", mark)
    assert ('pip install "torch>=2.11,<2.14"' in found.advice) == (mark != "good")


def test_what_few_runs_need_is_no_fault(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text('deepspeed>=0.19.8,<0.20; sys_platform == "linux"  # why\n')

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    (found,) = package_findings(requirements, missing)
    assert found.mark == "note"
    assert "several GPUs" in found.advice


OPERATORS = {"x060": "wkv6", "x070": "wkv7"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_operator_is_right(architecture: str, precision: Any) -> None:
    found = operator_finding(Device(torch.device("cpu"), precision), architecture, heads=2, size=8, tokens=20)
    assert found.mark == "good"
    assert f"{OPERATORS[architecture]} [1, 20, 2, 8] {precision}" in found.seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_operator_is_that_of_the_run(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model that is named, or of the fresh one."""
    tried: list[str] = []

    def trying(device: Device, architecture: str, *sizes: int) -> doctor.Finding:
        tried.append(architecture)
        return doctor.Finding("operator", "tried")

    monkeypatch.setattr(doctor, "operator_finding", trying)
    tiny_checkpoint(tmp_path / "model.pth", architecture=architecture)
    for flags in ({"load_model": str(tmp_path / "model.pth")}, {"my_testing": architecture}):
        list(findings({"accelerator": "cpu", **flags}))
    assert tried == [architecture, architecture]


@pytest.mark.parametrize("wrong", ["y", "dv"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_wrong_operator_is_told_by_what_is_wrong(
    architecture: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(doctor, OPERATORS[architecture])

    def bent(v: Tensor, backend: str | None, **others: Tensor) -> tuple[Tensor, Tensor]:
        if backend is None and wrong == "dv":
            v = v.detach() + 1.001 * (v - v.detach())
        y, final = right(v=v, backend=backend, **others)
        return (y + 1e-3 * y.detach() if backend is None and wrong == "y" else y), final

    monkeypatch.setattr(doctor, OPERATORS[architecture], bent)
    found = operator_finding(CPU, architecture, heads=2, size=8, tokens=20)
    assert found.mark == "BAD"
    assert found.advice.startswith(f"{wrong} must stay under")


def test_element_wise_functions() -> None:
    assert elementwise_finding(CPU, channels=32).mark == "good"


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_packing(quant_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packing_finding(CPU, quant_type).mark == "good"
    right = doctor.FrozenLinear.dequantized
    monkeypatch.setattr(doctor.FrozenLinear, "dequantized", lambda layer: right(layer).roll(1))
    assert packing_finding(CPU, quant_type).mark == "BAD"


def test_what_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(doctor, "operator_finding", broken)
    (found,) = [finding for finding in findings({"accelerator": "cpu"}) if finding.subject == "operator"]
    assert (found.mark, found.seen) == ("BAD", "fails: no kernel image is available")


def test_flags_and_files_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    base = tmp_path / "base.pth"
    shape = tiny_checkpoint(base, n_layer=1)
    given = {"doctor": "1", "load_model": str(base), "proj_dir": str(tmp_path / "out" / "deeper"), "ctx_len": "16"}
    assert run_doctor(given) == 0
    assert f"[1, 16, {shape.n_head}, {shape.head_size}] fp32" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run_doctor({**given, "data_file": "nowhere.jsonl", "lr_init": "x"}) == EXIT_CODE
    printed = capsys.readouterr().out
    assert "--data_file nowhere.jsonl is not there" in printed
    assert "--lr_init 'x' is not a number" in printed
    assert "2 to change" in printed
    with monkeypatch.context() as patched:
        patched.setattr("src.config.recognition.MOST_IN_FOLDER", 0)
        assert run_doctor({**given, "data_file": str(tmp_path)}) == EXIT_CODE
    assert "-> name the folder, or the files, of the data alone" in capsys.readouterr().out
    assert run_doctor({**given, "load_model": "nowhere.pth"}) == EXIT_CODE
    assert "1 to change" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    (disk,) = [finding for finding in findings({"proj_dir": "results"}) if finding.subject == "disk"]
    assert disk.mark == "BAD"
    assert "choose another --proj_dir" in disk.advice


def test_what_the_flags_need_besides_the_device(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    def said(**given: str) -> dict[str, str]:
        subjects = ("strategy", "loggers")
        return {finding.subject: finding.advice for finding in findings(given) if finding.subject in subjects}

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("wandb", "deepspeed") else name)
    assert said(accelerator="cpu") == {}
    found = said(accelerator="cpu", devices="2", wandb="mine")
    assert found["strategy"].startswith("--devices 2 --num_nodes 1 needs GPUs")
    assert found["loggers"].startswith(
        "--wandb mine needs the package wandb, which is not installed: pip install wandb"
    )
