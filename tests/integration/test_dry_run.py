"""`--dry_run 1`: what a run would take, for every method, and nothing left of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint
from running import Ended, files_in, refusal, try_train, write_documents

from src.commands import dry_run
from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.training.trial import TRIED_BATCHES, ChosenBatches

pytestmark = pytest.mark.usefixtures("architecture")

METHODS: dict[str, dict[str, object]] = {
    "states": {},
    "nf4": {"quant": 1, "accumulate_grad_batches": 2, "val_steps": 2, "grad_cp": 0, "dropout": 0.1},
    "pissa": {"peft": "pissa", "pissa_r": 4, "quant": 1},
    "bone and states": {"peft": "bone", "bone_r": 8, "train_type": "states", "grad_cp": 2},
    "lisa": {"peft": "lisa", "lisa_r": 1, "lisa_k": 2},
    "full": {"train_type": "none", "weights": "bf16", "fused_update": 1, "dataload": "pad"},
    "chunks": {"chunk_ctx": 8, "micro_bsz": 2},
    "orpo": {"orpo": 1},
    "dpo": {"dpo": 1, "peft": "lora", "lora_r": 4},
}


@pytest.fixture(scope="module")
def files(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pth`, `documents`, `held-out`, `pairs.save`."""
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "base.pth", dtype=torch.bfloat16)
    write_documents(folder / "documents", [30, 12, 25, 18, 9, 33, 21])
    write_documents(folder / "held-out", [21, 14], seed=1)
    pairs = [PreferencePair(list(range(n, 2 * n)), [60 + n] * n, [90 + n] * (n + 1)) for n in range(3, 9)]
    save_pairs(folder / "pairs.save", pairs)
    return folder


def run(files: Path, folder: Path, **flags: object) -> Ended:
    pairs = {"orpo", "dpo"} & flags.keys()
    data = {"rlhf_train_file": files / "pairs.save"} if pairs else {"data_file": files / "documents"}
    data |= {"val_file": files / ("pairs.save" if pairs else "held-out")}
    return try_train(folder, dry_run=1, load_model=files / "base.pth", **data, **flags)


@pytest.mark.parametrize("name", METHODS)
def test_it_says_what_a_run_takes_and_leaves_nothing(name: str, files: Path, tmp_path: Path) -> None:
    before = {entry: (files / entry).read_bytes() for entry in files_in(files)}
    ended = run(files, tmp_path / "out", **METHODS[name])
    assert ended.code == 0, ended.err
    assert not files_in(tmp_path)
    assert {entry: (files / entry).read_bytes() for entry in files_in(files)} == before
    parts = dict(re.findall(r"^ {11}(\S.*?) +([\d,.]+)(?:   .*)?$", ended.out.split("estimated by part")[1], re.M))
    numbers = {part: float(number.replace(",", "")) for part, number in parts.items()}
    together, measured = numbers.pop("together"), numbers.pop("measured")
    assert sum(amount for part, amount in numbers.items() if part != "this machine has") == pytest.approx(
        together, abs=0.1
    )
    assert "what is trained" in numbers
    # The process may have been larger before; what it has at least is known.
    assert measured > 0.8 * together
    most = r"^fits       yes; at most about --(ctx_len|rlhf_max_corpus_len) [\d,]+ with --micro_bsz"
    assert re.search(most, ended.out, re.M)
    steps = re.search(r"^steps      ([\d,]+) ", ended.out, re.M)
    assert steps is not None
    assert re.search(rf"^time       .*: {steps[1]} steps of [\d.e-]+ s \(single ones differ by \d+%\)", ended.out, re.M)
    assert "nothing was trained or written" in ended.out


def test_a_fresh_model_is_tried_too(files: Path, tmp_path: Path, architecture: str) -> None:
    sizes = {"n_layer": 2, "n_embd": 64, "vocab_size": 257, "my_testing": architecture}
    ended = try_train(tmp_path / "out", dry_run=1, train_type="none", data_file=files / "documents", **sizes)
    assert ended.code == 0, ended.err
    assert not files_in(tmp_path)


def test_what_does_not_fit_is_said_with_the_ways_out(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dry_run, "try_steps", full)
    monkeypatch.setattr(dry_run, "free_bytes", lambda device: 1000.0)
    ended = run(files, tmp_path / "out", micro_bsz=2)
    assert ended.code == 2
    assert "fits       no: the machine ran out of" in ended.out
    assert "--micro_bsz 1 --accumulate_grad_batches 2" in ended.out
    assert "no length and no --micro_bsz would" in ended.out
    assert "time " not in ended.out
    assert not files_in(tmp_path)


def test_what_a_run_refuses_is_refused(files: Path, tmp_path: Path) -> None:
    said = refusal(try_train(tmp_path / "out", dry_run=1, load_model=files / "base.pth", data_file="/no"), tmp_path)
    assert "/no" in said


def test_chosen_batches_stand_for_a_data_set() -> None:
    class Numbered:
        def rounded(self, step: int, rounding: object) -> int:
            return 10 * step

    chosen = ChosenBatches(Numbered(), [3, 3, 0])  # type: ignore[arg-type]
    assert len(chosen) == 3
    assert [chosen.rounded(step, None) for step in range(4)] == [30, 30, 0, 30]  # type: ignore[arg-type]
    assert TRIED_BATCHES > 1
