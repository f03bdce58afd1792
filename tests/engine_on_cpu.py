"""The program's runs under DeepSpeed's stages on a CPU, in this process: what a GPU would see but for the device."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from src.config import TrainConfig
from src.training import run as run_module
from src.training.engine import Hardware, resolve_hardware


def let_engines_take_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """Lightning's strategy refuses a CPU; told that it is one of its own, it does all the rest."""
    patch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    from pytorch_lightning.accelerators import CPUAccelerator
    from pytorch_lightning.strategies import DeepSpeedStrategy
    from pytorch_lightning.strategies import deepspeed as strategy

    def on_cpu(config: TrainConfig) -> Hardware:
        found = resolve_hardware(config)
        return Hardware(found.device, found.precision, config.strategy if config.uses_deepspeed else "single")

    # An operator for several processes of one machine, which takes half a minute to be compiled.
    patch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    patch.setattr(strategy, "CUDAAccelerator", CPUAccelerator)
    patch.setattr(strategy, "_validate_device_index_selection", lambda devices: None)
    patch.setattr(DeepSpeedStrategy, "root_device", torch.device("cpu", 0))
    patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    patch.setattr(run_module, "resolve_hardware", on_cpu)
