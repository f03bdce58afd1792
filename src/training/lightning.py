"""Lightning, imported while something else goes on.

Its import takes longer than all else at a run's start: it brings torch's compiler, and torchmetrics, which brings every
library of images, language and statistics that happens to be installed. So it begins in the background as soon as it is
known that something is trained, while data are read, and it does without torchmetrics, of which Lightning itself needs
two names. Modules that import Lightning are imported when it is `ready`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

from src.startup import quick_imports

_NAME = "pytorch_lightning"
_PACKAGES = (_NAME, "lightning_fabric")
_METRICS = "torchmetrics"
_background: list[threading.Thread] = []


def begin() -> None:
    """Starts the import in the background, unless that was done before."""
    if _NAME in sys.modules or _background:
        return
    # Not a daemon: one that still imports when the process ends would end it badly.
    thread = threading.Thread(target=_try_to_import, name="lightning")
    _background.append(thread)
    thread.start()


def ready() -> None:
    """Waits for the import that was begun, if one was; afterwards modules that need Lightning can be imported."""
    while _background:
        _background.pop().join()
    _import()


def _try_to_import() -> None:
    with contextlib.suppress(Exception):  # it comes again in the run
        _import()


def _import() -> None:
    if _NAME in sys.modules:
        return
    with quick_imports(first=False):
        try:
            with _without_metrics():
                importlib.import_module(_NAME)
        except Exception:  # a Lightning that needs more of torchmetrics: from the beginning, with all of it
            for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]:
                del sys.modules[name]
            importlib.import_module(_NAME)


@contextlib.contextmanager
def _without_metrics() -> Iterator[None]:
    """Inside, `import torchmetrics` gives the two classes by which Lightning recognises what is none of ours.

    Afterwards the import gives the library again. Where it is loaded already, nothing changes.
    """
    if _METRICS in sys.modules:
        yield
        return
    stand_in = ModuleType(_METRICS)
    stand_in.__version__ = importlib.metadata.version(_METRICS)  # type: ignore[attr-defined]
    for name in ("Metric", "MetricCollection"):
        setattr(stand_in, name, type(name, (), {"__module__": _METRICS}))
    sys.modules[_METRICS] = stand_in
    try:
        yield
    finally:
        sys.modules.pop(_METRICS, None)
