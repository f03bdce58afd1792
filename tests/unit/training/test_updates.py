"""Updates tensor by tensor against an optimizer of all tensors: the same steps, where they should be."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.config import TrainConfig
from src.ops.adam import Constants
from src.training.device_updates import DeviceUpdates
from src.training.module import parameter_groups
from src.training.optimizers import make_optimizer, put_moments
from src.training.resume import OptimizerMoments
from src.training.updates import TensorUpdates, UpdateCount, unit_of

pytest.importorskip("bitsandbytes")

NAMES = ("emb.weight", "blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b", "head.weight")
BACKWARD = ("head", "blocks.1", "blocks.0", "emb")
OPTIMIZERS = ("none", "adamw", "adamw8bit", "lion8bit")


def config(**flags: object) -> TrainConfig:
    given = {"load_model": "base.pth", "data_file": "data", "train_type": "none", "lr_init": 0.01, **flags}
    return TrainConfig.from_flags({name: str(value) for name, value in given.items()})


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Matrices of more than 4096 values, which have moments in 8 bits, and vectors."""
    generator = torch.Generator().manual_seed(0)
    sizes = {name: (70, 70) if name.endswith(("weight", ".a")) else (70,) for name in NAMES}
    drawn = {name: torch.randn(size, generator=generator) * 0.1 for name, size in sizes.items()}
    return {name: nn.Parameter(value.to(dtype) if value.ndim == 2 else value) for name, value in drawn.items()}


def loss_of(named: dict[str, nn.Parameter], scale: float = 1e-3) -> Tensor:
    """Layers one after the other, so that the backward comes from the last to the first."""
    x = torch.linspace(-1, 1, 70)[None] @ named["emb.weight"].float()
    for layer in range(2):
        x = x + torch.tanh(x @ named[f"blocks.{layer}.a"].float() + named[f"blocks.{layer}.b"])
    return (x @ named["head.weight"].float()).square().sum() * scale


def apart(one: nn.Parameter, other: nn.Parameter, start: nn.Parameter) -> float:
    """As a share of how far one went."""
    return float(((one - other).norm() / (one - start).norm()).detach())


def plain(named: dict[str, nn.Parameter], **flags: object) -> torch.optim.Optimizer:
    chosen = config(**flags)
    return make_optimizer(parameter_groups(named.items(), dict.fromkeys(named, 1.0), chosen), chosen, on_gpu=False)


def by_tensor(
    named: dict[str, nn.Parameter], *, in_backward: bool, clip: float = 1.0, **flags: object
) -> TensorUpdates:
    chosen = config(**flags)

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return make_optimizer(groups, chosen, on_gpu=False)

    groups = parameter_groups(named.items(), dict.fromkeys(named, 1.0), chosen)
    return TensorUpdates(groups, named.items(), make, clip=clip, seed=1, in_backward=in_backward)


def descend(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: int, scale: float = 1e-3, clip: float = 0.0
) -> list[float]:
    """Steps as Lightning takes them, with a rate that changes; the norms of their gradients."""
    norms = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(named, scale)
            loss.backward()
            if isinstance(optimizer, TensorUpdates):
                norms.append(float(optimizer.gradient_norm()))
            else:
                gradients = [p.grad for p in named.values() if p.grad is not None]
                norms.append(float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))))
                if clip:
                    nn.utils.clip_grad_norm_(list(named.values()), clip)
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return norms


@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("in_backward", [False, True])
def test_under_the_clip_they_are_the_ordinary_steps_bit_for_bit(
    in_backward: bool, optim: str, weight_decay: float
) -> None:
    one, other = parameters(), parameters()
    flags = {"optim": optim, "weight_decay": weight_decay}
    norms = descend(plain(one, **flags), one, 5, clip=1.0)
    assert descend(by_tensor(other, in_backward=in_backward, **flags), other, 5) == norms
    assert max(norms) < 1
    assert all(torch.equal(one[name], other[name]) for name in NAMES)


def test_over_it_they_are_clipped_as_torch_does_it() -> None:
    one, other = parameters(), parameters()
    norms = descend(plain(one), one, 5, scale=1.0, clip=0.5)
    made = descend(by_tensor(other, in_backward=False, clip=0.5), other, 5, scale=1.0)
    assert min(norms) > 0.5
    assert made == pytest.approx(norms, rel=1e-5)
    assert all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-7) for name in NAMES)


def test_in_the_backward_over_it_by_the_norm_of_the_step_before() -> None:
    """The rule by hand: the first step's gradients as they are, then times clip / norm before, if that is below 1."""
    one, other = parameters(), parameters()
    made = descend(by_tensor(other, in_backward=True, clip=0.5), other, 5, scale=1.0)
    ordinary, before = plain(one), math.nan
    for step in range(5):
        for group in ordinary.param_groups:
            group["lr"] = 0.01 / (step + 1)
        ordinary.zero_grad()
        loss_of(one, 1.0).backward()
        gradients = [p.grad for p in one.values() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        assert norm == made[step] > 0.5
        for gradient in gradients if step else ():
            gradient.mul_(0.5 / (before + 1e-6))
        ordinary.step()
        before = norm
    assert all(torch.equal(one[name], other[name]) for name in NAMES)


def test_no_two_layers_gradients_exist_together() -> None:
    named = parameters()
    updates = by_tensor(named, in_backward=True)
    seen: list[set[str]] = []
    for name in NAMES:
        held = lambda _: seen.append({unit_of(n) for n, p in named.items() if p.grad is not None})  # noqa: E731
        named[name].register_hook(held)
    loss_of(named).backward()
    assert max(map(len, seen)) == 1
    assert all(parameter.grad is None for parameter in named.values())
    assert updates.updated == ["head", "blocks.1", "blocks.0", "emb"]
    assert not updates.between_steps
    updates.step()
    assert updates.between_steps


def test_a_tensor_without_a_gradient_holds_nobody_up() -> None:
    named = parameters()
    named["blocks.1.c"] = nn.Parameter(torch.ones(3))
    updates = by_tensor(named, in_backward=True)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    descend(updates, named, 1)
    moved = {name for name in named if not torch.equal(named[name], before[name])}
    assert moved == set(NAMES)


@pytest.mark.parametrize(
    ("spoilt", "updated"),
    [
        ("head.weight", []),
        ("blocks.1.b", ["head"]),
        ("blocks.0.a", ["head", "blocks.1"]),
        ("emb.weight", ["head", "blocks.1", "blocks.0"]),
    ],
)
def test_what_is_not_finite_stops_before_its_layer(spoilt: str, updated: list[str]) -> None:
    named = parameters()
    updates = by_tensor(named, in_backward=True)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    named[spoilt].register_hook(lambda gradient: gradient * math.nan)
    loss_of(named).backward()
    assert math.isnan(float(updates.gradient_norm()))
    assert updates.stopped_at == unit_of(spoilt)
    assert updates.updated == updated
    moved = {unit_of(name) for name in NAMES if not torch.equal(named[name], before[name])}
    assert moved == set(updated)
    said = updates.describe_stop()
    assert f"it was met in {unit_of(spoilt)}, which was not updated, nor was what comes after it" in said
    assert (", ".join(updated) or "nothing") + " had been updated" in said


class TestBf16:
    @pytest.mark.parametrize("optim", OPTIMIZERS)
    @pytest.mark.parametrize("in_backward", [False, True])
    def test_a_step_is_the_fp32_one_rounded_to_a_neighbour(self, in_backward: bool, optim: str) -> None:
        """The gradients are bf16's, too, so the fp32 model gets the same."""
        narrow = parameters(torch.bfloat16)
        wide = {name: nn.Parameter(parameter.detach().float()) for name, parameter in narrow.items()}
        updates = by_tensor(narrow, in_backward=in_backward, optim=optim)
        descend(updates, narrow, 1)
        ordinary = plain(wide, optim=optim)
        same = parameters(torch.bfloat16)
        loss_of(same).backward()
        for name, parameter in wide.items():
            parameter.grad = same[name].grad.float()  # type: ignore[union-attr]
        ordinary.step()
        for name in NAMES:
            assert narrow[name].dtype == same[name].dtype
            gap = wide[name].detach().abs() * 2**-7 if narrow[name].dtype == torch.bfloat16 else torch.tensor(0.0)
            assert bool(((narrow[name].float() - wide[name]).abs() <= gap).all())
        moments = [value for state in updates.state.values() for value in state.values() if torch.is_tensor(value)]
        assert {value.dtype for value in moments} <= {torch.float32, torch.uint8}

    def test_it_descends_as_fp32_does(self) -> None:
        """With steps of a thirtieth of a weight's last place, which nearest rounding would lose."""
        losses = {}
        for dtype in (torch.bfloat16, torch.float32):
            named = parameters(dtype)
            start = float(loss_of(named).detach())
            updates = by_tensor(named, in_backward=True)
            for _ in range(150):
                for group in updates.param_groups:
                    group["lr"] = 1e-4 / 5
                loss_of(named).backward()
                updates.step()
            losses[dtype] = float(loss_of(named).detach()) / start
        assert losses[torch.float32] < 0.9
        assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.03)

    def test_fused_and_ordinary_updates_are_the_same_bits(self) -> None:
        """Noise belongs to the step and the tensor, not to the order."""
        one, other = parameters(torch.bfloat16), parameters(torch.bfloat16)
        descend(by_tensor(one, in_backward=False), one, 4)
        descend(by_tensor(other, in_backward=True), other, 4)
        assert all(torch.equal(one[name], other[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("in_backward", [False, True])
def test_they_go_on_with_the_same_bits(in_backward: bool, optim: str, dtype: torch.dtype) -> None:
    """The norm that clips, the noise of the next step, moments in fp32 of bf16 weights."""
    one = parameters(dtype)
    first = by_tensor(one, in_backward=in_backward, optim=optim, clip=0.1)
    descend(first, one, 3, scale=1.0)
    kept = copy.deepcopy(
        {
            "weights": {name: parameter.detach() for name, parameter in one.items()},
            "moments": OptimizerMoments(one.items(), first, engine=False).state(),
            "count": UpdateCount(first).state(),
        }
    )
    other = {name: nn.Parameter(value) for name, value in kept["weights"].items()}
    second = by_tensor(other, in_backward=in_backward, optim=optim, clip=0.1)
    OptimizerMoments(other.items(), second, engine=False).restore(kept["moments"])
    UpdateCount(second).restore(kept["count"])
    descend(first, one, 2, scale=1.0)
    descend(second, other, 2, scale=1.0)
    assert all(torch.equal(one[name], other[name]) for name in NAMES)
    assert (first.steps, first.norm) == (second.steps, second.norm)


class TestOnTheDevice:
    """`DeviceUpdates` with the definition of its kernel: the same rules."""

    @staticmethod
    def made(
        named: dict[str, nn.Parameter],
        *,
        in_backward: bool,
        clip: float = 1.0,
        optim: str = "none",
        looks_itself: bool = False,
    ) -> DeviceUpdates:
        chosen = config(optim=optim)
        groups = parameter_groups(named.items(), dict.fromkeys(named, 1.0), chosen)
        constants = Constants(chosen.beta1, chosen.beta2, chosen.adam_eps, clip)
        packed = optim.endswith("8bit")
        return DeviceUpdates(
            groups,
            named.items(),
            constants=constants,
            seed=1,
            packed=packed,
            on_host=False,
            in_backward=in_backward,
            looks_itself=looks_itself,
        )

    @staticmethod
    def descend(updates: DeviceUpdates, named: dict[str, nn.Parameter], steps: int, scale: float) -> list[float]:
        norms = []
        for step in range(steps):
            for group in updates.param_groups:
                group["lr"] = 0.01 / (step + 1)
            updates.zero_grad()
            updates.begin()
            loss_of(named, scale).backward()
            norms.append(float(updates.gradient_norm()))
            updates.step()
        return norms

    @pytest.mark.parametrize("clip", [1e9, 0.5])
    @pytest.mark.parametrize("in_backward", [False, True])
    def test_the_steps_are_those_on_the_host(self, in_backward: bool, clip: float) -> None:
        one, other = parameters(), parameters()
        expected = descend(by_tensor(one, in_backward=in_backward, clip=clip), one, 5, scale=1.0)
        norms = self.descend(self.made(other, in_backward=in_backward, clip=clip), other, 5, 1.0)
        assert norms == pytest.approx(expected, rel=1e-4)
        assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in NAMES)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_fused_and_ordinary_updates_are_the_same_bits(self, dtype: torch.dtype) -> None:
        one, other = parameters(dtype), parameters(dtype)
        norms = self.descend(self.made(one, in_backward=False, optim="adamw8bit"), one, 4, 1e-3)
        fused = self.descend(self.made(other, in_backward=True, optim="adamw8bit"), other, 4, 1e-3)
        assert fused == pytest.approx(norms, rel=1e-6)  # summed in another order
        assert max(norms) < 1
        assert all(torch.equal(one[name], other[name]) for name in NAMES)

    @pytest.mark.parametrize(
        ("spoilt", "updated"), [("head.weight", []), ("blocks.0.a", ["head", "blocks.1"]), ("", list(BACKWARD))]
    )
    def test_what_is_not_finite_stops_before_its_layer(self, spoilt: str, updated: list[str]) -> None:
        named = parameters()
        updates = self.made(named, in_backward=True)
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        if spoilt:
            named[spoilt].register_hook(lambda gradient: gradient * math.nan)
        updates.begin()
        assert not updates.between_steps
        loss_of(named).backward()
        assert math.isfinite(float(updates.gradient_norm())) == (not spoilt)
        assert updates.stopped_at == (unit_of(spoilt) if spoilt else "")
        assert updates.updated == updated
        assert {unit_of(name) for name in NAMES if not torch.equal(named[name], before[name])} == set(updated)
        assert (", ".join(updated) or "nothing") + " had been updated" in updates.describe_stop() or not spoilt
        updates.step()
        assert updates.between_steps

    @pytest.mark.parametrize("optim", ["none", "adamw8bit"])
    def test_a_step_that_is_not_finite_is_not_taken_where_nobody_looks_before(self, optim: str) -> None:
        one, other = parameters(), parameters()
        watched = self.made(one, in_backward=False, optim=optim, looks_itself=True)
        plain = self.made(other, in_backward=False, optim=optim)
        norms = self.descend(plain, other, 3, 1.0)
        assert watched.sight is not None
        watched.sight.loss = torch.tensor(7.0, dtype=torch.bfloat16)
        self.descend(watched, one, 3, 1.0)
        assert watched.sight.read() == (7.0, pytest.approx(norms[-1]))
        assert all(torch.equal(one[name], other[name]) for name in NAMES)
        moments = copy.deepcopy([watched.state[parameter] for parameter in one.values()])
        for spoilt in (math.nan, math.inf):
            handle = one["blocks.0.a"].register_hook(lambda gradient, spoilt=spoilt: gradient + spoilt)
            self.descend(watched, one, 1, 1.0)
            handle.remove()
            assert not math.isfinite(watched.sight.read()[1])
        assert all(torch.equal(one[name], other[name]) for name in NAMES)
        for kept, parameter in zip(moments, one.values(), strict=True):
            now = watched.state[parameter]
            assert all(torch.equal(now[key], kept[key]) for key in kept if torch.is_tensor(kept[key]) and key != "step")

    @pytest.mark.parametrize("optim", ["none", "adamw8bit"])
    def test_moments_of_the_host_go_on_there_and_back(self, optim: str) -> None:
        """A run of one kind goes on as the other, with the same names and shapes."""
        named = parameters(torch.bfloat16)
        on_host = by_tensor(named, in_backward=False, optim=optim)
        descend(on_host, named, 3)
        kept = copy.deepcopy(OptimizerMoments(named.items(), on_host, engine=False).state())
        updates = self.made(named, in_backward=False, optim=optim)
        OptimizerMoments(named.items(), updates, engine=False).restore(kept)
        UpdateCount(updates).restore(UpdateCount(on_host).state())
        assert (updates.steps, updates.norm) == (3, pytest.approx(on_host.norm))
        back = OptimizerMoments(named.items(), updates, engine=False).state()
        for name, moments in kept.items():
            assert back[name].keys() == moments.keys()
            for key, value in moments.items():
                assert torch.allclose(torch.as_tensor(back[name][key]), torch.as_tensor(value), atol=1e-7), (name, key)
        again = by_tensor(named, in_backward=False, optim=optim)
        OptimizerMoments(named.items(), again, engine=False).restore(back)
        descend(again, named, 1)

    @pytest.mark.parametrize("parks", [False, True])
    @pytest.mark.parametrize("optim", ["none", "adamw", "adamw8bit"])
    def test_moments_that_leave_and_come_back_are_a_library_optimizers(self, optim: str, parks: bool) -> None:
        """As of LISA's layers: some begin anew, with a count of steps of their own, or go on where they were."""
        one, other, start = parameters(), parameters(), parameters()
        library, updates = plain(one, optim=optim), self.made(other, in_backward=False, optim=optim)
        for leaving in ((), ("blocks.0.a", "blocks.0.b"), ("blocks.1.a", "blocks.1.b"), ("blocks.0.a", "blocks.0.b")):
            for name in leaving:
                kept = copy.deepcopy(library.state.pop(one[name]))
                updates.exchange({other[name]: copy.deepcopy(updates.state.pop(other[name])) if parks else {}})
                if parks:
                    put_moments(library, one[name], kept)
            descend(library, one, 3)
            self.descend(updates, other, 3, 1e-3)
        for name in NAMES:
            assert apart(one[name], other[name], start[name]) < (0.02 if optim == "adamw8bit" else 1e-5), name
            assert int(library.state[one[name]]["step"]) == int(updates.state[other[name]]["step"])
        assert len({int(state["step"]) for state in updates.state.values()}) == (1 if parks else 3)

    @pytest.mark.parametrize("in_backward", [False, True])
    @pytest.mark.parametrize("optim", ["none", "adamw8bit"])
    def test_a_library_optimizers_run_goes_on_and_back(self, optim: str, in_backward: bool) -> None:
        """Also where moments have seen different numbers of steps, one none."""
        one, other, start = parameters(), parameters(), parameters()
        library = plain(one, optim=optim)
        descend(library, one, 2)
        library.state.pop(one["blocks.1.a"])
        descend(library, one, 3)
        library.state.pop(one["head.weight"])
        kept = copy.deepcopy(OptimizerMoments(one.items(), library, engine=False).state())
        for name, parameter in other.items():
            parameter.data.copy_(one[name].detach())
        updates = self.made(other, in_backward=in_backward, optim=optim)
        OptimizerMoments(other.items(), updates, engine=False).restore(kept)
        descend(library, one, 2)
        self.descend(updates, other, 2, 1e-3)
        for name in NAMES:
            assert apart(one[name], other[name], start[name]) < (0.02 if optim == "adamw8bit" else 1e-5), name
        back = {
            name: copy.deepcopy(moments)
            for name, moments in OptimizerMoments(other.items(), updates, engine=False).state().items()
        }
        steps = {name: int(moments["step"]) for name, moments in back.items()}
        assert steps == {**dict.fromkeys(NAMES, 7), "blocks.1.a": 5, "head.weight": 2}
        last = parameters()
        again = plain(last, optim=optim)
        OptimizerMoments(last.items(), again, engine=False).restore(back)
        descend(again, last, 1)
        assert {name: int(again.state[last[name]]["step"]) for name in NAMES} == {n: steps[n] + 1 for n in NAMES}
