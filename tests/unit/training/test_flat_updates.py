"""Updates of an engine's flat piece: against torch's Adam on the tensors themselves, on one process and on several."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from emulator.kernels import emulated, has_compiler
from torch import Tensor, nn

from src.adapters.method import method_of
from src.config import TrainConfig
from src.ops import adam
from src.ops.adam import Constants
from src.training import flat_updates
from src.training.flat_updates import FlatUpdates, Share, as_one, shares_of, updates_flat
from src.training.joined import Joined

CONSTANTS = Constants(0.9, 0.99, 1e-8, 1.0)
COUNTS = (100, 7, 301, 64)
RATE, DECAY = 0.01, 0.1


def config(**flags: object) -> TrainConfig:
    given = {name: str(value) for name, value in flags.items()}
    return TrainConfig.from_flags({"load_model": "m.pth", "data_file": "data", **given})


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator) for count in COUNTS]


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two of the first three and the last, at rates of their own; the second group's values decay."""
    settings = [(parameters[:2], 1.0, False), (parameters[2:3], 16.0, True), (parameters[3:], 2.0, False)]
    return [
        {"params": own, "lr": RATE * scale, "lr_scale": scale, "weight_decay": DECAY * decays, "decays": decays}
        for own, scale, decays in settings
    ]


def by_torch(gradients: list[list[Tensor]]) -> list[Tensor]:
    """The tensors after torch's own steps."""
    parameters = [nn.Parameter(values) for values in drawn(0)]
    optimizer = torch.optim.AdamW(groups_of(parameters), betas=(0.9, 0.99), eps=1e-8)
    for own in gradients:
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def whole_of(tensors: list[Tensor], multiple: int) -> Tensor:
    flat = torch.cat(tensors)
    return torch.cat([flat, torch.zeros(-len(flat) % multiple)])


class Processes:
    """Optimizers of the pieces of one whole, which take their steps as if they were in processes of their own."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch, *, packed: bool = False) -> None:
        parameters = [nn.Parameter(values) for values in drawn(0)]
        groups = groups_of(parameters)
        whole = as_one(groups, dataclasses.replace(config(), lr_init=RATE, weight_decay=DECAY))
        self.shares = shares_of(groups)
        self.multiple = 256 * count
        names = {parameter: str(number) for number, parameter in enumerate(parameters)}
        joined = Joined([whole], names, multiple=self.multiple)
        (self.pieces,) = joined.pieces.values()
        (group,) = joined.groups
        flat = group["params"][0].detach()
        self.optimizers = []
        for piece in flat.chunk(count):
            optimizer = FlatUpdates({**group}, self.shares, CONSTANTS, packed=packed)
            optimizer.param_groups[0]["params"] = [nn.Parameter(piece.clone())]  # as an engine does
            self.optimizers.append(optimizer)
        self.norms: list[float] = []  # of each one's piece, step after step
        self._monkeypatch = monkeypatch

    def step(self, gradients: list[Tensor]) -> None:
        norm = whole_of(gradients, 1).norm()

        def over_all(loss: Tensor, own: Tensor) -> Tensor:
            self.norms.append(float(own))
            return torch.stack([loss, norm])

        self._monkeypatch.setattr(flat_updates, "_over_all", over_all)
        pieces = whole_of(gradients, self.multiple).chunk(len(self.optimizers))
        for rank, (optimizer, gradient) in enumerate(zip(self.optimizers, pieces, strict=True)):
            self._monkeypatch.setattr(flat_updates, "_rank", lambda rank=rank: rank)
            self.parameter(optimizer).grad = gradient.clone()
            optimizer.step()

    @staticmethod
    def parameter(optimizer: FlatUpdates) -> nn.Parameter:
        (parameter,) = optimizer.param_groups[0]["params"]
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def whole(self) -> Tensor:
        return torch.cat([self.parameter(optimizer).detach() for optimizer in self.optimizers])

    @property
    def tensors(self) -> list[Tensor]:
        return [piece.of(self.whole) for piece in self.pieces]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_steps_are_adams(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the clip and under it; a process may have nothing but what wholes are filled up with."""
    gradients = [drawn(1), [0.01 * each for each in drawn(2)], drawn(3)]
    found = Processes(processes, monkeypatch)
    for own in gradients:
        found.step(own)
    for tensor, expected in zip(found.tensors, by_torch(gradients), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert not found.whole[sum(COUNTS) :].any()
    norms = torch.tensor(found.norms).view(len(gradients), processes).norm(dim=1)
    torch.testing.assert_close(norms, torch.stack([torch.cat(own).norm() for own in gradients]))


def test_losses_and_norms_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(tensor: Tensor) -> None:
        tensor.add_(torch.tensor([5.0, 16.0]))

    loss, norm = torch.tensor(2.0), torch.tensor(3.0)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    assert flat_updates._over_all(loss, norm).tolist() == [6, 5]
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    assert flat_updates._over_all(loss, norm).tolist() == [2, 3]


def test_what_is_seen_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Processes(1, monkeypatch)
    (optimizer,) = found.optimizers
    optimizer.sight.loss = torch.tensor(3.0, dtype=torch.bfloat16)
    gradients = drawn(1)
    found.step(gradients)
    assert optimizer.sight.read() == pytest.approx((3.0, float(torch.cat(gradients).norm())))


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(spoilt: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Processes(2, monkeypatch)
    found.step(drawn(1))
    before = found.whole
    moments = [optimizer.state[found.parameter(optimizer)]["exp_avg"].clone() for optimizer in found.optimizers]
    gradients = drawn(2)
    gradients[1][3] = spoilt
    found.step(gradients)
    assert torch.equal(found.whole, before)
    for optimizer, moment in zip(found.optimizers, moments, strict=True):
        assert torch.equal(optimizer.state[found.parameter(optimizer)]["exp_avg"], moment)
    assert not math.isfinite(found.optimizers[0].sight.read()[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_moments_are_where_torch_has_them_and_can_be_put_there(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [drawn(seed) for seed in range(1, 6)]
    whole, later = Processes(processes, monkeypatch), Processes(processes, monkeypatch)
    for own in gradients[:3]:
        whole.step(own)
    later.step(drawn(9))  # what was there is replaced
    for ours, theirs in zip(later.optimizers, whole.optimizers, strict=True):
        parameter, other = later.parameter(ours), whole.parameter(theirs)
        kept = theirs.state[other]
        assert {name: tuple(value.shape) for name, value in kept.items()} == {
            "exp_avg": tuple(other.shape),
            "exp_avg_sq": tuple(other.shape),
            "step": (),
        }
        assert kept["step"] == 3
        ours.state[parameter] = {name: value.clone() for name, value in kept.items()}
        parameter.data.copy_(other)
    for own in gradients[3:]:
        whole.step(own)
        later.step(own)
    assert torch.equal(later.whole, whole.whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_moments_in_8_bits(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [[0.01 * each for each in drawn(seed)] for seed in range(1, 4)]
    found = Processes(processes, monkeypatch, packed=True)
    for own in gradients:
        found.step(own)
    first = drawn(0)
    for tensor, expected, start in zip(found.tensors, by_torch(gradients), first, strict=True):
        assert float((tensor - expected).norm() / (expected - start).norm()) < 0.1
    (moments, *_) = found.optimizers[0]._many.of_cuts._kinds.values()  # type: ignore[union-attr]
    assert all(each.first.dtype == torch.uint8 for each in moments.moments)


@pytest.mark.parametrize("packed", [False, True])
def test_moments_go_when_training_ends(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though an engine has views of them, and has asked for those in 8 bits, which nothing shows."""
    found = Processes(1, monkeypatch, packed=packed)
    found.step(drawn(1))
    (optimizer,) = found.optimizers
    kept = optimizer.state[found.parameter(optimizer)]
    views = [value[1:] for value in kept.values() if value.ndim]
    assert len(views) == (0 if packed else 2)
    optimizer.forget_moments()
    assert all(view.untyped_storage().nbytes() == 0 for view in views)
    assert not optimizer.state
    assert optimizer._many is None


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs g++")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_kernels_do_the_same(processes: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the emulator: norm, clip and update of slices that begin anywhere, and of a step that is not taken."""
    plain, found = Processes(processes, monkeypatch, packed=packed), Processes(processes, monkeypatch, packed=packed)
    gradients = [drawn(1), [0.01 * each for each in drawn(2)], [math.nan * each for each in drawn(3)], drawn(4)]
    for by_kernels, processes_of_one in ((False, plain), (True, found)):
        monkeypatch.setattr(adam._OfOneKind, "by_kernels", by_kernels)
        for own in gradients:
            with emulated():
                processes_of_one.step(own)
    assert found.norms == [pytest.approx(norm, rel=1e-5, nan_ok=True) for norm in plain.norms]
    torch.testing.assert_close(found.whole, plain.whole, rtol=1e-5, atol=1e-4 if packed else 1e-6)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_piece_is_a_part_of_the_whole(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the engine's copy, of which it has views, takes no memory any more."""
    plain, tied = Processes(processes, monkeypatch), Processes(processes, monkeypatch)
    whole = nn.Parameter(plain.whole)
    monkeypatch.setattr(flat_updates, "_count", lambda: processes)
    views = []
    for rank, optimizer in enumerate(tied.optimizers):
        monkeypatch.setattr(flat_updates, "_rank", lambda rank=rank: rank)
        piece = tied.parameter(optimizer)
        views.append(piece.detach()[1:])
        optimizer.tie(whole)
        optimizer.tie(whole)
    assert all(view.untyped_storage().nbytes() == 0 for view in views)
    for seed in (1, 2):
        plain.step(drawn(seed))
        tied.step(drawn(seed))
    assert torch.equal(whole.detach(), plain.whole)
    assert not torch.equal(whole.detach(), whole_of(drawn(0), plain.multiple))


def test_places_from_which_vectors_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_updates, "_rank", lambda: 1)
    shares = [Share(0, 300, 1.0, decays=False), Share(300, 301, 1.0, decays=False), Share(301, 500, 1.0, decays=True)]
    whole = {"params": [nn.Parameter(torch.zeros(512))], "lr": 1.0, "weight_decay": 0.0}
    cuts = FlatUpdates(whole, shares, CONSTANTS, packed=False)._cuts(torch.zeros(256))
    assert cuts == [(0, slice(0, 44)), (1, slice(44, 45)), (2, slice(45, 64)), (2, slice(64, 244))]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"peft": "lora", "strategy": "deepspeed_stage_1"}, True),
        ({"peft": "bone", "strategy": "deepspeed_stage_2", "optim": "adamw8bit"}, True),
        ({"peft": "lora", "devices": 2, "train_type": "states"}, True),
        ({"peft": "lora", "strategy": "deepspeed_stage_1", "optim": "lion8bit"}, False),
        ({"peft": "lora", "strategy": "deepspeed_stage_1", "optim": "paged_adamw8bit"}, False),
        ({"peft": "lora", "strategy": "deepspeed_stage_2_offload"}, False),
        ({"peft": "lora", "strategy": "deepspeed_stage_3", "quant": 0}, False),
        ({"peft": "lora"}, False),
        ({"strategy": "deepspeed_stage_1"}, True),
        ({"train_type": "none", "devices": 2}, False),
    ],
)
def test_whose_updates_they_are(flags: dict[str, object], expected: bool) -> None:
    chosen = config(**flags)
    assert updates_flat(chosen, method_of(chosen)) is expected
