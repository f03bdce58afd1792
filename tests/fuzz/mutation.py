"""Damaged inputs, each a function of a seed input and a number."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

FRAGMENTS = (
    b"\0", b"\r", b"\r\n", b"\n\n", b'"', b'""', b",", b",,,", b"{", b"}", b"[", b"]", b":", b"\\", b"\xff",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"null", b"true", b"-1", b"1e999", b"NaN",
    b"9" * 25, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\xe2\x80\xa8", b"\x1a", b" " * 100, b"User: ",
    b"\n\nAssistant:", "é好".encode(),
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**32 - 1, 2**62, 2**63 - 1, -(2**63))


def damaged(seeds: Sequence[bytes], number: int) -> bytes:
    """Input `number`: one of the seeds after one to five changes."""
    chance = random.Random(number)
    content = chance.choice(seeds)
    for _ in range(chance.choice((1, 1, 2, 3, 5))):
        content = chance.choice(_CHANGES)(content, chance, seeds)
    return content


def _span(content: bytes, chance: random.Random, longest: int = 40) -> tuple[int, int]:
    start = chance.randint(0, len(content))
    return start, min(len(content), start + chance.randint(0, longest))


def _flip(content: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(content: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    return content[: chance.randint(0, len(content))]


def _remove(content: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _span(content, chance)
    return content[:start] + content[stop:]


def _repeat(content: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _span(content, chance)
    return content[:stop] + content[start:stop] * chance.randint(1, 5) + content[stop:]


def _insert(content: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    start, _stop = _span(content, chance)
    return content[:start] + chance.choice(FRAGMENTS) + content[start:]


def _replace(content: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    start, stop = _span(content, chance)
    return content[:start] + chance.choice(FRAGMENTS) + content[stop:]


def _number(content: bytes, chance: random.Random, _: Sequence[bytes]) -> bytes:
    """An integer of 4 or 8 bytes over what stands there."""
    size = chance.choice((4, 8))
    start = chance.randint(0, max(len(content) - size, 0))
    value = chance.choice(NUMBERS) % (1 << 8 * size)
    return content[:start] + struct.pack("<Q", value)[:size] + content[start + size :]


def _splice(content: bytes, chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    other = chance.choice(seeds)
    return content[: chance.randint(0, len(content))] + other[chance.randint(0, len(other)) :]


_CHANGES: tuple[Callable[[bytes, random.Random, Sequence[bytes]], bytes], ...] = (
    _flip, _cut, _remove, _repeat, _insert, _replace, _number, _splice,
)  # fmt: skip
