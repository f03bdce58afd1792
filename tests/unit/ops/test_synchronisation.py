"""Each wait of the WKV kernels is needed, and the emulator finds it missing: sources without one of them."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import emulator.kernels
import pytest
import torch
from emulator.kernels import emulated, has_compiler
from torch import Tensor

from src.ops import wkv6_cuda, wkv7_cuda

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs g++")]

WAIT = re.compile(
    r"(if \(use > 0\) )?\b(__sync(warp|threads)|wait_for_(all_copies|copies<[^;]*>|phase))\([^;]*\);"
    r"(?!  // in global memory)"  # which is not watched
)
KERNELS = {
    "wkv6.cu": (
        wkv6_cuda.FORWARD,
        wkv6_cuda.FORWARD_SUMMARY,
        wkv6_cuda.BACKWARD_SUMMARY,
        wkv6_cuda.BACKWARD,
    ),
    "wkv7.cu": (wkv7_cuda.SMALL.forward, wkv7_cuda.SMALL.backward, wkv7_cuda.GRADIENTS),
}
FOUND = (
    "is read while it is written|is written while it is read|is written twice|is being copied to|"
    "threads wait for each other for ever|need not come after its making|no barrier was made|"
    "ends without having waited for its copies"
)


@cache
def text_of(source: str) -> str:
    return (emulator.kernels.CUDA / source).read_text()


def waits_of(source: str) -> list[re.Match[str]]:
    return list(WAIT.finditer(text_of(source)))


CASES = [
    pytest.param(source, number, id=f"{source} line {text_of(source).count(chr(10), 0, found.start()) + 1}")
    for source in KERNELS
    for number, found in enumerate(waits_of(source))
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sources are taken from here, where those of the program stand, too."""
    for file in emulator.kernels.CUDA.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.setattr(emulator.kernels, "CUDA", tmp_path)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(wkv6_cuda, "_multiprocessors", lambda index: 2)
    monkeypatch.setattr(wkv7_cuda, "_form_for", lambda heads, device: wkv7_cuda.SMALL)
    with emulated():
        yield tmp_path


def run(source: str) -> None:
    """These kernels of a source, over more tiles than there are slots, the last of them not whole."""
    tokens = 200
    inputs: list[Any] = [
        torch.randn(1, tokens, 1, 64, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()
        for seed in range(4 if source == "wkv6.cu" else 6)
    ]
    state = torch.zeros(1, 64, 64, requires_grad=True)
    results: tuple[Tensor, Tensor]
    if source == "wkv6.cu":
        bonus = torch.zeros(1, 64, dtype=torch.bfloat16)
        results = wkv6_cuda.wkv6_cuda(*inputs, bonus, state, span_tokens=64)
    else:
        results = wkv7_cuda.wkv7_cuda(*inputs, state)
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])


def assert_found(source: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something is in this text of the source."""
    changed = f"changed-{source}"
    (folder / changed).write_text(text)
    for kernel in KERNELS[source]:
        monkeypatch.setattr(kernel, "source", changed)
    emulator.kernels._library.cache_clear()  # which goes by the file's name
    with pytest.raises(RuntimeError, match=FOUND):
        run(source)


@pytest.mark.parametrize(("source", "number"), CASES)
def test_a_missing_wait_is_found(source: str, number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, text = waits_of(source)[number], text_of(source)
    assert_found(source, text[: found.start()] + ";" + text[found.end() :], folder, monkeypatch)


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        ("wkv6.cu", "wait_for_copies<kValueStages - 2>", "wait_for_copies<kValueStages - 1>"),
        ("wkv6.cu", "buffer = tile & 1", "buffer = 0"),
        ("wkv7.cu", "init_barrier(empty + 8 * threadIdx.x, kConsumers)", "init_barrier(empty + 8 * threadIdx.x, 1)"),
        ("wkv7.cu", "(use - 1) & 1", "use & 1"),
    ],
    ids=["a copy too few", "one place for E", "room after one consumer", "the other phase"],
)
def test_a_wait_for_something_else_is_found(
    source: str, right: str, wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text_of(source).count(right) == 1
    assert_found(source, text_of(source).replace(right, wrong), folder, monkeypatch)


@pytest.mark.parametrize("source", KERNELS)
def test_nothing_is_found_with_all_waits(source: str, folder: Path) -> None:
    run(source)
