"""The memory plan: how many layers keep more, from the bytes at hand."""

from __future__ import annotations

import pytest
import torch
from factories import tiny_parameters, tiny_shape

from src.adapters.plan import AdapterPlan
from src.config import TrainConfig
from src.errors import ConfigError
from src.loading import LoadOptions, build_model
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.model.rwkv6 import RWKV6Shape
from src.training.memory import MemoryPlan, plan_memory, require_memory_of_run

GIB = 2**30
TOKENS = 512


@pytest.fixture
def model() -> LanguageModel:
    shape = tiny_shape(n_layer=4)
    return build_model(tiny_parameters(shape), shape, LoadOptions(torch.device("cpu"), torch.float32))


def fake_device(monkeypatch: pytest.MonkeyPatch, free_gib: float, total_gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * GIB), int(total_gib * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)


def test_more_free_memory_keeps_more_of_more_layers(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    for free in (0.5, 2, 4, 5, 6, 6.5, 7, 7.25, 7.5, 7.75, 8, 24, 80):
        fake_device(monkeypatch, free, 80)
        plans.append(plan_memory(model, 1_000_000, 0))
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
    plan = plan_memory(model, 1_000_000, 0)
    levels = {Recompute.NOTHING: plan.whole_layers, Recompute.INPUTS: plan.light_layers}
    kept = sum(1_000_000 * model.kept_bytes(level) * count for level, count in levels.items())
    assert kept <= free * GIB


def test_limit_counts_what_others_use(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, 70, 80)
    assert plan_memory(model, 1_000_000, limit_gib=11) == MemoryPlan(layers=4)
    assert plan_memory(model, 1_000_000, limit_gib=80) == MemoryPlan(layers=4, whole_layers=4)


def test_every_trained_value_has_its_moments(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_device(monkeypatch, 8, 80)
    free = plan_memory(model, 1_000_000, 0)
    model.register_parameter("large", torch.nn.Parameter(torch.empty(1, device="meta").expand(2 * GIB // 24)))
    less = plan_memory(model, 1_000_000, 0)
    assert less.light_layers + less.whole_layers <= free.light_layers + free.whole_layers
    assert less != free


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
    assert shape.kept_bytes(Recompute.ALL, fused=True) == 2 * 4096
    assert shape.kept_bytes(Recompute.INPUTS, fused=True) == 2 * (10 * 4096 + 14336 + 128)
    assert shape.kept_bytes(Recompute.NOTHING, fused=True) == 2 * (11 * 4096 + 14336 + 128 + 320)


@pytest.mark.parametrize("kind", ["", "lora", "bone", "bat"])
@pytest.mark.parametrize("recompute", [Recompute.INPUTS, Recompute.NOTHING])
def test_kept_bytes_cover_what_torch_keeps(recompute: Recompute, kind: str) -> None:
    """In fp16, where nothing is fused: what one more layer keeps, by storage."""
    kept = []
    for layers in (1, 2):
        shape = tiny_shape(n_layer=layers, n_embd=256, head_size=64)
        adapters = AdapterPlan(kind, r=32) if kind else None
        options = LoadOptions(torch.device("cpu"), torch.float16, quant_type="nf4", adapters=adapters)
        model = build_model(tiny_parameters(shape), shape, options)
        model.set_recomputation([recompute] * layers)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        seen: dict[int, torch.UntypedStorage] = {}

        def note(
            tensor: torch.Tensor, own: set[int] = own, seen: dict[int, torch.UntypedStorage] = seen
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage  # held, so that no other takes its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden, _ = model(torch.arange(TOKENS)[None] % shape.vocab_size)
        kept.append(sum(storage.nbytes() for storage in seen.values()))
        del hidden
    estimate = model.kept_bytes(recompute)
    assert 0.9 * estimate < (kept[1] - kept[0]) / TOKENS <= estimate


class TestSizesThatNoMachineHas:
    CPU = torch.device("cpu")

    def test_a_fresh_model(self) -> None:
        sizes = {"train_type": "none", "data_file": "d", "n_layer": "1000", "n_embd": "131072", "vocab_size": "257"}
        shape = RWKV6Shape.from_sizes(n_layer=1000, n_embd=131072, vocab_size=257)
        message = r"--n_layer 1000 --n_embd 131072 --vocab_size 257 needs .* GiB at least and the machine has"
        with pytest.raises(ConfigError, match=message):
            require_memory_of_run(TrainConfig.from_flags(sizes), self.CPU, shape, 1)

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
        require_memory_of_run(config, self.CPU, tiny_shape(), 1_000_000)
        with pytest.raises(ConfigError, match=f"{named}, 100,000,000,000 positions at a time, needs .*: lower them"):
            require_memory_of_run(config, self.CPU, tiny_shape(), 10**11)
