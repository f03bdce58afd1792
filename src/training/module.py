"""The LightningModule: a model, an objective, and the optimizer of what is trainable."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from src.adapters.method import Method
from src.adapters.turns import LayerTurns
from src.config import TrainConfig
from src.data.passes import Lookahead, PassDataset
from src.data.rounding import EXACT, FEW_SHAPES
from src.model.language_model import LanguageModel
from src.model.recompute import gradients_come_again
from src.ops import adam
from src.ops.kernels import Kernel
from src.training.aside import Sight
from src.training.chunk_graphs import ChunkRecorder
from src.training.chunks import ChunkedObjective, ChunkOptions
from src.training.device_updates import DeviceUpdates
from src.training.flat_updates import PIECE_MULTIPLE, FlatUpdates, as_one, shares_of, updates_flat
from src.training.graphs import GraphedObjective, may_record, may_record_chunks
from src.training.joined import Joined, joins
from src.training.objectives import Objective, Outcome, Scored, Staged, outcome_of
from src.training.offload import KeptOnHost
from src.training.optimizers import GRADIENT_CLIP, make_optimizer
from src.training.replicas import average
from src.training.sharded import gather_by_layer
from src.training.updates import TensorUpdates, UnitUpdates, leaves_gradients

FP16_LOSS_SCALE = 4096.0
"""fp16 gradients of activations underflow near 6e-8; losses are scaled by this and gradients divided by it."""


def records_steps(config: TrainConfig, method: Method, model: LanguageModel) -> bool:
    """Whether a run's steps may be recorded as CUDA graphs."""
    return may_record(config, method) and model.can_be_recorded


class TrainingModule(pl.LightningModule):
    """Drives a `LanguageModel` through an objective.

    Precision is the model's own business: activations and frozen weights have the computation dtype,
    trained tensors, their gradients and Adam's moments are fp32. The objective stages micro-batches on the host;
    where steps are recorded, the next one while the device works.

    Args:
        model: what is trained.
        objective: the loss.
        config: the flags.
        method: what is trained.
        dataset: the micro-batches.
        first_batch: number of the first of them.
        turns: layers that are trained by turns; None if nothing is.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: Scored,
        config: TrainConfig,
        method: Method,
        dataset: PassDataset[Any],
        first_batch: int = 0,
        turns: LayerTurns | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.turns = turns
        self.graphed: GraphedObjective | None = None
        self.look_again()
        self.method = method
        records = records_steps(config, method, model)
        limit_gib = config.memory_gib if config.grad_cp == 2 else 0.0  # what the flag says it limits
        accumulated = config.accumulate_grad_batches
        self._without_engine = not config.has_engine
        self._ends_step = False
        recorder = None
        if records and may_record_chunks(config, method):
            by_layer = config.chunk_keep == "inputs"
            recorder = ChunkRecorder(
                model, config.chunk_ctx, limit_gib, by_layer=by_layer, lends_gradients=accumulated == 1
            )
        self.objective: Objective = _in_chunks(objective, config, recorder)
        records = records and objective.recordable
        self._leaves_gradients = leaves_gradients(config, method)
        kernels = kernels_of_updates(config, method)
        has_kernels = bool(kernels) and adam.kernels_are_available(kernels, model.device)
        self._by_kernels = has_kernels and self._without_engine
        self.updates_flat = updates_flat(config, method) and (has_kernels or model.device.type == "cpu")
        if method.in_place:
            # An engine wants to be handed gradients. Updates that are the host's cannot be recorded, nor can those
            # that wait in mid-backward for other processes, which may be about to record something else.
            by_host = not self._by_kernels or config.processes > 1
            records = records and self._without_engine and not (config.fused_update and by_host)
        if records:
            self.graphed = GraphedObjective(
                self.objective,
                model,
                limit_gib,
                lends_gradients=accumulated == 1,
                share=1 / accumulated if self._leaves_gradients else None,
            )
        # Filled up, a row that is a chunk must not become two.
        rounding = FEW_SHAPES if records and FEW_SHAPES.tokens(config.chunk_ctx) == config.chunk_ctx else EXACT
        self.batches = Lookahead(
            lambda step: self.objective.stage(model, dataset.rounded(step, rounding)), len(dataset), first_batch
        )
        self.loss_scale = FP16_LOSS_SCALE if model.compute_dtype == torch.float16 else 1.0
        self.outcome: Outcome | None = None
        self.updates: UnitUpdates | None = None
        self.joined: Joined | None = None
        self.flat: FlatUpdates | None = None
        if self.loss_scale != 1.0:
            for _, parameter in self.optimized():
                parameter.register_hook(self._unscaled)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        """A parameter's gradient without the loss's scale, once."""
        return gradient if gradients_come_again() else gradient / self.loss_scale

    def trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(checkpoint key, parameter) of everything that is trained."""
        return [(name, p) for name, p in self._parameters_by_key if p.requires_grad]

    def optimized(self) -> list[tuple[str, nn.Parameter]]:
        """The optimizer's parameters: the same from first to last, and in one order, whichever layers have a turn."""
        if self.turns is None:
            return list(self.trained())
        of_turns = list(self.turns.parameters())
        passing = {parameter for _, parameter in of_turns}
        return [(name, parameter) for name, parameter in self.trained() if parameter not in passing] + of_turns

    def look_again(self) -> None:
        """Takes note of which parameters the model has, after some have taken others' places."""
        self._parameters_by_key = list(self.model.named_parameters())  # to walk through them takes half a millisecond
        if self.graphed:
            self.graphed.look_again()

    def on_fit_start(self) -> None:
        """The engine, if there is one, has taken the model over."""
        if self.joined:
            self.joined.tie()
        if self.flat:
            self.flat.tie(*self.wholes)
        gather_by_layer(self, self.model)
        self.model.take_room()

    def train_dataloader(self) -> Lookahead[Staged]:
        """Staged micro-batches, epoch after epoch."""
        return self.batches

    def training_step(self, batch: Staged, batch_idx: int) -> Tensor:
        """Loss of one micro-batch; `outcome` keeps the numbers to log."""
        self.outcome = None  # what it would log belongs to a recording, which may have to go
        accumulated = self.config.accumulate_grad_batches
        replaced = self.graphed is not None and self._leaves_gradients and accumulated == 1  # by a recorded step's
        self._ends_step = (batch_idx + 1) % accumulated == 0
        if self._without_engine and not replaced and batch_idx % accumulated == 0:
            for _, parameter in self.trained():
                parameter.grad = None  # before the forward, which then has their memory
        if self.updates:
            self.updates.begin()
        if self.graphed:
            outcome = self.graphed(batch)
            self.batches.look_ahead(self.graphed.send)
        else:
            with KeptOnHost(self.model) if self.config.offload_activations else contextlib.nullcontext():
                outcome = outcome_of(self.objective, self.model, batch, self.joined)
        self.outcome = Outcome(outcome.loss.detach(), outcome.logs)
        # DeepSpeed looks at gradients alone: a loss that is not finite makes them so.
        return outcome.loss * (self.loss_scale + 0 * outcome.loss.detach())

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Takes the step, and lets the device go on with the next one while the host looks at what this one was.

        Not with several processes: what they ask each other between two steps would be answered when that is over.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        alone = self.trainer.world_size == 1
        if alone and self.graphed and self.sight and self._ends_step and self.turns is None and not self._is_last:
            self.graphed.go_on(self.batches.ahead)

    @property
    def _is_last(self) -> bool:
        """Whether no step comes after this one."""
        last_epoch = self.trainer.current_epoch + 1 == self.trainer.max_epochs
        return bool(last_epoch and self.trainer.is_last_batch)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Comes between forward and backward, where a recorded step's gradients are there already."""
        if not self._without_engine:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_after_backward(self) -> None:
        """Averages a step's gradients over processes that no engine joins; those used up in the backward have been."""
        if self._ends_step and self._without_engine and not self.config.fused_update:
            average([parameter.grad for _, parameter in self.trained() if parameter.grad is not None])

    def on_train_end(self) -> None:
        """Lets go of moments and gradients, when everything else has seen the end.

        Lightning would copy the former to the host; and what comes after training has room for the base unpacked.
        """
        if self.flat:
            self.flat.forget_moments()
        if not self._without_engine:
            return
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
        if self.updates:
            self.updates.forget_moments()
        for _, parameter in self.optimized():
            parameter.grad = None

    @property
    def sight(self) -> Sight | None:
        """Of the optimizer, if it looks itself at a step's gradient, and takes none that is not finite."""
        if self.flat:
            return self.flat.sight
        return self.updates.sight if isinstance(self.updates, DeviceUpdates) else None

    @property
    def clips(self) -> bool:
        """Whether gradients are gigabytes, of which no further norm is formed: `clip` then is who clips."""
        return self.graphed is not None and self._leaves_gradients and not self.updates_clip

    @property
    def updates_clip(self) -> bool:
        """Whether the optimizer clips gradients as it reads them."""
        return self.config.updates_by_tensor or self._by_kernels or self.updates_flat

    def clip(self, norm: float) -> None:
        """Scales gradients of this norm down to the largest there may be."""
        if (factor := GRADIENT_CLIP / (norm + 1e-6)) < 1:
            torch._foreach_mul_(
                [parameter.grad for _, parameter in self.trained() if parameter.grad is not None], factor
            )

    def release_recordings(self) -> None:
        """Frees the memory of recorded steps, for work after training."""
        if self.graphed:
            self.graphed.turn_back()
        self.graphed = self.outcome = None
        if isinstance(self.objective, ChunkedObjective):
            self.objective.recorder = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves the batch on the host, from where it is copied to the device or to a recording's inputs."""
        return batch

    def cpu(self) -> TrainingModule:
        """Stays: Lightning would copy every weight to the host after the last step, where nobody wants it."""
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What `--optim` names, over the trained parameters."""
        named, shape = self.optimized(), self.model.shape
        weights = shape.parameter_shapes()
        factors = {name: self.method.rate_factor(shape, name) for name, _ in named}
        spared = {name for name, _ in named if name in weights and not shape.decays(name)}
        groups = parameter_groups(named, factors, self.config, spared)

        def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return make_optimizer(groups, self.config, on_gpu=self.model.device.type == "cuda")

        config = self.config
        constants = adam.Constants(config.beta1, config.beta2, config.adam_eps, GRADIENT_CLIP)
        packed = config.optim.endswith("8bit")
        if joins(config, self.method):
            names = {parameter: name for name, parameter in named}
            shares = shares_of(groups)
            if self.updates_flat:
                groups = [as_one(groups, config)]
            self.joined = Joined(groups, names, multiple=PIECE_MULTIPLE * config.processes)
            self.wholes = nn.ParameterList(self.joined.pieces)  # parameters of the module, as all that is optimized
            if self.graphed:
                self.graphed.joined = self.joined
            if not self.updates_flat:
                return make(self.joined.groups)
            (group,) = self.joined.groups
            self.flat = FlatUpdates(group, shares, constants, packed=packed)
            return self.flat
        if not self.updates_clip:
            return make(groups)
        seed, in_backward = config.random_seed, bool(config.fused_update)
        if self._by_kernels:
            self.updates = DeviceUpdates(
                groups,
                named,
                constants=constants,
                seed=seed,
                packed=packed,
                on_host=config.optim == "paged_adamw8bit",
                in_backward=in_backward,
                looks_itself=not in_backward and config.processes == 1,
            )
            self.model.emb.gives_rows = in_backward and config.one_backward
        else:
            self.updates = TensorUpdates(groups, named, make, clip=GRADIENT_CLIP, seed=seed, in_backward=in_backward)
        self.updates.average = average
        if self.graphed:
            self.graphed.updates = self.updates if in_backward else None
        return self.updates


def kernels_of_updates(config: TrainConfig, method: Method) -> tuple[Kernel, ...]:
    """What updates all that is trained on a GPU: in one launch, or tensor by tensor in the backward.

    Nothing where a library's optimizer does: under DeepSpeed's engine, unless it is given wholes, with Lion, which is
    bitsandbytes', and with moments that move between GPU and host as memory allows. Updates by tensor keep those in
    pinned memory.
    """
    pages = config.optim == "paged_adamw8bit" and not config.updates_by_tensor
    by_engine = config.has_engine and not updates_flat(config, method)
    if by_engine or config.optim == "lion8bit" or pages:
        return ()
    dtypes = [torch.float32, *([torch.bfloat16] if config.weights == "bf16" else [])]
    return adam.kernels_for(dtypes, packed=config.optim.endswith("8bit"), singly=bool(config.fused_update))


def _in_chunks(objective: Scored, config: TrainConfig, recorder: ChunkRecorder | None) -> Objective:
    """The objective, with rows cut into chunks if the flags say so."""
    if not config.chunk_ctx:
        return objective
    keep = config.chunk_keep
    options = ChunkOptions(config.chunk_ctx, config.bptt_chunks, on_host=keep != "device", with_inputs=keep == "inputs")
    return ChunkedObjective(objective, options, recorder)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    factors: Mapping[str, float],
    config: TrainConfig,
    spared: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Optimizer groups, of one dtype: each has `lr_scale`, a factor on the schedule, and `decays`, whether weight decay
    acts.

    Weight decay acts on tensors of two and more axes, but for those `spared`.
    """
    members: dict[tuple[float, bool, torch.dtype], list[nn.Parameter]] = {}
    for name, parameter in named:
        decays = config.weight_decay > 0 and parameter.squeeze().ndim >= 2 and name not in spared
        # An engine makes one flat tensor of a group.
        members.setdefault((factors[name], decays, parameter.dtype), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr_init * scale,
            "lr_scale": scale,
            "weight_decay": config.weight_decay if decays else 0.0,
            "decays": decays,
        }
        for (scale, decays, _), parameters in members.items()
    ]
