"""Tables of cases, of which the fast suite takes enough to see every value of every axis."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest


def covering(*axes: Iterable[Any]) -> list[Any]:
    """All combinations of the axes' values, as parameters of a test; those off a diagonal are slow.

    Args:
        axes: values; a tuple is one value, which stands for several parameters beside each other.
    """
    values = [list(axis) for axis in axes]
    sizes = [len(axis) for axis in values]
    # Axes of one size are shifted against each other whenever they begin anew.
    diagonal = {
        tuple((step + number * (step // size)) % size for number, size in enumerate(sizes))
        for step in range(max(sizes))
    }
    made = []
    for place in itertools.product(*map(range, sizes)):
        chosen = [axis[index] for axis, index in zip(values, place, strict=True)]
        flat = [part for value in chosen for part in (value if isinstance(value, tuple) else (value,))]
        made.append(pytest.param(*flat, marks=() if place in diagonal else (pytest.mark.slow,)))
    return made


def some(values: Iterable[Any], *fast: Any) -> list[Any]:
    """All values as parameters of a test, of which these are fast and the others slow."""
    listed = list(values)
    assert all(value in listed for value in fast)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in listed]


def pairs(**axes: Iterable[Any]) -> list[dict[str, Any]]:
    """A few combinations, one value of each axis by its name, that show any two values of two axes together."""
    values = {name: list(axis) for name, axis in axes.items()}
    missing = {
        ((one, first), (other, second))
        for one, other in itertools.combinations(values, 2)
        for first in values[one]
        for second in values[other]
    }
    order = {
        (name, value): (number, place) for number, name in enumerate(values) for place, value in enumerate(values[name])
    }
    used: Counter[tuple[str, Any]] = Counter()
    made = []
    while missing:
        row = dict(min(missing, key=lambda pair: [order[one] for one in pair]))
        for name in values:
            if name not in row:
                gains = [len(_shown({**row, name: value}, values) & missing) for value in values[name]]
                places = range(len(gains))
                best = max(places, key=lambda place: (gains[place], -used[name, values[name][place]]))
                row[name] = values[name][best]
        row = {name: row[name] for name in values}
        used.update(row.items())
        missing -= _shown(row, values)
        made.append(row)
    return made


def _shown(row: dict[str, Any], order: Iterable[str]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """What a part of a combination shows together."""
    return set(itertools.combinations([(name, row[name]) for name in order if name in row], 2))
