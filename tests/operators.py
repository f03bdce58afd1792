"""What tests of the recurrent operators share: gradients by name, errors, memory that shows what was forgotten."""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def run_with_gradients(
    operator: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    backend: str,
    cu_seqlens: Tensor | None = None,
    *,
    final_gradient: bool = True,
    seed: int = 1,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """y, final state and the gradients of the wanted inputs (None: all) under one fixed random cotangent."""
    leaves = {name: tensor.clone() for name, tensor in inputs.items()}
    sources = [leaf.requires_grad_() for name, leaf in leaves.items() if wanted is None or name in wanted]
    y, final = operator(**leaves, cu_seqlens=cu_seqlens, backend=backend)
    loss = (y.double() * cotangent(y.shape, seed).to(y.device)).sum()
    if final_gradient:
        loss = loss + (final.double() * cotangent(final.shape, seed + 1).to(y.device)).sum()
    gradients = torch.autograd.grad(loss, sources, materialize_grads=True)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    return {"y": y, "final state": final, **{f"d{n}": g for n, g in zip(names, gradients, strict=True)}}


def cotangent(shape: torch.Size, seed: int = 1) -> Tensor:
    """Exact in every dtype, so that only the backward is compared."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def relative_rms(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-300))


def assert_close(results: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: relative_rms(results[name], truth[name]) for name in truth}
    assert all(error <= tolerance for error in errors.values()), errors


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty starts as NaN, so that an element nothing writes is noticed."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def median_seconds(run: Callable[[], None], repeats: int) -> float:
    """Of processor time on one thread, which other programs on the machine do not lengthen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
        times = []
        for _ in range(repeats):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return sorted(times)[repeats // 2]
    finally:
        torch.set_num_threads(threads)
