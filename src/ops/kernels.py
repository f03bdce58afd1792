"""CUDA kernels: compiled for the card on first use, kept on disk, launched on torch's current stream.

    FORWARD = Kernel("wkv6.cu", "wkv6::forward_kernel", "(iP) P f")
    FORWARD(r, (heads, items, 1), 128, tokens, borders, r, 0.5)

Each kernel is compiled by itself, so that a run waits only for those it uses, and `compile_ahead` compiles them side by
side while something else goes on. A launch packs its arguments into one buffer that the kernel's description laid out
before; one that comes again and again with the same tensors is prepared once. CUDA graphs record both like any other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from src.errors import KernelError
from src.ops import kernel_cache, nvrtc
from src.ops.nvrtc import Compiled

LOWEST_CAPABILITY = (8, 0)
_MOST_THREADS = 8
_SIZES = {"P": 8, "Q": 8, "q": 8, "d": 8, "i": 4, "I": 4, "f": 4, "?": 1}
_SHARED_WITHOUT_ASKING = 48 * 1024
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute
_INVALID_CONTEXT = 201
SLOWER = "a step of a 1.6B model took 1.05 s on an H200 before there were kernels, and takes 0.026 s with all of them."

Argument = Tensor | int | float | bool | None
Size = int | tuple[int, int] | tuple[int, int, int]


class Kernel:
    """A kernel of a file in `cuda/`, loaded where and when it is first called.

    Args:
        source: the file's name.
        expression: the kernel as C++ names it, template arguments included; a function that is `extern "C"` is named
            as it is.
        parameters: one letter for each value, in the kernel's order: P pointer, i and I 32-bit integers, q and Q 64-bit
            ones, f float, d double, ? bool. Round brackets hold the members of a struct that is passed by value.
        shared_bytes: dynamic shared memory of a block.
    """

    def __init__(self, source: str, expression: str, parameters: str, *, shared_bytes: int = 0) -> None:
        self.source = source
        self.expression = expression
        self.layout = Layout(parameters)
        self.shared_bytes = shared_bytes
        self._compilations: dict[str, Future[Compiled]] = {}
        self._loaded: dict[int, _Loaded] = {}
        self._lock = threading.Lock()

    def __call__(self, like: Tensor, grid: Size, block: Size, *arguments: Argument) -> None:
        """Enqueues the kernel on the current stream of `like`'s GPU.

        Args:
            like: a tensor on that GPU.
            grid: blocks, none of them 0.
            block: threads of a block.
            arguments: as many as `parameters` has letters. A tensor is its address, None a null pointer.

        Raises:
            KernelError: it could not be compiled or loaded.
            RuntimeError: it could not be launched.
        """
        self._on(like).launch(grid, block, arguments)

    def prepared(self, like: Tensor, grid: Size, block: Size, *arguments: Argument) -> Callable[[], None]:
        """What enqueues the kernel with these arguments at every call, on the stream that is current then.

        It keeps the tensors, whose values may change. Arguments and errors as for a call.
        """
        return self._on(like).prepared(grid, block, arguments)

    def _on(self, like: Tensor) -> _Loaded:
        index = like.get_device()
        try:
            return self._loaded[index]
        except KeyError:
            return self.load(index)

    def load(self, index: int) -> _Loaded:
        """The kernel on GPU number `index`, compiled and loaded if it was not.

        Raises:
            KernelError: the card is too old, the compiler is absent or refuses, or the driver does.
        """
        compiled = self.compile(index).result()
        with self._lock:
            if index not in self._loaded:
                self._loaded[index] = _Loaded(self, compiled, index)
            return self._loaded[index]

    def compile(self, index: int) -> Future[Compiled]:
        """Begins to compile for GPU number `index` in the background, unless that was begun before.

        Raises:
            KernelError: there is no compiler, or no GPU new enough.
        """
        architecture = nvrtc.architecture_for(_capability(index))
        with self._lock:
            if architecture not in self._compilations:
                self._compilations[architecture] = _pool().submit(self.compiled, architecture)
            return self._compilations[architecture]

    def compiled(self, architecture: str) -> Compiled:
        """From the cache, or compiled now; `architecture` as for `compile_kernel`.

        Raises:
            KernelError: see `compile_kernel`.
        """
        source = nvrtc.read_source(self.source)
        described = (source, self.expression, architecture, nvrtc.OPTIONS, nvrtc.version())
        key = hashlib.sha256(repr(described).encode()).hexdigest()
        if (kept := kernel_cache.read(key)) is not None:
            symbol, _, image = kept.partition(b"\0")
            return Compiled(symbol.decode(), image)
        compiled = nvrtc.compile_kernel(source, self.expression, architecture)
        kernel_cache.write(key, compiled.symbol.encode() + b"\0" + compiled.image)
        return compiled


class Layout:
    """Where the values of a kernel's parameters lie, as C++ lays them out.

    Attributes:
        values: how to pack all of them into one buffer.
        pointers: which of the values are addresses.
        parameters: offset and size in bytes of each parameter.
    """

    def __init__(self, description: str) -> None:
        codes: list[str] = []
        self.parameters: list[tuple[int, int]] = []
        end = 0
        for parameter in _members(iter(description.replace(" ", ""))):
            begin = end + -end % _alignment(parameter)
            end = _place(parameter, end, codes)
            self.parameters.append((begin, end - begin))
        self.values = struct.Struct("<" + "".join(codes))
        letters = [letter for letter in description if letter not in "() "]
        self.pointers = tuple(place for place, letter in enumerate(letters) if letter == "P")


_Member = str | list[Any]
"""A letter, or the members of a struct."""


def _members(letters: Iterator[str]) -> list[_Member]:
    """Letters up to the closing bracket, or all."""
    found: list[_Member] = []
    for letter in letters:
        if letter == ")":
            break
        found.append(_members(letters) if letter == "(" else letter)
    return found


def _alignment(member: _Member) -> int:
    return _SIZES[member] if isinstance(member, str) else max(map(_alignment, member))


def _place(member: _Member, end: int, codes: list[str]) -> int:
    """Adds what packs a member, and the gap before it, to `codes`; returns where it ends."""
    alignment = _alignment(member)
    gap = -end % alignment
    codes.append(f"{gap}x")
    end += gap
    if isinstance(member, str):
        codes.append("Q" if member == "P" else member)
        return end + alignment
    for part in member:
        end = _place(part, end, codes)
    tail = -end % alignment
    codes.append(f"{tail}x")
    return end + tail


class _Arguments:
    """Memory for the values of a kernel's parameters, and a list of where each lies, as the driver takes it."""

    def __init__(self, layout: Layout) -> None:
        self._buffer = ctypes.create_string_buffer(max(layout.values.size, 1))
        self._pack_into = layout.values.pack_into
        self._pointers = layout.pointers
        start = ctypes.addressof(self._buffer)
        places = [start + offset for offset, _ in layout.parameters]
        self._places = (ctypes.c_void_p * len(places))(*places)
        self.list = ctypes.c_void_p(ctypes.addressof(self._places))

    def hold(self, arguments: Sequence[Argument]) -> None:
        """From now on these values."""
        values: list[Any] = list(arguments)
        for place in self._pointers:
            tensor = values[place]
            values[place] = 0 if tensor is None else tensor.data_ptr()
        self._pack_into(self._buffer, 0, *values)


class _Loaded:
    """A kernel on one GPU, with the memory that its arguments are packed into.

    That memory belongs to a launch until the driver has copied it, when its call returns.
    """

    def __init__(self, kernel: Kernel, compiled: Compiled, index: int) -> None:
        driver = _driver()
        self.name = kernel.expression
        self.index = index
        self._context = _use_primary_context(index)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _require(driver.cuModuleLoadData(ctypes.byref(module), compiled.image), f"to load the kernel {self.name}")
        found = driver.cuModuleGetFunction(ctypes.byref(function), module, compiled.symbol.encode())
        _require(found, f"to find the kernel {self.name}")
        if kernel.shared_bytes > _SHARED_WITHOUT_ASKING:
            allowed = driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared_bytes)
            _require(allowed, f"{kernel.shared_bytes} bytes of shared memory to the kernel {self.name}")
        _check_layout(function, kernel)
        self._launch = driver.cuLaunchKernel
        self._function = function
        self._shared_bytes = kernel.shared_bytes
        self._layout = kernel.layout
        self._arguments = _Arguments(kernel.layout)
        self._lock = threading.Lock()
        self._current_gpu: Callable[[], int] = torch._C._cuda_getDevice
        self._current_stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream

    def launch(self, grid: Size, block: Size, arguments: Sequence[Argument]) -> None:
        """See `Kernel.__call__`."""
        with self._lock:
            self._arguments.hold(arguments)
            self._enqueue(_sizes(grid, block), self._arguments)

    def prepared(self, grid: Size, block: Size, arguments: Sequence[Argument]) -> Callable[[], None]:
        """See `Kernel.prepared`."""
        own, sizes, enqueue = _Arguments(self._layout), _sizes(grid, block), self._enqueue
        own.hold(arguments)

        def launch(tensors: Sequence[Argument] = arguments) -> None:  # kept with it
            enqueue(sizes, own)

        return launch

    def _enqueue(self, sizes: tuple[int, ...], arguments: _Arguments) -> None:
        index = self.index
        if self._current_gpu() != index:
            with torch.cuda.device(index):
                return self._enqueue(sizes, arguments)
        # Without declared types integers go as they are; pointers have to be said to be such.
        values = (self._function, *sizes, self._shared_bytes, _pointer(self._current_stream(index)), arguments.list)
        error = self._launch(*values, None)
        if error == _INVALID_CONTEXT:  # a thread new to CUDA, as autograd's at its first node
            _require(_driver().cuCtxSetCurrent(self._context), "its context to a thread")
            error = self._launch(*values, None)
        if error:
            raise RuntimeError(f"the CUDA kernel {self.name} could not be launched: {_error_text(error)}")


def compile_ahead(kernels: Iterable[Kernel], device: torch.device) -> None:
    """Has kernels compiled in the background that will be called soon; what fails will be said then."""
    if device.type != "cuda":
        return
    index = _index_of(device)
    try:
        for kernel in kernels:
            kernel.compile(index)
    except KernelError:
        return


def usable(kernels: tuple[Kernel, ...], device: torch.device, instead: str) -> bool:
    """Whether these kernels can be called on this GPU; where they cannot, one warning says why.

    What keeps all kernels from being compiled is said once, whoever asks.

    Args:
        kernels: all are compiled and loaded now.
        device: a GPU.
        instead: the warning's second sentence: what happens instead, and how much slower.
    """
    return _usable(kernels, _index_of(device), instead)


@functools.cache
def _usable(kernels: tuple[Kernel, ...], index: int, instead: str) -> bool:
    try:
        for kernel in kernels:
            kernel.compile(index)
    except KernelError as error:
        _warn_of_all(str(error))
        return False
    try:
        for kernel in kernels:
            kernel.load(index)
    except KernelError as error:
        warnings.warn(f"{error}. {instead}", stacklevel=5)
        return False
    return True


@functools.cache
def _warn_of_all(reason: str) -> None:
    warnings.warn(f"{reason}. Torch's own operations are used instead, which are slower: {SLOWER}", stacklevel=7)


def _index_of(device: torch.device) -> int:
    index: int | None = device.index
    if index is not None:
        return index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    """A GPU's compute capability.

    Raises:
        KernelError: there is no GPU, or it is too old.
    """
    if not torch.cuda.is_available():
        raise KernelError(
            f"the CUDA kernels need an NVIDIA GPU and a CUDA build of torch, and torch {torch.__version__} sees none; "
            "run on the CPU (--accelerator cpu) or install torch with CUDA"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < LOWEST_CAPABILITY:
        raise KernelError(
            f"the CUDA kernels need a GPU of compute capability 8.0 (Ampere) or newer, this one has {capability[0]}."
            f"{capability[1]}; use a newer GPU or the CPU (--accelerator cpu)"
        )
    return capability


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="kernels")


@functools.cache
def _driver() -> Any:
    """The driver's library, with Python's lock held during its calls.

    Raises:
        KernelError: there is none.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.PyDLL(name)
    except OSError as error:
        raise KernelError(f"the NVIDIA driver's library {name} is not there ({error}): install the driver") from error
    driver.cuModuleLoadData.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return driver


def driver_cuda_version() -> tuple[int, int]:
    """Major and minor number of the newest CUDA that the driver knows.

    Raises:
        KernelError: there is no driver, or it does not say.
    """
    version = ctypes.c_int()
    _require(_driver().cuDriverGetVersion(ctypes.byref(version)), "its version")
    return version.value // 1000, version.value % 1000 // 10


def _use_primary_context(index: int) -> ctypes.c_void_p:
    """Makes the context that torch uses on a GPU this thread's; it lives as long as the process."""
    driver = _driver()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _require(driver.cuInit(0), "to start")
    _require(driver.cuDeviceGet(ctypes.byref(device), index), f"GPU {index}")
    _require(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), f"a context on GPU {index}")
    _require(driver.cuCtxSetCurrent(context), f"its context on GPU {index}")
    return context


def _check_layout(function: ctypes.c_void_p, kernel: Kernel) -> None:
    """Holds the description of the parameters against the compiled kernel; drivers before CUDA 12.4 cannot say."""
    info = getattr(_driver(), "cuFuncGetParamInfo", None)
    if info is None:
        return
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    found: list[tuple[int, int]] = []
    while info(function, ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)) == 0:
        found.append((offset.value, size.value))
    assert found == kernel.layout.parameters, f"{kernel.expression} takes {found}, not {kernel.layout.parameters}"


def _require(code: int, subject: str) -> None:
    if code:
        raise KernelError(f"the NVIDIA driver refuses {subject}: {_error_text(code)}; update the driver, restart")


def _error_text(code: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({code})"


@functools.lru_cache(maxsize=4096)
def _sizes(grid: Size, block: Size) -> tuple[int, ...]:
    return *_three(grid), *_three(block)


def _three(size: Size) -> tuple[int, int, int]:
    given = size if isinstance(size, tuple) else (size,)
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


@functools.lru_cache(maxsize=64)
def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)
