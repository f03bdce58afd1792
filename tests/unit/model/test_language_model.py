"""The model: what its outputs and the gradients of its start state may and may not depend on.

Every test runs with every architecture.
"""

from collections.abc import Mapping
from typing import Any

import factories
import pytest
import torch
from factories import tiny_parameters, tiny_shape, tiny_states
from torch import Tensor

from src.layout import SegmentLayout
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.layers import Linear
from src.model.recompute import Recompute
from src.model.shape import ModelShape, state_key

CPU = torch.device("cpu")
TOLERANCE = 2e-5
"""Two ways to one result in fp32, values of order 1. Measured: 2e-6 at most over the shapes below, torch
2.13 on an x86-64 CPU; the rest is room for another machine's order of additions."""


@pytest.fixture(autouse=True, params=factories.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `tiny_shape` makes."""
    monkeypatch.setattr(factories, "DEFAULT_ARCHITECTURE", request.param)
    return str(request.param)


def tiny_model(
    shape: ModelShape | None = None, *, states: bool = True, recompute: Recompute = Recompute.NOTHING, **options: object
) -> LanguageModel:
    """A model in which every part matters, with a start state that is not symmetric."""
    shape = shape or tiny_shape()
    tensors: dict[str, Tensor] = {
        **tiny_parameters(shape, seed=1),
        **(tiny_states(shape, seed=2) if states else {}),
    }
    chosen = {"device": CPU, "compute_dtype": torch.float32, **options}
    model = build_model(tensors, shape, LoadOptions(**chosen))  # type: ignore[arg-type]
    model.set_recomputation([recompute] * shape.n_layer)
    return model


def tokens_of(shape: ModelShape, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocab_size, (rows, length), generator=generator)


def hidden_of(model: LanguageModel, tokens: Tensor, layout: SegmentLayout | None = None) -> Tensor:
    """Outputs without gradients."""
    with torch.no_grad():
        return model(tokens, layout=layout)[0]


def state_gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the start states by file key."""
    names = list(model.shape.state_shapes())
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    return dict(zip(names, gradients, strict=True))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Maximum and mean difference, relative to the largest expected value."""
    difference = ((actual - expected).abs() / expected.abs().max()).detach()
    assert float(difference.max()) < tolerance
    assert float(difference.mean()) < tolerance / 4


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """`assert_close` for every name."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 0, name
        assert_close(actual[name], expected[name])


SIZES = [
    pytest.param({}, id="plain"),
    pytest.param({"n_layer": 1, "n_embd": 32, "head_size": 4}, id="one layer, head size 4"),
    pytest.param({"n_embd": 32, "dim_att": 64, "head_size": 16}, id="dim_att over n_embd"),
    pytest.param({"n_embd": 64, "dim_att": 32, "head_size": 8, "dim_ffn": 96}, id="dim_att under n_embd"),
    pytest.param({"mix_lora_width": 64, "decay_lora_width": 128}, id="double extra dim"),
    pytest.param({"n_embd": 64, "head_size": 64}, id="one head of 64"),
    pytest.param({"holds_idle": True}, id="weights that nothing uses"),
]


class TestDependence:
    @pytest.mark.parametrize("sizes", SIZES)
    def test_a_token_changes_nothing_before_it_and_everything_after(
        self, sizes: dict[str, Any], architecture: str
    ) -> None:
        if architecture == "x070" and "dim_att" in sizes:
            pytest.skip("dim_att is n_embd in RWKV-7")
        shape = tiny_shape(**sizes)
        model, tokens = tiny_model(shape), tokens_of(shape, 1, 20)
        changed = tokens.clone()
        changed[0, 11] = (changed[0, 11] + 1) % shape.vocab_size
        before, after = hidden_of(model, tokens)[0], hidden_of(model, changed)[0]
        assert torch.equal(before[:11], after[:11])
        assert ((before[11:] - after[11:]).abs().amax(1) > 1e-4).all()

    def test_padding_changes_no_real_position(self) -> None:
        model = tiny_model()
        tokens = tokens_of(model.shape, 3, 24)
        other = tokens.clone()
        other[1, 10:] = 0
        assert torch.equal(hidden_of(model, tokens)[1, :10], hidden_of(model, other)[1, :10])

    def test_a_row_does_not_depend_on_its_neighbours(self) -> None:
        model = tiny_model()
        tokens = tokens_of(model.shape, 3, 17)
        together = hidden_of(model, tokens)
        for row in range(3):
            assert_close(together[row], hidden_of(model, tokens[row : row + 1])[0])

    def test_every_weight_matters(self) -> None:
        shape = tiny_shape()
        model = tiny_model(shape, trained={*shape.parameter_shapes(), *shape.state_shapes()})
        hidden, _ = model(tokens_of(shape, 2, 12))
        model.logits(hidden).square().mean().backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []
        assert {name for name, _ in model.named_parameters()} == {
            *shape.parameter_shapes(),
            *shape.state_shapes(),
        }


class TestStartState:
    def test_each_axis_of_the_state_has_its_meaning(self) -> None:
        model = tiny_model()
        tokens = tokens_of(model.shape, 1, 8)
        straight = hidden_of(model, tokens)
        with torch.no_grad():
            for name in model.shape.state_shapes():
                state = model.get_parameter(name)
                state.copy_(state.transpose(1, 2).clone())
        assert (hidden_of(model, tokens) - straight).abs().max() > 1e-2

    @pytest.mark.parametrize("pieces", [(1,) * 12, (5, 7), (11, 1), (12,)])
    def test_carrying_the_state_equals_one_long_row(self, pieces: tuple[int, ...]) -> None:
        model = tiny_model()
        tokens = tokens_of(model.shape, 2, 12)
        state, parts = None, []
        with torch.no_grad():
            for piece in tokens.split(list(pieces), dim=1):
                hidden, state = model(piece, state, return_state=True)
                parts.append(hidden)
            whole, end = model(tokens, return_state=True)
        assert_close(torch.cat(parts, dim=1), whole)
        assert state is not None
        for carried, direct in zip(state, end, strict=True):
            for one, other in zip(carried, direct, strict=True):
                assert_close(one, other)

    def test_a_gradient_flows_through_a_carried_state(self) -> None:
        model = tiny_model()
        tokens = tokens_of(model.shape, 1, 12)
        whole = state_gradients(model, model(tokens)[0][:, 6:].square().sum())
        _, carried = model(tokens[:, :6], return_state=True)
        cut = state_gradients(model, model(tokens[:, 6:], carried)[0].square().sum())
        assert_all_close(cut, whole)


class TestPackedRows:
    LENGTHS = (5, 1, 16, 3)

    def test_packed_documents_equal_rows_of_their_own(self) -> None:
        model = tiny_model()
        tokens = tokens_of(model.shape, 1, sum(self.LENGTHS))
        weights = torch.randn(sum(self.LENGTHS), generator=torch.Generator().manual_seed(8))
        documents = tokens.split(list(self.LENGTHS), dim=1)

        packed = model(tokens, layout=SegmentLayout.packed(self.LENGTHS))[0][0]
        apart = torch.cat([model(document)[0][0] for document in documents])
        assert_close(packed, apart)
        assert_all_close(
            state_gradients(model, (packed.square().sum(1) * weights).sum()),
            state_gradients(model, (apart.square().sum(1) * weights).sum()),
        )

    def test_the_memory_after_each_packed_document(self) -> None:
        model = tiny_model()
        tokens = tokens_of(model.shape, 1, sum(self.LENGTHS))
        with torch.no_grad():
            _, packed = model(tokens, layout=SegmentLayout.packed(self.LENGTHS), return_state=True)
            for index, document in enumerate(tokens.split(list(self.LENGTHS), dim=1)):
                _, alone = model(document, return_state=True)
                for together, own in zip(packed, alone, strict=True):
                    for one, other in zip(together, own, strict=True):
                        assert_close(one[index], other[0])

    def test_some_documents_go_on_from_a_memory(self) -> None:
        model = tiny_model()
        going_on, kept = [0, 2], [2, 1]
        tokens = tokens_of(model.shape, 1, sum(self.LENGTHS))
        layout = SegmentLayout.packed(self.LENGTHS).carrying(going_on, kept)
        with torch.no_grad():
            _, memory = model(tokens_of(model.shape, 2, 6, seed=8), return_state=True)
            together, after = model(tokens, memory, layout, return_state=True)
            apart = []
            for root, document in enumerate(tokens.split(list(self.LENGTHS), dim=1)):
                start = None
                if root in going_on:
                    start = [layer.rows(torch.tensor([going_on.index(root)])) for layer in memory]
                hidden, alone = model(document, start, return_state=True)
                apart.append(hidden)
                for layer, own in zip(after, alone, strict=True):
                    for one, other in zip(layer, own, strict=True):
                        if root in kept:
                            assert_close(one[kept.index(root)], other[0])
        assert_close(together, torch.cat(apart, dim=1))

    @pytest.mark.parametrize("prompts", [(6, 3), (1, 9), (4,), (0, 5)])
    @pytest.mark.parametrize("recompute", [Recompute.NOTHING, Recompute.ALL])
    def test_answers_that_branch_off_a_prompt_equal_full_rows(
        self, prompts: tuple[int, ...], recompute: Recompute
    ) -> None:
        model = tiny_model(recompute=recompute)
        answers = [length + 2 for length in range(2 * len(prompts))]
        parents = [index // 2 for index in range(len(answers))]
        layout = SegmentLayout.branching(prompts, answers, parents)
        tokens = tokens_of(model.shape, 1, sum(prompts) + sum(answers))
        segments = tokens.split([*prompts, *answers], dim=1)

        row = model(tokens, layout=layout)[0]
        shared = row.split([*prompts, *answers], dim=1)
        full = [
            model(torch.cat((segments[parent], segments[len(prompts) + child]), dim=1))[0]
            for child, parent in enumerate(parents)
        ]
        loss_shared, loss_full = torch.zeros(()), torch.zeros(())
        for child, parent in enumerate(parents):
            answer = full[child][:, prompts[parent] :]
            assert_close(shared[len(prompts) + child], answer)
            loss_shared = loss_shared + (child + 1) * shared[len(prompts) + child].square().mean()
            loss_full = loss_full + (child + 1) * answer.square().mean()
            if child % 2 == 0 and prompts[parent]:
                assert_close(shared[parent], full[child][:, : prompts[parent]])
                loss_shared = loss_shared + shared[parent].square().mean()
                loss_full = loss_full + full[child][:, : prompts[parent]].square().mean()
        assert_all_close(state_gradients(model, loss_shared), state_gradients(model, loss_full))


class TestRecomputation:
    @pytest.mark.parametrize("recompute", [Recompute.INPUTS, Recompute.ALL])
    @pytest.mark.parametrize("quant_type", [None, "nf4"])
    def test_gradients_are_equal_with_and_without(self, recompute: Recompute, quant_type: str | None) -> None:
        shape = tiny_shape(n_embd=64)
        tokens = tokens_of(shape, 2, 20)
        results = []
        for mode in (Recompute.NOTHING, recompute):
            model = tiny_model(shape, recompute=mode, quant_type=quant_type)
            loss = model.logits(model(tokens)[0]).logsumexp(-1).mean()
            results.append((loss.detach(), state_gradients(model, loss)))
        (loss_kept, kept), (loss_again, again) = results
        assert torch.equal(loss_kept, loss_again)
        for name in kept:
            assert kept[name].any()
            if recompute is Recompute.ALL:  # takes the feed-forward's output from a difference
                assert (again[name] - kept[name]).norm() < 1e-5 * kept[name].norm(), name
            else:
                assert torch.equal(kept[name], again[name]), name

    def test_of_frozen_feed_forwards_the_last_product_is_not_computed_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        products: list[Linear] = []
        forward = Linear.forward
        monkeypatch.setattr(Linear, "forward", lambda self, x: (products.append(self), forward(self, x))[1])
        model = tiny_model(recompute=Recompute.ALL)
        hidden, _ = model(tokens_of(model.shape, 1, 9))
        hidden.square().mean().backward()
        for block in model.blocks:
            assert products.count(block.ffn.value) == 1
            assert products.count(block.ffn.key) == products.count(block.att.output) == 2

    def test_bf16_gradients_do_not_suffer_from_a_large_residual_stream(self) -> None:
        gradients = {}
        for name, mode, dtype in (
            ("fp32", Recompute.NOTHING, torch.float32),
            ("kept", Recompute.NOTHING, torch.bfloat16),
            ("again", Recompute.ALL, torch.bfloat16),
        ):
            model = tiny_model(tiny_shape(n_embd=64), recompute=mode, compute_dtype=dtype)
            assert model.blocks[0].ln0 is not None
            model.blocks[0].ln0.weight.data *= 100
            loss = model(tokens_of(model.shape, 2, 20))[0].float().square().mean()
            gradients[name] = torch.cat([gradient.flatten() for gradient in state_gradients(model, loss).values()])
        errors = {name: (gradients[name] - gradients["fp32"]).norm().item() for name in ("kept", "again")}
        assert errors["again"] == pytest.approx(errors["kept"], rel=0.05)

    @pytest.mark.parametrize("recompute", [Recompute.INPUTS, Recompute.ALL])
    def test_all_weights_gradients_are_equal_with_and_without(self, recompute: Recompute) -> None:
        gradients = []
        for mode in (Recompute.NOTHING, recompute):
            model = tiny_model(recompute=mode, trained=set(tiny_shape().parameter_shapes()))
            model(tokens_of(model.shape, 2, 9))[0].square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        kept, again = gradients
        assert kept.keys() == again.keys() == tiny_shape().parameter_shapes().keys() - {"head.weight"}
        for name in kept:
            assert torch.equal(kept[name], again[name]), name

    def test_it_keeps_less(self) -> None:
        kept_bytes = []
        for mode in (Recompute.NOTHING, Recompute.INPUTS, Recompute.ALL):
            model = tiny_model(recompute=mode)
            seen: dict[int, int] = {}

            def note(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                hidden, _ = model(tokens_of(model.shape, 1, 64))
            kept_bytes.append(sum(seen.values()))
            assert hidden.requires_grad
        assert kept_bytes[0] > kept_bytes[1] > kept_bytes[2]


class TestDropout:
    def test_it_acts_in_training_only(self) -> None:
        model = tiny_model(dropout=0.5)
        tokens = tokens_of(model.shape, 1, 10)
        torch.manual_seed(0)
        first, second = hidden_of(model, tokens), hidden_of(model, tokens)
        assert (first - second).abs().max() > 0.1
        model.eval()
        assert torch.equal(hidden_of(model, tokens), hidden_of(tiny_model(), tokens))

    @pytest.mark.parametrize("recompute", list(Recompute))
    def test_it_acts_on_embeddings_and_on_the_sum_with_each_branch(
        self, recompute: Recompute, architecture: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shape = tiny_shape()
        model = tiny_model(shape, dropout=0.5, recompute=recompute)
        seen: list[Tensor] = []

        def inputs_of_dropout(tokens: Tensor) -> list[Tensor]:
            seen.clear()
            hidden_of(model, tokens)
            return list(seen)

        one, other = tokens_of(shape, 1, 9, seed=1), tokens_of(shape, 1, 9, seed=2)
        places = 1 + 2 * shape.n_layer
        for emptied in range(places):

            def dropout(x: Tensor, probability: float, training: bool, emptied: int = emptied) -> Tensor:
                """Keeps everything, but nothing in the call numbered `emptied`."""
                assert probability == 0.5
                assert training
                seen.append(x)
                return x * (len(seen) != emptied + 1)

            monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
            first, second = inputs_of_dropout(one), inputs_of_dropout(other)
            assert len(first) == places
            for place in range(places):
                # RWKV-7's values of layer 0 pass by what was emptied behind them.
                passed_by = architecture == "x070" and 0 < emptied < 3 <= place
                assert torch.equal(first[place], second[place]) == (place > emptied and not passed_by), (place, emptied)
            assert model.emb.host_table is not None
            assert torch.equal(first[0], model.emb.host_table[one])

    @pytest.mark.parametrize("recompute", [Recompute.INPUTS, Recompute.ALL])
    def test_recomputation_draws_the_same_elements(self, recompute: Recompute) -> None:
        gradients = []
        for mode in (Recompute.NOTHING, recompute):
            model = tiny_model(dropout=0.3, recompute=mode)
            torch.manual_seed(7)
            loss = model(tokens_of(model.shape, 1, 10))[0].square().mean()
            gradients.append(state_gradients(model, loss))
        for name in gradients[0]:
            # Other elements would change gradients by their own size; the order of sums may differ.
            torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-7)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_states_and_their_gradients_are_fp32_in_every_precision(self, dtype: torch.dtype) -> None:
        model = tiny_model(compute_dtype=dtype)
        hidden, state = model(tokens_of(model.shape, 1, 10), return_state=True)
        assert hidden.dtype == dtype
        assert model.logits(hidden).dtype == dtype
        assert state is not None
        assert {layer.wkv.dtype for layer in state} == {torch.float32}
        gradients = state_gradients(model, hidden.float().square().mean())
        assert {g.dtype for g in gradients.values()} == {torch.float32}
        assert all(g.isfinite().all() and g.any() for g in gradients.values())

    def test_bf16_is_close_to_fp32(self) -> None:
        tokens = tokens_of(tiny_shape(), 2, 16)
        exact = hidden_of(tiny_model(), tokens)
        rounded = hidden_of(tiny_model(compute_dtype=torch.bfloat16), tokens).float()
        assert (rounded - exact).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()


class TestFrozenMeansFrozen:
    @pytest.mark.parametrize("quant_type", [None, "nf4", "fp4", "4bit", "int8"])
    def test_a_step_changes_time_state_and_not_a_bit_elsewhere(self, quant_type: str | None) -> None:
        shape = tiny_shape(n_embd=64)
        model = tiny_model(shape, quant_type=quant_type, compute_dtype=torch.bfloat16)
        everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert model.emb.host_table is not None
        everything["emb.weight"] = model.emb.host_table
        before = {name: tensor.detach().clone() for name, tensor in everything.items()}
        states = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(states, lr=0.1)
        model.logits(model(tokens_of(shape, 2, 12))[0]).float().logsumexp(-1).mean().backward()
        optimizer.step()
        changed = {name for name, old in before.items() if not torch.equal(old, everything[name].detach())}
        assert changed == {state_key(layer) for layer in range(shape.n_layer)}
        packed = [name for name, tensor in before.items() if tensor.dtype == torch.uint8]
        assert len(packed) >= (len(shape.matrix_names()) if quant_type else 0)

    def test_no_frozen_tensor_ever_has_a_gradient(self) -> None:
        model = tiny_model(tiny_shape(n_embd=64), quant_type="nf4")
        model(tokens_of(model.shape, 1, 9))[0].square().mean().backward()
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == set(model.shape.state_shapes())
