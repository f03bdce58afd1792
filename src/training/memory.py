"""How much of a layer is kept for the backward pass: `--grad_cp`, and `--grad_cp 2` from free memory.

Keeping a layer's costly tensors saves its recomputation. Layers are alike, so the choice is two numbers: so
many layers recompute only their inputs, so many nothing, the others everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from src.model.parameters import ModelShape
from src.model.recompute import Recompute
from src.model.rwkv6 import RWKV6
from src.ops.elementwise import fused_kernels
from src.quant import SHARED_WORKSPACE, FrozenLinear

_WORKING_BYTES = 700 * 2**20
"""Kept free for what the estimate below does not see: library handles, logits of a chunk, fragmentation."""


@dataclass(frozen=True)
class MemoryPlan:
    """What `apply` does to a model.

    Attributes:
        layers: of the model.
        light_layers: layers that recompute only norms and mixer inputs (`Recompute.INPUTS`).
        whole_layers: layers that recompute nothing (`Recompute.NOTHING`).
        keep_dequantized: whether recomputation and backward share one dequantisation, for which one layer's
            dense time mix has to be kept.
    """

    layers: int
    light_layers: int = 0
    whole_layers: int = 0
    keep_dequantized: bool = False

    def __str__(self) -> str:
        counts = {
            "everything": self.layers - self.light_layers - self.whole_layers,
            "only norms and mixing": self.light_layers,
            "nothing": self.whole_layers,
        }
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        shared = "; one dequantisation for recomputation and backward" if self.keep_dequantized else ""
        return f"of {self.layers} layers the backward pass recomputes: {', '.join(parts)}{shared}"

    def apply(self, model: RWKV6) -> None:
        """Sets the layers' modes; the last layers keep most, whose tensors live shortest."""
        modes = [Recompute.NOTHING] * self.whole_layers + [Recompute.INPUTS] * self.light_layers
        modes += [Recompute.ALL] * (self.layers - len(modes))
        for block, mode in zip(model.blocks, reversed(modes), strict=True):
            block.recompute = mode  # type: ignore[assignment]
        SHARED_WORKSPACE.keep_dequantized = self.keep_dequantized


def kept_bytes(shape: ModelShape, recompute: Recompute, *, fused: bool = True) -> int:
    """Bytes per token that one layer keeps between forward and backward, 16-bit activations.

    ALL: what enters the layer. INPUTS: besides, what enters the second mixer, r, k, v, w_raw and the operator's
    checkpoints, y and gate, the feed-forward's hidden layer and its gate, the decay's hidden layer. NOTHING: besides,
    the first norm's output and the hidden layer that makes the modulation of its five mixes. Where element-wise
    operators are not `fused` they keep more: the gated value and its gate, and the modulation.
    """
    C, A, F = shape.n_embd, shape.dim_att, shape.dim_ffn
    everything_again = 2 * C
    if recompute is Recompute.ALL:
        return everything_again
    inputs_again = everything_again + 2 * ((2 if fused else 5) * C + 7 * A + F + shape.decay_lora_width)
    if recompute is Recompute.INPUTS:
        return inputs_again
    return inputs_again + 2 * ((1 if fused else 6) * C + 5 * shape.mix_lora_width)


def plan_memory(model: RWKV6, row_tokens: int, limit_gib: float) -> MemoryPlan:
    """Chooses as many light layers as fit, and when all are, as many whole ones.

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

    def layers_that_fit(extra_bytes: int) -> int:
        return int(max(0, min(shape.n_layer, available // (row_tokens * extra_bytes))))

    fused = model.compute_dtype is torch.bfloat16 and fused_kernels() is not None
    everything, inputs, nothing = (
        kept_bytes(shape, mode, fused=fused) for mode in (Recompute.ALL, Recompute.INPUTS, Recompute.NOTHING)
    )
    available -= row_tokens * everything * shape.n_layer
    light = layers_that_fit(inputs - everything)
    available -= row_tokens * (inputs - everything) * light
    if light == shape.n_layer:
        whole = layers_that_fit(nothing - inputs)
        return MemoryPlan(shape.n_layer, light_layers=light - whole, whole_layers=whole)
    keeps = 0 < _time_mix_matrix_bytes(model) <= available
    return MemoryPlan(shape.n_layer, light_layers=light, keep_dequantized=keeps)


def _time_mix_matrix_bytes(model: RWKV6) -> int:
    """Bytes of one layer's time-mix matrices in 16 bits, 0 when they are not packed."""
    mixer = model.blocks[0].att
    assert isinstance(mixer, nn.Module)
    return sum(2 * m.out_features * m.in_features for m in mixer.modules() if isinstance(m, FrozenLinear))
