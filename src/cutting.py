"""How rows of tokens are cut into chunks that are computed one after the other.

Padded rows are cut at the same columns, all at once; a packed row is cut along its length, roots and the segments that
continue them apart. So a chunk is sequences beside each other or one after the other, each of which begins anew or from
the memory that an earlier chunk left: of its own beginning, or of the root that it continues. What no target depends on
is left out.

Legend: B rows, T tokens of a row, M targets, N tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from src.layout import SegmentLayout


@dataclass(frozen=True)
class Chunk:
    """What is computed at a time.

    Attributes:
        number: its place among all chunks of its row, those left out counted.
        rows: numbers of the rows it takes a piece of.
        start, end: columns of that piece.
        layout: its sequences, where they share a packed row; None where each row is one sequence. Then all begin anew
            or none does.
        sources: for each sequence that begins from a memory, in order: which chunk of the list left it, and its place
            among those that this chunk keeps.
        kept: sequences of this chunk (rows, or roots of the layout) whose memory later chunks begin from, in order.
        scored: int64 [m], which of the M targets are its own.
        places: int64 [m], positions of these in the chunk, rows one after the other.
    """

    number: int
    rows: tuple[int, ...]
    start: int
    end: int
    layout: SegmentLayout | None
    sources: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]
    scored: Tensor
    places: Tensor

    def of(self, tokens: Tensor) -> Tensor:
        """Its tokens [b, N] among int64 [B, T]."""
        columns = tokens[:, self.start : self.end]
        return columns if len(self.rows) == len(tokens) else columns[list(self.rows)]


def on_device(chunks: Sequence[Chunk], device: torch.device) -> tuple[Chunk, ...]:
    """The same with their tensors on `device`; those of all targets come there at once."""
    if not chunks or device.type == "cpu":
        return tuple(chunks)
    sizes = [len(chunk.scored) for chunk in chunks]
    together = torch.stack([torch.cat([chunk.scored for chunk in chunks]), torch.cat([c.places for c in chunks])])
    moved = together.to(device, non_blocking=True).split(sizes, dim=1)
    return tuple(
        replace(
            chunk,
            layout=None if chunk.layout is None else chunk.layout.to(device),
            scored=scored,
            places=places,
        )
        for chunk, (scored, places) in zip(chunks, moved, strict=True)
    )


def cut(rows: int, width: int, layout: SegmentLayout | None, positions: Tensor, chunk_tokens: int) -> list[Chunk]:
    """Cuts rows of tokens into chunks, in the order in which they are to be computed.

    Args:
        rows: B.
        width: T.
        layout: segments of a packed row (B is 1); None where every row is one sequence.
        positions: int64 [M] on the host, places of the targets in the flattened rows.
        chunk_tokens: most tokens of a chunk, of each row.

    Returns:
        Chunks of which each has a target, or leaves something on which a target depends; none for no targets.
    """
    assert chunk_tokens >= 1
    if layout is None:
        return _cut_rows(rows, width, positions, chunk_tokens)
    assert rows == 1
    return _cut_packed(layout, positions, chunk_tokens)


def _cut_rows(rows: int, width: int, positions: Tensor, chunk_tokens: int) -> list[Chunk]:
    row_of, column_of = positions // width, positions % width
    last = torch.full((rows,), -1, dtype=torch.int64).scatter_reduce_(0, row_of, column_of, "amax")
    ends = [column + 1 for column in last.tolist()]
    scored = _by_number(column_of // chunk_tokens, -(-max(ends, default=0) // chunk_tokens))
    chunks = []
    for number, own in enumerate(scored):
        start = number * chunk_tokens
        active = [row for row, end in enumerate(ends) if end > start]
        end = min(start + chunk_tokens, max(ends))
        place_of_row = torch.zeros(rows, dtype=torch.int64)
        place_of_row[active] = torch.arange(len(active))
        chunks.append(
            Chunk(
                number=number,
                rows=tuple(active),
                start=start,
                end=end,
                layout=None,
                # Rows only ever leave, so those of this chunk are the ones that the chunk before keeps.
                sources=tuple((number - 1, place) for place in range(len(active))) if number else (),
                kept=tuple(place for place, row in enumerate(active) if ends[row] > start + chunk_tokens),
                scored=own,
                places=place_of_row[row_of[own]] * (end - start) + column_of[own] - start,
            )
        )
    return chunks


@dataclass
class _Piece:
    """Tokens [start, end) of one segment within one chunk.

    Attributes:
        before: number of the piece that it continues, if any.
        needed: whether a target depends on it.
        continues: whether a needed piece continues it.
    """

    chunk: int
    start: int
    end: int
    before: int | None
    needed: bool = False
    continues: bool = False


def _cut_packed(layout: SegmentLayout, positions: Tensor, chunk_tokens: int) -> list[Chunk]:
    pieces, borders = _pieces(layout, chunk_tokens)
    scored = _by_number(torch.bucketize(positions, torch.tensor(borders[1:]), right=True), len(borders) - 1)
    in_order = positions.sort().values
    ends = torch.tensor([[piece.start, piece.end] for piece in pieces])
    targets_before = torch.searchsorted(in_order, ends)
    for piece, (first, beyond) in zip(reversed(pieces), reversed(targets_before.tolist()), strict=True):
        piece.needed = piece.continues or beyond > first
        if piece.needed and piece.before is not None:
            pieces[piece.before].continues = True
        if not piece.continues and beyond > first:
            piece.end = int(in_order[beyond - 1]) + 1

    members: list[list[int]] = [[] for _ in borders[1:]]
    for number, piece in enumerate(pieces):
        members[piece.chunk].append(number)
    chunks: list[Chunk] = []
    kept_as: dict[int, tuple[int, int]] = {}
    for number, inside in enumerate(members):
        needed = [piece for piece in inside if pieces[piece].needed]
        if not needed:
            continue
        present = range(needed[0], needed[-1] + 1)
        carried = [piece for piece in needed if pieces[piece].before is not None]
        kept = [piece for piece in needed if pieces[piece].continues]
        kept_as |= {piece: (len(chunks), place) for place, piece in enumerate(kept)}
        start, end = pieces[needed[0]].start, pieces[needed[-1]].end
        inner = None
        if len(present) > 1:
            starts = [pieces[piece].start for piece in present]
            inner = SegmentLayout.packed([after - own for own, after in zip(starts, [*starts[1:], end], strict=True)])
            inner = inner.carrying([piece - present[0] for piece in carried], [piece - present[0] for piece in kept])
        chunks.append(
            Chunk(
                number=number,
                rows=(0,),
                start=start,
                end=end,
                layout=inner,
                sources=tuple(kept_as[pieces[piece].before] for piece in carried),  # type: ignore[index]
                kept=tuple(piece - present[0] for piece in kept),
                scored=scored[number],
                places=positions[scored[number]] - start,
            )
        )
    return chunks


def _pieces(layout: SegmentLayout, chunk_tokens: int) -> tuple[list[_Piece], list[int]]:
    """Pieces in the order of the row, and the columns at which its chunks begin, with its end."""
    row_end = layout.tokens
    borders = [*range(0, layout.root_tokens, chunk_tokens), *range(layout.root_tokens, row_end, chunk_tokens), row_end]
    parents = layout.parents.tolist()
    pieces: list[_Piece] = []
    last_of_root: list[int | None] = []
    chunk = 0
    for segment, (length, end) in enumerate(zip(layout.lengths, accumulate(layout.lengths), strict=True)):
        before = None if segment < layout.roots else last_of_root[parents[segment - layout.roots]]
        start = end - length
        while start < end:
            while borders[chunk + 1] <= start:
                chunk += 1
            stop = min(end, borders[chunk + 1])
            pieces.append(_Piece(chunk, start, stop, before))
            before, start = len(pieces) - 1, stop
        if segment < layout.roots:
            last_of_root.append(before)
    return pieces, borders


def _by_number(numbers: Tensor, count: int) -> Sequence[Tensor]:
    """For each of `count` numbers, the places at which it stands in int64 [M], rising."""
    order = torch.sort(numbers, stable=True).indices
    groups: Sequence[Tensor] = order.split(torch.bincount(numbers, minlength=count).tolist())
    return groups
