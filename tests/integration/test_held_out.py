"""A share of the data held out (`--val_share`), and held-out data that are trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from factories import tiny_checkpoint
from running import (
    assert_same_end,
    go_on,
    metrics,
    refusal,
    run_script,
    stopped,
    train,
    try_train,
    write_documents,
)
from tables import some

from src.config import TrainConfig
from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.training import work


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pth`, `documents`, `held-out`, and `pairs.save`."""
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "base.pth")
    write_documents(folder / "documents", [*range(10, 30)])
    pairs = [PreferencePair([n // 2 + 1, 5], [60 + n] * 3, [90 + n] * 4) for n in range(20)]
    save_pairs(folder / "pairs.save", pairs)
    return folder


def given(files: Path, **flags: object) -> dict[str, object]:
    data = {} if "rlhf_train_file" in flags else {"data_file": files / "documents"}
    return {"load_model": files / "base.pth", "epoch_count": 1, "epoch_save": 0, **data, **flags}


@pytest.mark.parametrize("flags", some([{}, {"orpo": 1}, {"dpo": 1}], {}, {"orpo": 1}))
def test_a_share_is_held_out_and_stays_so(flags: dict[str, object], files: Path, tmp_path: Path) -> None:
    pairs = {"rlhf_train_file": files / "pairs.save"} if flags else {}
    all_flags = given(files, val_share=0.2, val_steps=5, **flags, **pairs)
    ended = train(tmp_path / "whole", **all_flags)
    assert re.search(r"held out   20 % of the data by --random_seed 42: 4 (documents|pairs)", ended.out)
    assert ended.out.count("held out   untuned: ") == ended.out.count("held out   tuned: ") == 1
    stopped(3, tmp_path / "two", **all_flags)
    go_on(tmp_path / "two")
    assert_same_end(tmp_path / "whole", tmp_path / "two")
    # An epoch is 16 of 20 documents or pairs.
    assert [row["step"] for row in metrics(tmp_path / "whole")][-1] == 16
    stopped(3, tmp_path / "three", **all_flags)
    changed = run_script("train.py", proj_dir=tmp_path / "three", resume=1, val_share=0.1)
    assert "--val_share 0.1 was 0.2" in changed.err


def test_every_rank_holds_the_same_out(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {name: str(value) for name, value in given(files, val_share=0.2, devices=2, dataload="pad").items()}
    config = TrainConfig.from_flags(flags)
    seen, held_out = [], []
    for rank in (0, 1):
        monkeypatch.setattr(work, "global_rank", lambda devices, rank=rank: rank)
        made = work.prepare_work(config, tiny_checkpoint(files / "base.pth"))
        seen += [index for step in range(8) for index in made.dataset[step].sample_indices]
        held_out.append(next(line for line in made.lines if line.startswith("held out")))
    assert sorted(seen) == list(range(16))
    assert held_out[0] == held_out[1]


def test_overlaps_are_said(files: Path, tmp_path: Path) -> None:
    both = write_documents(tmp_path / "both", [10, 11, 12, 40, 50])
    ended = train(tmp_path / "text", **given(files, val_file=both, epoch_steps=1))
    assert "warning: 3 of 5 held-out documents are in --data_file" in ended.out
    others = write_documents(tmp_path / "others", [10, 11, 12], seed=1)
    assert "too: of these" not in train(tmp_path / "none", **given(files, val_file=others, epoch_steps=1)).out
    entries = tmp_path / "entries.json"
    entries.write_text(json.dumps([{"prompt": f"{n}", "response": f"{n + 1}"} for n in range(4)]), encoding="utf-8")
    tiny_checkpoint(tmp_path / "bytes.pth", vocab_size=257)
    own = {"load_model": tmp_path / "bytes.pth", "data_file": entries, "val_file": entries}
    ended = train(tmp_path / "entries", **{**given(files, epoch_steps=1), **own})
    assert "warning: 4 of 4 held-out entries are in --data_file" in ended.out
    pairs = files / "pairs.save"
    ended = train(tmp_path / "pairs", **given(files, orpo=1, rlhf_train_file=pairs, val_file=pairs, epoch_steps=1))
    assert "warning: 20 of 20 held-out pairs are on prompts of --rlhf_train_file" in ended.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"val_share": 0.1, "val_file": "x"}, "--val_file and --val_share 0.1 both say what is held out"),
        ({"val_share": 1}, "--val_share 1 must be at least 0 and below 1"),
        ({"val_share": 0.1, "dataload": "get"}, "--val_share 0.1 holds documents out, and --dataload get"),
    ],
)
def test_what_cannot_be_held_out(flags: dict[str, object], said: str, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert said in refusal(try_train(folder, **given(files, **flags)), folder)
