"""The launcher's description of arguments, its cache and its compiler; what needs a GPU is in tests/gpu."""

import ctypes
import gc
import multiprocessing
import os
import re
import struct
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.errors import KernelError
from src.ops import kernel_cache, kernels, nvrtc
from src.ops.kernels import Kernel, Layout
from src.ops.nvrtc import Compiled


class Inner(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int), ("b", ctypes.c_int), ("p", ctypes.c_void_p), ("c", ctypes.c_int)]


class Small(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int), ("b", ctypes.c_bool)]


class Outer(ctypes.Structure):
    _fields_ = [
        ("inner", Inner),
        ("flag", ctypes.c_bool),
        ("small", Small),
        ("p", ctypes.c_void_p),
        ("x", ctypes.c_float),
    ]


class Parameters(ctypes.Structure):
    """A kernel's parameters lie like the members of a struct."""

    _fields_ = [
        ("n", ctypes.c_int),
        ("outer", Outer),
        ("f", ctypes.c_float),
        ("q", ctypes.c_int64),
        ("last", ctypes.c_bool),
    ]


def test_values_lie_as_in_c() -> None:
    layout = Layout("i ((iiPi) ? (i?) P f) f q ?")
    values = (1, 2, 3, 2**40, 4, True, 5, True, 2**41, 1.5, 2.5, -7, True)
    buffer = bytearray(ctypes.sizeof(Parameters))
    layout.values.pack_into(buffer, 0, *values)
    found = Parameters.from_buffer(buffer)
    assert (found.n, found.f, found.q, found.last) == (1, 2.5, -7, True)
    assert (found.outer.flag, found.outer.p, found.outer.x) == (True, 2**41, 1.5)
    assert (found.outer.inner.a, found.outer.inner.b, found.outer.inner.p, found.outer.inner.c) == (2, 3, 2**40, 4)
    assert (found.outer.small.a, found.outer.small.b) == (5, True)
    assert layout.parameters == [
        (getattr(Parameters, name).offset, getattr(Parameters, name).size) for name, _ in Parameters._fields_
    ]


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(struct.error):
        Layout("i").values.pack(2**31)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rwkv-state-tuning" / "kernels"


def test_cache_gives_back_what_was_written(cache: Path) -> None:
    assert kernel_cache.read("key") is None
    kernel_cache.write("key", b"payload\0")
    assert kernel_cache.read("key") == b"payload\0"
    assert [path.name for path in cache.iterdir()] == ["key.bin"]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"", lambda whole: whole[:-1] + b"?"])
def test_damaged_entries_are_taken_for_absent(cache: Path, damage: object) -> None:
    kernel_cache.write("key", b"payload")
    path = cache / "key.bin"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert kernel_cache.read("key") is None
    kernel_cache.write("key", b"payload")
    assert kernel_cache.read("key") == b"payload"


def test_cache_is_bounded_and_drops_what_was_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "MOST_BYTES", 1100)
    for number in range(3):
        kernel_cache.write(str(number), bytes(300))
        os.utime(cache / f"{number}.bin", (number, number))
    kernel_cache.read("0")
    kernel_cache.write("3", bytes(300))
    assert {path.name for path in cache.iterdir()} == {"0.bin", "2.bin", "3.bin"}


def test_without_a_place_nothing_is_kept_and_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does without a home
    assert kernel_cache.folder() is None
    kernel_cache.write("key", b"payload")
    assert kernel_cache.read("key") is None


def test_a_folder_that_cannot_be_written_to_is_none(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the folder's place: what even root cannot write into")
    kernel_cache.write("key", b"payload")
    assert kernel_cache.read("key") is None


def _write_many(folder: str) -> None:
    os.environ["XDG_CACHE_HOME"] = os.environ["LOCALAPPDATA"] = folder
    for number in range(50):
        kernel_cache.write(f"key{number % 5}", bytes([number % 5]) * 10_000)
        for other in range(5):
            assert kernel_cache.read(f"key{other}") in (None, bytes([other]) * 10_000)


@pytest.mark.slow
def test_two_processes_at_once(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_write_many, args=(str(cache.parent.parent),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.name for path in cache.iterdir()) == [f"key{number}.bin" for number in range(5)]


@pytest.fixture
def compilations(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a compiler that only counts was asked for."""
    asked: list[str] = []

    def compile_kernel(source: nvrtc.Source, expression: str, architecture: str) -> Compiled:
        asked.append(f"{expression} {architecture}")
        return Compiled("symbol", source.text.encode() + b"\0")

    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    return asked


def test_a_kernel_is_compiled_once_for_each_card_source_and_compiler(
    compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "a.cu").write_text('#include "b.h"\n')
    (folder / "b.h").write_text('#include "b.h"\nint x;\n')
    read_source = nvrtc.read_source
    monkeypatch.setattr(nvrtc, "read_source", lambda name: read_source(name, folder))

    def compiled(architecture: str = "sm_90") -> Compiled:
        return Kernel("a.cu", "f", "P").compiled(architecture)

    assert compiled() == compiled() == Compiled("symbol", b'#include "b.h"\n\0')
    assert compilations == ["f sm_90"]
    compiled("sm_86")
    assert compilations == ["f sm_90", "f sm_86"]
    (folder / "b.h").write_text("int y;\n")
    compiled()
    assert compilations[2:] == ["f sm_90"]
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 8))
    compiled()
    assert compilations[3:] == ["f sm_90"]


def test_the_half_written_entry_of_a_kernel_is_compiled_again(compilations: list[str], cache: Path) -> None:
    whole = Kernel("wkv6.cu", "f", "P").compiled("sm_90")
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    assert Kernel("wkv6.cu", "f", "P").compiled("sm_90") == whole
    assert len(compilations) == 2


def test_a_missing_source_is_named() -> None:
    with pytest.raises(KernelError, match=r"absent\.cu.*restore it"):
        nvrtc.read_source("absent.cu")


def test_without_a_gpu_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="--accelerator cpu"):
        Kernel("wkv6.cu", "f", "P").load(0)


def test_an_old_gpu_is_refused_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(KernelError, match=r"8\.0 .*7\.5"):
        Kernel("wkv6.cu", "f", "P").load(0)


def test_without_nvrtc_one_warning_says_so_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "library_candidates", lambda: ["libnvrtc.so.absent"])
    monkeypatch.setattr(kernels, "_capability", lambda index: (9, 0))
    nvrtc._library.cache_clear()
    kernels._usable.cache_clear()
    kernels._warn_of_all.cache_clear()
    families = [(Kernel(source, "f", "P"),) for source in ("wkv6.cu", "elementwise.cu")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = [kernels.usable(family, torch.device("cuda", 0), "Ten times slower.") for family in families * 2]
    assert not any(answers)
    (said,) = (str(warning.message) for warning in caught)
    assert re.search(r"NVRTC.*not installed.*Torch's own.* took 1\.05 s .* takes 0\.026 s", said)
    nvrtc._library.cache_clear()


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((9, 0), "sm_90"), ((8, 9), "sm_89"), ((8, 7), "sm_86"), ((12, 1), "sm_120"), ((13, 0), "compute_120")],
)
def test_a_card_gets_its_own_code_or_that_of_its_generation_or_ptx(
    capability: tuple[int, int], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "_known_architectures", lambda: (75, 80, 86, 89, 90, 100, 120))
    assert nvrtc.architecture_for(capability) == architecture


def test_first_error_is_the_compilers() -> None:
    log = 'wkv6.cu(3): warning: x\n\nwkv6.cu(12): error: identifier "foo" is undefined\n1 error detected\n\0'
    assert nvrtc.first_error(log) == 'wkv6.cu(12): error: identifier "foo" is undefined'


class FakeDriver:
    """A driver that takes notes of launches, and answers them with these codes."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.contexts = 0
        self.launches: list[tuple[object, ...]] = []

    def cuLaunchKernel(self, function: object, *rest: Any) -> int:
        code = self.codes.pop(0) if self.codes else 0
        if not code:
            *sizes, shared, stream, places, extra = rest
            first, second = (ctypes.c_void_p * 2).from_address(places.value)
            pointer = ctypes.c_void_p.from_address(first).value
            members = ctypes.c_int.from_address(second).value, ctypes.c_float.from_address(second + 4).value
            self.launches.append((sizes, shared, stream.value, extra, pointer, *members))
        return code

    def cuCtxSetCurrent(self, context: object) -> int:
        self.contexts += 1
        return 0

    def __getattr__(self, name: str) -> object:
        return lambda *arguments: 0


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> tuple[Kernel, FakeDriver]:
    driver = FakeDriver()
    monkeypatch.setattr(kernels, "_driver", lambda: driver)
    monkeypatch.setattr(kernels, "_check_layout", lambda *arguments: None)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    kernel = Kernel("wkv6.cu", "f", "P (i f)", shared_bytes=64 * 1024)
    monkeypatch.setattr(kernel, "compile", lambda index: SimpleNamespace(result=lambda: Compiled("f", b"")))
    return kernel, driver


def test_a_launch_hands_on_sizes_stream_and_every_argument(launcher: tuple[Kernel, FakeDriver]) -> None:
    kernel, driver = launcher
    tensor = torch.zeros(2)
    for grid, sizes in ((3, [3, 1, 1]), ((3, 4), [3, 4, 1]), ((3, 4, 5), [3, 4, 5])):
        kernel(tensor, grid, (128, 2), tensor, -7, 1.5)
        expected = ([*sizes, 128, 2, 1], 64 * 1024, 77, None, tensor.data_ptr(), -7, 1.5)
        assert driver.launches.pop() == expected
    kernel(tensor, 1, 32, None, 2, 0.5)
    assert driver.launches.pop()[4:] == (None, 2, 0.5)
    with pytest.raises(struct.error):
        kernel(tensor, 1, 32, tensor, 2)


def test_a_thread_without_a_context_gets_it_and_other_errors_are_said(launcher: tuple[Kernel, FakeDriver]) -> None:
    kernel, driver = launcher
    tensor = torch.zeros(2)
    kernel(tensor, 1, 32, tensor, 1, 1.0)
    before = driver.contexts
    driver.codes = [201]
    kernel(tensor, 1, 32, tensor, 2, 1.0)
    assert driver.contexts == before + 1
    assert [launch[5] for launch in driver.launches] == [1, 2]
    driver.codes = [1]
    with pytest.raises(RuntimeError, match="kernel f could not be launched"):
        kernel(tensor, 1, 32, tensor, 3, 1.0)


def test_a_prepared_launch_has_memory_of_its_own_and_keeps_its_tensors(launcher: tuple[Kernel, FakeDriver]) -> None:
    kernel, driver = launcher
    tensor = torch.zeros(2)
    again = kernel.prepared(tensor, (3, 4), 32, tensor, -7, 1.5)
    assert not driver.launches
    again()
    kernel(tensor, 1, 32, None, 2, 0.5)
    again()
    first, other, last = driver.launches
    assert first == last == ([3, 4, 1, 32, 1, 1], 64 * 1024, 77, None, tensor.data_ptr(), -7, 1.5)
    assert other[4:] == (None, 2, 0.5)
    kept = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert kept() is not None
    driver.codes = [201]
    again()
    assert driver.launches[-1] == first
    del again
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("prepared", [False, True])
def test_a_launch_goes_to_the_stream_that_is_current_then(
    prepared: bool, launcher: tuple[Kernel, FakeDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, driver = launcher
    tensor, current = torch.zeros(2), [1]
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: current[0])
    arguments = (tensor, 1, 32, tensor, 1, 1.0)
    launch = kernel.prepared(*arguments) if prepared else partial(kernel, *arguments)
    for stream in (1, 2**40, 1):
        current[0] = stream
        launch()
    assert [launched[2] for launched in driver.launches] == [1, 2**40, 1]


def test_threads_that_launch_at_once_do_not_mix_their_arguments(launcher: tuple[Kernel, FakeDriver]) -> None:
    kernel, driver = launcher
    tensor = torch.zeros(2)
    take = driver.cuLaunchKernel

    def slowly(*arguments: Any) -> int:
        time.sleep(0.001)
        return take(*arguments)

    driver.cuLaunchKernel = slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: kernel(tensor, number + 1, 32, tensor, number, 1.0), range(24)))
    assert sorted((sizes[0] - 1, number) for sizes, *_, number, _ in driver.launches) == [(n, n) for n in range(24)]


def test_pointers_are_found_among_a_structs_members() -> None:
    assert Layout("i ((iiPi) ? (i?) P f) f q P").pointers == (3, 8, 12)


@pytest.mark.parametrize(("number", "version"), [(13000, (13, 0)), (12080, (12, 8))])
def test_the_newest_cuda_that_a_driver_knows(
    number: int, version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        @staticmethod
        def cuDriverGetVersion(place: Any) -> int:
            place._obj.value = number
            return 0

    monkeypatch.setattr(kernels, "_driver", Driver)
    assert kernels.driver_cuda_version() == version
