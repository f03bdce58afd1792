"""Weights that are trained by parts of their names: `--train_parts`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from src.errors import ConfigError
from src.model.shape import ModelShape, Shape


def weights_by_part(
    parts: Sequence[str],
    shape: ModelShape,
    *,
    adapted: Collection[str] = (),
    packed: Collection[str] = (),
    way_out: str = "or give it an adapter (--targets)",
) -> dict[str, dict[str, Shape]]:
    """Part -> key and shape of the weights that it means.

    Args:
        parts: of names, see `ModelShape.part`.
        shape: of the model.
        adapted: matrices with adapters, which are left out.
        packed: what cannot be trained.
        way_out: from a packed one, beside `--quant 0`.

    Raises:
        ConfigError: a part names nothing, or what is packed.
    """
    found = {}
    for part in parts:
        named = shape.part(part)
        found[part] = {name: size for name, size in named.items() if name not in adapted}
        if not named:
            raise ConfigError(
                f"--train_parts {part} is part of no weight's name: use time, ln, emb, head, or a part of a name "
                "such as blocks.0.ffn"
            )
        if not found[part]:
            raise ConfigError(
                f"--train_parts {part} names only matrices that have an adapter, which trains them: leave it out, "
                "or leave them out of --targets"
            )
        frozen = set(packed).intersection(found[part])
        if frozen:
            raise ConfigError(
                f"--train_parts {part} names {min(frozen)}, which is packed and cannot be trained: use --quant 0, "
                f"{way_out}"
            )
    return found


def described(groups: Mapping[str, Mapping[str, Shape]]) -> list[str]:
    """How many values each part adds to those before it: "ln: 1,024"."""
    lines: list[str] = []
    seen: set[str] = set()
    for part, shapes in groups.items():
        lines.append(f"{part}: {value_count({k: size for k, size in shapes.items() if k not in seen}):,}")
        seen |= shapes.keys()
    return lines


def value_count(shapes: Mapping[str, Shape]) -> int:
    """Number of values in tensors of these shapes."""
    return sum(math.prod(size) for size in shapes.values())
