"""How much of a layer is kept for the backward pass: `--grad_cp`, and `--grad_cp 2` from free memory.

Keeping a layer's costly tensors saves its recomputation. Layers are alike, so the choice is a number: so
many layers recompute only their inputs, the others everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from src.model.parameters import ModelShape
from src.model.recompute import Recompute
from src.model.rwkv6 import RWKV6
from src.quant import SHARED_WORKSPACE, FrozenLinear

_WORKING_BYTES = 700 * 2**20
"""Kept free for what the estimate below does not see: library handles, logits of a chunk, fragmentation."""


@dataclass(frozen=True)
class MemoryPlan:
    """What `apply` does to a model.

    Attributes:
        light_layers: layers that recompute only norms and mixer inputs (`Recompute.INPUTS`).
        layers: of the model.
        keep_dequantized: whether recomputation and backward share one dequantisation.
    """

    light_layers: int
    layers: int
    keep_dequantized: bool

    def __str__(self) -> str:
        shared = ", one dequantisation for recomputation and backward" if self.keep_dequantized else ""
        return (
            f"{self.light_layers} of {self.layers} layers recompute only norms and mixing, "
            f"{self.layers - self.light_layers} everything{shared}"
        )

    def apply(self, model: RWKV6) -> None:
        """Sets the layers' modes; the last layers are the light ones, whose tensors live shortest."""
        for i, block in enumerate(model.blocks):
            light = i >= self.layers - self.light_layers
            block.recompute = Recompute.INPUTS if light else Recompute.ALL  # type: ignore[assignment]
        SHARED_WORKSPACE.keep_dequantized = self.keep_dequantized


def kept_bytes(shape: ModelShape, recompute: Recompute) -> int:
    """Bytes per token that one layer keeps between forward and backward, 16-bit activations.

    INPUTS: what enters both mixers, r, k, v, w_raw and the operator's checkpoints, y and gate, the feed-forward's
    hidden layer, its gate and value, the decay's hidden layer. ALL: what enters the layer.
    """
    C, A, F = shape.n_embd, shape.dim_att, shape.dim_ffn
    if recompute is Recompute.ALL:
        return 2 * C
    return 2 * (4 * C + 7 * A + F + shape.decay_lora_width)


def plan_memory(model: RWKV6, row_tokens: int, limit_gib: float) -> MemoryPlan:
    """Chooses as many light layers as fit.

    Args:
        model: on its GPU.
        row_tokens: most tokens of a micro-batch.
        limit_gib: device memory the run may use in all; 0 is the whole device.
    """
    shape = model.shape
    free, total = torch.cuda.mem_get_info(model.device)
    idle = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    used = total - free - idle
    limit = min(limit_gib * 2**30 or total, total)
    optimizer = shape.state_parameter_count * 4 * 6
    passing = row_tokens * 2 * (12 * shape.n_embd + 12 * shape.dim_att + 3 * shape.dim_ffn)
    available = limit - used - optimizer - passing - _WORKING_BYTES

    heavy = row_tokens * kept_bytes(shape, Recompute.ALL)
    light = row_tokens * kept_bytes(shape, Recompute.INPUTS)
    available -= heavy * shape.n_layer
    count = int(max(0, min(shape.n_layer, available // (light - heavy))))
    dense = _layer_matrix_bytes(model)
    left = available - count * (light - heavy)
    return MemoryPlan(count, shape.n_layer, keep_dequantized=count < shape.n_layer and 0 < dense <= left)


def _layer_matrix_bytes(model: RWKV6) -> int:
    """Bytes of one layer's matrices in 16 bits, 0 when they are not packed."""
    block = model.blocks[0]
    return sum(2 * m.out_features * m.in_features for m in block.modules() if isinstance(m, FrozenLinear))
