"""Signals that end a run or ask it to save itself."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
SAVING = ("SIGUSR1",)


@contextlib.contextmanager
def unharmed_by_save_requests() -> Iterator[None]:
    """A request to save does not end the process while there is nothing to save."""
    handlers = replaced(SAVING, lambda number, frame: None)
    try:
        yield
    finally:
        put_back(handlers)


def replaced(names: tuple[str, ...], handler: Any) -> dict[int, Any]:
    """Sets a handler for those signals that exist here and are not ignored; returns what they had."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return {number: signal.signal(number, handler) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}


def put_back(handlers: dict[int, Any]) -> None:
    """Undoes `replaced`."""
    for number, handler in handlers.items():
        if handler is not None:  # not set by Python, which cannot set it again
            signal.signal(number, handler)
