"""Every kernel of `cuda/` goes through NVRTC for every kind of card, and through nvcc where there is one: no GPU."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.ops import (
    adam,
    block_diagonal,
    cast,
    delta_rule_cuda,
    dequantize_cuda,
    elementwise_cuda,
    nvrtc,
    wkv6_cuda,
    wkv7_cuda,
)
from src.ops.kernels import Kernel

KERNELS: dict[str, Sequence[Kernel]] = {
    "adam.cu": tuple(adam.KERNELS.values()),
    "block_diagonal.cu": block_diagonal.KERNELS,
    "cast.cu": (cast.TO_BF16,),
    "dequantize.cu": (*dequantize_cuda.KERNELS.values(), *dequantize_cuda.OF_SEVERAL.values()),
    "elementwise.cu": elementwise_cuda.KERNELS,
    "elementwise_delta_rule.cu": delta_rule_cuda.KERNELS,
    "wkv6.cu": wkv6_cuda.KERNELS,
    "wkv7.cu": wkv7_cuda.KERNELS,
}
ARCHITECTURES = (80, 86, 89, 90, 120)


def test_every_source_is_here() -> None:
    assert set(KERNELS) == {path.name for path in nvrtc.SOURCE_DIRECTORY.glob("*.cu")}


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
    sources = {name: nvrtc.read_source(name) for name in KERNELS}

    def compiled(kernel: Kernel) -> int:
        return len(nvrtc.compile_kernel(sources[kernel.source], kernel.expression, architecture).image)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, kernels))


@needs_nvrtc
def test_every_template_compiles_by_nvrtc() -> None:
    """One form of each, to PTX."""
    one_form = {kernel.expression.split("<")[0]: kernel for family in KERNELS.values() for kernel in family}
    assert len(one_form) > len(KERNELS)
    assert min(compiled_sizes(one_form.values(), "compute_80")) > 1000


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_by_nvrtc(architecture: int) -> None:
    """Every form, to machine code."""
    kernels = [kernel for family in KERNELS.values() for kernel in family]
    assert min(compiled_sizes(kernels, f"sm_{architecture}")) > 1000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_compiles_by_nvcc(name: str, tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    pointers = "".join(f"  reinterpret_cast<const void*>(&{kernel.expression}),\n" for kernel in KERNELS[name])
    source.write_text(f'#include "{name}"\nextern const void* const kernels[] = {{\n{pointers}}};\n')
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 120)]
    command = ["nvcc", "-std=c++17", "--threads=2", *architectures, f"-I{nvrtc.SOURCE_DIRECTORY}", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
