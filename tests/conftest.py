"""What all tests share."""

import functools
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Models here are so small that a second thread only waits; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What tests compile (the CUDA operators, DeepSpeed's) goes where no other program changes it meanwhile.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).parents[1] / "build" / "torch_extensions"))

# What tests write need not outlive a power cut, and waiting for the disk takes a tenth of their time.
os.fsync = lambda descriptor: None

sys.path.insert(0, str(Path(__file__).parent))  # for `from factories import ...`


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: nobody looks for garbage among these million objects, again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before a process's first test on a GPU autograd's thread gets its CUDA context, from its first kernel.

    A product that came before it would warn. In a run none does: the first node of its backward multiplies the loss.
    And no test is taken to need what an earlier one did at most: a run that records asks whether the card has as much.
    """
    if item.get_closest_marker("gpu") and _autograd_has_a_context():
        import torch

        torch.cuda.reset_peak_memory_stats()


@functools.cache
def _autograd_has_a_context() -> bool:
    """Sees to it; whether there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return False
    torch.ones((), device="cuda", requires_grad=True).mul(2).backward()
    return True


@pytest.fixture(scope="module", params=["x060", pytest.param("x070", marks=pytest.mark.slow)])
def architecture(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the factories make while a module's tests run: each architecture in turn."""
    import factories

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factories, "DEFAULT_ARCHITECTURE", request.param)
        yield request.param


@pytest.fixture(scope="session")
def real_inputs() -> Path:
    """The folder of real inputs; tests that want it are skipped where there is none."""
    folder = os.environ.get("RWKV_TEST_DATA", "")
    if not folder:
        pytest.skip("RWKV_TEST_DATA is not set")
    if not Path(folder).is_dir():
        pytest.skip(f"RWKV_TEST_DATA={folder} is not a folder")
    return Path(folder)
