"""Runs whose rows are computed in chunks: the results of runs without them, in files, figures and messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint
from running import Ended, metrics, run_script, stopped, train, write_documents

from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair

QUANT = {"quant": 1, "quant_type": "nf4"}
LENGTHS = [70, 54, 5, 20, 33, 12, 2, 41]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, documents and pairs, some longer than a chunk of 16."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_checkpoint(folder / "base.pth", with_state=True)
    data = write_documents(folder / "data", LENGTHS)
    pairs = [
        PreferencePair(list(range(1, 1 + 7 * n)), list(range(50, 52 + 3 * n)), list(range(80, 81 + 2 * n)))
        for n in range(1, 7)
    ]
    save_pairs(folder / "pairs.save", pairs)
    return {"load_model": folder / "base.pth", "data_file": data, "rlhf_train_file": folder / "pairs.save"}


def chosen(inputs: dict[str, Path], **flags: object) -> dict[str, object]:
    pairs = any(flags.get(name) for name in ("orpo", "dpo"))
    names = ("load_model", "rlhf_train_file" if pairs else "data_file")
    return {**{name: inputs[name] for name in names}, "epoch_count": 1, **flags}


RUNS: dict[str, dict[str, object]] = {
    "states, pack": {"dataload": "pack", "ctx_len": 70, "lr_init": 0.1, "accumulate_grad_batches": 2, **QUANT},
    "lora, pad": {"dataload": "pad", "ctx_len": 70, "micro_bsz": 3, "peft": "lora", "lora_r": 4, "lr_init": 1e-3},
    "full, get": {"dataload": "get", "ctx_len": 50, "micro_bsz": 2, "train_type": "none", "lr_init": 1e-3},
    "orpo": {"orpo": 1, "micro_bsz": 2, "lr_init": 0.1},
    "dpo, bone": {"dpo": 1, "micro_bsz": 2, "peft": "bone", "bone_r": 8, "lr_init": 1e-3},
}
FAST = ("states, pack", "dpo, bone")


@pytest.mark.parametrize(
    "flags", [pytest.param(RUNS[name], id=name, marks=[] if name in FAST else pytest.mark.slow) for name in RUNS]
)
def test_a_run_in_chunks_gives_what_one_without_gives(
    flags: dict[str, object], inputs: dict[str, Path], tmp_path: Path
) -> None:
    flags = chosen(inputs, **flags)
    held_out = {"val_file": flags.get("data_file", flags.get("rlhf_train_file"))}
    whole = train(tmp_path / "whole", **flags, **held_out)
    parts = train(tmp_path / "parts", **flags, **held_out, chunk_ctx=16, chunk_keep="host")
    assert "chunks     of 16 tokens where a row has more: the gradient of whole rows" in parts.out
    assert "chunks  " not in whole.out
    expected, found = (torch.load(tmp_path / name / "rwkv-final.pth", weights_only=True) for name in ("whole", "parts"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():  # in bf16, one rounding apart
        assert torch.allclose(found[key].float(), tensor.float(), rtol=1e-2, atol=2e-4), key
    for one, other in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "whole"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    # At DPO's start all rewards are 0, up to the rounding that decides who is ahead.
    before, expected_before = (re.sub("accuracy [0-9.]+%", "", _line(ended, "before:")) for ended in (parts, whole))
    assert before == expected_before
    if "dpo" in flags:
        assert _line(parts, "reference") == _line(whole, "reference")


def _line(ended: Ended, words: str) -> str:
    return next(line for line in ended.out.splitlines() if words in line)


def test_a_run_in_chunks_goes_on_in_others(inputs: dict[str, Path], tmp_path: Path) -> None:
    flags = chosen(inputs, ctx_len=70, dataload="pack", lr_init=0.1)
    train(tmp_path / "whole", **flags, chunk_ctx=16)
    stopped(2, tmp_path / "out", **flags, chunk_ctx=16)
    ended = run_script("train.py", proj_dir=tmp_path / "out", resume=1, accelerator="cpu")
    assert ended.code == 0, ended.err
    expected, found = (torch.load(tmp_path / name / "rwkv-final.pth", weights_only=True) for name in ("whole", "out"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("bptt_chunks", "code"), [(0, 0), (1, 2)])
def test_another_size_goes_on_where_it_changes_only_rounding(
    bptt_chunks: int, code: int, inputs: dict[str, Path], tmp_path: Path
) -> None:
    flags = chosen(inputs, ctx_len=70, dataload="pack", lr_init=0.1, chunk_ctx=16, bptt_chunks=bptt_chunks)
    stopped(2, tmp_path, **flags)
    ended = run_script("train.py", proj_dir=tmp_path, resume=1, accelerator="cpu", chunk_ctx=20)
    assert ended.code == code, ended.err
    expected = (
        "--chunk_ctx 20 was 16 before; sums are rounded in another order" if not code else "--chunk_ctx 20 was 16;"
    )
    assert expected in (ended.err if code else ended.out)


def test_auto_takes_whole_rows_where_they_fit(inputs: dict[str, Path], tmp_path: Path) -> None:
    ended = train(tmp_path, **chosen(inputs, ctx_len=70, epoch_count=1), chunk_ctx="auto")
    assert "note: --chunk_ctx auto: whole rows fit" in ended.out
    assert "chunks  " not in ended.out


@pytest.mark.parametrize(("bptt_chunks", "warned"), [(1, True), (0, False)])
def test_a_gradient_that_is_cut_before_the_states_is_said(
    bptt_chunks: int, warned: bool, inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Every answer stands behind the first chunk, so that nothing goes back to the initial states."""
    data = tmp_path / "chats.jsonl"
    data.write_text('{"prompt": "Long enough?", "response": "Yes."}\n' * 3, encoding="utf-8")
    flags = chosen(inputs, ctx_len=64, dataload="pad", chunk_ctx=16, epoch_steps=3, val_file=data)
    flags |= {"data_file": data, "bptt_chunks": bptt_chunks}
    ended = train(tmp_path / "run", **flags)
    assert ("states learn nothing from what stands behind a document's first chunk" in ended.out) == warned
    said = (
        "the gradient of step 1 is 0",
        "--bptt_chunks 1 ends it",
        "the gradient was 0 in 3 steps of 3, in which nothing",
    )
    assert [text in ended.err for text in said] == [warned] * 3
    losses = re.findall(r"held out   (?:un)?(?:tuned|loaded): loss (\d+\.\d+)", ended.out)
    assert (len(set(losses)) == 1) == warned, losses
