"""From flags to a device, a computation dtype and Lightning's Trainer arguments."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.precision import DeepSpeedPrecision, Precision
from torch import Tensor, nn

from src.config import TrainConfig
from src.errors import ConfigError
from src.model.parameters import ModelShape
from src.training import alone

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


@dataclass(frozen=True)
class Hardware:
    """Where a run computes.

    Attributes:
        device: this process's device.
        precision: bf16, fp32, fp16 or tf32, resolved.
        strategy: "single" or a deepspeed_* name.
        notes: lines to print, about what was decided.
    """

    device: torch.device
    precision: str
    strategy: str
    notes: list[str] = field(default_factory=list)

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
        engine = "single device" if self.strategy == "single" else self.strategy
        return f"{name}, {self.precision}, {engine}"


def global_rank(devices: int = 1) -> int:
    """This process's number among all of the run, as its launcher tells it.

    Args:
        devices: processes per machine; needed where the launcher gives machine and local number only.
            Without it the result is right about being 0, which is what printing and saving ask.
    """
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    # Lightning's own processes have LOCAL_RANK, and in a SLURM job all of them inherit one SLURM_PROCID.
    if "LOCAL_RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        return int(os.environ["SLURM_PROCID"])
    machine = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return machine * devices + int(os.environ.get("LOCAL_RANK", "0"))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def resolve_hardware(config: TrainConfig) -> Hardware:
    """Chooses device, precision and engine.

    Raises:
        ConfigError: if what was asked for does not exist here.
    """
    notes: list[str] = []
    if config.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"--accelerator {config.accelerator} was asked for and no CUDA GPU is visible: install a CUDA build of "
            "torch and check nvidia-smi, or use --accelerator auto or cpu"
        )
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    if not on_gpu:
        if config.precision in ("fp16", "tf32"):
            raise ConfigError(f"--precision {config.precision} needs a GPU and none is used: use fp32 or bf16")
        if config.offload_activations:
            raise ConfigError("--offload_activations 1 frees a GPU's memory and none is used: leave it out on a CPU")
        if config.devices * config.num_nodes > 1:
            raise ConfigError(
                f"--devices {config.devices} --num_nodes {config.num_nodes} needs GPUs: use 1 and 1 on a CPU"
            )
        if config.uses_deepspeed:
            notes.append(f"--strategy {config.strategy} needs a GPU: running on a single device instead")
        return Hardware(torch.device("cpu"), config.precision or "fp32", "single", notes)

    if config.strategy.startswith("deepspeed_stage_3"):
        raise ConfigError(
            f"--strategy {config.strategy} shards every weight, and the layers here use weights outside of the hooks "
            "that gather them: use deepspeed_stage_1, or deepspeed_stage_2 to shard gradients too"
        )
    visible = torch.cuda.device_count()
    if config.devices > visible:
        raise ConfigError(f"--devices {config.devices} was asked for and {visible} GPU(s) are visible: lower --devices")
    device = torch.device("cuda", _local_rank())
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY and (config.precision or "bf16") in ("bf16", "tf32"):
        raise ConfigError(
            f"--precision {config.precision or 'bf16'} needs compute capability 8.0 and this GPU has "
            f"{capability[0]}.{capability[1]}: use --precision fp32"
        )
    strategy = config.strategy
    if strategy == "auto":
        strategy = "single" if config.devices * config.num_nodes == 1 else "deepspeed_stage_1"
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
    _save_device_memory(small_messages=config.trains_states and config.num_nodes == 1)
    if config.devices * config.num_nodes == 1:  # NCCL's kernels call through tables: leave them the stack they expect
        _limit_stacks(device)
    return Hardware(device, config.precision or "bf16", strategy, notes)


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


def spare_threads(device: torch.device, shape: ModelShape) -> None:
    """Gives a small model on a CPU one thread, unless OMP_NUM_THREADS says otherwise.

    Its operations last microseconds; threads that wait for each other between them cost more than they do. On a
    virtual machine of two cores 15 steps and two evaluations of a 3.5 M model took 25 s with one thread and 194 s
    with two.
    """
    if device.type == "cpu" and shape.parameter_count < _SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


class _UntouchedDeepSpeedPrecision(DeepSpeedPrecision):
    """Leaves every dtype as the model has it: fp32 states, low-precision weights and packed bytes live together.

    Lightning and the engine would both divide the loss by the number of accumulated micro-batches; here only
    Lightning does.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(self, tensor: Tensor, model: LightningModule, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        engine: Any = model.trainer.model
        engine.backward(tensor, scale_wrt_gas=False)


def trainer_arguments(hardware: Hardware, config: TrainConfig, trained_elements: int) -> dict[str, Any]:
    """Lightning's arguments for accelerator, devices, strategy and precision.

    Args:
        hardware: what `resolve_hardware` chose.
        config: the flags.
        trained_elements: number of trained values, which bounds DeepSpeed's buckets.
    """
    arguments: dict[str, Any] = {
        "accelerator": "gpu" if hardware.on_gpu else "cpu",
        "num_nodes": config.num_nodes,
        "devices": config.devices,
    }
    if hardware.strategy == "single":
        return {**arguments, "plugins": [Precision()]}

    from pytorch_lightning.strategies import DeepSpeedStrategy

    _quieten_deepspeed()
    strategy = DeepSpeedStrategy(
        config=deepspeed_config(hardware.strategy, config, trained_elements),
        precision_plugin=_UntouchedDeepSpeedPrecision("32-true"),
        process_group_backend=alone.register() if config.devices * config.num_nodes == 1 else None,
    )
    return {**arguments, "strategy": strategy}


def deepspeed_config(strategy: str, config: TrainConfig, trained_elements: int) -> dict[str, Any]:
    """The engine's configuration: ZeRO and nothing that casts.

    Without a `bf16` or `fp16` section the engine keeps every dtype. Its two buckets hold
    `reduce_bucket_size` elements each, so they are sized to what is trained: a quarter of it, since a small
    trained part is reduced in no time and memory is what users lack. Reduction stays on the stream of the
    backward: on one of its own DeepSpeed 0.19.8 gives the memory of a gradient larger than a bucket back while that
    stream still reads it, and a replayed step has nothing to overlap, its gradients come all at once.
    """
    stage = int(strategy.split("_")[2])
    limit = config.ds_bucket_mb * 10**6 // 4
    bucket = max(min(-(-trained_elements // 4), limit), 1)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "allgather_partitions": True,
        "reduce_scatter": True,
        "allgather_bucket_size": bucket,
        "reduce_bucket_size": bucket,
    }
    if strategy.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": config.micro_bsz,
    }


def _quieten_deepspeed() -> None:
    """DeepSpeed tells its life story at level INFO on the user's terminal."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="deepspeed")
