"""What kind of data a file holds."""

from pathlib import Path

from src.config.files import data_type_of


def test_the_data_type_is_found_from_the_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt", "c.idx", "c.bin"):
        (tmp_path / name).touch()
    names = ("a.jsonl", "missing.json", "b.txt", "c", "missing", "c.bin", "c.idx")
    found = [data_type_of(str(tmp_path / name)) for name in names]
    assert found == ["jsonl", "jsonl", "utf-8", *["binidx"] * 4]
