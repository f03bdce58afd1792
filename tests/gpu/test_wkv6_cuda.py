"""The CUDA kernel of wkv6 against float64: the operator's acceptance list.

Relative RMS on the tensors as returned. Limits: y, dr, dk, dv 3.5e-3, dw_raw 4e-3, dstate 2.5e-3. They are those
of bf16 operands (2^-9 relative at most, 1.7e-3 RMS each, products of two) plus the rounding of bf16 results.
Float64 comes from the chunked form, which unit tests hold to the token loop within 1e-13; up to 65 tokens from the
loop itself.
"""

from collections.abc import Callable

import pytest
import torch
from operators import poisoned_memory
from torch import Tensor

from src.ops.wkv6 import wkv6, wkv6_branching
from src.ops.wkv6_cuda import wkv6_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

SIZE = 64
LIMITS = {
    "y": 3.5e-3,
    "dr": 3.5e-3,
    "dk": 3.5e-3,
    "dv": 3.5e-3,
    "dw_raw": 4e-3,
    "dstate": 2.5e-3,
    "final": 2.5e-3,
    "du": 2.5e-3,
}
TOKEN_NAMES = ("r", "k", "v", "w_raw")


def spikes(low: float, high: float) -> Callable[[Tensor, Tensor], Tensor]:
    def draw_spikes(normal: Tensor, uniform: Tensor) -> Tensor:
        return torch.where(uniform < 0.05, low + (high - low) * (normal.abs() % 1), normal - 4)

    return draw_spikes


def infinities(normal: Tensor, uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.2, torch.inf, torch.where(uniform < 0.4, -torch.inf, 1.5 * normal - 3))


W_RAW = {
    "N(-3, 1.5)": lambda normal, uniform: 1.5 * normal - 3,
    "N(-6, 1)": lambda normal, uniform: normal - 6,
    "U(-2, 4)": lambda normal, uniform: 6 * uniform - 2,
    "all 3": lambda normal, uniform: torch.full_like(normal, 3.0),
    "spikes 3..6": spikes(3, 6),
    "spikes 8..12": spikes(8, 12),
    "spikes 80..95": spikes(80, 95),
    "infinite": infinities,
}


def draw(
    batch: int,
    tokens: int,
    heads: int,
    *,
    w_raw: str = "N(-3, 1.5)",
    states: int | None = None,
    u_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    shape = (batch, tokens, heads, SIZE)
    inputs = {name: (0.5 * normal(*shape)).bfloat16() for name in ("r", "k", "v")}
    uniform = torch.rand(*shape, generator=generator, device="cuda")
    inputs["w_raw"] = W_RAW[w_raw](normal(*shape), uniform).bfloat16()
    inputs["u"] = (0.5 * normal(heads, SIZE)).to(u_dtype)
    inputs["state"] = 0.5 * normal(*(() if states is None else (states,)), heads, SIZE, SIZE)
    return inputs


BRANCHES = {
    "pairs": ([70, 33], [5, 64, 100, 1], [0, 0, 1, 1]),
    "segments": ([1500], [1000, 1024], [0, 0]),
    "uneven": ([1, 0, 200, 64], [17, 0, 40, 3], [2, 0, 2, 1]),
}


def branches_of(name: str) -> tuple[Tensor, Tensor, Tensor, int]:
    """Borders of roots and children, parents, and the roots' tokens."""
    roots, children, parents = BRANCHES[name]
    borders = [torch.tensor([0, *lengths], device="cuda").cumsum(0).int() for lengths in (roots, children)]
    return borders[0], borders[1], torch.tensor(parents, device="cuda"), sum(roots)


def run(
    inputs: dict[str, Tensor],
    backend: str,
    cu_seqlens: Tensor | None = None,
    *,
    final_gradient: bool = False,
    span_tokens: int = 0,
    wanted: tuple[str, ...] = (*TOKEN_NAMES, "u", "state"),
    branches: str | None = None,
) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    generator = torch.Generator("cuda").manual_seed(99)

    def call() -> dict[str, Tensor]:
        if branches is not None:
            y, final = wkv6_branching(*leaves.values(), *branches_of(branches))
        elif backend == "cuda":
            y, final = wkv6_cuda(*leaves.values(), cu_seqlens, span_tokens=span_tokens)
        else:
            y, final = wkv6(*leaves.values(), cu_seqlens, backend=backend)
        outputs = [y, final] if final_gradient else [y]
        cotangents = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16().to(x.dtype) for x in outputs]
        sources = [leaves[name] for name in wanted]
        gradients = torch.autograd.grad(outputs, sources, cotangents, materialize_grads=True)
        results = {"y": y.detach(), "final": final.detach()}
        return results | {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}

    if backend != "cuda":
        return call()
    with poisoned_memory():
        return call()


def exact(
    inputs: dict[str, Tensor],
    cu_seqlens: Tensor | None = None,
    *,
    final_gradient: bool = False,
    branches: str | None = None,
) -> dict[str, Tensor]:
    backend = "reference" if inputs["r"].shape[1] <= 65 else "chunked"
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    return run(doubles, backend, cu_seqlens, final_gradient=final_gradient, branches=branches)


def assert_accurate(results: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    errors = {}
    for name, value in results.items():
        difference = (value.double() - truth[name]).norm() / truth[name].norm().clamp(min=1e-300)
        errors[name] = float(difference)
    late = {name: error for name, error in errors.items() if not error <= LIMITS[name]}
    assert not late, f"{late} of {errors}"


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 512, 4096, 8192])
@pytest.mark.parametrize("final_gradient", [False, True], ids=["y", "y and final state"])
def test_lengths(tokens: int, final_gradient: bool) -> None:
    inputs = draw(1, tokens, 32)
    results = run(inputs, "cuda", final_gradient=final_gradient)
    assert_accurate(results, exact(inputs, final_gradient=final_gradient))


@pytest.mark.parametrize("w_raw", W_RAW)
@pytest.mark.parametrize("tokens", [200, 4096])
def test_decays(w_raw: str, tokens: int) -> None:
    inputs = draw(1, tokens, 32, w_raw=w_raw)
    results, truth = run(inputs, "cuda", final_gradient=True), exact(inputs, final_gradient=True)
    assert_accurate(results, truth)
    infinite = inputs["w_raw"].isinf()
    assert torch.count_nonzero(results["dw_raw"][infinite]) == 0


@pytest.mark.parametrize("heads", [32, 64, 128, 512])
@pytest.mark.parametrize("states", [None, 1], ids=["shared", "own"])
def test_heads(heads: int, states: int | None) -> None:
    inputs = draw(1, 129, heads, states=states)
    assert_accurate(run(inputs, "cuda"), exact(inputs))


@pytest.mark.parametrize("states", [None, 3], ids=["shared", "own"])
@pytest.mark.parametrize("u_dtype", [torch.float32, torch.bfloat16], ids=["u float", "u bf16"])
def test_batches(states: int | None, u_dtype: torch.dtype) -> None:
    inputs = draw(3, 333, 8, states=states, u_dtype=u_dtype)
    assert_accurate(run(inputs, "cuda", final_gradient=True), exact(inputs, final_gradient=True))


@pytest.mark.parametrize("lengths", [[0, 1, 15, 16, 17], [300, 0, 700, 24], [0, 0, 5], [17] * 20, [1500]])
@pytest.mark.parametrize("own_states", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("span_tokens", [0, 64], ids=["whole", "spans"])
def test_packed_sequences(lengths: list[int], own_states: bool, span_tokens: int) -> None:
    inputs = draw(1, sum(lengths), 4, states=len(lengths) if own_states else None)
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    truth = exact(inputs, cu_seqlens, final_gradient=True)
    results = run(inputs, "cuda", cu_seqlens.int(), final_gradient=True, span_tokens=span_tokens)
    assert_accurate(results, truth)


@pytest.mark.parametrize(
    "wanted", [(*TOKEN_NAMES, "u", "state"), TOKEN_NAMES, ("state",)], ids=["all", "rkvw", "state"]
)
@pytest.mark.parametrize("final_gradient", [False, True], ids=["y", "y and final state"])
@pytest.mark.parametrize("branches", BRANCHES)
def test_sequences_that_continue_others(branches: str, final_gradient: bool, wanted: tuple[str, ...]) -> None:
    roots, children, _ = BRANCHES[branches]
    inputs = draw(1, sum(roots) + sum(children), 4, states=len(roots) if branches == "uneven" else None)
    truth = exact(inputs, branches=branches, final_gradient=final_gradient)
    results = run(inputs, "cuda", branches=branches, final_gradient=final_gradient, wanted=wanted)
    assert_accurate(results, truth)
    with torch.no_grad():
        y, final = wkv6_branching(*inputs.values(), *branches_of(branches))
    assert torch.equal(y, results["y"])
    assert torch.equal(final, results["final"])


@pytest.mark.parametrize("span_tokens", [64, 128, 576, 1024])
def test_spans(span_tokens: int) -> None:
    inputs = draw(2, 1000, 4, states=2)
    truth = exact(inputs, final_gradient=True)
    assert_accurate(run(inputs, "cuda", final_gradient=True, span_tokens=span_tokens), truth)


@pytest.mark.parametrize("wanted", [*TOKEN_NAMES, "u", "state"])
def test_each_gradient_alone(wanted: str) -> None:
    inputs = draw(2, 200, 4)
    assert_accurate(run(inputs, "cuda", wanted=(wanted,)), exact(inputs))


@pytest.mark.parametrize("final_gradient", [False, True])
@pytest.mark.parametrize("states", [None, 2])
def test_state_gradient_alone_reads_neither_k_nor_v(final_gradient: bool, states: int | None) -> None:
    inputs = draw(2, 1100, 4, states=states)
    truth = exact(inputs, final_gradient=final_gradient)
    results = run(inputs, "cuda", final_gradient=final_gradient, wanted=("state",))
    assert_accurate(results, truth)


def test_decay_gradient_is_zero_where_nothing_is_decayed() -> None:
    inputs = draw(2, 77, 4)
    last = run(inputs, "cuda")["dw_raw"][:, -1]
    assert torch.count_nonzero(last) == 0
    assert torch.count_nonzero(run(draw(2, 1, 4), "cuda")["dw_raw"]) == 0


def test_transposed_state_is_noticed() -> None:
    inputs = draw(1, 40, 4)
    truth = exact(inputs)
    inputs["state"] = inputs["state"].mT.contiguous()
    with pytest.raises(AssertionError):
        assert_accurate(run(inputs, "cuda"), truth)


@pytest.mark.parametrize("batch", [1, 4])
def test_results_repeat_bit_for_bit(batch: int) -> None:
    inputs = draw(batch, 2048, 32)
    first = run(inputs, "cuda", final_gradient=True)
    for _ in range(3):
        again = run(inputs, "cuda", final_gradient=True)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


def test_without_gradients_nothing_is_saved() -> None:
    inputs = draw(1, 4096, 32)
    wkv6(*inputs.values())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, final = wkv6(*inputs.values())
    used = torch.cuda.max_memory_allocated() - before
    span_scratch = 16 * 32 * (SIZE * SIZE + SIZE) * 4
    assert used <= y.numel() * 2 + final.numel() * 4 + span_scratch + 2**20
    with_gradient = run(inputs, "cuda")["y"]
    assert torch.equal(with_gradient, y)


def test_other_stream_and_strided_inputs() -> None:
    inputs = draw(2, 130, 4)
    truth = exact(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        strided = [inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in TOKEN_NAMES]
        y, final = wkv6(*strided, inputs["u"], inputs["state"])
    stream.synchronize()
    assert_accurate({"y": y, "final": final}, truth)


def test_graph_capture_with_packed_sequences() -> None:
    inputs = draw(1, 700, 4)
    cu_seqlens = torch.tensor([0, 100, 100, 700], dtype=torch.int32, device="cuda")
    expected = wkv6(*inputs.values(), cu_seqlens)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = wkv6(*inputs.values(), cu_seqlens)[0]
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda t: t.float(), "k has dtype"),
        ("v", lambda t: t[:, :-1], "v has shape"),
        ("w_raw", lambda t: t.cpu(), "w_raw is on cpu"),
        ("u", lambda t: t[:, :32], "u has shape"),
        ("state", lambda t: t.bfloat16(), "state has dtype"),
    ],
)
def test_the_binding_names_a_bad_tensor(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = draw(1, 20, 4)
    inputs[name] = change(inputs[name])
    with pytest.raises(RuntimeError, match=message):
        wkv6_cuda(*inputs.values())


def test_float32_stays_float32() -> None:
    inputs = {name: tensor.float() for name, tensor in draw(1, 100, 4).items()}
    truth = exact(inputs)
    results = run(inputs, "chunked")
    automatic = wkv6(*inputs.values())[0]
    assert torch.equal(automatic, results["y"])
    for name, value in results.items():
        assert float((value.double() - truth[name]).norm() / truth[name].norm()) < 2e-5, name
