"""Merging a state or adapter into its base model: what is copied, computed and refused."""

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from assertions import assert_same_tensors, refusal
from factories import tiny_adapter, tiny_checkpoint, tiny_parameters, tiny_shape, tiny_state_file, tiny_states
from torch import Tensor

from src.adapters.trained import Told
from src.checkpoint import open_checkpoint, save_model
from src.errors import ConfigError
from src.identity import FileIdentity
from src.merge import merge
from src.quant import DequantizationWorkspace, FrozenLinear

SHAPE = tiny_shape()
KINDS = ("lora", "pissa", "bone", "bat")
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float16, torch.float32)}
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["states", "lora", "pissa", "bone", "bat"])
def test_host_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    """All weights are read, then merged; a thread watches the memory that belongs to no file."""
    shape = tiny_checkpoint(tmp_path / "base.pth", 8, n_embd=512, vocab_size=8192, dtype=torch.bfloat16)
    if kind == "states":
        tiny_state_file(tmp_path / "trained.pth", shape)
    else:
        tiny_adapter(tmp_path / "trained.pth", shape, kind)
    merged_bytes = sum(2 * math.prod(shape.parameter_shapes()[key]) for key in shape.matrix_names())
    assert merged_bytes > 40 << 20
    watch = textwrap.dedent("""
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        import torch
        from src.adapters.trained import Told
        from src.checkpoint import open_checkpoint
        from src.merge import merge

        def private_bytes():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

        torch.addmm(torch.zeros(8, 8), torch.ones(8, 8), torch.ones(8, 8))
        open_checkpoint("base.pth")["ln_out.weight"].view(-1).sum()
        before, peak, done = private_bytes(), 0, threading.Event()

        def watch():
            global peak
            while not done.wait(0.001):
                peak = max(peak, private_bytes())

        thread = threading.Thread(target=watch)
        thread.start()
        checkpoint = open_checkpoint("base.pth")
        assert all(tensor.view(-1)[::512].sum().isfinite() for tensor in checkpoint.values())
        kind = "" if sys.argv[2] == "states" else sys.argv[2]
        merge("base.pth", "trained.pth", "merged.pth", Told(kind, alpha=8.0 * (kind == "lora")))
        done.set()
        thread.join()
        print(peak - before)
    """)
    run = subprocess.run(
        [sys.executable, "-c", watch, str(ROOT), kind], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    # Measured: 1.2 MiB for states and 10 to 23 MiB for adapters, where a matrix in fp32 has 3.5 MiB and the merged ones
    # together have 42; one of the two large tensors read into memory would add 32 MiB.
    assert int(run.stdout) < 30 << 20


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_merge_copies_everything_and_sets_the_states(
    tmp_path: Path, base_dtype: torch.dtype, with_state: bool
) -> None:
    tiny_checkpoint(tmp_path / "base.pth", dtype=base_dtype, with_state=with_state)
    base_bytes = (tmp_path / "base.pth").read_bytes()
    states = tiny_state_file(tmp_path / "state.pth", SHAPE, seed=5)
    report = merge(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
    weights = {key: tensor.to(base_dtype) for key, tensor in tiny_parameters(SHAPE).items()}
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)
    assert type(merged) is dict
    assert_same_tensors(merged, {**weights, **states})
    assert open_checkpoint(tmp_path / "merged.pth").info.has_state
    assert (tmp_path / "base.pth").read_bytes() == base_bytes
    assert sorted(os.listdir(tmp_path)) == ["base.pth", "merged.pth", "state.pth"]
    assert report.shape == SHAPE
    assert report.base_dtype == str(base_dtype).removeprefix("torch.")
    assert report.state_dtype == "bfloat16"
    assert report.replaced_state == with_state
    assert report.size_bytes == (tmp_path / "merged.pth").stat().st_size


def test_bits_that_are_no_numbers_are_copied_too(tmp_path: Path) -> None:
    weights = tiny_parameters(SHAPE, dtype=torch.bfloat16)
    pattern = torch.arange(-16, 16, dtype=torch.int16) | 0x7F80  # NaNs of different payloads
    weights["ln_out.bias"] = pattern.view(torch.bfloat16)
    save_model(tmp_path / "base.pth", weights)
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    merge(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
    copied = open_checkpoint(tmp_path / "merged.pth")["ln_out.bias"]
    assert torch.equal(copied.view(torch.int16), pattern)


def test_parameters_are_merged_as_tensors(tmp_path: Path) -> None:
    weights = tiny_parameters(SHAPE)
    torch.save({key: torch.nn.Parameter(tensor) for key, tensor in weights.items()}, tmp_path / "base.pth")
    states = tiny_state_file(tmp_path / "state.pth", SHAPE)
    merge(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)
    assert {type(tensor) for tensor in merged.values()} == {torch.Tensor}
    assert_same_tensors(merged, {**weights, **states})


def test_a_merged_file_has_standard_keys_in_the_order_of_the_base(tmp_path: Path) -> None:
    weights = tiny_parameters(SHAPE)
    torch.save({f"_forward_module.{key}": tensor for key, tensor in weights.items()}, tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    merge(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
    assert list(open_checkpoint(tmp_path / "merged.pth")) == [
        *SHAPE.parameter_shapes(),
        *SHAPE.state_shapes(),
    ]


def symbolic_link(source: Path, target: Path) -> None:
    target.symlink_to(source)


def hard_link(source: Path, target: Path) -> None:
    target.hardlink_to(source)


@pytest.mark.parametrize("source", ["base.pth", "state.pth"])
@pytest.mark.parametrize("link", [None, symbolic_link, hard_link])
def test_a_merge_does_not_overwrite_its_inputs(
    tmp_path: Path, source: str, link: Callable[[Path, Path], None] | None
) -> None:
    tiny_checkpoint(tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    output = tmp_path / source
    if link is not None:
        output = tmp_path / "other.pth"
        link(tmp_path / source, output)
    with pytest.raises(ConfigError) as refused:
        merge(tmp_path / "base.pth", tmp_path / "state.pth", output)
    role = "base model" if source == "base.pth" else "trained file"
    assert str(refused.value) == (
        f"{role} {tmp_path / source} would be written over, because it is the same file as output {output}: choose "
        "another for one of them"
    )
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    "output",
    ["./folder/../base.pth", "base.pth"],
)
def test_other_spellings_of_an_input_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    tiny_checkpoint(tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"base model .* would be written over"):
        merge(tmp_path / "base.pth", tmp_path / "state.pth", output)


def test_a_state_of_another_model_is_not_merged(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", tiny_shape(n_layer=3))
    message = refusal(lambda: merge(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth"))
    assert "of 3 layers, but the model has 2 layers" in message
    assert not (tmp_path / "merged.pth").exists()


def dense(kind: str, weight: Tensor, parameters: dict[str, Tensor], first: dict[str, Tensor]) -> Tensor:
    """W' in fp64, element by element where a formula could be mistaken."""
    weight = weight.double()
    if kind in ("lora", "pissa"):
        merged = (
            weight + (2.0 if kind == "lora" else 1.0) * parameters["lora_B"].double() @ parameters["lora_A"].double()
        )
        return merged - first["lora_B"].double() @ first["lora_A"].double() if kind == "pissa" else merged
    block = parameters["bone"].double()
    if kind == "bone":
        return torch.stack([weight[:, c] + block[c % len(block)] for c in range(weight.shape[1])], dim=1)
    r, merged = block.shape[1], weight.clone()
    for a in range(0, weight.shape[0], r):
        for b in range(0, weight.shape[1], r):
            tile, part = weight[a : a + r, b : b + r], block[b // r]
            merged[a : a + r, b : b + r] = tile + tile @ part + part
    return merged


def told(kind: str) -> Told:
    return Told(kind, alpha=16.0 if kind == "lora" else 0.0)


class TestAdapters:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("kind", KINDS)
    def test_matrices_are_computed_wide_and_rounded_once(self, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth", dtype=dtype)
        states = tiny_states(SHAPE, dtype=torch.bfloat16)
        parts = {"blocks.1.ln1.bias": torch.full((32,), 1 / 3), "emb.weight": torch.full((257, 32), 0.1).bfloat16()}
        content = tiny_adapter(tmp_path / "trained.pth", SHAPE, kind, further={**states, **parts})
        report = merge(tmp_path / "base.pth", tmp_path / "trained.pth", tmp_path / "merged.pth", told(kind))
        base = torch.load(tmp_path / "base.pth", weights_only=True)
        merged = torch.load(tmp_path / "merged.pth", weights_only=True)
        assert list(merged) == [*base, *states]
        first = torch.load(tmp_path / "init_pissa.pth", weights_only=True) if kind == "pissa" else {}
        for key, weight in base.items():
            module = key.removesuffix("weight")
            own = {name: content[module + name] for name in ("lora_A", "lora_B", "bone") if module + name in content}
            assert merged[key].dtype == dtype
            if key in SHAPE.matrix_names():
                of_start = {name: first[f"{module}init_{name}"] for name in ("lora_A", "lora_B")} if first else {}
                expected = dense(kind, weight, own, of_start)
                # Half a step of the type, and what sums in fp32 lose: less than 1e-7 was measured.
                assert ((merged[key].double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 3e-7).all()
                assert not torch.equal(merged[key], weight)
            else:
                assert torch.equal(merged[key], parts[key].to(dtype) if key in parts else weight)
        assert all(torch.equal(merged[key], state) for key, state in states.items())
        assert report.trained.kind == kind

    @pytest.mark.parametrize("quant", ["nf4", "fp4", "4bit", "int8"])
    def test_packed_first_when_asked(self, quant: str, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth", n_embd=64)
        shape = tiny_shape(n_embd=64)
        content = tiny_adapter(tmp_path / "trained.pth", shape, "pissa")
        first = torch.load(tmp_path / "init_pissa.pth", weights_only=True)
        merge(tmp_path / "base.pth", tmp_path / "trained.pth", tmp_path / "merged.pth", told("pissa"), quant=quant)
        base, merged = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("base", "merged"))
        for key in shape.matrix_names():
            module = key.removesuffix("weight")
            rest = base[key] - first[f"{module}init_lora_B"] @ first[f"{module}init_lora_A"]
            packed = FrozenLinear.from_weight(rest, quant, torch.float32, workspace=DequantizationWorkspace())
            expected = packed.dequantized() + content[f"{module}lora_B"].float() @ content[f"{module}lora_A"].float()
            assert torch.allclose(merged[key], expected, atol=1e-6)
            assert not torch.allclose(merged[key], base[key], atol=1e-3)

    def test_what_overflows_is_refused_and_nothing_is_written(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth", dtype=torch.float16)
        tiny_adapter(tmp_path / "trained.pth", SHAPE, "lora", scale=1e4)
        paths = tmp_path / "base.pth", tmp_path / "trained.pth", tmp_path / "merged.pth"
        assert "are not finite once" in refusal(lambda: merge(*paths, told("lora")))
        assert sorted(os.listdir(tmp_path)) == ["base.pth", "trained.pth"]


class TestBaseModels:
    """The JSON of a training says which file its base model was."""

    def describe(self, folder: Path, **said: object) -> None:
        identity = FileIdentity(folder / "base.pth").as_dict()
        content = {"method": "bone", "r": 8, "quant": "nf4", "base": identity, **said}
        (folder / "trained.json").write_text(json.dumps(content))

    def test_the_right_one(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth")
        tiny_adapter(tmp_path / "trained.pth", SHAPE, "bone")
        self.describe(tmp_path)
        report = merge(tmp_path / "base.pth", tmp_path / "trained.pth", tmp_path / "merged.pth")
        assert report.trained.quant == "nf4"

    @pytest.mark.parametrize(("other", "expected"), [({"seed": 1}, "with sha256"), ({"vocab_size": 300}, "size_bytes")])
    def test_another(self, other: dict[str, int], expected: str, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth")
        tiny_adapter(tmp_path / "trained.pth", SHAPE, "bone")
        self.describe(tmp_path)
        tiny_checkpoint(tmp_path / "other.pth", **other)  # type: ignore[arg-type]
        message = refusal(lambda: merge(tmp_path / "other.pth", tmp_path / "trained.pth", tmp_path / "merged.pth"))
        assert expected in message
        assert "give the model it was trained on" in message
        assert not (tmp_path / "merged.pth").exists()

    @pytest.mark.parametrize(("quant", "fits"), [("nf4", True), ("int8", False), ("4bit", False)])
    def test_another_quantisation(self, quant: str, fits: bool, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth", n_embd=64)
        tiny_adapter(tmp_path / "trained.pth", tiny_shape(n_embd=64), "bone")
        self.describe(tmp_path)
        paths = tmp_path / "base.pth", tmp_path / "trained.pth", tmp_path / "merged.pth"
        if fits:
            merge(*paths, quant=quant)
        else:
            with pytest.raises(ConfigError, match="was trained on nf4"):
                merge(*paths, quant=quant)
        assert (tmp_path / "merged.pth").exists() == fits

    def test_fp4_and_4bit_are_one(self, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "base.pth", n_embd=64)
        tiny_adapter(tmp_path / "trained.pth", tiny_shape(n_embd=64), "bone")
        self.describe(tmp_path, quant="4bit")
        report = merge(tmp_path / "base.pth", tmp_path / "trained.pth", tmp_path / "merged.pth", quant="fp4")
        assert report.trained.quant == "fp4"
