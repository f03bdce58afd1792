"""Rows read in chunks: what one chunk leaves for the next, and the scores of targets without gradients.

Legend: T tokens of a row, C channels, M targets, K sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from src.cutting import Chunk, cut
from src.layout import SegmentLayout
from src.model.language_model import LanguageModel, Watch
from src.model.state import LayerState, ModelState
from src.ops.token_logps import token_logps

Scores = list[tuple[Tensor, Tensor]]
"""For each set of M targets, log-probability and largest logit, [M] each; see `ops.token_logps`."""


class Memories:
    """What chunks keep for those that begin from it: the recurrence in fp32, the shifts in the computation dtype.

    Args:
        device: where the model computes.
        on_host: whether they wait in host memory, pinned if the device is a GPU. Copies go in the order of the stream.
    """

    def __init__(self, device: torch.device, *, on_host: bool = False) -> None:
        self._device = device
        self._leaves = on_host and device.type == "cuda"
        self._kept: dict[int, ModelState] = {}
        self._last: tuple[int, ModelState] | None = None

    def keep(self, index: int, state: ModelState) -> None:
        """What the chunk with this place in the list leaves, a row for each sequence it keeps."""
        state = [LayerState(*map(_on_its_own, layer)) for layer in state]
        self._kept[index] = [LayerState(*map(to_host, layer)) for layer in state] if self._leaves else state
        self._last = index, state  # the next chunk wants it at once

    def bytes(self) -> int:
        """What is held in all, on either side."""
        parts = [part for state in self._kept.values() for layer in state for part in layer]
        return sum(part.untyped_storage().nbytes() for part in parts)

    def start_of(self, chunk: Chunk) -> ModelState | None:
        """The memory that its sequences begin from, on the device; None where they begin anew."""
        if not chunk.sources:
            return None
        parts = []
        for index, places in by_source(chunk.sources):
            parts.append([LayerState(*(self._rows(part, places) for part in layer)) for layer in self._of(index)])
        if len(parts) == 1:
            return parts[0]
        return [LayerState(*map(torch.cat, zip(*layers, strict=True))) for layers in zip(*parts, strict=True)]

    def drop(self, index: int) -> None:
        """Forgets what nobody begins from any more."""
        self._kept.pop(index, None)
        if self._last is not None and self._last[0] == index:
            self._last = None

    def _of(self, index: int) -> ModelState:
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        return self._kept[index]

    def _rows(self, part: Tensor, places: Sequence[int]) -> Tensor:
        on_device = part.to(self._device, non_blocking=True)
        if list(places) == list(range(len(part))):
            return on_device
        return on_device.index_select(0, index_on(self._device, places))


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


def _on_its_own(part: Tensor) -> Tensor:
    """A last token is a view, which would hold all tokens."""
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


def to_host(part: Tensor) -> Tensor:
    """A copy in host memory, pinned and in the order of the stream if it comes from a GPU."""
    on_host = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    return on_host.copy_(part, non_blocking=True)


def run_chunk(
    model: LanguageModel,
    tokens: Tensor,
    chunk: Chunk,
    start: ModelState | None,
    watch: Watch | None = None,
) -> tuple[Tensor, ModelState | None]:
    """The model over one chunk.

    Args:
        tokens: int64 [B, T] on the host, of which it takes its own.
        chunk: on the model's device.
        start: memory of the sequences that do not begin anew.
        watch: see `LanguageModel.forward`.

    Returns:
        (hidden [b, N, C], memory of the sequences it keeps, or None if it keeps none).
    """
    inputs = model.look_up(chunk.of(tokens))
    hidden, state = model(inputs, start, chunk.layout, return_state=bool(chunk.kept), watch=watch)
    return hidden, None if state is None else [kept_of(chunk, layer) for layer in state]


def kept_of(chunk: Chunk, layer: LayerState) -> LayerState:
    """What a chunk keeps of a layer's memory: of rows beside each other, some."""
    if chunk.layout is not None or len(chunk.kept) == len(chunk.rows):
        return layer
    return layer.rows(index_on(layer.wkv.device, chunk.kept))


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
    watch: Callable[[int], Watch | None] = lambda place: None,
) -> Scores:
    """Scores of all targets, read chunk by chunk without gradients.

    Args:
        tokens: int64 [B, T] on the host.
        chunks: of `cut`, on the model's device.
        target_sets: int64 [M] each, on the device.
        memories: takes what each chunk leaves; without it, that is forgotten as soon as nobody begins from it.
        watch: called before each with its place in the list, for what watches it, see `LanguageModel.forward`.
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
        hidden, state = run_chunk(model, tokens, chunk, memories.start_of(chunk), watch(place))
        if state is not None:
            memories.keep(place, state)
        if len(chunk.scored):
            for whole, own in zip(scores, chunk_scores(model, hidden, chunk, target_sets), strict=True):
                for values, found in zip(whole, own, strict=True):
                    values.index_copy_(0, chunk.scored, found)
        if forgets:
            for index in {index for index, _ in chunk.sources if last_use[index] == place}:
                memories.drop(index)
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
    return read_scores(model, tokens, [chunk.to(model.device) for chunk in chunks], target_sets)
