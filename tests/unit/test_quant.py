"""Frozen quantised linears: accuracy, gradients, what is kept, where it lives."""

import copy
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from src import quant
from src.config.model import QUANT_TYPES
from src.model.layers import Linear
from src.quant import DequantizationWorkspace, FrozenHead, FrozenLinear

pytest.importorskip("bitsandbytes")


def random_weight(out_features: int = 96, in_features: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def frozen(quant_type: str = "nf4", dtype: torch.dtype = torch.float32, **options: object) -> FrozenLinear:
    return FrozenLinear.from_weight(
        random_weight(), quant_type, dtype, **{"workspace": DequantizationWorkspace(), **options}
    )


# Relative error of normal weights, mean and deviation of 20 draws of 512x512 with bitsandbytes 0.50.2 on a CPU:
# nf4 0.0920 +- 0.0002, fp4 0.1219 +- 0.0002, int8 0.01082 +- 0.00003.
@pytest.mark.parametrize(
    ("quant_type", "expected"), [("nf4", 0.0920), ("fp4", 0.1219), ("4bit", 0.1219), ("int8", 0.01082)]
)
def test_dequantised_matrix_is_as_close_to_the_weight_as_its_type_allows(quant_type: str, expected: float) -> None:
    weight = random_weight(512, 512)
    dense = FrozenLinear.from_weight(
        weight, quant_type, torch.float32, workspace=DequantizationWorkspace()
    ).dequantized()
    error = ((dense - weight).norm() / weight.norm()).item()
    assert error == pytest.approx(expected, rel=0.02)


def test_4bit_is_fp4() -> None:
    assert torch.equal(frozen("4bit").dequantized(), frozen("fp4").dequantized())
    assert not torch.equal(frozen("4bit").dequantized(), frozen("nf4").dequantized())


@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 3, 128), (0, 128)])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_forward_and_backward_are_products_with_the_dense_matrix(quant_type: str, shape: tuple[int, ...]) -> None:
    layer = frozen(quant_type)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    dense = layer.dequantized()
    torch.testing.assert_close(y, x.detach() @ dense.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, dy @ dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradient_have_the_dtype_of_x(x_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    layer = frozen(dtype=compute_dtype)
    x = torch.randn(5, 128).to(x_dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x_dtype
    assert x.grad is not None
    assert x.grad.dtype == x_dtype
    assert layer.dequantized().dtype == compute_dtype


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "dense, stored wider", *QUANT_TYPES])
def test_products_add_themselves_to_what_is_there(kind: str, x_dtype: torch.dtype) -> None:
    if kind.startswith("dense"):
        layer: Linear | FrozenLinear = Linear(128, 96)
        layer.weight = nn.Parameter(random_weight().to(x_dtype if kind == "dense" else torch.float32))
        weight = layer.weight.detach()
    else:
        layer = frozen(kind, dtype=torch.float32)
        weight = layer.dequantized()
    x, grad = (random_weight(5, width, seed).to(x_dtype) for width, seed in ((128, 1), (96, 2)))
    y, grad_x = (10 * random_weight(5, width, seed).to(x_dtype) for width, seed in ((96, 3), (128, 4)))
    exact_y = y.double() + x.double() @ weight.double().t()
    exact_grad = grad.double() @ weight.double()
    exact_sum = grad_x.double() + exact_grad
    written = torch.full_like(grad_x, torch.nan)
    with torch.no_grad():
        layer.add_product(x, y)
        layer.add_gradient(grad, grad_x)
        layer.gradient_into(grad, written)
    tolerance = 1e-5 if x_dtype is torch.float32 else 1e-2
    for found, exact in ((y, exact_y), (grad_x, exact_sum), (written, exact_grad)):
        assert found.dtype is x_dtype
        assert (found - exact).norm() < tolerance * exact.norm()


def test_odd_sizes() -> None:
    weight = random_weight(7, 37)
    for quant_type in QUANT_TYPES:
        layer = FrozenLinear.from_weight(weight, quant_type, torch.float32, workspace=DequantizationWorkspace())
        x = torch.randn(2, 37)
        torch.testing.assert_close(layer(x), x @ layer.dequantized().t())
        assert ((layer.dequantized() - weight).norm() / weight.norm()).item() < 0.2


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_autograd_saves_nothing_and_the_weight_never_changes(quant_type: str, keep: bool) -> None:
    workspace = DequantizationWorkspace(keep)
    model = nn.Sequential(
        frozen(quant_type, workspace=workspace, kind="a"),
        nn.Tanh(),
        FrozenLinear.from_weight(random_weight(128, 96), quant_type, torch.float32, workspace=workspace, kind="b"),
    )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    start = nn.Parameter(torch.randn(4, 128))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        loss = model(start).square().sum()
    loss.backward()
    torch.optim.SGD([start], 0.1).step()

    activations = {(4, 96), (4, 128)}  # of tanh and of the square
    assert {tuple(t.shape) for t in saved} <= activations
    assert start.grad is not None
    assert not list(model.parameters())
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    for name, buffer in after.items():
        assert buffer.grad is None
        assert not buffer.requires_grad
        assert torch.equal(buffer, before[name]), name


def test_double_quantised_storage_is_4_127_bits_and_everything_is_a_buffer() -> None:
    layer = FrozenLinear.from_weight(
        random_weight(512, 512), "nf4", torch.bfloat16, workspace=DequantizationWorkspace()
    )
    stored = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert stored * 8 / 512**2 == pytest.approx(4.127, abs=0.001)
    held = {id(value) for value in vars(layer).values() if isinstance(value, Tensor)}
    assert not held, "a tensor outside the registered buffers would stay behind when the module moves"


def test_without_double_quantisation_the_absmax_is_exact() -> None:
    weight = random_weight()
    layer = FrozenLinear.from_weight(
        weight, "nf4", torch.float32, double_quantization=False, workspace=DequantizationWorkspace()
    )
    assert layer.absmax_scale is None
    torch.testing.assert_close(layer.absmax, weight.view(-1, 64).abs().amax(1))


def test_casting_the_module_leaves_the_quantisation_intact() -> None:
    layer = frozen()
    before = layer.dequantized()
    layer.to(torch.bfloat16)
    layer.to("cpu")
    assert torch.equal(layer.dequantized(), before)


def test_broadcasting_buffers_in_place_carries_the_matrix() -> None:
    source = frozen()
    other = FrozenLinear.from_weight(random_weight(seed=1), "nf4", torch.float32, workspace=DequantizationWorkspace())
    other(torch.randn(1, 128))
    for mine, theirs in zip(other.buffers(), source.buffers(), strict=True):
        mine.copy_(theirs)
    assert torch.equal(other.dequantized(), source.dequantized())


def test_a_copy_computes_the_same() -> None:
    layer = frozen()
    x = torch.randn(3, 128)
    twin = copy.deepcopy(layer)
    assert twin.packed is not layer.packed
    assert torch.equal(twin(x), layer(x))


def test_one_buffer_serves_all_layers() -> None:
    workspace = DequantizationWorkspace()
    first = frozen(workspace=workspace, kind="key")
    second = FrozenLinear.from_weight(random_weight(32, 64, 1), "nf4", torch.float32, workspace=workspace, kind="value")
    dense = first.shared_dense()
    again = second.shared_dense()
    assert dense.data_ptr() == again.data_ptr()
    assert sum(buffer.nbytes for buffer in workspace.buffers()) == 96 * 128 * 4
    assert torch.equal(first.shared_dense(), first.dequantized())
    workspace.clear()
    assert not workspace.buffers()
    workspace.reserve([second, first])
    assert sum(buffer.nbytes for buffer in workspace.buffers()) == 96 * 128 * 4
    (buffer,) = workspace.buffers()
    buffer.fill_(7)
    assert (second.shared_dense() == 7).all(), "found again, as the last that was dequantised"
    workspace.forget()
    assert torch.equal(second.shared_dense(), second.dequantized())


def test_matrices_are_dequantised_once_until_another_takes_their_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workspace = DequantizationWorkspace(keep_dequantized=True)
    layers = [
        FrozenLinear.from_weight(random_weight(seed=seed), "nf4", torch.float32, workspace=workspace, kind=kind)
        for seed, kind in enumerate(["key", "value", "key"])
    ]
    filled: list[int] = []
    original = FrozenLinear.fill
    monkeypatch.setattr(
        FrozenLinear,
        "fill",
        lambda self, dense: (filled.append(layers.index(self)), original(self, dense))[1],
    )
    for index in (0, 1, 0, 1, 2, 2, 0):
        held = layers[index].shared_dense()
        expected = torch.empty_like(held)
        original(layers[index], expected)
        assert torch.equal(held, expected)
    assert filled == [0, 1, 2, 0]

    workspace.keep_dequantized = False
    filled.clear()
    for index in (0, 0, 1, 0):
        layers[index].shared_dense()
    assert filled == [0, 1, 0]
    layers[0].packed.add_(1)
    assert torch.equal(layers[0].shared_dense(), layers[0].dequantized())


def test_a_failed_dequantisation_is_not_taken_for_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = DequantizationWorkspace(keep_dequantized=True)
    layer = frozen(workspace=workspace)
    with monkeypatch.context() as broken:
        broken.setattr(FrozenLinear, "fill", lambda self, dense: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer.shared_dense()
    assert torch.equal(layer.shared_dense(), layer.dequantized())


class Filled:
    """Takes the kernels' place: notes whose matrices are written by a launch, and writes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layers: list[FrozenLinear]) -> None:
        self.launches: list[list[int]] = []
        self.fails = False

        def described(layer: FrozenLinear) -> SimpleNamespace:
            return SimpleNamespace(layer=layer, filler=lambda dense: filler([described(layer)], [dense]))

        def filler(matrices: list[SimpleNamespace], dense: list[Tensor]) -> Callable[[], None]:
            numbers = [layers.index(matrix.layer) for matrix in matrices]

            def fill() -> None:
                self.launches.append(numbers)
                for matrix, values in zip(matrices, dense, strict=True):
                    if self.fails:
                        raise RuntimeError("a launch failed")
                    FrozenLinear._fill_by_bitsandbytes(matrix.layer, values)

            return fill

        monkeypatch.setattr(FrozenLinear, "packed_matrix", described)
        monkeypatch.setattr(quant, "filler", filler)


def time_mix(workspace: DequantizationWorkspace, kinds: tuple[str, ...], seed: int) -> list[FrozenLinear]:
    return [
        FrozenLinear.from_weight(random_weight(seed=seed + i), "nf4", torch.float32, workspace=workspace, kind=kind)
        for i, kind in enumerate(kinds)
    ]


def dense_of(layer: FrozenLinear) -> Tensor:
    dense = torch.empty(layer.out_features, layer.in_features, dtype=layer.compute_dtype)
    layer._fill_by_bitsandbytes(dense)
    return dense


def test_matrices_with_buffers_of_their_own_are_dequantised_by_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = DequantizationWorkspace(keep_dequantized=True)
    layers = time_mix(workspace, ("r", "k", "v"), 0) + time_mix(workspace, ("r", "k", "v"), 3)
    filled = Filled(monkeypatch, layers)
    first, second = layers[:3], layers[3:]

    def used(group: list[FrozenLinear]) -> None:
        workspace.fill_together(group)
        for layer in group:
            assert torch.equal(layer.shared_dense(), dense_of(layer))

    for group in (first, first, second, first):
        used(group)
    assert filled.launches == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert len(workspace.buffers()) == 3

    filled.launches.clear()
    layers[4].shared_dense()  # one of them has another's place
    used(first)
    layers[1].packed.add_(1)
    used(first)
    workspace.forget()
    used(first)
    assert filled.launches == [[4], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    workspace.clear()
    assert not workspace.buffers()
    used(first)
    assert len(workspace.buffers()) == 3


def test_a_failed_launch_of_several_leaves_nothing_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = DequantizationWorkspace(keep_dequantized=True)
    layers = time_mix(workspace, ("r", "k"), 0)
    filled = Filled(monkeypatch, layers)
    workspace.fill_together(layers)
    workspace.forget()
    filled.fails = True
    with pytest.raises(RuntimeError, match="a launch failed"):
        workspace.fill_together(layers)
    filled.fails = False
    filled.launches.clear()
    for layer in layers:
        assert torch.equal(layer.shared_dense(), dense_of(layer))
    assert filled.launches == [[0], [1]]


@pytest.mark.parametrize("case", ["one buffer", "one kind", "one kind that grows", "no kernel", "too many"])
def test_what_shares_a_buffer_or_has_no_kernel_is_dequantised_one_by_one(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = DequantizationWorkspace(keep_dequantized=case != "one buffer")
    kinds = {"one kind": ("r", "r"), "too many": tuple("abcdef")}.get(case, ("r", "k"))
    layers = time_mix(workspace, kinds, 0)
    if case == "one kind that grows":  # the first one's buffer is given up for the second one's
        larger = random_weight(192, 128, seed=1)
        layers[1] = FrozenLinear.from_weight(larger, "nf4", torch.float32, workspace=workspace, kind="r")
    filled = Filled(monkeypatch, layers)
    if case == "no kernel":
        monkeypatch.setattr(FrozenLinear, "packed_matrix", lambda self: None)
    workspace.fill_together(layers)
    assert filled.launches == []
    for layer in layers:
        assert torch.equal(layer.shared_dense(), dense_of(layer))
    assert filled.launches == ([] if case == "no kernel" else [[i] for i in range(len(layers))])


def test_what_a_workspace_frees_is_free_though_layers_know_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = DequantizationWorkspace(keep_dequantized=True)
    layers = time_mix(workspace, ("r", "k"), 0)
    Filled(monkeypatch, layers)
    workspace.fill_together(layers)
    kept = [weakref.ref(buffer) for buffer in workspace.buffers()]
    workspace.clear()
    assert [reference() for reference in kept] == [None, None]


def test_a_layer_that_is_replaced_gives_its_memory_back_at_once() -> None:
    layer = frozen(workspace=(workspace := DequantizationWorkspace()))
    layer.shared_dense()
    gone = weakref.ref(layer.packed)
    del layer
    assert gone() is None
    assert len(workspace.buffers()) == 1


@pytest.mark.parametrize("keep", [False, True])
def test_checkpointed_layers_give_the_same_gradient(keep: bool) -> None:
    def gradient(checkpointed: bool) -> Tensor:
        workspace = DequantizationWorkspace(keep)
        blocks = [
            nn.Sequential(
                FrozenLinear.from_weight(
                    random_weight(seed=2 * i), "nf4", torch.float32, workspace=workspace, kind="k"
                ),
                nn.Tanh(),
                FrozenLinear.from_weight(
                    random_weight(128, 96, 2 * i + 1), "nf4", torch.float32, workspace=workspace, kind="v"
                ),
            )
            for i in range(3)
        ]
        start = torch.ones(2, 128, requires_grad=True)
        x: Tensor = start
        for block in blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        x.sum().backward()
        assert start.grad is not None
        return start.grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_packed_head_is_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "_HEAD_PART_VALUES", 40 * 128)
    weight = random_weight(96, 128)
    head = FrozenHead.from_weight(weight, "nf4", torch.float32, DequantizationWorkspace())
    assert [part.out_features for part in head.parts] == [40, 40, 16]
    dense = torch.cat([part().clone() for part in head.dense_parts()])
    assert (dense - weight).norm() < 0.1 * weight.norm()
    x = torch.randn(2, 3, 128, requires_grad=True)
    torch.testing.assert_close(head(x), x @ dense.t())
    assert not list(head.parameters())


def unpacked(layer: FrozenLinear) -> Tensor:
    """The matrix of a 4-bit layer, fp32, read from its bytes by the format's definition alone."""
    assert layer.absmax_scale is not None
    assert layer.absmax_offset is not None
    places = torch.stack((layer.packed.view(-1) >> 4, layer.packed.view(-1) & 15), dim=1).view(-1).long()
    values = torch.tensor(FOUR_BIT_VALUES[layer.quant_type])[places][: layer.out_features * layer.in_features]
    scales = quant._dynamic_code(layer.absmax.device)[layer.absmax.long()]
    scales = scales * layer.absmax_scale.repeat_interleave(256)[: len(scales)] + layer.absmax_offset
    return (values * scales.repeat_interleave(64)[: len(values)]).view(layer.out_features, layer.in_features)


# QLoRA, arXiv 2305.14314, appendix E; fp4: sign, two bits of exponent, one of mantissa, in bitsandbytes' order.
FP4_MAGNITUDES = (0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FOUR_BIT_VALUES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*FP4_MAGNITUDES, *(-value for value in FP4_MAGNITUDES)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [1, 2, 7, 16, 30, 32, 33, 37, 64, 96, 100, 192, 336, 672, 1000])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_size_is_dequantised_as_the_format_says(quant_type: str, in_features: int, dtype: torch.dtype) -> None:
    expected_error = 0.0920 if quant_type == "nf4" else 0.1219
    for out_features in (1, 3, 64, 96, 192):
        weight = random_weight(out_features, in_features)
        layer = FrozenLinear.from_weight(weight, quant_type, dtype, workspace=DequantizationWorkspace())
        dense, expected = layer.dequantized(), unpacked(layer)
        # 4.1e-8 was the most in fp32; half a unit in the last place of the others.
        torch.testing.assert_close(dense.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
        if weight.numel() > 10_000:
            assert ((expected - weight).norm() / weight.norm()).item() == pytest.approx(expected_error, rel=0.05)
