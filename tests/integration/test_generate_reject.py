"""rlhf_generate_reject.py, as a user runs it."""

from __future__ import annotations

import csv
import json
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from factories import tiny_checkpoint, tiny_state_file

from src.commands.preparation import generate_rejects
from src.config import RejectConfig
from src.data.preferences import read_rows
from src.errors import ConfigError, UserError

SCRIPT = str(Path(__file__).parents[2] / "rlhf_generate_reject.py")
FLAGS = {"accelerator": "cpu", "batch": "3", "max_tokens": "25", "top_p": "0.9"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base model and an input in which row 4 has a reject and row 6 no prompt."""
    tiny_checkpoint(tmp_path / "base.pth")
    with open(tmp_path / "in.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "reject", "note"])
        for number in range(8):
            prompt = "" if number == 6 else f"question {number}\r\n, {'long ' * number}"
            writer.writerow([prompt, f"answer {number}", "kept" if number == 4 else "", "x"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(**changes: str) -> dict[str, str]:
    return {"load_model": "base.pth", "input_csv": "in.csv", "output_csv": "out.csv", **FLAGS, **changes}


def run(**changes: str) -> bytes:
    given = flags(**changes)
    generate_rejects(RejectConfig.from_flags(given))
    return Path(given["output_csv"]).read_bytes()


def test_rejects_are_filled_in_and_all_else_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    before, after = read_rows("in.csv"), read_rows("out.csv")
    assert [(row.prompt, row.chosen) for row in after] == [(row.prompt, row.chosen) for row in before]
    assert [bool(row.rejected) for row in after] == [True] * 6 + [False, True]
    assert after[4].rejected == "kept"
    with open("out.csv", encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["prompt", "chosen", "reject"]
    assert sorted(path.name for path in folder.iterdir()) == ["base.pth", "in.csv", "out.csv", "out.csv.run.json"]
    output = capsys.readouterr()
    assert "8 rows, 6 with a new reject" in output.out
    assert "--target_pair_count 8" in output.out
    assert "row/s" in output.err


def test_the_seed_decides(folder: Path) -> None:
    first = run()
    assert run(output_csv="again.csv") == first
    assert run(output_csv="other.csv", seed="1") != first


def test_random_numbers_belong_to_the_row_of_the_input(folder: Path) -> None:
    """Equal prompts get different answers in groups of their own, and a reject filled in by hand changes no other."""
    for name, third in (("in.csv", ""), ("edited.csv", "by hand")):
        Path(name).write_text(f"prompt,chosen,reject\na,b,\na,b,\na,b,{third}\na,b,\n", encoding="utf-8")
    run(batch="1")
    run(batch="1", input_csv="edited.csv", output_csv="edited-out.csv")
    rejects, edited = ([row.rejected for row in read_rows(name)] for name in ("out.csv", "edited-out.csv"))
    assert len(set(rejects)) == 4
    assert edited == [*rejects[:2], "by hand", rejects[3]]


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("output", ["linked.csv", "linked.csv.run.json"])
@pytest.mark.parametrize("source", ["in.csv", "base.pth"])
def test_no_input_is_written_over_through_a_link(
    folder: Path, link: Callable[[Path, Path], None], output: str, source: str
) -> None:
    before = Path(source).read_bytes()
    link(folder / output, folder / source)
    with pytest.raises(ConfigError, match=f"{source} would be written over|is the input"):
        run(output_csv="linked.csv")
    assert Path(source).read_bytes() == before


def test_overwrite_replaces_existing_rejects(folder: Path) -> None:
    run(overwrite="1")
    rows = read_rows("out.csv")
    assert rows[4].rejected not in ("", "kept")
    assert rows[6].rejected == ""


def test_a_tuned_state_changes_the_answers(folder: Path) -> None:
    shape = tiny_checkpoint(folder / "base.pth")
    tiny_state_file(folder / "state.pth", shape)
    assert run(load_state="state.pth", output_csv="tuned.csv") != run()


def test_other_settings_do_not_mix_into_a_finished_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run()
    assert run() == whole
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="was begun with --max_tokens 25, now it is 26"):
        run(max_tokens="26")
    shape = tiny_checkpoint(folder / "base.pth", seed=5)
    assert shape.vocab_size == 257
    with pytest.raises(UserError, match="was begun with --load_model base"):
        run()


def test_killed_and_restarted_gives_the_same_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"max_tokens": "80", "batch": "2", "stop": ""}
    whole = run(output_csv="whole.csv", **changes)
    command = [sys.executable, SCRIPT]
    command += [part for name, value in flags(**changes).items() for part in (f"--{name}", value)]
    progress = folder / "out.csv.run.json"

    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and process.poll() is None:
        if progress.exists() and json.loads(progress.read_text())["rows_done"] >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = json.loads(progress.read_text())["rows_done"]
    assert 2 <= done < 8, "the run was not cut off in its middle"
    assert whole.startswith((folder / "out.csv").read_bytes()[: json.loads(progress.read_text())["bytes_done"]])

    capsys.readouterr()
    assert run(**changes) == whole
    assert f"has {done} of 8 rows, going on from there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt,answer\na,b\n", "no column 'chosen'"),
        ("", "is empty"),
        ("prompt,chosen\n", "holds no rows"),
        ('prompt,chosen\na,"b\n', "quote that is never closed"),
        ("prompt,chosen\nä,b\n".encode("latin-1"), "line 2: not UTF-8"),
    ],
)
def test_bad_input_leaves_nothing_behind(folder: Path, content: str | bytes, expected: str) -> None:
    (folder / "in.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        run()
    assert expected in str(caught.value)
    assert not (folder / "out.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--top_q", "1"], "did you mean --top_p?"),
        (["--load_model", "none.pth", "--input_csv", "in.csv"], "none.pth does not exist"),
        (["--load_model", "base.pth", "--input_csv", "in.csv", "--accelerator", "tpu"], "--accelerator tpu"),
        (["--load_model", "base.pth", "--input_csv", "in.csv", "--load_state", "none.pth"], "none.pth does not exist"),
        (["--load_model", "base.pth", "--input_csv", "in.csv", "--load_state", "."], ". is a directory"),
    ],
)
def test_the_command_line_reports_errors_in_one_line(
    folder: Path,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(SCRIPT, run_name="__main__")
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("kind", ["missing", "a folder", "a table"])
def test_a_state_that_cannot_be_used_is_named_before_anything_is_written(kind: str, folder: Path) -> None:
    path = {"missing": "gone.pth", "a folder": ".", "a table": "in.csv"}[kind]
    with pytest.raises(UserError, match=re.escape(path)):
        run(load_state=path)
    assert sorted(entry.name for entry in folder.iterdir()) == ["base.pth", "in.csv"]


def test_an_answer_may_be_as_long_as_it_likes(folder: Path) -> None:
    """Random numbers are drawn as they are used, not for the longest answer of all rows at once."""
    Path("in.csv").write_text("prompt,chosen,reject\na,b,\n", encoding="utf-8")
    assert run(max_tokens="100000000", batch="1000000", stop="", allow_end="1", alpha_frequency="0", temperature="9")
