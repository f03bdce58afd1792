"""Adapters of the form y = W x + U (scale · D x), with narrow matrices D [r, in] and U [out, r].

Their four small products, two forward and two backward, and the gradients of what is trained are those of several
adapters at once (`ops.products`). The wide product comes last and adds itself to U's: a sum in fp32, rounded once, and
of long tensors faster than the narrow product would add itself to them. Where x has room behind its rows for
scale · D x, and W for U, it is a single product, [x, scale · D x] @ [W, U]ᵀ. A layer that is computed again has
scale · D x from its first pass (`FirstPass`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from src.adapters.adapter import Adapter, Kept, OfParameters
from src.model.first_pass import FirstPass
from src.ops.products import behind, copy_each, has_room, products, side_by_side, with_room


class LowRank(Adapter):
    """See the module.

    Attributes:
        scale: factor on what is added.
    """

    scale: float = 1.0
    _first_pass: FirstPass | None = None
    _number = 0

    @property
    @abstractmethod
    def rank(self) -> int:
        """r."""

    @abstractmethod
    def down(self, dtype: torch.dtype) -> Tensor:
        """D [r, in], outside autograd."""

    @abstractmethod
    def up(self, dtype: torch.dtype) -> Tensor:
        """U [out, r], outside autograd."""

    @staticmethod
    @abstractmethod
    def kept_of(x: Tensor, hidden: Tensor) -> Kept:
        """What is kept of x [n, in] and scale · D x [n, r]; the latter stands last."""

    @staticmethod
    @abstractmethod
    def parameter_gradients(
        kept: Sequence[Kept], grads: Sequence[Tensor], grads_hidden: Sequence[Tensor]
    ) -> list[tuple[Tensor, ...]]:
        """Of each adapter, from the gradients of y [n, out] and of D x [n, r]."""

    @staticmethod
    def narrow_values(r: int) -> int:
        """See Adapter."""
        return r

    def remember_with(self, layer: FirstPass) -> None:
        """See Adapter."""
        self._first_pass, self._number = layer, layer.add()

    def remembers(self) -> Tensor | None:
        """See Linear."""
        return None if self._first_pass is None else self._first_pass.known(self._number)

    def joins(self, others: Sequence[object]) -> bool:
        """See Adapter; of equal ranks and scales, too."""

        def alike(other: object) -> bool:
            return isinstance(other, LowRank) and (other.rank, other.scale) == (self.rank, self.scale)

        return super().joins(others) and all(map(alike, others))

    @classmethod
    def joint_kept(
        cls, adapters: Sequence[Any], inputs: Sequence[Tensor], known: Sequence[Tensor | None] = ()
    ) -> list[Kept]:
        """See Adapter."""
        given = known or [adapter.remembers() for adapter in adapters]
        hidden = [each for each in given if each is not None]
        if len(hidden) < len(adapters):
            hidden = products(inputs, [adapter.down(inputs[0].dtype).t() for adapter in adapters], adapters[0].scale)
            for adapter, each in zip(adapters, hidden, strict=True):
                adapter._note(each)
        return [cls.kept_of(*pair) for pair in zip(inputs, hidden, strict=True)]

    @classmethod
    def joint_products(cls, adapters: Sequence[Any], inputs: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
        """See Adapter."""
        dtype = inputs[0].dtype
        if all(map(cls._lies_for_one_product, adapters, inputs)):
            return cls._single_products(adapters, inputs, kept)
        results = products([each[-1] for each in kept], [adapter.up(dtype).t() for adapter in adapters])
        for adapter, x, y in zip(adapters, inputs, results, strict=True):
            adapter.base.add_product(x, y)
        return results

    @classmethod
    def joint_gradients(cls, adapters: Sequence[Any], grads: Sequence[Tensor]) -> tuple[list[Tensor], OfParameters]:
        """See Adapter."""
        dtype = grads[0].dtype
        grads_hidden = products(grads, [adapter.up(dtype) for adapter in adapters], adapters[0].scale)
        results = products(grads_hidden, [adapter.down(dtype) for adapter in adapters])
        for adapter, grad, grad_x in zip(adapters, grads, results, strict=True):
            adapter.base.add_gradient(grad, grad_x)
        return results, lambda kept: cls.parameter_gradients(kept, grads, grads_hidden)

    @classmethod
    def _single_products(cls, adapters: Sequence[Any], inputs: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
        """[x, scale · D x] @ [W, U]ᵀ of each."""
        r, like = adapters[0].rank, inputs[0]
        copy_each([behind(x, r) for x in inputs], [each[-1] for each in kept])
        adapters[0].up(like.dtype)  # with it the layer's others are cast, and U behind W
        results = side_by_side([(like.shape[0], adapter.base.out_features) for adapter in adapters], like)
        for adapter, x, y in zip(adapters, inputs, results, strict=True):
            torch.mm(with_room(x, r), with_room(adapter.base.weight, r).t(), out=y)
        return results

    def _lies_for_one_product(self, x: Tensor) -> bool:
        base: Any = self.base
        lies = self.room > 0 and has_room(x, self.room) and has_room(base.weight, self.room)
        return lies and x.dtype is base.weight.dtype

    def _note(self, hidden: Tensor) -> None:
        if self._first_pass is not None:
            self._first_pass.note(self._number, hidden)
