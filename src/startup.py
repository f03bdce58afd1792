"""What makes a program's imports shorter."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from src.system import cache_folder

_MOST_FOLDERS = 2


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


@contextlib.contextmanager
def uncompiled_imports() -> Iterator[None]:
    """Quick imports in which `torch.compile` leaves functions as they are.

    bitsandbytes compiles some of its functions, which nothing here calls, when it is imported: that brings torch's
    whole code generator, 600 modules.
    """
    variable = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with quick_imports(first=False):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def keep_bytecode() -> None:
    """Has Python keep bytecode in the user's cache folder where the libraries have none and it keeps none elsewhere.

    It then compiles all sources anew at every start, which takes twice as long as the rest of their import: where
    PYTHONDONTWRITEBYTECODE is set, as in many containers, or the libraries' folder cannot be written to. The folder has
    its name from the libraries' versions. PYTHONPYCACHEPREFIX comes before.
    """
    found = importlib.util.find_spec("torch")
    cache = cache_folder()
    if sys.pycache_prefix or cache is None or found is None or not found.origin:
        return
    kept = Path(importlib.util.cache_from_source(found.origin))
    libraries = kept.parents[2]
    if kept.exists() or (not sys.dont_write_bytecode and os.access(kept.parents[1], os.W_OK)):
        return
    versions = sorted(entry.name for entry in os.scandir(libraries) if entry.name.endswith(".dist-info"))
    place = cache / "bytecode" / hashlib.sha256(repr((str(libraries), versions)).encode()).hexdigest()[:16]
    with contextlib.suppress(OSError):
        if not place.exists():
            place.mkdir(parents=True)
            others = sorted(place.parent.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
            for folder in others[_MOST_FOLDERS:]:
                shutil.rmtree(folder, ignore_errors=True)
        sys.pycache_prefix = str(place)
        sys.dont_write_bytecode = False
