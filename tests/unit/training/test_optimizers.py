"""What `--optim` makes, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from src.config import TrainConfig
from src.errors import ConfigError
from src.training.engine import resolve_hardware
from src.training.module import parameter_groups
from src.training.optimizers import check_optimizer, make_optimizer, put_moments

pytest.importorskip("bitsandbytes")


def config(**flags: object) -> TrainConfig:
    given = {"load_model": "base.pth", "data_file": "data", **{name: str(v) for name, v in flags.items()}}
    return TrainConfig.from_flags(given)


def two_parameters() -> dict[str, torch.nn.Parameter]:
    """A matrix of more than 4096 values and a vector of fewer."""
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.nn.Parameter(torch.randn(80, 80, generator=generator)),
        "vector": torch.nn.Parameter(torch.randn(80, generator=generator)),
    }


def made_of(
    named: dict[str, torch.nn.Parameter], factors: dict[str, float] | None = None, **flags: object
) -> torch.optim.Optimizer:
    chosen = config(**flags)
    groups = parameter_groups(named.items(), factors or dict.fromkeys(named, 1.0), chosen)
    return make_optimizer(groups, chosen, on_gpu=False)


def descend(optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter], steps: int) -> list[float]:
    """Sums of squares before each of some steps down them."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([parameter.square().sum() for parameter in named.values()]).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("optim", "weight_decay", "kind"),
    [
        ("none", 0, "Adam"), ("none", 0.1, "AdamW"), ("adam", 0, "Adam"), ("adamw", 0, "AdamW"),
        ("adamw", 0.1, "AdamW"), ("adamw8bit", 0.1, "AdamW8bit"), ("lion8bit", 0.1, "Lion8bit"),
    ],
)  # fmt: skip
def test_the_name_and_the_groups(optim: str, weight_decay: float, kind: str) -> None:
    named = two_parameters()
    common = {"optim": optim, "weight_decay": weight_decay, "lr_init": 0.1, "beta1": 0.8, "beta2": 0.95}
    made = made_of(named, {"matrix": 1.0, "vector": 2.0}, **common)
    assert type(made).__name__ == kind
    first, second = made.param_groups
    assert [first["lr"], second["lr"]] == pytest.approx([0.1, 0.2])
    assert (first["lr_scale"], first["decays"], first["weight_decay"]) == (1.0, weight_decay > 0, weight_decay)
    assert (second["lr_scale"], second["decays"], second["weight_decay"]) == (2.0, False, 0.0)
    assert tuple(first["betas"]) == (0.8, 0.95)


@pytest.mark.parametrize("optim", ["adamw8bit", "lion8bit"])
def test_states_of_large_tensors_take_8_bits_and_the_descent_is_adams(optim: str) -> None:
    named, same = two_parameters(), two_parameters()
    common = {"lr_init": 0.01 if optim == "lion8bit" else 0.03}
    made = made_of(named, optim=optim, **common)
    losses = descend(made, named, 20)
    dtypes = {name: made.state[parameter]["state1"].dtype for name, parameter in named.items()}
    assert dtypes == {"matrix": torch.uint8, "vector": torch.float32}
    assert all(parameter.dtype is torch.float32 for parameter in named.values())
    assert losses[-1] < 0.8 * losses[0]
    if optim == "adamw8bit":
        assert losses == pytest.approx(descend(made_of(same, optim="adamw", **common), same, 20), rel=0.02)


def test_the_scheduled_rate_of_each_group_is_what_is_taken() -> None:
    """As `StepControl` sets it: a rate of 0 moves nothing, a rate of twice as much twice as far."""
    named = {name: torch.nn.Parameter(torch.zeros(80, 80)) for name in ("still", "slow", "fast")}
    made = made_of(named, {"still": 1.0, "slow": 2.0, "fast": 3.0}, optim="adamw8bit", lr_init=1)
    for group, rate in zip(made.param_groups, (0.0, 0.01, 0.02), strict=True):
        group["lr"] = rate
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    moved = {name: -float(parameter.detach().mean()) for name, parameter in named.items()}
    assert moved == pytest.approx({"still": 0.0, "slow": 0.01, "fast": 0.02}, rel=1e-3)


@pytest.mark.parametrize("optim", ["none", "adamw8bit", "lion8bit"])
def test_moments_that_are_put_back_go_on(optim: str) -> None:
    """Into another optimizer, that has other parameters before it."""
    one = two_parameters()
    first = made_of(one, optim=optim, lr_init=0.01)
    descend(first, one, 3)
    other = {"further": torch.nn.Parameter(torch.ones(3, 3)), **two_parameters()}
    second = made_of(other, optim=optim, lr_init=0.01)
    for name, parameter in one.items():
        other[name].data.copy_(parameter.detach())
        put_moments(second, other[name], {key: copy.deepcopy(v) for key, v in first.state[parameter].items()})
    descend(first, one, 2)
    descend(second, other, 2)
    assert all(torch.equal(one[name], other[name]) for name in one)


class TestRefusals:
    def test_pages_need_a_gpu(self) -> None:
        with pytest.raises(ConfigError, match="has no such kernel for a CPU: use adamw8bit"):
            resolve_hardware(config(optim="paged_adamw8bit", accelerator="cpu"))

    @pytest.mark.parametrize("optim", ["adamw8bit", "paged_adamw8bit", "lion8bit"])
    def test_offloading_brings_its_own(self, optim: str) -> None:
        chosen = config(optim=optim, strategy="deepspeed_stage_2_offload")
        with pytest.raises(ConfigError, match="steps on the host with DeepSpeed's own Adam") as refused:
            check_optimizer(chosen, on_gpu=True)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_1", "deepspeed_stage_2"])
    @pytest.mark.parametrize("optim", ["none", "adam", "adamw", "adamw8bit", "paged_adamw8bit", "lion8bit"])
    def test_other_engines_take_all(self, optim: str, strategy: str) -> None:
        check_optimizer(config(optim=optim, strategy=strategy), on_gpu=True)

    def test_offloading_takes_torchs_names(self) -> None:
        for optim in ("none", "adam", "adamw"):
            check_optimizer(config(optim=optim, strategy="deepspeed_stage_2_offload"), on_gpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("optim", ["none", "adamw8bit", "paged_adamw8bit", "lion8bit"])
def test_on_a_gpu(optim: str) -> None:
    on_host = two_parameters().items()
    named = {name: torch.nn.Parameter(value.detach().cuda()) for name, value in on_host}
    chosen = config(optim=optim, lr_init=0.01)
    made = make_optimizer(parameter_groups(named.items(), dict.fromkeys(named, 1.0), chosen), chosen, on_gpu=True)
    losses = descend(made, named, 20)
    assert math.isfinite(losses[-1])
    assert losses[-1] < 0.9 * losses[0]
