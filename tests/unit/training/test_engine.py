"""From flags to an engine and Lightning's arguments; the machine is imagined."""

import logging
import os
from unittest.mock import Mock

import pytest
import torch
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import nn

from src.adapters.method import method_of
from src.config import TrainConfig
from src.errors import ConfigError
from src.training import strategies
from src.training.engine import REPLICAS, Hardware, apply_hardware, deepspeed_config, resolve_hardware
from src.training.replicas import Replicas
from src.training.strategies import trainer_arguments


def config(**flags: object) -> TrainConfig:
    """A configuration from the two necessary flags and these."""
    given = {"load_model": "base.pth", "data_file": "data", **{name: str(v) for name, v in flags.items()}}
    return TrainConfig.from_flags(given)


@pytest.mark.usefixtures("no_gpu")
class TestWithoutGpu:
    def test_auto_is_a_single_device(self) -> None:
        hardware = resolve_hardware(config())
        assert (hardware.device.type, hardware.precision, hardware.strategy) == ("cpu", "fp32", "single")
        assert hardware.notes == []
        assert hardware.describe().startswith("CPU, ")
        assert hardware.describe().endswith(", fp32, single device")

    def test_nothing_can_be_offloaded(self) -> None:
        with pytest.raises(ConfigError, match="--offload_activations 1 frees a GPU's memory and none is used"):
            resolve_hardware(config(offload_activations=1))

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"accelerator": "gpu", "devices": 2}, "--accelerator gpu was asked for and no CUDA GPU is visible"),
            ({"precision": "fp16", "devices": 2}, "--precision fp16 needs a GPU"),
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
            ({"strategy": "deepspeed_stage_3_offload", "quant": 0}, "deepspeed_stage_3_offload"),
            ({"train_type": "none", "weights": "bf16", "devices": 2}, "deepspeed_stage_1"),
            ({"peft": "lisa", "devices": 2}, "replicas"),
            ({"train_type": "none", "weights": "bf16", "fused_update": 1, "num_nodes": 2}, "replicas"),
            ({"peft": "lisa"}, "single"),
        ],
    )
    def test_the_engine(self, flags: dict[str, object], strategy: str) -> None:
        hardware = resolve_hardware(config(**flags))
        assert (hardware.device.type, hardware.precision, hardware.strategy) == ("cuda", "bf16", strategy)

    @pytest.mark.parametrize("devices", [1, 2])
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            (
                {"peft": "lisa"},
                "--peft lisa trains layers by turns, and DeepSpeed .--strategy deepspeed_stage_1. keeps",
            ),
            ({"train_type": "none", "fused_update": 1}, "--fused_update 1 updates tensor by tensor, and DeepSpeed"),
        ],
        ids=str,
    )
    def test_what_deepspeed_cannot_do(self, flags: dict[str, object], expected: str, devices: int) -> None:
        with pytest.raises(ConfigError, match=expected) as refused:
            resolve_hardware(config(**flags, devices=devices, strategy="deepspeed_stage_1"))
        assert "\n" not in str(refused.value)

    def test_more_devices_than_there_are(self) -> None:
        with pytest.raises(ConfigError, match="--devices 3 was asked for and 2 GPU"):
            resolve_hardware(config(devices=3))

    def test_a_process_without_a_gpu_hears_of_devices_before_its_gpu_is_looked_at(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LOCAL_RANK", "2")
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setattr(torch.cuda, "get_device_capability", Mock(side_effect=AssertionError("Invalid device id")))
        with pytest.raises(ConfigError, match="--devices 3 was asked for"):
            resolve_hardware(config(devices=3))

    def test_what_is_resolved_is_applied_later(
        self, allocator_settings: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = Mock()
        monkeypatch.setattr(torch.cuda, "set_device", chosen)
        hardware = resolve_hardware(config())
        assert allocator_settings == []
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        chosen.assert_not_called()
        apply_hardware(hardware, config(), small_messages=True)
        assert allocator_settings == ["expandable_segments:True"]
        chosen.assert_called_once_with(torch.device("cuda", 0))

    @pytest.mark.parametrize(
        ("flags", "small"),
        [({}, True), ({"devices": 2}, True), ({"train_type": "none"}, False), ({"num_nodes": 2}, False)],
    )
    def test_larger_messages_keep_nccls_buffers(self, flags: dict[str, object], small: bool) -> None:
        chosen = config(**flags)
        apply_hardware(resolve_hardware(chosen), chosen, small_messages=method_of(chosen).small)
        assert ("NCCL_MAX_CTAS" in os.environ) == ("NCCL_BUFFSIZE" in os.environ) == small

    @pytest.mark.parametrize(("flags", "limited"), [({}, 1), ({"devices": 2}, 0), ({"num_nodes": 2}, 0)])
    def test_stacks_are_limited_where_nccl_is_not_needed(
        self, flags: dict[str, object], limited: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limit = Mock()
        monkeypatch.setattr("src.device._limit_stacks", limit)
        apply_hardware(resolve_hardware(config(**flags)), config(**flags), small_messages=True)
        assert limit.call_count == limited


class TestDeepSpeedConfiguration:
    def test_there_is_no_section_that_casts(self) -> None:
        for strategy in ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload"):
            made = deepspeed_config(strategy, config(), trained_elements=1000)
            assert not {"bf16", "fp16", "amp", "torch_autocast"} & made.keys()
            assert made["timers"] == {"throughput": {"enabled": False}}, "it waits for the device twice a step"

    @pytest.mark.parametrize("stage", [1, 2])
    @pytest.mark.parametrize("devices", [1, 2])
    def test_where_an_optimizer_looks_at_its_norm_itself(self, stage: int, devices: int) -> None:
        made = deepspeed_config(f"deepspeed_stage_{stage}", config(devices=devices), 1000, updates_flat=True)
        zero = made["zero_optimization"]
        assert (zero["compute_grad_norm"], zero["contiguous_gradients"]) == (False, False)
        assert zero["reduce_bucket_size"] >= 1000 + 256 * devices - 1, "the whole, filled up, is one bucket"
        assert made.get("gradient_allreduce_op") == ("sum" if devices == 1 else None), "a mean of one costs a pass"

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

    def test_replicas_wrap_nothing(self) -> None:
        made = trainer_arguments(Hardware(torch.device("cuda"), "bf16", REPLICAS), config(peft="lisa", devices=2), 1)
        strategy = made["strategy"]
        assert isinstance(strategy, Replicas)
        strategy.model = nn.Module()
        strategy.configure_ddp()
        assert type(strategy.model) is nn.Module

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

    def test_users_are_not_warned_of_what_the_configuration_asks_for(self, caplog: pytest.LogCaptureFixture) -> None:
        """DeepSpeed does not know `FlatUpdates`, nor bitsandbytes."""
        for _ in range(2):
            trainer_arguments(
                Hardware(torch.device("cuda"), "bf16", "deepspeed_stage_1"), config(strategy="deepspeed_stage_1"), 1
            )
        logger = logging.getLogger("DeepSpeed")
        logger.addHandler(caplog.handler)
        try:
            logger.warning("**** You are using ZeRO with an untested optimizer, proceed with caution *****")
            logger.warning("something else")
        finally:
            logger.removeHandler(caplog.handler)
        assert {record.getMessage() for record in caplog.records} == {"something else"}
        assert len(logger.filters) == 1

    def test_the_loss_is_divided_by_the_accumulated_batches_once(self) -> None:
        """By Lightning; the engine is told not to do it again."""
        hardware = Hardware(torch.device("cuda"), "bf16", "deepspeed_stage_1")
        precision = trainer_arguments(hardware, config(strategy="deepspeed_stage_1"), 1)["strategy"].precision_plugin
        engine, loss = Mock(), torch.ones(())
        precision.backward(loss, Mock(trainer=Mock(model=engine)), None)
        engine.backward.assert_called_once_with(loss, scale_wrt_gas=False)


class TestLaunchers:
    @pytest.mark.parametrize(
        "variables", [{"SLURM_STEP_NUM_TASKS": "2"}, {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2"}]
    )
    def test_one_that_disagrees_with_the_flags_is_refused(
        self, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match="started 2 processes, and --devices 1 --num_nodes 1 make 1: give"):
            resolve_hardware(config(accelerator="cpu"))

    @pytest.mark.parametrize(
        "variables",
        [
            {"RANK": "1"},
            {"RANK": "0", "LOCAL_RANK": "3"},
            {"LOCAL_RANK": "1"},
            {"NODE_RANK": "1"},
            {"SLURM_PROCID": "1"},
        ],
    )
    def test_a_process_that_is_none_of_the_runs_is_refused(
        self, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would train, and save nothing."""
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=r"process number [13] counted from 0, and --devices 1"):
            resolve_hardware(config(accelerator="cpu"))

    @pytest.mark.parametrize("rank", ["0", "1"])
    def test_a_number_without_a_launcher_is_not_waited_with(self, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ConfigError, match=rf"LOCAL_RANK={rank}, .* wait for 1 more without end; unset LOCAL_RANK"):
            resolve_hardware(config(accelerator="cpu", devices=2))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="--devices 2"):  # which a CPU has not
            resolve_hardware(config(accelerator="cpu", devices=2))
        monkeypatch.delenv("WORLD_SIZE")
        if rank == "0":
            assert resolve_hardware(config(accelerator="cpu")).strategy == "single"

    @pytest.mark.usefixtures("no_gpu")
    @pytest.mark.parametrize(
        ("variables", "environment"),
        [
            ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, LightningEnvironment),
            ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, SLURMEnvironment),
            ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "1"}, TorchElasticEnvironment),
        ],
    )
    def test_lightning_is_told_and_puts_no_job_into_the_queue(
        self, variables: dict[str, str], environment: type, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        cluster = strategies._cluster()
        assert type(cluster) is environment
        assert not getattr(cluster, "auto_requeue", False)
