"""The bundled demonstrations, with few steps, and the files they live on."""

from __future__ import annotations

import json
import os
import re
import runpy
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from running import PICTURE, ROOT, files_in, left_by_run, run_script

from src.checkpoint import load_state, open_checkpoint
from src.commands import demo
from src.data.preferences import read_rows

BUNDLE = ROOT / "src" / "demo"
WHOSE = ("base", "tuned")


def table_row(output: str, label: str) -> list[float]:
    """The numbers of one line of a printed table."""
    (line,) = re.findall(rf"^  {re.escape(label)} +(.*)$", output, re.MULTILINE)
    return [float(number.rstrip("%")) for number in line.split()]


def held_out_lines(output: str) -> list[str]:
    return re.findall(r"^held out   (?:un)?tuned: (.*)$", output, re.MULTILINE)


def texts(name: str) -> list[str]:
    """Documents of a bundled file."""
    return [json.loads(line)["text"] for line in (BUNDLE / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_text_demo_in_a_process_of_its_own(tmp_path: Path) -> None:
    """From another folder: the bundle is found, held-out loss falls, and nothing is written but the results."""
    flags = ["--demo", "sft", "--epoch_steps", "4", "--accelerator", "cpu", "--proj_dir", "results"]
    ended = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr

    before, after, change = table_row(ended.stdout, "whole documents")
    assert before == pytest.approx(1.8935, abs=0.002)
    assert after < 0.99 * before
    assert change == pytest.approx(100 * (after / before - 1), abs=0.06)
    start, rest = (table_row(ended.stdout, label) for label in ("first 64 positions", "the rest"))
    assert start[0] > before > rest[0]
    assert start[1] > 0
    untuned, tuned = held_out_lines(ended.stdout)
    assert f"{before:.4f}" in untuned
    assert "of 48 documents" in untuned
    assert f"{after:.4f}" in tuned

    samples = ended.stdout.split("samples    ")[1].split("held-out loss")[0]
    for prompt in demo.SAMPLE_PROMPTS:
        begun = [re.findall(rf"^  {whose} +\| {re.escape(prompt.rstrip())}", samples, re.M) for whose in WHOSE]
        assert [len(found) for found in begun] == [1, 1]
    lines = [re.findall(rf"^  {whose} +\| (.*)$", samples, re.M) for whose in WHOSE]
    assert lines[0] != lines[1]

    assert files_in(tmp_path) == {"results"}
    assert files_in(tmp_path / "results") == left_by_run("rwkv-0.pth") | PICTURE
    for name in files_in(tmp_path / "results"):
        assert f"results/{name} (" in ended.stdout
    shape = open_checkpoint(BUNDLE / "base.pth").info.shape
    assert len(load_state(tmp_path / "results" / "rwkv-final.pth", shape)) == shape.n_layer
    script = re.escape(str(ROOT / "merge_state.py"))
    (merge,) = set(re.findall(rf"python {script} (.*)", ended.stdout))
    base, state, merged = merge.split()
    assert (tmp_path / base).samefile(BUNDLE / "base.pth")
    assert (state, merged) == ("results/rwkv-final.pth", "results/merged.pth")
    next_commands = re.findall(r"^ +((?:env PYTHONPATH=\S+ )?python .*)", ended.stdout, re.MULTILINE)
    assert len(next_commands) == len(set(next_commands)) == 5
    assert next_commands[3] == f"python {ROOT / 'train.py'} --demo orpo"


@pytest.mark.slow
def test_preference_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CSV, rejects, pairs and training in one go; what an earlier start left is made anew."""
    monkeypatch.setattr(demo, "REJECT_FLAGS", {**demo.REJECT_FLAGS, "max_tokens": "30"})
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 20)
    (tmp_path / "pairs-rejects.csv").write_text("prompt,chosen,reject\n")
    ended = run_script("train.py", demo="orpo", epoch_steps=2, accelerator="cpu", proj_dir=tmp_path)
    assert ended.code == 0, ended.err
    share, margin = (
        table_row(ended.out, label)
        for label in ("pairs whose chosen answer is more probable", "margin of log-probability, nats per token")
    )
    assert all(0 <= number <= 100 for number in share)
    assert margin[0] != margin[1]
    untuned, tuned = held_out_lines(ended.out)
    assert f"accuracy {share[0]:.1f}%, margin {margin[0]:+.4f}" in untuned
    assert f"accuracy {share[1]:.1f}%, margin {margin[1]:+.4f}" in tuned
    chain = {
        f"{part}{ending}"
        for part in ("pairs", "held-out")
        for ending in ("-prompts.csv", "-rejects.csv", "-rejects.csv.run.json", ".save", ".texts.jsonl")
    }
    assert files_in(tmp_path) == left_by_run("rwkv-0.pth") | chain | PICTURE
    assert len(read_rows(str(tmp_path / "pairs-rejects.csv"))) == 4
    rows = read_rows(str(tmp_path / "held-out-rejects.csv"))
    assert [row.chosen for row in rows] == [row.chosen for row in read_rows(str(BUNDLE / "orpo-held-out.csv"))]
    assert sum(bool(row.rejected) for row in rows) > 40


def test_no_flag_at_all_means_the_text_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Mapping[str, str]] = []
    monkeypatch.setattr(demo, "_sft_demo", calls.append)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert calls == [{"demo": "sft", "overwrite": "1"}]


@pytest.mark.parametrize(
    ("given", "overwrite"), [({}, "1"), ({"epoch_steps": "3"}, "1"), ({"proj_dir": "x"}, None), ({"resume": "1"}, None)]
)
def test_a_demo_writes_over_its_own_folder_only(
    given: dict[str, str], overwrite: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Mapping[str, str]] = []
    monkeypatch.setattr(demo, "_sft_demo", calls.append)
    demo.run_demo(given)
    assert calls[0].get("overwrite") == overwrite


def test_a_demo_refuses_flags_for_what_it_makes_itself(tmp_path: Path) -> None:
    ended = run_script("train.py", demo="orpo", rlhf_train_file="mine.save", train_type="none", proj_dir=tmp_path / "x")
    assert ended.code == 2
    assert "--train_type none and --rlhf_train_file mine.save" in ended.err
    assert files_in(tmp_path) == set()


def test_an_unknown_demo_is_refused() -> None:
    ended = run_script("train.py", demo="dpo")
    assert ended.code == 2
    assert "sft, orpo" in ended.err


def test_the_bundle_is_small() -> None:
    size = sum(path.stat().st_size for path in BUNDLE.iterdir() if path.is_file())
    assert size <= 8 * 2**20


def test_held_out_passages_are_long_and_not_trained_on() -> None:
    training, held_out = texts("sft.jsonl"), texts("sft-held-out.jsonl")
    assert statistics.median(len(text.encode()) + 1 for text in held_out) >= 256
    trained_verses = {verse for text in training for verse in text.splitlines()}
    assert not any(verse in trained_verses for text in held_out for verse in text.splitlines())


def test_held_out_pairs_are_not_trained_on() -> None:
    def verses(name: str) -> set[str]:
        return {text for row in read_rows(str(BUNDLE / name)) for text in (row.prompt, row.chosen)}

    assert not verses("orpo.csv") & verses("orpo-held-out.csv")
