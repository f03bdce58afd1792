"""Merging a state into its base model: what is copied, what is set, what is refused."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from assertions import assert_same_tensors, refusal
from factories import tiny_checkpoint, tiny_parameters, tiny_shape, tiny_state_file

from src.checkpoint import open_checkpoint, save_model
from src.errors import ConfigError
from src.merge import merge_state

SHAPE = tiny_shape()
ROOT = Path(__file__).parents[2]


def test_host_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """All weights are read, then merged; a thread watches the memory that belongs to no file."""
    tiny_checkpoint(tmp_path / "base.pth", n_embd=256, vocab_size=65536, dtype=torch.bfloat16)
    tiny_state_file(tmp_path / "state.pth", tiny_shape(n_embd=256))
    file_bytes = (tmp_path / "base.pth").stat().st_size
    assert file_bytes > 64 << 20
    watch = textwrap.dedent("""
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        from src.checkpoint import open_checkpoint
        from src.merge import merge_state

        def private_bytes():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

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
        merge_state("base.pth", "state.pth", "merged.pth")
        done.set()
        thread.join()
        print(peak - before)
    """)
    run = subprocess.run(
        [sys.executable, "-c", watch, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    # Measured: 0.1 MiB in each of five runs; one of the two large tensors read into memory would add 32 MiB.
    assert int(run.stdout) < 16 << 20


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_merge_copies_everything_and_sets_the_states(
    tmp_path: Path, base_dtype: torch.dtype, with_state: bool
) -> None:
    tiny_checkpoint(tmp_path / "base.pth", dtype=base_dtype, with_state=with_state)
    base_bytes = (tmp_path / "base.pth").read_bytes()
    states = tiny_state_file(tmp_path / "state.pth", SHAPE, seed=5)
    report = merge_state(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
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
    merge_state(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
    copied = open_checkpoint(tmp_path / "merged.pth")["ln_out.bias"]
    assert torch.equal(copied.view(torch.int16), pattern)


def test_parameters_are_merged_as_tensors(tmp_path: Path) -> None:
    weights = tiny_parameters(SHAPE)
    torch.save({key: torch.nn.Parameter(tensor) for key, tensor in weights.items()}, tmp_path / "base.pth")
    states = tiny_state_file(tmp_path / "state.pth", SHAPE)
    merge_state(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)
    assert {type(tensor) for tensor in merged.values()} == {torch.Tensor}
    assert_same_tensors(merged, {**weights, **states})


def test_a_merged_file_has_standard_keys_in_the_order_of_the_base(tmp_path: Path) -> None:
    weights = tiny_parameters(SHAPE)
    torch.save({f"_forward_module.{key}": tensor for key, tensor in weights.items()}, tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    merge_state(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
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
        merge_state(tmp_path / "base.pth", tmp_path / "state.pth", output)
    role = "base model" if source == "base.pth" else "state file"
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
        merge_state(tmp_path / "base.pth", tmp_path / "state.pth", output)


def test_a_state_of_another_model_is_not_merged(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", tiny_shape(n_layer=3))
    message = refusal(lambda: merge_state(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth"))
    assert "of 3 layers, but the model has 2 layers" in message
    assert not (tmp_path / "merged.pth").exists()
