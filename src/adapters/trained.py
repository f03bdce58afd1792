"""What a file of trained tensors holds, recognised by its keys and shapes, the JSON beside it, and what the user says.

Whether a file is read to be merged, exported or compared, its adapters are asked for W' or for a module; the
formulas are those of `lora.py` and `bone.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from src.adapters.adapter import Adapter
from src.adapters.bone import Bat, Bone, bat_weight, bone_weight
from src.adapters.files import (
    INIT_FILE,
    description_path,
    refuse_other_architecture,
    said_beside,
    states_beside,
    with_own_names,
)
from src.adapters.hf import is_hf, read_hf
from src.adapters.lora import LoRA, lora_weight
from src.adapters.plan import init_key, module_of
from src.checkpoint import keys_in, load_state, read_tensors
from src.config.model import QUANT_TYPES, quant_name
from src.config.told import ToldFlags
from src.errors import CheckpointError
from src.model.shape import LAYER_KEY, ModelShape, Shape
from src.storage import PathLike

_ADAPTER_KEY = re.compile(r"(.+)\.(lora_A|lora_B|bone)")
_WORDS = {"lora": "LoRA", "pissa": "PiSSA", "bone": "Bone", "bat": "Bat"}


@dataclass(frozen=True)
class Told:
    """What the user says of a file.

    Attributes:
        kind: lora, pissa, bone, bat, disha (bone or bat), or "".
        alpha: of LoRA; 0 is nothing said.
        init: PiSSA's file of first factors, or "".
        writer: hf, rwkv-peft, or "": whose Bat it is.
    """

    kind: str = ""
    alpha: float = 0.0
    init: str = ""
    writer: str = ""

    @classmethod
    def by(cls, flags: ToldFlags) -> Told:
        """What a command line says."""
        return cls(flags.type, flags.alpha, flags.lora_init, flags.writer)


@dataclass(frozen=True)
class MatrixAdapter:
    """The adapter of one matrix.

    Attributes:
        kind: lora, pissa, bone or bat.
        parameters: by name.
        scale: of LoRA.
        first: PiSSA's first A and B.
        by_output: of Bat, see `bat_weight`.
    """

    kind: str
    parameters: Mapping[str, Tensor]
    scale: float = 1.0
    first: tuple[Tensor, Tensor] | None = None
    by_output: bool = False

    def frozen(self, weight: Tensor) -> Tensor:
        """What stays frozen of the base model's W [out, in] beside the adapter, in its dtype."""
        return weight if self.first is None else lora_weight(weight, *self.first, scale=-1.0)

    def merged(self, frozen: Tensor) -> Tensor:
        """W' [out, in], from what `frozen` gave."""
        if self.kind == "bone":
            return bone_weight(frozen, self.parameters["bone"])
        if self.kind == "bat":
            return bat_weight(frozen, self.parameters["bone"], by_output=self.by_output)
        return lora_weight(frozen, self.parameters["lora_A"], self.parameters["lora_B"], self.scale)

    def module(self, base: Any) -> Adapter:
        """The same beside a matrix of a model, as training has it."""
        assert not self.by_output, "there is no such module"
        parameters = {name: tensor.float().to(base_device(base)) for name, tensor in self.parameters.items()}
        if self.kind in ("bone", "bat"):
            return (Bone if self.kind == "bone" else Bat)(base, parameters)
        return LoRA(base, parameters, scale=self.scale)


@dataclass(frozen=True)
class Trained:
    """What a file holds.

    Attributes:
        path: the file or folder.
        kind: lora, pissa, bone or bat; "" without adapters.
        r: rank or block size.
        adapters: by the key of their matrix.
        weights: other weights that take the place of the base model's.
        states: of every layer, or none.
        quant: quantisation it was trained on, "none" for unpacked weights; None if nothing says it.
        quant_head: whether the head was packed, too.
        base: file, size_bytes and sha256 of the model it was trained on, as far as they are known.
        beside: file of the states that it was trained beside and that it does not hold; "" is none.
    """

    path: Path
    kind: str = ""
    r: int = 0
    adapters: Mapping[str, MatrixAdapter] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    states: Mapping[str, Tensor] = field(default_factory=dict)
    quant: str | None = None
    quant_head: bool = False
    base: Mapping[str, Any] = field(default_factory=dict)
    beside: str = ""

    @property
    def scale(self) -> float:
        """Of LoRA."""
        return next((adapter.scale for adapter in self.adapters.values()), 1.0)

    @property
    def by_output(self) -> bool:
        """Whether it is a Bat of HF's, see `bat_weight`."""
        return any(adapter.by_output for adapter in self.adapters.values())

    def describe(self) -> str:
        """One phrase for its adapters."""
        scale = f" (scale {self.scale:g})" if self.kind == "lora" else ""
        matrices = "matrix" if len(self.adapters) == 1 else "matrices"
        return f"{_WORDS[self.kind]} r {self.r}{scale} on {len(self.adapters)} {matrices}"


def read_trained(path: PathLike, shape: ModelShape, told: Told = Told()) -> Trained:
    """Reads a state file, an adapter file with or without parts and states, a folder of HF's, or a merged model.

    Of a merged model, only its states are taken.

    Args:
        path: the file, or a folder that `peft` wrote.
        shape: of the base model.
        told: what the user says of it.

    Raises:
        CheckpointError: It cannot be read, does not fit the model or what is said of it, holds what is not known, or
            does not say enough.
    """
    path = Path(path)
    from_hf = is_hf(path)
    if from_hf:
        tensors, said = read_hf(path)
    else:
        role = "state or adapter file"
        said = said_beside(path) or {}
        refuse_other_architecture(path, shape)
        keys = set(keys_in(path, role))
        states = {key for key in keys if key.endswith(".att.time_state")}
        if states == keys or shape.parameter_shapes().keys() <= keys:
            states_of_all = load_state(path, shape)
            return Trained(path, states=states_of_all, **_packing_in(path, said), base=_base_in(said))
        tensors = with_own_names(read_tensors(path, role))
    return _Reader(path, shape, told, tensors, said, from_hf).read()


def read_tuned(state: str, adapter: str, shape: ModelShape, told: Told = Told()) -> Trained | None:
    """Reads a state file, an adapter file, or both: an adapter and the states that it was trained beside.

    Args:
        state: file of `--load_state`; "" is none.
        adapter: of `--load_adapter`, see `read_trained`; "" is none.
        shape: of the base model.
        told: what the user says of the adapter.

    Raises:
        CheckpointError: as `read_trained`, or both hold states.
    """
    if not state:
        return read_trained(adapter, shape, told) if adapter else None
    load_state(state, shape)  # whose sentences suit a file that should be a state
    trained = read_trained(state, shape)
    if not adapter:
        return trained
    both = read_trained(adapter, shape, told)
    if both.states:
        raise CheckpointError(
            f"--load_state {state} and --load_adapter {adapter} both hold states: leave the former out"
        )
    return replace(both, states=trained.states, beside="")


def base_device(base: Any) -> Any:
    """Where a matrix of a model lies, dense or packed."""
    return next(iter([*base.parameters(), *base.buffers()])).device


@dataclass(frozen=True)
class _Reader:
    """One reading of a file that holds more than states.

    Attributes:
        tensors: by own keys.
        said: the JSON beside it, {} without one.
        from_hf: whether `peft` wrote it.
    """

    path: Path
    shape: ModelShape
    told: Told
    tensors: Mapping[str, Tensor]
    said: Mapping[str, Any]
    from_hf: bool

    def read(self) -> Trained:
        """See `read_trained`."""
        by_matrix, others = self._sorted()
        states = {key: others.pop(key) for key in self.shape.state_shapes() if key in others}
        if states and len(states) != self.shape.n_layer:
            raise CheckpointError(
                f"{self.path} holds the time_state of {len(states)} layers, but the model has {self.shape.n_layer}: a "
                "file only fits the model it was trained on"
            )
        expected = self.shape.parameter_shapes() | self.shape.state_shapes()
        for key, tensor in {**others, **states}.items():
            self._check_shape(key, tensor, expected[key])
        base, packing = _base_in(self.said), _packing_in(self.path, self.said)
        beside = "" if states else states_beside(self.said)
        if not by_matrix:
            self._refuse_flags()
            return Trained(self.path, weights=others, states=states, **packing, base=base, beside=beside)
        self._refuse_missing_layers(by_matrix)
        kind = self._kind(by_matrix)
        r = self._r(by_matrix, kind)
        first: Mapping[str, tuple[Tensor, Tensor]] = {}
        if kind == "pissa":
            first, made_on = self._first_factors(by_matrix)
            base = {**made_on, **base}
        scale = self._scale(r) if kind == "lora" else 1.0
        by_output = kind == "bat" and self._is_by_output(by_matrix)
        sizes = self.shape.parameter_shapes()
        for key, parameters in by_matrix.items():
            if kind == "bat" and any(side % r for side in sizes[key]):
                raise CheckpointError(f"{self.path} holds blocks of {r}, which do not divide {key}: name another file")
            for name, wanted in _shapes_of(kind, r, sizes[key], by_output).items():
                if name not in parameters:
                    raise CheckpointError(f"{self.path} is incomplete: {module_of(key)} has no {name}")
                self._check_shape(f"{module_of(key)}.{name}", parameters[name], wanted)
        adapters = {
            key: MatrixAdapter(kind, parameters, scale, first.get(key), by_output)
            for key, parameters in by_matrix.items()
        }
        return Trained(self.path, kind, r, adapters, others, states, **packing, base=base, beside=beside)

    def _sorted(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Parameters of adapters by matrix and name, and all other tensors by key."""
        matrices = set(self.shape.matrix_names())
        known = {*self.shape.parameter_shapes(), *self.shape.state_shapes()}
        by_matrix: dict[str, dict[str, Tensor]] = {}
        others: dict[str, Tensor] = {}
        foreign = []
        for key, tensor in self.tensors.items():
            found = _ADAPTER_KEY.fullmatch(key)
            if found and f"{found[1]}.weight" in matrices:
                by_matrix.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
            elif key in known and not self.from_hf:
                others[key] = tensor
            else:
                foreign.append(key)
        if foreign:
            raise CheckpointError(
                f"{self.path} holds {len(foreign)} of {len(self.tensors)} tensors that this model has no place for, "
                f"{foreign[0]} among them: name a file that was trained on this model"
            )
        return by_matrix, others

    def _refuse_missing_layers(self, by_matrix: Mapping[str, Mapping[str, Tensor]]) -> None:
        """An adapter of a model with fewer layers has keys that this one has, too."""
        counts: dict[str, int] = {}
        for key in by_matrix:
            name = LAYER_KEY.sub("", module_of(key))
            counts[name] = counts.get(name, 0) + 1
        for name, count in counts.items():
            if count != self.shape.n_layer and "layers" not in self.said:
                raise CheckpointError(
                    f"{self.path} holds adapters of {name} of {count} layers, but the model has {self.shape.n_layer}: "
                    "an adapter only fits the model it was trained on"
                )

    def _kind(self, by_matrix: Mapping[str, Mapping[str, Tensor]]) -> str:
        """Which method the file is of, as its keys, the JSON and the user say."""
        signs = {
            f"{tensor.ndim}-D {name}" if name == "bone" else "lora"
            for parameters in by_matrix.values()
            for name, tensor in parameters.items()
        }
        if len(signs) > 1:
            raise CheckpointError(f"{self.path} mixes {' and '.join(sorted(signs))} tensors: name a file of one method")
        possible = {"lora": ("lora", "pissa"), "2-D bone": ("bone",), "3-D bone": ("bat",)}.get(signs.pop())
        if possible is None:
            raise CheckpointError(f"{self.path} holds a .bone that has neither 2 nor 3 axes: copy or download it again")
        told = possible[0] if self.told.kind == "disha" and "lora" not in possible else self.told.kind
        said = self.said.get("method", "")
        for claim, source in ((told, "--type"), (said, "what stands beside it")):
            if claim and claim not in possible:
                raise CheckpointError(
                    f"{self.path} holds {_WORDS[possible[0]]} tensors, not {claim} ({source}): name another file, or "
                    f"--type {possible[0]}"
                )
        if told and said and told != said:
            raise CheckpointError(
                f"{self.path} was trained as {said} by what stands beside it, not {told}: leave --type out"
            )
        if not (told or said) and len(possible) > 1:
            raise CheckpointError(
                f"{self.path} holds lora_A and lora_B, and no {description_path(self.path).name} says whose: give "
                "--type lora or --type pissa"
            )
        kind = str(told or said or possible[0])
        self._refuse_flags(kind)
        return kind

    def _r(self, by_matrix: Mapping[str, Mapping[str, Tensor]], kind: str) -> int:
        """Rank or block size, from the first tensor."""
        parameters = next(iter(by_matrix.values()))
        name, axis = {"bone": ("bone", 0), "bat": ("bone", 1)}.get(kind, ("lora_A", 0))
        if name not in parameters:
            raise CheckpointError(f"{self.path} is incomplete: {module_of(next(iter(by_matrix)))} has no {name}")
        r = parameters[name].shape[axis] if parameters[name].ndim > axis else 0
        if r < 1 or self.said.get("r", r) != r:
            raise CheckpointError(
                f"{self.path} holds adapters of r {r}, and what stands beside it says r {self.said.get('r')}: one of "
                "the two belongs to another training"
            )
        return r

    def _scale(self, r: int) -> float:
        """Factor on what LoRA adds, from the JSON or the user."""
        if "scale" in self.said:
            scale = float(self.said["scale"])
            if self.told.alpha and self.told.alpha != self.said.get("alpha"):
                raise CheckpointError(
                    f"{self.path} was trained with alpha {self.said.get('alpha')} by what stands beside it, not "
                    f"--lora_alpha {self.told.alpha:g}: leave the flag out"
                )
            return scale
        if not self.told.alpha:
            raise CheckpointError(
                f"{self.path} is LoRA's, and no {description_path(self.path).name} says its alpha: give --lora_alpha "
                "(RWKV-PEFT's scripts train with 32)"
            )
        return self.told.alpha / r

    def _is_by_output(self, by_matrix: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Whether Bat's blocks belong to rows of tiles, which only a name or a long matrix tells."""
        if not self.told.writer and self.from_hf:
            raise CheckpointError(
                f"{self.path} holds Bat blocks, which peft numbers by output and RWKV-PEFT by input: give --writer hf "
                "or --writer rwkv-peft"
            )
        by_output = self.told.writer == "hf"
        sizes = self.shape.parameter_shapes()
        for key, parameters in by_matrix.items():
            count, r = parameters["bone"].shape[:2]
            groups = [sizes[key][axis] // r for axis in (0, 1)]
            if count != groups[not by_output] and count == groups[by_output]:
                there, right = ("RWKV-PEFT", "rwkv-peft") if by_output else ("peft", "hf")
                raise CheckpointError(
                    f"{self.path}: {module_of(key)} has {count} blocks of {r} for a matrix of {sizes[key][0]} x "
                    f"{sizes[key][1]}, as {there} writes them: give --writer {right}"
                )
        return by_output

    def _first_factors(
        self, by_matrix: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
        """PiSSA's first A and B by matrix, and the base model they were made from."""
        path = Path(self.told.init) if self.told.init else self.path.with_name(INIT_FILE)
        if not self.told.init and not path.exists():
            raise CheckpointError(
                f"{self.path} is PiSSA's, which needs the factors it began with, and there is no {path}: name that "
                f"file with --lora_init"
            )
        tensors = read_tensors(path, "init file of PiSSA")
        first: dict[str, tuple[Tensor, Tensor]] = {}
        for key, parameters in by_matrix.items():
            keys = [init_key(f"{module_of(key)}.{name}") for name in ("lora_A", "lora_B")]
            missing = [name for name in keys if name not in tensors]
            if missing:
                raise CheckpointError(f"{path} lacks {missing[0]}: it belongs to another training than {self.path}")
            for name, own in zip(keys, ("lora_A", "lora_B"), strict=True):
                if own in parameters and tensors[name].shape != parameters[own].shape:
                    raise CheckpointError(
                        f"{path}: {name} has shape {list(tensors[name].shape)}, and {own} of {self.path} has "
                        f"{list(parameters[own].shape)}: it belongs to another training"
                    )
            first[key] = tensors[keys[0]], tensors[keys[1]]
        foreign = len(tensors) - 2 * len(first)
        if foreign:
            raise CheckpointError(
                f"{path} holds {foreign} tensors more than {self.path} has factors: it belongs to another training"
            )
        said = said_beside(path) or {}
        names = {"size_bytes": "base_size_bytes", "sha256": "base_sha256"}
        made_on = {name: said[theirs] for name, theirs in names.items() if theirs in said}
        for name, value in made_on.items():
            known = _base_in(self.said).get(name, value)
            if known != value:
                raise CheckpointError(
                    f"{path} was made from a base model of {name} {value}, and {self.path} was trained on one of "
                    f"{known}: they belong to two trainings"
                )
        return first, made_on

    def _refuse_flags(self, kind: str = "") -> None:
        """Refuses what is said of another kind of file."""
        told = self.told
        needless = {
            f"--type {told.kind}": told.kind and not kind,
            f"--lora_alpha {told.alpha:g}": told.alpha and kind != "lora",
            f"--lora_init {told.init}": told.init and kind != "pissa",
            f"--writer {told.writer}": told.writer and kind != "bat",
        }
        for flag, given in needless.items():
            # RWKV-PEFT's own command gives alpha with every type.
            if given and not (kind == "pissa" and flag.startswith("--lora_alpha")):
                what = f"is {_WORDS[kind]}'s" if kind else "holds no adapter"
                raise CheckpointError(f"{flag} says nothing about {self.path}, which {what}: leave it out")

    def _check_shape(self, key: str, tensor: Tensor, wanted: Shape) -> None:
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"{self.path}: {key} has shape {list(tensor.shape)}, and this model needs {list(wanted)}: name a file "
                "that was trained on this model"
            )


def _shapes_of(kind: str, r: int, size: Shape, by_output: bool) -> dict[str, Shape]:
    """Name -> shape of the parameters beside a matrix [out, in]."""
    if by_output:
        return {"bone": (size[0] // r, r, r)}
    shapes: Callable[[int, int, int], dict[str, Shape]] = {"bone": Bone, "bat": Bat}.get(kind, LoRA).parameter_shapes
    return shapes(r, size[0], size[1])


def _packing_in(path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the base model was packed, and the head with it, as arguments of `Trained`.

    Raises:
        CheckpointError: it was packed in a way that is not known.
    """
    quant = said.get("quant")
    if quant not in (None, "none", *QUANT_TYPES):
        raise CheckpointError(
            f"{description_path(path)} says that {path} was trained on weights packed as {quant!r}, and none, "
            f"{', '.join(QUANT_TYPES)} are known: correct or remove that file"
        )
    return {"quant": quant and quant_name(quant), "quant_head": bool(said.get("quant_head"))}


def _base_in(said: Mapping[str, Any]) -> dict[str, Any]:
    base = said.get("base")
    return dict(base) if isinstance(base, dict) else {}
