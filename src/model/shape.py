"""The sizes of a model, and what follows from them whatever its architecture.

Everything about a model's size is in the shapes of its tensors; nothing here reads a file. An architecture is
one file beside this one that subclasses `ModelShape` and holds the mixers.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
from torch import Tensor

from src.errors import CheckpointError
from src.model.recompute import Recompute
from src.ops.kernels import Kernel

if TYPE_CHECKING:
    from src.model.layers import ChannelMixer, TimeMixer

Shape: TypeAlias = tuple[int, ...]

LAYER_KEY = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class ModelShape(ABC):
    """Every size of one model, and the names, shapes, values and costs that come with them.

    Shape legend: C channels (n_embd), A dim_att, F dim_ffn, V vocabulary, H heads, N head size, L layers. Linear
    weights are [out, in].

    Attributes:
        architecture: its name for `--my_testing`.
        family: its name in sentences.
        merged_state: what clients make of a model with a state in it, as the end of a sentence.
        merged_note: what they leave out of it, as a sentence; "" if nothing.
    """

    architecture: ClassVar[str]
    family: ClassVar[str]
    merged_state: ClassVar[str]
    merged_note: ClassVar[str]

    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    vocab_size: int
    n_head: int
    head_size: int

    @classmethod
    @abstractmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        """Whether these are the keys of a model of this architecture, complete or not."""

    @classmethod
    @abstractmethod
    def relative(cls, keys: Collection[str]) -> str:
        """Which relative of this architecture these keys belong to, as the end of a sentence; "" for none."""

    @classmethod
    @abstractmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> ModelShape:
        """Reads the sizes from the tensors of a model.

        Only what defines a size is looked at here; `key_problems` compares every key afterwards.

        Args:
            shapes: file key -> shape, without prefix.

        Raises:
            CheckpointError: A tensor that defines a size is missing or has the wrong number of
                axes, a layer is missing, or sizes contradict each other. The sentence does not
                name the file.
        """

    @classmethod
    @abstractmethod
    def from_sizes(
        cls,
        *,
        n_layer: int,
        n_embd: int,
        vocab_size: int,
        dim_att: int = 0,
        dim_ffn: int = 0,
        head_size: int = 64,
        double_extra_dim: bool = False,
    ) -> ModelShape:
        """Sizes of a model that does not exist yet, by the rules for sizes typed by hand.

        Args:
            dim_att: A; 0 means A = C.
            dim_ffn: F; 0 means the architecture's usual multiple of C.
            double_extra_dim: whether RWKV-6's small maps are twice as wide.

        Raises:
            ConfigError: All sizes that cannot work, in one sentence.
        """

    @abstractmethod
    def time_mix_shapes(self, layer: int) -> dict[str, Shape]:
        """Name within `blocks.{layer}.att` -> shape of its weights, in file order, `time_state` not included."""

    @abstractmethod
    def channel_mix_shapes(self) -> dict[str, Shape]:
        """Name within `blocks.{i}.ffn` -> shape of its weights, in file order."""

    @abstractmethod
    def time_mixer(self, layer: int, head_size_divisor: int) -> TimeMixer:
        """An empty time mix of one layer; group norm eps is 1e-5 times the divisor's square."""

    @abstractmethod
    def channel_mixer(self) -> ChannelMixer:
        """An empty channel mix of one layer."""

    @abstractmethod
    def fresh_mixer_value(self, layer: int, name: str, key_shape: Shape, generator: torch.Generator) -> Tensor:
        """fp32 value of one weight of an untrained mixer, but for biases of norms.

        Args:
            layer: of the mixer.
            name: within the layer, "att.key.weight".
            key_shape: of the weight.
            generator: of what is drawn.
        """

    def kept_bytes(self, recompute: Recompute, *, fused: bool, trained: Collection[str] = ()) -> int:
        """Bytes per token that one layer keeps between forward and backward, 16-bit activations.

        Args:
            recompute: what it computes again.
            fused: whether element-wise operators are kernels.
            trained: names within the layer ("att.key.weight") of what is trained besides its state, and of matrices
                whose adapters keep what they are applied to.
        """
        if recompute is Recompute.ALL:
            return 2 * self.n_embd  # what enters it
        again = recompute is Recompute.INPUTS
        own = self.kept_values(inputs_again=again, fused=fused, trained=trained)
        inputs = self.trained_inputs(inputs_again=again, fused=fused)
        return 2 * (own + sum(values for values, names in inputs if not names.isdisjoint(trained)))

    @abstractmethod
    def kept_values(self, *, inputs_again: bool, fused: bool, trained: Collection[str]) -> int:
        """Values per token that a layer keeps in any case; arguments as of `kept_bytes`."""

    @abstractmethod
    def trained_inputs(self, *, inputs_again: bool, fused: bool) -> list[tuple[int, frozenset[str]]]:
        """What a layer keeps besides where something is trained: values per token, and names that each suffice."""

    def dropped_values(self, *, fused: bool) -> int:
        """Values per token that a layer keeps besides where there is dropout: of each addition what was drawn.

        A value on a CPU, and a byte of it on a GPU.
        """
        return (1 if fused else 2) * self.n_embd

    def kept_casts(self, recompute: Recompute, trained: Collection[str], *, fused: bool) -> list[str]:
        """Those trained weights whose casts a layer keeps, if they are stored in another dtype than activations."""
        return [] if recompute is Recompute.ALL else list(trained)

    @abstractmethod
    def passing_bytes_again(self, adapters: str) -> int:
        """Bytes per token that pass in a layer which is computed again (`Recompute.ALL`), most at one time, fused.

        Beside what layers keep; 16-bit activations. Counted at A = C with the usual F (`LiveTensors` on the emulator).

        Args:
            adapters: their kind; "" where only states are trained.
        """

    def kernels(self, *, trains_weights: bool) -> tuple[Kernel, ...]:
        """CUDA kernels that a step in bf16 launches, to be compiled before it comes; one that is missing here is later.

        Args:
            trains_weights: whether the weights of norms and mixes are trained, too.
        """
        return ()

    @abstractmethod
    def rate_factor(self, key: str) -> float:
        """Factor on a weight's learning rate in full training."""

    def decays(self, key: str) -> bool:
        """Whether weight decay may act on a weight, if it has two or more axes."""
        return True

    def idle_names(self) -> frozenset[str]:
        """Keys of weights that a file holds and no computation uses: kept as they are."""
        return frozenset()

    def part(self, name: str) -> dict[str, Shape]:
        """Key -> shape of the weights that `--train_parts NAME` means: those whose keys contain it."""
        return {key: shape for key, shape in self.parameter_shapes().items() if name in key}

    def parameter_shapes(self) -> dict[str, Shape]:
        """File key -> shape of every weight in file order, `time_state` not included."""
        channels = (self.n_embd,)
        shapes: dict[str, Shape] = {"emb.weight": (self.vocab_size, self.n_embd)}
        for layer in range(self.n_layer):
            block = f"blocks.{layer}"
            for norm in ("ln1", "ln2", "ln0") if layer == 0 else ("ln1", "ln2"):
                shapes |= {f"{block}.{norm}.weight": channels, f"{block}.{norm}.bias": channels}
            shapes |= {f"{block}.att.{name}": shape for name, shape in self.time_mix_shapes(layer).items()}
            shapes |= {f"{block}.ffn.{name}": shape for name, shape in self.channel_mix_shapes().items()}
        return shapes | {
            "ln_out.weight": channels,
            "ln_out.bias": channels,
            "head.weight": (self.vocab_size, self.n_embd),
        }

    def state_shapes(self) -> dict[str, Shape]:
        """File key -> [H, N, N] (head, value, key) of every layer's initial state, in layer order."""
        square = (self.n_head, self.head_size, self.head_size)
        return {state_key(layer): square for layer in range(self.n_layer)}

    def matrix_names(self) -> tuple[str, ...]:
        """Keys of the large matrices of each layer: the ones `--quant 1` packs."""
        return tuple(
            f"blocks.{layer}.{mixer}.{name}"
            for layer in range(self.n_layer)
            for mixer, shapes in (("att", self.time_mix_shapes(layer)), ("ffn", self.channel_mix_shapes()))
            for name in shapes
            if name in matrices_of(shapes)
        )

    def mixed_matrices(self) -> frozenset[str]:
        """Names within a layer, as "att.key", of the matrices that are `layers.Mixer.mixed`."""
        with torch.device("meta"):
            mixers = {"att": self.time_mixer(0, 1), "ffn": self.channel_mixer()}
        return frozenset(f"{part}.{name}" for part, mixer in mixers.items() for name in mixer.mixed)

    @property
    def parameter_count(self) -> int:
        """Number of weights, `time_state` not included."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    @property
    def state_parameter_count(self) -> int:
        """Number of values in a state file: L·H·N·N."""
        return self.n_layer * self.n_head * self.head_size**2

    def memory_bytes(self, value_bytes: int) -> int:
        """Of what one sequence carries on: per layer a matrix a head in fp32, and two shifts."""
        return self.n_layer * (self.n_head * self.head_size**2 * 4 + 2 * self.n_embd * value_bytes)

    def key_problems(self, shapes: Mapping[str, Shape]) -> list[str]:
        """What keeps `shapes` from being a complete model of this shape; empty when nothing does.

        `time_state` is optional: all layers have one, or none.

        Returns:
            Phrases that name the missing, superfluous and misshapen keys.
        """
        expected = self.parameter_shapes()
        states = self.state_shapes()
        if any(key in shapes for key in states):
            expected |= states
        problems = {
            "missing": [key for key in expected if key not in shapes],
            "superfluous": [key for key in shapes if key not in expected],
            "misshapen": [
                f"{key} of shape {list(shapes[key])} instead of {list(wanted)}"
                for key, wanted in expected.items()
                if key in shapes and tuple(shapes[key]) != wanted
            ],
        }
        return [f"{problem} {_some(names)}" for problem, names in problems.items() if names]

    def contradictions(self, given: Mapping[str, int]) -> list[str]:
        """Compares sizes given by flags with these.

        Args:
            given: flag name without dashes (`n_layer n_embd dim_att dim_ffn vocab_size head_size_a` and what the
                architecture adds) -> value; 0 means that the flag was not given.

        Returns:
            One sentence for each mismatch, naming the flag and both numbers.
        """
        names = {"head_size_a": "head_size"}
        actual = {flag: getattr(self, names.get(flag, flag), 0) for flag in given}
        return [
            f"--{flag} {value} contradicts the checkpoint, which has {actual[flag]}; leave the flag out or give "
            f"{actual[flag]}"
            for flag, value in given.items()
            if value and actual[flag] and value != actual[flag]
        ]

    def fresh_value(self, key: str, key_shape: Shape, generator: torch.Generator) -> Tensor:
        """fp32 value of one weight of an untrained model.

        | parameter | value |
        |---|---|
        | LayerNorms | weight 1, bias 0 |
        | emb | uniform ±1e-4 (ln0 normalises it) |
        | head | orthogonal, gain 0.5·√(V/C), at least 0.5 |
        | mixers | see `fresh_mixer_value` |

        Source: the initialisation of RWKV-LM's trainers, which all architectures share.
        """
        match = LAYER_KEY.match(key)
        name = LAYER_KEY.sub("", key)
        if name == "emb.weight":
            return uniform(key_shape, 1e-4, generator)
        if name == "head.weight":
            return orthogonal(key_shape, 0.5 * math.sqrt(max(self.vocab_size / self.n_embd, 1.0)), generator)
        if name in ("ln0.weight", "ln1.weight", "ln2.weight", "ln_out.weight"):
            return torch.ones(key_shape)
        if name.endswith(".bias"):
            return torch.zeros(key_shape)
        assert match, name
        return self.fresh_mixer_value(int(match.group(1)), name, key_shape, generator)

    def fresh_parameters(self, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Initial weights of an untrained model, in file order, `time_state` not included; see `fresh_value`.

        Values are drawn and computed in fp32 on the CPU from one generator in file order, then cast.
        """
        generator = torch.Generator().manual_seed(seed)
        parameters = {}
        for key, key_shape in self.parameter_shapes().items():
            fresh = self.fresh_value(key, key_shape, generator)
            assert tuple(fresh.shape) == key_shape, key
            parameters[key] = fresh.to(dtype)
        return parameters


def uniform(shape: Shape, limit: float, generator: torch.Generator) -> Tensor:
    """fp32, drawn between -limit and limit."""
    return torch.empty(shape).uniform_(-limit, limit, generator=generator)


def orthogonal(shape: Shape, gain: float, generator: torch.Generator) -> Tensor:
    """fp32, orthonormal rows or columns, times the gain."""
    return torch.nn.init.orthogonal_(torch.empty(shape), gain=gain, generator=generator)


def state_key(layer: int) -> str:
    """File key of one layer's initial state."""
    return f"blocks.{layer}.att.time_state"


def matrices_of(shapes: Mapping[str, Shape]) -> list[str]:
    """Names of the linear layers' weights among a mixer's."""
    return [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]


def count_layers(shapes: Mapping[str, Shape]) -> int:
    """1 + the largest layer index, every smaller one being present.

    Raises:
        CheckpointError: there is none, or one is missing.
    """
    present = {int(match.group(1)) for match in map(LAYER_KEY.match, shapes) if match}
    if not present:
        raise CheckpointError("it has no blocks.0 tensors, so it holds no layers")
    highest = max(present)
    if len(present) <= highest:
        first_gap = next(layer for layer in range(highest) if layer not in present)
        raise CheckpointError(
            f"layer {first_gap} (blocks.{first_gap}) is missing although layer {highest} is there; "
            f"layers 0 to {highest} are needed"
        )
    return highest + 1


def axes_of(shapes: Mapping[str, Shape], key: str, count: int) -> Shape:
    """The shape of a tensor that must have `count` non-empty axes.

    Raises:
        CheckpointError: it is missing or has others.
    """
    if key not in shapes:
        raise CheckpointError(f"{key} is missing")
    shape = tuple(shapes[key])
    if len(shape) != count or 0 in shape:
        raise CheckpointError(f"{key} has shape {list(shape)}, expected {count} axes, none empty")
    return shape


def _some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
