"""What Lightning's Trainer is told of an engine."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins.precision import DeepSpeedPrecision, Precision
from torch import Tensor, nn

from src.config import TrainConfig
from src.device import launched_by
from src.training import alone
from src.training.engine import Hardware, deepspeed_config
from src.training.replicas import Replicas


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


def trainer_arguments(
    hardware: Hardware, config: TrainConfig, trained_elements: int, *, updates_flat: bool = False
) -> dict[str, Any]:
    """Lightning's arguments for accelerator, devices, strategy and precision.

    Args:
        hardware: what `resolve_hardware` chose.
        config: the flags.
        trained_elements: number of trained values, which bounds DeepSpeed's buckets.
        updates_flat: see `deepspeed_config`.
    """
    _quieten("pytorch_lightning|lightning_fabric", "pytorch_lightning", "lightning.pytorch")
    arguments: dict[str, Any] = {
        "accelerator": "gpu" if hardware.on_gpu else "cpu",
        "num_nodes": config.num_nodes,
        "devices": config.devices,
    }
    if hardware.strategy == "single":
        return {**arguments, "plugins": [Precision(), LightningEnvironment()]}

    if not hardware.has_engine:
        return {**arguments, "strategy": Replicas(), "plugins": [Precision(), _cluster()]}

    from pytorch_lightning.strategies import DeepSpeedStrategy

    os.environ.setdefault("DS_ACCELERATOR", "cuda")
    _quieten("deepspeed", "DeepSpeed")
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    strategy = DeepSpeedStrategy(
        config=deepspeed_config(hardware.strategy, config, trained_elements, updates_flat=updates_flat),
        precision_plugin=_UntouchedDeepSpeedPrecision("32-true"),
        process_group_backend=alone.register() if config.processes == 1 else None,
    )
    return {**arguments, "strategy": strategy, "plugins": [_cluster()]}


def _cluster() -> ClusterEnvironment:
    """What tells the processes of a run from each other; named, so that Lightning guesses nothing from variables.

    Under SLURM it would otherwise answer SIGUSR1 with a checkpoint of its own and put the job into the queue again.
    """
    match launched_by():
        case ("torchrun", _):
            return TorchElasticEnvironment()
        case ("srun", _):
            return SLURMEnvironment(auto_requeue=False)
        case _:
            return LightningEnvironment()


def _quieten(module: str, *loggers: str) -> None:
    """Libraries tell their life stories at level INFO on the user's terminal."""
    for logger in loggers:
        logging.getLogger(logger).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=module)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether DeepSpeed says what its configuration does not: that one names optimizers which it does not know."""
    return "untested optimizer" not in record.getMessage()
