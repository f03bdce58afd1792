"""A run that was stopped and goes on ends like one that never stopped: the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_checkpoint, tiny_state_file
from running import (
    Ended,
    after_step,
    assert_same_end,
    files_in,
    go_on,
    interrupt,
    left_by_run,
    metrics,
    run_script,
    stopped,
    tensors_in,
    train,
    try_train,
    write_documents,
)
from tables import some

from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.training import stopper as stopping
from src.training.resume import RunWriter

pytestmark = pytest.mark.usefixtures("architecture")

LENGTHS = [30, 12, 25, 18, 9, 33]
WHOLE = {"train_type": "none", "n_layer": 2, "n_embd": 32, "head_size_a": 8, "vocab_size": 257, "ctx_len": 16}


@pytest.fixture(scope="module")
def base(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents."""
    return write_documents(tmp_path_factory.mktemp("data") / "documents", LENGTHS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pairs, one without a reject."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.save"
    made = [PreferencePair(list(range(n, 2 * n)), [60 + n] * n, [90 + n] * (n + 1)) for n in range(3, 9)]
    save_pairs(path, [*made, PreferencePair([70, 71], [72, 73, 74], [])])
    return path


KINDS: dict[str, dict[str, object]] = {
    "pad": {},
    "pack": {"dataload": "pack", "ctx_len": 40},
    "accumulated": {"accumulate_grad_batches": 2, "epoch_steps": 10},
    "dropout": {"dropout": 0.2},
    "weight decay": {"weight_decay": 0.1, "weight_decay_final": 0.01},
    "later epochs": {"epoch_begin": 2, "epoch_count": 5},
    "nf4": {"quant": 1},
    "tokens": {"my_exit_tokens": 16 * 1024, "epoch_steps": 7},
    "mixed": {"dataload": "pack", "ctx_len": 40, "mix": "others:0.4"},
    "together": {
        "dataload": "pack",
        "ctx_len": 40,
        "mix": "others:0.4",
        "accumulate_grad_batches": 2,
        "epoch_steps": 10,
        "dropout": 0.1,
        "weight_decay": 0.1,
        "weight_decay_final": 0.01,
        "lr_schedule": "wsd",
        "quant": 1,
    },
    "in order": {"data_shuffle": 0, "lr_schedule": "cos"},
    "wsd": {"lr_schedule": "wsd", "optim": "adamw8bit"},
}


class TestSameBits:
    @pytest.mark.parametrize(
        "step", some([1, 5, 8], 8), ids=["first step", "an epoch's end or inside", "inside an epoch"]
    )
    @pytest.mark.parametrize("kind", some(KINDS, "together", "later epochs", "tokens"))
    def test_sft(self, kind: str, step: int, base: Path, data: Path, tmp_path: Path) -> None:
        flags = {"load_model": base, "data_file": data, "epoch_steps": 5, "epoch_count": 3, **KINDS[kind]}
        if "mix" in flags:
            flags["mix"] = f"{write_documents(tmp_path / 'others', [8, 14, 21], seed=1)}:0.4"
        train(tmp_path / "whole", **flags)
        stopped(step, tmp_path / "parts", **flags)
        go_on(tmp_path / "parts")
        assert_same_end(tmp_path / "whole", tmp_path / "parts")

    @pytest.mark.parametrize("orpo_type", some([0, 1], 0))
    def test_orpo(self, orpo_type: int, base: Path, pairs: Path, tmp_path: Path) -> None:
        flags = {
            "load_model": base, "orpo": 1, "orpo_type": orpo_type, "rlhf_train_file": pairs, "val_file": pairs,
            "micro_bsz": 2, "accumulate_grad_batches": 2, "epoch_count": 3,
        }  # fmt: skip
        train(tmp_path / "whole", **flags)
        stopped(3, tmp_path / "parts", **flags)
        ended = go_on(tmp_path / "parts")
        assert_same_end(tmp_path / "whole", tmp_path / "parts")
        assert "pref_percentage" in metrics(tmp_path / "parts")[-1]
        assert "before: accuracy" in ended.out

    @pytest.mark.parametrize("kind", some(["dpo", "simpo"], "dpo"))
    def test_comparisons(self, kind: str, base: Path, pairs: Path, tmp_path: Path) -> None:
        """From a state, which is the reference of DPO, however far the run has come."""
        tiny_state_file(tmp_path / "start.pth", tiny_checkpoint(tmp_path / "same.pth", dtype=torch.bfloat16))
        flags = {
            "load_model": base, kind: 1, "rlhf_train_file": pairs, "val_file": pairs, "micro_bsz": 2, "epoch_count": 3,
            "load_state": tmp_path / "start.pth",
        }  # fmt: skip
        train(tmp_path / "whole", **flags)
        stopped(3, tmp_path / "parts", **flags)
        go_on(tmp_path / "parts")
        assert_same_end(tmp_path / "whole", tmp_path / "parts")

    @pytest.mark.parametrize("peft", some(["lora", "lisa"], "lora"))
    def test_states_that_stay_as_they_are(self, peft: str, base: Path, data: Path, tmp_path: Path) -> None:
        """They stand in the file alone that the run was given."""
        tiny_state_file(tmp_path / "start.pth", tiny_checkpoint(tmp_path / "same.pth", dtype=torch.bfloat16))
        sizes = {"lora_r": 4} if peft == "lora" else {"lisa_r": 1, "lisa_k": 2}
        flags = {
            "load_model": base, "data_file": data, "load_state": tmp_path / "start.pth", "peft": peft, "epoch_steps": 5,
            "epoch_count": 1, "lr_init": 1e-3, **sizes,
        }  # fmt: skip
        train(tmp_path / "whole", **flags)
        stopped(3, tmp_path / "parts", **flags)
        go_on(tmp_path / "parts")
        assert_same_end(tmp_path / "whole", tmp_path / "parts")

    def test_pissa_that_went_on_from_a_file(self, base: Path, data: Path, tmp_path: Path) -> None:
        """Its folder holds a copy of the factors that the file's training began with."""
        flags = {
            "load_model": base, "data_file": data, "peft": "pissa", "pissa_r": 4, "epoch_steps": 3, "epoch_count": 1,
            "lr_init": 1e-3,
        }  # fmt: skip
        train(tmp_path / "first", **flags)
        flags["load_adapter"] = tmp_path / "first" / "rwkv-final.pth"
        train(tmp_path / "whole", **flags)
        stopped(2, tmp_path / "parts", **flags)
        go_on(tmp_path / "parts")
        assert_same_end(tmp_path / "whole", tmp_path / "parts")
        train(tmp_path / "other", **{**flags, "load_adapter": "", "random_seed": 7})
        (tmp_path / "mixed").mkdir()
        for name in ("init_pissa.pth", "init_pissa.json"):
            (tmp_path / "mixed" / name).write_bytes((tmp_path / "other" / name).read_bytes())
        ended = try_train(tmp_path / "mixed", **flags)
        assert ended.code == 2
        assert "holds the init_pissa.pth of another training" in ended.err

    @pytest.mark.parametrize("optim", some(["adamw8bit", "lion8bit"], "adamw8bit"))
    def test_states_in_8_bits(self, optim: str, base: Path, data: Path, tmp_path: Path) -> None:
        """The embedding is large enough for them."""
        flags = {
            "train_type": "none", "load_model": base, "data_file": data, "ctx_len": 16, "epoch_steps": 4,
            "epoch_count": 2, "lr_init": 1e-3, "lr_final": 1e-3, "optim": optim,
        }  # fmt: skip
        train(tmp_path / "whole", **flags)
        stopped(3, tmp_path / "parts", **flags)
        saved = torch.load(tmp_path / "parts" / "rwkv-resume.pth", weights_only=True)
        assert any(tensor.dtype == torch.uint8 and tensor.numel() > 4096 for tensor in tensors_in(saved))
        go_on(tmp_path / "parts")
        assert_same_end(tmp_path / "whole", tmp_path / "parts")

    @pytest.mark.parametrize("fresh", some([True, False], True))
    def test_full_training(self, fresh: bool, base: Path, data: Path, tmp_path: Path) -> None:
        model: dict[str, object] = WHOLE if fresh else {"train_type": "none", "load_model": base, "ctx_len": 16}
        flags = {**model, "data_file": data, "epoch_steps": 4, "epoch_count": 2, "lr_init": 1e-2, "lr_final": 1e-3}
        train(tmp_path / "whole", weight_decay=0.01, dropout=0.1, **flags)
        stopped(3, tmp_path / "parts", weight_decay=0.01, dropout=0.1, **flags)
        go_on(tmp_path / "parts")
        assert_same_end(tmp_path / "whole", tmp_path / "parts")

    def test_many_stops(self, base: Path, data: Path, tmp_path: Path) -> None:
        flags = {"load_model": base, "data_file": data, "epoch_count": 2, "dropout": 0.1}
        train(tmp_path / "whole", **flags)
        stopped(1, tmp_path / "parts", **flags)
        for step in (3, 6, 7, 11):
            with after_step(step, interrupt):
                assert f"after step {metrics(tmp_path / 'parts')[-1]['step']}," in go_on(tmp_path / "parts").out
        go_on(tmp_path / "parts")
        assert_same_end(tmp_path / "whole", tmp_path / "parts")

    def test_what_came_after_the_save_is_done_again(self, base: Path, data: Path, tmp_path: Path) -> None:
        """A run that saves in step 2, is killed in step 5 while it writes a record, and has seen step 4."""
        flags = {"load_model": base, "data_file": data, "epoch_count": 2, "dropout": 0.1}
        train(tmp_path / "whole", **flags)

        class KilledError(BaseException):
            pass

        def kill(stopper: stopping.Stopper) -> None:
            raise KilledError

        folder = tmp_path / "parts"
        save = after_step(2, lambda stopper: os.kill(os.getpid(), signal.SIGUSR1))
        with save, after_step(5, kill), pytest.raises(KilledError):
            train(folder, **flags)
        assert len(metrics(folder)) == 5
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"run": "')
        (folder / ".rwkv-0.pth.0123abcd.unfinished").write_bytes(b"half")
        assert "after step 2," in go_on(folder).out
        assert_same_end(tmp_path / "whole", folder)

    def test_an_error_in_mid_run_loses_nothing(
        self, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flags = {"load_model": base, "data_file": data, "epoch_count": 2, "dropout": 0.1}
        train(tmp_path / "whole", **flags)
        folder = tmp_path / "parts"

        def fail(stopper: stopping.Stopper) -> None:
            def broken(step: int) -> None:
                raise OSError("the data are gone")

            monkeypatch.setattr("src.data.sampling.BatchDataset.rounded", lambda self, step, rounding: broken(step))

        with after_step(4, fail), pytest.raises(OSError, match="the data are gone"):
            train(folder, **flags)
        monkeypatch.undo()
        assert "after step 4," in go_on(folder).out
        assert_same_end(tmp_path / "whole", folder)


FOUR_EPOCHS = {"epoch_steps": 2, "epoch_count": 4}


class TestGenerations:
    def test_a_damaged_file_falls_back_to_the_one_before(self, base: Path, data: Path, tmp_path: Path) -> None:
        flags = {"load_model": base, "data_file": data, **FOUR_EPOCHS}
        train(tmp_path / "whole", **flags)
        folder = tmp_path / "parts"
        stopped(5, folder, **flags)
        assert {"rwkv-resume.pth", "rwkv-resume-previous.pth"} <= files_in(folder)
        content = (folder / "rwkv-resume.pth").read_bytes()
        (folder / "rwkv-resume.pth").write_bytes(content[: len(content) // 2])
        ended = go_on(folder)
        assert "going on from the save before it, rwkv-resume-previous.pth (step 4)" in ended.out
        assert_same_end(tmp_path / "whole", folder)

    def test_two_damaged_files_are_an_error(self, base: Path, data: Path, tmp_path: Path) -> None:
        stopped(5, tmp_path, load_model=base, data_file=data, **FOUR_EPOCHS)
        for name in ("rwkv-resume.pth", "rwkv-resume-previous.pth"):
            (tmp_path / name).write_bytes(b"PK\x03\x04")
        ended = run_script("train.py", proj_dir=tmp_path, resume=1)
        assert ended.code == 2
        assert "rwkv-resume.pth is incomplete" in ended.err

    def test_a_complete_run_keeps_none(self, base: Path, data: Path, tmp_path: Path) -> None:
        train(tmp_path, load_model=base, data_file=data, **FOUR_EPOCHS)
        assert files_in(tmp_path) == left_by_run(*(f"rwkv-{n}.pth" for n in range(4)))

    def test_save_minutes(self, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        steps: list[int] = []
        write = RunWriter.write

        def noted(self: RunWriter, saved: Any) -> None:
            steps.append(saved.steps)
            write(self, saved)
            self.wait()

        monkeypatch.setattr(RunWriter, "write", noted)
        train(tmp_path / "often", load_model=base, data_file=data, save_minutes=1e-9, epoch_steps=4, epoch_count=2)
        assert steps == [1, 2, 3, 4, 5, 6, 7]
        steps.clear()
        train(tmp_path / "rarely", load_model=base, data_file=data, epoch_steps=4, epoch_count=2)
        assert steps == [4]


@pytest.fixture(scope="module")
def begun(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """A run that was stopped, and its folder."""
    folder = tmp_path_factory.mktemp("begun") / "it's here"
    return stopped(2, folder, load_model=base, data_file=data, epoch_count=1), folder


class TestFlags:
    def refused(self, folder: Path, **flags: object) -> str:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        ended = run_script("train.py", proj_dir=folder, resume=1, **flags)
        assert ended.code == 2
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        return ended.err

    def test_the_command_that_goes_on_is_printed(self, begun: tuple[Ended, Path]) -> None:
        ended, folder = begun
        assert f"python train.py --proj_dir '{folder.parent}/it'\"'\"'s here' --resume 1" in ended.out

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ({"lr_init": 0.5, "micro_bsz": 2}, ["--lr_init 0.5 was 1.0", "--micro_bsz 2 was 1"]),
            ({"random_seed": 7}, ["--random_seed 7 was 42"]),
            ({"precision": "bf16"}, ["--precision bf16 was fp32"]),
            ({"quant": 1}, ["--quant 1 was 0"]),
            ({"ctx_len": 32, "epoch_count": 9}, ["--ctx_len 32 was 1024", "--epoch_count 9 was 1"]),
            ({"accumulate_grad_batches": 2}, ["micro batches per step: 2, was 1", "steps per epoch: 3, was 6"]),
        ],
    )
    def test_what_would_change_the_result_is_refused(
        self, flags: dict[str, object], said: list[str], begun: tuple[Ended, Path]
    ) -> None:
        message = self.refused(begun[1], **flags)
        assert all(words in message for words in said), message
        assert "would not go on with the run" in message

    def test_other_data_are_refused_and_other_names_are_not(
        self, begun: tuple[Ended, Path], base: Path, tmp_path: Path
    ) -> None:
        other = write_documents(tmp_path / "other", LENGTHS, seed=3)
        assert f"--data_file {other} was" in self.refused(begun[1], data_file=other)
        tiny_checkpoint(tmp_path / "base.pth", seed=5)
        assert "--load_model" in self.refused(begun[1], load_model=tmp_path / "base.pth")

    def test_data_that_changed_are_refused(self, base: Path, tmp_path: Path) -> None:
        documents = write_documents(tmp_path / "documents", LENGTHS)
        stopped(2, tmp_path / "out", load_model=base, data_file=documents, epoch_count=1)
        write_documents(tmp_path / "documents", LENGTHS, seed=3)
        assert "has changed since" in self.refused(tmp_path / "out")

    def test_harmless_differences_are_said(self, base: Path, data: Path, tmp_path: Path) -> None:
        train(tmp_path / "whole", load_model=base, data_file=data, epoch_count=1)
        stopped(2, tmp_path / "out", load_model=base, data_file=data, epoch_count=1)
        ended = go_on(tmp_path / "out", save_minutes=3, cuda_graph=0)
        assert "note: --save_minutes 3.0 was 0.0 before" in ended.out
        assert "note: --cuda_graph 0 was 1 before" in ended.out
        assert_same_end(tmp_path / "whole", tmp_path / "out")

    def test_nothing_to_resume(self, base: Path, data: Path, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "not there"):
            ended = run_script("train.py", proj_dir=folder, resume=1)
            assert ended.code == 2
            assert "--resume 1 has nothing to go on with" in ended.err
        train(tmp_path / "out", load_model=base, data_file=data, epoch_count=1)
        ended = run_script("train.py", proj_dir=tmp_path / "out", resume=1)
        assert ended.code == 2
        assert "the run there is finished" in ended.err


def test_epoch_begin_goes_on_with_that_epochs_documents(base: Path, data: Path, tmp_path: Path) -> None:
    common = {"load_model": base, "data_file": data, "epoch_steps": 4, "lr_init": 0, "lr_final": 0}
    train(tmp_path / "all", epoch_count=3, **common)
    tiny_state_file(tmp_path / "start.pth", tiny_checkpoint(tmp_path / "same.pth"))
    train(tmp_path / "last", epoch_begin=2, epoch_count=3, load_state=tmp_path / "start.pth", **common)
    tokens = [[row["tokens"] for row in metrics(tmp_path / name)] for name in ("all", "last")]
    assert tokens[1] == tokens[0][8:]


def test_records_of_two_runs_are_told_apart(base: Path, data: Path, tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, load_model=base, data_file=data, epoch_steps=2, epoch_count=1, overwrite=1)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 1, 2]
    assert len({row["run"] for row in rows}) == 2
    assert try_train(tmp_path, load_model=base, data_file=data).code == 2
