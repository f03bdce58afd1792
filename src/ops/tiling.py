"""How packed sequences are cut into tiles of tokens, for operators whose state walks from tile to tile.

Shapes: B batch, T tokens, H heads, N head size, S sequences, L tokens of a tile, M tiles.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Neighbouring steps of the scan, whose intermediate values exist at the same time."""

    first_step: int
    steps: tuple[slice, ...]
    """The tiles of each step, counted from the span's first one."""
    tokens: Tensor | None
    """int64, the span's tokens among all B * T; None where tiles are a plain view of the tokens."""
    places: Tensor | None
    """int64, the row of each of them in the span's flattened tiles; None with `tokens`."""


@dataclass(frozen=True)
class Tiling:
    """Tokens cut into tiles, in the order the state scan visits them.

    Step c holds tile c of every sequence that is long enough, longest sequence first, so the tiles of a step
    are neighbours, and so are the tiles of successive steps.
    """

    tile_tokens: int
    spans: tuple[Span, ...]
    order: Tensor
    """int64 [S]: sequences, longest first."""
    batch: int

    def read(self, x: Tensor, span: Span, dtype: torch.dtype, padding: float = 0.0) -> Tensor:
        """[B, T, H, N] -> tiles [M, H, L, N] of the span, as `dtype`; rows past a sequence's end are `padding`."""
        heads, size = x.shape[2:]
        if span.tokens is None:
            rows = self._steps(x, span).permute(1, 0, 3, 2, 4)
            return rows.to(dtype).reshape(-1, heads, self.tile_tokens, size)
        rows = x.new_full((span.steps[-1].stop * self.tile_tokens, heads, size), padding)
        rows[span.places] = x.reshape(-1, heads, size)[span.tokens]
        return rows.view(-1, self.tile_tokens, heads, size).transpose(1, 2).to(dtype).contiguous()

    def write(self, tiles: Tensor, span: Span, into: Tensor) -> None:
        """Tiles [M, H, L, N] of the span -> its tokens in `into`, contiguous [B, T, H, N] of any dtype."""
        heads, size = into.shape[2:]
        if span.tokens is None:
            steps = self._steps(into, span)
            rows = tiles.view(steps.shape[1], self.batch, heads, self.tile_tokens, size)
            steps.copy_(rows.permute(1, 0, 3, 2, 4))
        else:
            rows = tiles.transpose(1, 2).reshape(-1, heads, size)[span.places]
            into.view(-1, heads, size)[span.tokens] = rows.to(into.dtype)

    def _steps(self, x: Tensor, span: Span) -> Tensor:
        """A view of the span's tokens, [B, steps, L, H, N]."""
        steps = x.view(self.batch, -1, self.tile_tokens, *x.shape[2:])
        return steps[:, span.first_step : span.first_step + len(span.steps)]


def plan_tiles(
    lengths: Sequence[int], batch: int, device: torch.device, *, tile_tokens: int, span_tokens: int
) -> Tiling:
    """Cuts sequences into tiles of `tile_tokens`, and the scan over these into spans of at most `span_tokens`.

    Args:
        lengths: tokens of each sequence, in the order of the row they are packed into, or of the batch.
        batch: rows; 1, or as many as sequences of equal length.
        device: of the tokens.
        tile_tokens: L.
        span_tokens: multiple of L, tokens of one sequence in a span.
    """
    plan = _plan_on_cpu(tuple(lengths), batch, tile_tokens, span_tokens)
    if device.type == "cpu":
        return plan

    def moved(index: Tensor | None) -> Tensor | None:
        return None if index is None else index.to(device)

    spans = [replace(span, tokens=moved(span.tokens), places=moved(span.places)) for span in plan.spans]
    return replace(plan, spans=tuple(spans), order=plan.order.to(device))


@functools.lru_cache(maxsize=16)  # a step's layers ask for the same again
def _plan_on_cpu(lengths: tuple[int, ...], batch: int, tile_tokens: int, span_tokens: int) -> Tiling:
    ranks = sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence])
    tile_counts = [-(-length // tile_tokens) for length in lengths]
    steps = max(tile_counts, default=0)
    active = [sum(count > step for count in tile_counts) for step in range(steps)]
    first_tiles = list(accumulate(active, initial=0))

    is_view = batch == len(lengths) and len(set(lengths)) == 1 and lengths[0] % tile_tokens == 0
    if not is_view:
        places, tokens = _places(lengths, ranks, first_tiles, tile_tokens).sort()

    spans = []
    steps_of_span = span_tokens // tile_tokens
    for first in range(0, steps, steps_of_span):
        borders = first_tiles[first : first + steps_of_span + 1]
        within = tuple(slice(begin - borders[0], end - borders[0]) for begin, end in pairwise(borders))
        if is_view:
            spans.append(Span(first, within, None, None))
        else:
            rows = torch.tensor((borders[0], borders[-1])) * tile_tokens
            of_span = slice(*torch.searchsorted(places, rows).tolist())
            spans.append(Span(first, within, tokens[of_span], places[of_span] - int(rows[0])))
    return Tiling(tile_tokens, tuple(spans), torch.tensor(ranks, dtype=torch.int64), batch)


def _places(lengths: Sequence[int], ranks: Sequence[int], first_tiles: Sequence[int], tile_tokens: int) -> Tensor:
    """int64 [tokens]: the row of each token in the flattened tiles of all steps."""
    first_tile_of_step = torch.tensor(first_tiles)
    rank_of = {sequence: rank for rank, sequence in enumerate(ranks)}
    places = torch.empty(sum(lengths), dtype=torch.int64)
    first = 0
    for sequence, length in enumerate(lengths):
        offsets = torch.arange(length)
        tile = first_tile_of_step[offsets // tile_tokens] + rank_of[sequence]
        places[first : first + length] = tile * tile_tokens + offsets % tile_tokens
        first += length
    return places
