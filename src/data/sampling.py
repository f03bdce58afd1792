"""Which documents make up which batch.

Four modes. x = tokens[0 … R-2] and y = tokens[1 … R-1] of the R = ctx_len + 1 tokens at most
that a row takes.

- `get`: windows of R tokens at random places of the whole stream, across document borders.
- `pad`: a document per row, cut to R, padded as far as the longest of its batch needs.
- `only`: a document alone, cut to R; nothing padded.
- `pack`: documents, each cut to R, share a row of micro_bsz·ctx_len positions, with the recurrent
  state reset at their borders; nothing padded, a row is as long as what it holds.

Order. All batches of a run form one endless stream: pass after pass, each a permutation of the
documents that is a function of (seed, pass). Ranks take turns: step s of rank r is batch
s·world_size + r of the stream. So ranks share a pass without overlap, take equally many steps, and
n ranks see what one rank sees in n steps. Nothing is dropped or repeated: the last batch of a pass
may have fewer rows, and a step in which a pass ends takes its other batches from the next pass.

An epoch is a number of steps of that stream. One pass means as many as it takes to see every
document, rounded up to whole optimizer steps; the next epoch goes on where this one ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from src.data.batches import Batch, packed_batch, padded_batch
from src.data.documents import Documents, Positions
from src.data.packing import RowPlan, pass_generator
from src.errors import ConfigError, DataError

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
        batches_per_pass: of all ranks together.
        batches_per_epoch: on each rank.
        passes_per_epoch: how often an epoch goes through the data.
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
    passes_per_epoch: float

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
        accumulate: batches of an optimizer step on each rank; an epoch is rounded up to whole ones.

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
        accumulate: int = 1,
    ) -> None:
        assert min(ctx_len, micro_bsz, accumulate) >= 1
        assert min(seed, epoch_steps) >= 0
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
        self._batches_per_step = accumulate * world_size
        self._passes: dict[int, list[Positions]] = {}

        counted = documents.counted_targets(self._row_tokens)
        self._counted = counted
        self._visited: Positions = np.flatnonzero(counted)
        self._lengths = np.minimum(documents.sizes[self._visited], self._row_tokens) - 1
        self._rows: RowPlan | None = None
        if mode == "get":
            self._check_windows()
            self._batches_per_pass = _ceil(documents.total_tokens, ctx_len * micro_bsz)
        elif not len(self._visited):
            raise DataError(
                f"{documents.source} cannot be used with --ctx_len {ctx_len}: no answer begins within so "
                "many tokens, and the loss is on answers only; use a larger --ctx_len."
            )
        elif mode == "pack":
            self._rows = RowPlan(self._lengths, micro_bsz * ctx_len, seed)
            self._batches_per_pass = self._rows.rows
        else:
            self._batches_per_pass = _ceil(len(self._visited), micro_bsz)
        steps = epoch_steps or _ceil(self._batches_per_pass, world_size)
        self.plan = self._make_plan(int(counted.sum()), _ceil(steps, accumulate) * accumulate)

    def __len__(self) -> int:
        return self.plan.batches_per_epoch

    def __getitem__(self, step: int) -> Batch:
        number = step * self._world_size + self._rank
        batch = self._windows(number) if self.mode == "get" else self._documents(number)
        if self._batches_per_step == 1:
            return batch
        first = number // self._batches_per_step * self._batches_per_step
        total = sum(self._target_count(first + i) for i in range(self._batches_per_step))
        return replace(batch, step_weight=batch.target_count * self._batches_per_step / total)

    def _documents(self, number: int) -> Batch:
        indices = self._indices(number)
        make = packed_batch if self.mode == "pack" else padded_batch
        return make(
            [self.documents.tokens(index, self._row_tokens) for index in indices],
            [self.documents.counted(index, self._row_tokens) for index in indices],
            indices.tolist(),
        )

    def _indices(self, number: int) -> Positions:
        pass_number, place = divmod(number, self._batches_per_pass)
        return self._pass_batches(pass_number)[place]

    def _target_count(self, number: int) -> int:
        """Targets that count in the batch with this number, all ranks counted on."""
        if self.mode == "get":
            unmasked = self.documents.stream_counted is None
            return self._micro_bsz * (self._row_tokens - 1) if unmasked else self._windows(number).target_count
        return int(self._counted[self._indices(number)].sum())

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

    def _pass_batches(self, pass_number: int) -> list[Positions]:
        """Indices of the documents of every batch of a pass, over all ranks."""
        if pass_number not in self._passes:
            if self._rows is not None:
                batches = [self._visited[row] for row in self._rows.pass_rows(pass_number)]
            else:
                order = pass_generator(self._seed, pass_number).permutation(self._visited)
                batches = np.split(order, range(self._micro_bsz, len(order), self._micro_bsz))
            # Two are kept, because an optimizer step may begin in one pass and end in the next.
            self._passes = {known: self._passes[known] for known in list(self._passes)[-1:]}
            self._passes[pass_number] = batches
        return self._passes[pass_number]

    def _windows(self, number: int) -> Batch:
        """Windows at uniformly random offsets in [0, total - R)."""
        rng = np.random.default_rng((self._seed, _WINDOW_STREAM, number))
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
                f"{self.documents.source} has {total} tokens, but --dataload get takes windows of ctx_len + "
                f"1 = {self._row_tokens} out of more than that; use a smaller --ctx_len, or --dataload pad."
            )

    def _make_plan(self, counted_targets: int, batches_per_epoch: int) -> SamplingPlan:
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
            batches_per_pass=self._batches_per_pass,
            batches_per_epoch=batches_per_epoch,
            passes_per_epoch=batches_per_epoch * self._world_size / self._batches_per_pass,
        )

    def _padding_share(self) -> float:
        """Of the positions of the first pass."""
        if self.mode != "pad" or self._micro_bsz == 1:
            return 0.0
        lengths = np.minimum(self.documents.sizes, self._row_tokens) - 1
        batches = [lengths[indices] for indices in self._pass_batches(0)]
        positions = sum(int(batch.max()) * len(batch) for batch in batches)
        return 1.0 - int(self._lengths.sum()) / positions


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


def _ceil(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _listed(numbers: tuple[int, ...] | list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown
