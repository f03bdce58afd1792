"""From flags to a device and an engine; the machine is imagined."""

import ctypes
import os
import platform
from unittest.mock import Mock

import pytest
import torch
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import nn

from src.config import TrainConfig
from src.errors import ConfigError
from src.model.parameters import ModelShape
from src.training.hardware import (
    Hardware,
    _limit_stacks,
    deepspeed_config,
    global_rank,
    resolve_hardware,
    spare_threads,
    trainer_arguments,
)


def config(**flags: object) -> TrainConfig:
    """A configuration from the two necessary flags and these."""
    given = {"load_model": "base.pth", "data_file": "data", **{name: str(v) for name, v in flags.items()}}
    return TrainConfig.from_flags(given)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def allocator_settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's allocator is asked for; the environment is as it was afterwards."""
    asked: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    for name in (
        "CUBLAS_WORKSPACE_CONFIG", "NCCL_MAX_CTAS", "NCCL_BUFFSIZE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    ):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return asked


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, allocator_settings: list[str]) -> None:
    """A machine with two GPUs of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr("src.training.hardware._limit_stacks", lambda device: None)


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
        hardware = resolve_hardware(config())
        assert (hardware.device.type, hardware.precision, hardware.strategy) == ("cpu", "fp32", "single")
        assert hardware.notes == []

    def test_nothing_can_be_offloaded(self) -> None:
        with pytest.raises(ConfigError, match="--offload_activations 1 frees a GPU's memory and none is used"):
            resolve_hardware(config(offload_activations=1))

    @pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
    def test_what_was_asked_for(self, precision: str, dtype: torch.dtype) -> None:
        assert resolve_hardware(config(precision=precision)).compute_dtype == dtype

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"accelerator": "gpu"}, "--accelerator gpu was asked for and no CUDA GPU is visible"),
            ({"accelerator": "cuda"}, "--accelerator cuda was asked for"),
            ({"precision": "fp16"}, "--precision fp16 needs a GPU"),
            ({"precision": "tf32"}, "--precision tf32 needs a GPU"),
            ({"devices": 2}, "--devices 2 --num_nodes 1 needs GPUs"),
            ({"num_nodes": 2}, "--devices 1 --num_nodes 2 needs GPUs"),
        ],
    )
    def test_what_is_not_there_is_refused(self, flags: dict[str, object], expected: str) -> None:
        with pytest.raises(ConfigError) as refused:
            resolve_hardware(config(**flags))
        assert expected in str(refused.value)

    def test_an_engine_becomes_a_single_device_and_says_so(self) -> None:
        for strategy in ("deepspeed_stage_2", "deepspeed_stage_3"):
            hardware = resolve_hardware(config(strategy=strategy, quant=0))
            assert hardware.strategy == "single"
            assert hardware.notes == [f"--strategy {strategy} needs a GPU: running on a single device instead"]


@pytest.mark.usefixtures("two_gpus")
class TestWithGpus:
    @pytest.mark.parametrize(
        ("flags", "strategy"),
        [
            ({}, "single"),
            ({"devices": 2}, "deepspeed_stage_1"),
            ({"num_nodes": 4}, "deepspeed_stage_1"),
            ({"strategy": "deepspeed_stage_2"}, "deepspeed_stage_2"),
        ],
    )
    def test_the_engine(self, flags: dict[str, object], strategy: str) -> None:
        hardware = resolve_hardware(config(**flags))
        assert (hardware.device.type, hardware.precision, hardware.strategy) == ("cuda", "bf16", strategy)

    def test_the_cpu_can_still_be_chosen(self, allocator_settings: list[str]) -> None:
        assert resolve_hardware(config(accelerator="cpu")).device.type == "cpu"
        assert allocator_settings == []

    def test_idle_memory_is_saved(self, allocator_settings: list[str]) -> None:
        resolve_hardware(config())
        assert allocator_settings == ["expandable_segments:True"]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:2:16:8"
        assert (os.environ["NCCL_MAX_CTAS"], os.environ["NCCL_BUFFSIZE"]) == ("4", "1048576")

    @pytest.mark.parametrize("flags", [{"train_type": "none"}, {"num_nodes": 2}])
    def test_larger_messages_keep_nccls_buffers(self, flags: dict[str, object], allocator_settings: list[str]) -> None:
        resolve_hardware(config(**flags))
        assert "NCCL_MAX_CTAS" not in os.environ
        assert "NCCL_BUFFSIZE" not in os.environ

    def test_stacks_are_limited_where_nccl_is_not_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limited: list[torch.device] = []
        monkeypatch.setattr("src.training.hardware._limit_stacks", limited.append)
        resolve_hardware(config())
        assert limited == [torch.device("cuda", 0)]
        resolve_hardware(config(devices=2))
        assert len(limited) == 1

    def test_segments_do_not_grow_on_wsl(self, monkeypatch: pytest.MonkeyPatch, allocator_settings: list[str]) -> None:
        monkeypatch.setattr(platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
        resolve_hardware(config())
        assert allocator_settings == []

    @pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
    def test_what_the_user_says_of_memory_stands(
        self, name: str, monkeypatch: pytest.MonkeyPatch, allocator_settings: list[str]
    ) -> None:
        monkeypatch.setenv(name, "max_split_size_mb:64")
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        monkeypatch.setenv("NCCL_BUFFSIZE", "4194304")
        resolve_hardware(config())
        assert allocator_settings == []
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        assert os.environ["NCCL_BUFFSIZE"] == "4194304"

    def test_weights_are_not_sharded(self) -> None:
        with pytest.raises(ConfigError, match="weights outside of the hooks that gather them: use deepspeed_stage_1"):
            resolve_hardware(config(strategy="deepspeed_stage_3_offload", quant=0))

    def test_more_devices_than_there_are(self) -> None:
        with pytest.raises(ConfigError, match="--devices 3 was asked for and 2 GPU"):
            resolve_hardware(config(devices=3))

    def test_an_old_gpu_has_no_bf16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(ConfigError, match=r"needs compute capability 8\.0 and this GPU has 7\.5"):
            resolve_hardware(config())
        assert resolve_hardware(config(precision="fp32")).precision == "fp32"

    def test_each_process_has_its_own_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_LOCALID", "0")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert resolve_hardware(config(devices=2)).device == torch.device("cuda", 1)

    def test_each_process_of_a_slurm_job_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setenv("SLURM_LOCALID", "1")
        assert resolve_hardware(config(devices=2)).device == torch.device("cuda", 1)


class TestDeepSpeedConfiguration:
    def test_there_is_no_section_that_casts(self) -> None:
        for strategy in ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload"):
            made = deepspeed_config(strategy, config(), trained_elements=1000)
            assert not {"bf16", "fp16", "amp", "torch_autocast"} & made.keys()

    @pytest.mark.parametrize(("trained_elements", "bucket"), [(1000, 250), (1001, 251), (10**9, 50_000_000), (0, 1)])
    def test_buckets_fit_what_is_trained_up_to_ds_bucket_mb(self, trained_elements: int, bucket: int) -> None:
        zero = deepspeed_config("deepspeed_stage_1", config(), trained_elements)["zero_optimization"]
        assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == bucket

    def test_the_stage_and_where_the_optimizer_is(self) -> None:
        plain = deepspeed_config("deepspeed_stage_2", config(), 1)["zero_optimization"]
        offload = deepspeed_config("deepspeed_stage_2_offload", config(), 1)["zero_optimization"]
        assert (plain["stage"], "offload_optimizer" in plain) == (2, False)
        assert (offload["stage"], offload["offload_optimizer"]["device"]) == (2, "cpu")

    @pytest.mark.parametrize("devices", [1, 2])
    def test_gradients_are_reduced_on_the_stream_that_makes_them(self, devices: int) -> None:
        zero = deepspeed_config("deepspeed_stage_1", config(devices=devices), 1)["zero_optimization"]
        assert zero["overlap_comm"] is False


class TestTrainerArguments:
    def test_a_single_device_has_no_strategy(self) -> None:
        made = trainer_arguments(Hardware(torch.device("cpu"), "fp32", "single"), config(), 1)
        assert (made["accelerator"], made["devices"], made["num_nodes"]) == ("cpu", 1, 1)
        assert "strategy" not in made

    def test_the_engines_precision_leaves_every_dtype(self) -> None:
        hardware = Hardware(torch.device("cuda"), "bf16", "deepspeed_stage_1")
        made = trainer_arguments(hardware, config(strategy="deepspeed_stage_1"), 1)
        assert made["accelerator"] == "gpu"
        assert isinstance(made["strategy"], DeepSpeedStrategy)
        precision = made["strategy"].precision_plugin
        assert isinstance(precision, DeepSpeedPrecision)
        module = nn.Module()
        module.state = nn.Parameter(torch.zeros(2))
        module.weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16), requires_grad=False)
        module.register_buffer("packed", torch.zeros(2, dtype=torch.uint8))
        module.register_buffer("absmax", torch.zeros(2, dtype=torch.float16))
        before = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        converted = precision.convert_module(module)
        assert {name: tensor.dtype for name, tensor in converted.state_dict().items()} == before
        batch = torch.zeros(2, dtype=torch.float64)
        assert precision.convert_input(batch) is batch

    def test_the_loss_is_divided_by_the_accumulated_batches_once(self) -> None:
        """By Lightning; the engine is told not to do it again."""
        hardware = Hardware(torch.device("cuda"), "bf16", "deepspeed_stage_1")
        precision = trainer_arguments(hardware, config(strategy="deepspeed_stage_1"), 1)["strategy"].precision_plugin
        engine, loss = Mock(), torch.ones(())
        precision.backward(loss, Mock(trainer=Mock(model=engine)), None)
        engine.backward.assert_called_once_with(loss, scale_wrt_gas=False)


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
    shape = ModelShape.from_sizes(n_layer=layers, n_embd=256, vocab_size=257)
    spare_threads(torch.device("cpu"), shape)
    assert set_to[-1] == expected
