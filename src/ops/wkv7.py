"""The WKV7 operator: its contract, the checks of its arguments, the choice of a backend.

Shapes: B batch, T tokens, H heads, N head size, S packed sequences. The state is [H, value, key], as in
checkpoints.
"""

import torch
from torch import Tensor

from src.errors import KernelError
from src.ops.sequences import (
    check_branches,
    check_devices,
    check_state,
    check_tokens,
    lengths_of,
    run_branching,
    start_states,
)
from src.ops.wkv7_chunked import wkv7_chunked
from src.ops.wkv7_cuda import CUDA_HEAD_SIZE, kernel_is_available, wkv7_branching_cuda, wkv7_cuda
from src.ops.wkv7_reference import wkv7_reference

BACKENDS = ("reference", "chunked", "cuda")


def wkv7(
    r: Tensor,
    w_raw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's linear attention: a decay per token and channel, a memory that corrects itself, and a start state.

        S[i, j] <- decay[t, j] · S[i, j] + (Σ_m S[i, m] · a[t, m]) · b[t, j] + v[t, i] · k[t, j]
        y[t, i]  = Σ_j S[i, j] · r[t, j]

    for every head, i the value and j, m the key index, with decay = exp(-exp(-1/2) · sigmoid(w_raw)). Unlike in
    RWKV-6, y reads the state after the token. A model gives a = -κ and b = κ times the in-context learning rate, κ
    of length 1 in each head. Right for every w_raw from -inf to +inf and every T >= 1. Gradients exist for all
    seven, also those that enter by the final state; only those asked for are computed. The running state and every
    sum are float32 (float64 for float64 inputs); the CUDA kernel rounds operands of its matrix products to tf32 or to
    bfloat16.

    Args:
        r: receptance [B, T, H, N], bfloat16, float16, float32 or float64.
        w_raw: decay before its sigmoid, as r.
        k: replacement key, as r.
        v: value, as r.
        a: what is read of the state before the token, as r.
        b: where the answer is written, as r.
        state: start state, float32 (float64 allowed for float64 inputs): [H, N, N] shared by all sequences, or
            one per sequence, [B, H, N, N], with cu_seqlens [S, H, N, N].
        cu_seqlens: int32 or int64 [S + 1], borders of the sequences packed into one row (then B == 1), from 0 to
            T, never falling, on r's device. A sequence of length 0 passes its state on. The CUDA kernel trusts
            the values (checking them would stop the GPU); the other backends check them.
        backend: "reference", "chunked" or "cuda"; None takes "cuda" for bfloat16 on a GPU at head size 64, else
            "reference" for a single token and "chunked" for more. Where the kernel cannot be built, None warns once,
            with the reason, and goes on as on a CPU.

    Returns:
        y [B, T, H, N] in r's dtype; final states [B or S, H, N, N], float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it.
        KernelError: the CUDA kernel was asked for and cannot be built.
    """
    tokens = {"r": r, "w_raw": w_raw, "k": k, "v": v, "a": a, "b": b}
    check_tokens(tokens)
    sequences = check_state(r, state, cu_seqlens)
    check_devices(r, {**tokens, "state": state, "cu_seqlens": cu_seqlens})
    if backend is None:
        backend = "cuda" if _takes_kernel(r) else "reference" if r.shape[1] == 1 else "chunked"
    if backend == "cuda":
        if not _fits_kernel(r):
            raise KernelError(
                f"the CUDA kernel of wkv7 takes bfloat16 on a GPU at head size {CUDA_HEAD_SIZE}, got {r.dtype} "
                f'on {r.device} at head size {r.shape[3]}; use backend="chunked"'
            )
        return wkv7_cuda(r, w_raw, k, v, a, b, state, cu_seqlens)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)} or None")

    lengths = None if cu_seqlens is None else lengths_of(cu_seqlens, r.shape[1])
    run = wkv7_chunked if backend == "chunked" else wkv7_reference
    return run(r, w_raw, k, v, a, b, start_states(state, sequences), lengths)


def wkv7_branching(
    r: Tensor,
    w_raw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    root_borders: Tensor,
    child_borders: Tensor,
    parents: Tensor,
    root_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`wkv7` over a packed row whose later sequences continue the first ones, from their final states.

    Args:
        r, w_raw, k, v, a, b: [1, T, H, N], as for `wkv7`.
        state: start state of the roots, [H, N, N] shared or [R, H, N, N].
        root_borders: int32 or int64 [R + 1], borders of the roots in the first tokens, from 0 to `root_tokens`.
        child_borders: as such [S + 1], borders of the sequences that continue roots in the other tokens, from 0.
        parents: int64 [S], the root that each of them continues.
        root_tokens: tokens of all roots, 0 to T.

    Returns:
        y [1, T, H, N] in r's dtype; final states of the roots [R, H, N, N].

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    tokens = {"r": r, "w_raw": w_raw, "k": k, "v": v, "a": a, "b": b}
    if 0 < root_tokens < r.shape[1] and _takes_kernel(r):
        check_tokens(tokens)
        check_state(r, state, root_borders)
        check_branches(child_borders, parents)
        check_devices(r, {**tokens, "state": state, "root_borders": root_borders, "child_borders": child_borders})
        borders = (root_borders, child_borders)
        return wkv7_branching_cuda(r, w_raw, k, v, a, b, state, *borders, parents, root_tokens)
    return run_branching(wkv7, tokens, state, root_borders, child_borders, parents, root_tokens)


def _fits_kernel(r: Tensor) -> bool:
    return r.is_cuda and r.dtype == torch.bfloat16 and r.shape[3] == CUDA_HEAD_SIZE


def _takes_kernel(r: Tensor) -> bool:
    return _fits_kernel(r) and kernel_is_available(r.device)
