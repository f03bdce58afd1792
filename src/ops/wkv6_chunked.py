"""The WKV6 operator in tiles of tokens, in plain torch: the CPU path, and any GPU without a built kernel.

Shapes: B batch, T tokens, H heads, N head size, S sequences, M tiles, L tile length. States are
[..., value, key].

A tile is L tokens of one sequence. Everything inside a tile is a batched matrix product over all tiles and
heads; only the state walks from tile to tile. Between tokens j < i of a tile lies the decay product

    D[i, j] = Π_{j < m < i} decay[m],

which is never formed as an exponent of a difference or as a quotient (both fail for strong decays). Instead
the tile is halved again and again: at the level with blocks of s tokens, a pair whose ends lie in the two
blocks of one block of 2s has D[i, j] = q[j] · p[i], where q multiplies the decays after j to the end of its
block and p those from the start of i's block to before i. Both are products of numbers in [0, 1], so they are
right for every w_raw, and each pair belongs to exactly one level. The gradient of w_raw sums, for each token,
the pairs that span it, each kind of pair on its own; nothing is subtracted, so nothing cancels.

Memory: the forward saves its inputs and one state per span of `SPAN_TOKENS` tokens; the backward recomputes a
span at a time. Accumulation in float32 (float64 for float64 inputs).
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.ops.tiling import Tiling, plan_tiles
from src.ops.wkv6_reference import W_RAW_LIMIT

TILE_TOKENS = 16  # power of two; matrix work inside a tile grows with it, the number of states shrinks with it
SPAN_TOKENS = 1024  # tokens of one sequence whose intermediate values exist at the same time

PADDING_W_RAW = -torch.inf  # decay 1: with r = k = v = 0 a padding token changes nothing


@dataclass(frozen=True)
class _Decays:
    """Decay products of tiles; each tensor [M, H, L, N], values in [0, 1]."""

    levels: tuple[tuple[Tensor, Tensor], ...]  # (p, q) for blocks of 1, 2, 4, ... L/2 tokens; level 0 is all ones
    before: Tensor  # decays from the tile's start to before the token
    after: Tensor  # decays after the token to the tile's end
    whole: Tensor  # [M, H, 1, N]: all of the tile


def _decay_products(w_raw: Tensor, *, with_levels: bool) -> _Decays:
    shape = w_raw.shape
    whole = torch.exp(-torch.exp(w_raw.clamp(max=W_RAW_LIMIT)))
    before = after = torch.ones_like(whole)
    levels = []
    size = 1
    while size < TILE_TOKENS:
        if with_levels:
            levels.append((before, after))
        halves = (*shape[:2], TILE_TOKENS // (2 * size), 2, size, shape[3])
        block = (*shape[:2], TILE_TOKENS // (2 * size), 2, 1, shape[3])
        totals = whole.view(block)
        next_before, next_after = before.clone().view(halves), after.clone().view(halves)
        next_before[:, :, :, 1].mul_(totals[:, :, :, 0])
        next_after[:, :, :, 0].mul_(totals[:, :, :, 1])
        before, after = next_before.view(shape), next_after.view(shape)
        whole = totals.prod(3)
        size *= 2
    return _Decays(tuple(levels), before, after, whole.reshape(*shape[:2], 1, shape[3]))


def _level_masks(like: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """For each level, [L, L]: 1 where (i, j) is a pair of it; 1 where i > t lie in one block."""
    if like.device.type == "cpu":
        return _level_masks_on_cpu(like.dtype)
    return _made_level_masks(like.dtype, like.device)


@functools.cache
def _level_masks_on_cpu(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
    return _made_level_masks(dtype, torch.device("cpu"))


def _made_level_masks(dtype: torch.dtype, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
    token = torch.arange(TILE_TOKENS, device=device)
    row, column = token[:, None], token[None, :]
    masks = []
    size = 1
    while size < TILE_TOKENS:
        pair = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
        later = (row // size == column // size) & (column > row)
        masks.append((pair.to(dtype), later.to(dtype)))
        size *= 2
    return tuple(masks)


def _pair_weights(r: Tensor, k: Tensor, u: Tensor, decays: _Decays) -> Tensor:
    """A [M, H, L, L]: how much value j adds to output i, through pairs inside the tile."""
    weights = torch.diag_embed((r * u[:, None] * k).sum(-1))
    for (p, q), (pair, _) in zip(decays.levels, _level_masks(r), strict=True):
        weights += pair * ((r * p) @ (k * q).mT)
    return weights


def _scan(start: Tensor, whole: Tensor, added: Tensor, steps: Iterable[slice]) -> tuple[Tensor, Tensor]:
    """What walks from tile to tile: S <- whole · S + added.

    Returns:
        The state before each tile [M, H, V, K], and the states [S, H, V, K] after the last step; with the steps in
        reverse, the gradient of the state after each tile, and of the states before the first.
    """
    running = start.clone()
    met = torch.empty_like(added)
    for tiles in steps:
        first = running[: tiles.stop - tiles.start]
        met[tiles] = first
        first.mul_(whole[tiles]).add_(added[tiles])
    return met, running


class _ChunkedWKV6(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, tiling: Tiling
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        running = state.to(dtype)[tiling.order]
        bonus = u.to(dtype)
        y = torch.empty(r.shape, dtype=r.dtype, device=r.device)
        span_starts = []
        for span in tiling.spans:
            r_tile, k_tile, v_tile = (tiling.read(x, span, dtype) for x in (r, k, v))
            decays = _decay_products(tiling.read(w_raw, span, dtype, PADDING_W_RAW), with_levels=True)
            span_starts.append(running)
            states, running = _scan(running, decays.whole, v_tile.mT @ (k_tile * decays.after), span.steps)
            y_tile = (r_tile * decays.before) @ states.mT
            y_tile += _pair_weights(r_tile, k_tile, bonus, decays) @ v_tile
            tiling.write(y_tile, span, y)
        ctx.tiling = tiling
        ctx.save_for_backward(r, k, v, w_raw, u, *span_starts)
        ctx.state_dtype = state.dtype
        final = torch.empty_like(running)
        final[tiling.order] = running
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, w_raw, u, *span_starts = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        *need_tokens, need_u, need_state, _ = ctx.needs_input_grad
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        dend = dfinal.to(dtype)[tiling.order]
        bonus = u.to(dtype)
        only_state = not (any(need_tokens) or need_u)
        gradients = [torch.empty(r.shape, dtype=r.dtype, device=r.device) if need else None for need in need_tokens]
        du = torch.zeros_like(bonus)

        for span, start in zip(reversed(tiling.spans), reversed(span_starts), strict=True):
            r_tile, dy_tile = tiling.read(r, span, dtype), tiling.read(dy, span, dtype)
            w_tile = tiling.read(w_raw, span, dtype, PADDING_W_RAW)
            decays = _decay_products(w_tile, with_levels=not only_state)
            before, after, whole = decays.before, decays.after, decays.whole
            dstates, dend = _scan(dend, whole, dy_tile.mT @ (r_tile * before), reversed(span.steps))
            if only_state:
                continue

            k_tile, v_tile = tiling.read(k, span, dtype), tiling.read(v, span, dtype)
            k_after = k_tile * after
            states, _ = _scan(start, whole, v_tile.mT @ k_after, span.steps)
            dpairs = torch.tril(dy_tile @ v_tile.mT)  # gradient of A
            diagonal = dpairs.diagonal(dim1=-2, dim2=-1)[..., None]
            pairs = _pair_weights(r_tile, k_tile, bonus, decays)
            dv = pairs.mT @ dy_tile + k_after @ dstates.mT

            dr = before * (dy_tile @ states)  # through the state before the tile
            dk = after * (v_tile @ dstates)  # through the state after it
            later = torch.ones_like(pairs[0, 0]).triu(1)
            dlog = whole * (states * dstates).sum(2, keepdim=True)  # pairs that span the whole tile
            dlog = dlog + later @ (r_tile * dr) + later.mT @ (k_tile * dk)
            for (p, q), (pair, later) in zip(decays.levels, _level_masks(r_tile), strict=True):
                level_dpairs = pair * dpairs
                level_dr = p * (level_dpairs @ (k_tile * q))
                level_dk = q * (level_dpairs.mT @ (r_tile * p))
                dr += level_dr
                dk += level_dk
                dlog += later @ (r_tile * level_dr) + later.mT @ (k_tile * level_dk)
            du += (diagonal * r_tile * k_tile).sum((0, 2))
            dr = dr + diagonal * bonus[:, None] * k_tile
            dk = dk + diagonal * bonus[:, None] * r_tile
            dw = -torch.exp(w_tile.clamp(max=W_RAW_LIMIT)) * dlog
            for gradient, tiles in zip(gradients, (dr, dk, dv, dw), strict=True):
                if gradient is not None:
                    tiling.write(tiles, span, gradient)

        dstate = None
        if need_state:
            dstate = torch.empty_like(dend)
            dstate[tiling.order] = dend
            dstate = dstate.to(ctx.state_dtype)
        return *gradients, du.to(u.dtype) if need_u else None, dstate, None


def wkv6_chunked(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Computes what `wkv6_reference` defines, tile by tile; same arguments, same results.

    Args:
        r, k, v, w_raw: [B, T, H, N], float.
        u: [H, N].
        state: one start state per sequence [B or S, H, N, N], (value, key).
        lengths: tokens of each packed sequence (then B == 1); None for a dense batch.

    Returns:
        y [B, T, H, N] in r's dtype, and the final states [B or S, H, N, N] in the accumulation dtype.

    Source: Yang et al. 2024, "Gated Linear Attention" (arXiv 2312.06635), section 4, for the chunked form;
    the halving of tiles replaces its secondary chunks.
    """
    batch, tokens = r.shape[:2]
    tiling = plan_tiles(
        (tokens,) * batch if lengths is None else lengths,
        batch,
        r.device,
        tile_tokens=TILE_TOKENS,
        span_tokens=SPAN_TOKENS,
    )
    y, final = _ChunkedWKV6.apply(r, k, v, w_raw, u, state, tiling)
    return y, final
