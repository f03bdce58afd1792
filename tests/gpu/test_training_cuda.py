"""Whole runs on a GPU: dtypes under DeepSpeed, what changes and what does not, and how runs end."""

import gc
import math
import os
import re
import signal
import subprocess
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from binidx_files import write_binidx
from factories import tiny_checkpoint, tiny_shape
from running import (
    OFFLOADS,
    ROOT,
    after_step,
    files_in,
    go_on,
    interrupt,
    left_by_run,
    metrics,
    started,
    stopped,
    train,
    try_train,
    wait_until,
    write_documents,
)

from src.adapters.method import method_of
from src.checkpoint import load_state, open_checkpoint, save_model
from src.config import TrainConfig
from src.errors import TrainingError
from src.loading import build_model
from src.training.engine import apply_hardware, resolve_hardware
from src.training.fitting import fit
from src.training.module import TrainingModule
from src.training.run import choose_recomputation, load_options
from src.training.work import Work, make_schedule, prepare_work

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SIZES: dict[str, Any] = {"n_layer": 3, "n_embd": 128, "head_size": 64}
SHAPE = tiny_shape(**SIZES)
STRATEGIES = ("auto", "deepspeed_stage_1", "deepspeed_stage_2")
OFFLOADING = pytest.param("deepspeed_stage_2_offload", marks=OFFLOADS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of three layers with heads of 64, bf16 like published ones."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, dtype=torch.bfloat16, **SIZES)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents longer and shorter than a tile of the operator."""
    return write_documents(tmp_path_factory.mktemp("data") / "documents", [200, 33, 64, 129, 16, 90])


class Prepared:
    """A run up to the point where Lightning's loop would begin."""

    def __init__(self, folder: Path, base: Path, data: Path, **flags: object) -> None:
        given = {"load_model": base, "data_file": data, "proj_dir": folder, "accelerator": "gpu", **flags}
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = TrainConfig.from_flags({"dataload": "pad", **{name: str(value) for name, value in given.items()}})
        self.hardware = resolve_hardware(self.config)
        self.method = method_of(self.config)
        apply_hardware(self.hardware, self.config, small_messages=self.method.small)
        self.work: Work = prepare_work(self.config, SHAPE)
        checkpoint = open_checkpoint(base)
        self.model = build_model(checkpoint, SHAPE, load_options(self.config, self.method, self.hardware, SHAPE))
        choose_recomputation(self.model, self.work, self.config, self.method)
        self.states = [self.model.get_parameter(name) for name in SHAPE.state_shapes()]

    def fit(self, finish: Callable[[TrainingModule], None] = lambda module: None) -> None:
        """Lightning's loop; `finish` is called after the last step."""
        module = TrainingModule(self.model, self.work.objective, self.config, self.method, self.work.dataset)
        schedule = make_schedule(self.config, self.work)
        with unittest.mock.patch.dict(os.environ):  # Lightning leaves its port there
            fit(module, self.work, schedule, self.hardware, self.config, self.folder, lambda: finish(module))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every registered tensor by name."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dtypes_stay_and_only_states_change(
    strategy: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Prepared(tmp_path, base, data, strategy=strategy, quant_type="nf4", epoch_steps=3, epoch_count=1)
    before = {name: tensor.detach().cpu().clone() for name, tensor in run.tensors().items()}
    during: list[dict[str, tuple[torch.dtype, str]]] = []

    stage = run.work.objective.stage

    def observing(*arguments: Any) -> Any:
        during.append({name: (tensor.dtype, tensor.device.type) for name, tensor in run.tensors().items()})
        return stage(*arguments)

    monkeypatch.setattr(run.work.objective, "stage", observing)
    run.fit()

    states = set(SHAPE.state_shapes())
    expected = {name: tensor.dtype for name, tensor in before.items()}
    assert {expected[name] for name in states} == {torch.float32}
    assert expected["head.weight"] == torch.bfloat16
    assert sum(dtype == torch.uint8 for dtype in expected.values()) >= 8 * SHAPE.n_layer
    assert len(during) == 4, "the batch after the last step is staged, too"
    for seen in during:
        assert {name: dtype for name, (dtype, _) in seen.items()} == expected
        assert {device for _, device in seen.values()} == {"cuda"}
    after = {name: tensor.detach().cpu() for name, tensor in run.tensors().items()}
    assert {name: tensor.dtype for name, tensor in after.items()} == expected
    assert {name for name in before if not torch.equal(before[name], after[name])} == states
    assert not run.model.emb.host_table.is_cuda  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_adam_moments_are_fp32(strategy: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = Prepared(tmp_path, base, data, strategy=strategy, epoch_steps=2, epoch_count=1)
    moments: list[torch.dtype] = []

    def look(module: TrainingModule) -> None:
        (optimizer,) = module.trainer.optimizers
        inner = getattr(optimizer, "optimizer", optimizer)
        for state in inner.state.values():
            moments.extend(state[name].dtype for name in ("exp_avg", "exp_avg_sq"))

    run.fit(look)
    assert moments
    assert set(moments) == {torch.float32}


@pytest.mark.parametrize("optim", ["adamw8bit", "paged_adamw8bit", "lion8bit"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_8_bits_are_enough_for_an_optimizers_states(
    strategy: str, optim: str, base: Path, data: Path, tmp_path: Path
) -> None:
    """The states, of 8192 values a layer, are packed; the run goes nearly where one with fp32 moments goes."""
    flags: dict[str, Any] = {"epoch_steps": 8, "epoch_count": 1, "lr_init": 0.03, "lr_final": 0.03, "warmup_steps": 0}
    run = Prepared(tmp_path / "packed", base, data, strategy=strategy, optim=optim, **flags)
    moments: list[torch.dtype] = []

    def look(module: TrainingModule) -> None:
        (optimizer,) = module.trainer.optimizers
        if module.flat:  # an engine's, of all states together
            assert module.flat._many is not None
            kinds = module.flat._many.of_cuts._kinds.values()
            moments.extend(own.first.dtype for kind in kinds for own in kind.moments)
            return
        inner = getattr(optimizer, "optimizer", optimizer)
        moments.extend(state["state1"].dtype for state in inner.state.values())

    run.fit(look)
    assert set(moments) == {torch.uint8}
    Prepared(tmp_path / "fp32", base, data, strategy=strategy, **flags).fit()
    packed, exact = (losses_of(tmp_path / name) for name in ("packed", "fp32"))
    assert packed[0] == pytest.approx(exact[0], rel=1e-3)
    if optim != "lion8bit":
        assert packed == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("strategy", [*STRATEGIES, OFFLOADING])
def test_a_run_leaves_what_it_should(strategy: str, base: Path, data: Path, tmp_path: Path) -> None:
    ended = train(
        tmp_path, load_model=base, data_file=data, accelerator="gpu", quant=1, strategy=strategy, epoch_steps=3,
        epoch_count=2, val_file=data, accumulate_grad_batches=3, micro_bsz=2,
    )  # fmt: skip
    assert files_in(tmp_path) == left_by_run("rwkv-0.pth", "rwkv-1.pth")
    assert len(metrics(tmp_path)) == 2
    for state in load_state(tmp_path / "rwkv-final.pth", SHAPE).values():
        assert state.dtype == torch.bfloat16
        assert state.isfinite().all()
        assert state.any()
    assert "allocator peak" in ended.out
    assert re.search(r"held out   tuned: loss \d", ended.out)


def losses_of(folder: Path) -> list[float]:
    """Loss of every step."""
    return [line["loss"] for line in metrics(folder)]


@pytest.mark.parametrize("grad_cp", [0, 1, 2])
@pytest.mark.parametrize("quant_type", ["none", "nf4", "fp4", "int8"])
def test_gpu_and_cpu_see_the_same_loss(quant_type: str, grad_cp: int, base: Path, data: Path, tmp_path: Path) -> None:
    """bf16 on both; the first step has the same state, later ones feel the rounding of earlier ones."""
    quantised = {"quant": 0} if quant_type == "none" else {"quant": 1, "quant_type": quant_type}
    for accelerator in ("cpu", "gpu"):
        train(
            tmp_path / accelerator, load_model=base, data_file=data, accelerator=accelerator, precision="bf16",
            grad_cp=grad_cp, epoch_steps=6, epoch_count=1, **quantised,
        )  # fmt: skip
    on_cpu, on_gpu = losses_of(tmp_path / "cpu"), losses_of(tmp_path / "gpu")
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=5e-3)
    assert on_gpu == pytest.approx(on_cpu, rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_packed_rows_without_the_kernel_are_not_recorded(
    precision: str, base: Path, data: Path, tmp_path: Path
) -> None:
    ended = train(
        tmp_path, load_model=base, data_file=data, accelerator="gpu", quant=1, precision=precision, dataload="pack",
        epoch_steps=6, epoch_count=1,
    )  # fmt: skip
    assert "unrecorded" not in ended.err
    assert len(metrics(tmp_path)) == 6
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.parametrize("method", [{}, {"peft": "lora", "lora_r": 16, "quant": 0}], ids=["states", "lora and parts"])
def test_every_precision_and_recomputation_sees_the_same_gradient(
    method: dict[str, object], base: Path, data: Path, tmp_path: Path
) -> None:
    """The norm before clipping, whose scale in fp16 is to be taken out once."""
    norms = {}
    for precision in ("fp32", "bf16", "fp16"):
        for grad_cp in (0, 1, 2):
            folder = tmp_path / f"{precision} {grad_cp}"
            given = {"precision": precision, "grad_cp": grad_cp, "epoch_steps": 1, "epoch_count": 1, **method}
            train(folder, load_model=base, data_file=data, accelerator="gpu", **given)
            norms[folder.name] = metrics(folder)[0]["grad_norm"]
    assert list(norms.values()) == pytest.approx([norms["fp32 0"]] * len(norms), rel=0.05), norms


def test_200_steps_in_bf16_end_where_fp32_ends(tmp_path: Path) -> None:
    """Kernels, recorded steps and bf16 against the torch-only operator in fp32, on the bundled model and its data."""
    final = {}
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        ended = train(
            folder, load_model=ROOT / "src/demo/base.pth", data_file=ROOT / "src/demo/sft.jsonl",
            val_file=ROOT / "src/demo/sft-held-out.jsonl", accelerator="gpu", quant=1, precision=precision,
            ctx_len=256, micro_bsz=2, epoch_steps=200, epoch_count=1, cuda_graph=int(precision == "bf16"),
        )  # fmt: skip
        held_out = [float(loss) for loss in re.findall(r"held out   (?:un)?tuned: loss ([\d.]+)", ended.out)]
        assert len(held_out) == 2
        assert held_out[1] < 0.98 * held_out[0]
        final[precision] = (held_out[1], sum(losses_of(folder)[-20:]) / 20)
        print(precision, held_out, final[precision])
    assert final["bf16"] == pytest.approx(final["fp32"], rel=5e-3)


def test_activations_in_host_memory_change_nothing_but_memory(base: Path, data: Path, tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "long", [8000] * 4)
    peaks = []
    # With the first run goes what other tests have left on the GPU, which would hide what a run takes.
    for number, offload in enumerate((0, 0, 1)):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        train(
            tmp_path / str(number), load_model=base, data_file=documents, ctx_len=8192, accelerator="gpu", quant=1,
            epoch_count=1, cuda_graph=0, offload_activations=offload, lr_init=0.1, grad_cp=0,
        )  # fmt: skip
        peaks.append(torch.cuda.max_memory_allocated() - held)
    on_gpu, on_host = losses_of(tmp_path / "1"), losses_of(tmp_path / "2")
    assert on_host == pytest.approx(on_gpu, rel=1e-3)
    assert peaks[2] < 0.8 * peaks[1]


def test_packed_and_padded_rows_see_the_same_documents(base: Path, data: Path, tmp_path: Path) -> None:
    for dataload in ("pad", "pack"):
        train(
            tmp_path / dataload, load_model=base, data_file=data, accelerator="gpu", quant=1, dataload=dataload,
            micro_bsz=6, ctx_len=256, epoch_count=1,
        )  # fmt: skip
    padded, packed = losses_of(tmp_path / "pad"), losses_of(tmp_path / "pack")
    assert len(padded) == len(packed) == 1
    assert packed == pytest.approx(padded, rel=5e-3)


def test_recorded_steps_are_the_issued_ones(base: Path, tmp_path: Path) -> None:
    """Lengths repeat, so that with --cuda_graph 1 most steps are replays."""
    documents = write_documents(tmp_path / "documents", [64] * 8)
    for cuda_graph in (0, 1):
        train(
            tmp_path / str(cuda_graph), load_model=base, data_file=documents, accelerator="gpu", quant=1,
            cuda_graph=cuda_graph, epoch_count=2, lr_init=0.1,
        )  # fmt: skip
    issued, recorded = metrics(tmp_path / "0"), metrics(tmp_path / "1")
    assert len(issued) == 16
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in recorded] == pytest.approx([r[name] for r in issued], rel=1e-2), name


def test_deepspeed_takes_the_steps_of_a_single_device(base: Path, data: Path, tmp_path: Path) -> None:
    for strategy in STRATEGIES:
        train(
            tmp_path / strategy, load_model=base, data_file=data, accelerator="gpu", quant=1, strategy=strategy,
            epoch_steps=6, epoch_count=1, accumulate_grad_batches=2, lr_init=0.1,
        )  # fmt: skip
    reference = metrics(tmp_path / "auto")
    for strategy in STRATEGIES[1:]:
        lines = metrics(tmp_path / strategy)
        assert [r["lr"] for r in lines] == [r["lr"] for r in reference]
        for name in ("loss", "grad_norm"):
            assert [r[name] for r in lines] == pytest.approx([r[name] for r in reference], rel=1e-2), name


def test_stacks_are_small_and_kernels_that_want_more_get_it() -> None:
    """In a process of its own: the limit stays. What it saves cannot be told from what other processes take."""
    script = (
        "import ctypes, torch; from src.device import _limit_stacks; _limit_stacks(torch.device('cuda', 0));"
        "limit = ctypes.c_size_t(); ctypes.CDLL('libcuda.so.1').cuCtxGetLimit(ctypes.byref(limit), 0);"
        "x = torch.randn(300_000, device='cuda'); assert torch.equal(x.sort().values.cpu(), x.cpu().sort().values);"
        "assert x.double().kthvalue(7).values == x.double().sort().values[6]; print(limit.value)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "128", done.stderr


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_not_finite_stops_before_the_step(strategy: str, base: Path, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(base).items()}
    tensors["emb.weight"][200] = 3e38  # finite; the sum of a row, in the norm that follows, is not
    save_model(tmp_path / "poisoned.pth", tensors)
    documents = [[5, 6, 7 + number, 8, 9, 0] for number in range(6)]
    documents[3][2] = 200
    write_binidx(tmp_path / "documents", documents)
    folder = tmp_path / "out"
    ended = try_train(
        folder, load_model=tmp_path / "poisoned.pth", data_file=tmp_path / "documents", accelerator="gpu", quant=1,
        strategy=strategy, epoch_count=1, data_shuffle=0,
    )  # fmt: skip
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert "the loss is not finite at step 4 (document 3 of " in ended.err
    assert files_in(folder) == {
        "rwkv-last-good.pth",
        "rwkv-last-good.json",
        "train_log.txt",
        "metrics.jsonl",
        "run.toml",
    }
    assert len(metrics(folder)) == 3
    assert "the weights after step 2, which gave a finite loss and gradient" in ended.err
    assert all(state.isfinite().all() for state in load_state(folder / "rwkv-last-good.pth", SHAPE).values())


@pytest.mark.parametrize("strategy", [*STRATEGIES, OFFLOADING])
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    strategy: str, base: Path, data: Path, tmp_path: Path
) -> None:
    run = Prepared(tmp_path, base, data, strategy=strategy, epoch_steps=3, epoch_count=1)
    run.states[1].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"the gradient is not finite at step 1 .* what was loaded gives it"):
        run.fit()
    assert not (tmp_path / "rwkv-last-good.pth").exists()


WHOLE_MODEL = {"train_type": "none", "lr_init": 1e-4, "lr_final": 1e-4, "ctx_len": 128}
RESUMED: dict[str, dict[str, object]] = {
    "states": {},
    "packed": {"quant": 1, "dataload": "pack", "ctx_len": 300},
    "stage 1": {"strategy": "deepspeed_stage_1", "quant": 1},
    "stage 2": {"strategy": "deepspeed_stage_2"},
    "offload": {"strategy": "deepspeed_stage_2_offload"},
    "lora": {"peft": "lora", "quant": 1, "lr_init": 1e-3},
    "whole model": WHOLE_MODEL,
    "8 bits": {**WHOLE_MODEL, "optim": "adamw8bit"},
    "pages": {**WHOLE_MODEL, "optim": "paged_adamw8bit"},
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=OFFLOADS) if k == "offload" else k for k in RESUMED])
def test_a_resumed_run_ends_like_a_whole_one(kind: str, base: Path, data: Path, tmp_path: Path) -> None:
    flags = {
        "load_model": base, "data_file": data, "accelerator": "gpu", "epoch_steps": 4, "epoch_count": 3,
        **RESUMED[kind],
    }  # fmt: skip
    train(tmp_path / "whole", **flags)
    stopped(6, tmp_path / "parts", **flags)
    go_on(tmp_path / "parts")
    assert files_in(tmp_path / "parts") == files_in(tmp_path / "whole")
    whole, parts = (losses_of(tmp_path / name) for name in ("whole", "parts"))
    assert len(parts) == 12
    assert parts == pytest.approx(whole, rel=1e-3)


def test_a_run_that_cannot_be_resumed_says_so(base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "accelerator": "gpu", "epoch_steps": 4, **WHOLE_MODEL}
    with after_step(2, interrupt):
        ended = train(tmp_path, strategy="deepspeed_stage_1", optim="adamw8bit", **flags)
    assert "--resume 1 cannot go on with this run" in ended.out
    assert "rwkv-final.pth" in files_in(tmp_path)
    assert not {name for name in files_in(tmp_path) if "resume" in name}


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1"])
def test_ctrl_c_finishes_the_step_and_saves(strategy: str, base: Path, data: Path, tmp_path: Path) -> None:
    words = [
        *("--load_model", base, "--data_file", data, "--proj_dir", tmp_path, "--accelerator", "gpu"),
        *("--strategy", strategy, "--epoch_steps", 1_000_000),
    ]
    with started("train.py", *words) as process:
        wait_until(lambda: len(metrics(tmp_path)) >= 20 or process.poll() is not None, seconds=300)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "no current CUDA context" not in err, "a step's backward begins with a product"
    assert f"stopped by SIGINT after {len(metrics(tmp_path))} steps" in out
    assert any(state.any() for state in load_state(tmp_path / "rwkv-final.pth", SHAPE).values())


def test_running_out_of_memory_says_what_to_change(base: Path, data: Path, tmp_path: Path) -> None:
    """In a process of its own, whose memory nothing else has taken."""
    share = 2**26 / torch.cuda.get_device_properties(0).total_memory
    program = (
        f"import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction({share}); "
        f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    )
    flags = {"load_model": base, "proj_dir": tmp_path, "data_type": "dummy", "grad_cp": 0, "quant": 0, "micro_bsz": 64}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "the GPU ran out of its " in line
    assert "--grad_cp 1, or --micro_bsz 32 --accumulate_grad_batches 2, or --quant 1 --quant_type nf4" in line
    assert "rwkv-final.pth" not in files_in(tmp_path)
