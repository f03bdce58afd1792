"""How fused operators are held against their definitions: in bf16 against fp64, outputs and gradients."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# Rounding an exact result to bf16 gives a relative error (of the norm) of 0.0017 on many values, at most
# 2^-8 = 0.0039 on one; everything else is fp32.
BOUND, BOUND_OF_FEW = 2.5e-3, 4e-3
# Gradients of fp32 parameters are not rounded; the kernels compiled for a CPU are within 3e-7, __expf is less exact.
BOUND_OF_SUMS = 1e-5


def normal(*shape: int, seed: int = 0, device: str = "cuda") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def fresh_leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same memory as leaves that have no gradient accumulators yet.

    A step that is recorded takes its gradients at such: an accumulator that an earlier graph keeps alive belongs to
    that one's stream, and waiting for it cannot be recorded.
    """
    return [tensor.detach().requires_grad_() for tensor in tensors]


def error(ours: Tensor, reference: Tensor) -> float:
    """Relative error of the norm; NaN when anything is."""
    return ((ours.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-30)).item()


def wider(tensor: Tensor | None) -> Tensor:
    """An fp32 tensor that rounds to this one of bf16."""
    assert tensor is not None
    return tensor.float() * (1 + 2.0**-12)


def check_against(
    definition: Callable[..., object],
    fused: Callable[..., object],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[int],
    *rest: object,
    bound: float = BOUND,
    masters: Sequence[int] = (),
    bound_of_masters: float = BOUND_OF_SUMS,
) -> None:
    """Outputs and the gradients of `wanted` tensors, fused in bf16 against the definition in fp64.

    `masters` are fused as fp32 tensors that are not bf16 values but round to the ones given.
    """
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    results = []
    for function, dtype in ((fused, torch.bfloat16), (definition, torch.float64)):
        inputs = [None if t is None else t.detach().to(dtype, copy=True) for t in tensors]
        if function is fused:
            for index in masters:
                inputs[index] = wider(tensors[index])
        for index in wanted:
            tensor = inputs[index]
            assert tensor is not None
            tensor.requires_grad_()
        outputs = function(*inputs, *rest)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        grads = [normal(*output.shape, seed=100 + i, device=device).to(dtype) for i, output in enumerate(outputs)]
        if wanted:
            pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
            torch.autograd.backward(*zip(*pairs, strict=True))
        results.append([*outputs, *(inputs[index].grad for index in wanted)])
    is_master = [False] * len(outputs) + [index in masters for index in wanted]
    for position, (ours, reference, wide) in enumerate(zip(*results, is_master, strict=True)):
        assert ours.dtype == (torch.float32 if wide else torch.bfloat16)
        assert ours.shape == reference.shape
        of_narrow = bound if ours.numel() >= 256 else max(bound, BOUND_OF_FEW)
        largest = bound_of_masters if wide else of_narrow
        assert error(ours, reference) < largest, f"result {position}"
