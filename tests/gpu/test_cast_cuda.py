"""Tensors rounded to bf16 at once, on a GPU: bitwise those of torch, recorded and not."""

import pytest
import torch

from src.ops import cast
from src.ops.products import behind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("sizes", [(1,), (4096, 4097, 8, 5), tuple(range(1, 70)), (0, 64 * 2560, 2560 * 64, 7 * 2**20)])
def test_every_bit_is_torchs(sizes: tuple[int, ...], shift: int) -> None:
    whole = torch.randn(sum(sizes) + 3, device="cuda")
    tensors = list(whole[shift : shift + sum(sizes)].split(sizes))
    outputs = [torch.full((size + 8,), torch.nan, device="cuda", dtype=torch.bfloat16) for size in sizes]
    run = cast.caster(tensors, [output[:size] for output, size in zip(outputs, sizes, strict=True)])
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for again in (run, graph.replay):
        whole.mul_(-0.7)
        again()
        for tensor, output, size in zip(tensors, outputs, sizes, strict=True):
            assert torch.equal(output[:size], tensor.bfloat16())
            assert output[size:].isnan().all()


@pytest.mark.parametrize(("columns", "stride"), [(64, 96), (12, 96), (64, 101)])
def test_a_matrix_is_cast_to_where_its_rows_stand_apart(columns: int, stride: int) -> None:
    """Also where not every row begins where a vector may."""
    tensor, whole = torch.randn(5000, columns, device="cuda"), torch.zeros(5000, stride, device="cuda").bfloat16()
    cast.caster([tensor], [behind(whole[:, :32], columns)])()
    assert torch.equal(whole[:, 32 : 32 + columns], tensor.bfloat16())
    assert whole.count_nonzero() == tensor.bfloat16().count_nonzero()
