"""RWKV-7's recurrence joined with what stands around it, and small maps computed at once, against their parts.

On a GPU or emulated on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fused_operators import error, normal
from torch import Tensor

from src.ops import delta_rule_cuda, delta_rule_whole, products, small_maps
from src.ops.small_maps import Maps
from src.ops.wkv7_cuda import one_part, two_parts, wkv7_branching_cuda, wkv7_cuda

EPS = 64e-5
NAMES = delta_rule_whole.Inputs._fields
EXACT = ("w_raw", "gate", "bonus", "weight", "bias", "state")
"""Whose gradients no sum comes before that is rounded once here and twice in the parts."""
BOUND_OF_SUMS = 6e-3
"""A sum of two gradients in bf16 rounds both and itself, here one of them and itself: 2.0e-3 to 4.3e-3 (emulated)."""

CASES: dict[str, dict[str, Any]] = {
    "rows": {"batch": 2, "tokens": 41, "states": 2},
    "one state for all": {"batch": 2, "tokens": 33},
    "packed": {"tokens": 60, "roots": [20, 0, 40], "states": 3},
    "branching": {"tokens": 80, "roots": [17, 20], "children": [30, 13], "parents": [1, 0]},
    "the first layer": {"batch": 1, "tokens": 35, "pulled": False},
}
CHOICES: dict[str, tuple[str, ...]] = {
    "all": NAMES,
    "what a frozen layer passes on": ("r", "w_raw", "k", "rate", "v", "amount", "gate", "state"),
    "state": ("state",),
    "value": ("v",),
    "first": ("first",),
    "gate": ("gate",),
    "bonus": ("bonus",),
    "scales": ("key_scale", "rate_scale"),
    "decay": ("w_raw",),
    "key and norm": ("k", "weight", "bias"),
}


def tensors_of(
    device: str, *, batch: int = 1, tokens: int, states: int = 0, pulled: bool = True, **_: Any
) -> dict[str, Tensor | None]:
    heads, size = 2, 64
    channels = heads * size

    def own(*shape: int) -> Tensor:
        own.seed += 1  # type: ignore[attr-defined]
        return normal(*shape, seed=own.seed, device=device)  # type: ignore[attr-defined]

    own.seed = 0  # type: ignore[attr-defined]
    made: dict[str, Tensor | None] = {name: own(batch, tokens, channels) for name in NAMES[:8]}
    if not pulled:
        made["first"] = made["amount"] = None
    made |= {"key_scale": own(1, 1, channels).float(), "rate_scale": own(1, 1, channels).float()}
    made |= {"bonus": own(heads, size).float(), "weight": own(channels), "bias": own(channels).float()}
    made["state"] = own(*([states] if states else []), heads, size, size).float()
    return made


def _borders(lengths: Sequence[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def in_parts(case: dict[str, Any], device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same by nodes of their own."""
    roots, children = case.get("roots"), case.get("children")

    def run(
        r: Tensor, w_raw: Tensor, k: Tensor, rate: Tensor, v: Tensor, first: Any, amount: Any, gate: Tensor,
        key_scale: Tensor, rate_scale: Tensor, bonus: Tensor, weight: Tensor, bias: Tensor, state: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        heads = (*r.shape[:2], *bonus.shape)
        values = v if first is None else delta_rule_cuda.value_residual(v, first, amount)
        keys = delta_rule_cuda.removal_and_replacement(k.view(heads), rate.view(heads), key_scale, rate_scale)
        replacement, removal, written = keys
        tokens = (r.view(heads), w_raw.view(heads), replacement, values.view(heads), removal, written)
        if children is None:
            y, final = wkv7_cuda(*tokens, state, None if roots is None else _borders(roots, device))
        else:
            assert roots is not None
            branches = (torch.tensor(case["parents"], device=device), sum(roots))
            y, final = wkv7_branching_cuda(
                *tokens, state, _borders(roots, device), _borders(children, device), *branches
            )
        rows = (y, tokens[0], replacement, tokens[3], gate)
        return delta_rule_cuda.group_norm_bonus_gate(*rows, bonus, weight, bias, EPS), final

    return run


def joined(case: dict[str, Any], device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    roots, children, tokens = case.get("roots"), case.get("children"), case["tokens"]
    if children is None:
        pieces = one_part(tokens, None if roots is None else _borders(roots, device))
    else:
        assert roots is not None
        borders = _borders(roots, device), _borders(children, device)
        pieces = two_parts(tokens, *borders, torch.tensor(case["parents"], device=device), sum(roots))
    return lambda *tensors: delta_rule_whole.whole(delta_rule_whole.Inputs(*tensors), EPS, pieces)


def results_of(
    run: Callable[..., tuple[Tensor, Tensor]], case: dict[str, Any], wanted: Sequence[str], used: str, device: str
) -> dict[str, Tensor]:
    """Results, and gradients of what is wanted; `used`: of which results one arrives."""
    tensors = tensors_of(device, **case)
    asked = {name: tensor.requires_grad_() for name in wanted if (tensor := tensors[name]) is not None}
    gated, final = run(*tensors.values())
    found = {"gated": gated.detach(), "final": final.detach()}
    outputs = [output for name, output in (("gated", gated), ("final", final)) if name in used]
    outputs = [output for output in outputs if output.requires_grad]
    grads = [normal(*output.shape, seed=90 + i, device=device).to(output.dtype) for i, output in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(asked.values()), grads, allow_unused=True)
    return found | {name: grad for name, grad in zip(asked, gradients, strict=True) if grad is not None}


def check_whole(name: str, choice: str, used: str, device: str) -> None:
    """`used`: names of results, with a word between them."""
    case = CASES[name]
    wanted = [each for each in CHOICES[choice] if case.get("pulled", True) or each not in ("first", "amount")]
    ours = results_of(joined(case, device), case, wanted, used, device)
    parts = results_of(in_parts(case, device), case, wanted, used, device)
    for result, expected in parts.items():
        if result not in ours:
            assert not expected.any(), result
            continue
        found = ours[result]
        assert found.shape == expected.shape, result
        if result in ("gated", "final", *EXACT) or used == "final":
            assert torch.equal(found.to(expected.dtype), expected), result
        else:
            assert error(found, expected) < BOUND_OF_SUMS, result


def check_that_sums_are_rounded_once(device: str) -> None:
    """What `walk_back` adds to, against the sum in fp64 of what it adds and what is there."""
    from src.ops import wkv7_cuda as kernels

    case = CASES["branching"]
    heads = (1, case["tokens"], 2, 64)
    pieces = two_parts(
        heads[1], _borders(case["roots"], device), _borders(case["children"], device),
        torch.tensor(case["parents"], device=device), sum(case["roots"]),
    )  # fmt: skip
    r, w_raw, k, v, a, b, dy, *there = (normal(*heads, seed=seed, device=device) for seed in range(13))
    a, b = (torch.nn.functional.normalize(x.float(), dim=-1).bfloat16() for x in (a, b))
    tokens = (r, w_raw, k, v, a, b)
    _, _, kept = kernels.walk(pieces, tokens, torch.zeros(2, 64, 64, device=device), keeps=True)
    alone, added = [torch.empty_like(r) for _ in tokens], [x.clone() for x in there]
    for found, adds in ((alone, False), (added, True)):
        kernels.walk_back(pieces, tokens, kept, dy, None, found, shared=None, adds=adds)
    for number, (own, total, before) in enumerate(zip(alone, added, there, strict=True)):
        if number in (0, 2, 3):  # r, k and v
            assert error(total, own.double() + before.double()) < 3e-3
            assert not torch.equal(total, own)
        else:
            assert torch.equal(total, own)


def maps_of(count: int, channels: int, widths: Sequence[int], gate_width: int, device: str) -> tuple[Maps, list[Any]]:
    """Maps in their room, and (first, second, bias) of each by itself."""
    width = -(-(max(widths) + 1) // 8) * 8
    first = torch.zeros(count, channels, width, dtype=torch.bfloat16, device=device)
    second = torch.zeros(count, width, channels, dtype=torch.bfloat16, device=device)
    single: list[Any] = []
    for number, own in enumerate(widths[:count]):
        one = normal(channels, own, seed=number, device=device) / channels**0.5
        two, bias = normal(own, channels, seed=20 + number, device=device), normal(channels, seed=40, device=device)
        first[number, :, :own], second[number, :own], second[number, -1] = one, two, bias
        single.append((one.bfloat16(), two, bias))
    gate = (
        normal(channels, gate_width, seed=60, device=device) / channels**0.5,
        normal(gate_width, channels, seed=61, device=device),
    )
    return Maps(first, second, gate[0].bfloat16(), gate[1]), single


def check_small_maps(rows: int, count: int, gate_width: int, device: str, *, apart: bool = False) -> None:
    """`apart`: inputs and gradients lie anywhere."""
    channels, widths = 64, (24, 12, 6)
    maps, single = maps_of(count, channels, widths, gate_width, device)

    def placed(seed: int) -> list[Tensor]:
        values = normal(count, 2, rows, channels, seed=seed, device=device)
        return [part.clone() for part in values] if apart else list(values.unbind())

    gate_input, *grads = (normal(2, rows, channels, seed=seed, device=device) for seed in (3, 4))
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (gate_input, *placed(1))]
        if dtype is torch.bfloat16:
            if not apart:
                stack = torch.stack([x.detach() for x in inputs[1:]])
                inputs[1:] = [x.requires_grad_() for x in stack.unbind()]
            outputs = small_maps.small_maps(maps, inputs[0], inputs[1:])
        else:
            gate = torch.sigmoid(inputs[0] @ maps.gate_first.double()) @ maps.gate_second.double()
            made = []
            for number, (x, (one, two, bias)) in enumerate(zip(inputs[1:], single, strict=True)):
                hidden = x @ one.double()
                made.append((torch.tanh(hidden) if number == 0 else hidden) @ two.double() + bias.double())
            outputs = (gate, *made)
        gradients = [x.to(dtype) for x in (*grads, *placed(7))]
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, gradients)])
    for position, (ours, exact) in enumerate(zip(*results, strict=True)):
        assert ours.shape == exact.shape
        assert error(ours, exact) < 6e-3, f"result {position}"  # two products, each rounded: 2.9e-3 (emulated)
    assert products._goes_on([result.detach().flatten(0, -2) for result in results[0][1 : 1 + count]])


def check_that_maps_without_gradients_are_the_same(device: str) -> None:
    maps, _ = maps_of(3, 64, (24, 12, 6), 20, device)
    inputs = [normal(1, 9, 64, seed=seed, device=device) for seed in range(4)]
    plain = small_maps.small_maps(maps, inputs[0], inputs[1:])
    recorded = small_maps.small_maps(maps, inputs[0].requires_grad_(), inputs[1:])
    assert not any(result.requires_grad for result in plain)
    assert all(torch.equal(one, other) for one, other in zip(plain, recorded, strict=True))
