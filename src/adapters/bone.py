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
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from src.adapters.adapter import Adapter, Kept, OfParameters
from src.adapters.low_rank import LowRank
from src.model.shape import Shape
from src.ops.block_diagonal import add_block_products, add_block_products_gradients, by_block
from src.ops.products import outer_sum, outer_sums, products, side_by_side


class Bone(LowRank):
    """See the module."""

    names: ClassVar[tuple[str, ...]] = ("bone",)
    keeps_input = False
    bone: torch.nn.Parameter

    @staticmethod
    def parameter_shapes(r: int, out_features: int, in_features: int) -> dict[str, Shape]:
        """See Adapter."""
        return {"bone": (r, out_features)}

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

    @classmethod
    def joint_kept(
        cls, adapters: Sequence[Any], inputs: Sequence[Tensor], known: Sequence[Tensor | None] = ()
    ) -> list[Kept]:
        """See Adapter."""
        return [(x,) for x in inputs]

    @classmethod
    def joint_products(cls, adapters: Sequence[Any], inputs: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
        """See Adapter."""
        results = []
        for adapter, x in zip(adapters, inputs, strict=True):
            moved, summed = add_block_products(x, adapter.used("bone", x.dtype))
            (y,) = products([summed], [adapter._repeat(summed.shape[1], x.dtype)])
            adapter.base.add_product(moved, y)
            results.append(y)
        return results

    @classmethod
    def joint_gradients(cls, adapters: Sequence[Any], grads: Sequence[Tensor]) -> tuple[list[Tensor], OfParameters]:
        """See Adapter."""
        rows, like = grads[0].shape[0], grads[0]
        grads_summed = products(grads, [adapter._repeat(adapter.bone.shape[1], like.dtype).t() for adapter in adapters])
        results = side_by_side([(rows, adapter.base.in_features) for adapter in adapters], like)
        grads_added = []
        for adapter, grad, grad_summed, grad_x in zip(adapters, grads, grads_summed, results, strict=True):
            adapter.base.gradient_into(grad, grad_x)
            grads_added.append(add_block_products_gradients(grad_x, grad_summed, adapter.used("bone", like.dtype)))

        def of_parameters(kept: Sequence[Kept]) -> list[tuple[Tensor, ...]]:
            triples = zip(adapters, grads_added, kept, strict=True)
            return [(outer_sum(by_block(grad, own.bone), by_block(x, own.bone)),) for own, grad, (x,) in triples]

        return results, of_parameters

    def _repeat(self, sums: int, dtype: torch.dtype) -> Tensor:
        """What repeats sums of blocks [n, sums] for each block of y; its transpose sums the blocks of y."""
        return _identity(self.bone.shape[1], self.base.out_features, dtype, self.bone.device, sums)


@functools.cache
def _identity(r: int, features: int, dtype: torch.dtype, device: torch.device, rows: int = 0) -> Tensor:
    """The identity of size r side by side, cut at its last column [r, features], and again below it up to `rows`.

    The first step, which is never a recorded one, makes it.
    """
    identity = torch.eye(r, dtype=dtype, device=device)
    return identity.repeat(max(rows // r, 1), -(-features // r))[:, :features].contiguous()


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
