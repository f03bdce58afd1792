"""DeepSpeed's Adam for the host, with which `--strategy deepspeed_*_offload` steps, and what building it takes.

DeepSpeed 0.19.8 compiles it at its first use, for this machine's CPU, through torch's `cpp_extension`: that takes ninja
on PATH, also when nothing is left to compile, a C++ compiler and Python's headers, but neither nvcc nor CUDA_HOME. Only
where DeepSpeed was installed with DS_BUILD_CPU_ADAM=1 is it there already. Nothing else that flags ask for is compiled
by a compiler of the host.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import runpy
import shlex
import shutil
import sysconfig
import time
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from src.device import global_rank
from src.errors import ConfigError, KernelError
from src.training.console import tell

_NAME = "cpu_adam"
"""DeepSpeed's for it."""
_BUILD_SECONDS = 60
"""That it takes at least (94 on a core of 2026)."""


def missing_tools() -> list[str]:
    """What building it would take and is not there, in words; empty where it is built."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = []
    if said := _missing_of_compiler(os.environ.get("CXX", "c++")):
        missing.append(f"no C++ compiler ({said})")
    if shutil.which("ninja") is None:
        missing.append("no ninja on PATH")
    if not headers.is_file():
        missing.append(f"no {headers}")
    return [] if not missing or _came_built() else missing


def _missing_of_compiler(command: str) -> str:
    """What is not there of a command that compiles, in words; empty where all is.

    Args:
        command: as torch takes it from CXX; it may begin with variables and wrappers (`ccache g++ -m64`).
    """
    try:
        words = shlex.split(command)
    except ValueError:  # quotes that do not end
        words = []
    programs = list(itertools.takewhile(lambda word: not word.startswith("-"), (w for w in words if "=" not in w)))
    if not programs:
        return f"CXX is {command!r}"
    if words != [command] and _takes_one_program():
        if shutil.which(command):
            return ""
        return f"torch {torch.__version__} takes one program from CXX, not {command!r}; it uses ccache by itself"
    absent = ", ".join(program for program in programs if shutil.which(program) is None)
    return f"{absent} in CXX={command!r}" if absent and len(words) > 1 else absent


def _takes_one_program() -> bool:
    """Whether torch quotes CXX as a whole, which it does since it puts a compiler cache before it (2.13 does)."""
    from torch.utils import cpp_extension

    return hasattr(cpp_extension, "_wrap_compiler")


def require_host_adam(strategy: str) -> None:
    """Refuses a strategy that offloads where its Adam cannot be built.

    Raises:
        ConfigError: naming what is missing.
    """
    if missing := missing_tools():
        raise ConfigError(
            f"--strategy {strategy} steps on the host with an Adam that DeepSpeed compiles when it is first used, and "
            f"here is {' and '.join(missing)}: install g++, ninja and Python's headers (apt install g++ ninja-build "
            f"python3-dev), or {_without(strategy)}"
        )


def make_host_adam(groups: list[dict[str, Any]], strategy: str, **options: Any) -> torch.optim.Optimizer:
    """That Adam, built if it is not yet.

    Args:
        groups: of parameters.
        strategy: what asks for it.
        options: of `deepspeed.ops.adam.DeepSpeedCPUAdam`.

    Raises:
        KernelError: with what the compiler said last.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from torch.utils.cpp_extension import _get_build_directory, get_default_build_root

    kept = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    try:
        own = _get_build_directory(_NAME, False)  # of this Python and CUDA; beside it may be others'
        if global_rank() == 0:
            for line in _waits(Path(own)):
                tell(f"note: {line}")
        return DeepSpeedCPUAdam(groups, **options)  # type: ignore[no-any-return]
    except (RuntimeError, OSError) as error:
        raise KernelError(
            f"DeepSpeed could not build its Adam for the host, with which --strategy {strategy} steps "
            f"({_reason(str(error.__cause__ or error))}): see that g++ can compile C++20 and {kept} can be written to, "
            f"or {_without(strategy)}"
        ) from error


def _waits(own: Path) -> Iterator[str]:
    """What makes the first use of it take long, where `own` is the folder in which torch builds it."""
    if _came_built():
        return
    lock = own / "lock"
    with contextlib.suppress(FileNotFoundError):  # nobody compiles it, or whoever did is done
        since = lock.stat().st_mtime
        if time.time() - since > _BUILD_SECONDS:  # else it may be that of another process of this run
            began = datetime.fromtimestamp(since).strftime("%Y-%m-%d %H:%M")
            yield (
                f"DeepSpeed waits for whoever compiles its Adam for the host since {began}, without end where that was "
                f"killed: then stop this run and remove {lock}"
            )
    if not (own / f"{_NAME}.so").exists():
        yield "DeepSpeed compiles its Adam for the host: one or two minutes, this time only"


def _without(strategy: str) -> str:
    return (
        f"use {strategy.removesuffix('_offload')}, with --optim paged_adamw8bit where its moments do not fit into the "
        "GPU's memory"
    )


def _reason(said: str) -> str:
    """The last line of a failed build that says why: ninja's own, which closes it, only says that it failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("ninja: build stopped")] or lines
    errors = [line for line in telling if "error:" in line]
    return (errors or telling or ["it does not say why"])[-1]


def _came_built() -> bool:
    """Whether DeepSpeed was installed with it, for machines with GPUs. Read without the import, which takes seconds."""
    found = find_spec("deepspeed")
    if found is None or not found.origin:
        return False
    record = Path(found.origin).with_name("git_version_info_installed.py")
    said = runpy.run_path(str(record)) if record.is_file() else {}
    return said.get("accelerator_name") == "cuda" and bool(said.get("installed_ops", {}).get(_NAME))
