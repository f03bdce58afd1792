"""The WKV6 operator: its contract, the checks of its arguments, the choice of a backend.

Shapes: B batch, T tokens, H heads, N head size, S packed sequences. The state is [H, value, key], as in
checkpoints.
"""

from itertools import pairwise

import torch
from torch import Tensor

from src.errors import KernelError
from src.ops.wkv6_chunked import wkv6_chunked
from src.ops.wkv6_cuda import CUDA_HEAD_SIZE, kernel_is_available, wkv6_branching_cuda, wkv6_cuda
from src.ops.wkv6_reference import wkv6_reference

BACKENDS = ("reference", "chunked", "cuda")
TOKEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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

    Returns:
        y [B, T, H, N] in r's dtype; final states [B or S, H, N, N], float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it.
        KernelError: the CUDA kernel was asked for and cannot be built, or cannot be launched.
    """
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

    lengths = None if cu_seqlens is None else _lengths(cu_seqlens, r.shape[1])
    starts = state.expand(sequences, *state.shape) if state.dim() == 3 else state
    run = wkv6_chunked if backend == "chunked" else wkv6_reference
    return run(r, k, v, w_raw, u, starts, lengths)


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

    Returns:
        y [1, T, H, N] in r's dtype; final states of the roots [R, H, N, N].

    Raises:
        ValueError: an argument does not fit; the message names it. From the kernel it is a RuntimeError.
        KernelError: the CUDA kernel cannot be launched.
    """
    if 0 < root_tokens < r.shape[1] and _takes_kernel(r):
        return wkv6_branching_cuda(r, k, v, w_raw, u, state, root_borders, child_borders, parents, root_tokens)
    # Split, not sliced: the backward of two slices writes every gradient twice, into zeros, and adds.
    sizes = (root_tokens, r.shape[1] - root_tokens)
    (r, r_children), (k, k_children) = r.split(sizes, dim=1), k.split(sizes, dim=1)
    (v, v_children), (w_raw, w_children) = v.split(sizes, dim=1), w_raw.split(sizes, dim=1)
    outputs: list[Tensor] = []
    final = state.expand(root_borders.shape[0] - 1, *state.shape[-3:])
    if root_tokens:
        y, final = wkv6(r, k, v, w_raw, u, state, root_borders)
        outputs.append(y)
    if sizes[1]:
        starts = final.index_select(0, parents)
        y, _ = wkv6(r_children, k_children, v_children, w_children, u, starts, child_borders)
        outputs.append(y)
    return torch.cat(outputs, dim=1), final


def _takes_kernel(r: Tensor) -> bool:
    fits = r.is_cuda and r.dtype == torch.bfloat16 and r.shape[3] == CUDA_HEAD_SIZE
    return fits and kernel_is_available(r.device)


def _check_arguments(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> int:
    """Raises ValueError naming the first argument that does not fit; returns the number of sequences."""
    if r.dim() != 4 or 0 in r.shape:
        raise ValueError(f"r has shape {list(r.shape)}, expected [B, T, H, N] with no empty dimension")
    batch, _, heads, size = r.shape
    if r.dtype not in TOKEN_DTYPES:
        raise ValueError(f"r is {r.dtype}, expected bfloat16, float16, float32 or float64")
    for name, tensor in (("k", k), ("v", v), ("w_raw", w_raw)):
        if tensor.shape != r.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected r's {list(r.shape)}")
        if tensor.dtype != r.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected r's {r.dtype}")
    if u.shape != (heads, size):
        raise ValueError(f"u has shape {list(u.shape)}, expected [H, N] = {[heads, size]}")
    if not u.is_floating_point():
        raise ValueError(f"u is {u.dtype}, expected a float dtype")

    sequences = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"r has batch size {batch}, expected 1 when cu_seqlens packs the sequences")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, expected [S + 1] with S >= 1")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"cu_seqlens is {cu_seqlens.dtype}, expected int32 or int64")
        sequences = cu_seqlens.numel() - 1
    shared = (heads, size, size)
    if state.shape != shared and state.shape != (sequences, *shared):
        raise ValueError(
            f"state has shape {list(state.shape)}, expected [H, value, key] = {list(shared)} or one per "
            f"sequence, {[sequences, *shared]}"
        )
    state_dtypes = (torch.float32, torch.float64) if r.dtype == torch.float64 else (torch.float32,)
    if state.dtype not in state_dtypes:
        raise ValueError(f"state is {state.dtype}, expected {' or '.join(map(str, state_dtypes))}")
    others = {"k": k, "v": v, "w_raw": w_raw, "u": u, "state": state, "cu_seqlens": cu_seqlens}
    for name, other in others.items():
        if other is not None and other.device != r.device:
            raise ValueError(f"{name} is on {other.device}, expected r's device {r.device}")
    return sequences


def _lengths(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """Sequence lengths in tokens; waits for the GPU when cu_seqlens lives there."""
    borders = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(borders)]
    if borders[0] != 0 or borders[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"cu_seqlens is {borders}, expected borders that never fall, from 0 to T = {tokens}")
    return lengths
