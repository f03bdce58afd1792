"""Which file a base model is."""

import hashlib
from pathlib import Path

import pytest

from src.errors import CheckpointError
from src.identity import FileIdentity


@pytest.mark.parametrize("at_once", [True, False])
def test_size_and_digest(at_once: bool, tmp_path: Path) -> None:
    path = tmp_path / "base.pth"
    path.write_bytes(b"weights" * 100)
    identity = FileIdentity(path, at_once=at_once)
    expected = {"file": "base.pth", "size_bytes": 700, "sha256": hashlib.sha256(b"weights" * 100).hexdigest()}
    assert identity.as_dict() == identity.as_dict() == expected


def test_a_file_that_goes_away_is_an_error_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "base.pth"
    path.write_bytes(b"x")
    identity = FileIdentity(path, at_once=False)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        _ = identity.sha256


def test_a_file_that_is_written_to_meanwhile_has_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "base.pth"
    path.write_bytes(b"x")
    identity = FileIdentity(path, at_once=False)
    path.write_bytes(b"xy")
    with pytest.raises(CheckpointError, match="was changed since the program began"):
        _ = identity.sha256
