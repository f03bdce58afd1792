"""Documents: pieces of one long array of tokens, wherever that array comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from src.errors import DataError
from src.output import plural_of

Tokens = npt.NDArray[np.integer[Any]]
Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_BLOCK_TOKENS = 1 << 22
_NAMED_DOCUMENTS = 8


class TokenStream(Protocol):
    """What documents are slices of: an array, or a file that is read slice by slice."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a token, an integer."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> Tokens: ...


@dataclass(frozen=True, eq=False)
class Documents:
    """Training documents as slices of `stream`, each of two tokens or more.

    Attributes:
        source: the file, for messages.
        unit: what one document is in that file: "document", "line", "piece".
        stream: integer [total], every token of the source in order; often still in its file.
        starts: int64 [n], where each document begins in the stream.
        sizes: int64 [n], its tokens, end-of-document token included. Documents may overlap.
        numbers: int64 [n], its number in the source (lines and pieces count from 1).
        stream_counted: bool [total], whether a token is one the loss is taken on, as a target;
            None when all are.
        statements: what the user should know about the reading, one sentence each.
        files: those that the source consists of; none where it is one.
        file_of: int64 [n], which of them a document is from; None where the source is one.
        selected_tokens: of these documents, where they are some of the source's; None where they are all.
    """

    source: str
    unit: str
    stream: TokenStream
    starts: Positions
    sizes: Positions
    numbers: Positions
    stream_counted: Mask | None = None
    statements: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    file_of: Positions | None = None
    selected_tokens: int | None = None

    def __post_init__(self) -> None:
        assert self.file_of is None or len(self.file_of) == len(self.sizes)

    @classmethod
    def from_stream(
        cls,
        source: str,
        stream: TokenStream,
        starts: Positions,
        sizes: Positions,
        vocab_size: int,
        *,
        unit: str = "document",
        numbers: Positions | None = None,
        stream_counted: Mask | None = None,
        statements: Sequence[str] = (),
        files: tuple[str, ...] = (),
        file_of: Positions | None = None,
    ) -> Documents:
        """Checks the tokens and leaves out documents too short to hold an input and a target.

        `numbers` defaults to 0, 1, ….

        Raises:
            DataError: nothing there, a token id outside the vocabulary, only documents of fewer
                than two tokens, or none with a token that the loss is taken on.
        """
        numbers = np.arange(len(sizes), dtype=np.int64) if numbers is None else numbers
        if len(sizes) == 0 or not sizes.any():
            raise DataError(f"{source} is empty: it holds no tokens to train on.")
        _check_vocabulary(source, stream, starts, numbers, unit, vocab_size)
        usable = sizes >= 2
        if not usable.any():
            raise DataError(
                f"{source} cannot be used: its longest {unit} has one token, and training needs two, an "
                "input and a target; check how the file was made."
            )
        short = int(len(sizes) - usable.sum())
        if short:
            kind = unit if short == 1 else f"{unit}s"
            statements = (*statements, f"{short} {kind} of fewer than two tokens left out.")
        documents = cls(
            source=source,
            unit=unit,
            stream=stream,
            starts=starts[usable],
            sizes=sizes[usable],
            numbers=numbers[usable],
            statements=tuple(statements),
            files=files,
            file_of=None if file_of is None else file_of[usable],
        )
        return documents if stream_counted is None else documents.masked(stream_counted)

    def masked(self, stream_counted: Mask, statements: Sequence[str] = ()) -> Documents:
        """With a choice of what the loss is taken on, and what there is to say about it.

        Raises:
            DataError: it is taken on nothing.
        """
        if not stream_counted.any():
            raise DataError(
                f"{self.source} cannot be used: the loss is taken on no token of it; look at it with --preview 1 "
                "--loss_mask pad."
            )
        chosen = replace(self, stream_counted=stream_counted)
        without = int((chosen.counted_targets(int(self.sizes.max())) == 0).sum())
        units = plural_of(self.unit)
        said = [f"{without} of {len(self)} {units} hold nothing that the loss is taken on."] if without else []
        return replace(chosen, statements=(*self.statements, *statements, *said))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole source, documents left out included; of selected ones theirs."""
        return len(self.stream) if self.selected_tokens is None else self.selected_tokens

    def selected(self, indices: Positions) -> Documents:
        """Some of the documents, in the order given."""
        sizes = self.sizes[indices]
        return replace(
            self,
            starts=self.starts[indices],
            sizes=sizes,
            numbers=self.numbers[indices],
            file_of=None if self.file_of is None else self.file_of[indices],
            selected_tokens=int(sizes.sum()),
        )

    def tokens(self, index: int, limit: int | None = None) -> Positions:
        """int64, tokens of a document, or its first `limit`."""
        return np.asarray(self.stream[self._span(index, limit)], dtype=np.int64)

    def counted(self, index: int, limit: int | None = None) -> Mask | None:
        """bool aligned with `tokens`: whether the loss is taken on a token as a target; None = all."""
        return None if self.stream_counted is None else self.stream_counted[self._span(index, limit)]

    def counted_targets(self, limit: int) -> Positions:
        """int64 [n]: targets the loss is taken on among the first `limit` tokens of each document.

        A document's first token is never a target.
        """
        sizes = np.minimum(self.sizes, limit)
        mask = self.stream_counted
        if mask is None:
            return sizes - 1
        spans = zip((self.starts + 1).tolist(), (self.starts + sizes).tolist(), strict=True)
        return np.fromiter((np.count_nonzero(mask[begin:end]) for begin, end in spans), np.int64, len(self))

    def named(self, indices: Sequence[int]) -> str:
        """The places of documents, for messages: the first eight, and how many more."""
        places: dict[str, list[int]] = {}
        for index in indices[:_NAMED_DOCUMENTS]:
            file = self.source if self.file_of is None else self.files[int(self.file_of[index])]
            places.setdefault(file, []).append(int(self.numbers[index]))
        more = f" and {len(indices) - _NAMED_DOCUMENTS} more" if len(indices) > _NAMED_DOCUMENTS else ""
        parts = []
        for file, numbers in places.items():
            plural = "s" if len(numbers) > 1 or (more and len(places) == 1) else ""
            rest = more if file == next(reversed(places)) else ""
            parts.append(f"{self.unit}{plural} {', '.join(map(str, numbers))}{rest} of {file}")
        return ", ".join(parts)

    def _span(self, index: int, limit: int | None) -> slice:
        start, size = int(self.starts[index]), int(self.sizes[index])
        return slice(start, start + (size if limit is None else min(size, limit)))


def _check_vocabulary(
    source: str, stream: TokenStream, starts: Positions, numbers: Positions, unit: str, vocab_size: int
) -> None:
    limits = np.iinfo(stream.dtype)
    if limits.min >= 0 and limits.max < vocab_size:
        return
    for block_start in range(0, len(stream), _BLOCK_TOKENS):
        block = stream[block_start : block_start + _BLOCK_TOKENS]
        if int(block.max()) < vocab_size and int(block.min()) >= 0:
            continue
        offset = int(np.flatnonzero((block >= vocab_size) | (block < 0))[0])
        document = int(np.searchsorted(starts, block_start + offset, side="right")) - 1
        raise DataError(
            f"{source} holds token id {int(block[offset])} in {unit} {numbers[document]}, but the model's "
            f"vocabulary has ids 0 to {vocab_size - 1}; the data was made with another tokenizer: make it "
            "again with the one of this model."
        )


class JoinedStream:
    """Streams of tokens one after the other."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self._streams = streams
        self._ends = np.cumsum([len(stream) for stream in streams])
        self.dtype = np.result_type(*(stream.dtype for stream in streams))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, span: slice, /) -> Tokens:
        begin, end, step = span.indices(len(self))
        assert step == 1
        pieces = []
        place = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            before = int(self._ends[place - 1]) if place else 0
            until = min(end, int(self._ends[place]))
            pieces.append(self._streams[place][begin - before : until - before])
            begin, place = until, place + 1
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)


def _together(parts: Sequence[Documents]) -> tuple[str, ...]:
    """What there is to say about several sources, each sentence once, behind those that it is about."""
    sources: dict[str, list[str]] = {}
    for part in parts:
        for said in part.statements:
            sources.setdefault(said, []).append(part.source)
    return tuple(f"{', '.join(about)}: {said}" for said, about in sources.items())


def joined(parts: Sequence[Documents], source: str) -> Documents:
    """Documents of several sources as those of one.

    Args:
        parts: at least one.
        source: what all of them are called.
    """
    if len(parts) == 1:
        return replace(parts[0], source=source)
    shifts = np.cumsum([0, *(len(part.stream) for part in parts)])[:-1]
    files: list[str] = []
    file_of = []
    for part in parts:
        file_of.append(len(files) + (np.zeros(len(part), np.int64) if part.file_of is None else part.file_of))
        files += part.files or (part.source,)
    masked = any(part.stream_counted is not None for part in parts)
    counted = [
        np.ones(len(part.stream), np.bool_) if part.stream_counted is None else part.stream_counted for part in parts
    ]
    return Documents(
        source=source,
        unit=parts[0].unit if len({part.unit for part in parts}) == 1 else "document",
        stream=JoinedStream([part.stream for part in parts]),
        starts=np.concatenate([part.starts + shift for part, shift in zip(parts, shifts, strict=True)]),
        sizes=np.concatenate([part.sizes for part in parts]),
        numbers=np.concatenate([part.numbers for part in parts]),
        stream_counted=np.concatenate(counted) if masked else None,
        statements=_together(parts),
        files=tuple(files),
        file_of=np.concatenate(file_of),
        selected_tokens=sum(part.total_tokens for part in parts),
    )
