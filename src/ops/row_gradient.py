"""The gradient of a table of which a few rows were read, with memory for those only.

An embedding of 65,536 rows is read at the places of one batch; as a dense tensor its gradient would be nearly all
zeros. All sizes here are those of the batch, so that nothing waits for the device and the work can be recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowGradient:
    """Sums over the places where each row was read.

    Attributes:
        values: [T, C], a row's gradient at the last place where it was read, 0 at the others; the gradient's dtype.
        places: int32 [V], that place of each row; -1 of those that were not read.
    """

    values: Tensor
    places: Tensor

    @classmethod
    def of(cls, gradient: Tensor) -> RowGradient:
        """Of a sparse gradient [V, C] as `F.embedding` gives it: a row's index for each of T places, not summed up."""
        assert gradient.is_sparse
        rows, values = gradient._indices()[0], gradient._values()
        count = len(rows)
        places = torch.full(gradient.shape[:1], -1, dtype=torch.int32, device=rows.device)
        numbers = torch.arange(count, dtype=torch.int32, device=rows.device)
        places.scatter_reduce_(0, rows, numbers, "amax")
        # Sums as a dense gradient has them, in the order of the places.
        summed = torch.ops.aten.embedding_dense_backward(values, places[rows].long(), count, -1, False)
        return cls(summed, places)

    def dense(self) -> Tensor:
        """[V, C]."""
        return torch.where(self.places.unsqueeze(1) >= 0, self.values[self.places.clamp(min=0).long()], 0)


def values_of(gradient: Tensor | RowGradient) -> Tensor:
    """All of a gradient's values that are not 0, as one tensor."""
    return gradient.values if isinstance(gradient, RowGradient) else gradient
