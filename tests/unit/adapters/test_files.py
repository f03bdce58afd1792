"""What stands beside a file of tensors."""

from pathlib import Path

from src.adapters.files import said_beside, write_description


def test_a_name_that_leaves_no_room_for_a_suffix_has_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / ("x" * 255)).write_bytes(b"")
    assert said_beside(tmp_path / ("x" * 255)) is None
    assert said_beside(".") is None
    assert said_beside("/") is None


def test_what_a_json_file_says_of_the_file_of_its_name(tmp_path: Path) -> None:
    assert said_beside(tmp_path / "state.pth") is None
    write_description(tmp_path / "state.json", {"method": "states"})
    assert said_beside(tmp_path / "state.pth") == {"method": "states"}
    assert said_beside(tmp_path / "state.json") is None
