"""The WKV6 operator: its contract, the checks of its arguments, the choice of a backend.

Shapes: B batch, T tokens, H heads, N head size, S packed sequences. The state is [H, value, key], as in
checkpoints.
"""

from functools import partial

import torch
from torch import Tensor

from src.errors import KernelError
from src.ops.products import Places
from src.ops.sequences import check_devices, check_state, check_tokens, lengths_of, run_branching, start_states
from src.ops.wkv6_chunked import wkv6_chunked
from src.ops.wkv6_cuda import CUDA_HEAD_SIZE, kernel_is_available, wkv6_branching_cuda, wkv6_cuda
from src.ops.wkv6_reference import wkv6_reference

BACKENDS = ("reference", "chunked", "cuda")


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_raw: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str | None = None,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-6's linear attention with a decay per token and channel, and a start state.

        y[t, i]  = Σ_j r[t, j] · (S[i, j] + u[j] · k[t, j] · v[t, i])
        S[i, j] <- exp(-exp(w_raw[t, j])) · S[i, j] + k[t, j] · v[t, i]

    for every head, i the value and j the key index. Right for every w_raw from -inf to +inf and every T >= 1.
    Gradients exist for r, k, v, w_raw, u and state, also those that enter by the final state; only those asked
    for are computed. The running state and every sum are float32 (float64 for float64 inputs); the CUDA kernel
    rounds operands of its matrix products to bfloat16.

    Args:
        r: receptance [B, T, H, N], bfloat16, float16, float32 or float64.
        k: key, as r.
        v: value, as r.
        w_raw: decay on the checkpoint's scale, as r.
        u: bonus of the current token [H, N], any float dtype.
        state: start state, float32 (float64 allowed for float64 inputs): [H, N, N] shared by all sequences, or
            one per sequence, [B, H, N, N], with cu_seqlens [S, H, N, N].
        cu_seqlens: int32 or int64 [S + 1], borders of the sequences packed into one row (then B == 1), from 0 to
            T, never falling, on r's device. A sequence of length 0 passes its state on. The CUDA kernel trusts
            the values (checking them would stop the GPU); the other backends check them.
        backend: "reference", "chunked" or "cuda"; None takes "cuda" for bfloat16 on a GPU at head size 64, else
            "reference" for a single token and "chunked" for more. Where the kernel cannot be built, None warns once,
            with the reason, and goes on as on a CPU.
        places: whose first three the kernel's gradients of r, k and v take.

    Returns:
        y [B, T, H, N] in r's dtype; final states [B or S, H, N, N], float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it.
        KernelError: the CUDA kernel was asked for and cannot be built, or cannot be launched.
    """
    if backend is None and r.dim() == 4 and _takes_kernel(r):
        try:
            return wkv6_cuda(r, k, v, w_raw, u, state, cu_seqlens, places=places)
        except RuntimeError:
            _check_arguments(r, k, v, w_raw, u, state, cu_seqlens)  # says what does not fit, if that is why
            raise
    sequences = _check_arguments(r, k, v, w_raw, u, state, cu_seqlens)
    if backend is None:
        backend = "cuda" if _takes_kernel(r) else "reference" if r.shape[1] == 1 else "chunked"
    if backend == "cuda":
        if not r.is_cuda or r.dtype != torch.bfloat16 or r.shape[3] != CUDA_HEAD_SIZE:
            raise KernelError(
                f"the CUDA kernel of wkv6 takes bfloat16 on a GPU at head size {CUDA_HEAD_SIZE}, got {r.dtype} "
                f'on {r.device} at head size {r.shape[3]}; use backend="chunked"'
            )
        return wkv6_cuda(r, k, v, w_raw, u, state, cu_seqlens)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)} or None")

    lengths = None if cu_seqlens is None else lengths_of(cu_seqlens, r.shape[1])
    run = wkv6_chunked if backend == "chunked" else wkv6_reference
    return run(r, k, v, w_raw, u, start_states(state, sequences), lengths)


def wkv6_branching(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_raw: Tensor,
    u: Tensor,
    state: Tensor,
    root_borders: Tensor,
    child_borders: Tensor,
    parents: Tensor,
    root_tokens: int,
    *,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv6` over a packed row whose later sequences continue the first ones, from their final states.

    Args:
        r, k, v, w_raw: [1, T, H, N], as for `wkv6`.
        u: [H, N].
        state: start state of the roots, [H, N, N] shared or [R, H, N, N].
        root_borders: int32 or int64 [R + 1], borders of the roots in the first tokens, from 0 to `root_tokens`.
        child_borders: as such [S + 1], borders of the sequences that continue roots in the other tokens, from 0.
        parents: int64 [S], the root that each of them continues.
        root_tokens: tokens of all roots, 0 to T.
        places: as for `wkv6`.

    Returns:
        y [1, T, H, N] in r's dtype; final states of the roots [R, H, N, N].

    Raises:
        ValueError: an argument does not fit; the message names it. From the kernel it is a RuntimeError.
        KernelError: the CUDA kernel cannot be launched.
    """
    if 0 < root_tokens < r.shape[1] and _takes_kernel(r):
        borders = (root_borders, child_borders)
        return wkv6_branching_cuda(r, k, v, w_raw, u, state, *borders, parents, root_tokens, places=places)
    tokens = {"r": r, "k": k, "v": v, "w_raw": w_raw}
    return run_branching(partial(wkv6, u=u), tokens, state, root_borders, child_borders, parents, root_tokens)


def _takes_kernel(r: Tensor) -> bool:
    fits = r.is_cuda and r.dtype == torch.bfloat16 and r.shape[3] == CUDA_HEAD_SIZE
    return fits and kernel_is_available(r.device)


def _check_arguments(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> int:
    """Raises ValueError naming the first argument that does not fit; returns the number of sequences."""
    check_tokens({"r": r, "k": k, "v": v, "w_raw": w_raw})
    if u.shape != r.shape[2:]:
        raise ValueError(f"u has shape {list(u.shape)}, expected [H, N] = {list(r.shape[2:])}")
    if not u.is_floating_point():
        raise ValueError(f"u is {u.dtype}, expected a float dtype")
    sequences = check_state(r, state, cu_seqlens)
    check_devices(r, {"k": k, "v": v, "w_raw": w_raw, "u": u, "state": state, "cu_seqlens": cu_seqlens})
    return sequences
