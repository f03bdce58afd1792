"""The growing CSV: groups, taking up after a cut, and what it refuses to take up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.data.preferences import PreferenceRow, read_rows
from src.data.reject_file import RejectFile, RejectGroup, plan_groups
from src.errors import DataError

ROWS = [
    PreferenceRow(2, "a", "b", ""),
    PreferenceRow(3, " ", "no prompt", ""),
    PreferenceRow(4, 'c "quoted"', "d\r\ne", "has one"),
    PreferenceRow(5, "f", "g", "\n"),
    PreferenceRow(6, "h", "i", ""),
]
SETTINGS = {"seed": 1, "top_p": 0.3}


def test_groups_cover_all_rows_and_generate_only_what_is_missing() -> None:
    assert plan_groups(ROWS, 2, overwrite=False) == [RejectGroup(0, 4, (0, 3)), RejectGroup(4, 5, (4,))]
    assert plan_groups(ROWS, 2, overwrite=True) == [RejectGroup(0, 3, (0, 2)), RejectGroup(3, 5, (3, 4))]
    assert plan_groups(ROWS[1:3], 2, overwrite=False) == [RejectGroup(0, 2, ())]


def complete(path: Path) -> bytes:
    with RejectFile(str(path), ROWS, SETTINGS) as file:
        for group in plan_groups(ROWS, 2, overwrite=False):
            if group.start >= file.rows_done:
                file.append(group, {number: f" new\r{number}\n\n" for number in group.generated})
    return path.read_bytes()


def test_the_file_reads_back_as_written(tmp_path: Path) -> None:
    complete(tmp_path / "out.csv")
    back = read_rows(str(tmp_path / "out.csv"))
    assert [(row.prompt, row.chosen, row.rejected) for row in back] == [
        ("a", "b", " new\r0\n\n"),
        (" ", "no prompt", ""),
        ('c "quoted"', "d\r\ne", "has one"),
        ("f", "g", " new\r3\n\n"),
        ("h", "i", " new\r4\n\n"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.csv.run.json"]
    progress = json.loads((tmp_path / "out.csv.run.json").read_text())
    assert (progress["rows"], progress["rows_done"], progress["settings"]) == (5, 5, SETTINGS)


@pytest.mark.parametrize("groups_done", [0, 1, 2])
def test_a_cut_off_file_is_completed_and_taken_up(tmp_path: Path, groups_done: int) -> None:
    """Whatever part of the last group reached the disk."""
    whole = complete(tmp_path / "whole.csv")
    path = tmp_path / "cut.csv"
    groups = plan_groups(ROWS, 2, overwrite=False)
    starts = [0]
    with RejectFile(str(path), ROWS, SETTINGS) as file:
        for group in groups[:groups_done]:
            starts.append(path.stat().st_size)
            file.append(group, {number: f" new\r{number}\n\n" for number in group.generated})
    content, progress = path.read_bytes(), (tmp_path / "cut.csv.run.json").read_bytes()
    for size in range(starts[-1], len(content) + 1):
        path.write_bytes(content[:size])
        (tmp_path / "cut.csv.run.json").write_bytes(progress)
        assert complete(path) == whole
        assert complete(path) == whole


@pytest.mark.parametrize("groups_done", [0, 1, 2])
def test_a_file_that_somebody_changed_is_refused_and_left_alone(tmp_path: Path, groups_done: int) -> None:
    path = tmp_path / "out.csv"
    with RejectFile(str(path), ROWS, SETTINGS) as file:
        for group in plan_groups(ROWS, 2, overwrite=False)[:groups_done]:
            file.append(group, dict.fromkeys(group.generated, "new"))
    content = path.read_bytes()
    swapped = bytearray(content)
    swapped[5] ^= 1
    for changed in (content + b"x,y,z\r\n", content[1:], bytes(swapped), b"x"):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"out\.csv was changed since it was written"):
            RejectFile(str(path), ROWS, SETTINGS)
        assert path.read_bytes() == changed


@pytest.mark.parametrize(
    "change",
    [
        {"rows_done": 5}, {"rows_done": 0}, {"rows_done": True}, {"bytes_done": 0}, {"input_sha256": ""},
        {"settings": {}}, {"last_group": ""}, {"more": 1},
    ],
)  # fmt: skip
def test_an_altered_progress_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path, progress_path = tmp_path / "out.csv", tmp_path / "out.csv.run.json"
    with RejectFile(str(path), ROWS, SETTINGS) as file:
        file.append(RejectGroup(0, 4, (0, 3)), {0: "r", 3: "s"})
    content = path.read_bytes()
    progress_path.write_text(json.dumps({**json.loads(progress_path.read_text()), **change}))
    with pytest.raises(DataError, match="missing, unreadable or was changed"):
        RejectFile(str(path), ROWS, SETTINGS)
    assert path.read_bytes() == content


def test_a_removed_output_is_begun_again_with_any_settings(tmp_path: Path) -> None:
    complete(tmp_path / "out.csv")
    (tmp_path / "out.csv").unlink()
    with RejectFile(str(tmp_path / "out.csv"), ROWS, {"seed": 2}) as file:
        assert file.rows_done == 0


def test_a_start_without_a_row_does_not_bind_the_next(tmp_path: Path) -> None:
    with RejectFile(str(tmp_path / "out.csv"), ROWS[:2], {"seed": 2, "batch": 16}):
        pass
    assert complete(tmp_path / "out.csv") == complete(tmp_path / "whole.csv")
    assert json.loads((tmp_path / "out.csv.run.json").read_text())["settings"] == SETTINGS


def test_what_is_not_this_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("somebody's own file")
    with pytest.raises(DataError, match="exists and is not the beginning of such a run"):
        RejectFile(str(path), ROWS, SETTINGS)
    assert path.read_text() == "somebody's own file"

    path.unlink()
    whole = complete(path)
    with pytest.raises(DataError, match="was begun with --seed 1, now it is 2"):
        RejectFile(str(path), ROWS, {**SETTINGS, "seed": 2})
    with pytest.raises(DataError, match=r"was begun with --seed 1, now it is left out"):
        RejectFile(str(path), ROWS, {**SETTINGS, "seed": ""})
    with pytest.raises(DataError, match="was begun with other input rows"):
        RejectFile(str(path), ROWS[:-1], SETTINGS)
    assert path.read_bytes() == whole
    (tmp_path / "out.csv.run.json").write_text("{")
    with pytest.raises(DataError, match="missing, unreadable or was changed"):
        RejectFile(str(path), ROWS, SETTINGS)


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        RejectFile(str(tmp_path / "none" / "out.csv"), ROWS, SETTINGS)
