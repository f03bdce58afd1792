"""Held-out data on the base as clients use what was trained: not packed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint import Checkpoint
from src.loading import LoadOptions, open_model
from src.training.evaluation import HeldOut
from src.training.work import Work

SLOW_SECONDS = 60.0
"""A run does not measure held-out data again where it took longer than this."""

_WORKING_BYTES = 2**30
"""Kept free beside the weights: a batch's activations and a chunk of logits."""

_MEMORY_FILE = Path("/proc/meminfo")


def measure_unpacked(
    base: Checkpoint, tuned: Mapping[str, Tensor], options: LoadOptions, work: Work, packed_seconds: float
) -> HeldOut | str:
    """Scores what a file holds on its base in the computation dtype, beside the packed model that is still there.

    Args:
        base: what was packed.
        tuned: tensors of the file, and what adapters need beside it to start.
        options: how the run's model was loaded.
        work: has held-out data.
        packed_seconds: how long the packed model took.

    Returns:
        The measurement; or why there is none, as the end of a sentence, where it would take more than
        `SLOW_SECONDS` or the memory that is free.
    """
    assert work.measure is not None
    if packed_seconds > SLOW_SECONDS:
        return f"on the packed one it took {packed_seconds:.0f} s, and more than {SLOW_SECONDS:.0f} are too many"
    needed = base.info.shape.parameter_count * options.compute_dtype.itemsize + _WORKING_BYTES
    free = free_bytes(options.device)
    if free < needed:
        return f"it needs {needed / 2**30:.1f} GiB beside the packed one and {free / 2**30:.1f} are free"
    unpacked = dataclasses.replace(options, quant_type=None, quant_head=False)
    try:
        return work.measure(open_model(base, unpacked, start=tuned, quiet=True))
    except torch.cuda.OutOfMemoryError:
        return f"{free / 2**30:.1f} GiB of free memory were too little"


def free_bytes(device: torch.device) -> float:
    """Memory that a tensor on this device could take; of a host that does not say, infinitely much."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        available = re.search(r"MemAvailable: +(\d+) kB", _MEMORY_FILE.read_text(encoding="ascii"))
    except OSError:
        return math.inf
    return int(available[1]) * 1024 if available else math.inf
