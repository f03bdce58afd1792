"""The optimizers of `--optim`: torch's Adam, DeepSpeed's on the host, and bitsandbytes' with states in 8 bits.

States in 8 bits take 2 bytes a value (Lion: 1) instead of Adam's 8. Tensors of fewer than 4096 values keep fp32 states,
the library's own limit; DeepSpeed, which optimises all tensors of a group as one, packs theirs with the others.
On a GPU `device_updates` without an engine, and `flat_updates` under one, take the place of most of them, see
`module.kernels_of_updates`.
Parameters and gradients are fp32 with every optimizer.

Source: 8-bit states, arXiv 2110.02861; paged ones, arXiv 2305.14314, section 3; Lion, arXiv 2302.06675.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from src.config import TrainConfig
from src.errors import ConfigError
from src.startup import uncompiled_imports
from src.training.host_adam import make_host_adam, require_host_adam

GRADIENT_CLIP = 1.0
"""Largest norm of a step's gradient."""

_OF_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "lion8bit": "Lion8bit"}


def check_optimizer(config: TrainConfig, *, on_gpu: bool) -> None:
    """Refuses what cannot work here.

    Raises:
        ConfigError: the optimizer needs a GPU, or the engine brings another, or that one cannot be built here.
    """
    if config.optim == "paged_adamw8bit" and not on_gpu:
        raise ConfigError(
            "--optim paged_adamw8bit moves its states between GPU and host memory, and bitsandbytes has no such kernel "
            "for a CPU: use adamw8bit"
        )
    if config.optim in _OF_BITSANDBYTES and on_gpu and config.strategy.endswith("offload"):
        raise ConfigError(
            f"--strategy {config.strategy} steps on the host with DeepSpeed's own Adam: use deepspeed_stage_2 with "
            f"--optim {config.optim}, or leave --optim out"
        )
    if on_gpu and config.strategy.endswith("offload"):
        require_host_adam(config.strategy)


def can_be_resumed(config: TrainConfig, strategy: str) -> bool:
    """Whether states can be saved by tensor: DeepSpeed flattens tensors, and states in 8 bits are then of many."""
    return not strategy.startswith("deepspeed") or config.optim not in _OF_BITSANDBYTES


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig, *, on_gpu: bool) -> torch.optim.Optimizer:
    """The optimizer of these groups.

    Args:
        groups: see `module.parameter_groups`; all but `params` and `weight_decay` of it is the caller's.
        config: the flags.
        on_gpu: whether the parameters are on a GPU.

    Raises:
        KernelError: the engine's Adam for the host could not be built.
    """
    betas = (config.beta1, config.beta2)
    adam: dict[str, Any] = {"lr": config.lr_init, "betas": betas, "eps": config.adam_eps}
    if config.optim in _OF_BITSANDBYTES:
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # its note on an optional package
        with uncompiled_imports():
            import bitsandbytes

        chosen: Any = getattr(bitsandbytes.optim, _OF_BITSANDBYTES[config.optim])
        options = {"lr": config.lr_init, "betas": betas} if config.optim == "lion8bit" else adam
        return chosen(groups, **options)  # type: ignore[no-any-return]
    decoupled = config.optim == "adamw" or config.weight_decay > 0
    if config.strategy.endswith("offload") and on_gpu:
        return make_host_adam(groups, config.strategy, **adam, adamw_mode=decoupled)
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, **adam, fused=on_gpu)


def put_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: Mapping[str, Any]) -> None:
    """Gives an optimizer of `make_optimizer` what it kept for a parameter, copied to where it keeps such things.

    Args:
        optimizer: has the parameter.
        parameter: fp32, of the shape it had then.
        moments: as in `optimizer.state`, on any device.
    """
    state = {}
    if hasattr(optimizer, "init_state"):  # bitsandbytes: pages are its own to allocate
        places = enumerate(optimizer.param_groups)
        group, number, place = next(
            (group, number, place)
            for number, group in places
            for place, other in enumerate(group["params"])
            if other is parameter
        )
        optimizer.state[parameter] = {}
        optimizer.init_state(group, parameter, number, place)
        state = optimizer.state[parameter]
    for name, value in moments.items():
        if not isinstance(value, Tensor):
            state[name] = value
        elif name in state:
            state[name].copy_(value)
        else:  # torch's, fused on a GPU, has its count of steps there, too
            state[name] = value.to(parameter.device, copy=True)
    optimizer.state[parameter] = state
