"""The CUDA kernels as they are launched, run on the CPU by the emulator: results and gradients against definitions."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from emulator.kernels import emulated, has_compiler
from factories import tiny_parameters, tiny_shape, tiny_states
from operators import poisoned_memory
from recompute_cases import CASES, Gradients, model_of, shape_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from src import quant
from src.adapters.plan import AdapterPlan
from src.loading import LoadOptions, build_model
from src.model import rwkv6
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.ops import block_diagonal, cast, dequantize_cuda, elementwise, elementwise_cuda, wkv6, wkv6_cuda
from src.ops.kernels import Kernel
from src.ops.products import ANYWHERE, MixPlaces, behind, has_room
from src.ops.rows import HEAD_SIZES
from src.ops.sequences import start_states
from src.ops.wkv6 import wkv6_branching
from src.ops.wkv6_cuda import wkv6_branching_cuda
from src.ops.wkv6_reference import wkv6_reference

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs g++")]

# As tests/gpu has it: what rounding to bf16 gives, and what the matrix products' operands add in wkv6.
BOUND, BOUND_OF_FEW, BOUND_OF_WKV6 = 2.5e-3, 4e-3, 5e-3
EPS = 64e-5


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run here, every tensor is said to be on a GPU of two multiprocessors, and fresh memory is NaN."""
    for name in ("mm", "bmm"):  # those for CPUs have no out_dtype
        monkeypatch.setattr(torch, name, partial(product_with_dtype, getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(wkv6_cuda, "_multiprocessors", lambda index: 2)
    monkeypatch.setattr(dequantize_cuda, "_multiprocessors", lambda index: 2)
    monkeypatch.setattr(elementwise, "fused_kernels", lambda: elementwise_cuda)
    for module in (wkv6, rwkv6):
        monkeypatch.setattr(module, "kernel_is_available", lambda device: True)
    monkeypatch.setattr(quant, "dequantization_kernels", lambda device: True)
    monkeypatch.setattr(block_diagonal, "_have_kernels", lambda size: True)
    monkeypatch.setattr(cast, "_have_kernel", lambda: True)
    with poisoned_memory(), emulated():
        yield


def product_with_dtype(
    product: Callable[..., Tensor], a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **options: Tensor
) -> Tensor:
    return product(a, b, **options) if out_dtype is None else product(a.to(out_dtype), b.to(out_dtype), **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative error of the norm; NaN when anything is."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def check(
    run: Callable[..., object],
    exact: Callable[..., object],
    inputs: Sequence[Tensor],
    wanted: Sequence[int],
    bound: float,
) -> None:
    """Outputs and the gradients of `wanted` inputs, against the same in fp64."""
    found = []
    for function, wide in ((run, False), (exact, True)):
        leaves = [tensor.double() if wide else tensor.clone() for tensor in inputs]
        for index in wanted:
            leaves[index].requires_grad_()
        outputs = function(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)  # type: ignore[arg-type]
        cotangents = [normal(*output.shape, seed=100 + i).to(output.dtype) for i, output in enumerate(outputs)]
        pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
        if wanted:
            torch.autograd.backward(*zip(*pairs, strict=True))
        found.append([*outputs, *(leaves[index].grad for index in wanted)])
    for position, (ours, reference) in enumerate(zip(*found, strict=True)):
        assert ours.shape == reference.shape
        largest = bound if ours.numel() >= 256 else max(bound, BOUND_OF_FEW)
        assert error(ours, reference) < largest, f"result {position}"


ALL, TOKENS, STATE = (0, 1, 2, 3, 4, 5), (0, 1, 2, 3), (5,)


@pytest.mark.parametrize("wanted", [ALL, TOKENS, STATE, ()])
@pytest.mark.parametrize(
    ("batch", "tokens", "shared", "borders", "span_tokens"),
    [
        (1, 70, True, None, 0),
        (2, 37, False, None, 0),
        (1, 200, True, None, 64),
        (1, 150, False, (0, 20, 20, 150), 64),
        (1, 90, True, (0, 30, 90), 0),
    ],
)
def test_wkv6(
    batch: int, tokens: int, shared: bool, borders: tuple[int, ...] | None, span_tokens: int, wanted: tuple[int, ...]
) -> None:
    sequences = batch if borders is None else len(borders) - 1
    inputs = [normal(batch, tokens, 1, 64, seed=i) for i in range(4)]
    inputs[3] -= 1
    inputs += [normal(1, 64, seed=4), normal(*(() if shared else (sequences,)), 1, 64, 64, seed=5).float()]
    cu_seqlens = None if borders is None else torch.tensor(borders)
    lengths = None if borders is None else [b - a for a, b in pairwise(borders)]

    def ours(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return wkv6_cuda.wkv6_cuda(*leaves, cu_seqlens, span_tokens=span_tokens)

    def exact(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return wkv6_reference(*leaves[:5], start_states(leaves[5], sequences), lengths)

    check(ours, exact, inputs, wanted, BOUND_OF_WKV6)


@pytest.mark.parametrize("wanted", [ALL, TOKENS, STATE, ()])
def test_wkv6_branching(wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [normal(1, 150, 1, 64, seed=i) for i in range(4)]
    inputs[3] -= 1
    inputs += [normal(1, 64, seed=4), normal(2, 1, 64, 64, seed=5).float()]
    layout = (torch.tensor([0, 20, 70]), torch.tensor([0, 30, 35, 80]), torch.tensor([0, 0, 1]), 70)
    check(
        lambda *leaves: wkv6_branching_cuda(*leaves, *layout),
        lambda *leaves: wkv6_branching(*leaves, *layout),
        inputs,
        wanted,
        BOUND_OF_WKV6,
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("operator", ["norm", "gate", "mix", "modulated", "cast before"])
def test_parameters_in_fp32_are_used_rounded(operator: str, frozen: bool) -> None:
    """The same bits as with parameters in bf16, but for their gradients, which are not rounded."""
    x, other = normal(1, 10, 128), normal(1, 10, 128, seed=1)

    def run(first: Tensor, second: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        if operator == "norm":
            return elementwise.add_norm(x, other, first[0], second[0], 1e-5)
        if operator == "gate":
            return (elementwise.group_norm_silu_gate(x.view(1, 10, 2, 64), other, first[0], second[0], EPS),)
        if operator == "mix":
            return elementwise.shift_mixes(x, None, first, None, None)
        hidden = normal(1, 10, 2 * 16, seed=2)
        up = second.view(2, 16, -1)
        narrow = (lambda: up.detach().bfloat16()) if operator == "cast before" else None
        return elementwise.modulated_shift_mixes(x, None, first, hidden, up, None, narrow_up=narrow)

    drawn = [
        torch.randn(2, 16 * 128 if operator in ("modulated", "cast before") and seed == 4 else 128) for seed in (3, 4)
    ]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [tensor.detach().to(dtype).requires_grad_(not frozen) for tensor in drawn]
        stream = x.clone().requires_grad_()
        outputs = run(*leaves, stream)
        torch.autograd.backward(outputs, [normal(*output.shape, seed=5) for output in outputs])
        results.append((*outputs, stream.grad, *(leaf.grad for leaf in leaves)))
    for wide, narrow in zip(*results, strict=True):
        assert (wide is None) == (narrow is None)
        assert wide is None or torch.equal(wide.to(narrow.dtype), narrow)


LAYOUT = torch.tensor([-1, 0, 1, 2, 3, -1, 5, 6, 4, 8, 9, 10, 7, 12, 4, 14, 15, 7])


@pytest.mark.parametrize("case", ["bare", "carry", "modulation", "segments"])
@pytest.mark.parametrize("mixes", elementwise_cuda.MIXES)
def test_shift_mixes(mixes: int, case: str) -> None:
    rows = 2 if case == "carry" else 1
    inputs = [normal(rows, 18, 64), normal(mixes, 64, seed=1)]
    inputs += {"carry": [normal(rows, 64, seed=2)], "modulation": [normal(mixes, rows, 18, 64, seed=2)]}.get(case, [])

    def mixed(function: Callable[..., tuple[Tensor, ...]], z: Tensor, maa: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        carry = rest[0] if case == "carry" else None
        modulation = rest[0] if case == "modulation" else None
        return function(z, carry, maa, modulation, LAYOUT if case == "segments" else None)

    ours, exact = partial(mixed, elementwise.shift_mixes), partial(mixed, elementwise.shift_mixes_torch)
    check(ours, exact, inputs, range(len(inputs)), BOUND)
    check(ours, exact, inputs, (), BOUND)


@pytest.mark.parametrize("mixes", elementwise_cuda.MIXES)
def test_shift_mixes_with_room_behind_their_rows(mixes: int) -> None:
    """The same bits at other places, and nothing in the room."""
    inputs = normal(2, 18, 64), normal(2, 64, seed=2), normal(mixes, 64, seed=1)
    rooms = tuple(8 * (mix % 3) for mix in range(mixes))
    places = MixPlaces(((0, 3), (1, 4)) if mixes > 4 else (), rooms)
    check_room(places, lambda where: elementwise.shift_mixes(*inputs, None, None, places=where))


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_modulated_shift_mixes_with_room_behind_their_rows(tokens: int, width: int) -> None:
    z, maa = normal(2, tokens, 72), normal(5, 72, seed=1)
    hidden, up = normal(2, tokens, 5 * width, seed=2), 0.2 * normal(5, width, 72, seed=3)
    places = MixPlaces(((3, 1, 2),), (0, 64, 64, 64, 8))
    check_room(places, lambda where: elementwise.modulated_shift_mixes(z, None, maa, hidden, up, None, places=where))


def check_room(places: MixPlaces, mixed: Callable[[MixPlaces], tuple[Tensor, ...]]) -> None:
    expected, found = mixed(ANYWHERE), mixed(places)
    for mix, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours, theirs)
        rows, room = ours.flatten(0, 1), places.rooms[mix]
        if room and len(rows) > 1:
            assert has_room(rows, room)
            assert behind(rows, room).isnan().all()


@pytest.mark.parametrize("keeps", [False, True])
def test_modulated_shift_mixes(keeps: bool) -> None:
    inputs = [normal(1, 18, 64), normal(5, 64, seed=1), normal(1, 18, 40, seed=2), 0.2 * normal(5, 8, 64, seed=3)]

    def ours(z: Tensor, maa: Tensor, hidden: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return elementwise.modulated_shift_mixes(z, None, maa, hidden, up, None, keeps_modulation=keeps)

    def exact(z: Tensor, maa: Tensor, hidden: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        modulation = torch.einsum("btgk,gkc->gbtc", hidden.unflatten(2, up.shape[:2]), up)
        return elementwise.shift_mixes_torch(z, None, maa, modulation, None)

    check(ours, exact, inputs, range(4), BOUND_OF_FEW)
    check(ours, exact, inputs, (), BOUND_OF_FEW)


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (0, 1), (3,), ()])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_group_norm_silu_gate(head_size: int, wanted: tuple[int, ...]) -> None:
    channels = 3 * head_size
    inputs = [
        normal(2, 5, 3, head_size),
        *(normal(*s, seed=i) for i, s in enumerate(((2, 5, channels), (channels,), (channels,)), 1)),
    ]
    ours = partial(elementwise.group_norm_silu_gate, eps=EPS)
    check(ours, partial(elementwise.group_norm_silu_gate_torch, eps=EPS), inputs, wanted, BOUND)


@pytest.mark.parametrize("wanted", [(0, 1, 2, 3), (0, 1), (2,), ()])
@pytest.mark.parametrize("channels", [64, 2056, 4104])
def test_add_norm(channels: int, wanted: tuple[int, ...]) -> None:
    inputs = [normal(3, channels), normal(3, channels, seed=1), normal(channels, seed=2), normal(channels, seed=3)]
    both = partial(elementwise.add_norm, eps=EPS), partial(elementwise.add_norm_torch, eps=EPS)
    check(*both, inputs, wanted, BOUND_OF_FEW)
    alone = partial(_without_delta, elementwise.add_norm), partial(_without_delta, elementwise.add_norm_torch)
    check(*alone, [inputs[0], *inputs[2:]], [index - (index > 1) for index in wanted if index != 1], BOUND_OF_FEW)


def _without_delta(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, weight: Tensor, bias: Tensor) -> object:
    return function(x, None, weight, bias, EPS)


@pytest.mark.parametrize("channels", [64, 320])
def test_sums_over_many_tiles_of_rows(channels: int) -> None:
    """Gradients of parameters, where the last tile and the last block of channels are not full."""
    rows = 137
    z, other = normal(1, rows, channels), normal(1, rows, channels, seed=1)
    vectors = [normal(channels, seed=2), normal(channels, seed=3)]
    maa = normal(2, channels, seed=4)
    norms = partial(_without_delta, elementwise.add_norm), partial(_without_delta, elementwise.add_norm_torch)
    check(*norms, [z, *vectors], (1, 2), BOUND)
    ours, exact = (
        lambda y, *rest, run=run: run(y.view(1, rows, -1, 64), *rest, eps=EPS)
        for run in (elementwise.group_norm_silu_gate, elementwise.group_norm_silu_gate_torch)
    )
    check(ours, exact, [z, other, *vectors], (2, 3), BOUND)
    ours, exact = (
        lambda z, maa, run=run: run(z, None, maa, None, None)
        for run in (elementwise.shift_mixes, elementwise.shift_mixes_torch)
    )
    check(ours, exact, [z, maa], (1,), BOUND)


def test_activations() -> None:
    inputs = [normal(3, 7, 40, seed=i) for i in range(3)]
    for wanted in ((0,), ()):
        check(elementwise.squared_relu, elementwise.squared_relu_torch, inputs[:1], wanted, BOUND)
    for wanted in ((0, 1, 2), ()):
        check(elementwise.sigmoid_gated_residual, elementwise.sigmoid_gated_residual_torch, inputs, wanted, 2 * BOUND)
    x, grad = inputs[:2]
    expected = elementwise.squared_relu_gradient_torch(x.double(), grad.double())
    assert error(elementwise.squared_relu_gradient(x, grad.clone()), expected) < BOUND
    apart = elementwise.squared_relu(x), elementwise.squared_relu_gradient(x, grad.clone())
    assert all(map(torch.equal, elementwise.squared_relu_and_gradient(x.clone(), grad.clone()), apart))


def test_statistics_and_gradient_of_logits() -> None:
    logits = 3 * normal(4, 512)
    logits[1, 17] = logits[1, 300] = 50.0
    targets = torch.tensor([5, 17, -100, 511])
    logp, max_logit, logsumexp = torch.full((3, 4), torch.nan).unbind(0)
    argmax = torch.full((4,), -7, dtype=torch.int32)
    elementwise_cuda.logit_statistics(logits, targets, logp, max_logit, logsumexp, argmax)
    wide = logits.double().requires_grad_()
    counted = targets >= 0
    expected = torch.log_softmax(wide, -1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)[counted]
    largest = wide.max(-1).values[counted]
    torch.testing.assert_close(logp.double()[counted], expected.detach(), rtol=1e-5, atol=5e-5)
    assert torch.equal(max_logit[counted].double(), largest.detach())
    assert logp[2] == max_logit[2] == 0
    assert argmax[1] == 17
    (gradient,) = torch.autograd.grad((expected * 0.5).sum() + (largest * 0.25).sum(), wide)
    elementwise_cuda.logit_gradient(logits, targets, logsumexp, argmax, torch.full((4,), 0.5), torch.full((4,), 0.25))
    assert error(logits, gradient) < BOUND


@pytest.mark.parametrize("count", [8, 8 * 37, 96 * 128])
@pytest.mark.parametrize(("bits", "double"), dequantize_cuda.KERNELS)
def test_every_dequantised_bit_is_as_the_format_says(bits: int, double: bool, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    block = 64 if bits == 4 else 256
    packed = torch.randint(256, (count * bits // 8,), generator=generator, dtype=torch.uint8)
    value_code, absmax_code = torch.randn(2**bits, generator=generator), torch.rand(256, generator=generator)
    blocks = -(-count // block)
    quantised = torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8)
    scale, offset = torch.rand(-(-blocks // 256), generator=generator), torch.rand(1, generator=generator)
    absmax = absmax_code[quantised.long()] * scale.repeat_interleave(256)[:blocks] + offset
    values = packed if bits == 8 else torch.stack((packed >> 4, packed & 15), 1).flatten()
    expected = (value_code[values.long()] * absmax.repeat_interleave(block)[:count]).bfloat16()

    nested = (quantised, scale, offset) if double else (absmax, None, None)
    matrix = dequantize_cuda.PackedMatrix(packed, *nested, absmax_code, value_code, bits, count)
    part = dequantize_cuda.PackedMatrix(
        packed[: 8 * bits // 8], nested[0][:1], *nested[1:], absmax_code, value_code, bits, 8
    )
    whole, *others = (torch.full((size,), torch.nan, dtype=torch.bfloat16) for size in (count, 8, count, 8))
    for fill in (
        lambda: matrix.fill(whole),
        dequantize_cuda.filler([matrix], [whole]),
        dequantize_cuda.filler([part, matrix, part], [others[0], whole, others[2]]),
        dequantize_cuda.filler([matrix, part, matrix, part, part], [whole, others[0], others[1], others[2], others[0]]),
    ):
        for values in (whole, *others):
            values.fill_(torch.nan)
        fill()
        assert torch.equal(whole.view(torch.int16), expected.view(torch.int16))
    for values in others:
        assert torch.equal(values.view(torch.int16), expected[: len(values)].view(torch.int16))


@pytest.mark.parametrize("sizes", [(1,), (4096, 4097, 8, 5), (0, 3), tuple(range(1, 70)), (100, 0, 9000, 64)])
def test_every_bit_of_tensors_cast_at_once(sizes: tuple[int, ...]) -> None:
    """Among them some that begin at odd places, and what is not finite; the calls after the first see new values."""
    whole = torch.randn(sum(sizes) + 3, generator=torch.Generator().manual_seed(0))
    places = torch.randint(len(whole), (9,), generator=torch.Generator().manual_seed(1))
    whole[places] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-40, -0.0, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 0])
    for shift in (0, 3):
        tensors = list(whole[shift : shift + sum(sizes)].split(sizes))
        outputs = [torch.full((2 * size + 1,), torch.nan, dtype=torch.bfloat16) for size in sizes]
        run = cast.caster(tensors, [output[:size] for output, size in zip(outputs, sizes, strict=True)])
        for factor in (1, -0.7):
            whole.mul_(factor)
            run()
            for tensor, output, size in zip(tensors, outputs, sizes, strict=True):
                expected = tensor.bfloat16()
                numbers = ~expected.isnan()  # whose bits differ among devices
                assert torch.equal(output[:size].isnan(), ~numbers)
                assert torch.equal(output[:size][numbers].view(torch.int16), expected[numbers].view(torch.int16))
                assert output[size:].isnan().all(), "nothing is written behind it"


@pytest.mark.parametrize("columns", [8, 64, 12, 1])
def test_a_matrix_is_cast_to_where_its_rows_stand_apart(columns: int) -> None:
    """Beside one that is cast to two places, and in pieces that end within a row."""
    tensors = [torch.randn(1000, columns), torch.randn(3, 70)]
    wholes = [torch.full((len(each), each.shape[1] + 16), torch.nan, dtype=torch.bfloat16) for each in tensors]
    places = [whole[:, 8:-8] for whole in wholes]
    own = torch.empty(3, 70, dtype=torch.bfloat16)
    cast.caster([*tensors, tensors[1]], [*places, own])()
    for whole, tensor in zip(wholes, tensors, strict=True):
        assert torch.equal(whole[:, 8:-8], tensor.bfloat16())
        assert whole[:, :8].isnan().all()
        assert whole[:, -8:].isnan().all()
    assert torch.equal(own, tensors[1].bfloat16())


MODES = [(None, Recompute.NOTHING), (None, Recompute.ALL), ("nf4", Recompute.NOTHING), ("nf4", Recompute.ALL)]


@pytest.mark.parametrize(
    ("case", "quant_type", "mode"),
    [
        *((case, "nf4", Recompute.INPUTS) for case in CASES),
        *((case, quant_type, mode) for case in CASES[:2] for quant_type, mode in MODES),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_model_on_the_kernels(
    case: Callable[[LanguageModel], Gradients], quant_type: str | None, mode: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As close to fp32 as plain torch operations in bf16; every kernel that it launches is compiled ahead."""
    launched: set[Kernel] = set()
    call = Kernel.__call__

    def noted(kernel: Kernel, *arguments: Any) -> None:
        launched.add(kernel)
        call(kernel, *arguments)

    def gradients(dtype: torch.dtype, mode: Recompute) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in case(model_of(mode, quant_type, "cpu", dtype)).items()}

    with monkeypatch.context() as noting:  # put back before the emulator is
        noting.setattr(Kernel, "__call__", noted)
        with monkeypatch.context() as plain:
            plain.setattr(torch.Tensor, "is_cuda", False)
            exact = gradients(torch.float32, Recompute.NOTHING)
            rounded = gradients(torch.bfloat16, Recompute.NOTHING)
        assert not launched
        ours = gradients(torch.bfloat16, mode)
    for name, expected in exact.items():
        allowed = 2 * (rounded[name] - expected).norm() + 0.02 * expected.norm()
        assert (ours[name] - expected).norm() <= allowed, name
    ready = {*shape_of("x060").kernels(trains_weights=True), *shape_of("x060").kernels(trains_weights=False)}
    ready |= {kernel for size in block_diagonal.SIZES for kernel in AdapterPlan("bat", size).kernels()}
    assert wkv6_cuda.FORWARD in launched
    assert launched <= ready | set(quant.kernels_for("nf4"))


class Products(TorchDispatchMode):
    """Counts what is a matrix product's launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm_"):
            self.count["batched" if "bmm" in name else "single"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "single", "batched"), [("", 35, 4), ("lora", 60, 12), ("bone", 56, 11), ("bat", 54, 13)]
)
def test_products_of_a_layer_in_a_step(kind: str, single: int, batched: int) -> None:
    """With `time` and `ln` trained and each layer computed again; of adapters those of four or two matrices are one."""
    counts = []
    for layers in (2, 3):
        shape = tiny_shape(n_layer=layers, n_embd=128, head_size=64)
        trained = [*shape.part("time"), *shape.part("ln")]
        adapters = AdapterPlan(kind, r=32) if kind else None
        options = LoadOptions(torch.device("cpu"), torch.bfloat16, trained=trained, adapters=adapters)
        model = build_model({**tiny_parameters(shape), **tiny_states(shape)}, shape, options)
        model.set_recomputation([Recompute.ALL] * layers)
        with Products() as products:
            model(torch.arange(32)[None])[0].float().square().mean().backward()
        counts.append(products.count)
    assert counts[1] - counts[0] == {"single": single, "batched": batched}
