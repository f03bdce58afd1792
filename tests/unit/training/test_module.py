"""The optimizer of what is trainable."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from factories import tiny_parameters, tiny_shape
from running import GivenLoss
from torch import Tensor, nn

from src.adapters.method import method_of
from src.config import TrainConfig
from src.data.rounding import EXACT, FEW_SHAPES, Rounding
from src.errors import DataError
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.model.shape import ModelShape
from src.ops import adam
from src.training.chunks import ChunkedObjective, ChunkOptions
from src.training.flat_updates import PIECE_MULTIPLE
from src.training.graphs import GraphedObjective
from src.training.module import FP16_LOSS_SCALE, TrainingModule, kernels_of_updates
from src.training.objectives import Outcome, Staged

SHAPE = tiny_shape()


def config(**flags: object) -> TrainConfig:
    """A configuration from the two necessary flags and these."""
    given = {"load_model": "base.pth", "data_file": "data", **{name: str(v) for name, v in flags.items()}}
    return TrainConfig.from_flags(given)


def module(dtype: torch.dtype = torch.float32, shape: ModelShape = SHAPE, **flags: object) -> TrainingModule:
    """A training module of a tiny model whose loss is the sum of its states times their numbers."""
    chosen = config(**flags)
    method = method_of(chosen)
    options = LoadOptions(torch.device("cpu"), dtype, trained=method.trained_names(shape))
    model = build_model(tiny_parameters(shape), shape, options)

    def loss(model: LanguageModel, batch: float) -> Tensor:
        states = [model.get_parameter(name) for name in shape.state_shapes()]
        return batch * torch.stack([state.sum() for state in states]).sum()

    return TrainingModule(model, GivenLoss(loss), chosen, method, [])


class TestStates:
    def test_adam_on_exactly_the_states(self) -> None:
        made = module(beta1=0.8, beta2=0.97, adam_eps=1e-7)
        optimizer = made.configure_optimizers()
        assert type(optimizer) is torch.optim.Adam
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(made.model.get_parameter(n)) for n in SHAPE.state_shapes()]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.97), 1e-7, 0.0)
        assert (group["lr_scale"], group["decays"]) == (1.0, False)
        assert {name for name, _ in made.trained()} == set(SHAPE.state_shapes())

    def test_weight_decay_makes_it_adamw(self) -> None:
        optimizer = module(weight_decay=0.01).configure_optimizers()
        assert type(optimizer) is torch.optim.AdamW
        (group,) = optimizer.param_groups
        assert (group["weight_decay"], group["decays"]) == (0.01, True)

    def test_a_step_is_adams(self) -> None:
        made = module(lr_init=0.5)
        optimizer = made.configure_optimizers()
        made.training_step(Staged({}, 2.0), 0).backward()
        optimizer.step()
        for name in SHAPE.state_shapes():
            assert torch.allclose(made.model.get_parameter(name), torch.tensor(-0.5))

    @pytest.mark.parametrize("loss", [float("inf"), float("-inf"), float("nan")])
    def test_a_loss_that_is_not_finite_shows_in_the_gradient(self, loss: float) -> None:
        made = module()
        states = [made.model.get_parameter(name) for name in SHAPE.state_shapes()]
        made.objective = GivenLoss(lambda model, batch: states[0].sum() + loss)
        made.training_step(Staged({}, None), 0).backward()
        assert states[0].grad is not None
        assert states[0].grad.isnan().all()


class TestFullTraining:
    def test_time_decay_learns_twice_as_fast(self) -> None:
        made = module(train_type="none")
        scales = {id(p): g["lr_scale"] for g in made.configure_optimizers().param_groups for p in g["params"]}
        fast = {name for name, parameter in made.trained() if scales[id(parameter)] == 2.0}
        assert fast == {f"blocks.{layer}.att.time_decay" for layer in range(SHAPE.n_layer)}
        assert set(scales.values()) == {1.0, 2.0}

    def test_unless_layerwise_lr_is_off(self) -> None:
        groups = module(train_type="none", layerwise_lr=0).configure_optimizers().param_groups
        assert {group["lr_scale"] for group in groups} == {1.0}

    def test_rwkv7_spares_its_small_maps_and_trains_no_idle_weight(self) -> None:
        shape = tiny_shape(holds_idle=True, architecture="x070")
        made = module(shape=shape, train_type="none", weight_decay=0.1)
        groups = made.configure_optimizers().param_groups
        decaying = {id(p) for g in groups if g["decays"] for p in g["params"]}
        names = {name for name, parameter in made.trained() if id(parameter) in decaying}
        assert names == {*shape.matrix_names(), "emb.weight", "head.weight"}
        fast = {id(p) for g in groups if g["lr_scale"] == 2 for p in g["params"]}
        assert {n for n, p in made.trained() if id(p) in fast} == {"blocks.0.att.w0", "blocks.1.att.w0"}
        assert {name for name, _ in made.trained()} == shape.parameter_shapes().keys() - shape.idle_names()

    def test_weight_decay_acts_on_matrices(self) -> None:
        made = module(train_type="none", weight_decay=0.1)
        groups = made.configure_optimizers().param_groups
        decaying = {id(p) for g in groups if g["decays"] for p in g["params"]}
        for name, parameter in made.trained():
            assert (id(parameter) in decaying) == (parameter.squeeze().ndim >= 2), name
        assert sum(len(group["params"]) for group in groups) == len(list(made.trained()))


class TestLossScale:
    def test_fp16_scales_the_loss_and_not_the_gradient(self) -> None:
        made = module(torch.float16)
        loss = made.training_step(Staged({}, 1e-3), 0)
        loss.backward()
        assert made.outcome is not None
        assert float(loss.detach()) == pytest.approx(FP16_LOSS_SCALE * float(made.outcome.loss))
        for name in SHAPE.state_shapes():
            gradient = made.model.get_parameter(name).grad
            assert gradient is not None
            assert torch.allclose(gradient, torch.tensor(1e-3))

    @pytest.mark.parametrize("mode", [Recompute.INPUTS, Recompute.ALL])
    def test_gradients_of_what_is_computed_again_are_divided_once(self, mode: Recompute) -> None:
        def gradients(mode: Recompute) -> dict[str, Tensor]:
            made = module(torch.float16, train_type="none")
            made.model.set_recomputation([mode] * SHAPE.n_layer)
            made.objective = GivenLoss(lambda model, tokens: model(tokens)[0].float().pow(3).mean())
            made.training_step(Staged({}, torch.arange(12).view(2, 6)), 0).backward()
            return {name: parameter.grad for name, parameter in made.trained() if parameter.grad is not None}

        expected, found = gradients(Recompute.NOTHING), gradients(mode)
        assert found.keys() == expected.keys() != set()
        for name, gradient in found.items():
            assert torch.allclose(gradient, expected[name], rtol=1e-2, atol=1e-5), name
        assert max(gradient.abs().max() for gradient in found.values()) > 1e-2

    def test_other_precisions_have_none(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            made = module(dtype)
            made.training_step(Staged({}, 3.0), 0).backward()
            gradient = made.model.get_parameter("blocks.0.att.time_state").grad
            assert gradient is not None
            assert torch.equal(gradient, torch.full_like(gradient, 3.0))


def test_batches_stay_on_the_host() -> None:
    batch = object()
    assert module().transfer_batch_to_device(batch, torch.device("meta"), 0) is batch


def test_the_model_stays_where_it_is_after_training() -> None:
    made = module()
    made.model.to("meta")  # stands for a GPU
    assert made.cpu() is made
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}


def test_room_is_taken_when_the_engine_has_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which sends weights while they are contiguous."""
    made = module(peft="lora", lora_r=4)
    taken: list[LanguageModel] = []
    monkeypatch.setattr(LanguageModel, "take_room", lambda model: taken.append(model))
    made.configure_optimizers()
    assert taken == []
    made.on_fit_start()
    assert taken == [made.model]


def test_an_engine_that_has_made_a_copy_updates_what_the_model_has() -> None:
    """And what is trained is where the engine has put the whole; the copy, and at the end moments, take no memory."""
    made = module(peft="lora", lora_r=4, strategy="deepspeed_stage_1", train_parts="time,ln")
    optimizer = made.configure_optimizers()
    assert made.flat is optimizer
    assert made.updates_clip, "no engine clips what it has no norm of"
    (whole,) = made.wholes
    (group,) = optimizer.param_groups
    whole.data = whole.detach().clone()
    piece = nn.Parameter(whole.detach().clone())
    group["params"] = [piece]
    copy = piece.untyped_storage()
    made.on_fit_start()
    piece.grad = torch.ones_like(piece)
    before = [parameter.detach().clone() for _, parameter in made.trained()]
    optimizer.step()
    assert not any(torch.equal(now, then) for (_, now), then in zip(made.trained(), before, strict=True))
    assert torch.equal(piece, whole)
    assert copy.nbytes() == 0
    moments = [value for value in optimizer.state[piece].values() if value.ndim]
    assert len(moments) == 2
    made.on_train_end()
    assert not any(value.untyped_storage().nbytes() for value in moments), "also where the engine has views"
    assert not optimizer.state
    assert torch.equal(piece, whole)


@pytest.mark.parametrize("devices", [1, 3, 7, 8])
def test_every_process_has_an_equal_piece_of_whole_vectors(devices: int) -> None:
    made = module(peft="lora", lora_r=4, strategy="deepspeed_stage_1", train_parts="time,ln", devices=devices)
    made.configure_optimizers()
    (whole,) = made.wholes
    assert whole.numel() % (PIECE_MULTIPLE * devices) == 0


def test_recordings_are_told_of_wholes() -> None:
    made = module(peft="lora", lora_r=4, strategy="deepspeed_stage_1")
    made.graphed = GraphedObjective(made.objective, made.model)
    made.configure_optimizers()
    assert made.graphed.joined is made.joined is not None


def test_recordings_and_what_refers_to_them_are_released() -> None:
    made = module()
    made.training_step(Staged({}, 3.0), 0)
    assert made.outcome is not None
    made.release_recordings()
    assert made.graphed is made.outcome is None


class TestLookAhead:
    class Batches:
        """A data set whose batches are their numbers; remembers of which it was asked, in `events`."""

        def __init__(self, events: list[object], broken_step: int = -1) -> None:
            self.events = events
            self.broken_step = broken_step

        def __len__(self) -> int:
            return 2

        def rounded(self, step: int, rounding: Rounding) -> int:
            self.events.append((step, rounding))
            if step == self.broken_step:
                raise DataError("document 5 is empty")
            return step

    def made(self, events: list[object], **changes: int) -> TrainingModule:
        plain = module()
        return TrainingModule(plain.model, plain.objective, plain.config, plain.method, self.Batches(events, **changes))

    @staticmethod
    def record(made: TrainingModule, events: list[object]) -> None:
        """Puts a recorder in place that takes note of the batches it runs."""

        class Recorder:
            replaces_gradients = False

            def __call__(self, staged: Staged) -> Outcome:
                events.append(f"run {staged.source}")
                return Outcome(torch.ones((), requires_grad=True))

            def send(self, staged: Staged) -> Staged:
                events.append(f"send {staged.source}")
                return staged

            def go_on(self, staged: Staged) -> None:
                events.append(f"go on with {staged.source}")

        made.graphed = Recorder()  # type: ignore[assignment]

    def test_the_following_batch_is_staged_once_the_step_is_under_way(self) -> None:
        events: list[object] = []
        made = self.made(events)
        self.record(made, events)
        for _ in range(2):
            for place, staged in enumerate(made.train_dataloader()):
                made.training_step(staged, place)
        following = [event for step in range(4) for event in (f"run {step}", (step + 1, EXACT), f"send {step + 1}")]
        assert events == [(0, EXACT), *following]

    @pytest.mark.parametrize(
        ("changes", "goes_on"),
        [
            ({}, True),
            ({"ends_step": False}, False),
            ({"looks_itself": False}, False),
            ({"turns": True}, False),
            ({"world_size": 2}, False),
            ({"is_last_batch": True}, True),
            ({"is_last_batch": True, "current_epoch": 2}, False),
        ],
    )
    def test_the_device_goes_on_behind_a_step(self, changes: dict[str, Any], goes_on: bool) -> None:
        """Where nobody has to look at the step before it is taken, weights stay where they are, and there is a next."""
        events: list[object] = []
        made = self.made(events)
        self.record(made, events)
        made.training_step(next(iter(made.train_dataloader())), 0)
        made.flat = Mock() if changes.get("looks_itself", True) else None
        made.turns = Mock() if changes.get("turns") else None
        made._ends_step = changes.get("ends_step", True)
        last, epoch = changes.get("is_last_batch", False), changes.get("current_epoch", 1)
        processes = changes.get("world_size", 1)
        made._trainer = Mock(current_epoch=epoch, max_epochs=3, is_last_batch=last, world_size=processes)
        events.clear()
        made.optimizer_step(0, 0, Mock(step=lambda closure: events.append("step")), lambda: None)
        assert events == ["step", *(["go on with 1"] if goes_on else [])]

    def test_where_nothing_is_recorded_each_is_made_in_its_turn(self) -> None:
        events: list[object] = []
        made = self.made(events)
        for place, staged in enumerate(made.train_dataloader()):
            assert events == [(step, EXACT) for step in range(place + 1)]
            made.training_step(staged, place)

    def test_what_is_wrong_with_it_does_not_stop_the_step(self) -> None:
        events: list[object] = []
        made = self.made(events, broken_step=1)
        self.record(made, events)
        batches = iter(made.train_dataloader())
        assert made.training_step(next(batches), 0).item() == 1.0
        with pytest.raises(DataError, match="document 5 is empty"):
            next(batches)

    @pytest.mark.parametrize(("recordable", "rounding"), [(True, FEW_SHAPES), (False, EXACT)])
    def test_batches_of_recorded_steps_are_rounded(
        self, recordable: bool, rounding: Rounding, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LanguageModel, "can_be_recorded", True)
        monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
        monkeypatch.setattr(adam, "kernels_are_available", lambda kernels, device: True)
        monkeypatch.setattr(GivenLoss, "recordable", recordable)
        events: list[object] = []
        made = self.made(events)
        assert bool(made.graphed) == recordable
        next(iter(made.train_dataloader()))
        assert events == [(0, rounding)]


class TestChunks:
    def test_the_objective_is_computed_in_chunks(self) -> None:
        made = module(chunk_ctx=7, bptt_chunks=2, chunk_keep="inputs")
        assert isinstance(made.objective, ChunkedObjective)
        assert made.objective.options == ChunkOptions(7, 2, on_host=True, with_inputs=True)
        assert not isinstance(module().objective, ChunkedObjective)

    @pytest.mark.parametrize(
        ("recordable", "flags", "chunks", "steps"),
        [
            (True, {}, True, True),
            (True, {"chunk_keep": "host"}, True, True),
            (True, {"chunk_keep": "inputs"}, True, True),
            (True, {"peft": "lisa"}, False, True),
            (False, {}, True, False),
            (True, {"cuda_graph": 0}, False, False),
        ],
    )
    def test_what_is_recorded(
        self, recordable: bool, flags: dict[str, Any], chunks: bool, steps: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A loss that depends on padding is not recorded, and chunks of it, which have none, are."""
        monkeypatch.setattr(LanguageModel, "can_be_recorded", True)
        monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
        monkeypatch.setattr(adam, "kernels_are_available", lambda kernels, device: True)
        monkeypatch.setattr(GivenLoss, "recordable", recordable)
        made = module(chunk_ctx=128, **flags)
        assert isinstance(made.objective, ChunkedObjective)
        assert (made.objective.recorder is not None) == chunks
        assert (made.graphed is not None) == steps
        made.graphed = None
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        made.release_recordings()
        assert made.objective.recorder is None


WIDE, NARROW = (torch.float32, False), (torch.bfloat16, False)
PACKED, NARROW_PACKED = (torch.float32, True), (torch.bfloat16, True)
WHOLE = {"train_type": "none", "quant": "0"}
IN_16_BITS = {**WHOLE, "weights": "bf16"}


@pytest.mark.parametrize(
    ("flags", "at_once", "one_by_one"),
    [
        ({"train_type": "states"}, [WIDE], []),
        ({"train_type": "states", "optim": "adamw8bit"}, [WIDE, PACKED], []),
        ({"peft": "lora"}, [WIDE], []),
        ({"peft": "bone", "optim": "adamw8bit"}, [WIDE, PACKED], []),
        ({"peft": "lisa"}, [WIDE], []),
        ({"peft": "lisa", "optim": "adamw8bit"}, [WIDE, PACKED], []),
        ({"peft": "lisa", "optim": "adamw8bit", "devices": "2"}, [WIDE, PACKED], []),
        (WHOLE, [WIDE], []),
        ({**WHOLE, "optim": "adamw8bit"}, [WIDE, PACKED], []),
        ({**WHOLE, "fused_update": "1"}, [], [WIDE]),
        ({**WHOLE, "fused_update": "1", "optim": "paged_adamw8bit"}, [], [WIDE, PACKED]),
        (IN_16_BITS, [WIDE, NARROW], []),
        ({**IN_16_BITS, "optim": "paged_adamw8bit"}, [WIDE, PACKED, NARROW, NARROW_PACKED], []),
        ({**IN_16_BITS, "fused_update": "1", "optim": "adamw8bit"}, [], [WIDE, PACKED, NARROW, NARROW_PACKED]),
        ({**IN_16_BITS, "fused_update": "1", "devices": "2"}, [], [WIDE, NARROW]),
        *(({"peft": peft, "optim": "lion8bit"}, [], []) for peft in ("none", "lora", "lisa")),
        *(({"peft": peft, "optim": "paged_adamw8bit"}, [], []) for peft in ("none", "lora", "lisa")),
        ({**IN_16_BITS, "fused_update": "1", "optim": "lion8bit"}, [], []),
        *(({"devices": "2", **flags}, [], []) for flags in (WHOLE, IN_16_BITS)),
        *(({"devices": "2", **flags}, [WIDE], []) for flags in ({}, {"peft": "lora"})),
        ({"peft": "bone", "strategy": "deepspeed_stage_2", "optim": "adamw8bit"}, [WIDE, PACKED], []),
        *(
            ({"peft": "lora", "strategy": f"deepspeed_stage_{stage}", "quant": "0"}, [], [])
            for stage in ("2_offload", "3", "3_offload")
        ),
        *(
            ({"peft": "lora", "strategy": "deepspeed_stage_1", "optim": optim}, [], [])
            for optim in ("lion8bit", "paged_adamw8bit")
        ),
    ],
)
def test_which_kernels_update_what(flags: dict[str, str], at_once: list[object], one_by_one: list[object]) -> None:
    """By dtype of the weights, and whether moments are packed; nothing is where a library's optimizer updates."""
    given = config(**flags)
    kernels = kernels_of_updates(given, method_of(given))
    for family, expected in ((adam.KERNELS_OF_MANY, at_once), (adam.KERNELS, one_by_one)):
        assert [kind for kind, kernel in family.items() if kernel in kernels] == expected
    assert {dtype for dtype, kernel in adam.NORMS.items() if kernel in kernels} == {dtype for dtype, _ in at_once}
