"""Builds the CUDA sources of `cuda/` on first use and loads them, or says exactly what went wrong."""

import functools
import logging
import os
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from src.errors import KernelError

SOURCE_DIRECTORY = Path(__file__).resolve().parents[2] / "cuda"
LOWEST_CAPABILITY = (8, 0)
NVCC_FLAGS = ("-O3", "--expt-relaxed-constexpr", "-lineinfo")
CXX_FLAGS = ("-O2",)

# What the compilers and their helpers print first when something is wrong.
_ERROR_LINE = re.compile(
    r"(error\b.*:|: (fatal )?error|fatal\s*:|undefined reference|No space left|Permission denied)", re.I
)
_REMEDIES = (
    (
        r"unsupported gpu architecture",
        "install a CUDA toolkit that knows this GPU (12.8 or newer knows all up to sm_120)",
    ),
    (
        r"unsupported gnu version|unsupported clang version",
        "install a host compiler that this nvcc supports, or a newer toolkit",
    ),
    (r"no space left", "free disk space, or set TORCH_EXTENSIONS_DIR to a folder with room"),
    (r"permission denied|read-only file system", "set TORCH_EXTENSIONS_DIR to a folder you can write to"),
    (
        r"mismatches the version",
        "install the CUDA toolkit version that torch was built with, or the torch of this toolkit",
    ),
    (r"Python\.h", "install the Python development headers (for example the package python3-dev)"),
    (
        r"cuda_home|nvcc.*not found|No such file or directory: .*nvcc",
        "install the CUDA toolkit and set CUDA_HOME to it",
    ),
    (r"ninja", "install ninja (pip install ninja)"),
    (
        r"c\+\+.*not found|g\+\+.*not found|No such file or directory: 'c\+\+'",
        "install a C++ compiler (for example the package g++)",
    ),
)
_DEFAULT_REMEDY = "check that the CUDA toolkit matches torch's CUDA version and that a C++17 compiler is installed"
STALE_LOCK_SECONDS = 900.0


def load_extension(name: str) -> ModuleType:
    """Builds `cuda/{name}.cu` with `cuda/{name}_binding.cpp` for the current GPU, once; returns the module.

    Finished builds are kept in torch's extension folder (TORCH_EXTENSIONS_DIR, default
    ~/.cache/torch_extensions), so only the first run on a machine waits for the compiler. Sources are found
    relative to this file.

    Args:
        name: the extension, for example "wkv6".

    Raises:
        KernelError: there is no usable GPU or toolkit, or the build failed; the message has the first compiler
            error, what to do, and where the whole log is.
    """
    if not torch.cuda.is_available():
        raise KernelError(
            f"the CUDA extension {name!r} needs an NVIDIA GPU and a CUDA build of torch, and torch "
            f"{torch.__version__} sees none; run on the CPU (--accelerator cpu) or install torch with CUDA"
        )
    return _load_for_capability(name, torch.cuda.get_device_capability())


@functools.cache
def _load_for_capability(name: str, capability: tuple[int, int]) -> ModuleType:
    number = f"{capability[0]}{capability[1]}"
    if capability < LOWEST_CAPABILITY:
        raise KernelError(
            f"the CUDA extension {name!r} needs a GPU of compute capability 8.0 (Ampere) or newer, this one "
            f"has {capability[0]}.{capability[1]}; use a newer GPU or the CPU (--accelerator cpu)"
        )
    return _build(
        name,
        f"{name}_sm{number}",
        [SOURCE_DIRECTORY / f"{name}_binding.cpp", SOURCE_DIRECTORY / f"{name}.cu"],
        # An architecture given here also keeps torch from reading TORCH_CUDA_ARCH_LIST.
        [*NVCC_FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}"],
    )


def _build(name: str, build_name: str, sources: list[Path], nvcc_flags: list[str]) -> ModuleType:
    missing = [str(source) for source in sources if not source.is_file()]
    if missing:
        raise KernelError(
            f"the CUDA extension {name!r} lacks its sources {', '.join(missing)}; restore them from the repository"
        )
    log: Path | None = None
    try:
        # What `load` itself calls; naming the folder here lets the log stand beside the build.
        folder = Path(cpp_extension._get_build_directory(build_name, verbose=False))
        log = folder / "build.log"
        _remove_stale_lock(folder / "lock")
        with _quiet_build_environment():
            module = cpp_extension.load(
                name=build_name,
                sources=[str(source) for source in sources],
                extra_cflags=list(CXX_FLAGS),
                extra_cuda_cflags=nvcc_flags,
                extra_include_paths=[str(SOURCE_DIRECTORY)],
                build_directory=str(folder),
                with_cuda=any(source.suffix == ".cu" for source in sources),
                verbose=False,
            )
    except (RuntimeError, ImportError, OSError) as error:
        raise KernelError(_failure_message(name, str(error), log)) from error
    assert isinstance(module, ModuleType)
    return module


def _failure_message(name: str, output: str, log: Path | None) -> str:
    """One sentence from a build's whole output, which goes to `log`."""
    where = ""
    if log is not None:
        try:
            log.write_text(output + "\n")
            where = f"; the whole log is in {log}"
        except OSError as error:
            where = f"; the log could not be written to {log} ({error.strerror})"
    return f"the CUDA extension {name!r} could not be built: {first_error(output)}; {remedy(output)}{where}"


def first_error(output: str) -> str:
    """The first line of a build's output that names an error, or its first line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        # The exception's own first line and ninja's summary only announce that there is an error.
        if line.startswith(("Error building extension", "ninja: build stopped", "FAILED:")):
            continue
        if _ERROR_LINE.search(line):
            return line
    return lines[0] if lines else "no output"


def remedy(output: str) -> str:
    """What a user can do about the first error of a build's output."""
    error = first_error(output)
    for text in (
        error,
        output.replace("ninja: build stopped", "").replace("ninja -v", "").replace("['ninja'", ""),
    ):
        for pattern, advice in _REMEDIES:
            if re.search(pattern, text, re.I):
                return advice
    return _DEFAULT_REMEDY


def _remove_stale_lock(lock: Path) -> None:
    """A build that was killed leaves torch's lock behind, and the next would wait for it for ever."""
    try:
        if time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS:
            lock.unlink()
    except FileNotFoundError:
        pass


@contextmanager
def _quiet_build_environment() -> Iterator[None]:
    """Finds ninja in this Python environment even when it is not activated; mutes torch's remarks."""
    path = os.environ.get("PATH", "")
    scripts = sysconfig.get_path("scripts")
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    os.environ["PATH"] = os.pathsep.join((path, scripts)) if path else scripts
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ["PATH"] = path
        logger.setLevel(level)
