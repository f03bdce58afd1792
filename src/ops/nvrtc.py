"""CUDA source text to machine code, by NVRTC: the compiler library that every CUDA build of torch brings along.

Called through ctypes, as torch does itself: `cuda-bindings` and `cuda-core` launch no faster (4.4 and 5.4 us beside 4.8
on an H100), and torch's wheels for Windows do not bring them. It needs no GPU, no host compiler and no header.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from src.errors import KernelError

SOURCE_DIRECTORY = Path(__file__).resolve().parents[2] / "cuda"
OPTIONS = ("--std=c++17",)
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_WINDOWS = sys.platform == "win32"


@dataclass(frozen=True)
class Source:
    """A file of `cuda/` with the headers it includes.

    Attributes:
        name: of the file.
        text: what it holds.
        headers: what each header holds, by the name after #include; headers of headers stand among them.
    """

    name: str
    text: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Compiled:
    """A kernel as the driver takes it.

    Attributes:
        symbol: the kernel's name in `image`.
        image: machine code (cubin), or PTX for a card that is newer than the compiler.
    """

    symbol: str
    image: bytes


def read_source(name: str, folder: Path = SOURCE_DIRECTORY) -> Source:
    """Reads a source and its headers.

    Raises:
        KernelError: one of them is not there.
    """
    headers: dict[str, str] = {}

    def read(file: str) -> str:
        try:
            text = (folder / file).read_text(encoding="utf-8")
        except OSError as error:
            raise KernelError(
                f"the CUDA source {folder / file} cannot be read ({error.strerror}): restore it from the repository"
            ) from error
        for header in _INCLUDE.findall(text):
            if header not in headers:
                headers[header] = ""  # one that includes itself ends here
                headers[header] = read(header)
        return text

    text = read(name)
    return Source(name, text, headers)


def version() -> tuple[int, int]:
    """Major and minor number of the NVRTC that is used.

    Raises:
        KernelError: there is none.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "its version")
    return major.value, minor.value


def architecture_for(capability: tuple[int, int]) -> str:
    """What to compile for: "sm_90", or "compute_120" where NVRTC is older than a card's whole generation.

    A card runs machine code of its own generation's lower numbers; from another generation it takes PTX.

    Args:
        capability: the card's compute capability.

    Raises:
        KernelError: there is no NVRTC.
    """
    wanted = capability[0] * 10 + capability[1]
    best = max((number for number in _known_architectures() if number <= wanted), default=wanted)
    return f"sm_{best}" if best // 10 == capability[0] else f"compute_{best}"


def compile_kernel(source: Source, expression: str, architecture: str) -> Compiled:
    """Compiles one kernel of a source, with all the templates it needs and nothing else.

    Safe to be called from several threads at once; Python goes on meanwhile.

    Args:
        source: the text.
        expression: the kernel's name as C++ has it, such as `wkv6::backward_kernel<true>`.
        architecture: "sm_90" for machine code, "compute_90" for PTX.

    Raises:
        KernelError: there is no NVRTC, or it refuses the text; the message has its first error.
    """
    library = _library()
    program = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(source.headers))(*(name.encode() for name in source.headers))
    texts = (ctypes.c_char_p * len(source.headers))(*(text.encode() for text in source.headers.values()))
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), source.text.encode(), source.name.encode(), len(source.headers), texts, names
    )
    _check(created, source.name)
    try:
        _check(library.nvrtcAddNameExpression(program, expression.encode()), expression)
        options = [f"--gpu-architecture={architecture}", *OPTIONS]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            log = _output(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            raise KernelError(
                f"the CUDA kernel {expression} of {source.name} could not be compiled for {architecture} by NVRTC "
                f"{'.'.join(map(str, version()))}: {first_error(log.decode(errors='replace'))}; use the torch that "
                "requirements.txt names, with its own NVRTC"
            )
        symbol = ctypes.c_char_p()
        _check(library.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(symbol)), expression)
        name = (symbol.value or b"").decode()
        if architecture.startswith("sm_"):
            image = _output(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
        else:
            image = _output(library.nvrtcGetPTXSize, library.nvrtcGetPTX, program)
        return Compiled(name, image)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def first_error(log: str) -> str:
    """The first line of a compiler's log that names an error, or its first line."""
    lines = [line.strip() for line in log.rstrip("\0").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


def library_candidates() -> list[str]:
    """Where NVRTC may be, best first: in torch's wheels, beside torch, and where the system's loader looks."""
    major = (torch.version.cuda or "13").split(".")[0]
    pattern = f"nvrtc64_{major}*_0.dll" if _WINDOWS else f"libnvrtc*.so.{major}*"
    found = [
        str(path)
        for folder in _wheel_folders()
        for path in sorted(folder.glob(pattern))
        if ".alt." not in path.name and "builtins" not in path.name
    ]
    by_name = f"nvrtc64_{major}0_0.dll" if _WINDOWS else f"libnvrtc.so.{major}"
    return [*found, by_name]


def _wheel_folders() -> Iterator[Path]:
    """Folders in which pip's packages of NVIDIA (CUDA 13 and 12, Linux and Windows) and torch keep libraries."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for package in ("cu13", "cuda_nvrtc"):
            for libraries in ("lib", "bin/x86_64", "bin"):
                yield Path(root) / package / libraries
    yield Path(torch.__file__).parent / "lib"


@functools.cache
def _library() -> ctypes.CDLL:
    """NVRTC, loaded.

    Raises:
        KernelError: it is nowhere.
    """
    candidates = library_candidates()
    for candidate in candidates:
        try:
            _load_builtins(Path(candidate).parent)
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    package = "nvidia-cuda-nvrtc-cu12" if (torch.version.cuda or "").startswith("12") else "nvidia-cuda-nvrtc"
    raise KernelError(
        f"the CUDA kernels cannot be compiled: NVRTC ({candidates[-1]}), which torch's wheels for CUDA bring along, is "
        f"not installed; reinstall torch, or pip install {package}"
    )


def _load_builtins(folder: Path) -> None:
    """Loads what NVRTC opens by name alone, and so would not find in a wheel."""
    for path in folder.glob("nvrtc-builtins64_*.dll" if _WINDOWS else "libnvrtc-builtins*.so.*"):
        if ".alt." not in path.name:
            ctypes.CDLL(str(path))


@functools.cache
def _known_architectures() -> tuple[int, ...]:
    library = _library()
    count = ctypes.c_int()
    _check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "its architectures")
    numbers = (ctypes.c_int * count.value)()
    _check(library.nvrtcGetSupportedArchs(numbers), "its architectures")
    return tuple(numbers)


def _output(size_of: Callable[..., int], read: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    """One of a program's results: its size, then its bytes."""
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), "a result")
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer), "a result")
    return buffer.raw


def _check(code: int, subject: str) -> None:
    if code:
        text = _library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise KernelError(f"NVRTC refuses {subject}: {text(code).decode()}; reinstall torch")
