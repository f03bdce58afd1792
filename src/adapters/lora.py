"""LoRA and PiSSA: y = W x + scale · B (A x), with A [r, in] and B [out, r].

PiSSA differs in where it starts: A and B are W's r largest singular directions, and W is what is left of it.

Source: LoRA, arXiv 2106.09685; rsLoRA's scale, arXiv 2312.03732; PiSSA, arXiv 2404.02948.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from src.adapters.adapter import Kept
from src.adapters.low_rank import LowRank
from src.model.layers import Linear
from src.model.shape import Shape
from src.ops.products import behind, outer_sums
from src.ops.rows import VECTOR
from src.quant import FrozenLinear

_OVERSAMPLING = 8
_LEAST_PIVOT = 1e-4
"""Of the largest: fp64's precision, which loses twice as many digits, is still better than fp32's then."""


class LoRA(LowRank):
    """See the module.

    Args:
        base, parameters: see Adapter.
        scale: factor on what the adapter adds.
        dropout: probability that a value of x is left out of what goes to A, in training.
    """

    names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter

    def __init__(
        self,
        base: Linear | FrozenLinear,
        parameters: Mapping[str, Tensor],
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base, parameters)
        self.scale = scale
        self.dropout = dropout

    @staticmethod
    def parameter_shapes(r: int, out_features: int, in_features: int) -> dict[str, Shape]:
        """See Adapter."""
        return {"lora_A": (r, in_features), "lora_B": (out_features, r)}

    @staticmethod
    def room_for(r: int) -> int:
        """See Adapter: for whole vectors of the kernels."""
        return 0 if r % VECTOR else r

    @property
    def draws_random(self) -> bool:
        """See Adapter."""
        return self.dropout > 0

    def forward(self, x: Tensor) -> Tensor:
        """See Adapter."""
        if self.dropout and self.training:
            hidden = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
            added: Tensor = self.base(x) + self.scale * F.linear(hidden, self.lora_B.to(x.dtype))
            return added
        return super().forward(x)

    @property
    def rank(self) -> int:
        """See LowRank."""
        return self.lora_A.shape[0]

    def take_room(self) -> None:
        """See Joint: where it was reserved behind a dense matrix."""
        base, casts = self.base, self._casts
        if type(base) is Linear and base.reserved and not base.room and casts is not None:
            base.make_room()
            casts.cast_to(self._first_cast + self.names.index("lora_B"), behind(base.weight, base.room))
            self.room = base.room

    def down(self, dtype: torch.dtype) -> Tensor:
        """See LowRank."""
        return self.used("lora_A", dtype)

    def up(self, dtype: torch.dtype) -> Tensor:
        """See LowRank."""
        return self.used("lora_B", dtype)

    @staticmethod
    def kept_of(x: Tensor, hidden: Tensor) -> Kept:
        """See LowRank."""
        return x, hidden

    @staticmethod
    def parameter_gradients(
        kept: Sequence[Kept], grads: Sequence[Tensor], grads_hidden: Sequence[Tensor]
    ) -> list[tuple[Tensor, ...]]:
        """See LowRank."""
        inputs, hidden = zip(*kept, strict=True)
        of_a, of_b = outer_sums(grads_hidden, inputs), outer_sums(grads, hidden)
        return list(zip(of_a, of_b, strict=True))


def lora_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float = 1.0) -> Tensor:
    """W + scale · B A [out, in] in W's dtype; PiSSA's residual, of its first factors, has scale -1."""
    return torch.addmm(weight, lora_b.to(weight), lora_a.to(weight), alpha=scale)


def fresh_factors(lora_a: Tensor, lora_b: Tensor, seed: int) -> None:
    """Fills A [r, in] with ±1/√in, uniformly (Kaiming with a = √5), and B with 0; the same on every device."""
    bound = 1 / math.sqrt(lora_a.shape[1])
    drawn = torch.empty(lora_a.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    lora_a.copy_(drawn)
    lora_b.zero_()


def principal_factors(weight: Tensor, r: int, niter: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [r, in] = √S Vᵀ and B [out, r] = U √S of the r largest singular values of W.

    A randomised SVD with 8 more directions than are wanted, so that the last ones are as good as the first.

    Args:
        weight: [out, in] fp32, on any device.
        r: at most min(out, in).
        niter: power iterations.
        seed: of the first directions, which are drawn on the host.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    width = min(r + _OVERSAMPLING, *weight.shape)
    drawn = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(seed))
    basis, _ = _orthonormal(weight @ drawn.to(weight.device))
    for _ in range(niter):
        across, _ = _orthonormal(weight.t() @ basis)
        basis, _ = _orthonormal(weight @ across)
    # The SVD of the wide matrix basisᵀ W by way of its small triangular factor.
    rows, triangle = _orthonormal(weight.t() @ basis)
    left, values, right = (part.to(weight) for part in torch.linalg.svd(triangle.t()))
    root = values[:r].sqrt()
    return root[:, None] * (right[:r] @ rows.t()), (basis @ left[:, :r]) * root


def _orthonormal(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, k] fp32 as Q R: Q [n, k] orthonormal, on x's device, and R [k, k], on the host.

    By Cholesky's factor of xᵀx in fp64, which leaves the device nothing but two products: Householder's reflections,
    the way out where columns nearly depend on each other, are hundreds of small steps, one after the other.
    """
    wide = x.double()
    lower, failed = torch.linalg.cholesky_ex((wide.t() @ wide).cpu())
    pivots = lower.diagonal()
    if failed or not pivots.min() > _LEAST_PIVOT * pivots.max():
        q, triangle = torch.linalg.qr(x)
        return q, triangle.cpu()
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
    return (wide @ inverse.t().to(x.device)).to(x.dtype), lower.t()
