"""Every backend of wkv6 that runs on a CPU, against the float64 loop, name by name."""

import pytest
import torch
from operators import assert_close, median_seconds, relative_rms, run_with_gradients
from torch import Tensor

from src.errors import KernelError
from src.ops.wkv6 import wkv6, wkv6_branching
from src.ops.wkv6_chunked import SPAN_TOKENS, TILE_TOKENS, wkv6_chunked
from src.ops.wkv6_reference import wkv6_reference

BACKENDS = ("reference", "chunked")
INPUT_NAMES = ("r", "k", "v", "w_raw", "u", "state")


def draw_inputs(
    batch: int,
    tokens: int,
    heads: int,
    size: int,
    *,
    seed: int = 0,
    states: int | None = None,
    w_mean: float = -2.0,
) -> dict[str, Tensor]:
    """Random float64 inputs; the state is asymmetric, so that a transposed one is noticed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, tokens, heads, size)
    inputs = {
        "r": normal(*shape),
        "k": normal(*shape),
        "v": normal(*shape),
        "w_raw": normal(*shape) * 2 + w_mean,
    }
    inputs["u"] = normal(heads, size)
    inputs["state"] = normal(heads, size, size) if states is None else normal(states, heads, size, size)
    return inputs


def independent_loop(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula spelled out in scalars, for a single sequence: what the reference is checked with."""
    r, k, v, w_raw, u, state = (inputs[name] for name in INPUT_NAMES)
    _, tokens, heads, size = r.shape
    y, running = torch.zeros_like(r), state.clone()
    for t in range(tokens):
        for h in range(heads):
            for i in range(size):
                for j in range(size):
                    kv = k[0, t, h, j] * v[0, t, h, i]
                    y[0, t, h, i] += r[0, t, h, j] * (running[h, i, j] + u[h, j] * kv)
                    running[h, i, j] = torch.exp(-torch.exp(w_raw[0, t, h, j])) * running[h, i, j] + kv
    return y, running


@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_formula_in_scalars(backend: str) -> None:
    inputs = draw_inputs(1, 5, 2, 3)
    y, final = wkv6(*inputs.values(), backend=backend)
    expected_y, expected_final = independent_loop(inputs)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final[0], expected_final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("states", [None, 2], ids=["shared state", "state per sequence"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 100])
def test_chunked_matches_loop_in_float64(tokens: int, states: int | None) -> None:
    inputs = draw_inputs(2, tokens, 2, 8, states=states)
    assert_close(run_with_gradients(wkv6, inputs, "chunked"), run_with_gradients(wkv6, inputs, "reference"), 1e-13)


def test_chunked_matches_loop_over_several_spans() -> None:
    inputs = draw_inputs(1, 2 * SPAN_TOKENS + TILE_TOKENS + 3, 1, 4, w_mean=-6.0)
    assert_close(run_with_gradients(wkv6, inputs, "chunked"), run_with_gradients(wkv6, inputs, "reference"), 1e-12)


@pytest.mark.parametrize("lengths", [[5], [17, 0, 1, 16, 40], [0, 0, 3], [1, 1, 1], [33, 0]])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_chunked_matches_loop_on_packed_sequences(lengths: list[int], per_sequence: bool) -> None:
    inputs = draw_inputs(1, sum(lengths), 2, 8, states=len(lengths) if per_sequence else None)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    results = run_with_gradients(wkv6, inputs, "chunked", cu_seqlens)
    assert_close(results, run_with_gradients(wkv6, inputs, "reference", cu_seqlens), 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_separate_calls(backend: str) -> None:
    lengths = [17, 0, 4]
    inputs = draw_inputs(1, sum(lengths), 2, 8, states=3)
    y, final = wkv6(*inputs.values(), torch.tensor([0, 17, 17, 21], dtype=torch.int32), backend=backend)
    torch.testing.assert_close(final[1], inputs["state"][1], rtol=0, atol=0)
    for sequence, rows in ((0, slice(0, 17)), (2, slice(17, 21))):
        part = [inputs[name][:, rows] for name in ("r", "k", "v", "w_raw")]
        own_y, own_final = wkv6(*part, inputs["u"], inputs["state"][sequence : sequence + 1], backend=backend)
        torch.testing.assert_close(y[:, rows], own_y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(final[sequence], own_final[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_carries_a_sequence_cut_in_two(backend: str) -> None:
    inputs = draw_inputs(2, 40, 2, 8)
    whole_y, whole_final = wkv6(*inputs.values(), backend=backend)
    first = [inputs[name][:, :23] for name in ("r", "k", "v", "w_raw")]
    second = [inputs[name][:, 23:] for name in ("r", "k", "v", "w_raw")]
    first_y, carried = wkv6(*first, inputs["u"], inputs["state"], backend=backend)
    second_y, final = wkv6(*second, inputs["u"], carried, backend=backend)
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
    borders = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (roots, children)]
    y, final = wkv6_branching(*inputs.values(), *borders, torch.tensor(parents, dtype=torch.int64), sum(roots))
    tokens = [inputs[name].split([*roots, *children], dim=1) for name in ("r", "k", "v", "w_raw")]
    segments = y.split([*roots, *children], dim=1)
    for root, length in enumerate(roots):
        start = inputs["state"][root] if own_states else inputs["state"]
        if length:
            alone, end = wkv6(*(part[root] for part in tokens), inputs["u"], start)
            torch.testing.assert_close(segments[root], alone)
            torch.testing.assert_close(final[root], end[0])
        else:
            assert torch.equal(final[root], start)
    for child, parent in enumerate(parents):
        if children[child]:
            start = inputs["state"][parent] if own_states else inputs["state"]
            whole = [torch.cat((part[parent], part[len(roots) + child]), dim=1) for part in tokens]
            expected = wkv6(*whole, inputs["u"], start)[0][:, roots[parent] :]
            torch.testing.assert_close(segments[len(roots) + child], expected)


SPIKES = {"3..6": (3.0, 6.0), "8..12": (8.0, 12.0), "80..95": (80.0, 95.0)}


@pytest.mark.parametrize("spike", SPIKES)
def test_float32_is_right_for_strong_decays(spike: str) -> None:
    inputs = draw_inputs(1, 70, 2, 16, w_mean=-4.0)
    low, high = SPIKES[spike]
    hit = torch.rand(inputs["w_raw"].shape, generator=torch.Generator().manual_seed(3)) < 0.05
    inputs["w_raw"][hit] = torch.linspace(low, high, int(hit.sum()), dtype=torch.float64)
    single = {name: tensor.float() for name, tensor in inputs.items()}
    truth = run_with_gradients(wkv6, {name: tensor.double() for name, tensor in single.items()}, "reference")
    assert_close(run_with_gradients(wkv6, single, "chunked"), truth, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_decays_are_exact(backend: str) -> None:
    inputs = draw_inputs(1, 40, 2, 8)
    choice = torch.randint(0, 3, inputs["w_raw"].shape, generator=torch.Generator().manual_seed(4))
    inputs["w_raw"] = torch.where(choice == 0, torch.inf, torch.where(choice == 1, -torch.inf, inputs["w_raw"]))
    results = run_with_gradients(wkv6, inputs, backend)
    assert all(bool(tensor.isfinite().all()) for tensor in results.values())
    assert_close(results, run_with_gradients(wkv6, inputs, "reference"), 1e-13)
    assert torch.count_nonzero(results["dw_raw"][choice < 2]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_gradient_is_zero_where_nothing_is_decayed(backend: str) -> None:
    inputs = draw_inputs(2, 20, 2, 8)
    results = run_with_gradients(wkv6, inputs, backend, final_gradient=False)
    assert torch.count_nonzero(results["dw_raw"][:, -1]) == 0
    assert torch.count_nonzero(results["dw_raw"][:, 0]) > 0
    alone = draw_inputs(1, 1, 2, 8)
    assert torch.count_nonzero(run_with_gradients(wkv6, alone, backend, final_gradient=False)["dw_raw"]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", INPUT_NAMES)
def test_each_gradient_alone(backend: str, wanted: str) -> None:
    inputs = draw_inputs(2, 19, 2, 8)
    expected = run_with_gradients(wkv6, inputs, "reference", final_gradient=False)[f"d{wanted}"]
    leaves = {name: tensor.clone().requires_grad_(name == wanted) for name, tensor in inputs.items()}
    y, _ = wkv6(*leaves.values(), backend=backend)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()).sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name == wanted)
    gradient = leaves[wanted].grad
    assert gradient is not None
    assert relative_rms(gradient, expected) < 1e-13


def test_gradcheck_of_chunked() -> None:
    leaves = [tensor.requires_grad_() for tensor in draw_inputs(1, 5, 1, 3).values()]
    assert torch.autograd.gradcheck(lambda *tensors: wkv6(*tensors, backend="chunked"), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_tokens_keep_float32_state(dtype: torch.dtype) -> None:
    inputs = draw_inputs(1, 33, 2, 8, w_mean=-3.0)
    tokens = {name: inputs[name].to(dtype) for name in ("r", "k", "v", "w_raw")}
    low = {**tokens, "u": inputs["u"].float(), "state": inputs["state"].float()}
    results = run_with_gradients(wkv6, low, "chunked")
    assert results["y"].dtype == dtype
    assert results["dr"].dtype == dtype
    assert results["final state"].dtype == torch.float32
    assert results["dstate"].dtype == torch.float32
    truth = run_with_gradients(wkv6, {name: tensor.double() for name, tensor in low.items()}, "reference")
    # Rounding of the result alone: 2^-9 relative for bfloat16, at most; sums are float32.
    assert_close(results, truth, max(torch.finfo(dtype).eps, 1e-6))
    assert relative_rms(results["dstate"], truth["dstate"]) < 1e-5


def test_inputs_need_not_be_contiguous() -> None:
    inputs = draw_inputs(2, 32, 2, 8)
    expected = wkv6(*inputs.values(), backend="chunked")[0]
    strided = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in inputs.items() if t.dim() == 4}
    y, _ = wkv6(*strided.values(), inputs["u"], inputs["state"], backend="chunked")
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_automatic_choice_on_cpu_is_chunked() -> None:
    inputs = draw_inputs(1, 18, 1, 4)
    torch.testing.assert_close(wkv6(*inputs.values())[0], wkv6(*inputs.values(), backend="chunked")[0], rtol=0, atol=0)


@pytest.mark.slow
def test_chunked_is_five_times_faster_than_the_loop() -> None:
    inputs = {name: tensor.float().requires_grad_() for name, tensor in draw_inputs(1, 512, 8, 64).items()}

    def step(backend: str) -> None:
        y, _ = wkv6(*inputs.values(), backend=backend)
        y.sum().backward()

    ratios = []
    while not ratios or (ratios[-1] < 5 and len(ratios) < 4):  # a busy machine may spoil one measurement
        ratios.append(median_seconds(lambda: step("reference"), 3) / median_seconds(lambda: step("chunked"), 5))
    assert ratios[-1] >= 5, ratios


def _bad_arguments() -> dict[str, tuple[dict[str, object], str]]:
    good = draw_inputs(2, 4, 2, 8)
    return {
        "empty r": ({"r": good["r"][:, :0]}, r"^r has shape"),
        "integer r": ({"r": good["r"].long()}, r"^r is torch.int64"),
        "short k": ({"k": good["k"][:, :3]}, r"^k has shape"),
        "float32 v": ({"v": good["v"].float()}, r"^v is torch.float32"),
        "w_raw of other heads": ({"w_raw": good["w_raw"][:, :, :1]}, r"^w_raw has shape"),
        "flat u": ({"u": good["u"].reshape(-1)}, r"^u has shape"),
        "integer u": ({"u": good["u"].long()}, r"^u is torch.int64"),
        "state of other batch": ({"state": good["state"].expand(3, -1, -1, -1)}, r"^state has shape"),
        "bfloat16 state": ({"state": good["state"].bfloat16()}, r"^state is torch.bfloat16"),
        "state elsewhere": ({"state": good["state"].to("meta")}, r"^state is on meta"),
        "cu_seqlens with a batch": ({"cu_seqlens": torch.tensor([0, 4])}, r"^r has batch size 2"),
    }


@pytest.mark.parametrize("case", _bad_arguments())
def test_bad_arguments_are_named(case: str) -> None:
    changes, message = _bad_arguments()[case]
    with pytest.raises(ValueError, match=message):
        wkv6(**{**draw_inputs(2, 4, 2, 8), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "borders",
    [[0, 3], [1, 4], [0, 3, 2, 4], [0.0, 4.0], [0]],
    ids=["short", "late", "falling", "float", "single"],
)
def test_bad_borders_are_named(borders: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^cu_seqlens"):
        wkv6(*draw_inputs(1, 4, 2, 8).values(), torch.tensor(borders))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'fast'"):
        wkv6(*draw_inputs(1, 4, 2, 8).values(), backend="fast")


def test_cuda_backend_on_cpu_says_what_to_use() -> None:
    with pytest.raises(KernelError, match="chunked"):
        wkv6(*draw_inputs(1, 4, 2, 64).values(), backend="cuda")


def test_reference_and_chunked_take_the_same_arguments() -> None:
    inputs = draw_inputs(1, 9, 2, 4, states=2)
    a, b = wkv6_reference(*inputs.values(), [4, 5]), wkv6_chunked(*inputs.values(), [4, 5])
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
