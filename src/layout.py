"""How one packed row of tokens divides into segments.

Documents packed into a row without padding, or prompts and the answers that continue them:
the linear layers see one long row, and only the recurrence and the token shift look at the
borders. Legend: T tokens of the row, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Carry:
    """Which roots of a packed row go on from a memory, and whose memory is wanted after it; all int64.

    Attributes:
        roots: [K], the roots that begin with the rows of a carried memory, in its order; the others begin anew.
        first: [K], positions of their first tokens.
        kept: [M], the roots whose memory is returned, in this order.
        last: [M], positions of their last tokens.
    """

    roots: Tensor
    first: Tensor
    kept: Tensor
    last: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """All four."""
        return [self.roots, self.first, self.kept, self.last]

    def to(self, device: torch.device | str) -> Carry:
        """The same on `device`."""
        return Carry(*(tensor.to(device, non_blocking=True) for tensor in self.tensors))


@dataclass(frozen=True)
class SegmentLayout:
    """Borders of the segments in a row [1, T], and which segment continues which.

    The first `roots` segments start from the start state; they fill tokens
    [0, root_tokens). Every later segment continues one of the roots: its recurrence starts
    from that root's final state, and the token before its first is that root's last. A root
    may be empty; a segment that continues it then starts like a root.

    Attributes:
        lengths: tokens of each segment, on the host.
        roots: number of root segments, first in the row.
        root_tokens: tokens of all roots together.
        root_borders: int32 [roots + 1], cumulative lengths of the roots, from 0.
        child_borders: int32 [S - roots + 1], cumulative lengths of the others, from 0.
        parents: int64 [S - roots], the root that each later segment continues.
        previous: int64 [T], position of the token before each token; -1 where there is none.
        carry: which roots continue what came before the row; None where none does and the memory of all is wanted.
    """

    lengths: tuple[int, ...]
    roots: int
    root_tokens: int
    root_borders: Tensor
    child_borders: Tensor
    parents: Tensor
    previous: Tensor
    carry: Carry | None = None

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> SegmentLayout:
        """Independent segments one after the other, each from the start state."""
        return cls.branching(lengths, [], [], device)

    @classmethod
    def branching(
        cls,
        root_lengths: Sequence[int],
        child_lengths: Sequence[int],
        parents: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> SegmentLayout:
        """Roots first, then segments that continue the roots named by `parents`."""
        assert len(child_lengths) == len(parents)
        assert all(0 <= parent < len(root_lengths) for parent in parents)
        root_ends = list(accumulate(root_lengths, initial=0))
        child_ends = list(accumulate(child_lengths, initial=0))
        root_tokens = root_ends[-1]
        previous = torch.arange(-1, root_tokens + child_ends[-1] - 1, dtype=torch.int64)
        for length, start in zip(root_lengths, root_ends, strict=False):
            if length:
                previous[start] = -1
        for length, start, parent in zip(child_lengths, child_ends, parents, strict=False):
            if length:
                previous[root_tokens + start] = root_ends[parent + 1] - 1 if root_lengths[parent] else -1

        def on_device(values: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        return cls(
            lengths=(*root_lengths, *child_lengths),
            roots=len(root_lengths),
            root_tokens=root_tokens,
            root_borders=on_device(root_ends, torch.int32),
            child_borders=on_device(child_ends, torch.int32),
            parents=on_device(parents, torch.int64),
            previous=previous.to(device),
        )

    def carrying(self, roots: Sequence[int], kept: Sequence[int]) -> SegmentLayout:
        """The same segments, some of which go on from a carried memory, or into one; see `Carry`.

        Args:
            roots: roots with tokens that continue what came before.
            kept: roots with tokens whose memory is wanted.
        """
        assert all(self.lengths[root] > 0 for root in (*roots, *kept))
        ends = list(accumulate(self.lengths))

        def positions(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64)

        carry = Carry(
            roots=positions(roots),
            first=positions([ends[root] - self.lengths[root] for root in roots]),
            kept=positions(kept),
            last=positions([ends[root] - 1 for root in kept]),
        )
        return replace(self, carry=carry.to(self.previous.device))

    @property
    def tokens(self) -> int:
        """Length T of the row."""
        return sum(self.lengths)

    @property
    def has_children(self) -> bool:
        """Whether some segment continues another."""
        return len(self.lengths) > self.roots

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that `to` moves."""
        own = [self.root_borders, self.child_borders, self.parents, self.previous]
        return own if self.carry is None else [*own, *self.carry.tensors]

    @property
    def last_positions(self) -> Tensor:
        """int64 [S] on the host: position of each segment's last token; -1 for an empty segment."""
        ends = list(accumulate(self.lengths))
        return torch.tensor([end - 1 if n else -1 for n, end in zip(self.lengths, ends, strict=True)])

    def to(self, device: torch.device | str) -> SegmentLayout:
        """The same layout with its tensors on `device`."""
        return replace(
            self,
            root_borders=self.root_borders.to(device, non_blocking=True),
            child_borders=self.child_borders.to(device, non_blocking=True),
            parents=self.parents.to(device, non_blocking=True),
            previous=self.previous.to(device, non_blocking=True),
            carry=None if self.carry is None else self.carry.to(device),
        )
