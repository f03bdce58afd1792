"""Further data in a run: what the plan says, what a run that goes on compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import tiny_checkpoint
from running import run_script, stopped, train, try_train


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Of a run on chats with further texts and conversations, from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint("base.pth")
    chats = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(12)]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    Path("general").mkdir()
    Path("general/a.json").write_text(
        json.dumps(
            [{"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "!"}]} for n in range(9)]
        )
    )
    Path("texts.jsonl").write_text('{"text": "some text"}\n{"text": "and more"}\n')
    return {
        "load_model": "base.pth", "data_file": "chats.jsonl", "mix": "general:0.2,texts.jsonl:0.1", "epoch_count": 1,
    }  # fmt: skip


def test_the_plan_says_what_is_mixed_in(flags: dict[str, object], tmp_path: Path) -> None:
    out = train(tmp_path / "out", **flags).out
    assert "chats.jsonl: entries, 17 documents" in out
    assert "chats.jsonl: Recognised as prompt and response, 12 conversations." in out
    assert "general: Recognised as ShareGPT, 9 conversations." in out
    assert "chats.jsonl, general: Conversations are written in the template World chat" in out
    assert out.count("World chat") == 1
    assert "3 of 17 documents of a pass (17.6%; " in out
    assert "are from general, which has 9: each comes once before any comes twice." in out
    assert "2 of 17 documents of a pass (11.8%; " in out


def test_one_talks_as_in_the_own_data(flags: dict[str, object], tmp_path: Path) -> None:
    """However much text is mixed in."""
    Path("texts.jsonl").write_text('{"text": "some text"}\n' * 100)
    changed = {"mix": "texts.jsonl:0.5", "template": "question", "epoch_steps": 1}
    out = train(tmp_path / "out", **{**flags, **changed}).out
    assert "rwkv-final.pth --template question\n" in out


def test_a_run_goes_on_with_the_same_data_only(flags: dict[str, object], tmp_path: Path) -> None:
    stopped(2, tmp_path / "out", **flags)
    for changed in ({"mix": "general:0.3,texts.jsonl:0.1"}, {}):
        if not changed:
            Path("general/a.json").write_text('[{"text": "another"}]')
        ended = run_script("train.py", proj_dir=tmp_path / "out", resume=1, **changed)
        assert ended.code == 2
        assert "--resume 1 would not go on with the run" in ended.err
        assert "--mix general:0." in ended.err


def test_what_is_read_is_not_written_over(flags: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    Path("texts.jsonl").rename(tmp_path / "out" / "metrics.jsonl")
    ended = try_train(tmp_path / "out", **{**flags, "mix": f"{tmp_path}/out/metrics.jsonl:0.1"})
    assert ended.code == 2
    assert f"--mix {tmp_path}/out/metrics.jsonl" in ended.err
