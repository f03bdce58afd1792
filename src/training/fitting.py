"""The loop of a run: Lightning, and what happens around its steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
from torch import Tensor

from src.config import TrainConfig
from src.device import global_rank
from src.errors import TrainingError
from src.schedule import Schedule
from src.training.callbacks import AtEnd, CheckpointSaver, NotFiniteError, StepControl, TrainingMonitor
from src.training.console import warn
from src.training.engine import Hardware, deepspeed_config
from src.training.evaluation import HeldOut
from src.training.folder import LOSS_PLOT, Places, new_run_id
from src.training.health import HealthWatch
from src.training.logs import FileSink, HttpSink, ProgressSink, Sink, TensorBoardSink, WandbSink
from src.training.module import TrainingModule
from src.training.optimizers import GRADIENT_CLIP, can_be_resumed
from src.training.plots import Course, PlotSink, can_draw
from src.training.progress import BEGINNING, Start
from src.training.report import beginning_of, say
from src.training.results import Results
from src.training.resume import (
    TRAINED,
    AskedAnew,
    OptimizerMoments,
    Part,
    RandomState,
    Session,
    TrainedTensors,
    command_to_go_on,
    saved_run,
)
from src.training.samples import Sampler
from src.training.saver import RunSaver
from src.training.sharded import any_sharded, readable
from src.training.stopper import Stopper
from src.training.strategies import trainer_arguments
from src.training.turns import Draws, TrainedInTurn
from src.training.updates import UpdateCount
from src.training.watch import HeldOutWatch, SampleWatch, log_held_out
from src.training.work import Work, epochs_of


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
    places = session.writer.places if session else Places(folder, new_run_id(), warn)
    control = StepControl(schedule, accumulate, work.describe, start)
    monitor = TrainingMonitor(control, [], config.epoch_begin, start)
    monitor.losses = results.losses
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
            warn,
            every=config.val_steps,
            patience=config.early_stop,
            monitor=monitor,
            accumulate=accumulate,
            start=start,
            before=before,
        )

    samples = None
    if sampling[0] is not None:
        samples = SampleWatch(
            *(sampling[0], sampling[1], warn),
            every=config.sample_steps,
            monitor=monitor,
            accumulate=accumulate,
            start=start,
        )

    def parts(trainer: pl.Trainer) -> dict[str, Part]:
        engine = hardware.has_engine
        gather = trainer.strategy.all_gather if trainer.world_size > 1 else None
        return {
            TRAINED: trained_part(module),
            "optimizer": AskedAnew(
                lambda: OptimizerMoments(module.trained(), trainer.optimizers[0], engine=engine, joined=module.joined)
            ),
            **({"parked": draws} if draws else {}),
            # Those of all tensors at once count as any optimizer does, with their moments.
            **({"updates": UpdateCount(module.updates)} if module.updates and config.updates_by_tensor else {}),
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
    health = None if quiet else HealthWatch(monitor, warn, accumulate, way_out)
    callbacks += [callback for callback in (health, watch, samples) if callback is not None]
    callbacks += [saver, AtEnd(lambda: end(start.steps + trainer.global_step)), stopper]
    if session and can_be_resumed(config, hardware.strategy):
        random = bool(config.dropout or config.lora_dropout) and config.processes == 1
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
        **trainer_arguments(hardware, config, trained_elements, updates_flat=module.updates_flat),
        # A folder that is never made: Lightning takes up `hpc_ckpt_*.ckpt` that lie in its own.
        default_root_dir=folder / "lightning",
        max_epochs=epochs - start.epochs,
        limit_train_batches=work.batches_per_epoch,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=None if module.updates_clip or module.clips else GRADIENT_CLIP,
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
        log_held_out(monitor, 0, before, beginning_of(config))
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
        trained_part(module).restore(tensors)
        path = places.save(lambda place: results.save(module.model, place), path.name)
    return f"the weights after step {good}, which gave a finite loss and gradient, are in {path}"


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
    flat = module.updates_flat
    engine = None
    if hardware.has_engine:
        engine = deepspeed_config(hardware.strategy, config, trained_elements, updates_flat=flat)
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
        sinks.append(PlotSink(folder / LOSS_PLOT, _title(config), course, warn, monitor.leave_out))
    elif config.plot:
        say(f"note: {folder / LOSS_PLOT} is drawn where matplotlib is installed: pip install matplotlib, or --plot 0")
    if config.fapi_logging_callback:
        sinks.append(HttpSink(config.fapi_logging_address))
    return sinks


def trained_part(module: TrainingModule) -> Part:
    """What a run trains, as a part of its file."""
    return TrainedInTurn(module.turns) if module.turns else TrainedTensors(module.trained())
