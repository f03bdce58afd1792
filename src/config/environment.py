"""What a process is started with: numbers in the environment, of launchers, threads and progress bars; a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from src.config.flags import shortened
from src.errors import ConfigError

_LARGEST = 2**31 - 1
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")
_SMALLEST_AND_LARGEST = {
    **dict.fromkeys(
        ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
        (0, _LARGEST),
    ),
    **dict.fromkeys(
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_NNODES"), (1, _LARGEST)
    ),
    "MASTER_PORT": (1, 2**16 - 1),
}
"""What torchrun, srun and Lightning set, with the range of each."""
_BARS = {
    **dict.fromkeys(("TQDM_NCOLS", "TQDM_NROWS", "TQDM_POSITION", "TQDM_INITIAL"), (0, _LARGEST)),
    "TQDM_UNIT_DIVISOR": (1, _LARGEST),
}
_TIMES_OF_BARS = ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL", "TQDM_MINITERS", "TQDM_SMOOTHING", "TQDM_DELAY")
"""What progress bars read when they are imported; the latter are any numbers that are not negative."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""One number, or several with commas, for parallel regions in each other."""


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses what libraries would end in a traceback over, or silently take for something else.

    Raises:
        ConfigError: naming every variable that holds no number of its range.
    """
    ranges = {**_SMALLEST_AND_LARGEST, **_BARS, **dict.fromkeys(_THREADS, (1, _LARGEST))}
    problems = [
        f"the environment variable {name} is {shortened(environment[name])!r}, not a number from 0 on"
        for name in _TIMES_OF_BARS
        if not _NUMBER.fullmatch(environment.get(name, "0"))
    ]
    for name, (smallest, largest) in ranges.items():
        text = environment.get(name)
        if text is None:
            continue
        parts = text.split(",") if name in _THREADS else [text]
        if not all(_is_number(part.strip(), smallest, largest) for part in parts):
            upper = f" to {largest:,}" if largest < _LARGEST else " on"
            problems.append(
                f"the environment variable {name} is {shortened(text)!r}, not a whole number from {smallest}{upper}"
            )
    if problems:
        way_out = "unset it, or set it as the launcher would" if len(problems) == 1 else "unset them"
        raise ConfigError(f"{'; '.join(problems)}: {way_out}")


def check_folder() -> None:
    """Refuses to work in a folder that is gone, from which libraries cannot be loaded and no name leads anywhere.

    Raises:
        ConfigError: saying so.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError(
            "the folder in which this was started has been removed (one that has its name again is another): change "
            "into one that is there, and start it again"
        ) from error


def _is_number(text: str, smallest: int, largest: int) -> bool:
    if not (text.isascii() and text.isdecimal() and len(text.lstrip("0")) <= len(str(largest))):
        return False
    return smallest <= int(text) <= largest
