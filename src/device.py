"""What hardware there is: this process's rank, its device, the computation dtype, and their settings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from src import system
from src.errors import ConfigError, TrainingError
from src.model.shape import ModelShape

COMPUTE_DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
}
OLDEST_CAPABILITY = (8, 0)
_SMALL_MODEL = 20_000_000
_CU_LIMIT_STACK_SIZE = 0
_STACK_BYTES = 128
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_NO_MEMORY = ("can't allocate memory", "DefaultCPUAllocator", "Cannot allocate memory")
"""How torch says that the host has no memory left, in a plain RuntimeError."""


@dataclass(frozen=True)
class Device:
    """Where a process computes, and in what.

    Attributes:
        device: this process's device.
        precision: bf16, fp32, fp16 or tf32, resolved.
    """

    device: torch.device
    precision: str

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of activations and frozen weights."""
        return COMPUTE_DTYPES[self.precision]

    @property
    def on_gpu(self) -> bool:
        """Whether `device` is a GPU."""
        return self.device.type == "cuda"

    def describe(self) -> str:
        """One phrase for the plan."""
        threads = torch.get_num_threads()
        on_cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else on_cpu
        return f"{name}, {self.precision}"


def global_rank(devices: int = 1) -> int:
    """This process's number among all of the run, as its launcher tells it.

    Args:
        devices: processes per machine; needed where the launcher gives machine and local number only.
            Without it the result is right about being 0, which is what printing and saving ask.
    """
    if "RANK" in os.environ:
        return _number("RANK")
    # Lightning's own processes have LOCAL_RANK, and in a SLURM job all of them inherit one SLURM_PROCID.
    if "LOCAL_RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        return _number("SLURM_PROCID")
    machine = _number("NODE_RANK", "GROUP_RANK")
    return machine * devices + _number("LOCAL_RANK")


def _number(*names: str, default: int = 0) -> int:
    """The first of these variables that is set; that it holds a number is known since the command line was read."""
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def _local_rank() -> int:
    return _number("LOCAL_RANK", "SLURM_LOCALID")


def refuse_other_ranks(devices: int, nodes: int) -> None:
    """Refuses a process whose number, as its environment has it, is none of this run's: it would save nothing.

    And one that seems to be started by a launcher which is not there: Lightning would start no others, and wait.

    Raises:
        ConfigError: naming the variables.
    """
    processes, rank = devices * nodes, global_rank(devices)
    if processes > 1 and "LOCAL_RANK" in os.environ and "WORLD_SIZE" not in os.environ and launched_by() is None:
        raise ConfigError(
            f"the environment has LOCAL_RANK={os.environ['LOCAL_RANK']}, as processes have that a launcher starts, but "
            f"no WORLD_SIZE: this one would wait for {processes - 1} more without end; unset LOCAL_RANK, or start with "
            "torchrun"
        )
    if rank < processes and _local_rank() < devices:
        return
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID")
    found = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    raise ConfigError(
        f"the environment ({found}) makes this process number {max(rank, _local_rank())} counted from 0, and --devices "
        f"{devices} --num_nodes {nodes} make {processes}: unset these variables, or give the flags of what was started"
    )


def launched_by() -> tuple[str, int] | None:
    """The launcher that started this process beside others ("srun" or "torchrun"), and how many it started.

    A process of a batch script inherits most of SLURM's variables without being a task of a step: only `srun` says how
    many tasks its step has. Lightning's own processes are started by this program, not by a launcher.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", _number("WORLD_SIZE", default=1)
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return ("srun", int(tasks)) if tasks.isdigit() and "LOCAL_RANK" not in os.environ else None


def is_started_by_first() -> bool:
    """Whether this is a further process of a run, which its first one on this machine has started by Lightning."""
    return _number("LOCAL_RANK") > 0 and launched_by() is None


def uses_gpu(accelerator: str) -> bool:
    """Whether `--accelerator` means a GPU here.

    Raises:
        ConfigError: if it asks for one and there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ConfigError(
            f"--accelerator {accelerator} was asked for and no CUDA GPU is visible: "
            + (f"look at CUDA_VISIBLE_DEVICES={chosen} in the environment, " if chosen is not None else "")
            + "install a CUDA build of torch and check nvidia-smi, or use --accelerator auto or cpu"
        )
    return accelerator != "cpu" and torch.cuda.is_available()


def resolve_device(accelerator: str, precision: str) -> Device:
    """Chooses device and precision; changes nothing.

    Args:
        accelerator: auto, gpu, cuda or cpu.
        precision: bf16, fp32, fp16, tf32, or "" for what suits the device.

    Raises:
        ConfigError: if what was asked for does not exist here.
    """
    if not uses_gpu(accelerator):
        if precision in ("fp16", "tf32"):
            raise ConfigError(f"--precision {precision} needs a GPU and none is used: use fp32 or bf16")
        return Device(torch.device("cpu"), precision or "fp32")
    if _local_rank() >= (visible := torch.cuda.device_count()):
        raise ConfigError(
            f"this process is number {_local_rank()} of its machine by the environment (LOCAL_RANK, SLURM_LOCALID), "
            f"counted from 0, and {visible} GPU(s) are visible: unset the variable, or make more visible"
        )
    chosen = Device(torch.device("cuda", _local_rank()), precision or "bf16")
    capability = torch.cuda.get_device_capability(chosen.device)
    if capability < OLDEST_CAPABILITY and chosen.precision in ("bf16", "tf32"):
        raise ConfigError(
            f"--precision {chosen.precision} needs compute capability 8.0 and this GPU has "
            f"{capability[0]}.{capability[1]}: use --precision fp32"
        )
    return chosen


def apply_device(device: Device, *, alone: bool = True, small_messages: bool = False) -> None:
    """Makes a GPU this process's own and has little of its memory lie idle; on a CPU nothing happens.

    To be called before anything is allocated.

    Args:
        device: what `resolve_device` chose.
        alone: whether this is the only process of the run, so that NCCL is not needed.
        small_messages: whether what NCCL carries is small enough for few channels.
    """
    if not device.on_gpu:
        return
    torch.cuda.set_device(device.device)
    torch.backends.cuda.matmul.allow_tf32 = device.precision == "tf32"
    _save_device_memory(small_messages=small_messages)
    if alone:  # NCCL's kernels call through tables: leave them the stack they expect
        _limit_stacks(device.device)


def _save_device_memory(*, small_messages: bool) -> None:
    """Asks torch's allocator, cuBLAS and NCCL for less idle memory, where the environment says nothing.

    All are set before anything is allocated. Segments that grow leave no holes of fixed size; three cuBLAS
    workspaces of 8 MiB instead of 32 made no step slower (H200, 1.6B and 7B). Segments stay as they are on Windows'
    Linux (WSL), where drivers of 2026 still fail on growing ones (github.com/pytorch/pytorch/issues/192330). Four
    NCCL channels of 1 MiB carry the gradient of states as fast as those NCCL takes by itself, and leave 0.8 GiB more
    of each GPU free (two H200, 7B).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    if small_messages:
        os.environ.setdefault("NCCL_MAX_CTAS", "4")
        os.environ.setdefault("NCCL_BUFFSIZE", str(2**20))
    if sys.platform != "linux" or "microsoft" in platform.release().lower():
        return
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # What torch.cuda.memory._set_allocator_settings, deprecated in torch 2.11, calls.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _limit_stacks(device: torch.device) -> None:
    """Has the driver reserve little stack memory for the threads that a GPU can run at once.

    It holds 1 KiB ready for each of them (270,000 on an H200), whether a kernel uses a stack or not: of the 527 MiB
    a process takes there before its first tensor, 295 are left. Where a kernel needs more, the driver gives it more
    (CUDA driver API, `cuCtxSetLimit`). Without the driver's library nothing happens.
    """
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        torch.cuda.synchronize(device)  # the limit is the context's, which this makes if there is none
        driver.cuCtxSetLimit(_CU_LIMIT_STACK_SIZE, ctypes.c_size_t(_STACK_BYTES))


def memory_bytes(device: torch.device) -> int | None:
    """All memory of a GPU, or what this process may take of the host's; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = system.memory_bytes()
    if machine is None:
        return None
    known = [machine]
    for limit in map(Path, _CGROUP_LIMITS):
        with contextlib.suppress(OSError, ValueError):  # no such group, or the word "max"
            known.append(int(limit.read_text()))
    return min(known)


def require_memory(subject: str, way_out: str, needed_bytes: float, device: torch.device) -> None:
    """Refuses what could not fit into all the memory there is.

    Args:
        subject: flags and values, the beginning of the sentence.
        way_out: its end.
        needed_bytes: at least.
        device: the GPU, or a CPU for the host.

    Raises:
        ConfigError: naming what is needed and what there is.
    """
    there_bytes = memory_bytes(device)
    if there_bytes is not None and needed_bytes > there_bytes:
        name = "GPU" if device.type == "cuda" else "machine"
        raise ConfigError(
            f"{subject} needs {needed_bytes / 2**30:,.1f} GiB at least and the {name} has "
            f"{there_bytes / 2**30:,.1f}: {way_out}"
        )


@contextlib.contextmanager
def without_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Inside, a device or host without memory left is an error of the user's, in the words of `advice`.

    Raises:
        TrainingError: no memory was left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise TrainingError(advice()) from error


def spare_threads(device: torch.device, shape: ModelShape) -> None:
    """Gives a small model on a CPU one thread, unless OMP_NUM_THREADS says otherwise.

    Its operations last microseconds; threads that wait for each other between them cost more than they do. On a
    virtual machine of two cores 15 steps and two evaluations of a 3.5 M model took 25 s with one thread and 194 s
    with two.
    """
    if device.type == "cpu" and shape.parameter_count < _SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
