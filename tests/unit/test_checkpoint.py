"""Model and state files: what is read, what is refused and in which words, what is written."""

import collections
import errno
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_checkpoint, tiny_parameters, tiny_shape, tiny_state_file, tiny_states
from torch import Tensor

from src.checkpoint import (
    check_sizes,
    inspect_checkpoint,
    load_state,
    merge_state,
    open_checkpoint,
    save_model,
    save_state,
)
from src.errors import CheckpointError
from src.model.parameters import ModelShape, parameter_shapes, state_shapes

SHAPE = tiny_shape()
ROOT = Path(__file__).parents[2]


def parameters(**changes: Any) -> dict[str, Any]:
    """The weights of a tiny model; a change of None removes a key, `__` in a name stands for a dot."""
    content: dict[str, Any] = tiny_parameters(SHAPE)
    for name, value in changes.items():
        key = name.replace("__", ".")
        content.pop(key, None)
        if value is not None:
            content[key] = value
    return content


def refusal(action: Callable[[], object]) -> str:
    """The one sentence that `action` is refused with."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same_tensors(actual: Any, expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


# Opening a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_model_is_read_back_as_it_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in tiny_parameters(SHAPE).items()}
    save_model(tmp_path / "model.pth", weights, dtype)
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    assert checkpoint.info == inspect_checkpoint(tmp_path / "model.pth")
    assert checkpoint.info.shape == SHAPE
    assert checkpoint.info.dtype == str(dtype).removeprefix("torch.")
    assert checkpoint.info.prefix == ""
    assert not checkpoint.info.has_state
    assert len(checkpoint) == len(weights)
    assert_same_tensors(checkpoint, weights)


def test_a_merged_model_is_recognised(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "merged.pth", with_state=True)
    assert inspect_checkpoint(tmp_path / "merged.pth").has_state


def test_other_sizes_are_read_from_the_tensors(tmp_path: Path) -> None:
    shape = tiny_checkpoint(
        tmp_path / "model.pth",
        n_layer=1,
        n_embd=64,
        head_size=16,
        vocab_size=300,
        dim_ffn=96,
        mix_lora_width=64,
        decay_lora_width=128,
    )
    assert inspect_checkpoint(tmp_path / "model.pth").shape == shape


@pytest.mark.parametrize("prefix", ["_forward_module.", "model.", "_forward_module.model.", "model._forward_module."])
def test_leading_prefixes_are_stripped(tmp_path: Path, prefix: str) -> None:
    weights = parameters()
    torch.save({prefix + key: tensor for key, tensor in weights.items()}, tmp_path / "model.pth")
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    assert checkpoint.info.prefix == prefix
    assert_same_tensors(checkpoint, weights)


def test_a_prefix_inside_a_key_stays(tmp_path: Path) -> None:
    torch.save(parameters(blocks__0__model__ln1=torch.zeros(2)), tmp_path / "model.pth")
    assert "superfluous blocks.0.model.ln1" in refusal(lambda: open_checkpoint(tmp_path / "model.pth"))


def test_a_key_with_and_without_prefix_is_refused(tmp_path: Path) -> None:
    torch.save({**parameters(), "model.emb.weight": torch.zeros(257, 32)}, tmp_path / "model.pth")
    assert "emb.weight twice" in refusal(lambda: open_checkpoint(tmp_path / "model.pth"))


def test_a_state_dict_wrapper_is_taken_off(tmp_path: Path) -> None:
    weights = parameters()
    wrapped = {"epoch": 3, "state_dict": collections.OrderedDict(weights)}
    torch.save(wrapped, tmp_path / "model.pth")
    assert_same_tensors(open_checkpoint(tmp_path / "model.pth"), weights)


def test_writing_into_a_mapped_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model.pth")
    before = (tmp_path / "model.pth").read_bytes()
    open_checkpoint(tmp_path / "model.pth")["emb.weight"].zero_()
    assert (tmp_path / "model.pth").read_bytes() == before
    assert open_checkpoint(tmp_path / "model.pth")["emb.weight"].any()


def test_the_real_model_opens(real_inputs: Path) -> None:
    checkpoint = open_checkpoint(real_inputs / "tiny-rwkv6-3m-utf16.pth")
    assert (checkpoint.info.dtype, checkpoint.info.prefix) == ("bfloat16", "")
    assert checkpoint.info.shape.n_layer == 12
    assert len(checkpoint) == 28 * 12 + 6


# Maps larger than memory ------------------------------------------------------------------------


@pytest.fixture
def no_reservation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses to reserve memory for a map, as it does for a file larger than memory."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 28138176512 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)


@pytest.mark.usefixtures("no_reservation")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_larger_than_memory_is_mapped_all_the_same(tmp_path: Path, wrapped: bool) -> None:
    weights = {key: tensor.bfloat16() for key, tensor in tiny_parameters(SHAPE).items()}
    # A view and a transposed tensor, as foreign writers leave them in files.
    weights["ln_out.weight"] = torch.randn(100).bfloat16()[40:72]
    weights["head.weight"] = torch.randn(32, 257).bfloat16().T
    torch.save({"state_dict": weights} if wrapped else weights, tmp_path / "model.pth")
    before = (tmp_path / "model.pth").read_bytes()
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    assert_same_tensors(checkpoint, weights)
    checkpoint["emb.weight"].zero_()
    assert (tmp_path / "model.pth").read_bytes() == before


@pytest.mark.usefixtures("no_reservation")
def test_a_record_whose_place_is_in_doubt_is_refused(tmp_path: Path) -> None:
    """A rewritten archive, its records no longer where torch computes them."""
    tiny_checkpoint(tmp_path / "model.pth")
    with (
        zipfile.ZipFile(tmp_path / "model.pth") as archive,
        zipfile.ZipFile(tmp_path / "rewritten.pth", "w") as rewritten,
    ):
        for record in archive.infolist():
            rewritten.writestr(record.filename, archive.read(record))
    message = refusal(lambda: open_checkpoint(tmp_path / "rewritten.pth"))
    assert "damaged or not a checkpoint" in message
    assert "values of torch.float32 begins at byte" in message


def test_host_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """All weights are read, then merged; a thread watches the memory that belongs to no file."""
    tiny_checkpoint(tmp_path / "base.pth", n_embd=256, vocab_size=65536, dtype=torch.bfloat16)
    tiny_state_file(tmp_path / "state.pth", tiny_shape(n_embd=256))
    file_bytes = (tmp_path / "base.pth").stat().st_size
    assert file_bytes > 64 << 20
    watch = textwrap.dedent("""
        import sys, threading
        sys.path.insert(0, sys.argv[1])
        from src.checkpoint import merge_state, open_checkpoint

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


# Files of other kinds ---------------------------------------------------------------------------


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    assert refusal(lambda: open_checkpoint(path)) == (
        f"model file {path} does not exist; there is no .pth file in {tmp_path}"
    )
    for name in "abcd":
        (tmp_path / f"{name}.pth").touch()
    assert f"{tmp_path} holds a.pth, b.pth, c.pth and more" in refusal(lambda: open_checkpoint(path))
    assert "state file" in refusal(lambda: load_state(path, SHAPE))
    nowhere = tmp_path / "nowhere" / "model.pth"
    assert f"there is no folder {nowhere.parent} either" in refusal(lambda: open_checkpoint(nowhere))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} is a directory" in refusal(lambda: open_checkpoint(tmp_path))


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refusal(lambda: open_checkpoint(tmp_path / "file" / "model.pth"))
    assert "cannot be read: Not a directory" in message


def safetensors() -> bytes:
    header = json.dumps({"emb.weight": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0\0"


@pytest.mark.parametrize(
    ("content", "description"),
    [
        (b"", "an empty file"),
        (b"hello\n" * 100, "a text file"),
        (b"<!DOCTYPE html><html>not found</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (safetensors(), "a safetensors file"),
        (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
        (b"fmgg\x65\0\0\0" + bytes(64), "a ggml file (rwkv.cpp)"),
        (bytes(1000), "a file of zero bytes"),
        (b"\x80\x04}\x94.", "a Python pickle"),
        (b"\x7fELF\2\1\1\0", "a file of unknown format"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path: Path, content: bytes, description: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    message = refusal(lambda: open_checkpoint(path))
    assert message.startswith(f"{path} is {description}")
    assert "not a model file written by torch.save (.pth)" in message


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "model.pth"
    tiny_checkpoint(path)
    content = path.read_bytes()[: int(kept * path.stat().st_size)]
    path.write_bytes(content)
    message = refusal(lambda: open_checkpoint(path))
    assert f"is incomplete: its {len(content)} bytes" in message


def run_conversion(message: str, old: Path, new: Path) -> None:
    """Does what the message tells the user to do."""
    command = message.partition('python -c "')[2].rstrip('"')
    command = command.replace("OLD.pth", str(old)).replace("NEW.pth", str(new))
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)


def test_a_file_of_an_old_torch_is_refused_with_a_conversion_that_works(tmp_path: Path) -> None:
    weights = tiny_parameters(SHAPE)
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    message = refusal(lambda: open_checkpoint(tmp_path / "old.pth"))
    assert "torch before 1.6" in message
    assert "cannot be memory-mapped" in message
    run_conversion(message, tmp_path / "old.pth", tmp_path / "new.pth")
    assert_same_tensors(open_checkpoint(tmp_path / "new.pth"), weights)


def test_a_tar_file_is_refused_with_a_conversion(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    message = refusal(lambda: open_checkpoint(tmp_path / "old.pth"))
    assert "is a tar archive" in message
    assert "weights_only=False" in message
    assert "can run code" in message


def test_zip_archives_of_other_programs_are_refused(tmp_path: Path) -> None:
    for name, record in (("plain.pth", "a.txt"), ("nested.pth", "a/data.pkl")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(record, b"x")
        message = refusal(lambda name=name: open_checkpoint(tmp_path / name))
        assert "damaged or not a checkpoint" in message


@pytest.mark.filterwarnings("ignore:.*TorchScript archive:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "model.pth"))
    assert "is a TorchScript program" in refusal(lambda: open_checkpoint(tmp_path / "model.pth"))


class Trap:
    """An object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save(parameters(trap=Trap(tmp_path / "sprung")), tmp_path / "model.pth")
    message = refusal(lambda: open_checkpoint(tmp_path / "model.pth"))
    assert "Python object (" in message
    assert "could run foreign code" in message
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model.pth")
    content = bytearray((tmp_path / "model.pth").read_bytes())
    content[1000:2000] = bytes(1000)
    (tmp_path / "model.pth").write_bytes(content)
    assert "damaged or not a checkpoint" in refusal(lambda: open_checkpoint(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list, not a model file's dict"),
        ({0: torch.zeros(2)}, "holds a dict, not a model file's dict"),
        ({}, "is an empty dict"),
        (torch.zeros(2), "holds a Tensor"),
    ],
)
def test_content_that_is_no_dict_of_tensors_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    assert message in refusal(lambda: open_checkpoint(tmp_path / "model.pth"))


# Models of other kinds ----------------------------------------------------------------------------


def renamed(*replacements: tuple[str, str]) -> dict[str, Any]:
    """The tiny model with parts of its key names replaced; a replacement by "" removes the key."""
    content = {}
    for key, tensor in parameters().items():
        for old, new in replacements:
            if old in key:
                key = key.replace(old, new) if new else ""
        if key:
            content[key] = tensor
    return content


RWKV5_NAMES = [("_maa_" + group, "") for group in ("x", "w1", "w2", "w")] + [
    ("_maa_", "_mix_"),
    ("decay_w", ""),
]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (renamed(*RWKV5_NAMES), "is an RWKV-5 model"),
        (renamed(*RWKV5_NAMES, ("ln_x", ""), ("gate", ""), ("faaaa", "first")), "is an RWKV-4 model"),
        (parameters(blocks__0__att__r_k=torch.zeros(4, 8)), "is an RWKV-7 model"),
        (renamed(("gate.weight", "gate_w1")), "experimental RWKV-6 variant (x060a or x060b)"),
        (renamed(("time_maa_w1", "time_maa_rkvw_w1")), "experimental RWKV-6 variant (x060a or x060b)"),
        (renamed(("ln0", "")) | {"_strategy": "cpu fp32"}, "converted by the pip package rwkv"),
        (renamed(("ln0", "")) | {"_version": "0.7"}, "converted by the pip package rwkv"),
        (renamed(("faaaa", "first"), ("_maa_", "_mix_")), "converted for web-rwkv"),
        (renamed((".att.", ".attention.")), "Hugging Face"),
        (
            {"blocks.0.att.key.lora_A": torch.zeros(2), "blocks.0.att.key.lora_B": torch.zeros(2)},
            "an unmerged adapter",
        ),
        (parameters(blocks__0__att__key__bone=torch.zeros(2)), "an unmerged adapter"),
        (parameters(blocks__0__att__key__disha=torch.zeros(2)), "an unmerged adapter"),
        ({"conv1.weight": torch.zeros(2)}, "is no RWKV-6 (x060) model: none of its 1 keys"),
        (tiny_states(SHAPE), "holds only the time_state of 2 layers; it is a state file"),
    ],
)
def test_models_of_other_kinds_are_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    found = refusal(lambda: open_checkpoint(tmp_path / "model.pth"))
    assert found.startswith(str(tmp_path / "model.pth"))
    assert message in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head__weight": None}, "missing head.weight"),
        ({"emb__weight": None}, "emb.weight is missing"),
        ({"blocks__1__att__extra": torch.zeros(1)}, "superfluous blocks.1.att.extra"),
        ({"head__weight": torch.zeros(256, 32)}, "head.weight of shape [256, 32] instead of [257, 32]"),
        ({"blocks__0__att__time_faaaa": torch.zeros(3, 8)}, "3 heads of size 8"),
        ({"blocks__3__ln1__weight": torch.zeros(32)}, "layer 2 (blocks.2) is missing"),
        ({"blocks__1__att__time_state": torch.zeros(4, 8, 8)}, "missing blocks.0.att.time_state"),
        ({"ln_out__weight": "text"}, "ln_out.weight is a str, expected a tensor"),
        ({"ln_out__weight": torch.zeros(32).byte()}, "ln_out.weight is of uint8 (packed by quantisation?)"),
        ({"ln_out__weight": torch.zeros(32).long()}, "ln_out.weight is of int64, expected"),
        ({"ln_out__weight": torch.zeros(32).to_sparse()}, "expected a dense tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_a_model_with_wrong_tensors_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    torch.save(parameters(**changes), tmp_path / "model.pth")
    found = refusal(lambda: open_checkpoint(tmp_path / "model.pth"))
    assert found.startswith(str(tmp_path / "model.pth"))
    assert message in found


# Flags that repeat sizes ---------------------------------------------------------------------------


def test_flags_that_agree_or_are_not_given_pass() -> None:
    wide = ModelShape.from_sizes(n_layer=2, n_embd=64, vocab_size=9, double_extra_dim=True)
    given = {
        "n_layer": 2,
        "n_embd": 64,
        "dim_att": 64,
        "dim_ffn": 224,
        "vocab_size": 9,
        "head_size_a": 64,
        "double_extra_dim": 1,
    }
    assert check_sizes(wide, given) == []
    assert check_sizes(wide, {"n_layer": 0, "n_embd": None, "double_extra_dim": 0}) == []


def test_every_flag_that_contradicts_the_checkpoint_is_named_with_both_numbers() -> None:
    shape = ModelShape.from_sizes(n_layer=24, n_embd=2048, vocab_size=65536)
    given = {
        "n_layer": 32,
        "n_embd": 2560,
        "dim_att": 2561,
        "dim_ffn": 8960,
        "vocab_size": 50277,
        "head_size_a": 32,
        "double_extra_dim": 1,
    }
    sentences = check_sizes(shape, given)
    assert len(sentences) == 7
    numbers = zip(given.items(), (24, 2048, 2048, 7168, 65536, 64, 32), strict=True)
    for sentence, ((flag, value), actual) in zip(sentences, numbers, strict=True):
        assert sentence.startswith(f"--{flag} {value} ")
        assert f"has {actual}" in sentence
        assert "leave the flag out" in sentence


# State files ----------------------------------------------------------------------------------------


def test_a_state_file_holds_exactly_the_states_in_layer_order(tmp_path: Path) -> None:
    shape = tiny_shape(n_layer=12)
    states = tiny_states(shape)
    save_state(tmp_path / "state.pth", dict(reversed(states.items())))
    content = torch.load(tmp_path / "state.pth", weights_only=True)
    assert type(content) is dict
    assert list(content) == [f"blocks.{layer}.att.time_state" for layer in range(12)]
    for key, tensor in content.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
        assert torch.equal(tensor, states[key].bfloat16())
    loaded = load_state(tmp_path / "state.pth", shape)
    assert list(loaded) == list(content)
    assert_same_tensors(loaded, content)


def test_a_view_does_not_drag_its_buffer_into_the_file(tmp_path: Path) -> None:
    shape = tiny_shape(n_layer=2)
    buffer = torch.randn(1_000_000)
    states = {
        key: torch.nn.Parameter(buffer[start : start + 256].view(4, 8, 8).transpose(1, 2))
        for start, key in enumerate(state_shapes(shape))
    }
    save_state(tmp_path / "state.pth", states, torch.float32)
    assert (tmp_path / "state.pth").stat().st_size < 10_000
    assert_same_tensors(
        load_state(tmp_path / "state.pth", shape), {key: value.detach() for key, value in states.items()}
    )


def test_a_loaded_state_outlives_its_file(tmp_path: Path) -> None:
    states = tiny_state_file(tmp_path / "state.pth", SHAPE)
    loaded = load_state(tmp_path / "state.pth", SHAPE)
    with open(tmp_path / "state.pth", "r+b") as file:
        file.write(bytes((tmp_path / "state.pth").stat().st_size))
    assert_same_tensors(loaded, states)


def test_the_states_of_a_merged_model_are_loaded(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "merged.pth", with_state=True)
    assert_same_tensors(load_state(tmp_path / "merged.pth", SHAPE), tiny_states(SHAPE))


def test_a_state_file_with_prefixes_is_loaded(tmp_path: Path) -> None:
    states = tiny_states(SHAPE)
    torch.save({f"_forward_module.model.{key}": value for key, value in states.items()}, tmp_path / "s.pth")
    assert_same_tensors(load_state(tmp_path / "s.pth", SHAPE), states)


def states_of(shape: ModelShape, **changes: Any) -> dict[str, Any]:
    return {
        **tiny_states(shape),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (states_of(tiny_shape(n_layer=3)), "of 3 layers, but the model has 2 layers: it also has blocks.2."),
        (states_of(tiny_shape(n_layer=1)), "of 1 layers, but the model has 2 layers: it lacks blocks.1."),
        (
            {f"blocks.{i}.att.time_state": torch.zeros(4, 8, 8) for i in (0, 2)},
            "it lacks blocks.1.att.time_state and also has blocks.2.att.time_state",
        ),
        (
            states_of(tiny_shape(n_embd=64)),
            "blocks.0.att.time_state has shape [8, 8, 8], but the model needs [4, 8, 8]",
        ),
        (
            states_of(SHAPE, blocks__1__att__time_state=torch.full((4, 8, 8), float("nan"))),
            "blocks.1.att.time_state holds 256 values that are not finite",
        ),
        (
            states_of(SHAPE, blocks__1__att__time_state=torch.zeros(4, 8, 8).long()),
            "blocks.1.att.time_state is of int64",
        ),
        (
            states_of(SHAPE, metadata=torch.zeros(1), more=1),
            "holds metadata and 1 more beside the time_state",
        ),
        (parameters(), "holds no blocks.*.att.time_state"),
    ],
)
def test_states_that_do_not_fit_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    torch.save(content, tmp_path / "state.pth")
    found = refusal(lambda: load_state(tmp_path / "state.pth", SHAPE))
    assert found.startswith(str(tmp_path / "state.pth"))
    assert message in found


def test_a_state_beyond_the_range_of_its_dtype_is_not_saved(tmp_path: Path) -> None:
    states = tiny_states(SHAPE, scale=1e6)
    message = refusal(lambda: save_state(tmp_path / "state.pth", states, torch.float16))
    assert "not finite in float16" in message
    assert list(tmp_path.iterdir()) == []


def test_incomplete_states_are_a_mistake_of_the_program(tmp_path: Path) -> None:
    states = tiny_states(SHAPE)
    del states["blocks.0.att.time_state"]
    with pytest.raises(AssertionError):
        save_state(tmp_path / "state.pth", states)
    with pytest.raises(AssertionError):
        save_state(tmp_path / "state.pth", {})
    with pytest.raises(AssertionError):
        save_model(tmp_path / "model.pth", {**tiny_parameters(SHAPE), "dummy": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


# Writing --------------------------------------------------------------------------------------------


def test_a_model_is_saved_in_the_dtype_asked_for(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pth", {**tiny_parameters(SHAPE), **tiny_states(SHAPE)})
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    assert checkpoint.info.dtype == "bfloat16"
    assert checkpoint.info.has_state
    assert all(tensor.dtype == torch.bfloat16 for tensor in checkpoint.values())


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "first.pth")
    tiny_checkpoint(tmp_path / "second.pth")
    assert (tmp_path / "first.pth").read_bytes() == (tmp_path / "second.pth").read_bytes()


def test_a_save_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    tiny_state_file(tmp_path / "state.pth", SHAPE, seed=0)
    second = tiny_state_file(tmp_path / "state.pth", SHAPE, seed=1)
    assert_same_tensors(load_state(tmp_path / "state.pth", SHAPE), second)
    assert os.listdir(tmp_path) == ["state.pth"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "state.pth").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_save_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "state.pth").symlink_to(tmp_path / "disk" / "real.pth")
    states = tiny_state_file(tmp_path / "state.pth", SHAPE)
    assert (tmp_path / "state.pth").is_symlink()
    assert_same_tensors(load_state(tmp_path / "disk" / "real.pth", SHAPE), states)


def test_a_reader_keeps_the_old_file_while_it_is_replaced(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model.pth", seed=0)
    reader = open_checkpoint(tmp_path / "model.pth")
    tiny_checkpoint(tmp_path / "model.pth", seed=1)
    assert_same_tensors(reader, tiny_parameters(SHAPE, seed=0))
    assert_same_tensors(open_checkpoint(tmp_path / "model.pth"), tiny_parameters(SHAPE, seed=1))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_changes_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, existing: bool
) -> None:
    path = tmp_path / "state.pth"
    if existing:
        path.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    message = refusal(lambda: save_state(path, tiny_states(SHAPE)))
    assert message.startswith(f"{path} cannot be written: {os.strerror(code)}; 0.00 MiB are needed")
    assert (os.listdir(tmp_path), existing and path.read_bytes()) == (
        (["state.pth"], b"old") if existing else ([], False)
    )


class FullDisk(io.BytesIO):
    """A file that takes so many bytes and no more."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_recognised_behind_the_error_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda tensors, _: save(tensors, FullDisk()))
    message = refusal(lambda: save_model(tmp_path / "model.pth", tiny_parameters(SHAPE)))
    assert "No space left on device" in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    class Interrupted(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 20_000:
                raise interrupt
            return io.BytesIO.write(self, data)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda tensors, _: save(tensors, Interrupted()))
    with pytest.raises(interrupt):
        save_model(tmp_path / "model.pth", tiny_parameters(SHAPE))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    states = tiny_state_file(tmp_path / "state.pth", SHAPE)
    assert_same_tensors(load_state(tmp_path / "state.pth", SHAPE), states)


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    states = tiny_states(SHAPE)
    assert "is a directory" in refusal(lambda: save_state(tmp_path, states))
    assert "is a device or pipe" in refusal(lambda: save_state("/dev/null", states))
    missing = tmp_path / "missing" / "state.pth"
    assert f"there is no folder {missing.parent}" in refusal(lambda: save_state(missing, states))
    (tmp_path / "file").touch()
    assert "there is no folder" in refusal(lambda: save_state(tmp_path / "file" / "state.pth", states))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    message = refusal(lambda: save_state(tmp_path / "state.pth", tiny_states(SHAPE)))
    tmp_path.chmod(0o700)
    assert "cannot be written: Permission denied" in message


# Merging --------------------------------------------------------------------------------------------


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


def test_a_merged_file_has_standard_keys_in_the_order_of_the_base(tmp_path: Path) -> None:
    weights = tiny_parameters(SHAPE)
    torch.save({f"_forward_module.{key}": tensor for key, tensor in weights.items()}, tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", SHAPE)
    merge_state(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
    assert list(open_checkpoint(tmp_path / "merged.pth")) == [
        *parameter_shapes(SHAPE),
        *state_shapes(SHAPE),
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
    message = refusal(lambda: merge_state(tmp_path / "base.pth", tmp_path / "state.pth", output))
    role = "base model" if source == "base.pth" else "state file"
    assert message == f"the output {output} is the {role} itself and would overwrite it; give another name"
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
    assert "base model itself" in refusal(lambda: merge_state(tmp_path / "base.pth", tmp_path / "state.pth", output))


def test_a_state_of_another_model_is_not_merged(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", tiny_shape(n_layer=3))
    message = refusal(lambda: merge_state(tmp_path / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth"))
    assert "of 3 layers, but the model has 2 layers" in message
    assert not (tmp_path / "merged.pth").exists()


def test_the_real_model_is_merged(tmp_path: Path, real_inputs: Path) -> None:
    base = open_checkpoint(real_inputs / "tiny-rwkv6-3m-utf16.pth")
    states = tiny_state_file(tmp_path / "state.pth", base.info.shape)
    merge_state(real_inputs / "tiny-rwkv6-3m-utf16.pth", tmp_path / "state.pth", tmp_path / "merged.pth")
    assert_same_tensors(open_checkpoint(tmp_path / "merged.pth"), {**base, **states})
