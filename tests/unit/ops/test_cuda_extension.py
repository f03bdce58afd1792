"""Builds of `cuda/` that fail must say why in one sentence; good ones must be quiet."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from src.errors import KernelError
from src.ops import cuda_extension

NVCC_LOG = """Error building extension 'wkv6_sm90': [1/3] /usr/local/cuda/bin/nvcc -c wkv6.cu
FAILED: wkv6.cuda.o
/usr/local/cuda/bin/nvcc -DTORCH_EXTENSION_NAME=wkv6_sm90 -c wkv6.cu
/repo/cuda/wkv6.cu(12): error: identifier "foo" is undefined
1 error detected in the compilation of "/repo/cuda/wkv6.cu".
ninja: build stopped: subcommand failed.
"""


def test_first_error_is_the_compilers() -> None:
    assert cuda_extension.first_error(NVCC_LOG) == '/repo/cuda/wkv6.cu(12): error: identifier "foo" is undefined'


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("nvcc fatal   : Unsupported gpu architecture 'compute_120'", "toolkit that knows this GPU"),
        ("#error -- unsupported GNU version! gcc versions later than 13 are not supported!", "host compiler"),
        ("fatal error: error writing to x: No space left on device", "free disk space"),
        ("OSError: CUDA_HOME environment variable is not set.", "set CUDA_HOME"),
        ("Ninja is required to load C++ extensions", "install ninja"),
        ("binding.cpp:1:10: fatal error: Python.h: No such file or directory", "development headers"),
        (NVCC_LOG, "matches torch's CUDA version"),
    ],
)
def test_remedy_fits_the_error(output: str, advice: str) -> None:
    assert advice in cuda_extension.remedy(output)


def test_without_gpu_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="--accelerator cpu"):
        cuda_extension.load_extension("wkv6")


def test_old_gpu_is_refused_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(KernelError, match=r"8\.0 .*7\.5"):
        cuda_extension.load_extension("wkv6")


def test_missing_sources_are_listed(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"absent\.cpp"):
        cuda_extension._build("absent", "absent", [tmp_path / "absent.cpp"], [])


def test_only_the_given_architecture_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cuda_extension, "_build", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "a strange value")
    cuda_extension._load_for_capability.__wrapped__("wkv6", (12, 0))
    (_, build_name, sources, flags) = calls[0]
    assert build_name == "wkv6_sm120"
    assert [flag for flag in flags if "arch" in flag] == ["-gencode=arch=compute_120,code=sm_120"]
    assert all(source.is_absolute() and source.is_file() for source in sources)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_failed_build_names_the_first_error_and_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "broken.cpp"
    source.write_text("int number = undefined_name;\n")
    with pytest.raises(KernelError, match="undefined_name") as caught:
        cuda_extension._build("broken", "broken_extension", [source], [])
    log = next((tmp_path / "builds").rglob("build.log"))
    assert str(log) in str(caught.value)
    assert "undefined_name" in log.read_text()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_only_an_old_lock_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    cuda_extension._remove_stale_lock(lock)
    lock.touch()
    cuda_extension._remove_stale_lock(lock)
    assert lock.exists()
    old = lock.stat().st_mtime - 2 * cuda_extension.STALE_LOCK_SECONDS
    os.utime(lock, (old, old))
    cuda_extension._remove_stale_lock(lock)
    assert not lock.exists()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(cuda_extension.SOURCE_DIRECTORY.glob("*.cu")), ids=lambda path: path.name)
def test_sources_include_no_torch_header(source: Path) -> None:
    listing = subprocess.run(
        ["nvcc", "-M", "-std=c++17", str(source)], capture_output=True, text=True, check=True
    ).stdout
    assert "/torch/" not in listing
    assert "/ATen/" not in listing
