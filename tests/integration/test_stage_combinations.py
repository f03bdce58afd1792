"""Adapters that an engine updates as one whole, in every combination of two of everything that a run can be given."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from binidx_files import write_binidx
from engine_on_cpu import let_engines_take_a_cpu
from factories import ARCHITECTURES, tiny_checkpoint
from running import files_in, go_on, metrics, stopped, train, try_train, write_documents
from tables import pairs
from torch import Tensor

from src.checkpoint import open_checkpoint, save_model
from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.model.language_model import LanguageModel
from src.model.layers import Linear
from src.tokenizer import ByteTokenizer
from src.training import run
from src.training.module import TrainingModule
from src.training.optimizers import GRADIENT_CLIP

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed, about the CPU

COMMON = {"epoch_steps": 2, "epoch_count": 2, "warmup_steps": 0, "lr_init": 1e-3, "lr_final": 5e-4, "ctx_len": 64}
LORA = {"peft": "lora", "lora_r": 8}
METHODS: dict[str, dict[str, object]] = {
    "lora at two rates": {**LORA, "lora_plus": 4},
    "lora with dropout": {**LORA, "lora_dropout": 0.2},
    "pissa": {"peft": "pissa", "pissa_r": 8},
    "bone": {"peft": "bone", "bone_r": 8},
    "bat": {"peft": "bat", "bone_r": 8},
    "lora beside states": {**LORA, "train_type": "states", "lr_state": 0.05},
}
DATA: dict[str, dict[str, object]] = {
    "pad": {"data_file": "documents", "dataload": "pad", "micro_bsz": 2},
    "pack": {"data_file": "documents", "dataload": "pack"},
    "answers": {"data_file": "chats", "dataload": "pad", "loss_mask": "qa"},
    **{loss: {"rlhf_train_file": "pairs.save", loss: 1, "micro_bsz": 2} for loss in ("orpo", "dpo", "simpo")},
}
CHUNKS: dict[str, dict[str, object]] = {
    "whole rows": {},
    "chunks": {"chunk_ctx": 24},
    "chunks apart": {"chunk_ctx": 24, "bptt_chunks": 1},
}
OPTIMIZERS: dict[str, dict[str, object]] = {
    "adam": {},
    "decay": {"optim": "adamw", "weight_decay": 0.5, "weight_decay_final": 0.05},
    "adamw8bit": {"optim": "adamw8bit", "weight_decay": 0.5},
    "lion8bit": {"optim": "lion8bit"},
}
QUANT: dict[str, dict[str, object]] = {
    "unpacked": {},
    "nf4": {"quant": 1, "quant_type": "nf4"},
    "int8": {"quant": 1, "quant_type": "int8"},
}
FILES = ("load_model", "data_file", "rlhf_train_file")
ROWS = pairs(
    method=METHODS,
    data=DATA,
    chunks=CHUNKS,
    optimizer=OPTIMIZERS,
    quant=QUANT,
    grad_cp=(0, 1, 2),
    train_parts=("[]", "time,ln"),
    accumulate_grad_batches=(1, 3),
    precision=("fp32", "bf16"),
    stage=(1, 2),
    architecture=ARCHITECTURES,
)


@pytest.fixture(autouse=True)
def engine_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    let_engines_take_a_cpu(monkeypatch)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each architecture, documents, chats and pairs; some rows are longer than a chunk."""
    folder = tmp_path_factory.mktemp("inputs")
    for architecture in ARCHITECTURES:
        tiny_checkpoint(folder / f"{architecture}.pth", dtype=torch.bfloat16, architecture=architecture)
    write_documents(folder / "documents", [30, 12, 25, 18, 9, 33])
    # Gradients of a few answered tokens are larger than those of many.
    answers = [f"It is {n}{' and again' * n}." if n % 2 else str(n) for n in range(8)]
    chats = [f"User: {n}?\n\nAssistant: {answer}\n\n" for n, answer in enumerate(answers)]
    write_binidx(folder / "chats", [[*ByteTokenizer().encode(chat), 0] for chat in chats])
    save_pairs(
        folder / "pairs.save",
        [PreferencePair(list(range(n, 3 * n)), [60 + n] * n, [90 + n] * (n + 1)) for n in range(4, 10)],
    )
    return folder


@dataclass
class Seen:
    """What every run of a test trains, by name, in fp32: before its first step and after its last."""

    starts: list[dict[str, Tensor]] = field(default_factory=list)
    ends: list[dict[str, Tensor]] = field(default_factory=list)

    def shares_apart(self) -> dict[str, float]:
        """By tensor, how far the last run's end is from the first one's, as a share of the way there."""
        start, one, other = self.starts[0], self.ends[0], self.ends[-1]
        ways = {name: (tensor - start[name]).abs().sum().clamp(min=1e-12) for name, tensor in one.items()}
        return {name: float((other[name] - tensor).abs().sum() / ways[name]) for name, tensor in one.items()}

    def assert_same_ends(self) -> None:
        """But for rounding, with activations in fp32: at most 4e-6 was seen."""
        one, other = self.ends[0], self.ends[-1]
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=3e-5, msg=name)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()

    def copies(module: TrainingModule) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in module.trained()}

    def make(module: TrainingModule, make: Any = TrainingModule.configure_optimizers) -> torch.optim.Optimizer:
        found.starts.append(copies(module))
        optimizer: torch.optim.Optimizer = make(module)
        return optimizer

    def end(module: TrainingModule, end: Any = TrainingModule.on_train_end) -> None:
        found.ends.append(copies(module))
        end(module)

    monkeypatch.setattr(TrainingModule, "configure_optimizers", make)
    monkeypatch.setattr(TrainingModule, "on_train_end", end)
    return found


def flags_of(row: dict[str, Any], inputs: Path) -> dict[str, object]:
    """A row's flags, but for its strategy."""
    flags = {
        "load_model": f"{row['architecture']}.pth",
        **COMMON,
        "epoch_count": 2 if row["accumulate_grad_batches"] == 1 else 3,
        **{name: row[name] for name in ("grad_cp", "train_parts", "accumulate_grad_batches", "precision")},
        **METHODS[row["method"]],
        **DATA[row["data"]],
        **CHUNKS[row["chunks"]],
        **OPTIMIZERS[row["optimizer"]],
        **QUANT[row["quant"]],
    }
    return {name: inputs / str(value) if name in FILES else value for name, value in flags.items()}


def assert_same_files(one: Path, other: Path, atol: float = 3e-5) -> None:
    """By name; in tensors but for a rounding of what rounding had left apart."""
    assert files_in(one) == files_in(other)
    for name in files_in(one):
        if name.endswith(".pth") and "resume" not in name:
            expected, found = (torch.load(folder / name, weights_only=True) for folder in (one, other))
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor, rtol=2**-7, atol=atol, msg=f"{name}: {key}")


def assert_same_steps(one: Path, other: Path, rel: float = 2e-5) -> None:
    """Losses, norms and what else is logged of every step but times."""
    expected, found = metrics(one), metrics(other)
    assert len(expected) == len(found) > 0
    for step, record in zip(expected, found, strict=True):
        for name in step.keys() - {"run", "seconds", "tokens_per_s"}:
            assert record[name] == pytest.approx(step[name], rel=rel, abs=rel), (step["step"], name)
        assert record.keys() == step.keys()


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=", ".join(map(str, row.values())), marks=[pytest.mark.slow] if number else [])
        for number, row in enumerate(ROWS)
    ],
)
def test_a_run_under_an_engine_is_that_of_a_single_device(
    row: dict[str, Any], inputs: Path, seen: Seen, tmp_path: Path
) -> None:
    """To the rounding of a clip, of which activations in bf16 make the most: 1e-3 of a tensor's way was seen.

    Moments in 8 bits an engine packs for all tensors together; a single device leaves tensors as small as these theirs
    in fp32. Seen of a loss 2e-3, of a norm 2e-2, of the way that a tensor went 0.03 in the mean of tensors.
    """
    flags = flags_of(row, inputs)
    train(tmp_path / "one", **flags)
    train(tmp_path / "stage", strategy=f"deepspeed_stage_{row['stage']}", **flags)
    apart = seen.shares_apart()
    if "8bit" in row["optimizer"]:
        assert files_in(tmp_path / "one") == files_in(tmp_path / "stage")
        for one, stage in zip(metrics(tmp_path / "one"), metrics(tmp_path / "stage"), strict=True):
            assert stage["loss"] == pytest.approx(one["loss"], rel=5e-3)
            assert stage["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05)
        assert sum(apart.values()) < 0.06 * len(apart)
        assert sum(apart.values()) > 0, "moments were packed"
        return
    assert max(apart.values()) < (1e-4 if row["precision"] == "fp32" else 5e-3)
    # A value that comes to be rounded to bf16's next one changes a loss by 4e-5, and one two steps later by 8e-4.
    assert_same_steps(tmp_path / "one", tmp_path / "stage", rel=2e-5 if row["precision"] == "fp32" else 5e-3)
    assert_same_files(tmp_path / "one", tmp_path / "stage", atol=3e-5 if row["precision"] == "fp32" else 3e-4)
    if row["precision"] == "fp32":
        seen.assert_same_ends()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload"])
def test_frozen_matrices_may_move_once_an_engine_has_the_model(
    strategy: str, inputs: Path, seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do on a GPU, to where adapters have room behind them: same steps, held-out losses and files."""
    row = {**ROWS[0], "method": "pissa", "data": "pad", "chunks": "whole rows", "optimizer": "adam"}
    row |= {"quant": "unpacked", "train_parts": "time,ln", "precision": "bf16", "accumulate_grad_batches": 1}
    flags = {**flags_of(row, inputs), "val_file": inputs / "documents", "strategy": strategy}
    train(tmp_path / "still", **flags)
    moved: list[int] = []
    options, take = run.load_options, LanguageModel.take_room

    def counted(model: LanguageModel) -> None:
        take(model)
        moved.append(sum(module.room > 0 for module in model.modules() if isinstance(module, Linear)))

    monkeypatch.setattr(run, "load_options", lambda *given: replace(options(*given), reserves_room=True))
    monkeypatch.setattr(LanguageModel, "take_room", counted)
    train(tmp_path / "moved", **flags)
    assert moved[0] > 0
    assert_same_steps(tmp_path / "still", tmp_path / "moved")
    assert_same_files(tmp_path / "still", tmp_path / "moved")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "stage", "accumulate", "method"),
    [
        ("x060", 1, 1, METHODS["bone"]),
        ("x060", 2, 2, {**METHODS["lora beside states"], "dataload": "pad", "lora_alpha": 48}),
        ("x070", 1, 1, {**LORA, "lora_alpha": 24}),
        ("x070", 2, 2, {**LORA, "lora_alpha": 24, **OPTIMIZERS["decay"]}),
    ],
)
def test_gradients_over_the_clip_and_under_it(
    architecture: str,
    stage: int,
    accumulate: int,
    method: dict[str, object],
    inputs: Path,
    seen: Seen,
    tmp_path: Path,
) -> None:
    flags = {
        **COMMON,
        **method,
        "load_model": inputs / f"{architecture}.pth",
        "data_file": inputs / "chats",
        "loss_mask": "qa",
        "train_parts": "[]",
        "ctx_len": 128,
        "epoch_steps": 8 // accumulate,
        "accumulate_grad_batches": accumulate,
    }
    train(tmp_path / "one", **flags)
    train(tmp_path / "stage", strategy=f"deepspeed_stage_{stage}", **flags)
    norms = [record["grad_norm"] for record in metrics(tmp_path / "one")]
    assert min(norms) < 0.95 * GRADIENT_CLIP
    assert max(norms) > 1.05 * GRADIENT_CLIP
    assert_same_steps(tmp_path / "one", tmp_path / "stage")
    seen.assert_same_ends()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "architecture", "stage", "accumulate", "what", "steps"),
    [
        ("lora beside states", "x060", 1, 1, "loss", 2),
        ("lora with dropout", "x070", 2, 2, "loss", 1),
        ("bone", "x060", 2, 1, "gradient", 2),
        ("pissa", "x070", 1, 2, "gradient", 1),
    ],
)
def test_a_step_that_is_not_finite_ends_a_run_as_on_a_single_device(
    method: str,
    architecture: str,
    stage: int,
    accumulate: int,
    what: str,
    steps: int,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a token whose embedding overflows, or behind a finite loss, two steps after the run was saved or one.

    The step between, which gave the bad number, is not in the former file, whose tensors then are given back.
    """
    bad = steps + 2
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(inputs / f"{architecture}.pth").items()}
    tensors["emb.weight"][200] = 3e38
    tensors["emb.weight"][200, ::2] = -3e38
    save_model(tmp_path / "base.pth", tensors)
    documents = [[5, 6, 7 + number, 8, 9, 0] for number in range(6 * accumulate)]
    if what == "loss":
        documents[bad * accumulate - 1][2] = 200
    write_binidx(tmp_path / "documents", documents)
    step = TrainingModule.training_step

    def spoilt(module: TrainingModule, batch: Any, batch_idx: int) -> Tensor:
        loss = step(module, batch, batch_idx)
        return loss * torch.inf if what == "gradient" and module.trainer.global_step == bad - 1 else loss

    monkeypatch.setattr(TrainingModule, "training_step", spoilt)
    flags = {
        "load_model": tmp_path / "base.pth",
        "data_file": tmp_path / "documents",
        "data_shuffle": 0,
        "dataload": "pad",
        "accumulate_grad_batches": accumulate,
        **METHODS[method],
        "epoch_steps": steps,
        "epoch_count": 6 // steps,
        "epoch_save": 0,
        "lr_init": 1e-3,
    }
    one = try_train(tmp_path / "one", **flags)
    stage_run = try_train(tmp_path / "stage", **flags, strategy=f"deepspeed_stage_{stage}")
    assert one.code == stage_run.code == 2
    message = one.err.splitlines()[-1]
    assert f"the {what} is not finite at step {bad} (document " in message
    assert stage_run.err.splitlines()[-1] == message.replace(str(tmp_path / "one"), str(tmp_path / "stage"))
    assert "Traceback" not in stage_run.err
    assert len(metrics(tmp_path / "one")) == bad - 1
    assert_same_steps(tmp_path / "one", tmp_path / "stage")
    assert ("rwkv-last-good.pth" in files_in(tmp_path / "one")) == (steps == 2)
    assert_same_files(tmp_path / "one", tmp_path / "stage")


ONE, STAGE_1, STAGE_2 = "auto", "deepspeed_stage_1", "deepspeed_stage_2"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(ONE, STAGE_1), (STAGE_1, ONE), (STAGE_1, STAGE_2)])
@pytest.mark.parametrize(
    ("architecture", "method", "others"),
    [
        ("x060", "lora with dropout", {**OPTIMIZERS["decay"], "accumulate_grad_batches": 2, "lora_plus": 4}),
        ("x070", "lora beside states", {**DATA["orpo"], **CHUNKS["chunks"]}),
    ],
)
def test_a_run_goes_on_under_another_strategy(
    before: str,
    after: str,
    architecture: str,
    method: str,
    others: dict[str, object],
    inputs: Path,
    seen: Seen,
    tmp_path: Path,
) -> None:
    """In mid-epoch, with moments, the count of steps, random numbers and what the objective remembers."""
    files = {"data_file": "documents", "load_model": f"{architecture}.pth"}
    given = {**COMMON, **METHODS[method], **files, **others, "epoch_steps": 4}
    flags = {name: inputs / str(value) if name in FILES else value for name, value in given.items()}
    train(tmp_path / "whole", **flags, strategy=before)
    stopped(3, tmp_path / "parts", **flags, strategy=before)
    ended = go_on(tmp_path / "parts", strategy=after)
    told = "auto" if after == ONE else after
    assert f"note: --strategy {told} was " in ended.out
    assert_same_steps(tmp_path / "whole", tmp_path / "parts")
    assert_same_files(tmp_path / "whole", tmp_path / "parts")
    seen.assert_same_ends()
