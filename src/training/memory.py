"""What fits into memory: sizes that cannot, and how much of a layer is kept for the backward pass (`--grad_cp`).

Keeping a layer's costly tensors saves its recomputation. Layers are alike, so the choice is two numbers: so
many layers recompute only their inputs, so many nothing, the others everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from src.config import TrainConfig
from src.device import require_memory
from src.model.language_model import LanguageModel
from src.model.recompute import Recompute
from src.model.shape import ModelShape

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

    def apply(self, model: LanguageModel) -> None:
        """Sets the layers' modes; the last layers keep most, whose tensors live shortest."""
        modes = [Recompute.NOTHING] * self.whole_layers + [Recompute.INPUTS] * self.light_layers
        modes += [Recompute.ALL] * (self.layers - len(modes))
        model.set_recomputation(modes[::-1], keep_dequantized=self.keep_dequantized)


def require_memory_of_run(config: TrainConfig, device: torch.device, shape: ModelShape, positions: int) -> None:
    """Refuses sizes that no way of training could fit into the device's memory, before anything is allocated.

    Counted is what has to be there in any case: the weights of a fresh model in fp32 on the host, and in 2 bytes a
    value what enters each layer at every position of a micro-batch. Real runs take several times as much.

    Args:
        config: the flags.
        device: where the run computes.
        shape: of the model.
        positions: most of a micro-batch.

    Raises:
        ConfigError: naming the flags, what they need and what there is.
    """
    host = torch.device("cpu")
    if not config.load_model:
        sizes = f"--n_layer {shape.n_layer} --n_embd {shape.n_embd} --vocab_size {shape.vocab_size}"
        require_memory(f"a fresh model of {sizes}", "choose smaller ones", shape.parameter_count * 4, host)
    limit = "rlhf_max_corpus_len" if config.preference else "ctx_len"
    require_memory(
        f"--{limit} {getattr(config, limit)} with --micro_bsz {config.micro_bsz}, {positions:,} positions at a time,",
        "lower them",
        positions * shape.n_embd * shape.n_layer * 2,
        host if config.offload_activations else device,
    )


def plan_memory(model: LanguageModel, row_tokens: int, limit_gib: float) -> MemoryPlan:
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
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    optimizer = trained * 4 * 6
    passing = row_tokens * 2 * (12 * shape.n_embd + 12 * shape.dim_att + 3 * shape.dim_ffn)
    available = limit - used - optimizer - passing - _WORKING_BYTES

    def layers_that_fit(extra_bytes: int) -> int:
        return int(max(0, min(shape.n_layer, available // (row_tokens * extra_bytes))))

    everything, inputs, nothing = map(model.kept_bytes, (Recompute.ALL, Recompute.INPUTS, Recompute.NOTHING))
    available -= row_tokens * everything * shape.n_layer
    light = layers_that_fit(inputs - everything)
    available -= row_tokens * (inputs - everything) * light
    if light == shape.n_layer:
        whole = layers_that_fit(nothing - inputs)
        return MemoryPlan(shape.n_layer, light_layers=light - whole, whole_layers=whole)
    keeps = 0 < model.dense_time_mix_bytes <= available
    return MemoryPlan(shape.n_layer, light_layers=light, keep_dequantized=keeps)
