"""What a terminal's encoding cannot print is printed as escapes, and ends no program."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from factories import tiny_checkpoint, tiny_shape, tiny_state_file
from running import ROOT, write_documents
from tables import some

NAMES = ["モデル", os.fsdecode(b"caf\xe9")]
"""A name that ASCII lacks, and one that is no UTF-8."""


@pytest.fixture(params=[NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow)], ids=["japanese", "latin-1"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of such a name with every script's inputs."""
    folder = tmp_path / request.param
    folder.mkdir()
    tiny_checkpoint(folder / f"{request.param}.pth")
    tiny_state_file(folder / "state.pth", tiny_shape())
    write_documents(folder / "data", [10, 12, 9])
    with open(folder / "in.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "chosen", "reject"), ("問い", "答え", "違う"), ("a", "b", "")])
    return folder


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("utf-8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "script",
    some(
        [
            "train",
            "merge_state",
            "PrepareOrpoDataset",
            "rlhf_generate_reject",
            "src.commands.chat",
            "src.commands.state",
        ],
        "PrepareOrpoDataset",
    ),
)
def test_a_script_prints_what_it_can(script: str, encoding: str, folder: Path) -> None:
    base, state = folder / f"{folder.name}.pth", folder / "state.pth"
    words = {
        "train": [
            "--load_model", base, "--load_state", state, "--data_file", folder / "data", "--proj_dir", folder / "out",
            "--accelerator", "cpu", "--quant", 0, "--epoch_count", 1, "--epoch_steps", 2,
        ],
        "merge_state": [base, state, folder / "merged.pth"],
        "PrepareOrpoDataset": [
            "--load_model", base, "--input_csv", folder / "in.csv", "--output_save", folder / "pairs.save",
            "--target_pair_count", 4,
        ],
        "rlhf_generate_reject": [
            "--load_model", base, "--load_state", state, "--input_csv", folder / "in.csv",
            "--output_csv", folder / "out.csv", "--accelerator", "cpu", "--max_tokens", 4,
        ],
        "src.commands.chat": [
            "--load_model", base, "--load_state", folder / "noted.pth", "--accelerator", "cpu", "--max_tokens", 4,
            "--template", "text",
        ],
        "src.commands.state": ["export", state, folder / "state.st", "--to", "ai00"],
    }  # fmt: skip
    if script == "src.commands.chat":  # which names files in a note
        (folder / "noted.pth").write_bytes(state.read_bytes())
        (folder / "noted.json").write_text('{"quant": "nf4"}')
    called = ["-m", script] if script.startswith("src.") else [ROOT / f"{script}.py"]
    command = [sys.executable, *called, *words[script]]
    run = subprocess.run(
        [os.fspath(word) if isinstance(word, Path) else str(word) for word in command],
        input="問い\n".encode(),
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.fspath(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert b"Traceback" not in run.stderr
    shown = NAMES[0].encode() if encoding == "utf-8" else b"\\u30e2"
    assert (shown if NAMES[0] in folder.name else b"caf\\") in run.stdout + run.stderr


def test_an_error_prints_what_it_can(folder: Path) -> None:
    command = [sys.executable, os.fspath(ROOT / "merge_state.py"), *map(os.fspath, [folder, folder, folder / "new"])]
    run = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 2
    assert run.stderr.startswith(b"error: ")
    assert run.stderr.count(b"\n") == 1
