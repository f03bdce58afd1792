"""`python train.py --dry_run 1`: what a run would do, take and need, before it is begun; nothing is left of it.

Memory is estimated by part and then measured, and so is the time, by a few steps that are tried on the device.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from src.adapters.files import refuse_other_architecture
from src.adapters.method import Method, method_of
from src.checkpoint import open_checkpoint
from src.config import TrainConfig
from src.config.chunks import AS_MANY_AS_FIT
from src.device import memory_bytes, spare_threads, without_memory
from src.errors import EXIT_CODE, TrainingError
from src.identity import FileIdentity
from src.loading import open_model
from src.model.shape import ModelShape
from src.output import several
from src.system import process_bytes
from src.training.engine import Hardware, apply_hardware, resolve_hardware
from src.training.estimate import Largest, MemoryEstimate, estimate_memory, largest_that_fit, positions_of
from src.training.graphs import may_record, may_record_chunks
from src.training.logs import require_loggers
from src.training.memory import chunk_that_fits, require_memory_of_run
from src.training.report import memory_advice, plan_of, say
from src.training.run import (
    choose_recomputation,
    chunk_instead,
    fresh_base,
    load_options,
    model_shape,
    turns_of,
    with_seed,
)
from src.training.trial import Trial, try_steps
from src.training.unpacked import free_bytes
from src.training.work import Work, epochs_of, make_schedule, prepare_work

GIB = 2**30
_SHARE_OF_CARD = 0.97
"""Which a run may take of it: what drivers keep differs from card to card."""


@dataclass(frozen=True)
class Tried:
    """What was measured.

    Attributes:
        trial: the steps.
        load_seconds: from the file to the model on its device.
        held_out_seconds: of one measurement on held-out data; 0 without.
        loaded_bytes: of the process, once the model was loaded.
    """

    trial: Trial
    load_seconds: float
    held_out_seconds: float
    loaded_bytes: int


@dataclass(frozen=True)
class Examined:
    """What is known of a run before it.

    Attributes:
        expected: its memory by part.
        beside_bytes: on a CPU what Python and torch take besides.
        tried: what was measured; None where no memory was left for it.
        largest: sizes that would fit.
        limit_bytes: that the run may take.
    """

    expected: MemoryEstimate
    beside_bytes: int
    tried: Tried | None
    largest: Largest
    limit_bytes: float


def dry_run(config: TrainConfig) -> int:
    """Prints the plan and what it takes; returns the exit code, `EXIT_CODE` where the run would not fit.

    Raises:
        UserError: for everything the user can put right.
    """
    return EXIT_CODE if examine(config).tried is None else 0


def examine(config: TrainConfig) -> Examined:
    """Prints the plan and what it takes.

    Raises:
        UserError: for everything the user can put right.
    """
    config = with_seed(config)
    require_loggers(config)
    method, hardware = method_of(config), resolve_hardware(config)
    apply_hardware(hardware, config, small_messages=method.small)
    config = dataclasses.replace(config, strategy=hardware.strategy)
    for line in [*config.notes(), *hardware.notes]:
        say(f"note: {line}")
    program_bytes, _ = process_bytes()
    base = open_checkpoint(config.load_model) if config.load_model else None
    shape = model_shape(config, base)
    method.trained_names(shape)
    if config.chunk_ctx == AS_MANY_AS_FIT:
        config = dataclasses.replace(
            config, chunk_ctx=chunk_that_fits(config, method, shape, hardware.device, hardware.compute_dtype)
        )
    for path in filter(None, (config.load_state, config.load_adapter)):
        refuse_other_architecture(path, shape)
    work = prepare_work(config, shape)
    require_memory_of_run(config, hardware.device, shape, work)
    spare_threads(hardware.device, shape)
    say(plan_of(config, method, hardware, shape, work, make_schedule(config, work), Path(config.proj_dir)))

    def estimate(of: TrainConfig, positions: int, memories: int) -> MemoryEstimate:
        return estimate_memory(
            of,
            method,
            shape,
            on_gpu=hardware.on_gpu,
            itemsize=hardware.compute_dtype.itemsize,
            positions=positions,
            memories=memories,
            evaluates=work.held_out_positions,
            records=_may_record(config, method, hardware),
        )

    expected = estimate(config, work.row_tokens, work.memories)
    limit = _limit_bytes(config, hardware)
    tried: Tried | None = None
    problem = ""
    say()
    try:
        with without_memory(lambda: memory_advice(config, method, hardware, chunk_instead(config, method, hardware))):
            tried = _try(config, method, hardware, shape, work)
    except TrainingError as error:
        problem = str(error)
    if tried is not None:
        program_bytes = max(tried.loaded_bytes - int(expected.standing), 0)
    say("\n".join(_memory_lines(expected, tried, hardware, limit, program_bytes)))
    # Of other sizes the estimate is off by about as much as of this one.
    beside = 0 if hardware.on_gpu else program_bytes
    off = 0.0 if tried is None else tried.trial.used_bytes - beside - expected.total

    def needed(of: TrainConfig) -> float:
        return estimate(of, *positions_of(of)).total + off

    largest = largest_that_fit(config, needed, limit)
    say(_fit_line(config, largest, tried, limit, problem))
    if tried is not None:
        say("\n".join(_time_lines(config, work, tried)))
    say("nothing was trained or written: leave --dry_run out for that")
    return Examined(expected, beside, tried, largest, limit)


def _try(config: TrainConfig, method: Method, hardware: Hardware, shape: ModelShape, work: Work) -> Tried:
    """Loads the model as a run does, measures held-out data, and tries steps, in a folder that is gone afterwards."""
    alone = dataclasses.replace(config, devices=1, num_nodes=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        base = open_checkpoint(config.load_model) if config.load_model else fresh_base(config, hardware, shape, folder)
        identity = FileIdentity(config.load_model, at_once=False) if config.load_model else None
        origin = method.start(shape, folder, identity)
        options = load_options(config, method, hardware, shape)
        model = open_model(base, options, state_file=config.load_state, start=origin)
        choose_recomputation(model, work, config, method)
        load_seconds = time.perf_counter() - begin
        loaded_bytes, _ = process_bytes()
        held_out_seconds = 0.0
        if work.measure is not None and not config.dpo:
            begin = time.perf_counter()
            say(f"held out   untuned: {work.measure(model)}")
            held_out_seconds = time.perf_counter() - begin
        turns = turns_of(method, model, base, config, folder)
        trial = try_steps(alone, method, hardware, work, model, turns, folder)
    return Tried(trial, load_seconds, held_out_seconds, loaded_bytes)


def _may_record(config: TrainConfig, method: Method, hardware: Hardware) -> bool:
    """Whether steps will be recorded, as far as that can be said without the model."""
    in_bf16 = hardware.on_gpu and hardware.compute_dtype is torch.bfloat16
    return in_bf16 and (may_record_chunks if config.chunk_ctx else may_record)(config, method)


def _limit_bytes(config: TrainConfig, hardware: Hardware) -> float:
    """What a run may take: of a card what others leave of it, of a machine what is available."""
    free = free_bytes(hardware.device)
    if not hardware.on_gpu:
        return free
    total = memory_bytes(hardware.device) or math.inf
    limit = min(total * _SHARE_OF_CARD, free)
    return min(limit, config.memory_gib * GIB) if config.memory_gib else limit


def _memory_lines(
    expected: MemoryEstimate, tried: Tried | None, hardware: Hardware, limit: float, program_bytes: int
) -> list[str]:
    """The table of parts, what was measured, and what there is."""
    parts = dict(expected.parts) if hardware.on_gpu else {**expected.parts, "Python and torch": program_bytes}
    total = sum(parts.values())
    unit, size = ("GiB", GIB) if total >= GIB else ("MiB", GIB // 1024)

    def line(name: str, amount: float, note: str = "") -> str:
        return f"           {name:<26}{amount / size:>9,.2f}{f'   {note}' if note else ''}".rstrip()

    lines = [f"memory     estimated by part, {unit}"]
    lines += [line(name, amount) for name, amount in parts.items()]
    lines.append(line("together", total, f"at {expected.positions:,} positions at a time"))
    if tried is not None:
        trial = tried.trial
        how = f"in {several(trial.steps, 'step')} tried, at up to {trial.positions:,} positions"
        if hardware.on_gpu:
            how += f"; allocator peak {trial.peak_bytes / size:,.2f}{', steps recorded' if trial.records else ''}"
        lines.append(line("measured", trial.used_bytes, how))
    there = memory_bytes(hardware.device)
    name = "this card" if hardware.on_gpu else "this machine"
    if there is not None:
        lines.append(line(f"{name} has", there, f"{limit / size:,.2f} are free for the run"))
    return lines


def _fit_line(config: TrainConfig, largest: Largest, tried: Tried | None, limit: float, problem: str) -> str:
    """Whether it fits, and what else would."""
    length = "rlhf_max_corpus_len" if config.preference else "ctx_len"
    ways = []
    if largest.ctx_len:
        ways.append(f"--{length} {_rounded_down(largest.ctx_len):,} with --micro_bsz {config.micro_bsz}")
    if largest.micro_bsz:
        ways.append(f"--micro_bsz {largest.micro_bsz:,} with --{length} {getattr(config, length):,}")
    most = f"at most about {', or '.join(ways)}" if ways else "no length and no --micro_bsz would"
    if tried is None:
        return f"fits       no: {problem}\n           {most}"
    verdict = "yes" if tried.trial.used_bytes <= limit else "hardly"
    return f"fits       {verdict}; {most}"


def _rounded_down(number: int) -> int:
    """To two digits and a half: the estimate knows no more."""
    step = max(int(10 ** (len(str(number)) - 2)) // 2, 1)
    return int(number // step * step)


def _time_lines(config: TrainConfig, work: Work, tried: Tried) -> list[str]:
    """How long the run would take."""
    steps = work.batches_per_epoch // config.accumulate_grad_batches * epochs_of(config)
    step_seconds = tried.trial.step_seconds * tried.trial.accumulation
    times = 2 + (steps // config.val_steps if config.val_steps else 0)
    training, measuring = steps * step_seconds, times * tried.held_out_seconds
    parts = [f"loading {tried.load_seconds:.1f} s"]
    if measuring:
        parts.append(f"{times:,} measurements on held-out data {_duration(measuring)}")
    lines = [
        f"time       {_duration(training + measuring + tried.load_seconds)}: {several(steps, 'step')} of "
        f"{step_seconds:.3g} s (single ones differ by {tried.trial.spread:.0%}), {', '.join(parts)}"
    ]
    if config.dpo:
        lines.append("           besides the reference's log-probabilities, a forward pass over each pair")
    return lines


def _duration(seconds: float) -> str:
    """In two units at most."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 100 else f"{hours / 24:.1f} days"
