"""What of documents no row shows: the tokens beyond its end, and documents in which nothing is learnt before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from src.data.documents import Documents, Positions
from src.output import several

_MUCH = 0.1
"""A share of the data that is lost unless something is changed."""


@dataclass(frozen=True)
class Unseen:
    """Of documents, each in a row of its own or a part of one.

    Attributes:
        documents: that are visited.
        tokens: of the source, everything included; where documents of a pass are drawn, theirs.
        cut_documents: of those visited, longer than a row.
        cut_tokens: their tokens beyond it.
        left_out_documents: not visited, since the loss is taken on nothing of them within a row.
        left_out_tokens: theirs.
        unanswered_documents: those left out in which the loss is taken on something that stands behind the row.
        source_tokens: of the source, everything included.
    """

    documents: int
    tokens: int
    cut_documents: int
    cut_tokens: int
    left_out_documents: int
    left_out_tokens: int
    unanswered_documents: int
    source_tokens: int

    def statements(self, fate: str = "never seen") -> list[str]:
        """One sentence on what is cut and one on what is left out, where anything is; `fate` is what it is."""
        said = []
        if self.cut_documents:
            much = "warning: " if self.cut_tokens >= _MUCH * self.tokens else ""
            be = "is" if self.cut_documents == 1 else "are"
            said.append(
                f"{much}{self.cut_documents:,} of {self.documents:,} documents {be} longer than a row and {be} cut: "
                f"{_share(self.cut_tokens, self.tokens)} are {fate}; a larger --ctx_len keeps more."
            )
        if self.left_out_documents:
            of_all = self.documents + self.left_out_documents
            much = "warning: " if self.unanswered_documents >= _MUCH * of_all else ""
            keeps = {0: "", self.left_out_documents: "; a larger --ctx_len keeps them"}.get(
                self.unanswered_documents, f"; a larger --ctx_len keeps {self.unanswered_documents:,} of them"
            )
            more = "another " if self.cut_documents else ""
            said.append(
                f"{much}{several(self.left_out_documents, 'document')} left out, nothing that the loss is taken on "
                f"stands within a row: {more}{_share(self.left_out_tokens, self.source_tokens)} are {fate}{keeps}."
            )
        return said


def unseen_of(documents: Documents, visited: Positions, row_tokens: int, *, drawn: bool = False) -> Unseen:
    """Of documents cut to rows.

    Args:
        documents: all of them.
        visited: int64, those that rows are made of; `drawn`: of a pass that takes some only, perhaps more than once.
        row_tokens: that a row shows of one at most.
    """
    sizes = documents.sizes[visited]
    beyond = np.maximum(sizes - row_tokens, 0)
    left_out = documents.counted_targets(row_tokens) == 0
    # Which takes a while where there are millions.
    answered = documents.counted_targets(int(documents.sizes.max())) > 0 if left_out.any() else left_out
    return Unseen(
        documents=len(visited),
        tokens=int(sizes.sum()) if drawn else documents.total_tokens,
        cut_documents=int((beyond > 0).sum()),
        cut_tokens=int(beyond.sum()),
        left_out_documents=int(left_out.sum()),
        left_out_tokens=int(documents.sizes[left_out].sum()),
        unanswered_documents=int((left_out & answered).sum()),
        source_tokens=documents.total_tokens,
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} tokens ({part / whole:.1%})"
