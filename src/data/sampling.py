"""Which documents make up which batch.

Four modes. x = tokens[0 … R-2] and y = tokens[1 … R-1] of the R = ctx_len + 1 tokens at most
that a row takes.

- `get`: windows of R tokens at random places of the whole stream, across document borders.
- `pad`: a document per row, cut to R, padded as far as the longest of its batch needs.
- `only`: a document alone, cut to R; nothing padded.
- `pack`: documents, each cut to R, share a row of micro_bsz·ctx_len positions, with the recurrent
  state reset at their borders; nothing padded, a row is as long as what it holds.

Their order is that of `src.data.passes`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from src.config.data import DATALOAD_MODES
from src.data.batches import Batch, packed_batch, padded_batch
from src.data.documents import Documents, Mask, Positions, Tokens
from src.data.mixing import MixedIn, draws_of
from src.data.packing import RowPlan, rows_in_order
from src.data.passes import PassDataset, listed, shuffled_batches
from src.data.rounding import Rounding, ceil_div
from src.data.unseen import Unseen, unseen_of
from src.errors import ConfigError, DataError

_WINDOW_STREAM = 0x6765_7400  # keeps `get`'s random numbers apart from those of the passes
_WINDOW_ATTEMPTS = 1000


@dataclass(frozen=True)
class SamplingPlan:
    """What a run will see, in numbers for the user.

    Attributes:
        mode: get, pad, only or pack.
        documents: that are visited.
        tokens: of the source, everything included; of the documents of a pass where further data are mixed in.
        counted_targets_per_pass: targets of one pass that the loss is taken on (with `get`: of the stream).
        targets_per_pass: all of them.
        unseen: what no row shows; None with `get`, whose windows begin anywhere.
        padding_share: of the positions of one pass, those that are padding: 0 to 1.
        mixed_in: of further data: source, documents of a pass, documents there are, and targets of the first pass.
    """

    mode: str
    documents: int
    tokens: int
    counted_targets_per_pass: int
    targets_per_pass: int
    unseen: Unseen | None
    padding_share: float
    mixed_in: tuple[tuple[str, int, int, int], ...] = ()

    def statements(self) -> tuple[str, ...]:
        """What happens to data that do not fit, one sentence each; empty when all do."""
        said = [
            f"{drawn:,} of {self.documents:,} documents of a pass ({drawn / self.documents:.1%}; {targets:,} of "
            f"{self.targets_per_pass:,} targets) are from {source}, which has {there:,}: each comes once before any "
            "comes twice."
            for source, drawn, there, targets in self.mixed_in
        ]
        if self.unseen is not None:
            said += self.unseen.statements()
        if self.padding_share >= 0.2:
            said.append(f"{self.padding_share:.0%} of the positions are padding; --dataload pack has none.")
        return tuple(said)


@dataclass(frozen=True, eq=False)
class Sample:
    """What a row holds of one document, or a window.

    Attributes:
        name: its place in the source.
        tokens: int64 [n].
        counted: bool [n], whether the loss is taken on a token; on the first, which is only read, never.
        beyond: tokens of the document that do not fit the row.
    """

    name: str
    tokens: Positions
    counted: Mask
    beyond: int = 0


class BatchDataset(PassDataset[Batch]):
    """Every batch of a run on documents, by its step; see `PassDataset`.

    Args:
        documents: see `open_documents`.
        mode: one of DATALOAD_MODES.
        ctx_len: tokens of a row at most.
        micro_bsz: rows of a batch; with `pack` they are joined to a single one.
        seed: 0 or more; None: every pass in the order of the data.
        mixes: which of the documents are further data, of which each pass has a share; not with `get`. Their number is
            that of the first pass in every pass, but packed into rows they may take more or fewer.
        **share: `rank`, `world_size`, `epoch_steps` and `accumulate` of `PassDataset`. With `get`, where
            nothing is exhausted, a pass is as many windows as the stream is long.

    Raises:
        ConfigError: `only` with more than one row.
        DataError: data too short for `get`, or no document with a target that counts within a row.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        mode: str,
        ctx_len: int,
        micro_bsz: int,
        seed: int | None,
        mixes: Sequence[MixedIn] = (),
        **share: int,
    ) -> None:
        assert min(ctx_len, micro_bsz) >= 1
        assert seed is None or seed >= 0
        assert seed is not None or mode != "get"
        assert mode in DATALOAD_MODES, f"{mode} is none of {DATALOAD_MODES}"
        assert mode != "get" or not mixes
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

        self._counted = documents.counted_targets(self._row_tokens)
        self._mixes = mixes
        self._own, self._draws = draws_of(mixes, np.flatnonzero(self._counted), seed)
        self._visited = self._visited_in(0)
        self._lengths = self._lengths_of(self._visited)
        self._rows: RowPlan | None = None
        self._pass_ends = [0]
        if mode == "get":
            self._check_windows()
            batches_per_pass = ceil_div(documents.total_tokens, ctx_len * micro_bsz)
        elif not len(self._own):
            raise DataError(
                f"{documents.source} cannot be used with --ctx_len {ctx_len}: nothing that the "
                "loss is taken on stands within so many tokens; use a larger --ctx_len."
            )
        elif mode == "pack" and self._draws:
            batches_per_pass = len(self._divide(0))
        elif mode == "pack":
            self._rows = RowPlan(self._lengths, micro_bsz * ctx_len, seed)
            batches_per_pass = self._rows.rows
        else:
            batches_per_pass = ceil_div(len(self._visited), micro_bsz)
        super().__init__(batches_per_pass, **share)
        self.plan = self._make_plan()

    @property
    def most_positions(self) -> int:
        """Of a batch."""
        if self.mode == "get":
            return self._micro_bsz * (self._row_tokens - 1)
        if self.mode == "pack":
            room = self._micro_bsz * (self._row_tokens - 1)
            return room if self._draws else min(room, int(self._lengths.sum()))
        longest = max(self._lengths.max(), *(self._lengths_of(draws.indices).max() for draws in self._draws), 0)
        return min(self._micro_bsz, len(self._lengths)) * int(longest)

    def _divide(self, pass_number: int) -> list[Positions]:
        if self._rows is not None:
            return [self._visited[row] for row in self._rows.pass_rows(pass_number)]
        visited = self._visited_in(pass_number)
        if self.mode == "pack":
            room = self._micro_bsz * (self._row_tokens - 1)
            rows = rows_in_order(self._lengths_of(visited), room, self._seed, pass_number)
            return [visited[row] for row in rows]
        return shuffled_batches(visited, self._micro_bsz, self._seed, pass_number)

    def _place(self, number: int) -> tuple[int, int]:
        if self.mode != "pack" or not self._draws:
            return super()._place(number)
        while self._pass_ends[-1] <= number:
            self._pass_ends.append(self._pass_ends[-1] + len(self._pass(len(self._pass_ends) - 1)))
        pass_number = bisect_right(self._pass_ends, number) - 1
        return pass_number, number - self._pass_ends[pass_number]

    def _visited_in(self, pass_number: int) -> Positions:
        """int64: the documents of a pass; one that is mixed in may be there more than once."""
        return np.concatenate([self._own, *(draws.of_pass(pass_number) for draws in self._draws)])

    def _lengths_of(self, indices: Positions) -> Positions:
        """int64: positions that documents fill in a row."""
        return np.minimum(self.documents.sizes[indices], self._row_tokens) - 1

    def _batch(self, number: int, rounding: Rounding) -> Batch:
        make = packed_batch if self.mode == "pack" else padded_batch
        return make(*self._contents(number), rounding)

    def _contents(self, number: int) -> tuple[list[Tokens], list[Mask | None], list[int]]:
        """Tokens of a batch's documents or windows, which of them count, and their numbers."""
        if self.mode == "get":
            stream, mask = self.documents.stream, self.documents.stream_counted
            offsets = self._offsets(number)
            spans = [slice(offset, offset + self._row_tokens) for offset in offsets]
            windows: list[Tokens] = [np.asarray(stream[span], dtype=np.int64) for span in spans]
            return windows, [None if mask is None else mask[span] for span in spans], offsets
        indices = self._indices(number).tolist()
        tokens: list[Tokens] = [self.documents.tokens(index, self._row_tokens) for index in indices]
        return tokens, [self.documents.counted(index, self._row_tokens) for index in indices], indices

    def samples(self) -> Iterator[Sample]:
        """What the first pass is made of, in its order."""
        for number in range(self.batches_per_pass):
            for tokens, mask, index in zip(*self._contents(number), strict=True):
                counted = np.ones(len(tokens), dtype=np.bool_) if mask is None else mask.copy()
                counted[0] = False
                beyond = 0 if self.mode == "get" else int(self.documents.sizes[index]) - len(tokens)
                yield Sample(self._named([index]), np.asarray(tokens, np.int64), counted, beyond)

    @property
    def tokens_per_pass(self) -> int:
        if self.mode == "get":
            return self.batches_per_pass * self._micro_bsz * (self._row_tokens - 1)
        return int(self._lengths.sum())

    def _weight(self, number: int) -> int:
        """Targets that the loss is taken on."""
        if self.mode != "get":
            return int(self._counted[self._indices(number)].sum())
        mask = self.documents.stream_counted
        if mask is None:
            return self._micro_bsz * (self._row_tokens - 1)
        return sum(int(mask[offset + 1 : offset + self._row_tokens].sum()) for offset in self._offsets(number))

    def _positions_in(self, number: int) -> int:
        if self.mode == "get":
            return self._micro_bsz * (self._row_tokens - 1)
        lengths = np.minimum(self.documents.sizes[self._indices(number)], self._row_tokens) - 1
        return int(lengths.sum() if self.mode == "pack" else lengths.max() * len(lengths))

    def describe(self, batch: Batch) -> str:
        """Names what a batch was made of, for messages."""
        return self._named(batch.sample_indices)

    def _named(self, indices: Sequence[int]) -> str:
        if self.mode == "get":
            return f"tokens {listed(indices)} and following of {self.documents.source}"
        return self.documents.named(indices)

    def _offsets(self, number: int) -> list[int]:
        """Where the windows of a batch begin: uniformly random in [0, total - R)."""
        assert self._seed is not None
        rng = np.random.default_rng((self._seed, _WINDOW_STREAM, number))
        mask = self.documents.stream_counted
        offsets = []
        for _ in range(self._micro_bsz):
            for _ in range(_WINDOW_ATTEMPTS):
                offset = int(rng.integers(0, self.documents.total_tokens - self._row_tokens))
                if mask is None or mask[offset + 1 : offset + self._row_tokens].any():
                    break
            else:
                raise DataError(
                    f"{self.documents.source} has so little that the loss is taken on that {_WINDOW_ATTEMPTS} random "
                    "windows met none; use --dataload pad or pack."
                )
            offsets.append(offset)
        return offsets

    def _check_windows(self) -> None:
        total = self.documents.total_tokens
        if total <= self._row_tokens:
            raise DataError(
                f"{self.documents.source} has {total} tokens, but --dataload get takes windows of ctx_len + "
                f"1 = {self._row_tokens} out of more than that; use a smaller --ctx_len, or --dataload pad."
            )

    def _make_plan(self) -> SamplingPlan:
        documents = self.documents
        windows = self.mode == "get"
        counted_targets = int(self._counted[self._visited].sum())
        if windows:
            mask = documents.stream_counted
            counted_targets = documents.total_tokens if mask is None else int(mask.sum())
        return SamplingPlan(
            mode=self.mode,
            documents=len(documents) if windows else len(self._visited),
            tokens=int(documents.sizes[self._visited].sum()) if self._draws else documents.total_tokens,
            counted_targets_per_pass=counted_targets,
            targets_per_pass=documents.total_tokens if windows else int(self._lengths.sum()),
            unseen=None if windows else unseen_of(documents, self._visited, self._row_tokens, drawn=bool(self._draws)),
            mixed_in=tuple(
                (mix.source, len(drawn := draws.of_pass(0)), len(draws.indices), int(self._lengths_of(drawn).sum()))
                for mix, draws in zip(self._mixes, self._draws, strict=True)
            ),
            padding_share=self._padding_share(),
        )

    def _padding_share(self) -> float:
        """Of the positions of the first pass."""
        if self.mode != "pad" or self._micro_bsz == 1:
            return 0.0
        batches = [self._lengths_of(indices) for indices in self._pass(0)]
        positions = sum(int(batch.max()) * len(batch) for batch in batches)
        return 1.0 - int(self._lengths.sum()) / positions
