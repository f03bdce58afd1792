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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from src.ops.wkv6_reference import W_RAW_LIMIT

TILE_TOKENS = 16  # power of two; matrix work inside a tile grows with it, the number of states shrinks with it
SPAN_TOKENS = 1024  # tokens of one sequence whose intermediate values exist at the same time

PADDING_W_RAW = -torch.inf  # decay 1: with r = k = v = 0 a padding token changes nothing


@dataclass(frozen=True)
class _Tiling:
    """How tokens are cut into tiles, in the order the state scan visits them.

    Step c holds tile c of every sequence that is long enough, longest sequence first, so the tiles of a step
    are neighbours, and so are the tiles of successive steps.
    """

    active: tuple[int, ...]  # sequences that still run at each step; never rises
    rank_to_sequence: tuple[int, ...]  # sequences, longest first
    places: Tensor | None  # int64 [tokens]: row of each token in the flattened tiles; None when it is a plain view
    batch: int

    @property
    def tiles(self) -> int:
        return sum(self.active)

    def scatter(self, x: Tensor, dtype: torch.dtype, padding: float) -> Tensor:
        """[B, T, H, N] -> contiguous tiles [M, H, L, N] of `dtype`."""
        heads, size = x.shape[2:]
        if self.places is None:
            rows = x.view(self.batch, len(self.active), TILE_TOKENS, heads, size).permute(1, 0, 3, 2, 4)
            return rows.to(dtype).reshape(-1, heads, TILE_TOKENS, size)
        rows = x.new_full((self.tiles * TILE_TOKENS, heads, size), padding)
        rows[self.places] = x.reshape(-1, heads, size)
        return rows.view(-1, TILE_TOKENS, heads, size).transpose(1, 2).to(dtype).contiguous()

    def gather(self, tiles: Tensor, like: Tensor) -> Tensor:
        """Tiles [M, H, L, N] -> shape and dtype of `like`, [B, T, H, N]."""
        heads, size = like.shape[2:]
        if self.places is None:
            rows = tiles.view(len(self.active), self.batch, heads, TILE_TOKENS, size).permute(1, 0, 3, 2, 4)
            return rows.to(like.dtype).reshape(like.shape)
        return tiles.transpose(1, 2).reshape(-1, heads, size)[self.places].to(like.dtype).view(like.shape)

    def spans(self) -> list[tuple[slice, list[slice]]]:
        """(tiles, tiles of each of its steps from the span's first on) of each span, first to last."""
        spans, first = [], 0
        for step in range(0, len(self.active), SPAN_TOKENS // TILE_TOKENS):
            active = self.active[step : step + SPAN_TOKENS // TILE_TOKENS]
            ends = list(accumulate(active))
            steps = [slice(end - count, end) for count, end in zip(active, ends, strict=True)]
            spans.append((slice(first, first + ends[-1]), steps))
            first += ends[-1]
        return spans


def _plan_tiles(lengths: Sequence[int], batch: int, device: torch.device) -> _Tiling:
    ranks = sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence])
    tile_counts = [-(-length // TILE_TOKENS) for length in lengths]
    steps = max(tile_counts, default=0)
    active = tuple(sum(count > step for count in tile_counts) for step in range(steps))
    if batch == len(lengths) and len(set(lengths)) <= 1 and (not lengths or lengths[0] % TILE_TOKENS == 0):
        return _Tiling(active, tuple(ranks), None, batch)
    first_tile_of_step = torch.tensor((0, *active)).cumsum(0)
    places = torch.empty(sum(lengths), dtype=torch.int64)
    rank_of = {sequence: rank for rank, sequence in enumerate(ranks)}
    first = 0
    for sequence, length in enumerate(lengths):
        offsets = torch.arange(length)
        tile = first_tile_of_step[offsets // TILE_TOKENS] + rank_of[sequence]
        places[first : first + length] = tile * TILE_TOKENS + offsets % TILE_TOKENS
        first += length
    return _Tiling(active, tuple(ranks), places.to(device), batch)


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


def _level_masks(like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each level, [L, L]: 1 where (i, j) is a pair of it; 1 where i > t lie in one block."""
    token = torch.arange(TILE_TOKENS, device=like.device)
    row, column = token[:, None], token[None, :]
    size = 1
    while size < TILE_TOKENS:
        pair = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
        later = (row // size == column // size) & (column > row)
        yield pair.to(like.dtype), later.to(like.dtype)
        size *= 2


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
        ctx: Any, r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor, tiling: _Tiling
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        order = torch.tensor(tiling.rank_to_sequence, dtype=torch.int64, device=r.device)
        running = state.to(dtype)[order]
        bonus = u.to(dtype)
        inputs = [
            tiling.scatter(x, dtype, padding) for x, padding in ((r, 0.0), (k, 0.0), (v, 0.0), (w_raw, PADDING_W_RAW))
        ]
        y = torch.empty_like(inputs[0])
        span_starts = []
        for rows, steps in tiling.spans():
            r_tile, k_tile, v_tile, w_tile = (x[rows] for x in inputs)
            decays = _decay_products(w_tile, with_levels=True)
            span_starts.append(running)
            states, running = _scan(running, decays.whole, v_tile.mT @ (k_tile * decays.after), steps)
            y[rows] = (r_tile * decays.before) @ states.mT
            y[rows] += _pair_weights(r_tile, k_tile, bonus, decays) @ v_tile
        ctx.tiling = tiling
        ctx.save_for_backward(r, k, v, w_raw, u, order, *span_starts)
        ctx.state_dtype = state.dtype
        final = torch.empty_like(running)
        final[order] = running
        return tiling.gather(y, r), final

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, w_raw, u, order, *span_starts = ctx.saved_tensors
        tiling: _Tiling = ctx.tiling
        need_r, need_k, need_v, need_w, need_u, need_state, _ = ctx.needs_input_grad
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        dend = dfinal.to(dtype)[order]
        bonus = u.to(dtype)

        r_all, dy_all = tiling.scatter(r, dtype, 0.0), tiling.scatter(dy, dtype, 0.0)
        w_all = tiling.scatter(w_raw, dtype, PADDING_W_RAW)
        only_state = not (need_r or need_k or need_v or need_w or need_u)
        if not only_state:
            k_all, v_all = tiling.scatter(k, dtype, 0.0), tiling.scatter(v, dtype, 0.0)
            dr_all, dk_all, dv_all, dw_all = (torch.empty_like(r_all) for _ in range(4))
            du = torch.zeros_like(bonus)

        for (rows, steps), start in zip(reversed(tiling.spans()), reversed(span_starts), strict=True):
            r_tile, w_tile, dy_tile = r_all[rows], w_all[rows], dy_all[rows]
            decays = _decay_products(w_tile, with_levels=not only_state)
            before, after, whole = decays.before, decays.after, decays.whole
            dstates, dend = _scan(dend, whole, dy_tile.mT @ (r_tile * before), reversed(steps))
            if only_state:
                continue

            k_tile, v_tile = k_all[rows], v_all[rows]
            k_after = k_tile * after
            states, _ = _scan(start, whole, v_tile.mT @ k_after, steps)
            dpairs = torch.tril(dy_tile @ v_tile.mT)  # gradient of A
            diagonal = dpairs.diagonal(dim1=-2, dim2=-1)[..., None]
            pairs = _pair_weights(r_tile, k_tile, bonus, decays)
            dv_all[rows] = pairs.mT @ dy_tile + k_after @ dstates.mT

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
            dr_all[rows] = dr + diagonal * bonus[:, None] * k_tile
            dk_all[rows] = dk + diagonal * bonus[:, None] * r_tile
            dw_all[rows] = -torch.exp(w_tile.clamp(max=W_RAW_LIMIT)) * dlog

        dstate = None
        if need_state:
            dstate = torch.empty_like(dend)
            dstate[order] = dend
            dstate = dstate.to(ctx.state_dtype)
        if only_state:
            return None, None, None, None, None, dstate, None
        return (
            tiling.gather(dr_all, r) if need_r else None,
            tiling.gather(dk_all, k) if need_k else None,
            tiling.gather(dv_all, v) if need_v else None,
            tiling.gather(dw_all, w_raw) if need_w else None,
            du.to(u.dtype) if need_u else None,
            dstate,
            None,
        )


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
    tiling = _plan_tiles((tokens,) * batch if lengths is None else lengths, batch, r.device)
    y, final = _ChunkedWKV6.apply(r, k, v, w_raw, u, state, tiling)
    return y, final
