"""Every backend of wkv7 that runs on a CPU, against the float64 loop, name by name."""

import math
from pathlib import Path

import pytest
import torch
from operators import assert_close, cotangent, median_seconds, poisoned_memory, relative_rms, run_with_gradients
from torch import Tensor
from wkv7_inputs import INPUT_NAMES, KINDS, TOKEN_NAMES, draw_inputs, in_float32, trained_inputs

from src.errors import KernelError
from src.ops import wkv7_cuda as kernels
from src.ops.sequences import check_branches
from src.ops.wkv7 import wkv7, wkv7_branching
from src.ops.wkv7_chunked import SPAN_TOKENS, TILE_TOKENS, wkv7_chunked
from src.ops.wkv7_reference import wkv7_reference

BACKENDS = ("reference", "chunked")


def part_of(inputs: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: inputs[name][:, rows] for name in TOKEN_NAMES}


def independent_loop(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula spelled out in scalars, for a single sequence: what the reference is checked with."""
    r, w_raw, k, v, a, b, state = (inputs[name] for name in INPUT_NAMES)
    _, tokens, heads, size = r.shape
    y, running = torch.zeros_like(r), state.clone()
    for t in range(tokens):
        for h in range(heads):
            before = running[h].clone()
            for i in range(size):
                for j in range(size):
                    decay = math.exp(-math.exp(-0.5) / (1 + math.exp(-w_raw[0, t, h, j])))
                    answer = sum(before[i, m] * a[0, t, h, m] for m in range(size))
                    running[h, i, j] = decay * before[i, j] + answer * b[0, t, h, j] + v[0, t, h, i] * k[0, t, h, j]
                y[0, t, h, i] = sum(running[h, i, j] * r[0, t, h, j] for j in range(size))
    return y, running


@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_formula_in_scalars(backend: str) -> None:
    inputs = draw_inputs(1, 5, 2, 3)
    y, final = wkv7(**inputs, backend=backend)
    expected_y, expected_final = independent_loop(inputs)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final[0], expected_final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("states", [None, 2], ids=["shared state", "state per sequence"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 60, 64])
def test_chunked_matches_loop_in_float64(tokens: int, states: int | None) -> None:
    inputs = draw_inputs(2, tokens, 2, 8, states=states)
    assert_close(run_with_gradients(wkv7, inputs, "chunked"), run_with_gradients(wkv7, inputs, "reference"), 1e-13)


LENGTHS_AND_KINDS = (
    *((tokens, kind) for tokens in (1, 15, 16, 17, 60, 500) for kind in KINDS),
    *(pytest.param(4096, kind, marks=pytest.mark.slow) for kind in ("usual", "repeated delta rule")),
)


@pytest.mark.parametrize(("tokens", "kind"), LENGTHS_AND_KINDS)
def test_float32_is_right_at_head_size_64(tokens: int, kind: str) -> None:
    single, double = in_float32(draw_inputs(1, tokens, 1, 64, kind=kind))
    truth = run_with_gradients(wkv7, double, "reference")
    assert all(bool(tensor.any()) for tensor in truth.values())
    # Measured 5e-7 at most; where nothing is ever forgotten no error is either, 8e-7 at 500 tokens, 4e-6 at 4096.
    assert_close(run_with_gradients(wkv7, single, "chunked"), truth, 1e-5 if kind == "repeated delta rule" else 1e-6)


def test_slow_decays_keep_their_digits_in_float32() -> None:
    inputs = draw_inputs(1, 500, 1, 8)
    inputs["w_raw"] = torch.full_like(inputs["w_raw"], -9.0)  # decay 0.99993
    inputs["b"] *= 0.01  # else a memory of 8 keys forgets by being overwritten
    single, double = in_float32(inputs)
    truth = run_with_gradients(wkv7, double, "reference")
    # Measured 6e-7; a running product of decays rounded near 1 gives 6e-6.
    assert_close(run_with_gradients(wkv7, single, "chunked"), truth, 1e-6)


def test_chunked_matches_loop_over_several_spans() -> None:
    inputs = draw_inputs(1, 2 * SPAN_TOKENS + TILE_TOKENS + 3, 1, 4)
    assert_close(run_with_gradients(wkv7, inputs, "chunked"), run_with_gradients(wkv7, inputs, "reference"), 1e-12)


def test_infinite_decays_are_exact() -> None:
    inputs = draw_inputs(1, 40, 2, 8)
    choice = torch.randint(0, 3, inputs["w_raw"].shape, generator=torch.Generator().manual_seed(4))
    inputs["w_raw"] = torch.where(choice == 0, torch.inf, torch.where(choice == 1, -torch.inf, inputs["w_raw"]))
    truth = run_with_gradients(wkv7, inputs, "reference")
    results = run_with_gradients(wkv7, inputs, "chunked")
    assert all(bool(tensor.isfinite().all()) for tensor in results.values())
    assert_close(results, truth, 1e-13)
    for gradients in (results, truth):
        assert torch.count_nonzero(gradients["dw_raw"][choice < 2]) == 0


@pytest.mark.parametrize("lengths", [[5], [17, 0, 1, 16, 70], [0, 0, 3], [1, 1, 1], [33, 0]])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_chunked_matches_loop_on_packed_sequences(lengths: list[int], per_sequence: bool) -> None:
    inputs = draw_inputs(1, sum(lengths), 2, 8, states=len(lengths) if per_sequence else None)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    results = run_with_gradients(wkv7, inputs, "chunked", cu_seqlens)
    assert_close(results, run_with_gradients(wkv7, inputs, "reference", cu_seqlens), 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_separate_calls(backend: str) -> None:
    inputs = draw_inputs(1, 21, 2, 8, states=3)
    y, final = wkv7(**inputs, cu_seqlens=torch.tensor([0, 17, 17, 21], dtype=torch.int32), backend=backend)
    torch.testing.assert_close(final[1], inputs["state"][1], rtol=0, atol=0)
    for sequence, rows in ((0, slice(0, 17)), (2, slice(17, 21))):
        start = inputs["state"][sequence : sequence + 1]
        own_y, own_final = wkv7(**part_of(inputs, rows), state=start, backend=backend)
        torch.testing.assert_close(y[:, rows], own_y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(final[sequence], own_final[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_carries_a_sequence_cut_in_two(backend: str) -> None:
    inputs = draw_inputs(2, 40, 2, 8)
    whole_y, whole_final = wkv7(**inputs, backend=backend)
    first_y, carried = wkv7(**part_of(inputs, slice(0, 23)), state=inputs["state"], backend=backend)
    second_y, final = wkv7(**part_of(inputs, slice(23, 40)), state=carried, backend=backend)
    torch.testing.assert_close(torch.cat((first_y, second_y), 1), whole_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, whole_final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("own_states", [False, True])
@pytest.mark.parametrize(
    ("roots", "children", "parents"),
    [([7, 4], [3, 5, 2], [0, 0, 1]), ([6], [2, 0], [0, 0]), ([5, 0], [3, 4], [1, 0]), ([9], [], []), ([0], [4], [0])],
)
def test_branches_equal_whole_sequences(
    roots: list[int], children: list[int], parents: list[int], own_states: bool
) -> None:
    inputs = draw_inputs(1, sum(roots) + sum(children), 2, 8, states=len(roots) if own_states else None)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    borders = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (roots, children)]
    y, final = wkv7_branching(*leaves.values(), *borders, torch.tensor(parents, dtype=torch.int64), sum(roots))
    ((y * cotangent(y.shape)).sum() + (final * cotangent(final.shape)).sum()).backward()

    alone = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    segments = {name: alone[name].split([*roots, *children], dim=1) for name in TOKEN_NAMES}
    loss = torch.zeros((), dtype=torch.float64)
    weights = cotangent(y.shape).split([*roots, *children], dim=1)
    for root, length in enumerate(roots):
        start = alone["state"][root] if own_states else alone["state"]
        end = start[None]
        if length:
            own, end = wkv7_reference(*(segments[name][root] for name in TOKEN_NAMES), start[None])
            torch.testing.assert_close(y.split([*roots, *children], dim=1)[root], own)
            loss = loss + (own * weights[root]).sum()
        torch.testing.assert_close(final[root], end[0])
        loss = loss + (end[0] * cotangent(final.shape)[root]).sum()
    for child, parent in enumerate(parents):
        segment = len(roots) + child
        start = alone["state"][parent] if own_states else alone["state"]
        whole = [torch.cat((segments[name][parent], segments[name][segment]), dim=1) for name in TOKEN_NAMES]
        if children[child]:
            own = wkv7_reference(*whole, start[None])[0][:, roots[parent] :]
            torch.testing.assert_close(y.split([*roots, *children], dim=1)[segment], own)
            loss = loss + (own * weights[segment]).sum()
    loss.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, alone[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [*((name,) for name in INPUT_NAMES), ("w_raw", "state"), TOKEN_NAMES])
def test_gradients_that_are_asked_for_alone(backend: str, wanted: tuple[str, ...]) -> None:
    inputs = draw_inputs(2, 40, 2, 8)
    truth = run_with_gradients(wkv7, inputs, "reference")
    leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    y, final = wkv7(**leaves, backend=backend)
    ((y * cotangent(y.shape)).sum() + (final * cotangent(final.shape, 2)).sum()).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if leaf.grad is not None:
            assert relative_rms(leaf.grad, truth[f"d{name}"]) < 1e-13, name


def saved_bytes(wanted: tuple[str, ...]) -> int:
    """What the forward of the chunked form keeps for the backward, in bytes."""
    leaves = {name: tensor.requires_grad_(name in wanted) for name, tensor in draw_inputs(1, 64, 2, 8).items()}
    y, _ = wkv7(**leaves, backend="chunked")
    return sum(t.numel() * t.element_size() for t in y.grad_fn.saved_tensors)  # type: ignore[union-attr]


def test_state_gradient_alone_keeps_and_reads_neither_k_nor_v() -> None:
    token_bytes = 64 * 2 * 8 * 8
    assert saved_bytes(("state",)) == 4 * token_bytes
    assert saved_bytes(INPUT_NAMES) == 6 * token_bytes + 2 * 8 * 8 * 8  # and the state of the only span


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_of_the_results_need_be_used(backend: str) -> None:
    inputs = draw_inputs(1, 20, 2, 8)
    for result in (0, 1):
        found = []
        for run in (backend, "reference"):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
            used = wkv7(*leaves, backend=run)[result]
            found.append(torch.autograd.grad((used * cotangent(used.shape)).sum(), leaves, materialize_grads=True))
        for name, own, expected in zip(INPUT_NAMES, *found, strict=True):
            assert relative_rms(own, expected) < 1e-13 or not expected.any(), name
            assert bool(own.any()) == bool(expected.any()), name


def test_gradcheck_of_chunked() -> None:
    leaves = [tensor.requires_grad_() for tensor in draw_inputs(1, 5, 1, 3).values()]
    assert torch.autograd.gradcheck(lambda *tensors: wkv7(*tensors, backend="chunked"), leaves)


@pytest.mark.parametrize("lengths", [None, [17, 0, 1, 60]])
def test_nothing_is_read_beside_the_inputs_or_left_unwritten(lengths: list[int] | None) -> None:
    inputs = draw_inputs(1, 78, 2, 8)
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    expected = run_with_gradients(wkv7, inputs, "chunked", cu_seqlens)
    inside = {}
    for name in TOKEN_NAMES:
        around = torch.full((3, 90, 2, 24), torch.nan, dtype=torch.float64)
        inside[name] = around[1:2, 5:83, :, 8:16]
        inside[name].copy_(inputs[name])
    around = torch.full((4, 8, 24), torch.nan, dtype=torch.float64)
    inside["state"] = around[1:3, :, 8:16].copy_(inputs["state"])
    with poisoned_memory():
        leaves = {name: tensor.requires_grad_() for name, tensor in inside.items()}
        y, final = wkv7(**leaves, cu_seqlens=cu_seqlens, backend="chunked")
        loss = (y * cotangent(y.shape)).sum() + (final * cotangent(final.shape, 2)).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {"y": y, "final state": final, **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}
    for name, tensor in expected.items():
        assert torch.equal(results[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_tokens_keep_float32_state(dtype: torch.dtype) -> None:
    inputs = draw_inputs(1, 70, 2, 8)
    low = {name: inputs[name].to(dtype) for name in TOKEN_NAMES} | {"state": inputs["state"].float()}
    results = run_with_gradients(wkv7, low, "chunked")
    assert results["y"].dtype == dtype
    assert all(results[f"d{name}"].dtype == dtype for name in TOKEN_NAMES)
    assert results["final state"].dtype == torch.float32
    assert results["dstate"].dtype == torch.float32
    truth = run_with_gradients(wkv7, {name: tensor.double() for name, tensor in low.items()}, "reference")
    # Rounding of the result alone: 2^-9 relative for bfloat16, at most; sums are float32.
    assert_close(results, truth, max(torch.finfo(dtype).eps, 1e-6))
    assert relative_rms(results["dstate"], truth["dstate"]) < 1e-6


def test_results_are_the_same_bits_in_every_run() -> None:
    inputs, _ = in_float32(draw_inputs(1, 300, 2, 16, states=3))
    borders = torch.tensor([0, 100, 120, 300])
    first, second = (run_with_gradients(wkv7, inputs, "chunked", borders) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_automatic_choice_on_cpu_is_chunked_from_two_tokens_on() -> None:
    inputs, _ = in_float32(draw_inputs(1, 18, 1, 4))
    assert torch.equal(wkv7(**inputs)[0], wkv7(**inputs, backend="chunked")[0])
    single = {**part_of(inputs, slice(0, 1)), "state": inputs["state"]}
    assert torch.equal(wkv7(**single)[0], wkv7(**single, backend="reference")[0])


def test_chunked_is_five_times_faster_than_the_loop() -> None:
    inputs = {name: tensor.float().requires_grad_() for name, tensor in draw_inputs(1, 256, 4, 32).items()}

    def step(backend: str) -> None:
        y, _ = wkv7(**inputs, backend=backend)
        y.sum().backward()

    ratios: list[float] = []
    while not ratios or (ratios[-1] < 5 and len(ratios) < 4):  # a busy machine may spoil one measurement
        ratios.append(median_seconds(lambda: step("reference"), 1) / median_seconds(lambda: step("chunked"), 5))
    assert ratios[-1] >= 5, ratios


@pytest.mark.parametrize("size", [16, 64])
def test_activations_of_a_trained_model(size: int, real_inputs: Path) -> None:
    for inputs in trained_inputs(real_inputs, size):
        truth = run_with_gradients(wkv7, inputs, "reference")
        assert_close(run_with_gradients(wkv7, inputs, "chunked"), truth, 1e-12)
        single, double = in_float32(inputs)
        truth = run_with_gradients(wkv7, double, "reference")
        # Measured 1.3e-6 for w_raw, 5e-7 for the others; the loop itself in float32 has 1.2e-6.
        assert_close(run_with_gradients(wkv7, single, "chunked"), truth, 2e-6)


def _bad_arguments() -> dict[str, tuple[dict[str, object], str]]:
    good = draw_inputs(2, 4, 2, 8)
    return {
        "empty r": ({"r": good["r"][:, :0]}, r"^r has shape"),
        "integer r": ({"r": good["r"].long()}, r"^r is torch.int64"),
        "short k": ({"k": good["k"][:, :3]}, r"^k has shape"),
        "float32 v": ({"v": good["v"].float()}, r"^v is torch.float32"),
        "w_raw of other heads": ({"w_raw": good["w_raw"][:, :, :1]}, r"^w_raw has shape"),
        "flat a": ({"a": good["a"].flatten(2)}, r"^a has shape"),
        "b elsewhere": ({"b": good["b"].to("meta")}, r"^b is on meta"),
        "state of other batch": ({"state": good["state"].expand(3, -1, -1, -1)}, r"^state has shape"),
        "bfloat16 state": ({"state": good["state"].bfloat16()}, r"^state is torch.bfloat16"),
        "cu_seqlens with a batch": ({"cu_seqlens": torch.tensor([0, 4])}, r"^r has batch size 2"),
    }


@pytest.mark.parametrize("case", _bad_arguments())
def test_bad_arguments_are_named(case: str) -> None:
    changes, message = _bad_arguments()[case]
    with pytest.raises(ValueError, match=message):
        wkv7(**{**draw_inputs(2, 4, 2, 8), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "borders",
    [[0, 3], [1, 4], [0, 3, 2, 4], [0.0, 4.0], [0]],
    ids=["short", "late", "falling", "float", "single"],
)
def test_bad_borders_are_named(borders: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^cu_seqlens"):
        wkv7(**draw_inputs(1, 4, 2, 8), cu_seqlens=torch.tensor(borders))


def test_the_kernels_are_refused_where_they_cannot_run() -> None:
    with pytest.raises(KernelError, match=r"takes bfloat16 on a GPU at head size 64, got torch\.float64 on cpu"):
        wkv7(**draw_inputs(1, 4, 2, 8), backend="cuda")


@pytest.mark.parametrize(
    "parents", [torch.tensor([0, 1]), torch.tensor([0], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64)]
)
def test_parents_that_do_not_fit_are_named(parents: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^parents is torch\.int.*expected int64 \[1\] on cpu"):
        check_branches(torch.tensor([0, 5]), parents)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast'"):
        wkv7(**draw_inputs(1, 4, 2, 8), backend="fast")


def test_reference_and_chunked_take_the_same_arguments() -> None:
    inputs = draw_inputs(1, 9, 2, 4, states=2)
    a, b = wkv7_reference(*inputs.values(), [4, 5]), wkv7_chunked(*inputs.values(), [4, 5])
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("card", "heads", "form"),
    [
        ((132, 227), 32, kernels.HALVES), ((132, 227), 66, kernels.HALVES), ((132, 227), 67, kernels.WIDE),
        ((132, 227), 512, kernels.WIDE), ((108, 163), 32, kernels.SMALL), ((128, 99), 64, kernels.SMALL),
    ],
    ids=["H100, 32 heads", "66", "67", "512", "A100", "RTX 4090"],
)  # fmt: skip
def test_the_form_of_the_scans_follows_the_card(
    card: tuple[int, int], heads: int, form: kernels.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_limits", lambda device: (card[0], card[1] * 1024))
    device = torch.device("cuda")
    assert kernels._form_for(heads, device) is form
    assert {form.forward, form.backward, kernels.GRADIENTS} <= set(kernels.kernels_for(device))
