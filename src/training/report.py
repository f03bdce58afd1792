"""What a run says: its plan before, its summary after, and advice when memory runs out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from src.adapters.lisa import Lisa
from src.adapters.method import Method
from src.config import TrainConfig
from src.config.model import quant_name
from src.config.templates import TEMPLATE_NAMES
from src.device import global_rank, memory_bytes
from src.model.shape import ModelShape
from src.output import several
from src.schedule import Schedule
from src.training.console import tell
from src.training.engine import Hardware
from src.training.evaluation import HeldOut
from src.training.graphs import may_record_chunks
from src.training.memory import bytes_of_trained
from src.training.results import ends_of
from src.training.work import Work, epochs_of

if TYPE_CHECKING:
    from src.training.callbacks import TrainingMonitor

_WORTH_SAYING = 2**25
"""Bytes; what an engine takes beside states is less."""


def say(text: str = "") -> None:
    """Prints on rank 0 only."""
    if global_rank() == 0:
        tell(text)


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        final_file: the last checkpoint written.
        files: every checkpoint written, in order.
        losses: training loss of every optimizer step.
        before, after: measurements on held-out data, None without held-out data.
        unpacked: the same after a run on a packed base, with that base unpacked; None where it was not measured.
        stopped_by: name of the signal that ended the run early, or None.
        go_on: the command that continues the run, or "".
        template: in which one talks to what was trained; None if one cannot.
        merged_note: what clients leave out of a model with what was trained in it; "" if nothing.
    """

    final_file: Path
    files: list[Path]
    losses: list[float]
    before: HeldOut | None
    after: HeldOut | None
    unpacked: HeldOut | None
    stopped_by: str | None
    go_on: str = ""
    template: str | None = TEMPLATE_NAMES[0]
    merged_note: str = ""


def beginning_of(config: TrainConfig) -> str:
    """What a run begins with is called."""
    return "loaded" if config.load_state or config.load_adapter else "untuned"


def counted(parameters: int) -> str:
    """A number of weights in billions or millions."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 10**8 else f"{parameters / 1e6:.3g} M"


def plan_of(
    config: TrainConfig,
    method: Method,
    hardware: Hardware,
    shape: ModelShape,
    work: Work,
    schedule: Schedule,
    folder: Path,
) -> str:
    """What will be trained on what, how long, and where results go: a line each, before the model is read."""
    steps_per_epoch = work.batches_per_epoch // config.accumulate_grad_batches
    steps = steps_per_epoch * epochs_of(config)
    rates = _course_of_rate(schedule, steps)
    packed = "matrices and head" if config.quant_head else "matrices"
    weights = f"{quant_name(config.quant_type)} {packed}" if config.quantised else "unquantised"
    batch = config.micro_bsz * config.accumulate_grad_batches * config.processes
    if config.preference:
        size = f"{several(batch, 'pair')} a step at most, longest text {config.rlhf_max_corpus_len}"
    elif config.dataload == "pack":
        size = f"{batch * config.ctx_len:,} positions a step at most, ctx_len {config.ctx_len}"
    else:
        size = f"{several(batch, 'row')} a step at most, ctx_len {config.ctx_len}"
    warm_up = f"warm-up {several(schedule.warmup_steps, 'step')}"
    if 0 < schedule.warmup_steps < steps:
        highest = max(schedule.learning_rate(schedule.warmup_steps + step) for step in (-1, 0))
        warm_up += f", which end at {highest:.4g}"
    if schedule.warmup_steps >= steps:
        warm_up += f", the run has {steps}: the rate never reaches --lr_init"
    return "\n".join(
        [
            f"model      {config.load_model or 'fresh'}: {shape.family}, {counted(shape.parameter_count)} parameters, "
            f"{shape.n_layer} layers, n_embd {shape.n_embd}, {several(shape.n_head, 'head')} of {shape.head_size}, "
            f"{weights}",
            f"training   {method.describe(shape)}",
            f"hardware   {hardware.describe()}, grad_cp {config.grad_cp}",
            *(engine_alone(config, method, shape) if hardware.has_engine else []),
            *work.lines,
            f"steps      {steps:,} ({several(epochs_of(config), 'epoch')} of {steps_per_epoch:,}), {size}",
            *_rounded(config, work),
            *_in_chunks(config, method, hardware),
            f"rate       {rates} (start, middle, end); {warm_up}",
            *other_rates(method, shape, schedule, steps),
            f"results    {folder}/",
        ]
    )


def _course_of_rate(schedule: Schedule, steps: int, factor: float = 1.0) -> str:
    return ", ".join(f"{factor * schedule.learning_rate(step):.4g}" for step in (0, steps // 2, max(steps - 1, 0)))


def other_rates(method: Method, shape: ModelShape, schedule: Schedule, steps: int) -> list[str]:
    """A line on what does not learn at the rate itself, as the optimizer's groups have it; none if all does."""
    states, weights = shape.state_shapes(), shape.parameter_shapes()
    apart: dict[str, str] = {}
    in_turn = [name for name in weights if name.startswith("blocks.")] if isinstance(method, Lisa) else []
    for name in [*method.trained_names(shape), *in_turn]:
        if (factor := method.rate_factor(shape, name)) == 1:
            continue
        course = _course_of_rate(schedule, steps, factor)
        if name in states:
            apart["states"] = f"{course} (--lr_state)"
        elif name in weights:
            apart[name.rsplit(".", 1)[-1]] = f"{course} (--layerwise_lr)"
        else:
            apart["LoRA's B"] = f"{course} (--lora_plus)"
    return ["           " + "; ".join(f"{what}: {course}" for what, course in apart.items())] if apart else []


def engine_alone(config: TrainConfig, method: Method, shape: ModelShape) -> list[str]:
    """What an engine takes that was asked for where there is one GPU."""
    if config.processes > 1:
        return []
    without = dataclasses.replace(config, strategy="auto")
    extra = bytes_of_trained(config, method, shape) - bytes_of_trained(without, method, shape)
    if extra < _WORTH_SAYING:
        return []
    what = f"DeepSpeed's masters and gradients take {extra / 2**30:.2f} GiB more"
    return [f"           on one GPU {what} than --strategy auto, which trains without it"]


def _rounded(config: TrainConfig, work: Work) -> list[str]:
    """Says so when an epoch is longer than asked for, to end with a whole optimizer step."""
    added = work.batches_per_epoch - config.epoch_steps
    if not config.epoch_steps or not added:
        return []
    return [
        f"           --epoch_steps {config.epoch_steps} is rounded up to {work.batches_per_epoch}, a multiple of "
        f"--accumulate_grad_batches {config.accumulate_grad_batches}"
    ]


def _in_chunks(config: TrainConfig, method: Method, hardware: Hardware) -> list[str]:
    """How long rows are computed."""
    if not config.chunk_ctx:
        return []
    gradient = "the gradient of whole rows"
    if config.bptt_chunks:
        gradient = f"gradients within {several(config.bptt_chunks, 'chunk')}"
    places = {
        "device": "",
        "host": "; what chunks begin from waits in host memory",
        "inputs": "; what chunks and layers begin from waits in host memory",
    }
    lines = [f"chunks     of {config.chunk_ctx:,} tokens where a row has more: {gradient}{places[config.chunk_keep]}"]
    if config.bptt_chunks and config.trains_states:
        first = f"{config.bptt_chunks} chunks" if config.bptt_chunks > 1 else "chunk"
        lines.append(f"           so that states learn nothing from what stands behind a document's first {first}")
    if hardware.on_gpu:
        ways = "--chunk_keep inputs saves a forward pass, or --grad_cp 0 or 2 if what the layers keep of a chunk fits"
        by_layer = config.chunk_keep == "inputs"
        recorded = may_record_chunks(config, method) and hardware.compute_dtype is torch.bfloat16
        replayed = "of one shape are recorded once and replayed" if recorded else "are not recorded"
        lines.append(f"           chunks {replayed}{f'; {ways}' if config.grad_cp == 1 and not by_layer else ''}")
    return lines


def _course(losses: list[float]) -> str:
    """Training loss at both ends of the run, in words."""
    ends = ends_of(losses)
    scope = f" (means of the first and last {ends['over']} steps)" if ends["over"] > 1 else ""
    return f"loss {ends['first']:.4f} -> {ends['last']:.4f}{scope}"


def summary_of(config: TrainConfig, method: Method, result: RunResult, monitor: TrainingMonitor) -> str:
    """What came of the run, and the next commands: a line each."""
    lines = [""]
    if result.stopped_by:
        lines.append(f"stopped by {result.stopped_by} after {len(result.losses)} steps; the state so far is saved")
    if result.losses:
        lines.append(f"steps      {len(result.losses):,}, {_course(result.losses)}")
    steady = sorted(monitor.step_seconds[2:])
    if steady:
        lines.append(f"speed      {steady[len(steady) // 2]:.3f} s/step (median)")
    if monitor.used_bytes:
        peak, used = monitor.peak_bytes / 2**30, monitor.used_bytes / 2**30
        lines.append(f"memory     allocator peak {peak:.2f} GiB, device used {used:.2f} GiB")
    if result.before is not None and result.after is not None:
        lines += [f"held out   before: {result.before}", f"           after:  {result.after}"]
    if result.unpacked is not None:
        lines.append(f"           after, on the unpacked base: {result.unpacked}")
    if result.before is not None and result.after is not None and result.after.score > result.before.score:
        lines.append(f"           worse than before training: begin again with less than --lr_init {config.lr_init:g}")
    lines.append(f"saved      {', '.join(str(path) for path in result.files)}")
    if result.go_on:
        lines += ["go on      with what is left of the run:", f"           {result.go_on}"]
    made = result.final_file
    lines += method.next_steps(config.load_model, made, config.proj_dir, result.template, result.merged_note)
    return "\n".join(lines)


def memory_advice(config: TrainConfig, method: Method, hardware: Hardware, fitting_chunk: int = 0) -> str:
    """One sentence for a device that is full: its size and the three cheapest changes, in order.

    Args:
        config: the flags that were too much for it.
        method: what is trained.
        hardware: the device.
        fitting_chunk: tokens of a chunk that fits by the estimate; 0: not known, half of what did not fit is named.
    """
    total_bytes = memory_bytes(hardware.device)
    whose = "memory" if total_bytes is None else f"its {total_bytes / 2**30:.1f} GiB"
    name = "GPU" if hardware.on_gpu else "machine"
    changes = []
    if config.grad_cp != 1:
        changes.append("--grad_cp 1")
    if config.micro_bsz > 1:
        accumulate = config.accumulate_grad_batches * 2
        changes.append(f"--micro_bsz {config.micro_bsz // 2} --accumulate_grad_batches {accumulate}")
    if config.method == "full" and not config.uses_deepspeed:
        if config.weights == "fp32" or not config.optim.endswith("8bit"):
            by_layer = "" if config.accumulate_grad_batches > 1 else " --fused_update 1"
            changes.append(f"--weights bf16 --optim adamw8bit{by_layer}")
        changes.append("--peft lisa --quant 1")
    if not config.quantised and method.freezes_matrices:
        changes.append("--quant 1 --quant_type nf4")
    if config.quantised and config.quant_type == "int8":
        changes.append("--quant_type nf4")
    if config.method == "lisa" and config.parts:
        changes.append("--train_parts []")
    if config.quantised and not (config.quant_head or any(part in "head.weight" for part in config.parts)):
        changes.append("--quant_head 1")
    longest = 2 * config.rlhf_max_corpus_len if config.preference else config.ctx_len
    if not config.offload_activations and config.chunk_ctx >= 0 and (config.chunk_ctx or longest) > 1:
        half = (config.chunk_ctx or longest) // 2
        changes.append(f"--chunk_ctx {min(fitting_chunk or half, half)}")
    if config.chunk_ctx and config.chunk_keep == "device" and hardware.on_gpu:
        changes.append("--chunk_keep host")
    if config.grad_cp == 1 and not (config.offload_activations or config.chunk_ctx) and hardware.on_gpu:
        changes.append("--offload_activations 1")
    if config.preference:
        changes.append(f"--rlhf_max_corpus_len {max(config.rlhf_max_corpus_len // 2, 1)}")
    else:
        changes.append(f"--ctx_len {max(config.ctx_len // 2, 1)}")
    look = " (see nvidia-smi)" if hardware.on_gpu else ""
    changes += [f"a {name} that no other program uses{look}", "a smaller base model"]
    return f"the {name} ran out of {whose}; the cheapest ways out: {', or '.join(changes[:3])}"
