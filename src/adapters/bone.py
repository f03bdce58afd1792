"""Bone and Bat ("DiSHA"), which share one parameter over parts of the matrix. Both work on the activations.

Bone: P [r, out]; y = W x + Pᵀ s, with s the sum of x's blocks of r values, the last one filled up with zeros. It is
ΔW[:, c] = P[c mod r, :].

Bat: P [in/r, r, r]; every r x r tile W_ab of W becomes W_ab + W_ab P_b + P_b. With u_b = P_b x_b that is
y = W (x + u) + Σ_b u_b repeated out/r times: no tile is ever formed.

Summing blocks, and repeating one, are products with the identity I [r, ·], repeated: exact, and on a GPU twice as fast
as a reduction or an addition with strides.

Source: Bone, arXiv 2409.15371; the formulas are those of RWKV-PEFT (modes "bone" and "bat").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from src.adapters.adapter import Adapter, Kept, OfParameters
from src.adapters.low_rank import LowRank
from src.model.shape import Shape
from src.ops.products import outer_sum, outer_sums


class Bone(LowRank):
    """See the module."""

    names: ClassVar[tuple[str, ...]] = ("bone",)
    bone: torch.nn.Parameter

    @staticmethod
    def parameter_shapes(r: int, out_features: int, in_features: int) -> dict[str, Shape]:
        """See Adapter."""
        return {"bone": (r, out_features)}

    @staticmethod
    def kept_values(r: int, in_features: int) -> int:
        """See Adapter."""
        return r

    @property
    def rank(self) -> int:
        """See LowRank."""
        return self.bone.shape[0]

    def down(self, dtype: torch.dtype) -> Tensor:
        """See LowRank: what sums blocks."""
        return _identity(self.rank, self.base.in_features, dtype, self.bone.device)

    def up(self, dtype: torch.dtype) -> Tensor:
        """See LowRank."""
        return self.used("bone", dtype).t()

    @staticmethod
    def kept_of(x: Tensor, hidden: Tensor) -> Kept:
        """See LowRank."""
        return (hidden,)

    @staticmethod
    def parameter_gradients(
        kept: Sequence[Kept], grads: Sequence[Tensor], grads_hidden: Sequence[Tensor]
    ) -> list[tuple[Tensor, ...]]:
        """See LowRank."""
        return [(gradient,) for gradient in outer_sums([summed for (summed,) in kept], grads)]


class Bat(Adapter):
    """See the module; r divides both sides of the matrix."""

    names: ClassVar[tuple[str, ...]] = ("bone",)
    bone: torch.nn.Parameter

    @staticmethod
    def parameter_shapes(r: int, out_features: int, in_features: int) -> dict[str, Shape]:
        """See Adapter."""
        return {"bone": (in_features // r, r, r)}

    @staticmethod
    def kept_values(r: int, in_features: int) -> int:
        """See Adapter."""
        return in_features

    @classmethod
    def joint_kept(cls, adapters: Sequence[Any], inputs: Sequence[Tensor]) -> list[Kept]:
        """See Adapter."""
        return [(x,) for x in inputs]

    @classmethod
    def joint_products(cls, adapters: Sequence[Any], inputs: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
        """See Adapter."""
        return [adapter._product(x) for adapter, x in zip(adapters, inputs, strict=True)]

    @classmethod
    def joint_gradients(cls, adapters: Sequence[Any], grads: Sequence[Tensor]) -> tuple[list[Tensor], OfParameters]:
        """See Adapter."""
        pairs = [adapter._gradients(grad) for adapter, grad in zip(adapters, grads, strict=True)]
        results, functions = zip(*pairs, strict=True)

        def of_parameters(kept: Sequence[Kept]) -> list[tuple[Tensor, ...]]:
            return [function(x) for function, (x,) in zip(functions, kept, strict=True)]

        return list(results), of_parameters

    def _product(self, x: Tensor) -> Tensor:
        blocks = self.used("bone", x.dtype).transpose(1, 2)
        summed = x @ blocks.reshape(x.shape[1], -1)
        moved = x.clone()
        self._by_block(moved).baddbmm_(self._by_block(x), blocks)
        y: Tensor = self.base(moved)
        return y.addmm_(summed, _identities(self.bone.shape[1], y))

    def _gradients(self, grad_output: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        r = self.bone.shape[1]
        grad_summed = grad_output @ _identities(r, grad_output).t()
        blocks = self.used("bone", grad_output.dtype)
        grad_x, _ = self.base.gradients(grad_output)
        grad_added = self._by_block(torch.addmm(grad_x, grad_summed, _identities(r, grad_x)))
        self._by_block(grad_x).baddbmm_(grad_added, blocks)
        return grad_x, lambda x: (outer_sum(grad_added, self._by_block(x)),)

    def _by_block(self, x: Tensor) -> Tensor:
        """[n, in] as [in/r, n, r], a view."""
        return x.view(x.shape[0], -1, self.bone.shape[1]).transpose(0, 1)


@functools.cache
def _identity(r: int, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    identity = torch.eye(r, dtype=dtype, device=device)
    return identity.repeat(1, -(-features // r))[:, :features].contiguous()


def _identities(r: int, like: Tensor) -> Tensor:
    """The identity of size r side by side [r, features] for x or y [n, features], cut at its last column.

    The first step, which is never a recorded one, makes it.
    """
    return _identity(r, like.shape[1], like.dtype, like.device)


def bone_weight(weight: Tensor, block: Tensor) -> Tensor:
    """W' [out, in] of Bone in W's dtype.

    Args:
        weight: W [out, in].
        block: P [r, out].
    """
    repeats = -(-weight.shape[1] // block.shape[0])
    return weight + block.to(weight).t().repeat(1, repeats)[:, : weight.shape[1]]


def bat_weight(weight: Tensor, blocks: Tensor, *, by_output: bool = False) -> Tensor:
    """W' [out, in] of Bat in W's dtype: every tile W_ab becomes W_ab + W_ab P + P.

    Args:
        weight: W [out, in].
        blocks: P [in/r, r, r], one for each strip b of columns; [out/r, r, r] if `by_output`.
        by_output: P belongs to a, the tile's rows, as in HF's `peft`, whose method of that name is another one.
    """
    r = blocks.shape[1]
    tiles = weight.reshape(weight.shape[0] // r, r, -1, r).transpose(1, 2)
    of_tiles = blocks.to(weight)
    of_tiles = of_tiles[:, None] if by_output else of_tiles[None]
    return (tiles + tiles @ of_tiles + of_tiles).transpose(1, 2).reshape(weight.shape)
