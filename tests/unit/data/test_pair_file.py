"""Pair files: written and read back, and every content that is refused."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from src.data.pair_file import load_pairs, pairs_from_tuples, save_pairs
from src.data.preferences import PreferencePair
from src.errors import CheckpointError, DataError, UserError


def test_pairs_are_read_back_as_they_were_saved(tmp_path: Path) -> None:
    pairs = [PreferencePair([1, 2], [3], [4, 5]), PreferencePair([6], [7, 8], [], -1.5, -2.5)]
    save_pairs(tmp_path / "pairs.save", pairs)
    assert load_pairs(tmp_path / "pairs.save", 257) == pairs
    assert torch.load(tmp_path / "pairs.save", weights_only=True) == [pair.as_tuple() for pair in pairs]
    assert os.listdir(tmp_path) == ["pairs.save"]


def test_a_full_disk_is_told_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError) as caught:
        save_pairs(tmp_path / "pairs.save", [PreferencePair([1], [2], [3])] * 3)
    assert str(caught.value) == (
        f"{tmp_path / 'pairs.save'} cannot be written: No space left on device; 3 pairs are needed in {tmp_path}"
    )
    assert os.listdir(tmp_path) == []


def test_a_save_file_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"blocks.0.att.time_state": torch.zeros(1)}, "state.save")
    Path("text.save").write_text("prompt,chosen\n")
    Path("code.save").write_bytes(pickle.dumps(print))
    torch.save([print], "object.save")
    torch.save([os.system], "blocked.save")
    Path("cut.save").write_bytes(Path("state.save").read_bytes()[:200])
    for name, expected in [
        ("none.save", "does not exist; make it with PrepareOrpoDataset.py"),
        ("state.save", "holds dict, not a list of preference pairs"),
        ("text.save", "is a text file, not a pair file written by PrepareOrpoDataset.py"),
        ("code.save", "is a Python pickle"),
        ("object.save", "holds a Python object"),
        ("blocked.save", f"holds a Python object ({os.system.__module__}.system)"),
        ("cut.save", "is incomplete"),
    ]:
        with pytest.raises(UserError) as caught:
            load_pairs(name, 257)
        assert expected in str(caught.value), name


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"blocks.0.att.time_state": 1}, "holds dict, not a list of preference pairs"),
        ([], "holds an empty list"),
        (["text"], "pair 1 has str"),
        ([([1], [2], [3], 0.5, 0.5), ([1], [2], [3])], "pair 2 has 3 entries"),
        ([([1], "no", [3], 0.5, 0.5)], "no list of token ids as its chosen"),
        ([([1.5], [2], [3], 0.5, 0.5)], "no list of token ids as its prompt"),
        ([([1], [2], [[3]], 0.5, 0.5)], "no list of token ids as its reject"),
        ([([[1], [2, 3]], [2], [3], 0.5, 0.5)], "no list of token ids as its prompt"),
        ([([1], [], [3], 0.5, 0.5)], "has an empty chosen"),
        ([([], [2], [3], 0.5, 0.5)], "has an empty prompt"),
        ([([1], [257], [3], 0.5, 0.5)], "token 257 in its chosen, but the model knows 0 to 256"),
        ([([1], [2], [-3], 0.5, 0.5)], "token -3 in its reject"),
        ([([1], [2], [True], 0.5, 0.5)], "no list of token ids as its reject"),
        ([([1], [torch.tensor(2)], [3], 0.5, 0.5)], "no list of token ids as its chosen"),
        ([([1], [10**5000], [3], 0.5, 0.5)], "token of more than 40 digits in its chosen"),
        ([([1], [2], [3], True, 0.5)], "no number for a base log-probability"),
        ([([1], [2], [3], "a", 0.5)], "no number for a base log-probability"),
    ],
)
def test_pairs_from_tuples_refuses_other_content(content: object, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        pairs_from_tuples("some.save", content, 257)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("some.save")
