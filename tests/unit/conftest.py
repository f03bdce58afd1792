"""Imagined machines."""

import importlib.util

import pytest
import torch


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def allocator_settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's allocator is asked for; the environment is as it was afterwards."""
    asked: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    for name in (
        "CUBLAS_WORKSPACE_CONFIG", "NCCL_MAX_CTAS", "NCCL_BUFFSIZE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    ):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return asked


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, allocator_settings: list[str]) -> None:
    """A machine with two GPUs of compute capability 9.0, DeepSpeed, and all that its Adam for the host takes."""
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "deepspeed" or installed(name))
    monkeypatch.setattr("src.training.optimizers.require_host_adam", lambda strategy: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("src.device._limit_stacks", lambda device: None)
