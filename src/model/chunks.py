"""Rows read in chunks: what one chunk leaves for the next, and the scores of targets without gradients.

Legend: T tokens of a row, C channels, M targets, K sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from src.cutting import Chunk, cut, on_device
from src.layout import SegmentLayout
from src.model.language_model import LanguageModel, Watch
from src.model.parking import Coming, Parking
from src.model.state import LayerState, by_layer, stacked
from src.ops.token_logps import token_logps

Scores = list[tuple[Tensor, Tensor]]
"""For each set of M targets, log-probability and largest logit, [M] each; see `ops.token_logps`."""

Run = Callable[[int, Chunk, LayerState | None], tuple[Tensor, LayerState | None]]
"""Runs the chunk at a place in the list from a memory: `run_chunk`, however it is done."""


class Memories:
    """What chunks keep for those that begin from it: the recurrence in fp32, the shifts in the computation dtype.

    A memory is that of all layers, see `state.stacked`: parts [L, K, ...].

    Args:
        device: where the model computes.
        parking: where they wait; None: on the device.
    """

    def __init__(self, device: torch.device, parking: Parking | None = None) -> None:
        self._device = device
        self._parking = parking
        self._kept: dict[int, LayerState] = {}
        self._last: tuple[int, LayerState] | None = None
        self._coming: dict[int, list[Coming]] = {}

    def keep(self, index: int, memory: LayerState) -> None:
        """What the chunk with this place in the list leaves, a row for each sequence it keeps."""
        self._last = index, memory  # the next chunk wants it at once
        if self._parking is not None:
            memory = LayerState(*map(self._parking.park, memory))
        self._kept[index] = memory

    def bytes(self) -> int:
        """What is held in all, on either side."""
        return sum(part.untyped_storage().nbytes() for memory in self._kept.values() for part in memory)

    def begin_to_fetch(self, chunk: Chunk) -> None:
        """Lets what a chunk will begin from come from the host while something else is computed."""
        for index in {index for index, _ in chunk.sources}:
            if self._parking is not None and index not in self._coming and not self._is_last(index):
                self._coming[index] = [self._parking.fetch(part) for part in self._kept[index]]

    def start_of(self, chunk: Chunk) -> LayerState | None:
        """The memory that its sequences begin from, on the device; None where they begin anew."""
        if not chunk.sources:
            return None
        self.begin_to_fetch(chunk)
        parts = [[self._rows(part, places) for part in self._of(index)] for index, places in by_source(chunk.sources)]
        self._arrive()
        return LayerState(*(_joined(pieces) for pieces in zip(*parts, strict=True)))

    def drop(self, index: int) -> None:
        """Forgets what nobody begins from any more."""
        self._kept.pop(index, None)
        if self._is_last(index):
            self._last = None

    def settle(self) -> None:
        """Ends a pass: the next one begins somewhere else."""
        self._last = None
        self._arrive()
        if self._parking is not None:
            self._parking.settle()

    def _is_last(self, index: int) -> bool:
        return self._last is not None and self._last[0] == index

    def _arrive(self) -> None:
        """Fetched is for one use: another one may be long after it."""
        for coming in self._coming.values():
            for part in coming:
                part.arrived()
        self._coming.clear()

    def _of(self, index: int) -> Sequence[Tensor]:
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        if index in self._coming:
            return [part.arrived() for part in self._coming[index]]
        return self._kept[index]

    def _rows(self, part: Tensor, places: Sequence[int]) -> Tensor:
        if list(places) == list(range(part.shape[1])):
            return part
        return part.index_select(1, index_on(self._device, places))


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), 1)


def by_source(sources: Sequence[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """(chunk, places) of neighbours in `Chunk.sources` that are from the same chunk."""
    groups: list[tuple[int, list[int]]] = []
    for index, place in sources:
        if not groups or groups[-1][0] != index:
            groups.append((index, []))
        groups[-1][1].append(place)
    return groups


def index_on(device: torch.device, places: Sequence[int]) -> Tensor:
    """int64 on a device, without waiting for it."""
    return torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True)


def run_chunk(
    model: LanguageModel,
    tokens: Tensor,
    chunk: Chunk,
    start: LayerState | None,
    watch: Watch | None = None,
) -> tuple[Tensor, LayerState | None]:
    """The model over one chunk.

    Args:
        tokens: int64 [B, T] on the host, of which it takes its own.
        chunk: on the model's device.
        start: memory of the sequences that do not begin anew, see `Memories`.
        watch: see `LanguageModel.forward`.

    Returns:
        (hidden [b, N, C], memory of the sequences it keeps, or None if it keeps none).
    """
    state = None if start is None else by_layer(start)
    inputs = model.look_up(chunk.of(tokens))
    hidden, after = model(inputs, state, chunk.layout, return_state=bool(chunk.kept), watch=watch)
    return hidden, None if after is None else kept_of(chunk, stacked(after), rows_axis=1)


def kept_of(chunk: Chunk, memory: LayerState, *, rows_axis: int = 0) -> LayerState:
    """What a chunk keeps of a memory: of rows beside each other, some."""
    if chunk.layout is not None or len(chunk.kept) == len(chunk.rows):
        return memory
    index = index_on(memory.wkv.device, chunk.kept)
    return LayerState(*(part.index_select(rows_axis, index) for part in memory))


def chunk_scores(model: LanguageModel, hidden: Tensor, chunk: Chunk, target_sets: Sequence[Tensor]) -> Scores:
    """Scores of the targets of one chunk from its hidden states [b, N, C]; there are some."""
    rows = hidden.flatten(0, 1).index_select(0, chunk.places)
    head = model.head_weight()
    return [token_logps(rows, head, targets.index_select(0, chunk.scored)) for targets in target_sets]


@torch.no_grad()
def read_scores(
    model: LanguageModel,
    tokens: Tensor,
    chunks: Sequence[Chunk],
    target_sets: Sequence[Tensor],
    memories: Memories | None = None,
    run: Run | None = None,
) -> Scores:
    """Scores of all targets, read chunk by chunk without gradients.

    Args:
        tokens: int64 [B, T] on the host.
        chunks: of `cut`, on the model's device.
        target_sets: int64 [M] each, on the device.
        memories: takes what each chunk leaves; without it, that is forgotten as soon as nobody begins from it.
        run: runs them; None: as they come.
    """
    forgets = memories is None
    memories = memories or Memories(model.device)
    last_use = {index: place for place, chunk in enumerate(chunks) for index, _ in chunk.sources}
    dtype = torch.float64 if model.compute_dtype == torch.float64 else torch.float32
    sizes = [targets.shape for targets in target_sets]
    scores: Scores = [
        (torch.zeros(size, dtype=dtype, device=model.device), torch.zeros(size, dtype=dtype, device=model.device))
        for size in sizes
    ]
    for place, chunk in enumerate(chunks):
        start = memories.start_of(chunk)
        hidden, memory = run_chunk(model, tokens, chunk, start) if run is None else run(place, chunk, start)
        if memory is not None:
            memories.keep(place, memory)
        if len(chunk.scored):
            for whole, own in zip(scores, chunk_scores(model, hidden, chunk, target_sets), strict=True):
                for values, found in zip(whole, own, strict=True):
                    values.index_copy_(0, chunk.scored, found)
        if forgets:
            for index in {index for index, _ in chunk.sources if last_use[index] == place}:
                memories.drop(index)
    memories.settle()
    return scores


def scores_in_chunks(
    model: LanguageModel,
    tokens: Tensor,
    layout: SegmentLayout | None,
    positions: Tensor,
    target_sets: Sequence[Tensor],
    chunk_tokens: int,
) -> Scores:
    """Scores of targets without gradients, of rows that are read in chunks.

    Args:
        tokens: int64 [B, T] on the host.
        layout: segments of a packed row, or None.
        positions: int64 [M] on the host, places of the targets in the flattened rows.
        target_sets: int64 [M] each, on the model's device.
        chunk_tokens: most tokens of a chunk, of each row.
    """
    rows, width = tokens.shape
    chunks = cut(rows, width, layout, positions, chunk_tokens)
    return read_scores(model, tokens, on_device(chunks, model.device), target_sets)
