"""One training run from flags to files; `train` reads as its table of contents."""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch

from src.adapters.method import Method, method_of
from src.checkpoint import Checkpoint, fresh_checkpoint, open_checkpoint, save_model
from src.config import TrainConfig
from src.device import global_rank, spare_threads
from src.errors import ConfigError, TrainingError
from src.loading import LoadOptions, open_model
from src.model.language_model import LanguageModel
from src.model.rwkv6 import RWKV6Shape
from src.model.shape import ModelShape
from src.schedule import Schedule
from src.training.callbacks import AtEnd, CheckpointSaver, StepControl, Stopper, TrainingMonitor
from src.training.engine import Hardware, apply_hardware, deepspeed_config, resolve_hardware, trainer_arguments
from src.training.evaluation import HeldOut
from src.training.logs import FileSink, HttpSink, ProgressSink, Sink, WandbSink
from src.training.memory import MemoryPlan, plan_memory
from src.training.module import TrainingModule
from src.training.objectives import PreferenceObjective
from src.training.report import RunResult, memory_advice, plan_of, say, summary_of
from src.training.work import Work, epochs_of, make_schedule, prepare_work

GRADIENT_CLIP = 1.0
_SMALL_SHARE = 0.01
_WRITTEN = re.compile(r"rwkv-(\d+|final|init|last-good)\.pth")


def train(config: TrainConfig) -> RunResult:
    """Trains as the flags say and returns what came of it.

    Raises:
        UserError: for everything the user can put right, before any step where possible.
    """
    config = _with_seed(config)
    method = method_of(config)
    hardware = resolve_hardware(config)
    apply_hardware(hardware, config, small_messages=method.small)
    # From here on the engine is the one that runs, not what was asked for: `auto` with several GPUs is DeepSpeed.
    config = dataclasses.replace(config, strategy=hardware.strategy)
    try:
        return _train(config, method, hardware)
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingError(memory_advice(config, method, hardware)) from error


def _train(config: TrainConfig, method: Method, hardware: Hardware) -> RunResult:
    for line in [*config.notes(), *hardware.notes]:
        say(f"note: {line}")
    base = open_checkpoint(config.load_model) if config.load_model else None
    shape = _model_shape(config, base)
    work = prepare_work(config, shape)
    folder = _prepare_folder(config, method)
    _check_room(folder, method.file_bytes(shape))
    spare_threads(hardware.device, shape)
    schedule = make_schedule(config, work)
    say(plan_of(config, method, hardware, shape, work, schedule, folder))

    base = base or _fresh_base(config, hardware, shape, folder)
    options = load_options(config, method, hardware, shape)
    model = open_model(base, options, state_file=config.load_state, quiet=global_rank() != 0)
    choose_recomputation(model, work, config)
    before = _evaluate("loaded" if config.load_state else "untuned", model, work)
    if isinstance(work.objective, PreferenceObjective):
        say(_preference_share(model, work, work.objective))
    module = TrainingModule(model, work.objective, config, method, work.dataset)
    final_file = folder / "rwkv-final.pth"
    after: list[HeldOut | None] = []

    def finish() -> None:
        method.save(model, final_file)
        module.release_recordings()
        after.append(_evaluate("tuned", model, work))

    files, monitor, stopper = fit(module, work, schedule, hardware, config, folder, finish)
    result = RunResult(
        final_file=final_file,
        files=[*files, final_file],
        losses=monitor.losses,
        before=before,
        after=after[0] if after else None,
        stopped_by=stopper.signal_name,
    )
    say(summary_of(config, method, result, monitor))
    return result


def _with_seed(config: TrainConfig) -> TrainConfig:
    if config.random_seed < 0:
        config = dataclasses.replace(config, random_seed=random.SystemRandom().randrange(2**31))
        say(f"note: --random_seed {config.random_seed} was drawn")
    torch.manual_seed(config.random_seed + global_rank(config.devices))  # dropout alone draws from it
    return config


def _prepare_folder(config: TrainConfig, method: Method) -> Path:
    """Creates the output folder and proves that a file can be written there."""
    folder = Path(config.proj_dir)
    base = Path(config.load_model).resolve()
    if method.needs_base and base.parent == folder.resolve() and _WRITTEN.fullmatch(base.name):
        raise ConfigError(
            f"--load_model {config.load_model} would be written over, because it lies in --proj_dir {folder} and has "
            "the name of a result: choose another --proj_dir"
        )
    if (folder / "rwkv-final.pth").exists():
        say(f"note: {folder} holds an earlier run: its checkpoints are written over, its logs continued")
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


def _model_shape(config: TrainConfig, base: Checkpoint | None) -> ModelShape:
    """Sizes of the base model, checked against the flags; or those of a fresh one."""
    if base is None:
        return RWKV6Shape.from_sizes(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            head_size=config.head_size_a or 64,
            dim_att=config.dim_att,
            dim_ffn=config.dim_ffn,
            double_extra_dim=bool(config.double_extra_dim),
        )
    sizes = ("n_layer", "n_embd", "dim_att", "dim_ffn", "vocab_size", "head_size_a", "double_extra_dim")
    problems = base.info.shape.contradictions({name: getattr(config, name) for name in sizes})
    if problems:
        raise ConfigError("; ".join(problems))
    return base.info.shape


def _fresh_base(config: TrainConfig, hardware: Hardware, shape: ModelShape, folder: Path) -> Checkpoint:
    """An untrained model, which is written to `rwkv-init.pth`."""
    base = fresh_checkpoint(shape, config.random_seed)
    if global_rank() == 0:
        in_fp32 = hardware.compute_dtype == torch.float32
        save_model(folder / "rwkv-init.pth", base, torch.float32 if in_fp32 else torch.bfloat16)
    return base


def _preference_share(model: LanguageModel, work: Work, objective: PreferenceObjective) -> str:
    """How much of a micro-batch's loss the preference term is: of the first in which a pair has a reject."""
    first_epoch = map(work.dataset.__getitem__, range(work.batches_per_epoch))
    batch = next(filter(objective.compares, first_epoch), None)
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
        head_size_divisor=config.head_size_divisor,
        dropout=config.dropout,
    )


def choose_recomputation(model: LanguageModel, work: Work, config: TrainConfig) -> None:
    """What `--grad_cp` asks for; 2 goes by free memory on a GPU, and on a CPU, which has it, is the light mode."""
    layers = model.shape.n_layer
    if config.grad_cp == 0:
        plan = MemoryPlan(layers, whole_layers=layers)
    elif config.grad_cp == 1:
        plan = MemoryPlan(layers, keep_dequantized=True)
    elif model.device.type == "cuda":
        plan = plan_memory(model, work.row_tokens, config.memory_gib)
    else:
        plan = MemoryPlan(layers, light_layers=layers)
    plan.apply(model)
    if config.grad_cp == 2:
        say(f"memory     {plan}")


def _evaluate(label: str, model: LanguageModel, work: Work) -> HeldOut | None:
    if work.measure is None or global_rank() != 0:
        return None
    measurement = work.measure(model)
    say(f"held out   {label}: {measurement}")
    return measurement


def fit(
    module: TrainingModule,
    work: Work,
    schedule: Schedule,
    hardware: Hardware,
    config: TrainConfig,
    folder: Path,
    finish: Callable[[], None] = lambda: None,
) -> tuple[list[Path], TrainingMonitor, Stopper]:
    """Runs Lightning's loop; `finish` is called on rank 0 after the last step, before Lightning empties the GPU.

    Raises:
        TrainingError: when a loss or gradient is not finite; the state before that step is saved.
    """
    epochs = epochs_of(config)
    accumulate = config.accumulate_grad_batches
    trained_elements = sum(parameter.numel() for _, parameter in module.trained())
    control = StepControl(schedule, accumulate, work.describe)
    sinks = _sinks(config, hardware, module, folder, work.batches_per_epoch // accumulate * epochs, trained_elements)
    monitor = TrainingMonitor(control, sinks, config.epoch_begin, config.ctx_len)
    saver = CheckpointSaver(
        lambda path: module.method.save(module.model, path), folder, config.epoch_begin, config.epoch_save
    )
    stopper = Stopper(schedule, accumulate)
    trainer = pl.Trainer(
        **trainer_arguments(hardware, config, trained_elements),
        # A folder that is never made: Lightning takes up `hpc_ckpt_*.ckpt` that lie in its own.
        default_root_dir=folder / "lightning",
        max_epochs=epochs,
        limit_train_batches=work.batches_per_epoch,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=GRADIENT_CLIP,
        callbacks=[control, monitor, saver, AtEnd(finish), stopper],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic=hardware.device.type == "cpu",
    )
    try:
        trainer.fit(module)
    except TrainingError as error:
        last_good = folder / "rwkv-last-good.pth"
        if global_rank() == 0:
            module.method.save(module.model, last_good)
        raise TrainingError(f"{error}; the weights before this step are in {last_good}") from error
    except SystemExit as end:  # how Lightning ends after the second Ctrl-C
        raise KeyboardInterrupt from end
    finally:
        monitor.close()
    return saver.files, monitor, stopper


def _sinks(
    config: TrainConfig,
    hardware: Hardware,
    module: TrainingModule,
    folder: Path,
    steps: int,
    trained_elements: int,
) -> list[Sink]:
    if global_rank() != 0:
        return []
    engine = None if hardware.strategy == "single" else deepspeed_config(hardware.strategy, config, trained_elements)
    sinks: list[Sink] = [FileSink(folder, config, engine), ProgressSink(steps)]
    if config.wandb:
        shape = module.model.shape
        sinks.append(WandbSink(config, f"{shape.vocab_size} ctx{config.ctx_len} L{shape.n_layer} D{shape.n_embd}"))
    if config.fapi_logging_callback:
        sinks.append(HttpSink(config.fapi_logging_address))
    return sinks
