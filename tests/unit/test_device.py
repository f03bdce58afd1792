"""The device, its precision and its settings; the machine is imagined."""

import ctypes
import os
import platform
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from src.device import (
    Device,
    _limit_stacks,
    apply_device,
    global_rank,
    is_started_by_first,
    launched_by,
    memory_bytes,
    require_memory,
    resolve_device,
    spare_threads,
    without_memory,
)
from src.errors import ConfigError, TrainingError
from src.model.rwkv6 import RWKV6Shape

GPU = Device(torch.device("cuda", 1), "bf16")


class TestStacks:
    def test_the_driver_is_asked_once_there_is_a_context(self, monkeypatch: pytest.MonkeyPatch) -> None:
        driver, asked = Mock(), Mock()
        asked.attach_mock(driver, "driver")
        monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
        monkeypatch.setattr(torch.cuda, "synchronize", asked.synchronize)
        device = torch.device("cuda", 1)
        _limit_stacks(device)
        synchronized, limited = asked.mock_calls
        assert (synchronized[0], synchronized.args) == ("synchronize", (device,))
        assert limited[0] == "driver.cuCtxSetLimit"
        limit, size = limited.args
        assert (limit, size.value) == (0, 128)

    def test_without_its_library_nothing_happens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise OSError(name)

        synchronize = Mock()
        monkeypatch.setattr(ctypes, "CDLL", missing)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        _limit_stacks(torch.device("cuda", 0))
        synchronize.assert_not_called()


@pytest.mark.usefixtures("no_gpu")
class TestWithoutGpu:
    def test_auto_is_the_cpu_in_fp32(self) -> None:
        chosen = resolve_device("auto", "")
        assert (chosen.device.type, chosen.precision, chosen.on_gpu) == ("cpu", "fp32", False)

    @pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
    def test_what_was_asked_for(self, precision: str, dtype: torch.dtype) -> None:
        assert resolve_device("auto", precision).compute_dtype == dtype

    @pytest.mark.parametrize(
        ("accelerator", "precision", "expected"),
        [
            ("gpu", "", "--accelerator gpu was asked for and no CUDA GPU is visible"),
            ("cuda", "", "--accelerator cuda was asked for"),
            ("auto", "fp16", "--precision fp16 needs a GPU"),
            ("auto", "tf32", "--precision tf32 needs a GPU"),
        ],
    )
    def test_what_is_not_there_is_refused(self, accelerator: str, precision: str, expected: str) -> None:
        with pytest.raises(ConfigError) as refused:
            resolve_device(accelerator, precision)
        assert expected in str(refused.value)

    def test_a_choice_of_gpus_that_leaves_none_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-x")
        with pytest.raises(ConfigError, match="look at CUDA_VISIBLE_DEVICES=GPU-x in the environment, install"):
            resolve_device("gpu", "")

    def test_there_is_nothing_to_set(self, allocator_settings: list[str]) -> None:
        apply_device(resolve_device("auto", ""), small_messages=True)
        assert allocator_settings == []
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.usefixtures("two_gpus")
class TestWithGpus:
    def test_auto_is_the_gpu_in_bf16(self) -> None:
        chosen = resolve_device("auto", "")
        assert (chosen.device.type, chosen.precision, chosen.on_gpu) == ("cuda", "bf16", True)

    def test_the_cpu_can_still_be_chosen(self) -> None:
        assert resolve_device("cpu", "").device.type == "cpu"

    def test_an_old_gpu_has_no_bf16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(ConfigError, match=r"needs compute capability 8\.0 and this GPU has 7\.5"):
            resolve_device("auto", "")
        assert resolve_device("auto", "fp32").precision == "fp32"

    def test_each_process_has_its_own_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_LOCALID", "0")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert resolve_device("auto", "").device == torch.device("cuda", 1)

    def test_a_number_that_no_gpu_has_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ConfigError, match=r"number 2 of its machine .*, counted from 0, and 2 GPU"):
            resolve_device("auto", "")

    def test_each_process_of_a_slurm_job_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setenv("SLURM_LOCALID", "1")
        assert resolve_device("auto", "").device == torch.device("cuda", 1)


@pytest.mark.usefixtures("two_gpus")
class TestSettings:
    def test_idle_memory_is_saved(self, allocator_settings: list[str]) -> None:
        apply_device(GPU, small_messages=True)
        assert allocator_settings == ["expandable_segments:True"]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2:16:8"
        assert (os.environ["NCCL_MAX_CTAS"], os.environ["NCCL_BUFFSIZE"]) == ("4", "1048576")

    def test_larger_messages_keep_nccls_buffers(self) -> None:
        apply_device(GPU, small_messages=False)
        assert not {"NCCL_MAX_CTAS", "NCCL_BUFFSIZE"} & os.environ.keys()

    @pytest.mark.parametrize("precision", ["bf16", "tf32"])
    def test_products_are_in_tf32_where_asked_for(self, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
        products = SimpleNamespace(allow_tf32=precision != "tf32")
        monkeypatch.setattr(torch.backends.cuda, "matmul", products)
        apply_device(Device(GPU.device, precision))
        assert products.allow_tf32 == (precision == "tf32")

    def test_the_device_and_the_allocator_are_set_before_a_context_is_opened(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = Mock()
        monkeypatch.setattr(torch.cuda, "set_device", done.set_device)
        monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", done.settings)
        monkeypatch.setattr("src.device._limit_stacks", done.limit_stacks)
        apply_device(GPU)
        assert [name for name, *_ in done.mock_calls] == ["set_device", "settings", "limit_stacks"]
        assert done.set_device.call_args == done.limit_stacks.call_args == ((GPU.device,),)

    def test_stacks_stay_where_nccl_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limit = Mock()
        monkeypatch.setattr("src.device._limit_stacks", limit)
        apply_device(GPU, alone=False)
        limit.assert_not_called()

    def test_segments_do_not_grow_on_wsl(self, monkeypatch: pytest.MonkeyPatch, allocator_settings: list[str]) -> None:
        monkeypatch.setattr(platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
        apply_device(GPU, small_messages=True)
        assert allocator_settings == []

    @pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
    def test_what_the_user_says_of_memory_stands(
        self, name: str, monkeypatch: pytest.MonkeyPatch, allocator_settings: list[str]
    ) -> None:
        monkeypatch.setenv(name, "max_split_size_mb:64")
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        monkeypatch.setenv("NCCL_BUFFSIZE", "4194304")
        apply_device(GPU, small_messages=True)
        assert allocator_settings == []
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        assert os.environ["NCCL_BUFFSIZE"] == "4194304"


class TestRank:
    @pytest.mark.parametrize(
        ("environment", "rank"),
        [
            ({}, 0),
            ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
            ({"SLURM_PROCID": "3"}, 3),
            ({"LOCAL_RANK": "1"}, 1),
            ({"LOCAL_RANK": "1", "NODE_RANK": "2"}, 5),
            ({"LOCAL_RANK": "0", "GROUP_RANK": "1"}, 2),
            ({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}, 1),
        ],
    )
    def test_as_the_launcher_tells_it(
        self, environment: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert global_rank(devices=2) == rank


@pytest.mark.parametrize(("layers", "environment", "expected"), [(2, None, 1), (2, "2", 2), (40, None, 2)])
def test_a_small_model_on_a_cpu_gets_one_thread(
    monkeypatch: pytest.MonkeyPatch, layers: int, environment: str | None, expected: int
) -> None:
    set_to = [2]
    monkeypatch.setattr(torch, "set_num_threads", lambda count: set_to.append(count))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    shape = RWKV6Shape.from_sizes(n_layer=layers, n_embd=256, vocab_size=257)
    spare_threads(torch.device("cpu"), shape)
    assert set_to[-1] == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ("torchrun", 4)),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ("srun", 2)),
        # A batch script's own process, and one that Lightning started.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None),
        ({"SLURM_STEP_NUM_TASKS": "many"}, None),
    ],
)
def test_the_launcher_is_known_by_what_it_leaves_in_the_environment(
    variables: dict[str, str], expected: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_by() == expected
    assert is_started_by_first() == (variables.get("LOCAL_RANK") == "1" and expected is None)


class TestMemory:
    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        ],
    )
    def test_running_out_of_it_is_the_users(self, error: Exception) -> None:
        with pytest.raises(TrainingError, match="lower it"), without_memory(lambda: "lower it"):
            raise error

    def test_the_allocators_own_error_is_known(self) -> None:
        with pytest.raises(TrainingError, match="lower it"), without_memory(lambda: "lower it"):
            torch.empty(2**60, dtype=torch.uint8)

    def test_other_errors_stay_what_they_are(self) -> None:
        with pytest.raises(RuntimeError, match="shapes"), without_memory(lambda: "lower it"):
            raise RuntimeError("shapes differ")

    def test_what_no_machine_has_is_refused(self) -> None:
        cpu = torch.device("cpu")
        require_memory("--x 1", "lower it", 1, cpu)
        with pytest.raises(ConfigError, match=r"^--x 9 needs 1,048,576\.0 GiB at least and the machine has .*: lower"):
            require_memory("--x 9", "lower it", 2**50, cpu)

    def test_a_containers_limit_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "limit").write_text("1000\n")
        (tmp_path / "none").write_text("max\n")
        paths = [str(tmp_path / name) for name in ("limit", "none", "missing")]
        monkeypatch.setattr("src.device._CGROUP_LIMITS", paths)
        assert memory_bytes(torch.device("cpu")) == 1000
