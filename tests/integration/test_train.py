"""Whole runs of train.py on tiny models."""

import io
import json
import re
import shlex
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from binidx_files import write_binidx
from factories import tiny_checkpoint, tiny_shape, tiny_state_file
from running import (
    Ended,
    files_in,
    left_by_run,
    metrics,
    run_script,
    started,
    train,
    try_train,
    wait_until,
    write_documents,
)
from tables import some
from torch import Tensor

from src.checkpoint import load_state, open_checkpoint, save_model
from src.training.callbacks import StepControl

LENGTHS = [30, 12, 25, 18, 9, 33]
SHAPE = tiny_shape()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of two layers, bf16 like published ones."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents."""
    return write_documents(tmp_path_factory.mktemp("data") / "documents", LENGTHS)


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """One run of two epochs of three steps, and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "new" / "folder"
    return train(folder, load_model=base, data_file=data, epoch_steps=3, epoch_count=2, val_file=data), folder


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML from 3.11 on")
def test_the_flags_a_run_leaves_train_so_once_more(finished: tuple[Ended, Path], tmp_path: Path) -> None:
    left = finished[1] / "run.toml"
    ended = run_script("train.py", config=left, proj_dir=tmp_path / "again", accelerator="cpu")
    assert ended.code == 0, ended.err
    first, again = (states_in(folder / "rwkv-final.pth") for folder in (finished[1], tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert left.read_text() == (tmp_path / "again" / "run.toml").read_text()
    over = run_script("train.py", config=left, proj_dir=finished[1], overwrite=1)
    assert over.code == 2
    assert "would be written over" in over.err


def states_in(path: Path) -> dict[str, Tensor]:
    """States of a file in fp32."""
    return {name: state.float() for name, state in load_state(path, SHAPE).items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Over all states."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class TestWhatARunLeaves:
    def test_exactly_these_files(self, finished: tuple[Ended, Path]) -> None:
        assert files_in(finished[1]) == left_by_run("rwkv-0.pth", "rwkv-1.pth")

    def test_a_state_file_holds_the_states_and_nothing_else(self, finished: tuple[Ended, Path]) -> None:
        for name in ("rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth"):
            content = torch.load(finished[1] / name, weights_only=True)
            assert {key: tuple(state.shape) for key, state in content.items()} == SHAPE.state_shapes()
            assert {state.dtype for state in content.values()} == {torch.bfloat16}
            assert all(state.any() and state.isfinite().all() for state in content.values())
            values = SHAPE.head_size**2 * SHAPE.n_head
            assert all(state.untyped_storage().nbytes() == 2 * values for state in content.values())

    def test_the_final_file_is_the_last_epochs(self, finished: tuple[Ended, Path]) -> None:
        folder = finished[1]
        assert largest_difference(states_in(folder / "rwkv-final.pth"), states_in(folder / "rwkv-1.pth")) == 0
        assert largest_difference(states_in(folder / "rwkv-final.pth"), states_in(folder / "rwkv-0.pth")) > 0

    def test_train_log_has_the_originals_lines(self, finished: tuple[Ended, Path]) -> None:
        lines = (finished[1] / "train_log.txt").read_text(encoding="utf-8").splitlines()
        assert re.fullmatch(r"NEW RUN \d{4}(-\d\d){5}", lines[0])
        assert eval(lines[1], {"__builtins__": {}})["ctx_len"] == 1024
        epoch_line = re.compile(
            r"(\d+) (\d+\.\d{6}) (\d+\.\d{4}) (\d\.\d{8}) \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} (\d+)"
        )
        epochs = [epoch_line.fullmatch(line) for line in lines[2:]]
        assert [match and (match[1], match[5]) for match in epochs] == [("0", "0"), ("1", "1")]
        lines = metrics(finished[1])
        for number, match in enumerate(epochs):
            assert match
            mean = sum(line["loss"] for line in lines[3 * number : 3 * number + 3]) / 3
            assert float(match[2]) == pytest.approx(mean, abs=1e-6)
            assert float(match[3]) == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-3)
            assert float(match[4]) == pytest.approx(lines[3 * number + 2]["lr"])

    def test_metrics_has_one_line_per_step(self, finished: tuple[Ended, Path]) -> None:
        lines = metrics(finished[1])
        keys = {
            "run", "step", "epoch", "loss", "lr", "weight_decay", "grad_norm", "seconds", "tokens", "tokens_per_s",
        }  # fmt: skip
        assert [set(line) for line in lines] == [keys] * 6
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
        assert [line["lr"] for line in lines] == pytest.approx([0.2, 0.28, 0.36, 0.44, 0.52, 0.6])
        assert sorted(line["tokens"] + 1 for line in lines) == sorted(LENGTHS)

    def test_the_plan_comes_first(self, finished: tuple[Ended, Path]) -> None:
        out = finished[0].out
        for expected in (
            "2 layers, n_embd 32, 4 heads of 8",
            f"{SHAPE.state_parameter_count:,} state values",
            f"6 documents, {sum(LENGTHS)} tokens",
            "6 (2 epochs of 3)",
            "0.2, 0.44, 0.6 (start, middle, end)",
            f"{finished[1]}/",
        ):
            assert expected in out
        assert out.index("results") < out.index("held out   untuned")

    def test_it_ends_with_the_next_command_which_works(self, finished: tuple[Ended, Path], base: Path) -> None:
        command = re.search(r"python (merge_state\.py) (\S+) (\S+) (\S+)", finished[0].out)
        assert command
        assert command[2] == str(base)
        merged = run_script(*command.groups())
        assert merged.code == 0
        assert open_checkpoint(command[4]).info.has_state
        Path(command[4]).unlink()

    def test_the_commands_for_clients_and_the_chat_work(
        self, finished: tuple[Ended, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All that are printed, as they are printed."""
        commands = re.findall(r"^ +python -m src\.commands\.(\w+) (.+)$", finished[0].out, re.MULTILINE)
        assert [name for name, _ in commands] == ["chat", "state"]
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        for name, words in commands:
            ended = run_script(f"src/commands/{name}.py", *shlex.split(words))
            assert ended.code == 0, ended.err
        exported = finished[1] / "rwkv-final.st"
        assert exported.exists()
        exported.unlink()

    def test_held_out_loss_falls_on_the_training_data_itself(self, finished: tuple[Ended, Path]) -> None:
        losses = re.findall(r"held out   (untuned|tuned): loss (\d+\.\d+)", finished[0].out)
        assert [label for label, _ in losses] == ["untuned", "tuned"]
        assert float(losses[1][1]) < float(losses[0][1])

    def test_progress_shows_loss_rate_and_speed(self, finished: tuple[Ended, Path]) -> None:
        assert re.search(r"6/6 .*loss \d+\.\d+, lr 0\.6, [\d,]+ tokens/s", finished[0].err)


def test_documents_share_rows_by_default(base: Path, data: Path, tmp_path: Path) -> None:
    given = {"load_model": base, "data_file": data, "proj_dir": tmp_path, "accelerator": "cpu", "epoch_count": 1}
    ended = run_script("train.py", **given, ctx_len=32)
    assert ended.code == 0, ended.err
    assert "--dataload pack" in ended.out
    assert "positions a step at most, ctx_len 32" in ended.out
    lines = metrics(tmp_path)
    assert sum(line["tokens"] for line in lines) == sum(min(length, 33) - 1 for length in LENGTHS)
    assert len(lines) < len(LENGTHS)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_a_state_tuned_on_a_packed_base_is_measured_on_the_unpacked_one_too(
    quant_type: str, base: Path, data: Path, tmp_path: Path
) -> None:
    given = {"load_model": base, "data_file": data, "val_file": data, "epoch_count": 1}
    out = train(tmp_path / "packed", **given, quant=1, quant_type=quant_type).out
    state = tmp_path / "packed" / "rwkv-final.pth"
    again = train(tmp_path / "again", **given, load_state=state).out
    loaded = re.search(r"held out   loaded: (.*)", again)
    assert loaded
    assert f"held out   unpacked: {loaded[1]}\n" in out
    assert f"after, on the unpacked base: {loaded[1]}\n" in out
    assert quant_type == "int8" or f"held out   tuned: {loaded[1]}" not in out
    assert "unpacked" not in again


def test_the_gradient_of_a_step_is_clipped_to_a_norm_of_one(base: Path, data: Path, tmp_path: Path) -> None:
    """Adam's first step is g / (|g| + eps): with an eps of 1 it shows the gradient it was given."""
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(base).items()}
    tensors["head.weight"] *= 30
    save_model(tmp_path / "steep.pth", tensors)
    flags = {"epoch_steps": 1, "epoch_count": 1, "warmup_steps": 0, "lr_init": 8.0, "lr_final": 8.0, "adam_eps": 1.0}
    train(tmp_path / "out", load_model=tmp_path / "steep.pth", data_file=data, **flags)
    (record,) = metrics(tmp_path / "out")
    assert record["grad_norm"] > 3
    step = torch.cat([state.flatten() for state in states_in(tmp_path / "out" / "rwkv-final.pth").values()]).abs() / 8
    assert float((step / (1 - step)).norm()) == pytest.approx(1.0, rel=0.01)  # the states are saved in bf16


class TestEpochs:
    @pytest.mark.parametrize(
        ("flags", "files"),
        [
            ({"epoch_count": 4, "epoch_save": 2}, {"rwkv-0.pth", "rwkv-2.pth", "rwkv-3.pth"}),
            ({"epoch_count": 3, "epoch_save": 0}, {"rwkv-2.pth"}),
            ({"epoch_count": 4, "epoch_begin": 2}, {"rwkv-2.pth", "rwkv-3.pth"}),
            ({"epoch_count": 9, "my_exit": 1}, {"rwkv-0.pth", "rwkv-1.pth"}),
        ],
        ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
    )
    def test_which_are_saved(
        self, flags: dict[str, int], files: set[str], base: Path, data: Path, tmp_path: Path
    ) -> None:
        train(tmp_path, load_model=base, data_file=data, epoch_steps=1, **flags)
        assert files_in(tmp_path) == left_by_run(*files)

    def test_no_epoch_steps_means_one_pass(self, base: Path, data: Path, tmp_path: Path) -> None:
        train(tmp_path, load_model=base, data_file=data, epoch_count=1)
        assert sorted(line["tokens"] + 1 for line in metrics(tmp_path)) == sorted(LENGTHS)

    def test_my_exit_tokens_ends_the_run(self, base: Path, data: Path, tmp_path: Path) -> None:
        ended = train(
            tmp_path, load_model=base, data_file=data, ctx_len=40, epoch_steps=50, my_exit_tokens=160, warmup_steps=0
        )
        lines = metrics(tmp_path)
        assert len(lines) == 8  # of 121 / 6 tokens in the mean
        assert sum(line["tokens"] for line in lines) == pytest.approx(160, abs=max(LENGTHS))
        assert "stopped after 8 steps, which hold --my_exit_tokens 160 in the mean" in ended.out
        assert "rwkv-final.pth" in files_in(tmp_path)

    def test_logs_are_appended(self, base: Path, data: Path, tmp_path: Path) -> None:
        for _ in range(2):
            train(tmp_path, load_model=base, data_file=data, epoch_steps=1, epoch_count=1, overwrite=1)
        assert (tmp_path / "train_log.txt").read_text(encoding="utf-8").count("NEW RUN") == 2
        assert len(metrics(tmp_path)) == 2


class TestSameness:
    @pytest.mark.parametrize(
        "flags",
        [{"micro_bsz": 2}, {"dataload": "pack", "ctx_len": 40}, {"dataload": "get", "ctx_len": 16}],
        ids=["pad", "pack", "get"],
    )
    def test_two_runs_are_bitwise_equal(self, flags: dict[str, object], base: Path, data: Path, tmp_path: Path) -> None:
        for name in ("one", "two"):
            train(tmp_path / name, load_model=base, data_file=data, epoch_steps=4, epoch_count=1, **flags)
        final = [tmp_path / name / "rwkv-final.pth" for name in ("one", "two")]
        assert largest_difference(states_in(final[0]), states_in(final[1])) == 0
        losses = [[r["loss"] for r in metrics(tmp_path / name)] for name in ("one", "two")]
        assert losses[0] == losses[1]

    def test_another_seed_is_another_run(self, base: Path, data: Path, tmp_path: Path) -> None:
        for seed in (1, 2):
            train(tmp_path / str(seed), load_model=base, data_file=data, epoch_steps=3, epoch_count=1, random_seed=seed)
        assert [r["loss"] for r in metrics(tmp_path / "1")] != [r["loss"] for r in metrics(tmp_path / "2")]

    @pytest.mark.parametrize("lengths", [[16] * 8, LENGTHS], ids=["equal lengths", "unequal lengths"])
    def test_accumulating_2_times_1_equals_1_times_2(self, lengths: list[int], base: Path, tmp_path: Path) -> None:
        """Every token of a step weighs the same, however the step is cut into micro-batches."""
        documents = write_documents(tmp_path / "documents", lengths)
        common = {"load_model": base, "data_file": documents, "epoch_count": 1, "lr_init": 0.1, "lr_final": 0.1}
        train(tmp_path / "1x2", micro_bsz=2, epoch_steps=3, **common)
        train(tmp_path / "2x1", micro_bsz=1, accumulate_grad_batches=2, epoch_steps=6, **common)
        one, two = metrics(tmp_path / "1x2"), metrics(tmp_path / "2x1")
        assert len(one) == len(two) == 3
        assert [r["tokens"] for r in one] == [r["tokens"] for r in two]
        assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-5)
        assert [r["grad_norm"] for r in one] == pytest.approx([r["grad_norm"] for r in two], rel=1e-4)
        one_state, two_state = (
            states_in(tmp_path / "1x2" / "rwkv-final.pth"),
            states_in(tmp_path / "2x1" / "rwkv-final.pth"),
        )
        assert largest_difference(one_state, two_state) < 2e-3  # a unit in bf16's last place at 0.3

    def test_recomputation_changes_nothing_but_rounding(self, base: Path, data: Path, tmp_path: Path) -> None:
        for grad_cp in (0, 1):
            train(
                tmp_path / str(grad_cp), load_model=base, data_file=data, epoch_steps=3, epoch_count=1, grad_cp=grad_cp
            )
        final = [states_in(tmp_path / name / "rwkv-final.pth") for name in ("0", "1")]
        assert largest_difference(*final) < 2e-3  # a unit in bf16's last place at 0.3


class TestStarts:
    def test_load_state_starts_from_the_file(self, base: Path, data: Path, tmp_path: Path) -> None:
        tiny_state_file(tmp_path / "start.pth", SHAPE, seed=9)
        common = {"load_model": base, "data_file": data, "epoch_steps": 1, "epoch_count": 1}
        train(tmp_path / "still", load_state=tmp_path / "start.pth", lr_init=0, lr_final=0, **common)
        kept = states_in(tmp_path / "still" / "rwkv-final.pth")
        assert largest_difference(kept, states_in(tmp_path / "start.pth")) == 0

    def test_a_state_of_another_model_is_mentioned(self, base: Path, data: Path, tmp_path: Path) -> None:
        tiny_state_file(tmp_path / "start.pth", SHAPE, seed=9)
        (tmp_path / "start.json").write_text('{"base": {"file": "x", "size_bytes": 5}}')
        common = {"load_model": base, "data_file": data, "epoch_steps": 1, "epoch_count": 1}
        ended = train(tmp_path / "out", load_state=tmp_path / "start.pth", **common)
        assert f"note: {tmp_path}/start.pth was trained on x of 5 bytes, another model" in ended.out

    def test_a_merged_base_continues_from_its_state(self, base: Path, data: Path, tmp_path: Path) -> None:
        tiny_state_file(tmp_path / "start.pth", SHAPE, seed=9)
        assert run_script("merge_state.py", base, tmp_path / "start.pth", tmp_path / "merged.pth").code == 0
        common = {"data_file": data, "epoch_steps": 3, "epoch_count": 1}
        train(tmp_path / "merged", load_model=tmp_path / "merged.pth", **common)
        train(tmp_path / "loaded", load_model=base, load_state=tmp_path / "start.pth", **common)
        train(tmp_path / "zero", load_model=base, **common)
        final = {name: states_in(tmp_path / name / "rwkv-final.pth") for name in ("merged", "loaded", "zero")}
        assert largest_difference(final["merged"], final["loaded"]) == 0
        assert largest_difference(final["merged"], final["zero"]) > 0.1

    def test_load_state_wins_over_the_state_of_a_merged_base(self, base: Path, data: Path, tmp_path: Path) -> None:
        tiny_state_file(tmp_path / "first.pth", SHAPE, seed=1)
        tiny_state_file(tmp_path / "second.pth", SHAPE, seed=2)
        assert run_script("merge_state.py", base, tmp_path / "first.pth", tmp_path / "merged.pth").code == 0
        train(
            tmp_path / "out", load_model=tmp_path / "merged.pth", load_state=tmp_path / "second.pth",
            data_file=data, epoch_steps=1, epoch_count=1, lr_init=0, lr_final=0,
        )  # fmt: skip
        final = states_in(tmp_path / "out" / "rwkv-final.pth")
        assert largest_difference(final, states_in(tmp_path / "second.pth")) == 0


class TestModes:
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4", "4bit", "int8"])
    def test_quantised(self, quant_type: str, data: Path, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth", n_embd=64, dtype=torch.bfloat16)
        train(
            tmp_path / "out", load_model=tmp_path / "base.pth", data_file=data, quant=1, quant_type=quant_type,
            epoch_steps=2, epoch_count=1,
        )  # fmt: skip
        assert len(metrics(tmp_path / "out")) == 2
        said = json.loads((tmp_path / "out" / "rwkv-final.json").read_text())
        assert said["quant"] == ("fp4" if quant_type == "4bit" else quant_type)

    def test_bf16(self, base: Path, data: Path, tmp_path: Path) -> None:
        common = {"load_model": base, "data_file": data, "epoch_steps": 3, "epoch_count": 1}
        for precision in ("bf16", "fp32"):
            train(tmp_path / precision, precision=precision, **common)
        losses = {name: [r["loss"] for r in metrics(tmp_path / name)] for name in ("bf16", "fp32")}
        assert losses["bf16"] != losses["fp32"]
        assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)

    @pytest.mark.parametrize("strategy", ["deepspeed_stage_1", "deepspeed_stage_2_offload"])
    def test_deepspeed_on_a_cpu_is_said_to_be_a_single_device(
        self, strategy: str, base: Path, data: Path, tmp_path: Path
    ) -> None:
        ended = train(tmp_path, load_model=base, data_file=data, strategy=strategy, epoch_steps=1, epoch_count=1)
        assert f"note: --strategy {strategy} needs a GPU: running on a single device instead" in ended.out

    def test_generated_data(self, base: Path, tmp_path: Path) -> None:
        train(tmp_path, load_model=base, data_type="dummy", epoch_steps=2, epoch_count=1)
        assert len(metrics(tmp_path)) == 2

    def test_chats_train_on_answers_only(self, base: Path, tmp_path: Path) -> None:
        lines = [
            {"prompt": "Say a.", "response": "a\n\nb"},
            {"messages": [{"role": "user", "content": "b?"}, {"role": "assistant", "content": "b"}]},
            {"text": "User: c?\n\nAssistant: c"},
        ]
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        ended = train(tmp_path / "out", load_model=base, data_file=path, epoch_count=2)
        assert "the loss is on answers only" in ended.out
        assert "blank lines" in ended.out
        assert len(metrics(tmp_path / "out")) == 6

    def test_a_fresh_model_is_trained_whole_and_can_then_be_tuned(self, data: Path, tmp_path: Path) -> None:
        folder = tmp_path / "whole"
        ended = train(
            folder, train_type="none", n_layer=2, n_embd=32, head_size_a=8, vocab_size=257, data_file=data, ctx_len=16,
            epoch_steps=4, epoch_count=1, lr_init=1e-2, lr_final=1e-3, micro_bsz=2, weight_decay=0.01,
        )  # fmt: skip
        assert files_in(folder) == left_by_run("rwkv-0.pth") | {"rwkv-init.pth"}
        shape = open_checkpoint(folder / "rwkv-final.pth").info.shape
        assert (shape.n_layer, shape.n_embd, shape.head_size, shape.vocab_size) == (2, 32, 8, 257)
        first, last = open_checkpoint(folder / "rwkv-init.pth"), open_checkpoint(folder / "rwkv-final.pth")
        assert list(last) == list(shape.parameter_shapes())
        unmoved = [name for name in last if torch.equal(first[name].float(), last[name].float())]
        assert len(unmoved) < len(last) / 4, unmoved
        assert not torch.equal(first["head.weight"].float(), last["head.weight"].float())

        assert f"python train.py --load_model {folder / 'rwkv-final.pth'}" in ended.out
        train(tmp_path / "tuned", load_model=folder / "rwkv-final.pth", data_file=data, epoch_steps=2, epoch_count=1)
        assert files_in(tmp_path / "tuned") == left_by_run("rwkv-0.pth")

    def test_state_tuning_learns(self, base: Path, data: Path, tmp_path: Path) -> None:
        train(tmp_path, load_model=base, data_file=data, epoch_count=8, ctx_len=24)
        lines = metrics(tmp_path)
        epochs = [sum(r["loss"] for r in lines if r["epoch"] == epoch) / 6 for epoch in (0, 7)]
        assert epochs[1] < epochs[0] - 0.03


class TestStops:
    @pytest.fixture
    def poisoned(self, base: Path, tmp_path: Path) -> Path:
        """A base whose row for token 200 is finite, but too large for the norm that follows."""
        tensors = {name: tensor.clone() for name, tensor in open_checkpoint(base).items()}
        tensors["emb.weight"][200] = 3e38
        tensors["emb.weight"][200, ::2] = -3e38
        save_model(tmp_path / "poisoned.pth", tensors)
        return tmp_path / "poisoned.pth"

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_good_state(
        self, accumulate: int, poisoned: Path, base: Path, tmp_path: Path
    ) -> None:
        documents = [[5, 6, 7 + number, 8, 9, 0] for number in range(6)]
        documents[3][2] = 200
        write_binidx(tmp_path / "documents", documents)
        ended = try_train(
            tmp_path / "out", load_model=poisoned, data_file=tmp_path / "documents",
            accumulate_grad_batches=accumulate, epoch_count=1,
        )  # fmt: skip
        assert ended.code == 2
        assert "Traceback" not in ended.err
        taken = len(metrics(tmp_path / "out"))
        message = ended.err.splitlines()[-1]
        assert f"the loss is not finite at step {taken + 1} " in message
        assert re.search(r"\b3\b", message.partition("step")[2].partition(" ")[2])
        logs = {"train_log.txt", "metrics.jsonl", "run.toml"}
        if not taken:
            assert "it is the first, so that what was loaded gives it" in message
            assert files_in(tmp_path / "out") == logs
            return
        where = tmp_path / "out" / "rwkv-last-good.pth"
        assert f"the weights after step {taken - 1}, which gave a finite loss and gradient, are in {where}" in message
        assert files_in(tmp_path / "out") == {*logs, "rwkv-last-good.pth", "rwkv-last-good.json"}
        healthy = {"load_model": base, "data_file": tmp_path / "documents", "accumulate_grad_batches": accumulate}
        before = self.states_before(taken, tmp_path / "healthy", **healthy)
        assert largest_difference(states_in(where), before) == 0

    @staticmethod
    def states_before(step: int, folder: Path, **flags: object) -> dict[str, Tensor]:
        """What a step of a run with these flags starts from, as a file would hold it."""
        kept: list[dict[str, Tensor]] = []
        count = StepControl.on_before_optimizer_step

        def look(self: StepControl, trainer: Any, module: Any, optimizer: Any) -> None:
            if self._step == step:
                kept.append({name: p.detach().bfloat16().float() for name, p in module.trained()})
            count(self, trainer, module, optimizer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepControl, "on_before_optimizer_step", look)
            train(folder, epoch_count=1, **flags)
        return kept[-1]

    @pytest.mark.parametrize(
        "number", some([signal.SIGINT, signal.SIGTERM], signal.SIGINT), ids=lambda number: number.name
    )
    def test_a_signal_finishes_the_step_and_saves(
        self, number: signal.Signals, base: Path, data: Path, tmp_path: Path
    ) -> None:
        flags = [
            *("--load_model", base, "--data_file", data, "--proj_dir", tmp_path, "--accelerator", "cpu", "--quant", 0),
            *("--epoch_steps", 100_000, "--plot", 0),
        ]
        with started("train.py", *flags) as process:
            wait_until(lambda: len(metrics(tmp_path)) >= 3 or process.poll() is not None, seconds=60)
            process.send_signal(number)
            out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        assert f"stopped by {number.name} after {len(metrics(tmp_path))} steps" in out
        assert f"python train.py --proj_dir {tmp_path} --resume 1" in out
        assert files_in(tmp_path) == {*left_by_run(), "rwkv-resume.pth"}, "rwkv-0.pth would claim a whole epoch"
        assert any(state.any() for state in states_in(tmp_path / "rwkv-final.pth").values())


class TestOutside:
    @pytest.fixture
    def server(self) -> Iterator[tuple[str, list[tuple[str, dict[str, float]]]]]:
        """An address, and what was posted there."""
        posted: list[tuple[str, dict[str, float]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                posted.append((self.path, json.loads(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        http = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/", posted
        http.shutdown()
        thread.join()
        http.server_close()

    def test_the_callback_posts_when_asked(
        self, server: tuple[str, list[tuple[str, dict[str, float]]]], base: Path, data: Path, tmp_path: Path
    ) -> None:
        address, posted = server
        train(
            tmp_path, load_model=base, data_file=data, epoch_steps=2, epoch_count=1, fapi_logging_callback=1,
            fapi_logging_address=address,
        )  # fmt: skip
        assert [path for path, _ in posted] == ["/LoggingCallback"] * 2
        losses = [line["loss"] for line in metrics(tmp_path)]
        assert [body for _, body in posted] == [
            {"step": step, "loss": loss, "loss2": 0.0, "pref": 0.0} for step, loss in enumerate(losses, start=1)
        ]

    def test_a_schedulers_surroundings_change_nothing(
        self, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Lightning would restore a checkpoint of this name, of whatever model, and answer SIGUSR1 by a requeue."""
        flags = {"load_model": base, "data_file": data, "epoch_steps": 2, "epoch_count": 1}
        train(tmp_path / "plain", **flags)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "slurm").mkdir()
        for folder in (tmp_path, tmp_path / "slurm"):
            (folder / "hpc_ckpt_1.ckpt").write_bytes(b"of another model")
        for name, value in (("JOB_ID", "7"), ("NTASKS", "2"), ("PROCID", "0"), ("LOCALID", "0"), ("JOB_NAME", "train")):
            monkeypatch.setenv(f"SLURM_{name}", value)
        train(tmp_path / "slurm", **flags)
        plain, under_slurm = (load_state(tmp_path / name / "rwkv-final.pth", SHAPE) for name in ("plain", "slurm"))
        assert all(torch.equal(plain[name], under_slurm[name]) for name in plain)

    def test_a_deaf_callback_address_stops_nothing(self, base: Path, data: Path, tmp_path: Path) -> None:
        ended = train(
            tmp_path, load_model=base, data_file=data, epoch_steps=2, epoch_count=1, fapi_logging_callback=1,
            fapi_logging_address="http://127.0.0.1:9/",
        )  # fmt: skip
        assert ended.err.count("does not answer") == 1

    @pytest.mark.slow
    def test_wandb_without_an_account_or_network_goes_on_offline(
        self, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("WANDB_MODE", "WANDB_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path / "home")}
        words = [
            *("--load_model", base, "--data_file", data, "--proj_dir", tmp_path / "out", "--accelerator", "cpu"),
            *("--quant", 0, "--epoch_steps", 2, "--epoch_count", 1, "--wandb", "project"),
        ]
        with started("train.py", *words, environment=environment) as process:
            _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert "logging offline" in err
        assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))

    def test_nothing_is_sent_unless_asked(
        self, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: object, **options: object) -> None:
            raise AssertionError(f"a connection was opened: {arguments}")

        monkeypatch.setattr(urllib.request, "urlopen", refuse)
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "create_connection", refuse)
        train(tmp_path, load_model=base, data_file=data, epoch_steps=2, epoch_count=1)
        assert len(metrics(tmp_path)) == 2
