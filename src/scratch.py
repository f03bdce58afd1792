"""Tensors that wait for their next turn outside of memory."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from src.system import can_reserve, reserve


class Scratch:
    """Keeps tensors in unnamed files, whose pages the system writes out when memory is short.

    A file is gone with its last tensor, and with the process however that ends.

    Args:
        folder: whose file system holds them.
        say: called with a sentence, once, when it cannot and tensors stay in memory from then on.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._fits = can_reserve()

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies, fp32, on the host and in one file; nobody is to write to them."""
        total = sum(tensor.numel() for tensor in tensors.values())
        room = self._mapped(total * 4) if self._fits and total else None
        flat = torch.empty(total) if room is None else torch.frombuffer(room, dtype=torch.float32)
        kept = {}
        for name, part in zip(tensors, flat.split([t.numel() for t in tensors.values()]), strict=True):
            kept[name] = part.view(tensors[name].shape).copy_(tensors[name].detach())
        return kept

    def _mapped(self, size_bytes: int) -> mmap.mmap | None:
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                reserve(file.fileno(), size_bytes)  # a page without room on the disk would kill the run
                return mmap.mmap(file.fileno(), size_bytes)
        except OSError as error:
            self._fits = False
            self._say(f"{self._folder} takes no scratch file ({error.strerror}): layers that wait stay in memory")
            return None
