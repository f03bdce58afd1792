"""What makes a program's imports shorter."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports(*, first: bool = True) -> Iterator[None]:
    """Inside, garbage collection rests: it would go through all classes and functions again and again, a sixth of the
    time, and none of them is garbage. Torch also looks for no devices beside CPUs and NVIDIA's.

    Args:
        first: whether nothing but imports has been done so far. Collections then leave out what is there, for good.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if first:
                gc.freeze()
            gc.enable()
