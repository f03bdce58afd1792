"""Which documents make up which batch.

Four modes. x = tokens[0 … R-2] and y = tokens[1 … R-1] of the R = ctx_len + 1 tokens at most
that a row takes.

- `get`: windows of R tokens at random places of the whole stream, across document borders.
- `pad`: a document per row, cut to R, padded as far as the longest of its batch needs.
- `only`: a document alone, cut to R; nothing padded.
- `pack`: documents, each cut to R, share a row of micro_bsz·ctx_len positions, with the recurrent
  state reset at their borders; nothing padded, a row is as long as what it holds.

Order. A step of the run is a batch per rank; step s of rank r is *slot* s·world_size + r, so that
n ranks see what one rank sees in n accumulated steps. A pass visits every document once, in an
order that is a function of (seed, pass); its slots come one after the other and a new pass
follows. Nothing is dropped. At the end of a pass of `pad` and `only` the documents that are left
are spread over the ranks, in smaller batches; when fewer documents than ranks are left, the ranks
without one repeat documents of the pass, so that all ranks take equally many steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import ConfigError, DataError
from .batches import Batch, packed_batch, padded_batch
from .documents import Documents, Positions
from .packing import RowPlan, pass_generator

MODES = ("get", "pad", "only", "pack")

_WINDOW_STREAM = 0x6765_7400  # keeps `get`'s random numbers apart from those of the passes
_WINDOW_ATTEMPTS = 1000


@dataclass(frozen=True)
class SamplingPlan:
    """What a run will see, in numbers for the user.

    Attributes:
        mode: get, pad, only or pack.
        documents: that are visited.
        tokens: of the source, everything included.
        targets_per_pass: positions of one pass that are not padding (with `get`: the stream's length).
        counted_targets_per_pass: those of them that the loss is taken on.
        cut_documents: documents longer than ctx_len + 1 tokens.
        lost_tokens: their tokens beyond it, never seen (0 with `get`).
        unanswered_documents: left out, because no answer begins within ctx_len + 1 tokens.
        padding_share: of the positions of one pass, those that are padding: 0 to 1.
        batches_per_pass: on each rank.
        batches_per_epoch: on each rank.
    """

    mode: str
    documents: int
    tokens: int
    targets_per_pass: int
    counted_targets_per_pass: int
    cut_documents: int
    lost_tokens: int
    unanswered_documents: int
    padding_share: float
    batches_per_pass: int
    batches_per_epoch: int

    @property
    def passes_per_epoch(self) -> float:
        """How often an epoch goes through the data."""
        return self.batches_per_epoch / self.batches_per_pass

    def statements(self) -> tuple[str, ...]:
        """What happens to data that do not fit, one sentence each; empty when all do."""
        said = []
        if self.cut_documents:
            said.append(
                f"{self.cut_documents} of {self.documents} documents are longer than a row and are cut: "
                f"{self.lost_tokens} of {self.tokens} tokens ({self.lost_tokens / self.tokens:.1%}) are "
                "never seen; a larger --ctx_len keeps more."
            )
        if self.unanswered_documents:
            said.append(
                f"{self.unanswered_documents} documents left out: no answer begins within a row; a larger "
                "--ctx_len keeps them."
            )
        if self.padding_share >= 0.2:
            said.append(f"{self.padding_share:.0%} of the positions are padding; --dataload pack has none.")
        return tuple(said)


class BatchDataset(Dataset[Batch]):
    """Every batch of a run, by its step: `dataset[step]` is a pure function of the arguments.

    Steps count batches of this rank from the start of the run, without end; `len` is an epoch.

    Args:
        documents: see `open_documents`.
        mode: one of MODES.
        ctx_len: tokens of a row at most.
        micro_bsz: rows of a batch; with `pack` they are joined to a single one.
        seed: 0 or more.
        rank: of this process, among `world_size`.
        world_size: processes that train on batches of their own.
        epoch_steps: batches of an epoch on each rank; 0 means one pass over the documents. With
            `get`, where nothing is exhausted, a pass is as many windows as the stream is long.

    Raises:
        ConfigError: unknown mode, or `only` with more than one row.
        DataError: data too short for `get`, or no document with an answer within a row.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        mode: str,
        ctx_len: int,
        micro_bsz: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epoch_steps: int = 0,
    ) -> None:
        assert ctx_len >= 1
        assert micro_bsz >= 1
        assert seed >= 0
        assert epoch_steps >= 0
        assert 0 <= rank < world_size
        if mode not in MODES:
            raise ConfigError(f"--dataload {mode} is unknown; known are {', '.join(MODES)}.")
        if mode == "only" and micro_bsz != 1:
            raise ConfigError(
                f"--dataload only takes a document alone, so --micro_bsz has to be 1, not {micro_bsz}; "
                "use --dataload pad or pack for several at a time."
            )
        self.documents = documents
        self.mode = mode
        self._row_tokens = ctx_len + 1
        self._micro_bsz = micro_bsz
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._current_pass: tuple[int, list[Positions]] | None = None

        counted = documents.counted_targets(self._row_tokens)
        self._visited: Positions = np.flatnonzero(counted)
        self._lengths = np.minimum(documents.sizes[self._visited], self._row_tokens) - 1
        self._rows: RowPlan | None = None
        if mode == "get":
            self._check_windows()
            windows = -(-documents.total_tokens // ctx_len)
            self._slots_per_pass = self._whole_steps(-(-windows // micro_bsz))
        elif not len(self._visited):
            raise DataError(
                f"{documents.source} cannot be used with --ctx_len {ctx_len}: no answer begins within so "
                "many tokens, and the loss is on answers only; use a larger --ctx_len."
            )
        elif mode == "pack":
            self._rows = RowPlan(self._lengths, micro_bsz * ctx_len, seed, world_size)
            self._slots_per_pass = self._rows.rows
        else:
            self._slots_per_pass = self._whole_steps(-(-len(self._visited) // micro_bsz))
        batches_per_pass = self._slots_per_pass // world_size
        self.plan = self._make_plan(int(counted.sum()), batches_per_pass, epoch_steps or batches_per_pass)

    def __len__(self) -> int:
        return self.plan.batches_per_epoch

    def __getitem__(self, step: int) -> Batch:
        slot = step * self._world_size + self._rank
        if self.mode == "get":
            return self._windows(slot)
        pass_number, place = divmod(slot, self._slots_per_pass)
        indices = self._pass_slots(pass_number)[place]
        make = packed_batch if self.mode == "pack" else padded_batch
        return make(
            [self.documents.tokens(index, self._row_tokens) for index in indices],
            [self.documents.counted(index, self._row_tokens) for index in indices],
            indices.tolist(),
        )

    def describe(self, batch: Batch) -> str:
        """Names what a batch was made of, for messages."""
        if self.mode == "get":
            return f"tokens {_listed(batch.sample_indices)} and following of {self.documents.source}"
        numbers = [int(self.documents.numbers[index]) for index in batch.sample_indices]
        plural = "s" if len(numbers) > 1 else ""
        return f"{self.documents.unit}{plural} {_listed(numbers)} of {self.documents.source}"

    def loader(self, epoch: int = 0, skip_steps: int = 0) -> DataLoader[Batch]:
        """Batches epoch by epoch; see `EpochSampler`. Batches are made in the calling process."""
        return DataLoader(self, batch_size=None, sampler=EpochSampler(len(self), epoch, skip_steps))

    def _whole_steps(self, slots: int) -> int:
        return -(-slots // self._world_size) * self._world_size

    def _pass_slots(self, pass_number: int) -> list[Positions]:
        """Indices of the documents of every slot of a pass."""
        if self._current_pass is None or self._current_pass[0] != pass_number:
            if self._rows is not None:
                slots = [self._visited[row] for row in self._rows.pass_rows(pass_number)]
            else:
                slots = self._one_document_per_row(pass_number)
            self._current_pass = (pass_number, slots)
        return self._current_pass[1]

    def _one_document_per_row(self, pass_number: int) -> list[Positions]:
        order = pass_generator(self._seed, pass_number).permutation(self._visited)
        full = (self._slots_per_pass - self._world_size) * self._micro_bsz
        slots = [order[start : start + self._micro_bsz] for start in range(0, full, self._micro_bsz)]
        rest = order[full:]
        if len(rest) < self._world_size:
            rest = np.concatenate((rest, np.resize(order, self._world_size - len(rest))))
        return slots + np.array_split(rest, self._world_size)

    def _windows(self, slot: int) -> Batch:
        """Windows at uniformly random offsets in [0, total - R)."""
        rng = np.random.default_rng((self._seed, _WINDOW_STREAM, slot))
        stream, mask = self.documents.stream, self.documents.stream_counted
        offsets = []
        for _ in range(self._micro_bsz):
            for _ in range(_WINDOW_ATTEMPTS):
                offset = int(rng.integers(0, len(stream) - self._row_tokens))
                if mask is None or mask[offset + 1 : offset + self._row_tokens].any():
                    break
            else:
                raise DataError(
                    f"{self.documents.source} has so few answers that {_WINDOW_ATTEMPTS} random windows met "
                    "none; use --dataload pad or pack."
                )
            offsets.append(offset)
        spans = [slice(offset, offset + self._row_tokens) for offset in offsets]
        return padded_batch(
            [np.asarray(stream[span], dtype=np.int64) for span in spans],
            [None if mask is None else mask[span] for span in spans],
            offsets,
        )

    def _check_windows(self) -> None:
        total = self.documents.total_tokens
        if total <= self._row_tokens:
            raise DataError(
                f"{self.documents.source} has {total} tokens, but --dataload get takes windows of ctx_len + 1 "
                f"= {self._row_tokens} out of more than that; use a smaller --ctx_len, or --dataload pad."
            )

    def _make_plan(self, counted_targets: int, batches_per_pass: int, batches_per_epoch: int) -> SamplingPlan:
        documents = self.documents
        windows = self.mode == "get"
        sizes = documents.sizes[self._visited]
        lost = np.maximum(sizes - self._row_tokens, 0)
        targets = documents.total_tokens if windows else int(self._lengths.sum())
        if windows:
            mask = documents.stream_counted
            counted_targets = documents.total_tokens if mask is None else int(mask.sum())
        return SamplingPlan(
            mode=self.mode,
            documents=len(documents) if windows else len(self._visited),
            tokens=documents.total_tokens,
            targets_per_pass=targets,
            counted_targets_per_pass=counted_targets,
            cut_documents=0 if windows else int((lost > 0).sum()),
            lost_tokens=0 if windows else int(lost.sum()),
            unanswered_documents=0 if windows else len(documents) - len(self._visited),
            padding_share=self._padding_share(),
            batches_per_pass=batches_per_pass,
            batches_per_epoch=batches_per_epoch,
        )

    def _padding_share(self) -> float:
        """Of the positions of the first pass, over all ranks."""
        if self.mode != "pad" or self._micro_bsz == 1:
            return 0.0
        lengths = np.minimum(self.documents.sizes, self._row_tokens) - 1
        slots = [lengths[indices] for indices in self._pass_slots(0)]
        positions = sum(int(slot.max()) * len(slot) for slot in slots)
        return 1.0 - sum(int(slot.sum()) for slot in slots) / positions


class EpochSampler(Sampler[int]):
    """Steps of the run in order, an epoch at a time.

    Lightning calls `set_epoch` on a loader's sampler before every epoch.

    Args:
        epoch_steps: batches of an epoch.
        epoch: the one to begin with.
        skip_steps: of that epoch, steps already done.
    """

    def __init__(self, epoch_steps: int, epoch: int = 0, skip_steps: int = 0) -> None:
        assert 0 <= skip_steps < epoch_steps
        self._epoch_steps = epoch_steps
        self._epoch = epoch
        self._skip = (epoch, skip_steps)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._epoch_steps - self._skipped

    def __iter__(self) -> Iterator[int]:
        start = self._epoch * self._epoch_steps
        return iter(range(start + self._skipped, start + self._epoch_steps))

    @property
    def _skipped(self) -> int:
        return self._skip[1] if self._epoch == self._skip[0] else 0


def _listed(numbers: tuple[int, ...] | list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown
