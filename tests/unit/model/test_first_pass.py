"""What a layer's second pass has from its first one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recompute_cases import adapt, model_of, tokens_of
from torch import Tensor

from src.adapters import low_rank
from src.model.first_pass import FirstPass
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute

LAYERS = 3


def test_results_are_known_in_the_second_pass_alone() -> None:
    passes = FirstPass()
    numbers = [passes.add(), passes.add()]
    values = [torch.randn(2), torch.randn(3)]

    def seen() -> list[Tensor | None]:
        return [passes.known(number) for number in numbers]

    passes.note(0, values[1])
    assert seen() == [None, None], "no pass runs"
    with passes.of([]) as results:
        for number in reversed(numbers):
            passes.note(number, values[number])
    assert all(ours is value for ours, value in zip(results, values, strict=True))
    assert seen() == [None, None]
    with passes.of(values):
        assert all(ours is value for ours, value in zip(seen(), values, strict=True))
    with pytest.raises(MemoryError), passes.of(values):
        raise MemoryError
    assert seen() == [None, None], "a pass that failed is over, too"


def adapted(mode: Recompute, kind: str, architecture: str, targets: Callable[[str], bool]) -> LanguageModel:
    model = model_of(mode, None, architecture=architecture)
    adapt(model, kind, [name for name in model.shape.matrix_names() if targets(name)])
    return model


def stepped(model: LanguageModel) -> dict[str, Tensor]:
    model(tokens_of(9))[0].square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["x060", "x070"])
@pytest.mark.parametrize("kind", ["lora", "bone"])
@pytest.mark.parametrize("chosen", ["", "ffn.value", "att", "att.key"])
def test_what_is_narrow_is_computed_once(
    kind: str, architecture: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the gradients are the same bits as if it were computed again."""
    asked = 0
    products = low_rank.products

    def counted(lefts: Any, *rest: Any) -> Any:
        nonlocal asked
        asked += len(lefts) if len(rest) == 2 else 0  # what is scaled: x with D, and a gradient with U
        return products(lefts, *rest)

    monkeypatch.setattr(low_rank, "products", counted)
    model = adapted(Recompute.ALL, kind, architecture, lambda name: chosen in name)
    found = stepped(model)
    adapters = sum(chosen in name for name in model.shape.matrix_names())
    assert asked == 2 * adapters, "one forward, one backward"
    again = adapted(Recompute.ALL, kind, architecture, lambda name: chosen in name)
    for block in again.blocks:
        block.first_pass.count = 0
    expected = stepped(again)
    assert asked == 5 * adapters
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pass_after_a_step_computes_anew() -> None:
    model = adapted(Recompute.ALL, "lora", "x060", lambda name: True)
    stepped(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
        after = model(tokens_of(9))[0]
        model.set_recomputation([Recompute.NOTHING] * LAYERS)
        assert torch.equal(after, model(tokens_of(9))[0])
