"""What the recurrent operators share: checks of their arguments, packed sequences, sequences that continue others.

Shapes: B batch, T tokens, H heads, N head size, S packed sequences. The state is [H, value, key].
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

TOKEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_tokens(tokens: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor that is not [B, T, H, N] in the first one's shape and dtype."""
    (first, like), *others = tokens.items()
    if like.dim() != 4 or 0 in like.shape:
        raise ValueError(f"{first} has shape {list(like.shape)}, expected [B, T, H, N] with no empty dimension")
    if like.dtype not in TOKEN_DTYPES:
        raise ValueError(f"{first} is {like.dtype}, expected bfloat16, float16, float32 or float64")
    for name, tensor in others:
        if tensor.shape != like.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {first}'s {list(like.shape)}")
        if tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {first}'s {like.dtype}")


def check_state(r: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> int:
    """Raises ValueError where cu_seqlens or state does not fit r [B, T, H, N]; returns the number of sequences."""
    sequences, _, heads, size = r.shape
    if cu_seqlens is not None:
        if sequences != 1:
            raise ValueError(f"r has batch size {sequences}, expected 1 when cu_seqlens packs the sequences")
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
    return sequences


def check_branches(child_borders: Tensor, parents: Tensor) -> None:
    """Raises ValueError where parents does not name one root for each sequence between the borders."""
    expected = [child_borders.numel() - 1]
    if list(parents.shape) != expected or parents.dtype != torch.int64 or parents.device != child_borders.device:
        raise ValueError(
            f"parents is {parents.dtype} {list(parents.shape)} on {parents.device}, expected int64 {expected} "
            f"on {child_borders.device}"
        )


def check_devices(r: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError naming the first of the others that is not on r's device."""
    for name, other in others.items():
        if other is not None and other.device != r.device:
            raise ValueError(f"{name} is on {other.device}, expected r's device {r.device}")


def start_states(state: Tensor, sequences: int) -> Tensor:
    """[H, N, N] shared, or one per sequence -> one per sequence [S, H, N, N]."""
    return state.expand(sequences, *state.shape) if state.dim() == 3 else state


def lengths_of(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """Sequence lengths in tokens; waits for the GPU when cu_seqlens lives there.

    Raises:
        ValueError: the borders fall somewhere, or do not run from 0 to `tokens`.
    """
    borders = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in pairwise(borders)]
    if borders[0] != 0 or borders[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"cu_seqlens is {borders}, expected borders that never fall, from 0 to T = {tokens}")
    return lengths


def run_branching(
    run: Callable[..., tuple[Tensor, Tensor]],
    tokens: Mapping[str, Tensor],
    state: Tensor,
    root_borders: Tensor,
    child_borders: Tensor,
    parents: Tensor,
    root_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Runs the roots of a packed row, then the sequences that continue them from their final states.

    Args:
        run: the operator, called with `tokens`, state and cu_seqlens by name; returns y and the final states.
        tokens: its tensors [1, T, H, N], by name.
        state: start state of the roots, [H, N, N] shared or [R, H, N, N].
        root_borders, child_borders, parents, root_tokens: as for `wkv6_branching`.

    Returns:
        y [1, T, H, N]; final states of the roots [R, H, N, N].
    """
    # Split, not sliced: the backward of two slices writes every gradient twice, into zeros, and adds.
    sizes = (root_tokens, tokens["r"].shape[1] - root_tokens)
    parts = {name: tensor.split(sizes, dim=1) for name, tensor in tokens.items()}
    outputs: list[Tensor] = []
    final = state.expand(root_borders.shape[0] - 1, *state.shape[-3:])
    if root_tokens:
        roots = {name: part[0] for name, part in parts.items()}
        y, final = run(**roots, state=state, cu_seqlens=root_borders)
        outputs.append(y)
    if sizes[1]:
        children = {name: part[1] for name, part in parts.items()}
        y, _ = run(**children, state=final.index_select(0, parents), cu_seqlens=child_borders)
        outputs.append(y)
    return torch.cat(outputs, dim=1), final
