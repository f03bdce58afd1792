"""Model and state files: what is recognised, what is refused and in which words, what is written."""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from assertions import assert_same_tensors, refusal
from factories import tiny_checkpoint, tiny_parameters, tiny_shape, tiny_state_file, tiny_states

from src.checkpoint import load_state, open_checkpoint, read_states, save_model, save_state
from src.model.shape import ModelShape

SHAPE = tiny_shape()


def parameters(**changes: Any) -> dict[str, Any]:
    """The weights of a tiny model; a change of None removes a key, `__` in a name stands for a dot."""
    content: dict[str, Any] = tiny_parameters(SHAPE)
    for name, value in changes.items():
        key = name.replace("__", ".")
        content.pop(key, None)
        if value is not None:
            content[key] = value
    return content


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_model_is_read_back_as_it_was_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in tiny_parameters(SHAPE).items()}
    save_model(tmp_path / "model.pth", weights, dtype)
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    assert checkpoint.info == open_checkpoint(tmp_path / "model.pth").info
    assert checkpoint.info.shape == SHAPE
    assert checkpoint.info.dtype == str(dtype).removeprefix("torch.")
    assert not checkpoint.info.has_state
    assert len(checkpoint) == len(weights)
    assert_same_tensors(checkpoint, weights)


def test_a_merged_model_is_recognised(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "merged.pth", with_state=True)
    assert open_checkpoint(tmp_path / "merged.pth").info.has_state


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
    assert open_checkpoint(tmp_path / "model.pth").info.shape == shape


@pytest.mark.parametrize(
    "prefix",
    [
        *("_forward_module.", "model.", "_forward_module.model.", "model._forward_module.", "module.", "_orig_mod."),
        *("module._orig_mod.", "_orig_mod.module.", "_forward_module._orig_mod.model.module."),
    ],
)
def test_leading_prefixes_are_stripped(tmp_path: Path, prefix: str) -> None:
    weights = parameters()
    torch.save({prefix + key: tensor for key, tensor in weights.items()}, tmp_path / "model.pth")
    checkpoint = open_checkpoint(tmp_path / "model.pth")
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


def test_the_real_model_opens(real_inputs: Path) -> None:
    checkpoint = open_checkpoint(real_inputs / "tiny-rwkv6-3m-utf16.pth")
    assert checkpoint.info.dtype == "bfloat16"
    assert checkpoint.info.shape.n_layer == 12
    assert len(checkpoint) == 28 * 12 + 6


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
        (parameters(blocks__0__att__r_k=torch.zeros(4, 8)), "is no complete RWKV-7 (x070) model"),
        (renamed(("gate.weight", "gate_w1")), "experimental RWKV-6 variant (x060a or x060b)"),
        (renamed(("time_maa_w1", "time_maa_rkvw_w1")), "experimental RWKV-6 variant (x060a or x060b)"),
        (renamed(("ln0", "")) | {"_strategy": "cpu fp32"}, "converted by the pip package rwkv"),
        (renamed(("ln0", "")) | {"_version": "0.7"}, "converted by the pip package rwkv"),
        (renamed(("faaaa", "first"), ("_maa_", "_mix_")), "converted for web-rwkv"),
        (renamed((".att.", ".attention.")), "Hugging Face"),
        (
            {"blocks.0.att.key.lora_A": torch.zeros(2), "blocks.0.att.key.lora_B": torch.zeros(2)},
            "merge it into its base model first (merge_state.py BASE FILE OUTPUT)",
        ),
        (parameters(blocks__0__att__key__bone=torch.zeros(2)), "an unmerged adapter"),
        (parameters(blocks__0__att__key__disha=torch.zeros(2)), "an unmerged adapter"),
        ({"conv1.weight": torch.zeros(2)}, "is no RWKV-6 (x060) or RWKV-7 (x070) model: none of its 1 keys"),
        (tiny_states(SHAPE), "holds only the time_state of 2 layers, so it is a state file: name"),
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


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_view_does_not_drag_its_buffer_into_the_file(contiguous: bool, tmp_path: Path) -> None:
    shape = tiny_shape(n_layer=2)
    buffer = torch.randn(1_000_000)

    def view(start: int) -> torch.Tensor:
        states = buffer[start : start + 256].view(4, 8, 8)
        return states if contiguous else states.transpose(1, 2)

    states = {key: torch.nn.Parameter(view(start)) for start, key in enumerate(shape.state_shapes())}
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


def test_parameters_in_a_state_file_are_tensors(tmp_path: Path) -> None:
    states = tiny_states(SHAPE)
    torch.save({key: torch.nn.Parameter(value) for key, value in states.items()}, tmp_path / "s.pth")
    loaded = load_state(tmp_path / "s.pth", SHAPE)
    assert {type(tensor) for tensor in loaded.values()} == {torch.Tensor}
    assert_same_tensors(loaded, states)


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


def test_states_are_read_whatever_model_they_belong_to(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "merged.pth", with_state=True)
    assert_same_tensors(read_states(tmp_path / "merged.pth"), tiny_states(SHAPE))
    states = tiny_state_file(tmp_path / "state.pth", SHAPE)
    torch.save(dict(reversed(states.items())), tmp_path / "turned.pth")
    assert list(read_states(tmp_path / "turned.pth")) == list(states)
    assert_same_tensors(read_states(tmp_path / "turned.pth"), states)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {f"blocks.{i}.att.time_state": torch.zeros(4, 8, 8) for i in (0, 2)},
            "of 2 layers, but lacks blocks.1.att.time_state",
        ),
        (
            states_of(SHAPE, blocks__1__att__time_state=torch.zeros(4, 8, 16)),
            "blocks.1.att.time_state has shape [4, 8, 16], expected [heads, head size, head size], the same in all",
        ),
        (states_of(SHAPE, blocks__1__att__time_state=torch.zeros(2, 8, 8)), "has shape [2, 8, 8], expected"),
        (states_of(SHAPE, blocks__1__att__time_state=torch.full((4, 8, 8), float("inf"))), "that are not finite"),
        (states_of(SHAPE, metadata=torch.zeros(1)), "holds metadata beside the time_state"),
        (parameters(), "holds no blocks.*.att.time_state"),
    ],
)
def test_what_are_no_states_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    torch.save(content, tmp_path / "state.pth")
    assert message in refusal(lambda: read_states(tmp_path / "state.pth"))


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


def test_a_model_is_saved_in_the_dtype_asked_for(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pth", {**tiny_parameters(SHAPE), **tiny_states(SHAPE)})
    checkpoint = open_checkpoint(tmp_path / "model.pth")
    assert checkpoint.info.dtype == "bfloat16"
    assert checkpoint.info.has_state
    assert all(tensor.dtype == torch.bfloat16 for tensor in checkpoint.values())
