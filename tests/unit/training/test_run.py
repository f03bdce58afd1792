"""Parts of a run that need no run."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from factories import tiny_checkpoint, tiny_parameters, tiny_shape
from running import write_documents

from src.adapters.method import method_of
from src.config import TrainConfig
from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.errors import ConfigError, TrainingError
from src.loading import LoadOptions, build_model
from src.model.recompute import Recompute
from src.training import memory, run
from src.training.engine import Hardware
from src.training.objectives import PreferenceObjective
from src.training.report import _course, _in_chunks, memory_advice
from src.training.work import make_schedule, prepare_work

SHAPE = tiny_shape()
LEANER = "--weights bf16 --optim adamw8bit --fused_update 1"
LAST = ("a GPU that no other program uses (see nvidia-smi)", "a smaller base model")


def config(data: Path, **flags: object) -> TrainConfig:
    """A configuration from the two necessary flags and these."""
    given = {"load_model": "base.pth", "data_file": str(data), **{name: str(v) for name, v in flags.items()}}
    return TrainConfig.from_flags(given)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven documents."""
    return write_documents(tmp_path / "documents", [10, 12, 9, 30, 5, 6, 22])


@pytest.mark.parametrize(
    ("grad_cp", "mode", "buffers"), [(0, Recompute.NOTHING, 1), (1, Recompute.ALL, 6), (2, Recompute.INPUTS, 1)]
)
def test_grad_cp_sets_every_layer_and_the_dense_buffers(
    grad_cp: int, mode: Recompute, buffers: int, data: Path
) -> None:
    """Under 1 each matrix of the time mix has a buffer of its own; all others share one."""
    shape = tiny_shape(n_embd=64)
    options = LoadOptions(torch.device("cpu"), torch.float32, quant_type="nf4", quant_head=True)
    model = build_model(tiny_parameters(shape), shape, options)
    workspace = model.workspace
    chosen = config(data, grad_cp=grad_cp)
    run.choose_recomputation(model, prepare_work(chosen, shape), chosen, method_of(chosen))
    assert {block.recompute for block in model.blocks} == {mode}
    before = [buffer.data_ptr() for buffer in workspace.buffers()]
    assert len(before) == buffers
    model.logits(model(torch.arange(10)[None])[0]).sum().backward()
    assert [buffer.data_ptr() for buffer in workspace.buffers()] == before, "none had to be added or to grow"


def test_rejects_are_looked_for_in_one_pass_however_long_an_epoch_is(tmp_path: Path) -> None:
    save_pairs(tmp_path / "pairs.save", [PreferencePair([5, 6], [7, 8], []), PreferencePair([5], [7], [])])
    chosen = config(Path(), data_file="", orpo=1, rlhf_train_file=tmp_path / "pairs.save", epoch_steps=10**9)
    work = prepare_work(chosen, SHAPE)
    model = build_model(tiny_parameters(SHAPE), SHAPE, LoadOptions(torch.device("cpu"), torch.float32))
    assert isinstance(work.objective, PreferenceObjective)
    assert "has a reject to compare with" in run._preference_share(model, work, work.objective, 0)


def test_and_in_the_pass_that_a_run_begins_with(tmp_path: Path) -> None:
    """Epochs of one pair: the second one's has a reject, the first one's not."""
    save_pairs(tmp_path / "pairs.save", [PreferencePair([5, 6], [7, 8], []), PreferencePair([5], [7], [9])])
    chosen = config(
        Path(), data_file="", orpo=1, rlhf_train_file=tmp_path / "pairs.save", epoch_steps=1, micro_bsz=1, random_seed=1
    )
    work = prepare_work(chosen, SHAPE)
    model = build_model(tiny_parameters(SHAPE), SHAPE, LoadOptions(torch.device("cpu"), torch.float32))
    assert isinstance(work.objective, PreferenceObjective)
    said = [run._preference_share(model, work, work.objective, first) for first in (0, 1)]
    assert sorted("is the preference term" in line for line in said) == [False, True]


class TestSchedule:
    @pytest.mark.parametrize("accumulate", [1, 2, 3])
    def test_the_rate_reaches_lr_final_at_the_last_optimizer_step(self, accumulate: int, data: Path) -> None:
        chosen = config(
            data, epoch_steps=12, epoch_count=5, accumulate_grad_batches=accumulate, warmup_steps=2, lr_final=0.03
        )
        schedule = make_schedule(chosen, prepare_work(chosen, SHAPE))
        steps = 5 * 12 // accumulate
        assert schedule.total_steps == steps
        assert schedule.learning_rate(steps - 1) == pytest.approx(0.03)
        assert schedule.learning_rate(steps - 2) > 0.03

    def test_an_epoch_is_a_whole_number_of_optimizer_steps(self, data: Path) -> None:
        for flags in ({}, {"epoch_steps": 10}):
            chosen = config(data, accumulate_grad_batches=4, **flags)
            assert prepare_work(chosen, SHAPE).batches_per_epoch % 4 == 0

    def test_later_epochs_continue_the_schedule(self, data: Path) -> None:
        chosen = config(data, epoch_steps=10, epoch_count=6, epoch_begin=4)
        schedule = make_schedule(chosen, prepare_work(chosen, SHAPE))
        assert (schedule.first_step, schedule.total_steps) == (40, 60)
        assert schedule.learning_rate(19) == pytest.approx(0.01)

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"dataload": "pack", "micro_bsz": 3}, 2 * 87),  # one row holds all documents, of 94 tokens together
            ({"dataload": "pack", "ctx_len": 20}, 2 * 77 / 4),
            ({"dataload": "pad"}, 2 * 87 / 7),
            ({"dataload": "pad", "micro_bsz": 4}, 87),
            ({"dataload": "get", "micro_bsz": 3, "ctx_len": 40}, 2 * 3 * 40),
        ],
    )
    def test_tokens_of_a_step_are_real_ones(self, data: Path, flags: dict[str, object], expected: float) -> None:
        chosen = config(data, **{"ctx_len": 50, "accumulate_grad_batches": 2, **flags})
        work = prepare_work(chosen, SHAPE)
        assert make_schedule(chosen, work).tokens_per_step == pytest.approx(expected)
        batches = work.dataset.batches_per_pass
        seen = sum(work.dataset[step].token_count for step in range(batches)) / batches
        assert seen * 2 == pytest.approx(expected)

    def test_a_step_larger_than_a_pass_is_said(self, data: Path) -> None:
        lines = prepare_work(config(data, dataload="pad", accumulate_grad_batches=16), SHAPE).lines
        assert lines[-2].strip() == (
            "warning: an optimizer step takes 16 micro-batches and a pass over the data has 7: every step sees the "
            "data 2.29 times; lower --accumulate_grad_batches."
        )
        lines = prepare_work(config(data, dataload="pad", accumulate_grad_batches=7), SHAPE).lines
        assert not any("micro-batches" in line for line in lines)


class TestMemoryAdvice:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (
                {"grad_cp": 0, "micro_bsz": 4, "quant": 0},
                ["--grad_cp 1", "--micro_bsz 2 --accumulate_grad_batches 2", "--quant 1 --quant_type nf4"],
            ),
            ({}, ["--quant_head 1", "--chunk_ctx 512", "--offload_activations 1"]),
            ({"quant_head": 1, "offload_activations": 1, "ctx_len": 1}, ["--ctx_len 1", *LAST]),
            ({"quant_type": "int8"}, ["--quant_type nf4", "--quant_head 1", "--chunk_ctx 512"]),
            ({"orpo": 1, "grad_cp": 2}, ["--grad_cp 1", "--quant_head 1", "--chunk_ctx 600"]),
            ({"quant_head": 1, "chunk_ctx": 100}, ["--chunk_ctx 50", "--chunk_keep host", "--ctx_len 512"]),
            ({"quant_head": 1, "chunk_ctx": 1, "chunk_keep": "host"}, ["--ctx_len 512", *LAST]),
            ({"train_type": "none"}, [LEANER, "--peft lisa --quant 1", "--chunk_ctx 512"]),
            (
                {"train_type": "none", "weights": "bf16", "optim": "adamw8bit", "accumulate_grad_batches": 2},
                ["--peft lisa --quant 1", "--chunk_ctx 512", "--offload_activations 1"],
            ),
            ({"peft": "lisa", "quant": 1}, ["--train_parts []", "--chunk_ctx 512", "--offload_activations 1"]),
        ],
    )
    def test_the_cheapest_changes(
        self, flags: dict[str, object], expected: list[str], data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        properties = SimpleNamespace(total_memory=8 * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        hardware = Hardware(torch.device("cuda"), "bf16", "single")
        chosen = config(data, **flags)
        advice = memory_advice(chosen, method_of(chosen), hardware)
        assert advice == f"the GPU ran out of its 8.0 GiB; the cheapest ways out: {', or '.join(expected)}"

    def test_a_chunk_that_is_named_fits(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the estimate of `--chunk_ctx auto`, with what the run that ran out had taken."""
        tiny_checkpoint(tmp_path / "base.pth")
        hardware = Hardware(torch.device("cpu"), "fp32", "single")
        chosen = config(data, load_model=tmp_path / "base.pth", ctx_len=2**20, quant=0, accelerator="cpu")
        method = method_of(chosen)
        found = []
        for free, taken in ((1.0, 0), (0.75, 2**28), (1.0, 2**30)):
            monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free * 2**30)
            monkeypatch.setattr(run, "process_bytes", lambda taken=taken: (taken, taken))
            found.append(run.chunk_instead(chosen, method, hardware))
        assert 128 <= found[0] == found[1] < found[2] < 2**19
        assert f"--chunk_ctx {found[0]}, or" in memory_advice(chosen, method, hardware, found[0])
        assert f"--chunk_ctx {2**19}, or" in memory_advice(chosen, method, hardware, 2**20), "less than did not fit"
        absent = config(data, load_model=tmp_path / "absent.pth")
        assert run.chunk_instead(absent, method, hardware) == 0


@pytest.mark.parametrize("place", ["run.open_model", "run._evaluate", "fitting.fit"])
def test_memory_may_run_out_anywhere(place: str, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*arguments: object, **options: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    tiny_checkpoint(tmp_path / "base.pth")
    chosen = config(data, load_model=tmp_path / "base.pth", proj_dir=tmp_path / "out", accelerator="cpu", quant=0)
    properties = SimpleNamespace(total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(f"src.training.{place}", run_out)
    with pytest.raises(TrainingError, match="the cheapest ways out"):
        run.train(chosen)


def test_a_seed_of_minus_one_is_drawn(data: Path) -> None:
    drawn = {run.with_seed(config(data, random_seed=-1)).random_seed for _ in range(3)}
    assert len(drawn) == 3
    assert min(drawn) >= 0
    assert run.with_seed(config(data, random_seed=7)).random_seed == 7


def test_the_engine_that_runs_is_the_one_the_run_knows(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` on several GPUs is DeepSpeed, and gradients are then read through its accessors."""
    seen: list[TrainConfig] = []
    chosen = Hardware(torch.device("cuda", 0), "bf16", "deepspeed_stage_1")
    monkeypatch.setattr(run, "resolve_hardware", lambda config: chosen)
    monkeypatch.setattr(run, "apply_hardware", lambda hardware, config, small_messages: None)
    monkeypatch.setattr(run, "_train", lambda config, *others: seen.append(config))
    run.train(config(data, devices=2))
    assert seen[0].uses_deepspeed


@pytest.mark.parametrize(
    ("device", "precision", "flags", "reserves"),
    [
        ("cuda", "bf16", {}, True),
        ("cuda", "bf16", {"strategy": "deepspeed_stage_2"}, True),
        ("cuda", "bf16", {"strategy": "deepspeed_stage_3"}, False),
        ("cuda", "bf16", {"quant": 1}, False),
        ("cuda", "fp16", {}, False),
        ("cuda", "fp32", {}, False),
        ("cpu", "bf16", {}, False),
    ],
)
def test_room_is_reserved_where_kernels_can_use_it(
    device: str, precision: str, flags: dict[str, object], reserves: bool, data: Path
) -> None:
    chosen = config(data, peft="lora", lora_r=8, **{"quant": 0, **flags})
    hardware = Hardware(torch.device(device), precision, chosen.strategy)
    assert run.load_options(chosen, method_of(chosen), hardware, SHAPE).reserves_room is reserves


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0], "loss 2.0000 -> 2.0000"),
        ([2.0, 1.0, 1.5], "loss 2.0000 -> 1.5000"),
        ([3.0, 1.0, *[9.0] * 16, 0.5, 2.5], "loss 2.0000 -> 1.5000 (means of the first and last 2 steps)"),
    ],
)
def test_the_course_of_the_loss_is_no_matter_of_single_steps(losses: list[float], expected: str) -> None:
    assert _course(losses) == expected


@pytest.mark.parametrize("train_type", ["states", "none"])
def test_a_folder_needs_room_for_a_checkpoint(
    train_type: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SimpleNamespace(free=2 * (SHAPE.state_parameter_count if train_type == "states" else SHAPE.parameter_count))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    run._check_room(tmp_path, method_of(config(data, train_type=train_type)).file_bytes(SHAPE))
    disk.free -= 1
    with pytest.raises(ConfigError, match="one checkpoint takes"):
        run._check_room(tmp_path, method_of(config(data, train_type=train_type)).file_bytes(SHAPE))


def test_an_interrupted_loop_is_an_interrupt(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning swallows a KeyboardInterrupt and ends the process with code 1."""

    def fit(*arguments: object) -> None:
        raise SystemExit(1)

    tiny_checkpoint(tmp_path / "base.pth")
    chosen = config(data, load_model=tmp_path / "base.pth", proj_dir=tmp_path / "out", accelerator="cpu", quant=0)
    monkeypatch.setattr(pl.Trainer, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        run.train(chosen)


class TestThePlanOfChunks:
    GPU = Hardware(torch.device("cuda"), "bf16", "single")

    @pytest.mark.parametrize(
        ("flags", "recorded", "again"),
        [
            ({}, True, True),
            ({"grad_cp": 0, "chunk_keep": "host"}, True, False),
            ({"peft": "lora"}, True, True),
            ({"peft": "lisa"}, False, True),
            ({"chunk_keep": "inputs"}, True, False),
            ({"cuda_graph": 0}, False, True),
            ({"peft": "lora", "lora_dropout": 0.1}, False, True),
        ],
        ids=str,
    )
    def test_it_says_what_is_recorded_and_what_would_be_faster(
        self, flags: dict[str, object], recorded: bool, again: bool, data: Path
    ) -> None:
        chosen = config(data, chunk_ctx=128, **flags)
        _, line = _in_chunks(chosen, method_of(chosen), self.GPU)
        assert ("chunks of one shape are recorded once and replayed" in line) == recorded
        assert ("chunks are not recorded" in line) != recorded
        assert ("--chunk_keep inputs saves a forward pass, or --grad_cp 0" in line) == again

    def test_it_says_nothing_of_rows_that_are_computed_whole(self, data: Path) -> None:
        chosen = config(data)
        assert _in_chunks(chosen, method_of(chosen), self.GPU) == []
