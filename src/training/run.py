"""One training run from flags to files; `train` reads as its table of contents."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from src import storage
from src.adapters.files import refuse_other_architecture
from src.adapters.full import FullTraining
from src.adapters.lisa import Lisa
from src.adapters.method import Method, method_of
from src.adapters.turns import LayerTurns
from src.checkpoint import Checkpoint, fresh_checkpoint, load_state, open_checkpoint, read_tensors, save_model
from src.config import TrainConfig, run_file
from src.config.chunks import AS_MANY_AS_FIT
from src.config.recognition import files_of
from src.device import global_rank, spare_threads, without_memory
from src.errors import CheckpointError, ConfigError, TrainingError
from src.identity import FileIdentity
from src.loading import LoadOptions, open_model
from src.model.architectures import FRESH, named
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.schedule import Schedule
from src.scratch import Scratch
from src.training.callbacks import AtEnd, CheckpointSaver, NotFiniteError, StepControl, TrainingMonitor
from src.training.engine import Hardware, apply_hardware, deepspeed_config, resolve_hardware, trainer_arguments
from src.training.evaluation import HeldOut, kept_held_out, restored_held_out
from src.training.exits import Stopper, unharmed_by_save_requests
from src.training.folder import LOSS_PLOT, Places, clean, locked, new_run_id, refuse_results, spare_inputs
from src.training.health import HealthWatch
from src.training.logs import (
    FileSink,
    HttpSink,
    ProgressSink,
    Sink,
    TensorBoardSink,
    WandbSink,
    require_tensorboard,
)
from src.training.memory import (
    MemoryPlan,
    bytes_of_trained,
    chunk_that_fits,
    plan_memory,
    require_memory_of_run,
)
from src.training.module import TrainingModule
from src.training.objectives import PreferenceObjective
from src.training.optimizers import GRADIENT_CLIP, can_be_resumed
from src.training.plots import Course, PlotSink, can_draw
from src.training.progress import BEGINNING, Start
from src.training.references import Reference
from src.training.report import RunResult, memory_advice, plan_of, say, summary_of
from src.training.results import Results
from src.training.resume import (
    TRAINED,
    AskedAnew,
    OptimizerMoments,
    Part,
    RandomState,
    RunSaver,
    RunWriter,
    SavedRun,
    Session,
    TrainedTensors,
    check_flags,
    command_to_go_on,
    fingerprints,
    flags_of_run,
    saved_run,
    values_of,
)
from src.training.samples import Sampler, SampleWatch, kept_answers, sampler_of
from src.training.sharded import any_sharded, computable, readable
from src.training.turns import Draws, TrainedInTurn
from src.training.unpacked import measure_unpacked
from src.training.updates import UpdateCount
from src.training.watch import HeldOutWatch, log_held_out
from src.training.work import Work, epochs_of, make_schedule, prepare_work

DATA_FLAGS = ("data_file", "val_file")
INPUT_FLAGS = ("config", "load_model", "load_state", "load_adapter", "rlhf_train_file", *DATA_FLAGS, "sample_prompts")
SIZE_FLAGS = (
    *("n_layer", "n_embd", "dim_att", "dim_ffn", "vocab_size", "head_size_a", "double_extra_dim"),
    "head_size_divisor",
)
_SMALL_SHARE = 0.01


def train(config: TrainConfig) -> RunResult:
    """Trains as the flags say and returns what came of it.

    Raises:
        UserError: for everything the user can put right, before any step where possible.
    """
    with contextlib.ExitStack() as held, unharmed_by_save_requests():
        folder = Path(config.proj_dir)
        if folder.is_dir():
            _take(folder, config, held)
        saved = saved_run(folder) if config.resume else None
        config = with_seed(config)
        require_tensorboard(config)
        hardware = resolve_hardware(config)
        # From here on the engine is the one that runs, not what was asked for: `auto` with several GPUs is DeepSpeed.
        config = dataclasses.replace(config, strategy=hardware.strategy)
        method = method_of(config)
        apply_hardware(hardware, config, small_messages=method.small)
        with without_memory(lambda: memory_advice(config, method, hardware)):
            return _train(config, method, hardware, saved, held)


def _take(folder: Path, config: TrainConfig, held: contextlib.ExitStack) -> None:
    """Keeps a folder for this run alone, once it is known that the run may have it."""
    if global_rank() == 0:
        held.enter_context(locked(folder))
        if not (config.resume or config.overwrite):
            refuse_results(folder)


def _train(
    config: TrainConfig, method: Method, hardware: Hardware, saved: SavedRun | None, held: contextlib.ExitStack
) -> RunResult:
    for line in [*config.notes(), *hardware.notes, *(saved.notes if saved else ())]:
        say(f"note: {line}")
    if not can_be_resumed(config, hardware.strategy):
        say(f"note: --resume 1 cannot go on with this run: DeepSpeed's states of --optim {config.optim} are not saved")
    base = open_checkpoint(config.load_model) if config.load_model else None
    shape = model_shape(config, base)
    method.trained_names(shape)  # refuses what does not fit the model
    if config.chunk_ctx == AS_MANY_AS_FIT:
        tokens = chunk_that_fits(config, method, shape, hardware.device, hardware.compute_dtype)
        say(f"note: --chunk_ctx auto: {f'--chunk_ctx {tokens} fits' if tokens else 'whole rows fit'}")
        config = dataclasses.replace(config, chunk_ctx=tokens)
    for path in filter(None, (config.load_state, config.load_adapter)):
        refuse_other_architecture(path, shape)
    # What a resumed run goes on from replaces the start, with which a reference is measured and samples are compared.
    state_file = config.load_state if config.dpo or config.sample_prompts or not saved else ""
    if state_file:
        load_state(state_file, shape)
    identity = FileIdentity(config.load_model, at_once=global_rank() == 0) if config.load_model else None
    method.check_files(shape, identity)
    work = prepare_work(config, shape)
    sampler = sampler_of(config, shape, chats=work.chats)
    require_memory_of_run(config, hardware.device, shape, work)
    figures = {
        "steps_per_epoch": work.batches_per_epoch // config.accumulate_grad_batches,
        "micro_batches_per_step": config.accumulate_grad_batches * config.devices * config.num_nodes,
    }
    if saved:
        for line in check_flags(config, hardware.precision, figures, saved):
            say(f"note: {line}")
    folder = Path(config.proj_dir)
    was_there = folder.is_dir()
    _prepare_folder(config)
    if not was_there:
        _take(folder, config, held)
    _check_room(folder, method.file_bytes(shape))
    spare_threads(hardware.device, shape)
    schedule = make_schedule(config, work)
    say(plan_of(config, method, hardware, shape, work, schedule, folder))
    start = Start()
    if saved:
        start = Start.after(saved.steps, figures["steps_per_epoch"], config.accumulate_grad_batches)
        say(f"resuming   after step {saved.steps:,}, epoch {config.epoch_begin + start.epochs}, from {saved.path}")
    if global_rank() == 0:
        clean(folder, results=bool(config.overwrite), inputs=_inputs(config).values())
        _write_flags(config, folder)

    origin = method.start(shape, folder, identity)
    if config.load_state and not shape.state_shapes().keys().isdisjoint(origin):
        raise ConfigError(
            f"--load_state {config.load_state} and --load_adapter {config.load_adapter} both hold states: leave the "
            "former out"
        )
    base = base or fresh_base(config, hardware, shape, folder)
    options = load_options(config, method, hardware, shape)
    model = open_model(base, options, state_file=state_file, start=origin, quiet=global_rank() != 0)
    if global_rank() == 0:
        method.begin(model, folder, identity, origin)
    choose_recomputation(model, work, config, method)
    for line in work.prepare(model, Reference(config, identity, folder)):
        say(line)
    first_batch = config.epoch_begin * work.batches_per_epoch + start.steps * config.accumulate_grad_batches
    turns = turns_of(method, model, base, config, folder)
    module = TrainingModule(model, work.objective, config, method, work.dataset, first_batch, turns)
    answers = _answered_before(sampler, model, saved)
    before: HeldOut | None
    if saved:
        _trained(module).restore(saved.parts[TRAINED])
        before = restored_held_out(saved.before)
    else:
        before = _evaluate(_before_training(config), model, work)
        if isinstance(work.objective, PreferenceObjective):
            say(_preference_share(model, work, work.objective))
    results = Results(method, config, identity)
    run = saved.run if saved else new_run_id()
    places = Places(folder, run, _warn)
    session = Session(
        SavedRun(
            path=folder,
            run=run,
            steps=start.steps,
            values=values_of(config, hardware.precision),
            figures=figures,
            inputs=fingerprints(config),
            parts=saved.parts if saved else {},
            before=kept_held_out(before),
        ),
        RunWriter(places, folder if saved else None, start.steps),
        config.save_minutes * 60,
    )
    final_files: list[Path] = []
    after: HeldOut | None = None
    seconds = 0.0

    def finish() -> HeldOut | None:
        nonlocal after, seconds
        with readable(model):
            if global_rank() == 0:
                final_files.append(places.save(lambda path: results.save(model, path), "rwkv-final.pth"))
        module.release_recordings()
        begin = time.perf_counter()
        after = _evaluate("tuned", model, work)
        seconds = time.perf_counter() - begin
        return after

    files, monitor, stopper = fit(
        module, work, schedule, hardware, config, folder, finish, results, session, start, before, (sampler, answers)
    )
    final_file = final_files[0] if final_files else folder / "rwkv-final.pth"
    unpacked = None
    if after is not None and config.quantised and stopper.signal_name is None:
        try:
            frozen = load_state(config.load_state, shape) if config.load_state else {}
            tuned = {**frozen, **origin, **read_tensors(final_file, "result")}
            measured = measure_unpacked(base, tuned, options, work, seconds)
        except CheckpointError as problem:  # a file was changed meanwhile, which is no failure of the run
            measured = str(problem)
        unpacked = _told_unpacked(measured, config, final_file)
    result = RunResult(
        final_file=final_file,
        files=[*files, final_file],
        losses=monitor.losses,
        before=before,
        after=after,
        unpacked=unpacked,
        stopped_by=stopper.signal_name,
        go_on=command_to_go_on(session.writer.folder) if session.writer.folder else "",
        template=work.template,
        merged_note=shape.merged_note,
    )
    if stopper.exhausted:
        say(
            f"stopped after {len(result.losses)} steps, which hold --my_exit_tokens {config.my_exit_tokens} in the mean"
        )
    say(summary_of(config, method, result, monitor))
    return result


def with_seed(config: TrainConfig) -> TrainConfig:
    """With a seed that is drawn, and said, where none is given."""
    if config.random_seed < 0:
        config = dataclasses.replace(config, random_seed=random.SystemRandom().randrange(2**31))
        say(f"note: --random_seed {config.random_seed} was drawn")
    torch.manual_seed(config.random_seed + global_rank(config.devices))  # dropout alone draws from it
    return config


def _inputs(config: TrainConfig) -> dict[str, str]:
    """The files that a run reads, by flag; where a flag names several, by flag and file."""
    found: dict[str, str] = {}
    for flag in INPUT_FLAGS:
        path = getattr(config, flag)
        files = files_of(path) if flag in DATA_FLAGS and path else (path,)
        found |= {f"--{flag}" if file == path else f"--{flag} {file}": file for file in files}
    found |= {f"--mix {file}": file for mix in config.mixes for file in files_of(mix.path)}
    return found


def _prepare_folder(config: TrainConfig) -> Path:
    """Creates the output folder and proves that a file can be written there."""
    folder = Path(config.proj_dir)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ConfigError(f"--proj_dir {folder} cannot be written: it is not a folder; choose another")
    spare_inputs(folder, _inputs(config), range(config.epoch_begin, config.epoch_begin + epochs_of(config)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise ConfigError(
            f"--proj_dir {folder} cannot be written ({error.strerror}): choose another folder or free some space"
        ) from error
    return folder


def _write_flags(config: TrainConfig, folder: Path) -> None:
    """Leaves the flags of this run for `--config`."""
    path = folder / run_file.NAME
    try:
        with storage.replacing(path) as file:
            file.write(run_file.as_toml(flags_of_run(config)).encode())
    except OSError as error:
        _warn(f"{path} cannot be written ({error.strerror}); training goes on")


def _check_room(folder: Path, needed_bytes: int) -> None:
    """Refuses a folder without room for one checkpoint, before time is spent on training it.

    Raises:
        ConfigError: naming what is free and what is needed.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ConfigError(
            f"--proj_dir {folder} has {free_bytes / 2**20:.2f} MiB free and one checkpoint takes "
            f"{needed_bytes / 2**20:.2f}: choose another folder or free some space"
        )


def model_shape(config: TrainConfig, base: Checkpoint | None) -> ModelShape:
    """Sizes of the base model, checked against the flags; or those of a fresh one."""
    if base is None:
        architecture = named(config.my_testing) if config.my_testing else FRESH
        shape = architecture.from_sizes(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            head_size=config.head_size_a or 64,
            dim_att=config.dim_att,
            dim_ffn=config.dim_ffn,
            double_extra_dim=bool(config.double_extra_dim),
        )
    else:
        shape = base.info.shape
    problems = shape.contradictions({name: getattr(config, name) for name in SIZE_FLAGS})
    if config.my_testing not in ("", shape.architecture):
        problems.insert(0, f"--my_testing {config.my_testing} contradicts the checkpoint, which is {shape.family}")
    if problems:
        raise ConfigError("; ".join(problems))
    return shape


def fresh_base(config: TrainConfig, hardware: Hardware, shape: ModelShape, folder: Path) -> Checkpoint:
    """An untrained model, which is written to `rwkv-init.pth`."""
    base = fresh_checkpoint(shape, config.random_seed)
    if global_rank() == 0:
        in_fp32 = hardware.compute_dtype == torch.float32
        save_model(folder / "rwkv-init.pth", base, torch.float32 if in_fp32 else torch.bfloat16)
    return base


def _preference_share(model: LanguageModel, work: Work, objective: PreferenceObjective) -> str:
    """How much of a micro-batch's loss the preference term is: of the first in which a pair has a reject."""
    # An epoch may be any number of passes, and none of them has what the first lacks.
    batches = min(work.batches_per_epoch, work.dataset.batches_per_pass)
    batch = next(filter(objective.compares, map(work.dataset.__getitem__, range(batches))), None)
    if batch is None:
        return (
            "warning: no pair of the first epoch has a reject to compare with, which makes it plain SFT on the chosen "
            "answers; rlhf_generate_reject.py makes rejects"
        )
    with torch.no_grad():
        share = objective.evaluate(model, batch).averages()["preference_share"]
    line = f"preference {share:.2%} of the first loss is the preference term (alpha {objective.alpha:g})"
    if share < _SMALL_SHARE:
        line += (
            "\nwarning: under 1 % the run is plain SFT on the chosen answers; values near 0.1 to 0.5 weigh both terms"
            " (small values such as 0.0006 belong to an older formula, see README)"
        )
    return line


def load_options(config: TrainConfig, method: Method, hardware: Hardware, shape: ModelShape) -> LoadOptions:
    """How the flags want the model on its device."""
    return LoadOptions(
        device=hardware.device,
        compute_dtype=hardware.compute_dtype,
        quant_type=config.quant_type if config.quantised else None,
        quant_head=bool(config.quant_head),
        trained=frozenset(method.trained_names(shape)),
        narrow=frozenset(method.narrow_names(shape)) if isinstance(method, FullTraining) else frozenset(),
        adapters=method.adapters,
        head_size_divisor=config.head_size_divisor,
        dropout=config.dropout,
    )


def turns_of(
    method: Method, model: LanguageModel, base: Mapping[str, Tensor], config: TrainConfig, folder: Path
) -> LayerTurns | None:
    """What takes turns in a model that was opened with `load_options`; its first turn begins with `fit`.

    Args:
        method: what is trained.
        model: on its device.
        base: the tensors it was made of.
        config: the flags.
        folder: has room for the weights of layers that wait.
    """
    if not isinstance(method, Lisa):
        return None
    return method.turns(model, base, config.quant_type if config.quantised else None, Scratch(folder, _warn))


def choose_recomputation(model: LanguageModel, work: Work, config: TrainConfig, method: Method) -> None:
    """What `--grad_cp` asks for; 2 goes by free memory on a GPU, and on a CPU, which has it, is the light mode.

    Args:
        model: on its device.
        work: says how long rows are.
        config: the flags.
        method: what is trained.
    """
    layers = model.shape.n_layer
    if config.grad_cp == 0:
        plan = MemoryPlan(layers, whole_layers=layers)
    elif config.grad_cp == 1:
        plan = MemoryPlan(layers, keep_dequantized=True)
    elif model.device.type == "cuda":
        waiting = work.memories * model.shape.memory_bytes(2) if config.chunk_keep == "device" else 0
        trained = bytes_of_trained(config, method, model.shape)
        plan = plan_memory(model, work.row_tokens, config.memory_gib, waiting, trained)
    else:
        plan = MemoryPlan(layers, light_layers=layers)
    plan.apply(model)
    if config.grad_cp == 2:
        say(f"memory     {plan}")


def _before_training(config: TrainConfig) -> str:
    """What a run begins with is called."""
    return "loaded" if config.load_state or config.load_adapter else "untuned"


def _evaluate(label: str, model: LanguageModel, work: Work) -> HeldOut | None:
    if work.measure is None or not (global_rank() == 0 or any_sharded(model)):
        return None
    with computable(model):
        measurement = work.measure(model)
    say(f"held out   {label}: {measurement}")
    return measurement


def _answered_before(sampler: Sampler | None, model: LanguageModel, saved: SavedRun | None) -> list[str]:
    """What the model answers before training: as an interrupted run's file says, or as it is now."""
    if sampler is None or global_rank() != 0:
        return []
    kept = kept_answers(sampler, saved.parts.get("samples") if saved else None)
    return sampler.answers(model) if kept is None else kept


def _told_unpacked(measurement: HeldOut | str, config: TrainConfig, result: Path) -> HeldOut | None:
    """What the result is worth on the base as clients use it; a note where that costs too much."""
    if isinstance(measurement, str):
        others = {"states": ("state", "load_state"), "lisa": ("model", "load_model")}
        what, flag = others.get(config.method, ("result", "load_adapter"))
        say(
            f"note: held-out data were not measured on the unpacked base, on which clients use the {what}: "
            f"{measurement}; a run with --quant 0 --{flag} {result} prints it before its first step"
        )
        return None
    say(f"held out   unpacked: {measurement}")
    return measurement


def fit(
    module: TrainingModule,
    work: Work,
    schedule: Schedule,
    hardware: Hardware,
    config: TrainConfig,
    folder: Path,
    finish: Callable[[], HeldOut | None] = lambda: None,
    results: Results | None = None,
    session: Session | None = None,
    start: Start = BEGINNING,
    before: HeldOut | None = None,
    sampling: tuple[Sampler | None, Sequence[str]] = (None, ()),
    *,
    quiet: bool = False,
) -> tuple[list[Path], TrainingMonitor, Stopper]:
    """Runs Lightning's loop; `finish` is called on rank 0 after the last step, before Lightning empties the GPU.

    It returns what it measured on held-out data, if there are some.

    Args:
        session: the run that this is part of; without one nothing is kept to go on from.
        start: where in the run this process begins.
        before: what held-out data gave before the first step, if there are some.
        quiet: whether no figures are shown or written.
        sampling: prompts that are answered now and then, and what they were answered before the first step.

    Raises:
        TrainingError: when a loss or gradient is not finite; the last good state is saved.
    """
    results = results or Results(module.method, config)
    epochs = epochs_of(config)
    accumulate = config.accumulate_grad_batches
    steps_per_epoch = work.batches_per_epoch // accumulate
    trained_elements = sum(parameter.numel() for _, parameter in module.trained())
    places = session.writer.places if session else Places(folder, new_run_id(), _warn)
    control = StepControl(schedule, accumulate, work.describe, start)
    monitor = TrainingMonitor(control, [], config.epoch_begin, start)
    saver = CheckpointSaver(
        lambda path: places.save(lambda place: results.save(module.model, place), path.name),
        folder,
        config.epoch_begin,
        config.epoch_save,
        start,
    )
    stopper = Stopper(schedule, accumulate, start)
    draws = Draws(module, start) if module.turns else None
    watch = None
    if config.val_steps and work.measure is not None:
        watch = HeldOutWatch(
            work.measure,
            lambda name: places.save(lambda place: results.save(module.model, place), name),
            _warn,
            every=config.val_steps,
            patience=config.early_stop,
            monitor=monitor,
            accumulate=accumulate,
            start=start,
        )

    samples = None
    if sampling[0] is not None:
        samples = SampleWatch(
            *(sampling[0], sampling[1], _warn),
            every=config.sample_steps,
            monitor=monitor,
            accumulate=accumulate,
            start=start,
        )

    def parts(trainer: pl.Trainer) -> dict[str, Part]:
        engine = hardware.strategy != "single"
        gather = trainer.strategy.all_gather if trainer.world_size > 1 else None
        return {
            TRAINED: _trained(module),
            "optimizer": AskedAnew(lambda: OptimizerMoments(module.trained(), trainer.optimizers[0], engine=engine)),
            **({"parked": draws} if draws else {}),
            **({"updates": UpdateCount(module.updates)} if module.updates else {}),
            "random": RandomState(hardware.device, trainer.global_rank, gather),
            "objective": work.objective,
            "monitor": monitor,
            **({"held_out": watch} if watch else {}),
            **({"samples": samples} if samples else {}),
        }

    def is_complete(step: int) -> bool:
        return step >= epochs * steps_per_epoch or schedule.exhausted(step) or bool(watch and watch.stopped)

    def end(step: int) -> None:
        measured = finish()
        with readable(module):
            if not (trainer.is_global_zero and is_complete(step)):
                return
            if samples:
                samples.end(step, module.model)
            if watch and measured is not None:
                watch.end(step, measured)
            elif measured is not None:
                log_held_out(monitor, step, measured, "tuned")
            if session:
                session.writer.remove()

    def sinks() -> list[Sink]:
        return (
            []
            if quiet
            else _sinks(
                config, hardware, module, folder, steps_per_epoch * epochs, trained_elements, session, start, monitor
            )
        )

    # The order matters: the run is saved after everything else has seen a step, and knows whether it is to stop.
    callbacks: list[pl.Callback] = [*([draws] if draws else []), control, monitor]
    way_out = f"Ctrl-C saves what there is; begin again with less than --lr_init {config.lr_init:g}"
    health = None if quiet else HealthWatch(monitor, _warn, accumulate, way_out)
    callbacks += [callback for callback in (health, watch, samples) if callback is not None]
    callbacks += [saver, AtEnd(lambda: end(start.steps + trainer.global_step)), stopper]
    if session and can_be_resumed(config, hardware.strategy):
        random = bool(config.dropout or config.lora_dropout) and config.devices * config.num_nodes == 1
        total_steps = epochs * steps_per_epoch
        callbacks.append(
            RunSaver(session, parts, stopper, start, steps_per_epoch, total_steps, remembers_random=random)
        )
        if start.steps and is_complete(start.steps):
            monitor.restore(session.saved.parts["monitor"])
            if watch and "held_out" in session.saved.parts:
                watch.restore(session.saved.parts["held_out"])
            monitor.sinks = sinks()
            for sink in monitor.sinks:
                sink.ended()
            end(start.steps)
            monitor.close()
            return saver.files, monitor, stopper
    trainer = pl.Trainer(
        **trainer_arguments(hardware, config, trained_elements),
        # A folder that is never made: Lightning takes up `hpc_ckpt_*.ckpt` that lie in its own.
        default_root_dir=folder / "lightning",
        max_epochs=epochs - start.epochs,
        limit_train_batches=work.batches_per_epoch,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=None if config.updates_by_tensor or module.clips else GRADIENT_CLIP,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic=hardware.device.type == "cpu",
    )
    monitor.sinks = sinks()
    if before is not None and not start.steps:
        log_held_out(monitor, 0, before, _before_training(config))
    try:
        trainer.fit(module)
    except NotFiniteError as error:
        saved = _save_last_good(module, control, error.step, places, results, session)
        raise TrainingError(f"{error}; {saved}") from error
    except SystemExit as end_of_process:  # how Lightning ends after the second Ctrl-C
        raise KeyboardInterrupt from end_of_process
    finally:
        monitor.close()
        if session:
            session.writer.wait()
            if sys.exc_info()[0] is not None and session.writer.folder:
                say(f"go on      {command_to_go_on(session.writer.folder)}")
    return saver.files, monitor, stopper


def _trained(module: TrainingModule) -> Part:
    return TrainedInTurn(module.turns) if module.turns else TrainedTensors(module.trained())


def _save_last_good(
    module: TrainingModule,
    control: StepControl,
    step: int,
    places: Places,
    results: Results,
    session: Session | None,
) -> str:
    """Saves the newest weights from which a finite loss and gradient came; says what was saved, as half a sentence.

    Args:
        step: that was not taken: what the step before it made is what gave the bad number.
    """
    if step == 1:
        return "it is the first, so that what was loaded gives it"
    if any_sharded(module):
        kept = session is not None and session.writer.folder is not None
        return "a run with --resume 1 goes on from before it" if kept else "no weights from before it are at hand"
    tensors: Mapping[str, Tensor] = control.good.tensors
    good = step - 2
    if session:
        session.writer.wait()
        if not tensors and session.writer.folder:
            run = saved_run(session.writer.folder)
            if run.steps < step - 1:
                tensors, good = dict(run.parts[TRAINED]), run.steps
    if not tensors:
        return f"no weights from before step {step - 1}, whose result gave it, are at hand"
    path = places.folder / "rwkv-last-good.pth"
    if global_rank() == 0:
        _trained(module).restore(tensors)
        path = places.save(lambda place: results.save(module.model, place), path.name)
    return f"the weights after step {good}, which gave a finite loss and gradient, are in {path}"


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _title(config: TrainConfig) -> str:
    """What stands above the picture of a run."""
    what = {"states": "states", "full": "every weight", "parts": "parts of the weights"}.get(
        config.method, config.method
    )
    data = config.rlhf_train_file if config.preference else config.data_file or "generated data"
    loss = f" ({config.preference})" if config.preference else ""
    return f"{what} of {Path(config.load_model).name or 'a fresh model'} on {Path(data).name}{loss}"


def _sinks(
    config: TrainConfig,
    hardware: Hardware,
    module: TrainingModule,
    folder: Path,
    steps: int,
    trained_elements: int,
    session: Session | None,
    start: Start,
    monitor: TrainingMonitor,
) -> list[Sink]:
    if global_rank() != 0:
        return []
    engine = None if hardware.strategy == "single" else deepspeed_config(hardware.strategy, config, trained_elements)
    run = session.saved.run if session else ""
    epoch = config.epoch_begin + start.epochs
    sinks: list[Sink] = [FileSink(folder, config, engine, run, start.steps, epoch), ProgressSink(steps, start.steps)]
    if config.wandb:
        shape = module.model.shape
        name = f"{shape.vocab_size} ctx{config.ctx_len} L{shape.n_layer} D{shape.n_embd}"
        tokens = session.saved.parts["monitor"]["tokens"] if session and start.steps else 0
        sinks.append(WandbSink(config, name, tokens))
    if config.tensorboard:
        sinks.append(TensorBoardSink(folder, run or "run", start.steps))
    if config.plot and can_draw():
        course = Course.of_run(folder / "metrics.jsonl", run) if start.steps else Course()
        sinks.append(PlotSink(folder / LOSS_PLOT, _title(config), course, _warn, monitor.leave_out))
    elif config.plot:
        say(f"note: {folder / LOSS_PLOT} is drawn where matplotlib is installed: pip install matplotlib, or --plot 0")
    if config.fapi_logging_callback:
        sinks.append(HttpSink(config.fapi_logging_address))
    return sinks
