"""Whole layers on a GPU: LISA, bf16 weights, and updates in the backward."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_checkpoint, tiny_shape
from running import OFFLOADS, go_on, metrics, stopped, train, try_train, write_documents
from torch import Tensor

from src.adapters import lisa
from src.adapters.lisa import Draw
from src.ops import adam
from src.ops.adam import Constants, Control, Moments, adam_step, adam_step_torch
from src.ops.row_gradient import RowGradient
from src.ops.stochastic import round_stochastically
from src.training.graphs import GraphedObjective

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LAYERS = 4
SIZES = {"n_layer": LAYERS, "n_embd": 128, "head_size": 64}
SHAPE = tiny_shape(**SIZES)
COMMON: dict[str, object] = {"accelerator": "gpu", "lr_init": 1e-3, "lr_final": 1e-3, "warmup_steps": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, dtype=torch.bfloat16, **SIZES)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data") / "documents", [200, 33, 64, 129, 16, 90])


def weights_in(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def apart(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far two results are apart, as a share of how far one went."""
    between = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    gone = sum(float((one[name].double() - start[name].double()).square().sum()) for name in one)
    return math.sqrt(between / gone)


@pytest.mark.parametrize("optim", ["none", "adamw8bit", "paged_adamw8bit"])
@pytest.mark.parametrize(("quant", "moments", "grad_cp"), [(0, "drop", 1), (1, "park", 1), (1, "drop", 2)])
def test_lisa_changes_what_has_its_turn(
    quant: int, moments: str, grad_cp: int, optim: str, base: Path, data: Path, tmp_path: Path
) -> None:
    flags = {"peft": "lisa", "lisa_r": 2, "lisa_k": 3, "lisa_moments": moments, "quant": quant, "grad_cp": grad_cp}
    train(tmp_path, load_model=base, data_file=data, epoch_steps=3, epoch_count=4, optim=optim, **{**COMMON, **flags})
    files = [weights_in(path) for path in (base, *(tmp_path / f"rwkv-{n}.pth" for n in range(4)))]
    places: tuple[int, ...] = ()
    for period, (before, after) in enumerate(itertools.pairwise(files)):
        places = Draw(2, 3, 42).after(places, period, LAYERS)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        allowed = {name for name in before if name.startswith(tuple(f"blocks.{layer}." for layer in places))}
        assert changed <= allowed | {"emb.weight", "head.weight"}
        assert {name for name in allowed if name in SHAPE.matrix_names()} <= changed
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("optim", ["none", "adamw8bit"])
def test_lisa_goes_on(optim: str, base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "epoch_steps": 5, "epoch_count": 2, "optim": optim, **COMMON}
    flags |= {"peft": "lisa", "lisa_r": 2, "lisa_k": 3, "lisa_moments": "park", "quant": 1}
    train(tmp_path / "whole", **flags)
    stopped(7, tmp_path / "parts", **flags)
    go_on(tmp_path / "parts")
    one, other = (weights_in(tmp_path / name / "rwkv-final.pth") for name in ("whole", "parts"))
    assert apart(one, other, weights_in(base)) < 0.05


def test_rounding_is_right_in_the_mean() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(2)).cuda()
    generator = torch.Generator("cuda").manual_seed(1)
    wide = values.repeat(20_000, 1)
    target = torch.empty_like(wide, dtype=torch.bfloat16)
    round_stochastically(target, wide, generator)
    error = values.abs() * 2**-7 / math.sqrt(20_000)
    assert bool(((target.double().mean(0) - values).abs() < 2.5 * error).all())
    again = torch.empty_like(target)
    round_stochastically(again, wide, generator.manual_seed(1))
    assert torch.equal(again, target)


@pytest.mark.parametrize("optim", ["none", "adamw8bit", "paged_adamw8bit"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_updates_in_the_backward_are_the_ordinary_ones(
    weights: str, optim: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("module", "fitting"):
        monkeypatch.setattr(f"src.training.{module}.GRADIENT_CLIP", 1e9)
    flags = {"load_model": base, "data_file": data, "epoch_steps": 6, "epoch_count": 1, "train_type": "none", **COMMON}
    for fused in (0, 1):
        train(tmp_path / str(fused), fused_update=fused, weights=weights, optim=optim, **flags)
    one, other = (weights_in(tmp_path / str(fused) / "rwkv-final.pth") for fused in (0, 1))
    assert apart(one, other, weights_in(base)) < 0.05
    losses = [[row["loss"] for row in metrics(tmp_path / str(fused))] for fused in (0, 1)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_bf16_weights_learn_what_fp32_ones_do(base: Path, data: Path, tmp_path: Path) -> None:
    flags = {"load_model": base, "data_file": data, "epoch_steps": 30, "epoch_count": 1, "train_type": "none", **COMMON}
    train(tmp_path / "fp32", **flags)
    train(tmp_path / "bf16", weights="bf16", fused_update=1, optim="adamw8bit", **flags)
    ends = {name: sum(row["loss"] for row in metrics(tmp_path / name)[-6:]) / 6 for name in ("fp32", "bf16")}
    begin = metrics(tmp_path / "fp32")[0]["loss"]
    assert begin - ends["bf16"] > 0.9 * (begin - ends["fp32"])


class TestKernel:
    """`cuda/adam.cu` against its definition, on the same device."""

    CONSTANTS = Constants(0.9, 0.99, 1e-8, clip=1.0)

    def control(self, step: int, norm: float, stopped: int = 0) -> Control:
        rows = torch.tensor([[0.0] * 4, self.CONSTANTS.settings_row(1e-2, 0.1, step + 1)])
        flags = torch.tensor([step, stopped], dtype=torch.int32)
        return Control(rows.cuda(), torch.tensor(norm).cuda(), flags.cuda())

    @pytest.mark.parametrize("on_host", [False, True])
    @pytest.mark.parametrize("count", [256, 4096, 70 * 70, 1_000_003])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_is_the_definition(self, dtype: torch.dtype, packed: bool, count: int, on_host: bool) -> None:
        generator = torch.Generator().manual_seed(count)
        start = torch.randn(count, generator=generator).cuda().to(dtype)
        scale = torch.rand(count, generator=generator).cuda() ** 3
        one, other = start.clone(), start.clone()
        moments = [Moments.zeros(start, packed=packed, on_host=host) for host in (on_host, False)]
        assert moments[0].first.is_cuda != (packed and on_host)
        for step in range(6):
            gradient = (scale * (torch.randn(count, generator=generator).cuda() + 0.2)).to(dtype)
            given = self.control(step, norm=(math.nan, 0.5, 2.0)[step % 3], stopped=int(step == 4))
            adam_step(one, gradient, moments[0], given, self.CONSTANTS, 1, 12345)
            adam_step_torch(other, gradient, moments[1], given, self.CONSTANTS, 1, 12345)
        torch.cuda.synchronize()
        # Sums in another order; where one ends on the other side of a border, in 8 bits or bf16, it is the next number.
        gap = 2**-7 if dtype == torch.bfloat16 else 1e-5
        near = (one.float() - other.float()).abs() <= gap * other.float().abs() + (0.02 if packed else 1e-6)
        assert bool(near.all())
        assert float((one != other).float().mean()) < (0.02 if dtype == torch.bfloat16 else 1)
        if packed:
            for name in ("first", "second"):
                places = [getattr(each, name).cuda().int() for each in moments]
                assert float((places[0] - places[1]).abs().float().mean()) < 0.01

    @pytest.mark.parametrize("count", [100, 5000])
    @pytest.mark.parametrize("columns", [64, 132])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_gradient_of_some_rows_is_the_dense_one(
        self, dtype: torch.dtype, packed: bool, columns: int, count: int
    ) -> None:
        generator = torch.Generator().manual_seed(columns)
        start = torch.randn(1000, columns, generator=generator).cuda().to(dtype)
        tables = [start.clone() for _ in range(2)]
        moments = [Moments.zeros(start, packed=packed) for _ in range(2)]
        for step in range(3):
            places = torch.randint(700, (count,), generator=generator).cuda()
            upper = torch.randn(count, columns, generator=generator).cuda().to(dtype)
            found = []
            for sparse in (True, False):
                table = torch.zeros_like(start, requires_grad=True)
                torch.nn.functional.embedding(places, table, sparse=sparse).backward(upper)
                assert table.grad is not None
                found.append(table.grad)
            rows = RowGradient.of(found[0])
            torch.testing.assert_close(rows.dense(), found[1], rtol=2**-7, atol=1e-5)
            for table, own, gradient in zip(tables, moments, (rows, rows.dense()), strict=True):
                adam_step(table, gradient, own, self.control(step, 0.5), self.CONSTANTS, 1, 5)
        assert torch.equal(tables[0], tables[1])
        assert torch.equal(moments[0].first, moments[1].first)
        assert torch.equal(moments[0].second, moments[1].second)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_many_tensors_at_once_are_one_after_the_other(self, dtype: torch.dtype, packed: bool) -> None:
        """Up to more pieces than a GPU has at once; rows of settings change, and a gradient comes late."""
        generator = torch.Generator("cuda").manual_seed(1)

        def drawn(count: int) -> Tensor:
            return torch.randn(count, generator=generator, device="cuda").to(dtype)

        counts = (10_000_001, 77, 4096, 70 * 70, 0, 1_000_003)
        one = list(map(drawn, counts))
        other = [tensor.clone() for tensor in one]
        moments = [[Moments.zeros(tensor, packed=packed) for tensor in one] for _ in range(2)]
        rows, seeds = [0, 1, 0, 1, 0, 1], list(range(6))
        many = adam.ManySteps(one, moments[0], rows, seeds)
        for step in range(4):
            if step == 2:
                rows = [1 - row for row in rows]
                many.use_rows(rows)
            gradients: list[Tensor | None] = list(map(drawn, counts))
            if step == 0:
                gradients[2] = None
            given = [gradient for gradient in gradients if gradient is not None]
            many.look_at(gradients)
            norm = many.gradient_norm()
            expected = torch.linalg.vector_norm(torch.cat([gradient.float() for gradient in given]))
            assert float(norm) == pytest.approx(float(expected), rel=1e-4)
            settings = torch.tensor([self.CONSTANTS.settings_row(rate, 0.1, step + 1) for rate in (1e-3, 3e-3)]).cuda()
            control = Control(settings, torch.tensor(0.5).cuda(), torch.tensor([step, 0], dtype=torch.int32).cuda())
            many.step(control, self.CONSTANTS)
            for number, gradient in enumerate(gradients):
                if gradient is not None:
                    tensors = other[number], gradient, moments[1][number]
                    adam_step_torch(*tensors, control, self.CONSTANTS, rows[number], seeds[number])
        for mine, definition in zip(one, other, strict=True):
            differ = (mine.float() - definition.float()).abs()
            neighbour = 2**-7 * definition.float().abs() if dtype == torch.bfloat16 else torch.zeros_like(differ)
            near = differ <= neighbour + 1e-4
            # Where a sum ends on the other side of a border, of bf16 or of 8 bits, later steps differ too: with moments
            # in 8 bits some of a million values go two neighbours apart, and none further than the steps are long.
            assert bool((differ <= 4 * neighbour + (0.012 if packed else 1e-4)).all())
            if mine.numel() > 4096:
                assert float((~near).float().mean()) < 1e-3
                assert dtype == torch.float32 or float((mine != definition).float().mean()) < 5e-3

    def test_it_starts_where_memory_is_not_aligned(self) -> None:
        memory = torch.randn(5001, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
        gradient = torch.randn(5000, generator=torch.Generator().manual_seed(2)).cuda().bfloat16()
        one, other = memory.clone()[1:], memory.clone()[1:]
        for run, weights in ((adam_step, one), (adam_step_torch, other)):
            run(weights, gradient, Moments.zeros(weights, packed=True), self.control(0, 0.5), self.CONSTANTS, 1, 5)
        assert float((one != other).float().mean()) < 0.01


WHOLE: dict[str, dict[str, object]] = {
    "fp32": {},
    "fp32, 8 bits": {"optim": "adamw8bit"},
    "fp32, accumulated": {"accumulate_grad_batches": 2},
    "fp32, fused": {"fused_update": 1},
    "fp32, fused, 8 bits": {"fused_update": 1, "optim": "adamw8bit"},
    "bf16": {"weights": "bf16"},
    "bf16, fused": {"weights": "bf16", "fused_update": 1},
    "bf16, fused, 8 bits, kept": {"weights": "bf16", "fused_update": 1, "optim": "adamw8bit", "grad_cp": 0},
    "bf16, fused, paged": {"weights": "bf16", "fused_update": 1, "optim": "paged_adamw8bit", "grad_cp": 2},
    "fp32, packed rows": {"dataload": "pack", "micro_bsz": 2},
}


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[GraphedObjective]:
    """Objectives of runs that recorded something."""
    found: list[GraphedObjective] = []
    recorded = GraphedObjective._recorded

    def look_up(self: GraphedObjective, *arguments: Any) -> Any:
        recording = recorded(self, *arguments)
        if recording is not None and self not in found:
            found.append(self)
        return recording

    monkeypatch.setattr(GraphedObjective, "_recorded", look_up)
    return found


@pytest.mark.parametrize("kind", WHOLE)
def test_recorded_steps_are_the_issued_ones(
    kind: str, base: Path, data: Path, tmp_path: Path, recordings: list[GraphedObjective]
) -> None:
    flags = {"load_model": base, "data_file": data, "epoch_steps": 16, "epoch_count": 1, "train_type": "none", **COMMON}
    for recorded in (0, 1):
        train(tmp_path / str(recorded), cuda_graph=recorded, **flags, **WHOLE[kind])
    assert len(recordings) == 1
    assert recordings[0]._works
    one, other = (weights_in(tmp_path / name / "rwkv-final.pth") for name in ("0", "1"))
    assert apart(one, other, weights_in(base)) < 0.08
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("0", "1")]
    assert losses[1] == pytest.approx(losses[0], rel=3e-3)


@pytest.mark.parametrize(("quant", "optim"), [(0, "none"), (1, "none"), (1, "adamw8bit")])
def test_lisas_steps_are_recorded_anew_after_a_draw(
    quant: int,
    optim: str,
    base: Path,
    data: Path,
    tmp_path: Path,
    recordings: list[GraphedObjective],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lisa, "FEWEST_RECORDED_STEPS", 2)
    flags = {"peft": "lisa", "lisa_r": 2, "lisa_k": 12, "quant": quant, "epoch_steps": 36, "epoch_count": 1}
    flags |= {"optim": optim}
    for recorded in (0, 1):
        train(tmp_path / str(recorded), load_model=base, data_file=data, cuda_graph=recorded, **COMMON, **flags)
    assert len(recordings) == 1
    assert recordings[0]._works
    one, other = (weights_in(tmp_path / name / "rwkv-final.pth") for name in ("0", "1"))
    assert apart(one, other, weights_in(base)) < 0.08


def test_a_recorded_step_that_is_not_finite_stops_before_its_layer(base: Path, data: Path, tmp_path: Path) -> None:
    """A weight that is not finite by accident: every later gradient is, and the last layers' come first."""
    weights = weights_in(base)
    weights["blocks.1.ffn.value.weight"][0, 0] = 3e38
    torch.save(weights, tmp_path / "spoilt.pth")
    flags = {"load_model": tmp_path / "spoilt.pth", "data_file": data, "epoch_steps": 8, "epoch_count": 1, **COMMON}
    ended = try_train(tmp_path / "run", train_type="none", weights="bf16", fused_update=1, **flags)
    assert ended.code == 2
    assert "not finite at step 1" in ended.err
    assert "nothing had been updated" in ended.err


RUNS: dict[str, dict[str, object]] = {
    "states": {"lr_init": 0.1, "lr_final": 0.1},
    "LoRA": {"peft": "lora"},
    "LISA": {"peft": "lisa", "lisa_r": 2, "lisa_k": 3, "lisa_moments": "park"},
    "full": {"train_type": "none", "weight_decay": 0.1},
}


@pytest.mark.parametrize("kind", RUNS)
def test_our_updates_are_torchs(
    kind: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that torch's optimizer began goes on with ours."""
    flags = {"load_model": base, "data_file": data, "epoch_steps": 6, "epoch_count": 2, "cuda_graph": 0}
    flags |= {**COMMON, **RUNS[kind]}
    train(tmp_path / "ours", **flags)
    with monkeypatch.context() as patch:
        patch.setattr(adam, "kernels_are_available", lambda kernels, device: False)
        train(tmp_path / "theirs", **flags)
        stopped(5, tmp_path / "both", **flags)
    go_on(tmp_path / "both")
    expected, *others = (metrics(tmp_path / name) for name in ("theirs", "ours", "both"))
    for rows in others:
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=5e-3)


@pytest.mark.parametrize("stages", [("1", "2", "3"), pytest.param(("2_offload", "3_offload"), marks=OFFLOADS)], ids=str)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "lora"])
def test_every_stage_takes_a_single_gpus_steps(
    kind: str, stages: tuple[str, ...], base: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    kinds: dict[str, dict[str, object]] = {"fp32": {}, "bf16": {"weights": "bf16"}, "lora": {"peft": "lora"}}
    flags = {"load_model": base, "data_file": data, "val_file": data, "epoch_steps": 6, "epoch_count": 2, **COMMON}
    flags |= {"train_type": "none", "lr_init": 1e-4, "lr_final": 1e-4, **kinds[kind]}
    train(tmp_path / "single", **flags)
    one = weights_in(tmp_path / "single" / "rwkv-final.pth")
    for stage in stages:
        ended = train(tmp_path / stage, strategy=f"deepspeed_stage_{stage}", val_steps=4, **flags)
        assert "held out   tuned: loss" in ended.out
        losses, expected = (
            [row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in (stage, "single")
        )
        assert losses == pytest.approx(expected, rel=1e-2), stage
        for file in ("rwkv-final.pth", "rwkv-best.pth"):
            other = weights_in(tmp_path / stage / file)
            assert {n: (t.shape, t.dtype) for n, t in other.items()} == {n: (t.shape, t.dtype) for n, t in one.items()}
            assert all(bool(tensor.isfinite().all()) for tensor in other.values())


def test_the_kernel_is_there() -> None:
    kernels = adam.kernels_for((torch.float32, torch.bfloat16), packed=True, singly=True)
    assert adam.kernels_are_available(kernels, torch.device("cuda"))
