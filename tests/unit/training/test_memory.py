"""The memory plan: how many layers keep more, from the bytes at hand."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factories import ARCHITECTURES, tiny_parameters, tiny_shape
from kept_tensors import RUNS, kept_and_estimated

from src.adapters.kept import KeptByLayers
from src.adapters.method import method_of
from src.adapters.plan import AdapterPlan
from src.adapters.states import StateTuning
from src.config import TrainConfig
from src.errors import ConfigError
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.model.rwkv6 import RWKV6Shape
from src.training import memory
from src.training.memory import MemoryPlan, bytes_of_trained, chunk_that_fits, plan_memory, require_memory_of_run

GIB = 2**30


@pytest.fixture
def model() -> LanguageModel:
    shape = tiny_shape(n_layer=4)
    return build_model(tiny_parameters(shape), shape, LoadOptions(torch.device("cpu"), torch.float16))


def fake_device(monkeypatch: pytest.MonkeyPatch, free_gib: float, total_gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * GIB), int(total_gib * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)


def test_more_free_memory_keeps_more_of_more_layers(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    for free in (0.5, 2, 4, 5, 6, 6.5, 7, 7.25, 7.5, 7.75, 8, 24, 80):
        fake_device(monkeypatch, free, 80)
        plans.append(plan_memory(model, StateTuning(), 1_000_000, 0))
    kept = [(plan.whole_layers, plan.light_layers + plan.whole_layers) for plan in plans]
    assert kept == sorted(kept)
    assert kept[0] == (0, 0)
    assert kept[-1] == (4, 4)
    assert any(0 < light < 4 for _, light in kept)
    assert any(0 < whole < 4 for whole, _ in kept)
    assert all(light == 4 for whole, light in kept if whole)


@pytest.mark.parametrize("free", [1.0, 3.0, 4.5, 6.0, 6.5])
def test_what_is_kept_fits(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    fake_device(monkeypatch, free, 80)
    plan = plan_memory(model, StateTuning(), 1_000_000, 0)
    levels = {Recompute.NOTHING: plan.whole_layers, Recompute.INPUTS: plan.light_layers}
    of_layers = KeptByLayers(StateTuning(), model.shape, fused=False, itemsize=2)
    kept = sum(of_layers.by_layer(level, 1_000_000)[0] * count for level, count in levels.items())
    assert kept <= free * GIB


def test_limit_counts_what_others_use(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, 70, 80)
    assert plan_memory(model, StateTuning(), 1_000_000, limit_gib=11) == MemoryPlan(layers=4)
    assert plan_memory(model, StateTuning(), 1_000_000, limit_gib=80) == MemoryPlan(layers=4, whole_layers=4)


def test_every_trained_value_has_its_moments(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, 8, 80)
    free, less = (plan_memory(model, StateTuning(), 1_000_000, 0, trained_bytes=trained) for trained in (0, 2 * GIB))
    assert less.light_layers + less.whole_layers <= free.light_layers + free.whole_layers
    assert less != free


@pytest.mark.parametrize("flags", [{"peft": "bone", "bone_r": "4"}, {"peft": "lora", "lora_r": "4"}])
def test_what_trains_more_keeps_fewer_layers(
    model: LanguageModel, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    for free in range(4, 16):
        fake_device(monkeypatch, free, 80)
        plans = []
        for parts in ("[]", "time,ln"):
            config = TrainConfig.from_flags({"load_model": "b", "data_file": "d", "train_parts": parts, **flags})
            plans.append(plan_memory(model, method_of(config), 1_000_000, 0))
        kept.append([plan.light_layers + 2 * plan.whole_layers for plan in plans])
    assert all(with_parts <= without for without, with_parts in kept)
    assert any(with_parts < without for without, with_parts in kept)


def test_apply_gives_the_last_layers_most(model: LanguageModel) -> None:
    MemoryPlan(layers=4, light_layers=2, whole_layers=1).apply(model)
    assert [block.recompute for block in model.blocks] == [
        Recompute.ALL, Recompute.INPUTS, Recompute.INPUTS, Recompute.NOTHING,
    ]  # fmt: skip


def test_the_plan_says_what_is_recomputed() -> None:
    assert str(MemoryPlan(layers=4, light_layers=3, keep_dequantized=True)) == (
        "of 4 layers the backward pass recomputes: 1 everything, 3 only norms and mixing; one dequantisation for "
        "recomputation and backward"
    )
    assert str(MemoryPlan(layers=4, whole_layers=4)).endswith("recomputes: 4 nothing")


def test_kept_bytes_of_the_7b_shape() -> None:
    shape = RWKV6Shape.from_sizes(n_layer=32, n_embd=4096, vocab_size=65536, double_extra_dim=True)
    inputs_again = 2 * (10 * 4096 + 64 * 16 + 14336 + 128)
    assert shape.kept_bytes(Recompute.ALL, fused=True) == 2 * 4096
    assert shape.kept_bytes(Recompute.INPUTS, fused=True) == inputs_again
    assert shape.kept_bytes(Recompute.NOTHING, fused=True) == inputs_again + 2 * (4096 + 320) + 16


QUICK = {
    ("bat", "x070", Recompute.ALL), ("lora time ln", "x060", Recompute.NOTHING),
    ("bone time ln", "x070", Recompute.NOTHING), ("full", "x070", Recompute.INPUTS),
    ("full bf16", "x060", Recompute.INPUTS),
}  # fmt: skip


@pytest.mark.parametrize(
    ("run", "architecture", "recompute"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(RUNS, ARCHITECTURES, Recompute)
    ],
)
def test_kept_bytes_cover_what_torch_keeps(architecture: str, recompute: Recompute, run: str) -> None:
    """In fp16, where nothing is fused; the estimate allows for shorter sequences, whose starts are kept."""
    kept, estimate = kept_and_estimated("cpu", torch.float16, recompute, run, architecture)
    assert 0.95 * estimate < kept <= estimate


def work_of(row_tokens: int, memories: int = 0, all_tokens: int = 0) -> Any:
    """What a run works on, as far as memory is concerned."""
    return SimpleNamespace(row_tokens=row_tokens, memories=memories, all_tokens=all_tokens or row_tokens)


class TestSizesThatNoMachineHas:
    CPU = torch.device("cpu")

    def test_a_fresh_model(self) -> None:
        sizes = {"train_type": "none", "data_file": "d", "n_layer": "1000", "n_embd": "131072", "vocab_size": "257"}
        shape = RWKV6Shape.from_sizes(n_layer=1000, n_embd=131072, vocab_size=257)
        message = r"--n_layer 1000 --n_embd 131072 --vocab_size 257 needs .* GiB at least and the machine has"
        with pytest.raises(ConfigError, match=message):
            require_memory_of_run(TrainConfig.from_flags(sizes), self.CPU, shape, work_of(1))

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (
                {"data_file": "d", "ctx_len": "100000000", "micro_bsz": "1000"},
                "--ctx_len 100000000 with --micro_bsz 1000",
            ),
            ({"orpo": "1", "rlhf_max_corpus_len": "100000000"}, "--rlhf_max_corpus_len 100000000 with --micro_bsz 1"),
        ],
    )
    def test_a_micro_batch(self, flags: dict[str, str], named: str) -> None:
        config = TrainConfig.from_flags({"load_model": "b", **flags})
        require_memory_of_run(config, self.CPU, tiny_shape(), work_of(1_000_000))
        with pytest.raises(ConfigError, match=f"{named}, 100,000,000,000 positions at a time, needs .*: lower them"):
            require_memory_of_run(config, self.CPU, tiny_shape(), work_of(10**11))

    def test_memories_of_a_row_in_chunks(self) -> None:
        config = TrainConfig.from_flags({"load_model": "b", "data_file": "d", "chunk_ctx": "1", "ctx_len": "9000000"})
        shape = tiny_shape(n_layer=4, n_embd=2048, head_size=64)
        require_memory_of_run(config, self.CPU, shape, work_of(1, memories=100))
        message = (
            "--chunk_ctx 1, which cuts --ctx_len 9000000 into chunks that leave 9,000,000 memories, needs .*: raise it$"
        )
        with pytest.raises(ConfigError, match=message):
            require_memory_of_run(config, self.CPU, shape, work_of(1, memories=9_000_000))

    def test_inputs_of_layers(self) -> None:
        flags = {"load_model": "b", "data_file": "d", "chunk_ctx": "512", "chunk_keep": "inputs"}
        with pytest.raises(ConfigError, match=r"--chunk_keep inputs, with .* positions of 2 layers, needs"):
            require_memory_of_run(TrainConfig.from_flags(flags), self.CPU, tiny_shape(), work_of(512, 1, 10**11))


class TestTheChunkThatFits:
    SHAPE = RWKV6Shape.from_sizes(n_layer=24, n_embd=2048, vocab_size=65536)

    def size(self, monkeypatch: pytest.MonkeyPatch, gib: float, **flags: str) -> int:
        monkeypatch.setattr(memory, "free_bytes", lambda device: gib * GIB)
        given = {"load_model": "b", "data_file": "d", "chunk_ctx": "auto", "ctx_len": "65536", **flags}
        config = TrainConfig.from_flags(given)
        return chunk_that_fits(config, method_of(config), self.SHAPE, torch.device("cuda"), torch.bfloat16)

    def test_more_memory_takes_longer_chunks_until_rows_are_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = [self.size(monkeypatch, gib) for gib in (3, 4, 6, 8, 12, 16)]
        assert sizes == sorted(sizes)
        assert 128 <= sizes[0] < sizes[-1] < 65536
        assert self.size(monkeypatch, 80) == 0
        assert self.size(monkeypatch, 8, ctx_len="1024") == 0

    @pytest.mark.parametrize(
        "flags",
        [{"peft": "lora"}, {"quant": "0"}, {"grad_cp": "0"}, {"grad_cp": "2"}, {"dataload": "pad", "micro_bsz": "4"}],
    )
    def test_what_takes_more_leaves_shorter_ones(self, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        assert 0 < self.size(monkeypatch, 10.5, **flags) < self.size(monkeypatch, 10.5)

    def test_memories_and_inputs_may_wait_on_the_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        flags = {"ctx_len": "200000"}
        assert self.size(monkeypatch, 4.0, **flags) < self.size(monkeypatch, 4.0, **flags, chunk_keep="host")
        flags["grad_cp"] = "0"
        host, inputs = (self.size(monkeypatch, 4.0, **flags, chunk_keep=keep) for keep in ("host", "inputs"))
        assert host < inputs
        with pytest.raises(ConfigError, match=r"finds no size that fits: .* use --chunk_keep host, or shorter rows"):
            self.size(monkeypatch, 4.0, ctx_len="4000000")

    def test_a_chunk_without_recomputation_has_to_be_worth_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small, large = ([self.size(monkeypatch, gib, grad_cp=mode) for mode in "012"] for gib in (5, 12))
        assert small[0] < 2048 < small[1] == small[2]
        assert 2048 <= large[0] == large[2] < large[1]

    @pytest.mark.parametrize(
        ("sizes", "flags", "tokens", "used_gib"),
        [
            ((24, 2048), {"peft": "lora", "quant": "0", "ctx_len": "16384"}, 2048, 9.85 + 0.66),
            ((32, 4096), {"chunk_keep": "host", "ctx_len": "16384"}, 512, 7.06 + 0.06),
            ((24, 2048), {"peft": "lora", "quant": "0", "ctx_len": "16384", "chunk_keep": "inputs"}, 4096, 4.87 + 0.66),
            ((32, 4096), {"ctx_len": "65536", "chunk_keep": "host", "grad_cp": "1"}, 4096, 7.44 + 0.06),
            ((24, 2048), {"ctx_len": "16384", "chunk_keep": "host"}, 2048, 4.59 + 0.02),
        ],
        ids=["1.6B LoRA", "7B states", "1.6B LoRA by layer", "7B states recomputed", "1.6B states"],
    )
    def test_it_is_what_a_gpu_needs(
        self,
        sizes: tuple[int, int],
        flags: dict[str, str],
        tokens: int,
        used_gib: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Used on an H100, 2026-11-26, without an optimizer, whose moments come on top."""
        shape = RWKV6Shape.from_sizes(
            n_layer=sizes[0], n_embd=sizes[1], vocab_size=65536, double_extra_dim=sizes[1] == 4096
        )
        monkeypatch.setattr(TestTheChunkThatFits, "SHAPE", shape)
        enough, too_little = (
            self.size(monkeypatch, share * used_gib / 0.95, **{"grad_cp": "0", **flags}) for share in (1.07, 0.95)
        )
        assert too_little < tokens == enough

    def test_pairs_are_one_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.size(monkeypatch, 6, orpo="1") == 0
        assert self.size(monkeypatch, 6, orpo="1", rlhf_max_corpus_len="30000") > 0

    @pytest.mark.parametrize(
        ("more", "less"),
        [
            ({}, {"optim": "adamw8bit"}),
            ({}, {"weights": "bf16"}),
            ({"weights": "bf16"}, {"weights": "bf16", "optim": "lion8bit"}),
            ({}, {"peft": "lisa"}),
            ({"peft": "lisa"}, {"peft": "lisa", "quant": "1"}),
            ({"peft": "lisa", "lisa_r": "8"}, {"peft": "lisa"}),
        ],
    )
    def test_every_way_of_saving_memory_makes_chunks_longer(
        self, more: dict[str, str], less: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of LISA the layers that are trained at a time count, not all that are trained in the end."""
        sizes = {}
        for number, flags in enumerate((more, less)):
            kind = {} if "peft" in flags else {"train_type": "none"}
            sizes[number] = [
                self.size_or_none(monkeypatch, gib, **kind, **flags) for gib in (6, 8, 10, 12, 16, 20, 24, 32, 48)
            ]
        assert all(few <= many for few, many in zip(*sizes.values(), strict=True))
        assert sizes[0] != sizes[1]

    def size_or_none(self, monkeypatch: pytest.MonkeyPatch, gib: float, **flags: str) -> int:
        """0 where nothing fits, the row's length where it fits whole."""
        try:
            return self.size(monkeypatch, gib, **flags) or 65536
        except ConfigError:
            return 0


class TestWhatIsTrained:
    SHAPE = RWKV6Shape.from_sizes(n_layer=24, n_embd=2048, vocab_size=65536)

    def of(self, **flags: str) -> float:
        """Bytes a weight of the model."""
        config = TrainConfig.from_flags({"load_model": "b", "data_file": "d", **flags})
        return bytes_of_trained(config, method_of(config), self.SHAPE) / self.SHAPE.parameter_count

    def test_every_weight(self) -> None:
        full = {"train_type": "none"}
        narrow = {**full, "weights": "bf16"}
        assert self.of(**full) == 16
        assert self.of(**full, optim="adamw8bit") == 10
        assert 12 < self.of(**narrow) < 12.1
        assert 12 < self.of(**narrow, devices="2", fused_update="1", chunk_ctx="512", ctx_len="1024") < 12.1
        assert 13 < self.of(**narrow, accelerator="cpu") < 14
        assert 6 < self.of(**narrow, optim="adamw8bit") < 6.1
        assert 4 < self.of(**narrow, optim="paged_adamw8bit") < 4.1, "moments are on the host"
        saved = self.of(**narrow) - self.of(**narrow, fused_update="1")
        assert 1.7 < saved < 2  # all gradients but those of the largest layer
        in_chunks = {"chunk_ctx": "512", "ctx_len": "1024"}
        assert self.of(**narrow, fused_update="1", **in_chunks) == self.of(**narrow, **in_chunks)

    @pytest.mark.parametrize(
        ("strategy", "expected"),
        [
            ("deepspeed_stage_1", 4 + 4 + 8),
            ("deepspeed_stage_2", 4 + 2 + 8),
            ("deepspeed_stage_2_offload", 4 + 2 + 2),
            ("deepspeed_stage_3", 2 + 2 + 6),
            ("deepspeed_stage_3_offload", 2 + 2),
        ],
    )
    def test_two_ranks_share(self, strategy: str, expected: int) -> None:
        flags = {"train_type": "none", "devices": "2", "strategy": strategy}
        assert self.of(**flags) == expected
        shared_weights, shared_gradients = "stage_3" in strategy, "stage_1" not in strategy
        saved = (1 if shared_weights else 2) + (1 if shared_gradients else 2)
        strung_together = 0 if shared_weights or "offload" in strategy else 2 / 2
        assert self.of(**flags, weights="bf16") == expected - saved + strung_together

    @pytest.mark.parametrize("peft", ["lora", "pissa"])
    def test_adapters(self, peft: str) -> None:
        """PiSSA's first factors are in the file, and not on the device."""
        plan = AdapterPlan("lora", r=16)
        values = sum(math.prod(size) for size in plan.parameter_shapes(self.SHAPE).values())
        found = self.of(peft=peft, train_parts="[]", **{f"{peft}_r": "16"}) * self.SHAPE.parameter_count
        assert found == pytest.approx(16 * values)

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"strategy": "deepspeed_stage_1"}, 4 + 4 + 8),
            ({"strategy": "deepspeed_stage_1", "optim": "adamw8bit"}, 4 + 4 + 2),
            ({"strategy": "deepspeed_stage_2", "devices": "2"}, 4 + 4 + 4),
            ({"strategy": "deepspeed_stage_2", "devices": "2", "chunk_ctx": "256"}, 4 + 4 + 4 + 4),
            ({"strategy": "deepspeed_stage_1", "accumulate_grad_batches": "2"}, 4 + 4 + 4 + 8),
            ({"strategy": "deepspeed_stage_1", "devices": "2", "optim": "paged_adamw8bit"}, 4 + 4 + 4 + 3),
            ({"strategy": "deepspeed_stage_2_offload"}, 4 + 4 + 4),
            ({"strategy": "deepspeed_stage_3", "devices": "2"}, 2 + 2 + 6),
        ],
    )
    def test_adapters_under_an_engine(self, flags: dict[str, str], expected: int) -> None:
        """Values, gradients, a share of moments; where the engine updates, of masters, and gradients of wholes."""
        values = sum(math.prod(size) for size in AdapterPlan("lora", r=16).parameter_shapes(self.SHAPE).values())
        found = self.of(peft="lora", train_parts="[]", lora_r="16", **flags) * self.SHAPE.parameter_count
        assert found == pytest.approx(expected * values)

    def test_layers_by_turns(self) -> None:
        emb_and_head = 2 * 65536 * 2048 / self.SHAPE.parameter_count
        two_layers = 2 / 24 * (1 - emb_and_head)
        assert self.of(peft="lisa") == pytest.approx(16 * (emb_and_head + two_layers), rel=0.01)
        assert self.of(peft="lisa", train_parts="[]", lisa_r="24") == pytest.approx(16 * (1 - emb_and_head), rel=0.01)
