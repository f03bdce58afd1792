"""From a checkpoint's tensors to a model."""

import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from factories import tiny_parameters, tiny_shape, tiny_states
from torch import Tensor

from src.errors import CheckpointError
from src.loading import LoadOptions, _read_ahead, build_model
from src.model.shape import state_key
from src.quant import FrozenHead, FrozenLinear

SHAPE = tiny_shape(n_embd=64)
CPU = torch.device("cpu")
WEIGHTS = set(SHAPE.parameter_shapes())


class OneAtATime(Mapping[str, Tensor]):
    """Tensors by name; remembers the order in which they were taken."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.taken: list[str] = []

    def __getitem__(self, key: str) -> Tensor:
        self.taken.append(key)
        return self.tensors[key].clone()

    def __contains__(self, key: object) -> bool:
        return key in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_model(dtype: torch.dtype) -> None:
    model = build_model(tiny_parameters(SHAPE), SHAPE, LoadOptions(CPU, dtype))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(SHAPE.state_shapes())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trainable else dtype), name
        assert parameter.is_leaf
    assert model.training


def test_what_is_trained_may_be_kept_in_bf16() -> None:
    options = LoadOptions(CPU, torch.float32, trained=WEIGHTS, narrow={"head.weight", "blocks.0.att.key.weight"})
    model = build_model(tiny_parameters(SHAPE, dtype=torch.bfloat16), SHAPE, options)
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert narrow == set(options.narrow)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == WEIGHTS


def test_every_tensor_is_where_its_name_says() -> None:
    tensors = {**tiny_parameters(SHAPE), **tiny_states(SHAPE)}
    model = build_model(tensors, SHAPE, LoadOptions(CPU, torch.float32))
    placed = dict(model.named_parameters())
    assert model.emb.host_table is not None
    placed["emb.weight"] = model.emb.host_table  # type: ignore[assignment]
    assert placed.keys() == tensors.keys()
    for name in tensors:
        assert torch.equal(placed[name], tensors[name]), name


def test_states_start_at_zero_or_from_the_file() -> None:
    plain = build_model(tiny_parameters(SHAPE), SHAPE, LoadOptions(CPU, torch.float32))
    states = tiny_states(SHAPE, dtype=torch.bfloat16)
    merged = build_model({**tiny_parameters(SHAPE), **states}, SHAPE, LoadOptions(CPU, torch.float32))
    for name, state in states.items():
        assert not plain.get_parameter(name).any()
        assert torch.equal(merged.get_parameter(name), state.float())


def test_training_does_not_write_into_the_file_s_tensors() -> None:
    tensors = {**tiny_parameters(SHAPE), **tiny_states(SHAPE)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for trained in (None, WEIGHTS):
        options = LoadOptions(CPU, torch.float32, trained=trained)
        model = build_model(tensors, SHAPE, options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "4bit", "int8"])
def test_the_eight_matrices_of_a_layer_are_packed_and_nothing_else(quant_type: str) -> None:
    model = build_model(tiny_parameters(SHAPE), SHAPE, LoadOptions(CPU, torch.bfloat16, quant_type=quant_type))
    packed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    assert packed == set(SHAPE.matrix_names())
    assert len(packed) == 8 * SHAPE.n_layer
    assert {name for name, _ in model.named_parameters()} == (
        SHAPE.parameter_shapes().keys() | SHAPE.state_shapes().keys()
    ) - packed - {"emb.weight"}


def test_full_training_has_fp32_masters_of_every_weight() -> None:
    options = LoadOptions(CPU, torch.bfloat16, trained=WEIGHTS)
    model = build_model(tiny_parameters(SHAPE, dtype=torch.bfloat16), SHAPE, options)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(SHAPE.parameter_shapes())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_full_training_of_packed_matrices_is_a_programming_error() -> None:
    options = LoadOptions(CPU, torch.float32, quant_type="nf4", trained=WEIGHTS)
    with pytest.raises(AssertionError):
        build_model(tiny_parameters(SHAPE), SHAPE, options)


def test_tensors_are_taken_once_and_one_after_the_other() -> None:
    """First what is trained, which an engine may put elsewhere, last what is packed."""
    source = OneAtATime(tiny_parameters(SHAPE))
    reported: list[str] = []
    trained = frozenset({"ln_out.weight", "blocks.1.ln1.bias"})
    build_model(source, SHAPE, LoadOptions(CPU, torch.bfloat16, quant_type="nf4", trained=trained), reported.append)
    sizes = {name: math.prod(size) for name, size in SHAPE.parameter_shapes().items()}
    packed = SHAPE.matrix_names()
    kept = sorted((name for name in sizes if name not in packed), key=lambda name: name not in trained)
    assert source.taken == reported
    assert reported[: len(kept)] == kept
    assert sorted(reported[len(kept) :]) == sorted(packed)
    packed_sizes = [sizes[name] for name in reported[len(kept) :]]
    assert packed_sizes == sorted(packed_sizes, reverse=True)


def test_the_head_is_packed_on_request() -> None:
    tensors = tiny_parameters(SHAPE)
    model = build_model(tensors, SHAPE, LoadOptions(CPU, torch.float32, quant_type="int8", quant_head=True))
    exact = build_model(tensors, SHAPE, LoadOptions(CPU, torch.float32, quant_type="int8"))
    assert isinstance(model.head, FrozenHead)
    hidden = torch.randn(1, 5, SHAPE.n_embd)
    logits, expected = model.logits(hidden), exact.logits(hidden)
    assert 0 < (logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("quant_type", [None, "nf4", "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    ["emb.weight", "head.weight", "ln_out.bias", "blocks.1.ffn.key.weight", "blocks.0.att.time_decay", state_key(1)],
)
def test_a_value_that_is_not_finite_is_found_in_every_tensor(name: str, value: float, quant_type: str | None) -> None:
    tensors = {**tiny_parameters(SHAPE), **tiny_states(SHAPE)}
    tensors[name].view(-1)[-1] = value
    for quant_head in (False, quant_type is not None):
        options = LoadOptions(CPU, torch.bfloat16, quant_type=quant_type, quant_head=quant_head)
        with pytest.raises(CheckpointError, match=rf"base.pth: 1 of the [\d,]+ values of {name} .*damaged"):
            build_model(tensors, SHAPE, options, source="base.pth")


def test_what_only_a_narrow_dtype_cannot_hold_is_named_as_that() -> None:
    tensors = tiny_parameters(SHAPE)
    tensors["blocks.0.att.key.weight"][0, 0] = 1e5
    build_model(tensors, SHAPE, LoadOptions(CPU, torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"1 of .* blocks.0.att.key.weight .* finite in float16.* bf16 or fp32"):
        build_model(tensors, SHAPE, LoadOptions(CPU, torch.float16))


def test_large_values_whose_sum_is_not_finite_are_taken() -> None:
    tensors = tiny_parameters(SHAPE)
    tensors["head.weight"][:2] = 3e38
    tensors["emb.weight"][:2] = -3e38
    model = build_model(tensors, SHAPE, LoadOptions(CPU, torch.float32))
    assert not model.head_weight().sum().isfinite()
    assert model.head_weight().isfinite().all()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_on_the_way_to_a_gpu_tensors_are_read_one_ahead_by_a_thread_of_that_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is imagined: what pins memory and chooses a device only notes that it was called."""
    devices: list[int] = []
    pinned: list[torch.Tensor] = []

    def pin(*size: object, pin_memory: bool, dtype: torch.dtype) -> Tensor:
        assert pin_memory
        pinned.append(torch.zeros(*size, dtype=dtype))  # type: ignore[call-overload]
        return pinned[-1]

    source = OneAtATime({name: torch.full((2,), number) for number, name in enumerate(("a", "stays", "b", "c"))})
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", pin)
    order = list(source.tensors)
    read = [(name, tensor.tolist()) for name, tensor in _read_ahead(source, order, {"stays"}, torch.device(device))]
    assert read == [(name, [number] * 2) for number, name in enumerate(order)]
    assert source.taken == order
    assert devices == [1 if device == "cuda:1" else 0]
    assert len(pinned) == 3
