"""Kernels of `cuda/` on the CPU: `Kernel`s are called as on a GPU, with tensors that lie on the CPU.

    with emulated() as run:
        wkv7_cuda(...)

Sources are turned into C++ for the host: `asm` statements become calls of functions that `emulator.h` defines, shared
memory becomes an array. They are compiled once per process and version.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from src.ops.kernels import Kernel

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "cuda"
_FOLDER = Path(tempfile.gettempdir()) / "rwkv-emulated-kernels"
_OPERAND = re.compile(r'"[=+&]*[a-z]"\s*')
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.M)


def has_compiler() -> bool:
    """Whether there is a C++ compiler for the host."""
    return shutil.which("g++") is not None


@contextlib.contextmanager
def emulated(*, architecture: int = 900, order: int = 0) -> Iterator[None]:
    """Calls of `Kernel`s run here in the meantime.

    Args:
        architecture: what the sources take `__CUDA_ARCH__` for.
        order: 0 runs the threads of a block from first to last, 1 from last to first, higher numbers let warps take
            turns in orders drawn from them.
    """
    before = Kernel.__call__, Kernel.prepared

    def call(kernel: Kernel, like: Tensor, grid: Any, block: Any, *arguments: Any) -> None:
        values = [
            argument.data_ptr() if isinstance(argument, Tensor) else 0 if argument is None else argument
            for argument in arguments
        ]
        packed = kernel.layout.values.pack(*values)
        _run(kernel, architecture)(_three(grid), _three(block), kernel.shared_bytes, packed, order)

    def prepared(kernel: Kernel, like: Tensor, grid: Any, block: Any, *arguments: Any) -> Callable[[], None]:
        return lambda: kernel(like, grid, block, *arguments)

    Kernel.__call__, Kernel.prepared = call, prepared  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Kernel.__call__, Kernel.prepared = before  # type: ignore[method-assign]


def _three(size: Any) -> Any:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return (ctypes.c_uint32 * 3)(*sizes, *(1,) * (3 - len(sizes)))


def _run(kernel: Kernel, architecture: int) -> Any:
    library, names = _library(kernel.source, architecture)
    if kernel.expression not in names:
        _library.cache_clear()
        library, names = _library(kernel.source, architecture)
    function = getattr(library, names[kernel.expression])
    function.restype = ctypes.c_char_p

    def run(grid: Any, block: Any, shared_bytes: int, packed: bytes, order: int) -> None:
        error = function(grid, block, shared_bytes, packed, order)
        if error:
            raise RuntimeError(f"{kernel.expression}: {error.decode()}")

    return run


@functools.cache
def _library(source: str, architecture: int) -> tuple[ctypes.CDLL, dict[str, str]]:
    """All kernels that exist of a source, and the names of the functions that run them."""
    gc.unfreeze()  # what a run of the program in this process has hidden
    expressions = {kernel.expression for kernel in gc.get_objects() if _is_of(kernel, source)}
    names = {expression: f"run_{number}" for number, expression in enumerate(sorted(expressions))}
    functions = "".join(_FUNCTION.format(name=name, expression=expression) for expression, name in names.items())
    text = f'#define __CUDA_ARCH__ {architecture}\n#include "emulator.h"\n{host_source(source)}\n{functions}'
    digest = hashlib.sha256((text + (HERE / "emulator.h").read_text()).encode()).hexdigest()[:24]
    library = _FOLDER / f"{digest}.so"
    if not library.exists():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
            written = Path(folder) / "kernels.cpp"
            written.write_text(text)
            command = [
                "g++",
                "-std=c++17",
                "-O1",
                "-shared",
                "-fPIC",
                "-w",
                "-U_FORTIFY_SOURCE",
                f"-I{HERE}",
                str(written),
            ]
            done = subprocess.run([*command, "-o", f"{folder}/kernels.so"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[:4000]
            (Path(folder) / "kernels.so").replace(library)
    return ctypes.CDLL(str(library)), names


def _is_of(candidate: object, source: str) -> bool:
    return type(candidate) is Kernel and candidate.source == source


_FUNCTION = """
extern "C" const char* {name}(const uint32_t* grid, const uint32_t* size, uint32_t shared, const char* buffer,
                              int order) {{
  return emulated::launched({expression}, grid, size, shared, buffer, order);
}}
"""


def host_source(name: str) -> str:
    """A source of `cuda/` with its headers, for a C++ compiler."""
    seen: set[str] = set()

    def with_headers(file: str) -> str:
        text = (CUDA / file).read_text()

        def included(found: re.Match[str]) -> str:
            header = found.group(1)
            if header in seen:
                return ""
            seen.add(header)
            return with_headers(header)

        return _INCLUDE.sub(included, text)

    text = with_headers(name)
    text = re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w ]+?)\s+(\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulated::block()->shared.data());",
        text,
    )
    text = re.sub(r"\b__shared__\b", "static", text)
    return _without_assembly(text)


def _without_assembly(text: str) -> str:
    parts = []
    end = 0
    for found in re.finditer(r"\basm\s*(?:volatile)?\s*\(", text):
        parts.append(text[end : found.start()])
        close = _closing(text, found.end() - 1)
        parts.append(_call(text[found.end() : close]))
        end = close + 1
    return "".join((*parts, text[end:]))


def _call(statement: str) -> str:
    """`asm`'s arguments -> a call of the function of that instruction: first what it writes, then what it reads."""
    template, *operands = _split(statement, ":")
    assembly = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template)).replace("\\n", "\n")
    instructions = [line.strip(" {}\n\t") for line in assembly.split(";")]
    instruction = next(line for line in instructions if line and not line.startswith("."))
    name = re.sub(r"[^\w]", "_", instruction.split()[0])
    arguments = [
        _OPERAND.sub("", operand).strip()
        for group in operands[:2]
        for operand in _split(group, ",")
        if operand.strip() and "(" in operand
    ]
    return f"ptx_{name}({', '.join(arguments)})"


def _split(text: str, separator: str) -> list[str]:
    """At separators outside brackets and strings."""
    parts, depth, quoted, begin = [], 0, False, 0
    for i, letter in enumerate(text):
        if letter == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted and letter in "([{":
            depth += 1
        elif not quoted and letter in ")]}":
            depth -= 1
        elif not quoted and depth == 0 and letter == separator:
            if separator == ":" and "::" in (text[i : i + 2], text[i - 1 : i + 1]) and _inside_name(text, i):
                continue
            parts.append(text[begin:i])
            begin = i + 1
    parts.append(text[begin:])
    return parts


def _inside_name(text: str, i: int) -> bool:
    """Whether this colon is one of a `::` between names, and not of two empty groups of operands."""
    around = text[max(i - 2, 0) : i + 3]
    return bool(re.search(r"\w::\w", around))


def _closing(text: str, opening: int) -> int:
    depth, quoted = 0, False
    for i in range(opening, len(text)):
        letter = text[i]
        if letter == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted and letter == "(":
            depth += 1
        elif not quoted and letter == ")":
            depth -= 1
            if depth == 0:
                return i
    raise ValueError("unbalanced brackets")
