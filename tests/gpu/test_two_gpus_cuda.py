"""Two GPUs of one machine against one that accumulates: the same steps, each rank with packed weights of its own."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint
from running import OFFLOADS, files_in, metrics, started, wait_until, write_documents

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

WEIGHTS = ("--lr_init", 1e-3, "--lr_final", 1e-3, "--quant", 0)
SHARDED: dict[str, tuple[object, ...]] = {
    "all weights": ("--train_type", "none", *WEIGHTS),
    "all weights in bf16": ("--train_type", "none", "--weights", "bf16", *WEIGHTS),
    "lora and parts": ("--peft", "lora", "--train_parts", "time,ln", *WEIGHTS),
}
"""What stage 3 takes: nothing packed."""
REPLICATED: dict[str, tuple[object, ...]] = {
    "lisa": ("--peft", "lisa", "--lisa_r", 2, "--lisa_k", 3, *WEIGHTS[:4], "--quant", 1),
    "lisa, 8 bits, parked": (
        *("--peft", "lisa", "--lisa_r", 1, "--lisa_k", 3, "--lisa_moments", "park", "--optim", "adamw8bit"),
        *(*WEIGHTS[:4], "--quant", 1),
    ),
    "updates in the backward": ("--train_type", "none", "--weights", "bf16", "--fused_update", 1, *WEIGHTS),
}
"""What no engine takes: every GPU has a copy of everything."""
METHODS: dict[str, tuple[object, ...]] = {
    **SHARDED,
    **REPLICATED,
    "states": ("--lr_init", 0.1),
    "lora": ("--peft", "lora", "--lr_init", 1e-3, "--lr_final", 1e-3, "--quant", 1),
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a base model and documents."""
    tiny_checkpoint(tmp_path / "base.pth", n_layer=3, n_embd=128, head_size=64, dtype=torch.bfloat16)
    write_documents(tmp_path / "documents", [200, 33, 64, 129, 16, 90, 70, 120])
    return tmp_path


def words_of(files: Path, method: str, *words: object) -> list[object]:
    engine = () if method in REPLICATED or "--strategy" in words else ("--strategy", "deepspeed_stage_1")
    return [
        *("--load_model", files / "base.pth", "--data_file", files / "documents", "--dataload", "pad"),
        *("--micro_bsz", 2, *METHODS[method], *engine),
        *words,
    ]


def run(files: Path, name: str, method: str, *words: object) -> tuple[torch.Tensor, list[dict[str, float]], str]:
    """What was trained, logged lines and output of a run in processes of its own."""
    with started("train.py", *words_of(files, method, "--proj_dir", files / name, *words)) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    tensors = torch.load(files / name / "rwkv-final.pth", weights_only=True)
    return torch.cat([tensor.float().flatten() for tensor in tensors.values()]), metrics(files / name), out


@pytest.mark.parametrize("others", [("2", "3"), pytest.param(("2_offload", "3_offload"), marks=OFFLOADS)], ids=str)
@pytest.mark.parametrize("method", SHARDED)
def test_every_stage_gives_one_result(method: str, others: tuple[str, ...], files: Path) -> None:
    """The saved files key by key: names, dtypes, values."""
    stages = ("1", *others)

    def of_stage(stage: str) -> tuple[torch.Tensor, list[dict[str, float]], str]:
        words = ("--epoch_count", 3, "--devices", 2, "--strategy", f"deepspeed_stage_{stage}")
        return run(files, stage, method, *words)

    with ThreadPoolExecutor() as pool:  # a run is ten seconds of imports and one of steps
        found = dict(zip(stages, pool.map(of_stage, stages), strict=True))
    one = torch.load(files / "1" / "rwkv-final.pth", weights_only=True)
    for stage in others:
        other = torch.load(files / stage / "rwkv-final.pth", weights_only=True)
        assert {n: (t.shape, t.dtype) for n, t in other.items()} == {n: (t.shape, t.dtype) for n, t in one.items()}
        for name in ("loss", "grad_norm"):
            values, expected = ([line[name] for line in found[each][1]] for each in (stage, "1"))
            assert values == pytest.approx(expected, rel=1e-2), (stage, name)
        assert (found[stage][0] - found["1"][0]).norm() < 0.01 * found["1"][0].norm(), stage


@pytest.mark.parametrize("method", ["states", "lora", "lisa", "lisa, 8 bits, parked"])
def test_two_devices_take_the_steps_of_one_that_accumulates(method: str, files: Path) -> None:
    with ThreadPoolExecutor() as pool:
        of_one = pool.submit(run, files, "one", method, "--epoch_count", 3, "--accumulate_grad_batches", 2)
        two, two_lines, out = run(files, "two", method, "--epoch_count", 3, "--devices", 2)
        one, one_lines, _ = of_one.result()
    assert [line["lr"] for line in two_lines] == [line["lr"] for line in one_lines]
    for name in ("loss", "grad_norm"):
        values, expected = ([line[name] for line in lines] for lines in (two_lines, one_lines))
        assert values[0] == pytest.approx(expected[0], rel=1e-3), name
        assert values == pytest.approx(expected, rel=2e-2), name
    # Gradients that differ by 1e-6 move these states by 0.3 % (bf16, on a CPU); other samples would by 40 %.
    assert (two - one).norm() < 0.03 * one.norm()
    assert out.count("results    ") == 1, "only one rank prints"


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("states", "deepspeed_stage_1"),
        ("lora", "deepspeed_stage_1"),
        ("all weights", "deepspeed_stage_3"),
        ("lora and parts", "deepspeed_stage_3"),
        ("lisa, 8 bits, parked", "auto"),
        ("updates in the backward", "auto"),
    ],
)
def test_a_stopped_run_goes_on_with_both(method: str, strategy: str, files: Path) -> None:
    length = ("--epoch_count", 60, "--epoch_save", 0, "--devices", 2, "--strategy", strategy)
    _, whole, _ = run(files, "whole", method, *length)
    folder = files / "parts"
    with started("train.py", *words_of(files, method, "--proj_dir", folder, *length)) as process:
        wait_until(lambda: len(metrics(folder)) >= 40 or process.poll() is not None, seconds=300)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped by SIGINT" in out
    assert len(metrics(folder)) < len(whole)
    with started("train.py", "--proj_dir", folder, "--resume", 1) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    parts = metrics(folder)
    assert [line["lr"] for line in parts] == [line["lr"] for line in whole]
    assert [line["tokens"] for line in parts] == [line["tokens"] for line in whole]
    losses, expected = ([line["loss"] for line in lines] for lines in (parts, whole))
    assert losses == pytest.approx(expected, rel=5e-2)
    assert files_in(folder) == files_in(files / "whole")


def test_no_process_stays_behind_a_first_one_that_was_killed(files: Path) -> None:
    """It would keep its card's memory for as long as NCCL waits."""

    def left() -> list[str]:
        commands = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid())]
        return [path.parent.name for path in commands if str(files / "killed").encode() in _bytes_of(path)]

    length = ("--epoch_count", 600, "--epoch_save", 0, "--devices", 2)
    with started("train.py", *words_of(files, "states", "--proj_dir", files / "killed", *length)) as process:
        wait_until(lambda: len(metrics(files / "killed")) >= 5 or process.poll() is not None, seconds=300)
        assert len(left()) == 2
        process.kill()
        wait_until(lambda: not left(), seconds=30)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # a process that has just ended
        return b""
