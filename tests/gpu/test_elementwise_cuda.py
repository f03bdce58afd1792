"""The fused element-wise kernels against their torch definitions in fp64."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fused_operators import BOUND_OF_FEW, BOUND_OF_SUMS, check_against, error, fresh_leaves, normal, wider
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.ops import elementwise
from src.ops.elementwise import (
    add_norm,
    group_norm_silu_gate,
    modulated_shift_mixes,
    shift_mixes,
    sigmoid_gated_residual,
    sigmoid_gated_residual_gradients,
    squared_relu,
    squared_relu_and_gradient,
    squared_relu_gradient,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

EPS = 64e-5


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Fills every new tensor with NaN, in C++ too: a kernel that forgets an element fails loudly."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fallback to torch would make these tests compare torch with itself."""
    assert elementwise.fused_kernels() is not None
    for name in DEFINITIONS:
        monkeypatch.setattr(elementwise, f"{name}_torch", None, raising=False)


DEFINITIONS = {
    name: getattr(elementwise, f"{name}_torch")
    for name in (
        "add_norm",
        "shift_mixes",
        "group_norm_silu_gate",
        "squared_relu",
        "squared_relu_gradient",
        "sigmoid_gated_residual",
        "sigmoid_gated_residual_gradients",
    )
}


def check_against_definition(name: str, fused: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """See `check_against`."""
    check_against(DEFINITIONS[name], fused, *arguments, **options)


SHAPES = [(1, 1, 8), (1, 15, 64), (2, 60, 320), (3, 7, 2048), (1, 500, 2560)]


@pytest.mark.parametrize("with_carry", [False, True])
@pytest.mark.parametrize("with_modulation", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 5, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_shift_mixes(shape: tuple[int, int, int], groups: int, with_modulation: bool, with_carry: bool) -> None:
    batch, _, channels = shape
    z, maa = normal(*shape), normal(groups, channels, seed=1)
    modulation = normal(groups, *shape, seed=2) if with_modulation else None
    carry = normal(batch, channels, seed=3) if with_carry else None
    wanted = [0] + [1] * with_carry + [3] * with_modulation
    check_against_definition("shift_mixes", shift_mixes, [z, carry, maa, modulation], wanted, None)


LAYOUTS = {
    "packed": [-1, 0, 1, 2, -1, 4, -1, 6, 7, 8, 9],
    "branching": [-1, 0, 1, 2, 3, -1, 5, 6, 4, 8, 9, 10, 7, 12, 4, 14, 15, 7],
    "one parent, six children": [-1, 0, 0, 0, 0, 0, 0],
    "singles": [-1, -1, -1, -1, -1],
}


@pytest.mark.parametrize("with_modulation", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 5, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shift_mixes_over_segments(layout: str, groups: int, with_modulation: bool) -> None:
    previous = torch.tensor(LAYOUTS[layout]).cuda()
    shape = (1, len(previous), 64)
    modulation = normal(groups, *shape, seed=2) if with_modulation else None
    check_against_definition(
        "shift_mixes",
        shift_mixes,
        [normal(*shape), None, normal(groups, 64, seed=1), modulation],
        [0, 3] if with_modulation else [0],
        previous,
    )


ROWS = [1, 3, 17, 500, 1024]
WIDTHS = [8, 64, 4096]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["bare", "carry", "previous", "modulation", "carry and modulation"])
@pytest.mark.parametrize("groups", [1, 2, 5, 6])
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_gradient_of_maa(rows: int, channels: int, groups: int, case: str, stored: torch.dtype) -> None:
    batch = 2 if "carry" in case else 1
    shape = (batch, rows, channels)
    carry = normal(batch, channels, seed=3) if "carry" in case else None
    modulation = normal(groups, *shape, seed=2) if "modulation" in case else None
    previous = None
    if case == "previous":
        # Segments of seven; every fifth token continues one three before.
        before = [-1 if t % 7 == 0 else t - 3 if t % 5 == 0 else t - 1 for t in range(rows)]
        previous = torch.tensor(before).cuda()
    check_against_definition(
        "shift_mixes",
        shift_mixes,
        [normal(*shape), carry, normal(groups, channels, seed=1), modulation],
        [0, 2],
        previous,
        masters=(2,) if stored is torch.float32 else (),
    )


def modulated_definition(
    z: Tensor, carry: Tensor | None, maa: Tensor, hidden: Tensor, up: Tensor, previous: Tensor | None
) -> tuple[Tensor, ...]:
    modulation = torch.einsum("btgk,gkc->gbtc", hidden.unflatten(2, up.shape[:2]), up)
    outputs: tuple[Tensor, ...] = DEFINITIONS["shift_mixes"](z, carry, maa, modulation, previous)
    return outputs


DEFINITIONS["modulated_shift_mixes"] = modulated_definition


# The gradient of `hidden` sums gradients of the modulation that were rounded, and is rounded itself.
BOUND_OF_MODULATION = 4e-3


@pytest.mark.parametrize("with_carry", [False, True])
@pytest.mark.parametrize("width", [32, 64, 20])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 60, 320), (3, 7, 2048), (1, 500, 2560), (4, 1000, 2560)])
def test_modulated_shift_mixes(shape: tuple[int, int, int], width: int, with_carry: bool) -> None:
    batch, tokens, channels = shape
    hidden, up = normal(batch, tokens, 5 * width, seed=2), normal(5, width, channels, seed=4)
    carry = normal(batch, channels, seed=3) if with_carry else None
    tensors = [normal(*shape), carry, normal(5, channels, seed=1), hidden, (up * 0.2).bfloat16()]
    wanted = [0, 3] + [1] * with_carry
    check_against_definition(
        "modulated_shift_mixes", modulated_shift_mixes, tensors, wanted, None, bound=BOUND_OF_MODULATION
    )


@pytest.mark.parametrize("width", [32, 64, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_modulated_shift_mixes_over_segments(layout: str, width: int) -> None:
    previous = torch.tensor(LAYOUTS[layout]).cuda()
    shape, tokens = (1, len(previous), 64), len(previous)
    hidden, up = normal(1, tokens, 5 * width, seed=2), normal(5, width, 64)
    tensors = [normal(*shape), None, normal(5, 64, seed=1), hidden, up]
    check_against_definition(
        "modulated_shift_mixes", modulated_shift_mixes, tensors, [0, 3], previous, bound=BOUND_OF_MODULATION
    )


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["bare", "carry", "previous"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (3, 64), (17, 4096), (500, 64), (1024, 4096)])
def test_gradients_of_maa_and_up(rows: int, channels: int, case: str, stored: torch.dtype, keeps: bool) -> None:
    tensors = [
        normal(1, rows, channels),
        normal(1, channels, seed=3) if case == "carry" else None,
        normal(5, channels, seed=1),
        normal(1, rows, 5 * 32, seed=2),
        (normal(5, 32, channels, seed=4) * 0.2).bfloat16(),
    ]
    previous = torch.tensor([-1 if t % 7 == 0 else t - 1 for t in range(rows)]).cuda() if case == "previous" else None
    is_fp32 = stored is torch.float32
    # Another bound for each, because that of up sums gradients of the modulation that were rounded.
    for wanted, bound in (([0, 3, 2], BOUND_OF_SUMS), ([0, 3, 4], BOUND_OF_MODULATION), ([4], BOUND_OF_MODULATION)):
        check_against_definition(
            "modulated_shift_mixes",
            partial(modulated_shift_mixes, keeps_modulation=keeps),
            tensors,
            wanted,
            previous,
            bound=BOUND_OF_MODULATION,
            masters=(2, 4) if is_fp32 else (),
            bound_of_masters=bound,
        )


@pytest.mark.parametrize("keeps", [False, True])
def test_the_gradient_of_a_wider_up_is_not_rounded(keeps: bool) -> None:
    up = wider(normal(5, 32, 64)).requires_grad_()
    z, maa, hidden = normal(1, 33, 64), normal(5, 64, seed=1), normal(1, 33, 160, seed=2)
    outputs = modulated_shift_mixes(z, None, maa, hidden, up, None, keeps_modulation=keeps)
    torch.autograd.backward(outputs, [normal(1, 33, 64, seed=3 + g) for g in range(5)])
    assert up.grad is not None
    assert up.grad.dtype == torch.float32
    assert not torch.equal(up.grad, up.grad.bfloat16().float())


def requested_bytes() -> int:
    """What tensors take, without what the allocator rounds blocks up by."""
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("width", [32, 64])
def test_computed_modulation_is_deterministic_and_can_be_recorded(width: int, keeps: bool) -> None:
    """Two runs and a recorded one agree in every bit, and no modulation was in memory on the way."""
    shapes = (2, 900, 2560), (2, 2560), (5, 2560), (2, 900, 5 * width), (5, width, 2560)
    inputs = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    cotangents = [normal(2, 900, 2560, seed=10 + g) for g in range(5)]

    def step() -> tuple[Tensor, ...]:
        leaves = fresh_leaves(inputs)
        outputs = modulated_shift_mixes(*leaves, None, keeps_modulation=keeps)
        return *(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, cotangents)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first, second = step(), step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    graph.replay()
    for one, other, third in zip(first, second, recorded, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_computing_the_modulation_takes_no_memory_for_it() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        z, maa, hidden, up = normal(1, 512, 2048), normal(5, 2048), normal(1, 512, 160), normal(5, 32, 2048)
        torch.cuda.synchronize()
        before = requested_bytes()
        torch.cuda.reset_peak_memory_stats()
        outputs = modulated_shift_mixes(z, None, maa, hidden, up, None)
        peak = int(torch.cuda.memory_stats()["requested_bytes.all.peak"])
        assert peak - before == sum(output.nbytes for output in outputs)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("width", [20, 32, 64])
@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float32])
def test_modulation_is_kept_when_asked_and_parameters_cost_no_memory(stored: torch.dtype | None, width: int) -> None:
    """Kept where kernels do not compute it."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        z, hidden = normal(1, 512, 2048).requires_grad_(), normal(1, 512, 5 * width, seed=2).requires_grad_()
        maa, up = normal(5, 2048, seed=1), normal(5, width, 2048, seed=4)
        if stored is not None:
            maa, up = maa.to(stored).requires_grad_(), up.to(stored).requires_grad_()
        modulated_shift_mixes(z, None, maa, hidden, up, None)  # cuBLAS allocates its workspace
        for keeps in (False, True):
            before = requested_bytes()
            outputs = modulated_shift_mixes(z, None, maa, hidden, up, None, keeps_modulation=keeps)
            expected = sum(output.nbytes for output in outputs) * (2 if keeps and width == 20 else 1)
            assert requested_bytes() - before == expected
            del outputs
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_shift_mixes_with_some_outputs_unused() -> None:
    def chosen(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *arguments: tuple(function(*arguments)[g] for g in (1, 4))

    definition = DEFINITIONS["shift_mixes"]
    z, maa, modulation = normal(2, 9, 64), normal(5, 64, seed=1), normal(5, 2, 9, 64, seed=2)
    DEFINITIONS["shift_mixes"] = chosen(definition)
    try:
        check_against_definition("shift_mixes", chosen(shift_mixes), [z, None, maa, modulation], [0, 2, 3], None)
        check_against_definition("shift_mixes", chosen(shift_mixes), [z, None, maa, None], [0, 2], None, masters=(2,))
    finally:
        DEFINITIONS["shift_mixes"] = definition


class Silent(torch.autograd.Function):
    """Sends no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


def test_no_gradient_of_the_outputs_gives_none_of_the_inputs() -> None:
    z, maa, up, hidden = (normal(1, 9, 64), normal(5, 64), normal(5, 8, 64), normal(1, 9, 40))
    inputs = [tensor.requires_grad_() for tensor in (z, maa, up, hidden)]
    for outputs in (
        shift_mixes(z, None, maa, None, None),
        modulated_shift_mixes(z, None, maa, hidden, up, None),
        add_norm(z, None, maa[0], maa[1], EPS),
    ):
        silent = sum(Silent.apply(output).sum() for output in outputs)
        assert torch.autograd.grad(silent, inputs, allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 15), (1, 61)])
def test_group_norm_silu_gate(batch: int, tokens: int, head_size: int) -> None:
    heads = 5
    channels = heads * head_size
    check_against_definition(
        "group_norm_silu_gate",
        group_norm_silu_gate,
        [
            normal(batch, tokens, heads, head_size),
            normal(batch, tokens, channels, seed=1),
            normal(channels, seed=2),
            normal(channels, seed=3),
        ],
        [0, 1],
        EPS,
    )


@pytest.mark.parametrize("wanted", [[0, 1, 2, 3], [2, 3], [2], [3]])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "head_size"), [(5, 16), (5, 32), (1, 64), (64, 64), (5, 128)])
@pytest.mark.parametrize("rows", ROWS)
def test_gradients_of_group_norm_parameters(
    rows: int, heads: int, head_size: int, stored: torch.dtype, wanted: list[int]
) -> None:
    channels = heads * head_size
    tensors: list[Tensor | None] = [
        normal(1, rows, heads, head_size),
        normal(1, rows, channels, seed=1),
        normal(channels, seed=2),
        normal(channels, seed=3),
    ]
    masters = (2, 3) if stored is torch.float32 else ()
    check_against_definition("group_norm_silu_gate", group_norm_silu_gate, tensors, wanted, EPS, masters=masters)


def test_group_norm_of_a_large_mean_is_exact() -> None:
    y = (normal(1, 4, 2, 64) + 256.0).bfloat16()
    tensors: list[Tensor | None] = [y, normal(1, 4, 128, seed=1), normal(128, seed=2), normal(128, seed=3)]
    check_against_definition("group_norm_silu_gate", group_norm_silu_gate, tensors, [0, 1], EPS)


NORM_SHAPES = [(1, 1, 8), (2, 15, 64), (3, 7, 2048), (1, 5, 2056), (1, 50, 4096), (1, 2, 5120), (1, 2, 8192)]


@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norm(shape: tuple[int, ...]) -> None:
    channels = shape[-1]
    tensors = [normal(*shape), None, normal(channels, seed=2), normal(channels, seed=3)]
    check_against_definition("add_norm", add_norm, tensors, [0], 1e-5)


@pytest.mark.parametrize("wanted", [[0, 2, 3], [2, 3], [2], [3]])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_gradients_of_norm_parameters(rows: int, channels: int, stored: torch.dtype, wanted: list[int]) -> None:
    tensors = [normal(1, rows, channels), None, normal(channels, seed=2), normal(channels, seed=3)]
    masters = (2, 3) if stored is torch.float32 else ()
    check_against_definition("add_norm", add_norm, tensors, wanted, 1e-3, masters=masters)


@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norm_of_a_sum_is_that_of_the_rounded_sum(shape: tuple[int, ...]) -> None:
    x, delta = normal(*shape).requires_grad_(), normal(*shape, seed=1).requires_grad_()
    total = (x + delta).detach().requires_grad_()
    grads = (normal(*shape, seed=4), normal(*shape, seed=5))
    results = []
    for stream, added in ((x, delta), (total, None)):
        weight, bias = normal(shape[-1], seed=2).requires_grad_(), normal(shape[-1], seed=3).requires_grad_()
        outputs = add_norm(stream, added, weight, bias, 1e-5)
        torch.autograd.backward(outputs, grads)
        results.append((*outputs, stream.grad, weight.grad, bias.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    assert torch.equal(delta.grad, total.grad)


@pytest.mark.parametrize("used", [0, 1])
def test_norm_with_one_output_unused(used: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in (normal(2, 9, 64), normal(64, seed=2), normal(64, seed=3))]
    grad = normal(2, 9, 64, seed=4)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        x, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs)
        output = function(x, None, weight, bias, 1e-5)[used]
        return torch.autograd.grad(output, (x, weight, bias), grad.to(dtype), allow_unused=True)

    found = gradients(add_norm, torch.bfloat16), gradients(DEFINITIONS["add_norm"], torch.float64)
    for ours, reference in zip(*found, strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None and reference is not None:
            assert error(ours, reference) < BOUND_OF_FEW


def test_a_trained_norm_does_not_make_the_stream_trained() -> None:
    weight, bias = normal(64).requires_grad_(), normal(64, seed=1).requires_grad_()
    for delta in (None, normal(2, 9, 64, seed=2)):
        total, normed = add_norm(normal(2, 9, 64), delta, weight, bias, 1e-5)
        assert (total.requires_grad, normed.requires_grad) == (False, True)


def test_norm_of_a_large_mean_is_exact() -> None:
    x = (normal(1, 4, 256) + 256.0).bfloat16()
    check_against_definition("add_norm", add_norm, [x, None, normal(256, seed=2), normal(256, seed=3)], [0], 1e-5)


@pytest.mark.parametrize("shape", [(8,), (3, 5, 64), (1, 77, 2048)])
def test_activations(shape: tuple[int, ...]) -> None:
    x, r, other, grad = (normal(*shape, seed=seed) for seed in range(4))
    check_against_definition("squared_relu", squared_relu, [x], [0])
    check_against_definition("squared_relu_gradient", squared_relu_gradient, [x, grad], [])
    both = squared_relu_and_gradient(x.cuda().clone(), grad.cuda().clone())
    apart = squared_relu(x.cuda()), squared_relu_gradient(x.cuda(), grad.cuda().clone())
    assert all(map(torch.equal, both, apart))
    check_against_definition("sigmoid_gated_residual", sigmoid_gated_residual, [x, r, other], [0, 2])
    name = "sigmoid_gated_residual_gradients"
    check_against_definition(name, sigmoid_gated_residual_gradients, [x, r, other, grad], [])


def test_the_gated_residual_takes_its_gradients_from_its_result() -> None:
    x, r, value, grad = (normal(3, 64, seed=seed) for seed in range(4))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, r, value)]
    result = sigmoid_gated_residual(*leaves)
    result.backward(grad)
    expected = grad, *sigmoid_gated_residual_gradients(x, r, result.detach(), grad)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)


def layer(z: Tensor, maa: Tensor, modulation: Tensor, up: Tensor) -> Tensor:
    """All operators in a row, [1, T, 128] -> [1, T, 128]."""
    x, z = add_norm(z, None, maa[0], maa[1], 1e-5)
    first, second = shift_mixes(z, None, maa, modulation, None)
    first, second = modulated_shift_mixes(first, None, maa, second[..., :32], up, None)
    gated = group_norm_silu_gate(first.view(1, -1, 2, 64), second, maa[0], maa[1], EPS)
    x, z = add_norm(x, gated, maa[0], maa[1], 1e-5)
    return sigmoid_gated_residual(x, gated, squared_relu(z))


def layer_inputs() -> tuple[Tensor, ...]:
    """What `layer` takes; the last is stored in fp32. Gradients of all are asked for."""
    tensors = normal(1, 33, 128), normal(2, 128, seed=2), normal(2, 1, 33, 128, seed=1), wider(normal(2, 16, 128))
    return tuple(tensor.requires_grad_() for tensor in tensors)


def layer_gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    inputs = layer_inputs()
    out = run(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, normal(*out.shape, seed=3)))


def test_two_runs_are_bitwise_equal() -> None:
    for first, second in zip(layer_gradients(layer), layer_gradients(layer), strict=True):
        assert torch.equal(first, second)


def test_checkpointing_changes_no_bit() -> None:
    """The recomputation ends by an exception from within the last operator's C++ node."""
    kept = layer_gradients(layer)
    recomputed = layer_gradients(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False))
    for first, second in zip(kept, recomputed, strict=True):
        assert torch.equal(first, second)


def test_other_streams_and_strided_inputs() -> None:
    expected = layer_gradients(layer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        strided = layer_gradients(
            lambda z, maa, modulation, up: layer(
                z.transpose(1, 2).contiguous().transpose(1, 2),
                maa.repeat_interleave(2, -1)[..., ::2],
                modulation.repeat_interleave(2, -1)[..., ::2],
                up.repeat_interleave(2, -1)[..., ::2],
            )
        )
    torch.cuda.current_stream().wait_stream(stream)
    for first, second in zip(expected, strided, strict=True):
        assert torch.equal(first, second)


def test_a_cuda_graph_replays_forward_and_backward() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    inputs, grad = layer_inputs(), normal(1, 33, 128, seed=3)

    def step() -> tuple[Tensor, ...]:
        leaves = fresh_leaves(inputs)
        out = layer(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for seed, tensor in enumerate(inputs):
                tensor.copy_(normal(*tensor.shape, seed=7 + seed))
        graph.replay()
        for ours, eager in zip(captured, step(), strict=True):
            assert torch.equal(ours, eager)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_only_dear_tensors_are_saved() -> None:
    z, maa = normal(1, 9, 64).requires_grad_(), normal(5, 64, seed=1)
    modulation = normal(5, 1, 9, 64, seed=2).requires_grad_()

    def saved_by(run: Callable[[], object]) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
            run()
        return shapes

    assert saved_by(lambda: shift_mixes(z, None, maa[:1], None, None)) == []
    assert saved_by(lambda: shift_mixes(z, None, maa, modulation, None)) == [(1, 9, 64), (5, 1, 9, 64)]
    assert saved_by(lambda: squared_relu(z)) == [(1, 9, 64)]
    assert saved_by(lambda: add_norm(z, z, maa[0], maa[1], EPS)) == [(1, 9, 64), (2, 9)]
    by_head, weight, bias = z.detach().view(1, 9, 1, 64).requires_grad_(), maa[0], maa[1]
    assert saved_by(lambda: group_norm_silu_gate(by_head, z, weight, bias, EPS)) == [(1, 9, 1, 64), (1, 9, 64)]
    hidden, up = normal(1, 9, 40), normal(5, 8, 64)
    for keeps, beside in ((False, (1, 9, 40)), (True, (5, 9, 64))):
        run = partial(modulated_shift_mixes, z, None, maa, hidden, keeps_modulation=keeps, previous=None)
        assert saved_by(partial(run, up=up)) == [(1, 9, 64), beside]

    hidden_of_32, up_of_32 = normal(1, 9, 160), normal(5, 32, 64)
    for keeps in (False, True):
        run = partial(modulated_shift_mixes, z, None, maa, hidden_of_32, up_of_32, None, keeps_modulation=keeps)
        assert saved_by(run) == [(1, 9, 64), (1, 9, 160)]

    trained = normal(5, 64, seed=1).float().requires_grad_()
    weight, bias = trained.detach()[0].requires_grad_(), trained.detach()[1].requires_grad_()
    assert saved_by(lambda: shift_mixes(z, None, trained, None, None)) == [(1, 9, 64), (5, 64)]
    assert saved_by(lambda: shift_mixes(z, z[:, 0].detach(), trained, None, None)) == [(1, 9, 64), (1, 64), (5, 64)]
    assert saved_by(lambda: shift_mixes(z, None, trained, modulation, None)) == [(1, 9, 64), (5, 64), (5, 1, 9, 64)]
    assert saved_by(lambda: add_norm(z, z, weight, bias, EPS)) == [(1, 9, 64), (2, 9), (64,)]
    run = partial(modulated_shift_mixes, z, None, maa, hidden, up.requires_grad_(), None, keeps_modulation=True)
    assert saved_by(run) == [(1, 9, 64), (5, 9, 64), (1, 9, 40), (5, 8, 64)]
    with torch.no_grad():
        assert saved_by(lambda: squared_relu(z)) == []


def test_wrong_arguments_are_named() -> None:
    kernels = elementwise.fused_kernels()
    assert kernels is not None
    z, maa = normal(2, 4, 64), normal(5, 64)
    with pytest.raises(RuntimeError, match="modulation has shape"):
        kernels.shift_mixes(z, None, maa, normal(5, 2, 3, 64), None, None)
    with pytest.raises(RuntimeError, match="z has dtype"):
        kernels.shift_mixes(z.float(), None, maa, None, None, None)
    with pytest.raises(RuntimeError, match="maa is on cpu"):
        kernels.shift_mixes(z, None, maa.cpu(), None, None, None)
    with pytest.raises(RuntimeError, match="head size is 8"):
        kernels.group_norm_silu_gate(normal(1, 2, 3, 8), normal(1, 2, 24), normal(24), normal(24), EPS)
    with pytest.raises(RuntimeError, match="delta has shape"):
        kernels.add_norm(z, normal(2, 3, 64), maa[0], maa[1], EPS)
    with pytest.raises(RuntimeError, match="x has 8200 channels"):
        kernels.add_norm(normal(1, 8200), None, normal(8200), normal(8200), EPS)
    y = squared_relu(z.requires_grad_())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), z, create_graph=True)


def test_a_gradient_that_is_not_asked_for_is_not_computed() -> None:
    z, up, hidden = normal(1, 64, 64).requires_grad_(), normal(5, 8, 64), normal(1, 64, 40).requires_grad_()
    maa, weight, bias = normal(5, 64, seed=1), normal(64, seed=2), normal(64, seed=3)
    parameters = (maa, up, weight, bias)
    operators: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "shift_mixes": lambda: shift_mixes(z, None, maa, None, None),
        "modulated_shift_mixes": lambda: modulated_shift_mixes(z, None, maa, hidden, up, None),
        "group_norm_silu_gate": lambda: (group_norm_silu_gate(z.view(1, 64, 1, 64), z, weight, bias, EPS),),
        "add_norm": lambda: add_norm(z, None, weight, bias, EPS)[1:],
    }

    def allocations_of_backward(run: Callable[[], tuple[Tensor, ...]], wanted: list[Tensor]) -> int:
        outputs = run()
        grads = [torch.ones_like(output) for output in outputs]
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
        del found
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before

    for name, run in operators.items():
        allocations_of_backward(run, [z])  # cuBLAS allocates its workspace
        frozen = allocations_of_backward(run, [z])
        for parameter in parameters:
            parameter.requires_grad_()
        assert allocations_of_backward(run, [z, *parameters]) > frozen, name
        assert allocations_of_backward(run, list(parameters)) > 0, name
        for parameter in parameters:
            parameter.requires_grad_(False)


def test_a_trained_parameter_changed_before_the_backward_is_noticed() -> None:
    weight = normal(64).requires_grad_()
    _, normed = add_norm(normal(1, 4, 64).requires_grad_(), None, weight, normal(64), EPS)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()
