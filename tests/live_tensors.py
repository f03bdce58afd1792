"""What is alive while something runs, by storage: a device's memory as its allocator would count it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Notes storages as operations make them, until nobody holds them any more.

    Args:
        own: tensors that were there before, and are not counted.

    Attributes:
        peak: bytes of all that lived at one time, at most.
    """

    def __init__(self, own: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._living: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._at_peak: list[tuple[weakref.ref[Any], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    @property
    def sizes(self) -> list[int]:
        """Bytes of each storage that is alive."""
        return [size for _, size in self._living.values()]

    @property
    def passing(self) -> int:
        """Of the peak, bytes of what is gone by now."""
        return sum(size for reference, size in self._at_peak if reference() is None)

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if not size or address in self._living or address in self._own:
            return
        self._living[address] = weakref.ref(storage, lambda _: self._forget(address)), size
        self._bytes += size
        if self._bytes > self.peak:
            self.peak, self._at_peak = self._bytes, list(self._living.values())

    def _forget(self, address: int) -> None:
        _, size = self._living.pop(address)
        self._bytes -= size
