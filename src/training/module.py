"""The LightningModule: a model, an objective, and the optimizer of what is trainable."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from src.config import TrainConfig
from src.errors import UserError
from src.model.rwkv6 import RWKV6
from src.training.graphs import GraphedObjective, can_be_recorded
from src.training.objectives import Objective, Outcome, outcome_of
from src.training.offload import KeptOnHost

FP16_LOSS_SCALE = 4096.0
"""fp16 gradients of activations underflow near 6e-8; losses are scaled by this and gradients divided by it."""


class TrainingModule(pl.LightningModule):
    """Drives an `RWKV6` through an objective.

    Precision is the model's own business: activations and frozen weights have the computation dtype,
    trained tensors, their gradients and Adam's moments are fp32. Batches stay on the host; the objective
    stages what the device needs.

    Args:
        model: what is trained.
        objective: the loss.
        config: the flags.
        following: makes the micro-batch after the one in work, so that it can be staged meanwhile.
    """

    def __init__(
        self,
        model: RWKV6,
        objective: Objective,
        config: TrainConfig,
        following: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.config = config
        self.following = following
        wanted = config.cuda_graph and config.trains_states and not config.dropout and not config.offload_activations
        records = wanted and objective.recordable and can_be_recorded(model)
        limit_gib = config.memory_gib if config.grad_cp == 2 else 0.0  # what the flag says it limits
        self.graphed = GraphedObjective(objective, model, limit_gib) if records else None
        self.loss_scale = FP16_LOSS_SCALE if model.compute_dtype == torch.float16 else 1.0
        self.outcome: Outcome | None = None
        if self.loss_scale != 1.0:
            for _, parameter in self.trained():
                parameter.register_hook(lambda gradient: gradient / self.loss_scale)

    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(checkpoint key, parameter) of everything that is trained."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one micro-batch; `outcome` keeps the numbers to log."""
        self.outcome = None  # what it would log belongs to a recording, which may have to go
        if self.graphed:
            outcome = self.graphed(batch)
            if self.following is not None:
                with contextlib.suppress(UserError, OSError):  # raised again when that batch's turn comes, if it does
                    self.graphed.look_ahead(self.following())
        else:
            with KeptOnHost(self.model) if self.config.offload_activations else contextlib.nullcontext():
                outcome = outcome_of(self.objective, self.model, batch)
        self.outcome = Outcome(outcome.loss.detach(), outcome.logs)
        # DeepSpeed looks at gradients alone: a loss that is not finite makes them so.
        return outcome.loss * (self.loss_scale + 0 * outcome.loss.detach())

    def release_recordings(self) -> None:
        """Frees the memory of recorded steps, for work after training."""
        self.graphed = self.outcome = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves the batch on the host: the embedding table may be there, and lengths are needed there."""
        return batch

    def cpu(self) -> TrainingModule:
        """Stays: Lightning would copy every weight to the host after the last step, where nobody wants it."""
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, or AdamW when there is weight decay."""
        config = self.config
        groups = parameter_groups(self.trained(), config)
        adam: Callable[..., torch.optim.Optimizer]
        if config.strategy.endswith("offload") and self.model.device.type == "cuda":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(  # type: ignore[no-any-return]
                groups,
                lr=config.lr_init,
                betas=(config.beta1, config.beta2),
                eps=config.adam_eps,
                adamw_mode=config.weight_decay > 0,
            )
        adam = torch.optim.AdamW if config.weight_decay > 0 else torch.optim.Adam
        return adam(
            groups,
            lr=config.lr_init,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            fused=self.model.device.type == "cuda",
        )


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> list[dict[str, Any]]:
    """Optimizer groups: each has `lr_scale`, a factor on the schedule, and `decays`, whether weight decay acts.

    With full training and `--layerwise_lr 1` the bare `time_decay` vectors learn twice as fast. Weight decay
    acts on tensors of two and more axes.
    """
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        twice = config.layerwise_lr and not config.trains_states and name.endswith("time_decay")
        decays = config.weight_decay > 0 and parameter.squeeze().ndim >= 2
        members.setdefault((2.0 if twice else 1.0, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr_init * scale,
            "lr_scale": scale,
            "weight_decay": config.weight_decay if decays else 0.0,
            "decays": decays,
        }
        for (scale, decays), parameters in members.items()
    ]
