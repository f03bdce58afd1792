"""Which matrices get which adapter, and with which values it starts."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.adapters.adapter import Adapter
from src.adapters.bone import Bat, Bone
from src.adapters.lora import LoRA, fresh_factors, lora_weight, principal_factors
from src.errors import ConfigError
from src.model.language_model import LanguageModel
from src.model.shape import LAYER_KEY, ModelShape, Shape
from src.ops.block_diagonal import kernels_for
from src.ops.cast import TO_BF16
from src.ops.kernels import Kernel
from src.ops.rows import VECTOR

KINDS: dict[str, type[Adapter]] = {"lora": LoRA, "pissa": LoRA, "bone": Bone, "bat": Bat}


@dataclass(frozen=True)
class AdapterPlan:
    """The adapters of a model.

    Attributes:
        kind: one of KINDS.
        r: rank, or block size.
        targets: names of matrices, "att.key" or "key"; none means all.
        seed: of what is drawn; each matrix has numbers of its own.
        alpha, rslora, dropout: of lora: the scale is alpha / r, or alpha / √r.
        niter: of pissa's randomised SVD.
    """

    kind: str
    r: int
    targets: tuple[str, ...] = ()
    seed: int = 0
    alpha: float = 64.0
    rslora: bool = False
    dropout: float = 0.0
    niter: int = 4

    @property
    def scale(self) -> float:
        """Factor on what LoRA adds."""
        if self.kind != "lora":
            return 1.0
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def matrices(self, shape: ModelShape) -> list[str]:
        """Keys of the matrices that get an adapter, in file order.

        Raises:
            ConfigError: a target is the name of none, or r does not fit one.
        """
        by_name: dict[str, list[str]] = {}
        for key in shape.matrix_names():
            by_name.setdefault(LAYER_KEY.sub("", key).removesuffix(".weight"), []).append(key)
        for target in self.targets:
            if not any(_names(target, name) for name in by_name):
                raise ConfigError(f"--targets {target} is no matrix of this model: use some of {', '.join(by_name)}")
        chosen = [name for name in by_name if not self.targets or any(_names(t, name) for t in self.targets)]
        for name in chosen:
            self._check(name, shape.parameter_shapes()[by_name[name][0]])
        wanted = {key for name in chosen for key in by_name[name]}
        return [key for key in shape.matrix_names() if key in wanted]

    def parameter_shapes(self, shape: ModelShape) -> dict[str, Shape]:
        """Key -> shape of every adapter's parameters, in file order; see `matrices`."""
        sizes = shape.parameter_shapes()
        return {
            f"{module_of(key)}.{name}": size
            for key in self.matrices(shape)
            for name, size in KINDS[self.kind].parameter_shapes(self.r, *sizes[key]).items()
        }

    def kernels(self) -> tuple[Kernel, ...]:
        """CUDA kernels that a step in bf16 launches for them, to be compiled before it comes."""
        return TO_BF16, *(kernels_for(self.r) if self.kind == "bat" else ())

    @property
    def keeps_inputs(self) -> bool:
        """Whether they keep what their matrices are applied to, beside `narrow_values` of it."""
        return KINDS[self.kind].keeps_input

    @property
    def narrow_values(self) -> int:
        """Values per position and matrix that are kept between forward and backward."""
        return KINDS[self.kind].narrow_values(self.r)

    def rooms(self, shape: ModelShape) -> dict[str, int]:
        """Key of each matrix that takes room where it is dense and kernels make its inputs -> for how many values.

        None with dropout, by which what goes to A is another x.
        """
        width = 0 if self.draws_random else KINDS[self.kind].room_for(self.r)
        if not width:
            return {}
        sizes, mixed = shape.parameter_shapes(), shape.mixed_matrices()
        named = {key: LAYER_KEY.sub("", key).removesuffix(".weight") for key in self.matrices(shape)}
        return {key: width for key, name in named.items() if name in mixed and sizes[key][1] % VECTOR == 0}

    @property
    def draws_random(self) -> bool:
        """Whether passes in training differ."""
        return self.kind == "lora" and self.dropout > 0

    def start_values(self, shape: ModelShape, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """fp32 values of every parameter on the device: those in `tensors`, or fresh ones.

        PiSSA's fresh ones are not known before `residual` has seen the matrix.
        """
        values = {}
        for key, size in self.parameter_shapes(shape).items():
            if key in tensors:
                values[key] = tensors[key].to(device, torch.float32, copy=True)
            elif self.kind in ("bone", "bat"):
                values[key] = torch.zeros(size, device=device)
            else:
                values[key] = torch.empty(size, device=device)
        if self.kind == "lora":
            for matrix in map(module_of, self.matrices(shape)):
                if f"{matrix}.lora_A" not in tensors:
                    fresh_factors(values[f"{matrix}.lora_A"], values[f"{matrix}.lora_B"], self._seed_of(matrix))
        return values

    def residual(self, key: str, weight: Tensor, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        """What stays frozen of a matrix: all of it, and under PiSSA what its first factors leave.

        Args:
            key: of the matrix.
            weight: [out, in] on the device.
            values: of `start_values`; PiSSA's fresh ones are filled in.
            tensors: where first factors stand that are known.
        """
        if self.kind != "pissa":
            return weight
        matrix = module_of(key)
        wide = weight.float()
        if not bool(wide.sum().isfinite()):
            return wide  # has no singular values; the loader refuses it by its name
        names = ("lora_A", "lora_B")
        known = [tensors.get(init_key(f"{matrix}.{name}")) for name in names]
        if known[0] is None or known[1] is None:
            first = principal_factors(wide, self.r, self.niter, self._seed_of(matrix))
        else:
            first = known[0].to(wide.device, torch.float32), known[1].to(wide.device, torch.float32)
        for name, factor in zip(names, first, strict=True):
            if f"{matrix}.{name}" not in tensors:
                values[f"{matrix}.{name}"].copy_(factor)
        return lora_weight(wide, *first, scale=-1.0)

    def attach(self, model: LanguageModel, values: Mapping[str, Tensor]) -> None:
        """Puts the adapters into a model whose matrices are in place; the values become their parameters."""
        kind = KINDS[self.kind]
        options: dict[str, Any] = {}
        if kind is LoRA:
            options = {"scale": self.scale, "dropout": self.dropout if self.kind == "lora" else 0.0}
        # What computes at once is cast side by side: the matrix that does not comes last.
        for key in sorted(self.matrices(model.shape), key=lambda key: key.endswith(".output.weight")):
            own = {name: values[f"{module_of(key)}.{name}"] for name in kind.names}
            model.adapt(key, lambda base, own=own: kind(base, own, **options))  # type: ignore[misc]

    def properties(self) -> dict[str, Any]:
        """What a reader of the files must know."""
        known: dict[str, Any] = {"r": self.r}
        if self.kind == "lora":
            rule = "alpha / sqrt(r)" if self.rslora else "alpha / r"
            known |= {"alpha": self.alpha, "scale_rule": rule, "scale": self.scale, "dropout": self.dropout}
        if self.kind == "pissa":
            known |= {"svd_niter": self.niter}
        return known

    def describe(self) -> str:
        """One phrase for the plan."""
        words = {"lora": "LoRA", "pissa": "PiSSA", "bone": "Bone", "bat": "Bat"}[self.kind] + f" r {self.r}"
        return f"{words} (scale {self.scale:g})" if self.kind == "lora" else words

    def _check(self, name: str, size: Shape) -> None:
        out_features, in_features = size
        if self.kind == "bat" and (in_features % self.r or out_features % self.r):
            raise ConfigError(
                f"--bone_r {self.r} does not divide {name} of {out_features} x {in_features}, which bat needs: use a "
                f"divisor of {math.gcd(out_features, in_features)}, or --peft bone"
            )
        if self.r > (in_features if self.kind == "bone" else min(size)):
            flag = {"lora": "lora_r", "pissa": "pissa_r"}.get(self.kind, "bone_r")
            raise ConfigError(f"--{flag} {self.r} is larger than {name} of {out_features} x {in_features}: lower it")

    def _seed_of(self, matrix: str) -> int:
        return zlib.crc32(f"{self.seed} {matrix}".encode())


def module_of(key: str) -> str:
    """A matrix's key without its last part."""
    return key.removesuffix(".weight")


def init_key(key: str) -> str:
    """Key in `init_pissa.pth` of the first value of a PiSSA factor."""
    module, _, name = key.rpartition(".")
    return f"{module}.init_{name}"


def _names(target: str, matrix: str) -> bool:
    return matrix == target or matrix.endswith(f".{target}")
