"""Steps in chunks give the loss and gradients of steps without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from factories import tiny_parameters, tiny_shape, tiny_states
from tables import covering
from torch import Tensor

from src.adapters.lora import LoRA
from src.cutting import cut
from src.data.batches import Batch, packed_batch, padded_batch
from src.data.preference_batches import PairForm, PreferenceBatch, PreferenceDataset
from src.data.preferences import PreferencePair
from src.loading import LoadOptions, build_model
from src.losses import sft_loss
from src.model.chunks import Memories, read_scores
from src.model.language_model import LanguageModel
from src.model.parking import Parking
from src.model.recompute import Recompute
from src.model.shape import ModelShape
from src.model.state import LayerState, by_layer
from src.training import chunk_graphs, chunks
from src.training.chunk_graphs import ChunkRecorder
from src.training.chunks import ChunkedObjective, ChunkOptions, StagedChunks
from src.training.objectives import (
    DPOObjective,
    PreferenceObjective,
    Scored,
    SFTObjective,
    SimPOObjective,
    counted_logps,
    counted_positions,
    outcome_of,
)

SHAPE = tiny_shape(n_layer=2, n_embd=32, head_size=8, vocab_size=61, mix_lora_width=4, decay_lora_width=8)
RWKV7 = tiny_shape(n_layer=3, n_embd=32, head_size=8, vocab_size=61, decay_lora_width=8, architecture="x070")
RECOMPUTED = list(Recompute)
METHODS = ("states", "lora", "full")


def documents() -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Of 1 to 45 inputs, together 70. The third has 40 tokens before its answer, which no loss is taken on."""
    generator = np.random.default_rng(3)
    tokens = [generator.integers(1, 61, size) for size in (9, 2, 46, 5, 13)]
    answer = np.arange(46) >= 40
    tail = np.arange(13) < 5
    return tokens, [None, None, answer, None, tail]


def packed() -> Batch:
    return packed_batch(*documents(), range(5))


def padded() -> Batch:
    return padded_batch(*documents(), range(5))


def pairs(form: PairForm = PairForm.SHARED_PROMPT, reference: bool = False) -> PreferenceBatch:
    generator = np.random.default_rng(4)
    made = [
        PreferencePair(*(generator.integers(1, 61, size).tolist() for size in sizes))
        for sizes in ((30, 9, 14), (1, 8, 6), (3, 12, 2))
    ]
    dataset = PreferenceDataset(made, source="", form=form, longest=99, micro_bsz=3, seed=1)
    if reference:
        dataset.references = torch.linspace(-50, -30, 6, dtype=torch.float64).view(3, 2)
    return dataset.batch(range(3))


CASES: dict[str, tuple[Scored, Any]] = {
    "sft, pack": (SFTObjective(), packed),
    "sft, pad": (SFTObjective(), padded),
    "orpo": (PreferenceObjective(0.3, 0), pairs),
    "dpo": (DPOObjective(0.1), lambda: pairs(reference=True)),
}


def model_of(
    method: str,
    recompute: Recompute = Recompute.NOTHING,
    dtype: torch.dtype = torch.float32,
    lora_dropout: float = 0.0,
    shape: ModelShape = SHAPE,
    **options: Any,
) -> LanguageModel:
    """A model in which every part matters, and of which the method's part is trained."""
    chosen = LoadOptions(torch.device("cpu"), dtype, **options)
    model = build_model({**tiny_parameters(shape, seed=1), **tiny_states(shape, seed=2)}, shape, chosen)
    model.requires_grad_(False)
    model.set_recomputation([recompute] * shape.n_layer, keep_dequantized=recompute is Recompute.ALL)
    if method == "lora":
        sizes = shape.parameter_shapes()
        for seed, key in enumerate(shape.matrix_names()):
            generator = torch.Generator().manual_seed(seed)
            values = {
                name: torch.randn(size, generator=generator) / size[-1] ** 0.5
                for name, size in LoRA.parameter_shapes(4, *sizes[key]).items()
            }
            model.adapt(key, lambda base, own=values: LoRA(base, own, scale=0.5, dropout=lora_dropout))  # type: ignore[misc]
    for name, parameter in model.named_parameters():
        wanted = {
            "states": name.endswith("time_state"),
            "lora": "lora_" in name or ".time_maa" in name or ".att.x_" in name,
            "full": not name.endswith("time_state"),
        }
        parameter.requires_grad_(wanted[method])
    return model


def step(model: LanguageModel, objective: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a micro-batch."""
    model.zero_grad()
    outcome = outcome_of(objective, model, objective.stage(model, replace(batch, step_weight=0.7)))
    (outcome.loss * 3).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outcome.loss.detach(), found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).norm() / gradient.norm())
        assert error <= tolerance, f"{name} is off by {error:.1e} of its norm"


def check(case: str, method: str, recompute: Recompute, *sizes: int, with_inputs: bool = False, **options: Any) -> None:
    objective, made = CASES[case]
    model, batch = model_of(method, recompute, **options), made()
    loss, gradients = step(model, objective, batch)
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    for size in sizes:
        chunked = ChunkedObjective(objective, ChunkOptions(size, with_inputs=with_inputs))
        assert isinstance(chunked.stage(model, batch), StagedChunks) == (size < batch.tokens.shape[1])
        chunked_loss, found = step(model, chunked, batch)
        assert float((chunked_loss - loss).abs() / loss.abs()) <= 1e-5
        assert_same(found, gradients)


@pytest.mark.parametrize(("case", "method", "recompute"), covering(CASES, METHODS, RECOMPUTED))
def test_loss_and_gradient_do_not_depend_on_the_size_of_a_chunk(case: str, method: str, recompute: Recompute) -> None:
    check(case, method, recompute, 20, 64)


@pytest.mark.parametrize("case", CASES)
def test_nor_on_where_memories_wait(case: str) -> None:
    objective, made = CASES[case]
    model, batch = model_of("states"), made()
    loss, gradients = step(model, ChunkedObjective(objective, ChunkOptions(20)), batch)
    parked_loss, found = step(model, ChunkedObjective(objective, ChunkOptions(20, on_host=True)), batch)
    assert torch.equal(parked_loss, loss)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize(("case", "method"), [("sft, pack", "full"), ("sft, pad", "lora"), ("orpo", "states")])
def test_nor_on_whether_what_enters_the_layers_was_kept(case: str, method: str) -> None:
    check(case, method, Recompute.ALL, 20, with_inputs=True)


@pytest.mark.parametrize(
    ("method", "recompute", "with_inputs"),
    [*covering(METHODS, RECOMPUTED, [False]), *covering(METHODS, reversed(RECOMPUTED), [True])],
)
def test_what_one_layer_hands_on_to_all_others_is_handed_on_in_chunks(
    method: str, recompute: Recompute, with_inputs: bool
) -> None:
    check("sft, pack", method, recompute, 20, with_inputs=with_inputs, shape=RWKV7)


@pytest.mark.parametrize(("case", "method", "with_inputs"), covering(["sft, pad", "orpo"], METHODS, [False, True]))
def test_and_in_rows_and_pairs(case: str, method: str, with_inputs: bool) -> None:
    check(case, method, Recompute.ALL, 7, with_inputs=with_inputs, shape=RWKV7)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_nor_on_that_of_small_ones(case: str, method: str, recompute: Recompute) -> None:
    check(case, method, recompute, 1, 7)
    check(case, method, recompute, 7, with_inputs=True)


@pytest.mark.parametrize(
    ("case", "method", "size"), [("sft, pack", "full", 7), ("sft, pad", "lora", 7), ("orpo", "states", 3)]
)
def test_a_chunk_may_be_a_token(case: str, method: str, size: int) -> None:
    check(case, method, Recompute.ALL, size)


@pytest.mark.parametrize(
    ("objective", "form"),
    [
        (SimPOObjective(2.0, 0.5), PairForm.SHARED_PROMPT),
        (PreferenceObjective(0.3, 0), PairForm.TWO_ROWS),
        (PreferenceObjective(0.3, 1), PairForm.RELEASED),
    ],
    ids=["simpo", "two rows", "released"],
)
def test_every_other_loss_on_pairs(objective: Scored, form: PairForm) -> None:
    batch = pairs(form)
    model = model_of("states")
    loss, gradients = step(model, objective, batch)
    chunked_loss, found = step(model, ChunkedObjective(objective, ChunkOptions(11)), batch)
    assert torch.allclose(chunked_loss, loss, rtol=1e-5)
    assert_same(found, gradients)


@pytest.mark.parametrize(
    ("method", "quant_type", "with_inputs"), [("states", "nf4", False), ("lora", "int8", False), ("lora", "nf4", True)]
)
def test_packed_weights(method: str, quant_type: str, with_inputs: bool) -> None:
    head = method == "states"
    check("sft, pack", method, Recompute.ALL, 30, with_inputs=with_inputs, quant_type=quant_type, quant_head=head)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_64_bits(case: str) -> None:
    """Measured 2026-11-26: 64 bits agree within 2e-14 of each gradient's norm, 32 bits with them within 3e-6."""
    objective, made = CASES[case]
    exact_model = model_of("full", dtype=torch.float64).double()
    exact_loss, exact = step(exact_model, objective, made())
    chunked = ChunkedObjective(objective, ChunkOptions(13))
    loss, gradients = step(exact_model, chunked, made())
    assert torch.allclose(loss, exact_loss, rtol=1e-12)
    assert_same(gradients, exact, 1e-12)
    _, gradients = step(model_of("full"), chunked, made())
    assert_same({name: gradient.double() for name, gradient in gradients.items()}, exact, 1e-5)


def unrolled(model: LanguageModel, batch: Batch, size: int, cut_every: int = 0) -> dict[str, Tensor]:
    """Gradients of a loop over chunks of padded rows that autograd sees as a whole."""
    model.zero_grad()
    hidden, state = [], None
    for number, tokens in enumerate(batch.tokens.split(size, dim=1)):
        if cut_every and number % cut_every == 0 and state is not None:
            state = [LayerState(*(part.detach() for part in layer)) for layer in state]
        part, state = model(tokens, state, return_state=True)
        hidden.append(part)
    logp, max_logit = counted_logps(model, torch.cat(hidden, dim=1), batch.targets)
    (3 * 0.7 * sft_loss(logp, max_logit, torch.ones_like(logp, dtype=torch.bool))).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bptt_chunks", [1, 2])
def test_gradients_are_cut_where_that_is_asked_for(bptt_chunks: int, method: str) -> None:
    model, batch = model_of(method, Recompute.INPUTS), padded()
    expected = unrolled(model, batch, 9, bptt_chunks)
    for with_inputs in (False, True):
        options = ChunkOptions(9, bptt_chunks=bptt_chunks, with_inputs=with_inputs)
        _, found = step(model, ChunkedObjective(SFTObjective(), options), batch)
        assert_same(found, expected)
    _, whole = step(model, SFTObjective(), batch)
    assert max(float((found[name] - whole[name]).norm() / whole[name].norm()) for name in whole) > 1e-2


def test_cut_gradients_of_a_packed_row_stay_within_the_chunks() -> None:
    """Both chunks of a document pass the border inside them, and not the one between."""
    tokens = np.random.default_rng(3).integers(1, 61, 25)
    batch, model = packed_batch([tokens], [None], [0]), model_of("full")
    expected = unrolled(model, replace(batch, layout=None), 8, 2)
    _, found = step(model, ChunkedObjective(SFTObjective(), ChunkOptions(8, bptt_chunks=2)), batch)
    assert_same(found, expected)


def test_nothing_is_left_to_train_where_no_gradient_arrives() -> None:
    """The only targets are in the third chunk, and the states act through the first."""
    tokens = np.arange(1, 30)
    batch = packed_batch([tokens], [np.arange(29) >= 24], [0])
    model = model_of("states")
    outcome = outcome_of(
        chunked := ChunkedObjective(SFTObjective(), ChunkOptions(8, bptt_chunks=1)), model, chunked.stage(model, batch)
    )
    outcome.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("kind", ["dropout", "lora_dropout"])
def test_both_passes_draw_the_same_random_numbers(kind: str, with_inputs: bool) -> None:
    batch = padded_batch([np.arange(1, 41), np.arange(20, 60)], [None, None], range(2))
    model = model_of("lora", Recompute.ALL, **{kind: 0.3})
    assert model.draws_random
    torch.manual_seed(5)
    expected = unrolled(model, batch, 16)
    after = torch.rand(3)
    torch.manual_seed(5)
    _, found = step(model, ChunkedObjective(SFTObjective(), ChunkOptions(16, with_inputs=with_inputs)), batch)
    assert_same(found, expected)
    assert torch.equal(torch.rand(3), after)


def test_what_no_target_depends_on_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[int, int, bool]] = []
    forward = LanguageModel.forward

    def counting(self: LanguageModel, tokens: Tensor, *given: Any, **options: Any) -> Any:
        lengths.append((*tokens.shape[:2], torch.is_grad_enabled()))
        return forward(self, tokens, *given, **options)

    monkeypatch.setattr(LanguageModel, "forward", counting)
    documents = [np.arange(1, 42), np.arange(1, 12)]
    batch = padded_batch(documents, [np.arange(41) < 19, None], range(2))
    model = model_of("states")
    step(model, ChunkedObjective(SFTObjective(), ChunkOptions(8)), batch)
    forwards = [(2, 8, False), (2, 8, False), (1, 2, False)]
    assert lengths == [*forwards, *((*size, True) for *size, _ in reversed(forwards))]
    lengths.clear()
    batch = packed_batch(documents, [np.arange(41) >= 38, None], range(2))
    step(model, ChunkedObjective(SFTObjective(), ChunkOptions(8, bptt_chunks=1)), batch)
    with_targets = [number for number in range(7) if number >= 4]
    assert lengths[:7] == [(1, 8, False)] * 6 + [(1, 2, False)]
    assert len(lengths[7:]) == len(with_targets)


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("method", METHODS)
def test_an_answer_after_three_chunks_of_its_prompt(
    method: str, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt's chunks do without the head, and the gradient passes through them as through the whole row."""
    tokens = np.random.default_rng(3).integers(1, 61, 33)
    batch, model = packed_batch([tokens], [np.arange(33) >= 26], [0]), model_of(method, recompute)
    loss, gradients = step(model, SFTObjective(), batch)
    assert all(gradient.any() for gradient in gradients.values())
    asked = 0
    head_weight = LanguageModel.head_weight

    def counting(self: LanguageModel) -> object:
        nonlocal asked
        asked += 1
        return head_weight(self)

    monkeypatch.setattr(LanguageModel, "head_weight", counting)
    chunked_loss, found = step(model, ChunkedObjective(SFTObjective(), ChunkOptions(8)), batch)
    assert asked == (3 if method == "full" else 2), "for the last chunk in each pass; one that is trained once more"
    assert torch.allclose(chunked_loss, loss, rtol=1e-5)
    assert_same(found, gradients)


def test_a_row_that_fits_a_chunk_is_computed_as_ever() -> None:
    batch, model = packed(), model_of("full")
    loss, gradients = step(model, SFTObjective(), batch)
    whole_loss, found = step(model, ChunkedObjective(SFTObjective(), ChunkOptions(70)), batch)
    assert torch.equal(whole_loss, loss)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("objective", [PreferenceObjective(0.3, 0), SimPOObjective(2.0, 0.5)])
def test_pairs_are_evaluated_in_chunks(objective: PreferenceObjective | SimPOObjective) -> None:
    model = model_of("states")
    whole = objective.evaluate(model, pairs()).averages()
    objective.chunk_tokens = 11
    assert objective.evaluate(model, pairs()).averages() == pytest.approx(whole, rel=1e-4)


def test_a_chunk_leaves_its_memory_and_nothing_else() -> None:
    model = model_of("states")
    for batch in (packed(), padded()):
        positions, targets = counted_positions(batch.targets)
        chunks = cut(*batch.tokens.shape, batch.layout, positions, 8)
        memories = Memories(model.device)
        read_scores(model, batch.tokens, chunks, [targets], memories)
        assert memories.bytes() == sum(len(chunk.kept) for chunk in chunks) * SHAPE.memory_bytes(4)
        for index in range(len(chunks)):
            memories.drop(index)
        assert memories.bytes() == 0


class Rerun:
    """Stands for a CUDA graph; what it replays is set by `reruns`."""

    replay: Any = None


@pytest.fixture
def recorder_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ChunkRecorder]:
    """Makes recorders whose replays compute what was recorded once more, from and into the recording's tensors.

    What is parked is copied, as it is on a GPU.
    """

    class Reran(chunk_graphs.RecordedChunk):
        def __init__(
            self, model: LanguageModel, chunk: Any, sample: Any, tokens: int, states: Any, into: Any, *rest: Any
        ) -> None:
            super().__init__(model, chunk, sample, tokens, states, into, *rest)
            of_starts, pool = rest

            def forward() -> None:
                found, after = self._pass_by(self._layouts[0])
                self._hidden.copy_(found)
                if after is not None:
                    assert self._memory is not None
                    torch._foreach_copy_(list(self._memory), list(after))

            def again() -> None:
                start = None if self._start is None else by_layer(self._start)
                with torch.no_grad():
                    self._hidden_again.copy_(model(self._inputs, start, self._layouts[1])[0])

            def backward() -> None:
                aliases = chunk_graphs.aliases_of(states, into)
                second = chunk_graphs._SecondPass(model)
                _, of_start = torch.func.functional_call(second, aliases, (self, self._layouts[1], of_starts, pool))
                if of_start is not None:
                    assert self._of_start is not None
                    torch._foreach_copy_(list(self._of_start), list(of_start))

            self._forward.replay, self._again.replay, self._backward.replay = forward, again, backward

    class RerunLayers(chunk_graphs.RecordedLayers):
        def __init__(
            self, model: LanguageModel, chunk: Any, sample: Any, tokens: int, states: Any, into: Any, *rest: Any
        ) -> None:
            super().__init__(model, chunk, sample, tokens, states, into, *rest)

            def again(layer: int) -> None:
                aliases = chunk_graphs.aliases_of(states, into)
                torch.func.functional_call(chunk_graphs._LayerAgain(model), aliases, (self, layer, self._layouts[1]))

            for layer in range(len(model.blocks)):
                self._forward[layer].replay = partial(self._pass_by, layer, self._layouts[0])
                self._second[layer].replay = partial(again, layer)

    monkeypatch.setattr(chunk_graphs, "RecordedChunk", Reran)
    monkeypatch.setattr(chunk_graphs, "RecordedLayers", RerunLayers)
    monkeypatch.setattr(chunks, "RecordedChunk", Reran)
    monkeypatch.setattr(Parking, "park", lambda self, tensor: tensor.clone())
    monkeypatch.setattr(chunk_graphs, "recording_of", lambda model: contextlib.nullcontext())
    monkeypatch.setattr(chunk_graphs, "capturing", lambda graph, pool: contextlib.nullcontext())
    monkeypatch.setattr(ChunkRecorder, "_make_room", lambda self: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Rerun)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)

    def made(model: LanguageModel, tokens: int, by_layer: bool = False) -> ChunkRecorder:
        with monkeypatch.context() as patch:
            patch.setattr(LanguageModel, "device", torch.device("cuda"))
            return ChunkRecorder(model, tokens, by_layer=by_layer)

    return made


@pytest.mark.parametrize(
    ("case", "method", "bptt_chunks", "shape", "with_inputs"),
    covering(
        [
            *((case, "states", 0, SHAPE) for case in CASES),
            ("sft, pack", "full", 0, SHAPE),
            ("sft, pad", "lora", 1, SHAPE),
            ("sft, pad", "states", 0, RWKV7),
            ("orpo", "lora", 0, RWKV7),
            ("sft, pack", "full", 2, RWKV7),
            ("sft, pad", "lora", 0, SHAPE),
            ("orpo", "lora", 0, SHAPE),
            ("sft, pack", "states", 1, SHAPE),
        ],
        [False, True],
    ),
)
def test_replayed_chunks_give_the_gradient_of_whole_rows(
    case: str,
    method: str,
    bptt_chunks: int,
    shape: ModelShape,
    with_inputs: bool,
    recorder_of: Callable[..., ChunkRecorder],
) -> None:
    """Recording itself is tested on a GPU; here, what goes into a recording and comes out of it."""
    objective, made = CASES[case]
    model, batch = model_of(method, shape=shape), made()
    options = ChunkOptions(12, bptt_chunks, with_inputs=with_inputs)
    loss, gradients = step(model, ChunkedObjective(objective, options), batch)
    recorder = recorder_of(model, 12, with_inputs)
    chunked = ChunkedObjective(objective, options, recorder)
    for _ in range(2):
        replayed_loss, found = step(model, chunked, batch)
        assert torch.allclose(replayed_loss, loss, rtol=1e-5)
        assert_same(found, gradients)
    assert recorder._graphs


@pytest.mark.parametrize("with_inputs", [False, True])
def test_one_recording_serves_all_chunks_of_rows_beside_each_other(
    with_inputs: bool,
    recorder_of: Callable[..., ChunkRecorder],
) -> None:
    """The first, which begins anew, the last, which is shorter, and those between; of rows of any length."""
    model = model_of("states")
    recorder = recorder_of(model, 8, with_inputs)
    objective = ChunkedObjective(SFTObjective(), ChunkOptions(8, with_inputs=with_inputs), recorder)
    for size in (20, 33, 12):
        tokens = np.random.default_rng(size).integers(1, 61, (2, size))
        batch = padded_batch(list(tokens), [None, None], range(2))
        loss, gradients = step(model, SFTObjective(), batch)
        replayed_loss, found = step(model, objective, batch)
        assert torch.allclose(replayed_loss, loss, rtol=1e-5)
        assert_same(found, gradients)
    assert len(recorder._graphs) == 1
