"""The dequantisation kernel against bitsandbytes, and the frozen linear on a GPU."""

import copy

import pytest
import torch
from fused_operators import fresh_leaves
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src import quant
from src.config.model import QUANT_TYPES
from src.quant import DequantizationWorkspace, FrozenLinear

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator, device="cuda").bfloat16()


def frozen(out_features: int = 96, in_features: int = 128, quant_type: str = "nf4", **options: object) -> FrozenLinear:
    seed = int(options.pop("seed", 0))  # type: ignore[call-overload]
    return FrozenLinear.from_weight(
        random_weight(out_features, in_features, seed),
        quant_type,
        torch.bfloat16,
        **{"workspace": DequantizationWorkspace(), **options},
    )


def by_bitsandbytes(layer: FrozenLinear) -> Tensor:
    dense = torch.empty(layer.out_features, layer.in_features, dtype=torch.bfloat16, device="cuda")
    layer._fill_by_bitsandbytes(dense)
    return dense


@pytest.mark.parametrize("shape", [(1, 8), (3, 8), (8, 37), (96, 128), (2048, 2048), (1000, 1064), (14336, 4096)])
@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_bit_is_bitsandbytes(quant_type: str, double_quantization: bool, shape: tuple[int, int]) -> None:
    layer = frozen(*shape, quant_type, double_quantization=double_quantization)
    matrix = layer.packed_matrix()
    assert matrix is not None
    ours = torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    matrix.fill(ours)
    assert torch.equal(ours.view(torch.int16), by_bitsandbytes(layer).view(torch.int16))
    assert torch.equal(layer.dequantized(), ours)


def test_every_code_is_bitsandbytes() -> None:
    for quant_type in QUANT_TYPES:
        layer = frozen(64, 256, quant_type)
        layer.packed.copy_(torch.arange(layer.packed.numel(), device="cuda").to(torch.uint8))
        assert torch.equal(layer.dequantized().view(torch.int16), by_bitsandbytes(layer).view(torch.int16))


def test_sizes_that_are_no_whole_vectors_take_bitsandbytes() -> None:
    layer = frozen(3, 5)
    assert layer.packed_matrix() is None
    x = torch.randn(2, 5, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), x @ layer.dequantized().t())


@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_forward_and_backward_are_products_with_the_dense_matrix(quant_type: str, leading: tuple[int, ...]) -> None:
    layer = frozen(quant_type=quant_type)
    x = torch.randn(*leading, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    dense = layer.dequantized()
    assert not saved
    torch.testing.assert_close(y, x.detach() @ dense.t())
    torch.testing.assert_close(x.grad, dy @ dense)


def test_without_gradient_no_graph_is_built() -> None:
    layer = frozen()
    assert not layer(torch.randn(2, 128, device="cuda", dtype=torch.bfloat16)).requires_grad
    x = torch.randn(2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_fp32_input_computes_in_bf16_and_gets_an_fp32_gradient() -> None:
    layer = frozen()
    x = torch.randn(4, 128, device="cuda", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(y, (x.detach().bfloat16() @ layer.dequantized().t()).float())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_share_buffers(checkpointed: bool, keep: bool) -> None:
    """Gradients as with dense matrices of their own; packed bytes untouched; no more buffers than promised."""
    workspace = DequantizationWorkspace(keep)
    options = {"workspace": workspace}
    blocks = [
        nn.Sequential(
            frozen(96, 128, seed=2 * i, kind="key", **options),
            nn.Tanh(),
            frozen(128, 96, seed=2 * i + 1, kind="value", **options),
        )
        for i in range(3)
    ]
    before = [buffer.clone() for block in blocks for buffer in block.buffers()]

    def gradient(dense: bool) -> Tensor:
        start = torch.linspace(-1, 1, 7 * 128, device="cuda").view(7, 128).bfloat16().requires_grad_()
        x: Tensor = start
        for block in blocks:
            if dense:
                x = torch.tanh(x @ block[0].dequantized().t()) @ block[2].dequantized().t()
            elif checkpointed:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x.float().square().sum().backward()
        assert start.grad is not None
        return start.grad

    assert torch.equal(gradient(dense=False), gradient(dense=True))
    assert sum(buffer.nbytes for buffer in workspace.buffers()) == 96 * 128 * 2 * (2 if keep else 1)
    after = [buffer for block in blocks for buffer in block.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    workspace.keep_dequantized = not keep
    assert not workspace.buffers()
    assert torch.equal(gradient(dense=False), gradient(dense=True))
    assert sum(buffer.nbytes for buffer in workspace.buffers()) == 96 * 128 * 2 * (1 if keep else 2)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_several_at_once_are_what_each_is_alone(quant_type: str, double_quantization: bool, count: int) -> None:
    workspace = DequantizationWorkspace(keep_dequantized=True)
    options = {"workspace": workspace, "double_quantization": double_quantization}
    layers = [frozen(96 + 40 * i, 1024, quant_type, seed=i, kind=str(i), **options) for i in range(count)]
    exact = [layer.dequantized() for layer in layers]

    def places() -> list[Tensor]:
        return [layer.place.dense for layer in layers]

    workspace.fill_together(layers)
    for recorded in (False, True):
        if recorded:
            workspace.forget()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                workspace.fill_together(layers)
            for dense in places():
                dense.fill_(torch.nan)
            graph.replay()
        assert all(torch.equal(dense, expected) for dense, expected in zip(places(), exact, strict=True))


@pytest.mark.parametrize("keep", [False, True])
def test_a_cuda_graph_replays_forward_and_backward(keep: bool) -> None:
    """The workspace is cleared before the capture, so that the graph holds every dequantisation it needs."""
    workspace = DequantizationWorkspace(keep)
    layers = [frozen(128, 128, seed=i, kind="key", workspace=workspace) for i in range(2)]
    x = torch.randn(5, 128, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[Tensor, Tensor]:
        (leaf,) = fresh_leaves([x])
        y = layers[1](torch.tanh(layers[0](leaf)))
        return y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    workspace.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    workspace.clear()
    x.copy_(torch.randn(5, 128, device="cuda"))
    eager = step()
    graph.replay()
    for ours, expected in zip(captured, eager, strict=True):
        assert torch.equal(ours, expected)


def test_a_larger_matrix_enlarges_the_buffer() -> None:
    workspace = DequantizationWorkspace()
    small, large = frozen(8, 64, workspace=workspace), frozen(64, 128, workspace=workspace)
    for layer in (small, large, small):
        assert torch.equal(layer.shared_dense(), layer.dequantized())
    assert sum(buffer.nbytes for buffer in workspace.buffers()) == 64 * 128 * 2


def test_modules_move_and_copy() -> None:
    weight = random_weight(96, 128).cpu()
    layer = FrozenLinear.from_weight(weight, "nf4", torch.bfloat16, workspace=DequantizationWorkspace())
    on_host = layer.dequantized()
    layer.to("cuda")
    x = torch.randn(2, 128, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    torch.testing.assert_close(layer.dequantized().cpu(), on_host)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    # A broadcast writes into the buffers in place.
    other = frozen(seed=1)
    other(x)
    for mine, theirs in zip(other.buffers(), layer.buffers(), strict=True):
        mine.copy_(theirs)
    assert torch.equal(other(x), y)
    layer.to("cpu")
    assert layer(x.cpu()).device.type == "cpu"


def test_wrong_arguments_are_named() -> None:
    layer = frozen()
    with pytest.raises(RuntimeError, match=r"x has shape \[2, 64\]"):
        layer(torch.randn(2, 64, device="cuda", dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"is on cpu, expected"):
        layer(torch.randn(2, 128, dtype=torch.bfloat16))
    x = torch.randn(2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_running_out_of_memory_keeps_its_type() -> None:
    layer = frozen()
    free, _ = torch.cuda.mem_get_info()
    x = torch.empty(1, 128, device="cuda", dtype=torch.bfloat16).expand(free // 96, 128)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        layer(x)


def test_without_the_kernel_bitsandbytes_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = frozen().dequantized()
    monkeypatch.setattr(quant, "dequantization_kernels", lambda device: False)
    layer = frozen()
    assert torch.equal(layer.dequantized(), expected)
    assert layer.packed_matrix() is None
    assert torch.equal(layer.shared_dense(), expected)
