"""What kind of data a file holds."""

import os
from pathlib import Path

import pytest
from binidx_files import write_binidx

from src.config import TrainConfig
from src.config.recognition import files_of, recognise
from src.errors import ConfigError

LINES = '{"text": "a"}\n{"text": "b"}\n'


def found(path: Path, content: str | bytes = b"") -> tuple[str, str, str]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    kind = recognise(str(path))
    return kind.data_type, kind.problem, kind.surprise


def test_names_tell_where_there_is_no_content(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt", "c.idx", "c.bin"):
        (tmp_path / name).touch()
    names = ("a.jsonl", "missing.json", "b.txt", "c", "missing", "c.bin", "c.idx")
    assert [recognise(str(tmp_path / name)).data_type for name in names] == ["jsonl", "jsonl", "utf-8", *["binidx"] * 4]


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.ndjson", "a.JSONL", "a"])
@pytest.mark.parametrize("content", [LINES, "\ufeff\n" + LINES, LINES.replace("\n", "\r\n"), LINES.strip(), "{}"])
def test_json_lines_are_recognised_whatever_their_name(tmp_path: Path, name: str, content: str) -> None:
    data_type, problem, _ = found(tmp_path / name, content)
    assert (data_type, problem) == ("jsonl", "")


def test_a_line_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    assert found(tmp_path / "a.txt", '{"text": "' + "a" * (1 << 21) + '"}')[0] == "jsonl"
    assert found(tmp_path / "a.txt", LINES + '{"text": "' + "a" * (1 << 21) + '"}')[0] == "jsonl"
    assert found(tmp_path / "a.txt", "a" * (1 << 21)) == ("utf-8", "", "")


@pytest.mark.parametrize("content", ["once", "(a)\n{b}\n", "\0\1", b"\xff\xfe", "[1] Author\n", "[" * 100_000])
def test_plain_text_is_plain_text(tmp_path: Path, content: str | bytes) -> None:
    assert found(tmp_path / "a.txt", content) == ("utf-8", "", "")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", LINES + "prose\n", "is in part JSON"),
        ("a.txt", '{\n "text": "a"\n}\n', "is in part JSON"),
        ("a.txt", "[1, 2]\n", "is in part JSON"),
        ("a.csv", "prompt,chosen,reject\na,b,c\n", "table of preference pairs: .*PrepareOrpoDataset.py .*--orpo 1"),
        ("a.txt", '\ufeff"chosen";"prompt"\na;b\n', "table of preference pairs"),
        ("a.save", b"PK\x03\x04", "pairs go to --rlhf_train_file with --orpo 1"),
        ("a", b"MMIDIDX\0\0", "call it NAME.idx"),
    ],
)
def test_what_cannot_be_said_is_asked(tmp_path: Path, name: str, content: str | bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    given = {"load_model": "m.pth", "data_file": str(tmp_path / name)}
    with pytest.raises(ConfigError, match=f"--data_file .*{name} .*{problem}"):
        TrainConfig.from_flags(given)
    with pytest.raises(ConfigError, match=f"--val_file .*{name} .*{problem}"):
        TrainConfig.from_flags({**given, "data_file": "b.jsonl", "val_file": given["data_file"]})
    assert TrainConfig.from_flags({**given, "data_type": "utf-8"}).data_type == "utf-8"


def test_a_prefix_that_is_a_file_too(tmp_path: Path) -> None:
    write_binidx(tmp_path / "a", [[1, 2]])
    assert recognise(str(tmp_path / "a")).problem == ""
    assert "say with --data_type which is meant" in found(tmp_path / "a", LINES)[1]


def test_held_out_data_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.txt").write_text("plain")
    flags = {"load_model": "m.pth", "data_file": str(tmp_path / "a.jsonl"), "val_file": str(tmp_path / "b.txt")}
    with pytest.raises(ConfigError, match=r"b\.txt is read as utf-8, but --data_file .*a\.jsonl as jsonl"):
        TrainConfig.from_flags(flags)


def test_what_was_recognised_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(LINES)
    flags = {"load_model": "m.pth", "data_file": str(tmp_path / "a.csv")}
    assert f"--data_file {tmp_path}/a.csv holds JSON lines and is read as --data_type jsonl" in (
        TrainConfig.from_flags(flags).notes()
    )
    notes = TrainConfig.from_flags({**flags, "data_type": "utf-8"}).notes()
    assert any("is read as plain text, as --data_type utf-8 says" in note for note in notes)


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert recognise(str(tmp_path / "pipe")).data_type == "utf-8"
    assert recognise(str(tmp_path)).data_type == "utf-8"


def test_a_folder_that_is_more_than_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.config.recognition.MOST_IN_FOLDER", 3)
    for name in ("a.jsonl", "b/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINES)
    assert recognise(str(tmp_path)).data_type == "jsonl"
    (tmp_path / "b" / "notes").touch()
    given = {"load_model": "m.pth", "data_file": f"x.jsonl,{tmp_path}"}
    with pytest.raises(ConfigError, match=f"^{tmp_path} holds more than 3 files: name the folder, or the files, of"):
        TrainConfig.from_flags(given)


def test_folders_linked_into_a_folder_belong_to_it(tmp_path: Path) -> None:
    for name in ("data", "elsewhere/deeper"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere" / "deeper" / "a.jsonl").write_text(LINES)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")  # a circle
    assert files_of(str(tmp_path / "data")) == (str(tmp_path / "data" / "linked" / "deeper" / "a.jsonl"),)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    listed = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ConfigError, match=r"closed cannot be listed \(Permission denied\): name files"):
        files_of(str(tmp_path))
