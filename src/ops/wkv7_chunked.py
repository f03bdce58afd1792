"""The WKV7 operator in tiles of tokens, in plain torch: the CPU path, and any GPU without a built kernel.

Shapes: B batch, T tokens, H heads, N head size, S sequences, M tiles, L tile length. States are
[..., value, key]; the rows of a tile are its tokens.

With inc[t] the product of a tile's decays up to and with token t, and exc[t] the same without t's own, a token
reads with a ∘ exc and r ∘ inc, and writes b / inc and k / inc: what it reads of the state is then what it reads of
the tile's start state and of earlier writings, undecayed. No decay is below 0.5452, so 1 / inc stays under e^9.8
over 16 tokens and every product in float32's range.

The answers to a, U, depend on the answers to earlier tokens of the tile:

    U = T (A S₀ᵀ + Mak V)      T = (I - Mab)⁻¹      Mab, Mak: what a reads of the b and k of earlier tokens

T is unit lower triangular (the UT transform) and comes from forward substitution: no entry of it is large where the
powers of Mab, which a series would add up, reach thousands in trained models. All of this is batched over
tiles and heads; the state walks from tile to tile as S' = S₀ P + C.

The gradient of w_raw sums, for each token, what spans it. What goes through the states is summed from the side where
nothing is subtracted; pairs inside a tile are the difference of two running sums.

Memory: the forward saves its inputs and one state per span of `SPAN_TOKENS` tokens; the backward recomputes a
span at a time. Where the state's gradient alone is wanted, k, v and the states are not saved. Accumulation in
float32 (float64 for float64 inputs).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.ops.tiling import Tiling, plan_tiles
from src.ops.wkv7_reference import STRONGEST_LOG_DECAY

TILE_TOKENS = 16  # 32 is 7 % faster at 1024 tokens, and the gradient of w_raw three times less exact
SPAN_TOKENS = 512  # tokens of one sequence whose intermediate values exist at the same time

PADDING_W_RAW = -torch.inf  # decay 1: with r = k = v = a = b = 0 a padding token changes nothing


@dataclass(frozen=True)
class _Decays:
    """Of tiles, each [M, H, L, N]."""

    inc: Tensor
    exc: Tensor
    undone: Tensor  # 1 / inc

    @property
    def whole(self) -> Tensor:
        """[M, H, 1, N]: all decays of the tile."""
        return self.inc[:, :, -1:]


def _running_sums(x: Tensor, *, backwards: bool = False) -> Tensor:
    """Sums over a tile's tokens [M, H, L, N] up to and with each one, or from it on; the same bits everywhere."""
    # torch.cumsum promises no order of additions on a GPU.
    distance = 1
    while distance < x.shape[2]:
        near, far = x[:, :, :-distance], x[:, :, distance:]
        kept = x[:, :, -distance:] if backwards else x[:, :, :distance]
        x = torch.cat((near + far, kept) if backwards else (kept, near + far), dim=2)
        distance *= 2
    return x


def _decay_products(w_raw: Tensor) -> _Decays:
    # The exponential of a running sum, not a running product: a decay near 1 has lost digits that its logarithm has.
    inc = torch.exp(_running_sums(STRONGEST_LOG_DECAY * torch.sigmoid(w_raw)))
    exc = torch.cat((torch.ones_like(inc[:, :, :1]), inc[:, :, :-1]), dim=2)
    return _Decays(inc, exc, inc.reciprocal())


@dataclass(frozen=True)
class _Tiles:
    """What tiles do with any state. W is 2L, or L without k: then it is what the state's gradient alone needs."""

    decays: _Decays
    reading: Tensor  # [M, H, 2L, N]: a ∘ exc above r ∘ inc
    writing: Tensor  # [M, H, W, N]: b / inc above k / inc
    pairs: Tensor  # [M, H, 2L, W]: what each reading takes of each writing; 0 from later ones
    solve: Tensor  # T [M, H, L, L]
    asking: Tensor  # T A [M, H, L, N]: the start state's part of U is its product with S₀ᵀ

    def transition(self) -> Tensor:
        """P [M, H, N, N]."""
        moved = self.asking.mT @ self.writing[:, :, : self.asking.shape[2]]
        moved.diagonal(dim1=-2, dim2=-1).add_(1)
        return moved.mul_(self.decays.whole)

    def reading_of_start(self) -> Tensor:
        """[M, H, L, N]: the start state's part of y is its product with S₀ᵀ."""
        tokens = self.asking.shape[2]
        return self.reading[:, :, tokens:] + self.pairs[:, :, tokens:, :tokens] @ self.asking

    def own_values(self, v: Tensor) -> Tensor:
        """[M, H, 2L, N]: what is written where the start state is zero, U above v."""
        tokens = v.shape[2]
        return torch.cat((self.solve @ (self.pairs[:, :, :tokens, tokens:] @ v), v), dim=2)

    def added(self, values: Tensor) -> Tensor:
        """C [M, H, N, N] of `own_values`."""
        return (values.mT @ self.writing).mul_(self.decays.whole)


def _causal(tokens: int, written: int, like: Tensor) -> Tensor:
    """Ones and zeros [2L, W]: a reads what earlier tokens wrote, r also what its own token wrote."""
    ones = torch.ones((tokens, tokens), dtype=like.dtype, device=like.device)
    return torch.cat((ones.tril(-1), ones.tril())).repeat(1, written // tokens)


def _make_tiles(r: Tensor, w_raw: Tensor, k: Tensor | None, a: Tensor, b: Tensor) -> _Tiles:
    tokens = r.shape[2]
    decays = _decay_products(w_raw)
    reading = torch.cat((a * decays.exc, r * decays.inc), dim=2)
    written = (b,) if k is None else (b, k)
    writing = torch.cat([x * decays.undone for x in written], dim=2)
    pairs = (reading @ writing.mT).mul_(_causal(tokens, writing.shape[2], reading))
    unit = torch.eye(tokens, dtype=r.dtype, device=r.device).expand(*r.shape[:2], -1, -1)
    solve = torch.linalg.solve_triangular(-pairs[:, :, :tokens, :tokens], unit, upper=False, unitriangular=True)
    return _Tiles(decays, reading, writing, pairs, solve, solve @ reading[:, :, :tokens])


def _scan(start: Tensor, transition: Tensor, added: Tensor, steps: Iterable[slice]) -> tuple[Tensor, Tensor]:
    """What walks from tile to tile: S <- S transition + added.

    Returns:
        The state before each tile [M, H, V, K], and the states [S, H, V, K] after the last step; with the steps in
        reverse, the gradient of the state after each tile, and of the states before the first.
    """
    running = start.clone()
    met = torch.empty_like(added)
    for tiles in steps:
        first = running[: tiles.stop - tiles.start]
        met[tiles] = first
        factors = (x[tiles].flatten(0, 1) for x in (added, met, transition))
        torch.baddbmm(*factors, out=first.flatten(0, 1))
    return met, running


class _ChunkedWKV7(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w_raw: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        tiling: Tiling,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        running = state.to(dtype)[tiling.order]
        y = torch.empty(r.shape, dtype=r.dtype, device=r.device)
        span_starts = []
        for span in tiling.spans:
            r_tile, k_tile, v_tile, a_tile, b_tile = (tiling.read(x, span, dtype) for x in (r, k, v, a, b))
            tiles = _make_tiles(r_tile, tiling.read(w_raw, span, dtype, PADDING_W_RAW), k_tile, a_tile, b_tile)
            values = tiles.own_values(v_tile)
            span_starts.append(running)
            states, running = _scan(running, tiles.transition(), tiles.added(values), span.steps)
            from_tile = tiles.pairs[:, :, tiling.tile_tokens :] @ values
            tiling.write(from_tile + tiles.reading_of_start() @ states.mT, span, y)
        ctx.tiling = tiling
        ctx.state_dtype = state.dtype
        if any(ctx.needs_input_grad[:6]):
            ctx.save_for_backward(r, w_raw, a, b, k, v, *span_starts)
        else:
            ctx.save_for_backward(r, w_raw, a, b)
        final = torch.empty_like(running)
        final[tiling.order] = running
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        r, w_raw, a, b, *of_tokens = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        *need_tokens, need_state, _ = ctx.needs_input_grad
        gradients = [torch.empty(r.shape, dtype=r.dtype, device=r.device) if need else None for need in need_tokens]
        dend = dfinal.to(dtype)[tiling.order]

        for index, span in reversed(list(enumerate(tiling.spans))):
            r_tile, a_tile, b_tile, dy_tile = (tiling.read(x, span, dtype) for x in (r, a, b, dy))
            w_tile = tiling.read(w_raw, span, dtype, PADDING_W_RAW)
            k_tile = tiling.read(of_tokens[0], span, dtype) if of_tokens else None
            tiles = _make_tiles(r_tile, w_tile, k_tile, a_tile, b_tile)
            transition = tiles.transition()
            from_y = dy_tile.mT @ tiles.reading_of_start()
            dstates, dend = _scan(dend, transition.mT, from_y, reversed(span.steps))
            if not of_tokens:
                continue
            _, v, *span_starts = of_tokens
            values = tiles.own_values(tiling.read(v, span, dtype))
            states, _ = _scan(span_starts[index], transition, tiles.added(values), span.steps)
            found = _token_gradients(tiles, w_tile, values, states, dstates, dy_tile)
            for gradient, of_span in zip(gradients, found, strict=True):
                if gradient is not None:
                    tiling.write(of_span, span, gradient)

        dstate = None
        if need_state:
            dstate = torch.empty_like(dend)
            dstate[tiling.order] = dend
            dstate = dstate.to(ctx.state_dtype)
        return *gradients, dstate, None


def _token_gradients(
    tiles: _Tiles, w_raw: Tensor, values: Tensor, states: Tensor, dstates: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of r, w_raw, k, v, a and b, each [M, H, L, N].

    Args:
        w_raw: [M, H, L, N].
        values: `own_values`, whose upper half becomes U here.
        states: before each tile [M, H, V, K].
        dstates: gradient of the states after each tile.
        dy: [M, H, L, N].
    """
    tokens = dy.shape[2]
    decays, reading, writing, pairs = tiles.decays, tiles.reading, tiles.writing, tiles.pairs
    values[:, :, :tokens] += tiles.asking @ states.mT
    dwritten = dstates * decays.whole  # of the tile's state before it is decayed
    dvalues = writing @ dwritten.mT
    dasked = tiles.solve.mT @ (dvalues[:, :, :tokens] + pairs[:, :, tokens:, :tokens].mT @ dy)
    dread = torch.cat((dasked, dy), dim=2)
    dv = dvalues[:, :, tokens:] + pairs[:, :, :, tokens:].mT @ dread
    dpairs = (dread @ values.mT).mul_(_causal(tokens, 2 * tokens, dy))
    dreading = dread @ states + dpairs @ writing
    dwriting_after = values @ dwritten  # through the state after the tile
    dwriting_within = dpairs.mT @ reading

    read = reading * dreading
    within = read[:, :, tokens:] - (writing * dwriting_within).unflatten(2, (2, tokens)).sum(2)
    within[:, :, :-1] += read[:, :, 1:tokens]
    after = (writing * dwriting_after).unflatten(2, (2, tokens)).sum(2)
    dlog = _running_sums(within, backwards=True) + (states * dwritten).sum(2, keepdim=True)
    dlog[:, :, 1:] += _running_sums(after)[:, :, :-1]
    # 1 - sigmoid(w_raw) would be zero in float32 from w_raw = 17 on, where its derivative is not.
    dw = dlog.mul_(STRONGEST_LOG_DECAY * torch.sigmoid(w_raw) * torch.sigmoid(-w_raw))

    (da, dr), (db, dk) = dreading.split(tokens, 2), (dwriting_after + dwriting_within).split(tokens, 2)
    return dr * decays.inc, dw, dk * decays.undone, dv, da * decays.exc, db * decays.undone


def wkv7_chunked(
    r: Tensor,
    w_raw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes what `wkv7_reference` defines, tile by tile; same arguments, same results.

    Args:
        r, w_raw, k, v, a, b: [B, T, H, N], float.
        state: one start state per sequence [B or S, H, N, N], (value, key).
        lengths: tokens of each packed sequence (then B == 1); None for a dense batch.

    Returns:
        y [B, T, H, N] in r's dtype, and the final states [B or S, H, N, N] in the accumulation dtype.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule" (arXiv 2406.06484), section 3,
    for the UT transform; Yang et al. 2024, "Gated Delta Networks" (arXiv 2412.06464), for decays in it.
    """
    batch, tokens = r.shape[:2]
    tiling = plan_tiles(
        (tokens,) * batch if lengths is None else lengths,
        batch,
        r.device,
        tile_tokens=TILE_TOKENS,
        span_tokens=SPAN_TOKENS,
    )
    y, final = _ChunkedWKV7.apply(r, w_raw, k, v, a, b, state, tiling)
    return y, final
