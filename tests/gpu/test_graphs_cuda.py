"""Recorded steps against steps issued kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_parameters, tiny_shape

from src.adapters.method import method_of
from src.adapters.plan import AdapterPlan
from src.config import TrainConfig
from src.data.batches import Batch, packed_batch, padded_batch
from src.data.preference_batches import PairForm, PreferenceDataset
from src.data.preferences import PreferencePair
from src.data.rounding import FEW_SHAPES, Rounding
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.training.graphs import GraphedObjective
from src.training.joined import Joined
from src.training.module import TrainingModule
from src.training.objectives import (
    DPOObjective,
    Objective,
    PreferenceObjective,
    SFTObjective,
    SimPOObjective,
    outcome_of,
)

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("architecture"),
]


def model(recompute: Recompute, keep_dequantized: bool = False) -> LanguageModel:
    shape = tiny_shape(n_layer=3, n_embd=256, head_size=64)
    made = build_model(tiny_parameters(shape), shape, LoadOptions(torch.device("cuda"), torch.bfloat16, "nf4"))
    made.set_recomputation([recompute] * shape.n_layer, keep_dequantized=keep_dequantized)
    return made


def documents(*sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(sizes))
    return [rng.integers(1, 257, size) for size in sizes]


def text_batches() -> list[Batch]:
    sizes = ((300, 290), (310, 200), (333, 5))
    rows = [padded_batch(documents(*each), [None, None], [0, 1], FEW_SHAPES) for each in sizes]
    packed = ((200, 50), (90, 160, 3))
    packs = [packed_batch(documents(*each), [None] * len(each), range(len(each)), FEW_SHAPES) for each in packed]
    return [*rows, *packs] * 3


def preference_batches() -> list[object]:
    rng = np.random.default_rng(1)
    pairs = [PreferencePair(*(rng.integers(1, 257, n).tolist() for n in (20 + i, 60, 61))) for i in range(6)]
    data = PreferenceDataset(pairs, source="test", form=PairForm.SHARED_PROMPT, longest=64, micro_bsz=2, seed=1)
    data.references = torch.tensor(rng.uniform(-350, -300, (len(pairs), 2)))
    return [data.rounded(step, FEW_SHAPES) for step in range(9)]


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "text": SFTObjective,
    "orpo": lambda: PreferenceObjective(0.3, 0),
    "dpo": lambda: DPOObjective(0.1),
    "simpo": lambda: SimPOObjective(2.0, 1.0),
}


def gradients_of(made: LanguageModel, loss: torch.Tensor) -> torch.Tensor:
    states = [parameter for parameter in made.parameters() if parameter.requires_grad]
    loss.backward()
    gradient = torch.cat([state.grad.flatten() for state in states])
    for state in states:
        state.grad = None
    return gradient


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("keep_dequantized", [False, True])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_recorded_steps_give_loss_and_gradients_of_issued_ones(
    recompute: Recompute, keep_dequantized: bool, kind: str
) -> None:
    objective = OBJECTIVES[kind]()
    batches = text_batches() if kind == "text" else preference_batches()
    made = model(recompute, keep_dequantized)
    recorder = GraphedObjective(objective, made)
    recorded = []
    for number, batch in enumerate(batches):
        staged = objective.stage(made, batch)
        if number % 2:
            staged = recorder.send(staged)
            assert all(tensor.is_cuda for tensor in staged.all_tensors())
        outcome = recorder(staged)
        recorded.append((outcome.loss.item(), gradients_of(made, outcome.loss)))
    assert recorder._graphs, "nothing was recorded"
    for batch, (loss, gradient) in zip(batches, recorded, strict=True):
        issued = outcome_of(objective, made, objective.stage(made, batch)).loss
        assert loss == pytest.approx(issued.item(), rel=1e-4)
        expected = gradients_of(made, issued)
        assert (gradient - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("lends", [False, True])
def test_wholes_are_handed_the_gradients_of_their_pieces(lends: bool) -> None:
    objective, batches, made = SFTObjective(), text_batches(), model(Recompute.ALL)
    named = {name: parameter for name, parameter in made.named_parameters() if parameter.requires_grad}
    issued = []
    for batch in batches:
        loss = outcome_of(objective, made, objective.stage(made, batch)).loss
        issued.append((loss.item(), torch.autograd.grad(loss, list(named.values()))))
    joined = Joined([{"params": list(named.values())}], {state: name for name, state in named.items()}, multiple=256)
    ((whole, pieces),) = joined.pieces.items()
    recorder = GraphedObjective(objective, made, lends_gradients=lends)
    recorder.joined = joined
    for batch, (expected_loss, expected) in zip(batches, issued, strict=True):
        outcome = recorder(recorder.send(objective.stage(made, batch)))
        outcome.loss.backward()
        assert outcome.loss.item() == pytest.approx(expected_loss, rel=1e-4)
        assert all(state.grad is None for state in named.values())
        for piece, gradient in zip(pieces, expected, strict=True):
            difference = piece.of(whole.grad) - gradient
            assert difference.norm() <= 1e-3 * gradient.norm(), piece.name
        whole.grad = None
    assert recorder._graphs, "nothing was recorded"


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("kind", ["lora", "bone", "bat"])
def test_adapters_and_parts_are_recorded_like_states(kind: str, quant_type: str | None, recompute: Recompute) -> None:
    shape = tiny_shape(n_layer=3, n_embd=256, head_size=64)
    plan = AdapterPlan(kind, 32)
    parts = [*shape.part("time"), *shape.part("ln")]
    trained = [*plan.parameter_shapes(shape), *shape.state_shapes(), *parts]
    generator = torch.Generator().manual_seed(3)
    start = {key: torch.randn(size, generator=generator) / 16 for key, size in plan.parameter_shapes(shape).items()}
    options = LoadOptions(torch.device("cuda"), torch.bfloat16, quant_type, trained=trained, adapters=plan)
    made = build_model({**tiny_parameters(shape), **start}, shape, options)
    made.set_recomputation([recompute] * shape.n_layer, keep_dequantized=recompute is Recompute.ALL)
    objective = SFTObjective()
    recorder = GraphedObjective(objective, made)
    batches = text_batches()
    recorded = []
    for batch in batches:
        outcome = recorder(objective.stage(made, batch))
        recorded.append((outcome.loss.item(), gradients_of(made, outcome.loss)))
    assert recorder._graphs, "nothing was recorded"
    for batch, (loss, gradient) in zip(batches, recorded, strict=True):
        issued = outcome_of(objective, made, objective.stage(made, batch)).loss
        assert loss == pytest.approx(issued.item(), rel=1e-4)
        expected = gradients_of(made, issued)
        assert (gradient - expected).norm() < 1e-3 * expected.norm()


def test_eager_work_between_replays_changes_nothing() -> None:
    objective = SFTObjective()
    made = model(Recompute.ALL, True)
    batch = packed_batch(documents(200, 50), [None] * 2, range(2), FEW_SHAPES)
    staged = objective.stage(made, batch)
    other = objective.stage(made, replace(batch, tokens=batch.tokens.flip(1)))
    recorder = GraphedObjective(objective, made)
    losses, others = [], []
    for _ in range(4):
        losses.append(recorder(staged).loss.item())
        with torch.no_grad():
            others.append(outcome_of(objective, made, other).loss.item())
    assert len(recorder._graphs) == 1
    assert max(losses) - min(losses) < 1e-3
    assert max(others) - min(others) < 1e-3
    assert abs(losses[0] - others[0]) > 1e-2, "or nothing would be noticed"


def test_another_choice_of_trained_states_is_recorded_apart() -> None:
    objective, made = SFTObjective(), model(Recompute.NOTHING)
    staged = objective.stage(made, packed_batch(documents(200, 50), [None] * 2, range(2), FEW_SHAPES))
    states = [parameter for parameter in made.parameters() if parameter.requires_grad]
    recorder = GraphedObjective(objective, made)
    for chosen in (states, states[1:], states[:1], states):
        for state in states:
            state.requires_grad_(any(state is one for one in chosen))
        issued = gradients_of(made, outcome_of(objective, made, staged).loss)
        for _ in range(3):
            gradient = gradients_of(made, recorder(staged).loss)
            assert (gradient - issued).norm() < 1e-3 * issued.norm()
    assert len(recorder._graphs) == 3


class Repeated:
    """A data set of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def rounded(self, step: int, rounding: Rounding) -> Batch:
        return self.batch


def test_recordings_that_are_given_up_free_their_memory(tmp_path: Path) -> None:
    """Through the Lightning module, which keeps the last step's outcome for its logs."""
    config = TrainConfig.from_flags({"load_model": str(tmp_path), "data_type": "dummy"})
    made = model(Recompute.NOTHING)
    repeated = padded_batch(documents(2000, 2000), [None, None], [0, 1], FEW_SHAPES)
    module = TrainingModule(made, objective := SFTObjective(), config, method_of(config), Repeated(repeated))
    assert module.graphed
    for step in range(3):
        module.training_step(objective.stage(made, repeated), step).backward()
    assert module.graphed._graphs
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    module.graphed._limit = 1
    with pytest.warns(UserWarning, match="do not fit beside the recordings"):
        loss = module.training_step(objective.stage(made, padded_batch(documents(60), [None], [0])), 3)
    assert not module.graphed._graphs
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before - 2**24
    loss.backward()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
