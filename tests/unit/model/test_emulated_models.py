"""Models whose kernels all run on the CPU emulator: gradients of whatever is trained, carried and wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulator.kernels import emulated, has_compiler
from factories import ARCHITECTURES, tiny_parameters, tiny_shape, tiny_states
from kept_tensors import kept_and_estimated
from live_tensors import LiveTensors
from operators import poisoned_memory
from recompute_cases import (
    CASES,
    Gradients,
    adapt,
    branching_row,
    carried_state,
    errors_of_allowed,
    gradients_of,
    loss_of,
    medians,
    model_of,
    own_start,
    shape_of,
    tokens_of,
    two_chained_chunks,
)
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from src.adapters.low_rank import LowRank
from src.adapters.plan import AdapterPlan
from src.layout import SegmentLayout
from src.loading import LoadOptions, build_model
from src.model import language_model, recompute
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.ops import (
    block_diagonal,
    cast,
    delta_rule,
    elementwise,
    elementwise_cuda,
    kernels,
    wkv6_cuda,
    wkv7_cuda,
)
from src.ops.kernels import Kernel
from src.ops.token_logps import head_sft_loss
from src.ops.totals import TOTALS, totals_together
from src.quant import kernels_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs g++")]

Case = Callable[[LanguageModel], Gradients]
MODES = list(Recompute)


def widened(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product that takes `out_dtype`, as those for GPUs do."""

    def multiply(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Tensor) -> Tensor:
        if out_dtype is None:
            return product(a, b, **options)
        wide = a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=out_dtype)
        with _disable_current_modes():  # a GPU has no wide copies of a and b
            return wide.copy_(product(a.to(out_dtype), b.to(out_dtype), **options))

    return multiply


@contextmanager
def every_kernel() -> Iterator[tuple[list[str], set[Kernel]]]:
    """Kernels run here, and every tensor is said to be on a GPU.

    Gives the names of definitions that were used in a kernel's place, and the kernels that were launched.
    """
    used: list[str] = []
    launched: set[Kernel] = set()
    with emulated(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        for name in ("mm", "bmm"):
            patch.setattr(torch, name, widened(getattr(torch, name)))
        patch.setattr(kernels, "_usable", lambda *_: True)
        card = SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=227 * 1024)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        patch.setattr(wkv6_cuda, "_multiprocessors", lambda _: card.multi_processor_count)
        for module in (elementwise, language_model):
            patch.setattr(module, "fused_kernels", lambda: elementwise_cuda)
        for module in (elementwise, delta_rule):
            for name in (name for name in vars(module) if name.endswith("_torch")):
                patch.setattr(module, name, lambda *_, name=name: used.append(name))  # and fails after that
        call = Kernel.__call__

        def noted(kernel: Kernel, *arguments: Any) -> None:
            launched.add(kernel)
            call(kernel, *arguments)

        patch.setattr(Kernel, "__call__", noted)
        yield used, launched


def gradients(case: Case, mode: Recompute, dtype: torch.dtype, architecture: str, quant_type: str | None) -> Gradients:
    model = model_of(mode, quant_type, "cpu", dtype, architecture)
    return {name: tensor.double() for name, tensor in case(model).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_as_close_to_fp32_as_those_of_plain_bf16(architecture: str, case: Case) -> None:
    """As tests/gpu has it for every mode: at most twice the error of plain torch in bf16, plus 2 % of the norm."""
    number = CASES.index(case)
    mode, quant_type = MODES[number % len(MODES)], (None, "nf4")[number % 2]
    shape = shape_of(architecture)
    operator, draws = (wkv6_cuda, 1) if architecture == "x060" else (wkv7_cuda, 3)

    def measured() -> dict[str, float]:
        exact, rounded = (
            gradients(case, Recompute.NOTHING, dtype, architecture, quant_type)
            for dtype in (torch.float32, torch.bfloat16)
        )
        with every_kernel() as (used, launched):
            fused = gradients(case, mode, torch.bfloat16, architecture, quant_type)
        assert used == []
        assert not launched.isdisjoint(operator.KERNELS)
        ready = {*shape.kernels(trains_weights=True), *shape.kernels(trains_weights=False)}
        packing = () if quant_type is None else kernels_for(quant_type)
        of_adapters = {*block_diagonal.KERNELS, cast.TO_BF16}
        assert launched <= {*ready, *packing, *of_adapters}, "compiled ahead"
        return errors_of_allowed(fused, rounded, exact)

    assert {name: error for name, error in medians(draws, measured).items() if error > 1} == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_matrices_whose_inputs_are_mixes_take_one_product(
    architecture: str, mode: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both steps the loss and gradients of two products: rooms hold what is trained as it is now."""
    single = 0
    made = LowRank._single_products.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, adapters: Any, *rest: Any) -> Any:
        nonlocal single
        single += len(adapters)
        return made(cls, adapters, *rest)

    monkeypatch.setattr(LowRank, "_single_products", classmethod(noted))
    with every_kernel():
        found: list[list[dict[str, Any]]] = []
        for takes in (True, False):
            with monkeypatch.context() as patch:
                if not takes:
                    patch.setattr(LanguageModel, "take_room", lambda model: None)
                model = model_of(mode, None, "cpu", torch.bfloat16, architecture)
                adapt(model, "lora", shape_of(architecture).matrix_names())
            before, steps = single, []
            for _ in range(2):
                model.zero_grad()
                loss = loss_of(model(tokens_of(33))[0])
                loss.backward()
                gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
                steps.append({"loss": loss.detach(), **gradients})
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if "lora" in name:
                            parameter.mul_(-0.7)
            found.append(steps)
            matrices = {"x060": 6, "x070": 3}[architecture] * len(model.blocks)
            passes = 2 if mode is Recompute.ALL else 1
            assert single - before == (2 * passes * matrices if takes else 0)
    for ours, theirs in zip(*found, strict=True):
        for name, expected in theirs.items():
            assert (ours[name] - expected).norm() < 0.05 * expected.norm(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("mode", "run"),
    [
        (Recompute.NOTHING, "states"), (Recompute.NOTHING, "bat"), (Recompute.INPUTS, "lora"), (Recompute.ALL, "lora"),
        (Recompute.NOTHING, "lora time ln"), (Recompute.NOTHING, "bone time ln"), (Recompute.INPUTS, "bone time ln"),
        (Recompute.NOTHING, "parts"), (Recompute.NOTHING, "full"), (Recompute.INPUTS, "full bf16"),
        (Recompute.ALL, "full"), (Recompute.NOTHING, "lora dense"), (Recompute.INPUTS, "lora dense"),
        (Recompute.ALL, "lora dense"),
    ],
)  # fmt: skip
def test_kept_bytes_cover_what_kernels_keep(mode: Recompute, run: str, architecture: str) -> None:
    with every_kernel():
        kept, estimate = kept_and_estimated("cpu", torch.bfloat16, mode, run, architecture, tokens=64)
    assert 0.98 * estimate < kept <= estimate


def segments_that_go_on_with_trained_mixing(model: LanguageModel) -> Gradients:
    """Each mix is used twice in a layer."""
    layout = SegmentLayout.packed([5, 1, 10]).carrying([0, 2], [1, 2])
    return gradients_of(model, loss_of(model(tokens_of(16, 1), carried_state(model), layout)[0]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("case", "mode"),
    [
        (own_start, Recompute.ALL),
        (branching_row, Recompute.ALL),
        (two_chained_chunks, Recompute.INPUTS),
        (segments_that_go_on_with_trained_mixing, Recompute.ALL),
    ],
)
def test_totals_that_wait_are_the_same_bits(
    case: Case, mode: Recompute, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is trained in fp32; and there are fewer launches, but where a layer adds two of them up."""
    shape = shape_of(architecture)
    trained = [*shape.part("time"), *shape.part("ln"), *shape.state_shapes()]
    options = LoadOptions(torch.device("cpu"), torch.bfloat16, trained=trained)
    found, launches = [], []
    with poisoned_memory():
        for waits in (True, False):
            if not waits:
                monkeypatch.setattr(recompute, "totals_together", lambda _: totals_together(False))
            model = build_model({**tiny_parameters(shape, seed=1), **tiny_states(shape, seed=2)}, shape, options)
            model.set_recomputation([mode] * shape.n_layer)
            with every_kernel(), monkeypatch.context() as counting:
                count = 0
                launch = Kernel.__call__

                def counted(kernel: Kernel, *arguments: Any, launch: Any = launch) -> None:
                    nonlocal count
                    count += kernel is TOTALS
                    launch(kernel, *arguments)

                counting.setattr(Kernel, "__call__", counted)
                found.append(case(model))
            launches.append(count)
    together, apart = found
    assert together.keys() == apart.keys()
    assert [name for name in apart if not torch.equal(together[name], apart[name])] == []
    assert not any(gradient.isnan().any() for gradient in apart.values())
    if case is segments_that_go_on_with_trained_mixing:
        assert launches[0] == launches[1]
    else:
        assert launches[0] < launches[1]
    if case is own_start:
        assert launches[0] == shape.n_layer + 2, "one of a layer, and those of the norms outside of layers"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_hook_sees_no_total_that_waits(architecture: str) -> None:
    """What is hooked to a parameter is given its gradient in the second pass, too, and may read it there."""
    shape = shape_of(architecture)
    trained = [*shape.part("time"), *shape.part("ln"), *shape.state_shapes()]
    options = LoadOptions(torch.device("cpu"), torch.bfloat16, trained=trained)
    model = build_model({**tiny_parameters(shape, seed=1), **tiny_states(shape, seed=2)}, shape, options)
    model.set_recomputation([Recompute.ALL] * shape.n_layer)
    seen: dict[str, Tensor] = {}

    def look(name: str, gradient: Tensor) -> None:
        if recompute.gradients_come_again():
            seen[name] = gradient.clone()

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(look, name))
    with poisoned_memory(), every_kernel():
        found = own_start(model)
    assert {f"blocks.1.{name}" for name in ("ln1.weight", "att.time_state")} <= seen.keys()
    assert [name for name in seen if not torch.equal(seen[name], found[name])] == []


MOST_UNITS = {"x060": 34.2, "x070": 39.2}
"""[T, C] in bf16 at the peak of a step of LoRA, beside what it trains, its gradients, dense matrices and casts."""


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_that_is_computed_again_holds_little_and_leaves_its_gradients(
    architecture: str, quant_type: str | None
) -> None:
    """With T : C : r as ctx 1024, 4096 channels and r 64 have it."""
    tokens, channels, layers = 64, 256, 3
    passing, left = live_in_a_step(architecture, quant_type, layers=layers, channels=channels, tokens=tokens)
    unit = 2 * tokens * channels
    assert passing / unit <= MOST_UNITS[architecture]
    shape = tiny_shape(layers, channels, head_size=64, vocab_size=256, mix_lora_width=32, architecture=architecture)
    kept = shape.kept_bytes(Recompute.ALL, fused=True)  # most is there in the first layer, when others are through
    assert 0.9 < passing / (tokens * (shape.passing_bytes_again("lora") + kept)) < 1.01
    assert left < unit, "bytes that the graph holds to its end"


def live_in_a_step(
    architecture: str, quant_type: str | None, *, layers: int, channels: int, tokens: int
) -> tuple[int, int]:
    """Bytes of a step of LoRA: those at its peak that are gone at its end, and those at its end that its loss holds."""
    shape = tiny_shape(layers, channels, head_size=64, vocab_size=256, mix_lora_width=32, architecture=architecture)
    adapters = AdapterPlan("lora", r=channels // 64)
    trained = [*shape.part("time"), *shape.part("ln"), *adapters.parameter_shapes(shape)]
    options = LoadOptions(
        torch.device("cpu"), torch.bfloat16, quant_type=quant_type, trained=trained, adapters=adapters
    )
    with every_kernel():
        model = build_model({**tiny_parameters(shape), **tiny_states(shape)}, shape, options)
        model.lay_in_one_piece()
        model.set_recomputation([Recompute.ALL] * layers, keep_dequantized=quant_type is not None)
        row = 7 * torch.arange(tokens)[None] % shape.vocab_size

        def step() -> Tensor:
            hidden, _ = model(row)
            loss = head_sft_loss(hidden.flatten(0, 1), model.head_weight(), row.flatten())
            loss.backward()
            return loss

        step()  # what is made once is there
        model.zero_grad()
        with LiveTensors((*model.parameters(), *model.buffers(), *model.workspace.buffers())) as live:
            loss = step()
        at_end = sum(live.sizes)
        passing = live.passing
        del loss
    return passing, at_end - sum(live.sizes)
