"""Every kernel of `cuda/` goes through NVRTC for every kind of card, and through nvcc where there is one: no GPU."""

import dataclasses
import importlib.util
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_families import FAMILIES

import src.ops
from src.ops import nvrtc, wkv6_cuda
from src.ops.kernels import Kernel

ARCHITECTURES = (80, 86, 89, 90, 120)


def test_every_source_is_here() -> None:
    assert set(FAMILIES) == {path.name for path in nvrtc.SOURCE_DIRECTORY.glob("*.cu")}


def kernels_in(value: object) -> Iterator[Kernel]:
    """Those of a module's value."""
    if isinstance(value, Kernel):
        yield value
    elif isinstance(value, tuple | list):
        for member in value:
            yield from kernels_in(member)
    elif isinstance(value, dict):
        yield from kernels_in(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from kernels_in(list(vars(value).values()))


def test_every_kernel_is_here() -> None:
    """Which is made in a module of `src.ops` or in what it lists, by the name of its source."""
    for found in pkgutil.iter_modules(src.ops.__path__, "src.ops."):
        for value in vars(importlib.import_module(found.name)).values():
            for kernel in kernels_in(value):
                assert any(kernel is listed for listed in FAMILIES[kernel.source]), (found.name, kernel.expression)
    assert all(kernel.source == name for name, family in FAMILIES.items() for kernel in family)


def test_sources_include_nothing_but_each_other() -> None:
    for path in nvrtc.SOURCE_DIRECTORY.iterdir():
        if path.suffix in (".cu", ".cuh", ".h"):
            included = re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text(), re.MULTILINE)
            outside = [name for name in included if not name.startswith('"')]
            assert outside == (["<cstdint>"] if path.name == "types.cuh" else []), path.name


@pytest.mark.parametrize(
    ("kernel", "name"),
    [(wkv6_cuda.FORWARD, "Forward"), (wkv6_cuda.BACKWARD_SUMMARY, "Summary"), (wkv6_cuda.BACKWARD, "Backward")],
)
def test_shared_memory_is_asked_for_as_the_source_has_it(kernel: Kernel, name: str) -> None:
    assert f"static_assert(k{name}SharedBytes == {kernel.shared_bytes}," in nvrtc.read_source("wkv6.cu").text


needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None, reason="needs the package nvidia-cuda-nvrtc"
)


def compiled_sizes(kernels: Iterable[Kernel], architecture: str) -> list[int]:
    """Bytes of each kernel's code."""
    sources = {name: nvrtc.read_source(name) for name in FAMILIES}

    def compiled(kernel: Kernel) -> int:
        return len(nvrtc.compile_kernel(sources[kernel.source], kernel.expression, architecture).image)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, kernels))


@needs_nvrtc
def test_every_template_compiles_by_nvrtc() -> None:
    """One form of each, to PTX."""
    one_form = {kernel.expression.split("<")[0]: kernel for family in FAMILIES.values() for kernel in family}
    assert len(one_form) > len(FAMILIES)
    assert min(compiled_sizes(one_form.values(), "compute_80")) > 1000


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_by_nvrtc(architecture: int) -> None:
    """Every form, to machine code."""
    kernels = [kernel for family in FAMILIES.values() for kernel in family]
    assert min(compiled_sizes(kernels, f"sm_{architecture}")) > 1000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_kernel_compiles_by_nvcc(name: str, tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    pointers = "".join(f"  reinterpret_cast<const void*>(&{kernel.expression}),\n" for kernel in FAMILIES[name])
    source.write_text(f'#include "{name}"\nextern const void* const kernels[] = {{\n{pointers}}};\n')
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 120)]
    command = ["nvcc", "-std=c++17", "--threads=2", *architectures, f"-I{nvrtc.SOURCE_DIRECTORY}", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
