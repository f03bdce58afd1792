"""From flags to an engine and DeepSpeed's configuration, on top of `src.device`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from src.config import TrainConfig
from src.device import Device, apply_device, launched_by, refuse_other_ranks, resolve_device, uses_gpu
from src.errors import ConfigError, require_package
from src.training.flat_updates import PIECE_MULTIPLE
from src.training.optimizers import check_optimizer

REPLICAS = "replicas"
"""Several processes without an engine."""

_LIVE_WEIGHTS = 300_000_000
"""Weights that stage 3 lets wait on a device, gathered, for their next use: some layers of 3B, one of 7B."""
_VALUES_AT_A_TIME = 50_000_000
"""Of a rank's share that stage 3 updates together: their gradients then exist in fp32, too, 0.3 GiB in all; by default
they are a billion, and 5.6 GiB."""


@dataclass(frozen=True)
class Hardware(Device):
    """Where a run computes, and how its processes work together.

    Attributes:
        strategy: "single", "replicas" or a deepspeed_* name.
        notes: lines to print, about what was decided.
    """

    strategy: str
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One phrase for the plan."""
        words = {"single": "single device", REPLICAS: "every GPU with a copy of everything"}
        return f"{super().describe()}, {words.get(self.strategy, self.strategy)}"

    @property
    def has_engine(self) -> bool:
        """Whether it is DeepSpeed's."""
        return self.strategy.startswith("deepspeed")


def resolve_hardware(config: TrainConfig) -> Hardware:
    """Chooses device, precision and engine; changes nothing.

    Raises:
        ConfigError: if what was asked for does not exist here.
    """
    processes = config.processes
    launcher, started = launched_by() or ("", processes)
    if started != processes:
        raise ConfigError(
            f"{launcher} started {started} processes, and --devices {config.devices} --num_nodes {config.num_nodes} "
            f"make {processes}: give the flags of what was started, or start python without {launcher}"
        )
    refuse_other_ranks(config.devices, config.num_nodes)
    on_gpu = uses_gpu(config.accelerator)
    if on_gpu and config.devices > (visible := torch.cuda.device_count()):
        raise ConfigError(f"--devices {config.devices} was asked for and {visible} GPU(s) are visible: lower --devices")
    if on_gpu and config.method == "lisa" and config.uses_deepspeed:
        raise ConfigError(
            f"--peft lisa trains layers by turns, and DeepSpeed (--strategy {config.strategy}) keeps to the tensors "
            "that it was given first: leave --strategy out, on any number of GPUs"
        )
    if on_gpu and config.fused_update and config.uses_deepspeed:
        raise ConfigError(
            f"--fused_update 1 updates tensor by tensor, and DeepSpeed (--strategy {config.strategy}) all tensors as "
            "one: leave --strategy out, on any number of GPUs, or --fused_update"
        )
    if on_gpu and config.has_engine:
        asked = f"--strategy {config.strategy}" + ("" if config.uses_deepspeed else " on several GPUs")
        require_package(asked, "deepspeed", "train on one GPU without --strategy")
    check_optimizer(config, on_gpu=on_gpu)
    chosen = resolve_device(config.accelerator, config.precision)
    several = processes > 1
    if on_gpu:
        strategy = config.strategy
        if strategy == "auto":
            strategy = "single" if not several else "deepspeed_stage_1" if config.has_engine else REPLICAS
        return Hardware(chosen.device, chosen.precision, strategy)

    if config.offload_activations:
        raise ConfigError("--offload_activations 1 frees a GPU's memory and none is used: leave it out on a CPU")
    if several:
        raise ConfigError(f"--devices {config.devices} --num_nodes {config.num_nodes} needs GPUs: use 1 and 1 on a CPU")
    notes = []
    if config.uses_deepspeed:
        notes.append(f"--strategy {config.strategy} needs a GPU: running on a single device instead")
    return Hardware(chosen.device, chosen.precision, "single", notes)


def apply_hardware(hardware: Hardware, config: TrainConfig, *, small_messages: bool) -> None:
    """Makes what `resolve_hardware` chose this process's own; to be called before anything is allocated.

    Args:
        hardware: what was chosen.
        config: the flags.
        small_messages: whether the gradient is small, see `apply_device`.
    """
    one_machine = config.num_nodes == 1
    apply_device(hardware, alone=one_machine and config.devices == 1, small_messages=small_messages and one_machine)


def deepspeed_config(
    strategy: str, config: TrainConfig, trained_elements: int, *, updates_flat: bool = False
) -> dict[str, Any]:
    """The engine's configuration: ZeRO and nothing that casts.

    Without a `bf16` or `fp16` section the engine keeps every dtype. Its two buckets hold
    `reduce_bucket_size` elements each, so they are sized to what is trained: a quarter of it, since a small
    trained part is reduced in no time and memory is what users lack. Reduction stays on the stream of the
    backward: on one of its own DeepSpeed 0.19.8 gives the memory of a gradient larger than a bucket back while that
    stream still reads it, and a replayed step has nothing to overlap, its gradients come all at once.

    Args:
        strategy: deepspeed_*.
        config: the flags.
        trained_elements: number of trained values.
        updates_flat: whether they are one tensor that `FlatUpdates` updates: its gradient is averaged where it is, by
            one process not at all, and no norm is formed.
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
    if stage == 3:
        # Weights are gathered when their layer comes, and the next ones meanwhile; those of earlier layers are not kept
        # for the backward.
        zero |= {"stage3_max_live_parameters": _LIVE_WEIGHTS, "stage3_max_reuse_distance": _LIVE_WEIGHTS}
        zero["sub_group_size"] = _VALUES_AT_A_TIME
    if strategy.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if updates_flat:
        one_bucket = trained_elements + PIECE_MULTIPLE * config.processes
        zero |= {"contiguous_gradients": False, "compute_grad_norm": False, "reduce_bucket_size": one_bucket}
    return {
        **({"gradient_allreduce_op": "sum"} if updates_flat and config.processes == 1 else {}),
        "timers": {"throughput": {"enabled": False}},  # for which it would wait for the device twice a step
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": config.micro_bsz,
    }
