"""What can be trained, carried and wrapped when layers are computed again: each case gives gradients by name."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from factories import tiny_parameters, tiny_shape, tiny_states
from torch import Tensor

from src.adapters.lora import LoRA
from src.adapters.plan import KINDS, AdapterPlan
from src.layout import SegmentLayout
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.layers import Linear
from src.model.recompute import Recompute
from src.model.shape import ModelShape
from src.model.state import LayerState, ModelState


@cache
def shape_of(architecture: str) -> ModelShape:
    """Heads of 64 and a modulation of 32 terms, which the kernels take."""
    return tiny_shape(n_layer=3, n_embd=128, head_size=64, mix_lora_width=32, architecture=architecture)


SHAPE = shape_of("x060")

Gradients = dict[str, Tensor]


def adapt(model: LanguageModel, kind: str, matrices: Collection[str], r: int = 16) -> None:
    """Puts adapters around matrices, all of them away from their start; on a GPU they take room."""
    made = KINDS[kind]
    sizes = model.shape.parameter_shapes()
    for key, width in AdapterPlan(kind, r).rooms(model.shape).items() if model.ln_out.weight.is_cuda else ():
        module = model.get_submodule(key.removesuffix(".weight"))
        if key in matrices and isinstance(module, Linear):
            module.reserve(width)
    for seed, key in enumerate(matrices):
        generator = torch.Generator().manual_seed(seed)
        values = {
            name: (torch.randn(size, generator=generator) / size[-1] ** 0.5).to(model.device)
            for name, size in made.parameter_shapes(r, *sizes[key]).items()
        }
        options = {"scale": 0.5} if made is LoRA else {}
        model.adapt(key, lambda base, own=values, given=options: made(base, own, **given))  # type: ignore[misc]
    model.take_room()


def model_of(
    mode: Recompute,
    quant_type: str | None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    architecture: str = "x060",
) -> LanguageModel:
    """A model in which every part matters; with ALL its time mix is dequantised once for both passes."""
    shape = shape_of(architecture)
    options = LoadOptions(torch.device(device), dtype, quant_type=quant_type)
    model = build_model({**tiny_parameters(shape, seed=1), **tiny_states(shape, seed=2)}, shape, options)
    model.set_recomputation([mode] * shape.n_layer, keep_dequantized=mode is Recompute.ALL)
    return model


def small_parts(model: LanguageModel) -> set[str]:
    """What `--train_parts time` means, and the states."""
    return {*model.shape.part("time"), *model.shape.state_shapes()}


def train_only(model: LanguageModel, wanted: Callable[[str], bool]) -> None:
    """Another choice of what is trained, as LISA makes it between steps."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
        parameter.grad = None


_draw = 0


@contextmanager
def another_draw(number: int) -> Iterator[None]:
    """The cases' tokens are others."""
    global _draw
    before, _draw = _draw, number
    try:
        yield
    finally:
        _draw = before


def tokens_of(length: int, rows: int = 2) -> Tensor:
    return torch.randint(SHAPE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(4 + _draw))


def errors_of_allowed(found: Gradients, plain: Gradients, exact: Gradients) -> dict[str, float]:
    """Errors by name, as parts of what is allowed: twice the error of plain torch, plus 2 % of the gradient's norm."""
    assert found.keys() == exact.keys()
    return {
        name: float((found[name] - expected).norm() / (2 * (plain[name] - expected).norm() + 0.02 * expected.norm()))
        for name, expected in exact.items()
    }


def medians(draws: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What is measured, over several draws of tokens.

    bf16 keeps 8 bits, so a gradient through three layers is off by some percent however it is computed, and by how
    many is chance, for some models and tokens 5, for others 35.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for draw in range(draws):
        with another_draw(draw):
            for name, value in measure().items():
                values[name].append(value)
    return {name: statistics.median(each) for name, each in values.items()}


def carried_state(model: LanguageModel, rows: int = 2) -> ModelState:
    """A memory whose every part asks for its gradient."""
    generator = torch.Generator().manual_seed(3)

    def part(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator).mul_(0.5)
        dtype = torch.float32 if len(size) == 4 else model.compute_dtype
        return values.to(model.device, dtype).requires_grad_()

    shape = model.shape
    C, H, N = shape.n_embd, shape.n_head, shape.head_size
    return [LayerState(part(rows, C), part(rows, H, N, N), part(rows, C)) for _ in range(shape.n_layer)]


def loss_of(hidden: Tensor, state: Iterable[LayerState] = ()) -> Tensor:
    """Depends on every output differently."""
    weight = torch.linspace(0.5, 1.5, hidden.numel(), device=hidden.device, dtype=torch.float64).view(hidden.shape)
    carried = sum(part.double().sin().mean() for layer in state for part in layer)
    return (hidden.double() * weight).square().mean() + carried


def gradients_of(model: LanguageModel, loss: Tensor, state: ModelState | None = None) -> Gradients:
    """Of everything trained, and of a carried memory."""
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for layer, parts in enumerate(state or ()):
        found |= {f"carried {name} of layer {layer}": part.grad for name, part in parts._asdict().items()}
    assert found
    missing = [name for name, gradient in found.items() if gradient is None or not gradient.any()]
    assert not missing, missing
    return found  # type: ignore[return-value]


def own_start(model: LanguageModel) -> Gradients:
    return gradients_of(model, loss_of(model(tokens_of(11))[0]))


def packed_row(model: LanguageModel) -> Gradients:
    return gradients_of(
        model, loss_of(model(tokens_of(16, 1), layout=SegmentLayout.packed([5, 1, 10], model.device))[0])
    )


def branching_row(model: LanguageModel) -> Gradients:
    layout = SegmentLayout.branching([6, 1], [4, 3, 2], [0, 0, 1], model.device)
    return gradients_of(model, loss_of(model(tokens_of(16, 1), layout=layout)[0]))


def a_carried_state(model: LanguageModel) -> Gradients:
    model.requires_grad_(False)
    state = carried_state(model)
    return gradients_of(model, loss_of(model(tokens_of(9), state)[0]), state)


def a_carried_state_and_its_successor(model: LanguageModel) -> Gradients:
    state = carried_state(model)
    train_only(model, lambda name: name.endswith(("ln1.weight", "time_decay", "time_maa_x", "w0", "x_v", "v0")))
    hidden, after = model(tokens_of(9), state, return_state=True)
    assert after is not None
    return gradients_of(model, loss_of(hidden, after), state)


def segments_that_go_on_and_one_that_begins(model: LanguageModel) -> Gradients:
    layout = SegmentLayout.packed([5, 1, 10]).carrying([0, 2], [1, 2]).to(model.device)
    state = carried_state(model)
    hidden, after = model(tokens_of(16, 1), state, layout, return_state=True)
    assert after is not None
    return gradients_of(model, loss_of(hidden, after), state)


def two_chained_chunks(model: LanguageModel) -> Gradients:
    first, second = tokens_of(13).split([8, 5], dim=1)
    _, carried = model(first, return_state=True)
    hidden, after = model(second, carried, return_state=True)
    return gradients_of(model, loss_of(hidden, after))


def chunks_with_trained_mixing(model: LanguageModel) -> Gradients:
    small = small_parts(model)
    train_only(model, lambda name: name in small or (".ln" in name and "ln0" not in name))
    return two_chained_chunks(model)


def another_choice_at_the_second_step(model: LanguageModel) -> Gradients:
    own_start(model)
    the_other_choice(model)
    return own_start(model)


def the_other_choice(model: LanguageModel) -> None:
    """Trains parts of the later layers, and changes parameters that are stacked where they are frozen."""
    small = small_parts(model)
    places = ("blocks.1.att.", "blocks.2.ffn.")
    train_only(model, lambda name: name.startswith("blocks.1.ln") or (name in small and name.startswith(places)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("time_maa_x", "time_maa_k", "x_w", "x_k")):
                parameter.mul_(1.25)


def time_and_norm_parameters(model: LanguageModel) -> Gradients:
    small = small_parts(model)
    train_only(model, lambda name: name in small or "ln" in name)
    return own_start(model)


def lora_on_every_matrix(model: LanguageModel) -> Gradients:
    adapt(model, "lora", model.shape.matrix_names())
    return own_start(model)


def bone_on_every_matrix(model: LanguageModel) -> Gradients:
    adapt(model, "bone", model.shape.matrix_names(), r=48)
    return packed_row(model)


def bat_on_every_matrix(model: LanguageModel) -> Gradients:
    adapt(model, "bat", model.shape.matrix_names(), r=32)  # which its kernels take
    return branching_row(model)


def adapters_on_some_matrices(model: LanguageModel) -> Gradients:
    matrices = model.shape.matrix_names()
    for kind, keys in (
        ("lora", ("blocks.0.att.key.weight", "blocks.1.ffn.value.weight")),
        ("bone", ("blocks.1.att.output.weight", "blocks.2.ffn.receptance.weight", "blocks.1.att.value.weight")),
        ("bat", ("blocks.2.ffn.key.weight", "blocks.2.att.gate.weight", "blocks.0.att.value.weight")),
    ):
        adapt(model, kind, [key for key in keys if key in matrices], r=32 if kind == "bat" else 16)
    return two_chained_chunks(model)


def an_adapter_on_the_values_that_are_handed_on(model: LanguageModel) -> Gradients:
    model.requires_grad_(False)
    adapt(model, "lora", ["blocks.0.att.value.weight"])
    return packed_row(model)


def adapters_time_and_norms_without_states(model: LanguageModel) -> Gradients:
    model.requires_grad_(False)
    adapt(model, "lora", ["blocks.1.att.receptance.weight", "blocks.1.ffn.key.weight"])
    for name, parameter in model.named_parameters():
        if "time_maa" in name or ".x_" in name or ".ln" in name:
            parameter.requires_grad_("ln0" not in name and "blocks.0" not in name)
    state = carried_state(model)
    hidden, after = model(tokens_of(9), state, return_state=True)
    assert after is not None
    return gradients_of(model, loss_of(hidden, after), state)


CASES = (
    own_start,
    packed_row,
    branching_row,
    a_carried_state,
    a_carried_state_and_its_successor,
    segments_that_go_on_and_one_that_begins,
    two_chained_chunks,
    chunks_with_trained_mixing,
    another_choice_at_the_second_step,
    time_and_norm_parameters,
    lora_on_every_matrix,
    bone_on_every_matrix,
    bat_on_every_matrix,
    adapters_on_some_matrices,
    an_adapter_on_the_values_that_are_handed_on,
    adapters_time_and_norms_without_states,
)
