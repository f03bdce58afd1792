"""Two GPUs of one machine against one that accumulates: the same steps, each rank with packed weights of its own."""

import fcntl
import os
import signal
import subprocess
import time
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
SECONDS = 180
"""That a run may take when the machine has much else to do; alone it takes 20."""
TELLS = {"PYTHONFAULTHANDLER": "1"}
"""Environment of processes that say what all their threads do when they are aborted."""
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


def output_of(process: subprocess.Popen[str], folder: Path) -> str:
    """Once a run into this folder has ended well; one that does not end has its processes say where they are."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        found = processes_of(folder)
        waiting = "\n".join(map(described, found))
        for one in sorted(found, key=lambda one: int(one.name) == process.pid):  # the first last: others end with it
            os.kill(int(one.name), signal.SIGABRT)
            time.sleep(2)
        process.kill()
        out, err = process.communicate(timeout=60)
        pytest.fail(f"no end after {SECONDS} seconds:\n{waiting}\n{out}\n{err}")
    assert process.returncode == 0, err
    return out


def run(folder: Path, files: Path, method: str, *words: object) -> str:
    """Output of a run in processes of its own, whose results are in `folder`."""
    with started("train.py", *words_of(files, method, *words, "--proj_dir", folder), environment=TELLS) as process:
        return output_of(process, folder)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(folder / "rwkv-final.pth", weights_only=True)
    return tensors


def flat(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for tensor in trained(folder).values()])


@pytest.fixture
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what tests have in common, in whichever of pytest's processes they are."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_gpus"
    folder.mkdir(exist_ok=True)
    return folder


def of_stage(stage: str, folder: Path, files: Path, method: str) -> None:
    run(folder, files, method, "--epoch_count", 3, "--devices", 2, "--strategy", f"deepspeed_stage_{stage}")


def of_first_stage(folder: Path, files: Path, method: str) -> None:
    """The first test to come runs it, others wait for it."""
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            of_stage("1", folder, files, method)


@pytest.mark.parametrize("others", [("2", "3"), pytest.param(("2_offload", "3_offload"), marks=OFFLOADS)], ids=str)
@pytest.mark.parametrize("method", SHARDED)
def test_every_stage_gives_one_result(method: str, others: tuple[str, ...], files: Path, once: Path) -> None:
    """The saved files key by key: names, dtypes, values."""
    first = once / method.replace(" ", "_")
    with ThreadPoolExecutor() as pool:  # a run is ten seconds of imports and one of steps
        runs = [pool.submit(of_stage, stage, files / stage, files, method) for stage in others]
        runs.append(pool.submit(of_first_stage, first, files, method))
        for each in runs:
            each.result()
    one = trained(first)
    for stage in others:
        other = trained(files / stage)
        assert {n: (t.shape, t.dtype) for n, t in other.items()} == {n: (t.shape, t.dtype) for n, t in one.items()}
        for name in ("loss", "grad_norm"):
            values, expected = ([line[name] for line in metrics(folder)] for folder in (files / stage, first))
            assert values == pytest.approx(expected, rel=1e-2), (stage, name)
        assert (flat(files / stage) - flat(first)).norm() < 0.01 * flat(first).norm(), stage


@pytest.mark.parametrize("method", ["states", "lora", "lisa", "lisa, 8 bits, parked"])
def test_two_devices_take_the_steps_of_one_that_accumulates(method: str, files: Path) -> None:
    length = ("--epoch_count", 3)
    with ThreadPoolExecutor() as pool:
        of_one = pool.submit(run, files / "one", files, method, *length, "--accumulate_grad_batches", 2)
        out = run(files / "two", files, method, *length, "--devices", 2)
        of_one.result()
    one, two = flat(files / "one"), flat(files / "two")
    one_lines, two_lines = metrics(files / "one"), metrics(files / "two")
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
    length = ("--epoch_count", 40, "--epoch_save", 0, "--devices", 2, "--strategy", strategy)
    folder = files / "parts"
    with ThreadPoolExecutor() as pool:
        of_whole = pool.submit(run, files / "whole", files, method, *length)
        with started("train.py", *words_of(files, method, *length, "--proj_dir", folder), environment=TELLS) as process:
            wait_until(lambda: len(metrics(folder)) >= 10 or process.poll() is not None, seconds=SECONDS)
            process.send_signal(signal.SIGINT)
            out = output_of(process, folder)
        assert "stopped by SIGINT" in out
        stopped_after = len(metrics(folder))
        with started("train.py", "--resume", 1, "--proj_dir", folder, environment=TELLS) as process:
            output_of(process, folder)
        of_whole.result()
    whole = metrics(files / "whole")
    assert stopped_after < len(whole)
    parts = metrics(folder)
    assert [line["lr"] for line in parts] == [line["lr"] for line in whole]
    assert [line["tokens"] for line in parts] == [line["tokens"] for line in whole]
    losses, expected = ([line["loss"] for line in lines] for lines in (parts, whole))
    assert losses == pytest.approx(expected, rel=5e-2)
    assert files_in(folder) == files_in(files / "whole")


def test_no_process_stays_behind_a_first_one_that_was_killed(files: Path) -> None:
    """It would keep its card's memory for as long as NCCL waits."""
    folder = files / "killed"
    words = ("--epoch_count", 2000, "--epoch_save", 0, "--devices", 2, "--proj_dir", folder)
    with started("train.py", *words_of(files, "states", *words), environment=TELLS) as process:
        wait_until(lambda: len(metrics(folder)) >= 5 or process.poll() is not None, seconds=SECONDS)
        if process.poll() is not None:
            pytest.fail(f"it ended by itself:\n{output_of(process, folder)}")
        both = processes_of(folder)
        assert len(both) == 2, "\n".join(map(described, both))
        process.kill()
        try:
            wait_until(lambda: not processes_of(folder), seconds=120)  # a driver with much to do takes its time
        except TimeoutError:
            pytest.fail("still there:\n" + "\n".join(map(described, processes_of(folder))))


def processes_of(folder: Path) -> list[Path]:
    """Where /proc has the processes that run into this folder; of one that has ended its words are gone."""
    commands = [path for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid())]
    return [path.parent for path in commands if str(folder) in _said(path).split("\0")]


def described(process: Path) -> str:
    """A line that says what it does: its state, its parent, and where in the kernel each of its threads waits."""
    status = dict(line.split(":\t", 1) for line in _said(process / "status").splitlines() if ":\t" in line)
    threads = [f"{_said(each / 'comm').strip()} {_said(each / 'wchan')}" for each in process.glob("task/*")]
    return f"{process.name}: {status.get('State')}, child of {status.get('PPid')}; {', '.join(threads)}"


def _said(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # a process that has just ended, or what is not ours to know
        return ""
