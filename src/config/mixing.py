"""Further data that are mixed into the training data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from src.config.flags import shortened

_SHARES = re.compile(r"\s*(?P<path>[^\s,].*?):(?P<share>\d*\.?\d+(?:[eE][-+]?\d+)?)(?:[\s,]+|\Z)")
_MOST = 0.99


class MixedShare(NamedTuple):
    """Data, and their share of the documents of each pass: 0 to 1."""

    path: str
    share: float


def mixes_in(text: str) -> tuple[tuple[MixedShare, ...], str]:
    """What a value of --mix names, `FILE:SHARE` each, and what is wrong with it, as the end of a sentence."""
    if not text.strip():
        return (), ""
    found = list(_matches(text))
    if not found or found[-1].end() != len(text):
        return (), "is not understood: write FILE:SHARE for each, as in other.jsonl:0.2"
    for match in found:
        if not 0 < float(match["share"]) < 1:
            given = f"gives {shortened(match['path'])} the share {shortened(match['share'])}"
            return (), f"{given}: it must be above 0 and below 1"
    mixes = tuple(MixedShare(match["path"], float(match["share"])) for match in found)
    total = sum(mix.share for mix in mixes)
    if total > _MOST:
        return (), f"leaves {1 - total:.3g} of the documents to the training data: lower the shares"
    return mixes, ""


def _matches(text: str) -> Iterator[re.Match[str]]:
    place = 0
    while place < len(text) and (match := _SHARES.match(text, place)):
        yield match
        place = match.end()
