"""One training run from flags to files; `train` reads as its table of contents."""

from __future__ import annotations

import dataclasses
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from src.adapters.states import set_states, state_tensors
from src.checkpoint import (
    check_sizes,
    inspect_checkpoint,
    load_pairs,
    load_state,
    open_checkpoint,
    save_model,
    save_state,
)
from src.config import TrainConfig
from src.data.documents import Documents
from src.data.preference_batches import PreferenceDataset
from src.data.sampling import BatchDataset
from src.data.sources import open_documents
from src.errors import ConfigError, DataError, TrainingError
from src.loading import LoadOptions, build_model
from src.model.parameters import ModelShape, fresh_parameters, parameter_shapes
from src.model.rwkv6 import RWKV6, Recompute
from src.schedule import Schedule
from src.tokenizer import tokenizer_for_vocabulary
from src.training.callbacks import AtEnd, CheckpointSaver, StepControl, Stopper, TrainingMonitor
from src.training.evaluation import HeldOut, held_out_loss, held_out_preference
from src.training.hardware import Hardware, deepspeed_config, global_rank, resolve_hardware, trainer_arguments
from src.training.memory import MemoryPlan, plan_memory
from src.training.module import TrainingModule
from src.training.objectives import Objective, PreferenceObjective, SFTObjective
from src.training.records import FileSink, HttpSink, ProgressSink, Sink, WandbSink

GRADIENT_CLIP = 1.0
_SMALL_SHARE = 0.01


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        final_file: the last checkpoint written.
        files: every checkpoint written, in order.
        losses: training loss of every optimizer step.
        before, after: measurements on held-out data, None without held-out data.
        stopped_by: name of the signal that ended the run early, or None.
    """

    final_file: Path
    files: list[Path]
    losses: list[float]
    before: HeldOut | None
    after: HeldOut | None
    stopped_by: str | None


def say(text: str = "") -> None:
    """Prints on rank 0 only."""
    if global_rank() == 0:
        print(text, flush=True)


def train(config: TrainConfig) -> RunResult:
    """Trains as the flags say and returns what came of it.

    Raises:
        UserError: for everything the user can put right, before any step where possible.
    """
    config = _with_seed(config)
    hardware = resolve_hardware(config)
    try:
        return _train(config, hardware)
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingError(_memory_advice(config, hardware)) from error


def _train(config: TrainConfig, hardware: Hardware) -> RunResult:
    for line in [*config.notes(), *hardware.notes]:
        say(f"note: {line}")
    folder = _prepare_folder(config)
    shape = _model_shape(config)
    work = prepare_work(config, shape)
    schedule = make_schedule(config, work)
    say(_plan(config, hardware, shape, work, schedule, folder))

    model = _load_model(config, hardware, shape, folder)
    choose_recomputation(model, work, config)
    before = _evaluate("untuned", model, work)
    if isinstance(work.objective, PreferenceObjective):
        say(_preference_share(model, work, work.objective))
    module = TrainingModule(model, work.objective, config)
    final_file = folder / "rwkv-final.pth"
    after: list[HeldOut | None] = []

    def finish() -> None:
        _save(model, config, final_file)
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
    say(_summary(config, result, monitor))
    return result


@dataclass(frozen=True)
class Work:
    """Data and objective of a run.

    Attributes:
        loader: micro-batches of this rank, epoch after epoch.
        objective: maps them to losses.
        measure: scores a model on the held-out data of `--val_file`; None without.
        batches_per_epoch: micro-batches of an epoch on each rank, a multiple of the accumulation.
        row_tokens: most positions of a micro-batch.
        lines: what the plan says about the data.
    """

    loader: DataLoader[Any]
    objective: Objective
    measure: Callable[[RWKV6], HeldOut] | None
    batches_per_epoch: int
    row_tokens: int
    lines: list[str]


def _with_seed(config: TrainConfig) -> TrainConfig:
    if config.random_seed < 0:
        config = dataclasses.replace(config, random_seed=random.SystemRandom().randrange(2**31))
    torch.manual_seed(config.random_seed)
    return config


def _prepare_folder(config: TrainConfig) -> Path:
    """Creates the output folder and proves that a file can be written there."""
    folder = Path(config.proj_dir)
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


def _model_shape(config: TrainConfig) -> ModelShape:
    """Sizes of the checkpoint, checked against the flags; or those of a fresh model."""
    if not config.load_model:
        return ModelShape.from_sizes(
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            head_size=config.head_size_a or 64,
            dim_att=config.dim_att,
            dim_ffn=config.dim_ffn,
            double_extra_dim=bool(config.double_extra_dim),
        )
    info = inspect_checkpoint(config.load_model)
    sizes = ("n_layer", "n_embd", "dim_att", "dim_ffn", "vocab_size", "head_size_a", "double_extra_dim")
    problems = check_sizes(info.shape, {name: getattr(config, name) for name in sizes})
    if problems:
        raise ConfigError("; ".join(problems))
    return info.shape


def prepare_work(config: TrainConfig, shape: ModelShape) -> Work:
    """Opens the data and chooses the objective.

    Raises:
        DataError: for data that cannot be read or used.
    """
    return _preference_work(config, shape) if config.orpo else _text_work(config, shape)


def _text_work(config: TrainConfig, shape: ModelShape) -> Work:
    def documents_of(path: str) -> Documents:
        return open_documents(config.data_type, path, shape.vocab_size, ctx_len=config.ctx_len)

    dataset = BatchDataset(
        documents_of(config.data_file),
        mode=config.dataload,
        ctx_len=config.ctx_len,
        micro_bsz=config.micro_bsz,
        seed=config.random_seed,
        rank=global_rank(config.devices),
        world_size=config.devices * config.num_nodes,
        epoch_steps=config.epoch_steps,
        accumulate=config.accumulate_grad_batches,
    )
    plan = dataset.plan
    lines = [
        f"data       {config.data_file or 'generated'}: {plan.documents:,} documents, {plan.tokens:,} tokens, "
        f"--dataload {plan.mode}",
        *(f"           {statement}" for statement in (*dataset.documents.statements, *plan.statements())),
    ]
    measure: Callable[[RWKV6], HeldOut] | None = None
    if config.val_file:
        held_out = documents_of(config.val_file)
        lines.append(f"held out   {config.val_file}: {len(held_out):,} documents, {held_out.total_tokens:,} tokens")
        measure = partial(held_out_loss, documents=held_out, ctx_len=config.ctx_len)
    longest = min(config.ctx_len, int(dataset.documents.sizes.max())) if plan.mode == "pad" else config.ctx_len
    return Work(dataset.loader(), SFTObjective(), measure, len(dataset), config.micro_bsz * longest, lines)


def _preference_work(config: TrainConfig, shape: ModelShape) -> Work:
    try:
        tokenizer = tokenizer_for_vocabulary(shape.vocab_size)
    except DataError:  # pairs are tokens already; the tokenizer only recognises rejects of white space
        tokenizer = None

    def dataset_of(path: str, epoch_steps: int) -> PreferenceDataset:
        return PreferenceDataset(
            load_pairs(path, shape.vocab_size),
            source=path,
            form=PreferenceObjective.form(config.orpo_type, bool(config.orpo_shared_prompt)),
            longest=config.rlhf_max_corpus_len,
            micro_bsz=config.micro_bsz,
            seed=config.random_seed,
            tokenizer=tokenizer,
            rank=global_rank(config.devices),
            world_size=config.devices * config.num_nodes,
            epoch_steps=epoch_steps,
            accumulate=config.accumulate_grad_batches,
        )

    dataset = dataset_of(config.rlhf_train_file, config.epoch_steps)
    objective = PreferenceObjective(config.orpo_alpha, config.orpo_type, debug=bool(config.orpo_debug))
    plan = dataset.plan
    lines = [
        f"pairs      {config.rlhf_train_file}: {plan.pairs:,} pairs, {plan.positions_per_pass:,} positions a pass",
        *(f"           {statement}" for statement in plan.statements()),
    ]
    measure: Callable[[RWKV6], HeldOut] | None = None
    if config.val_file:
        held_out = dataset_of(config.val_file, 0)
        lines.append(f"held out   {config.val_file}: {held_out.plan.pairs:,} pairs")
        measure = partial(held_out_preference, dataset=held_out, objective=objective)
    segments = 3 if config.orpo_shared_prompt and config.orpo_type == 0 else 4
    row_tokens = config.micro_bsz * segments * config.rlhf_max_corpus_len
    return Work(dataset.loader(), objective, measure, len(dataset), row_tokens, lines)


def _preference_share(model: RWKV6, work: Work, objective: PreferenceObjective) -> str:
    """How much of the first micro-batch's loss the preference term is."""
    with torch.no_grad():
        share = objective.evaluate(model, next(iter(work.loader))).averages()["preference_share"]
    line = f"preference {share:.2%} of the first loss is the preference term (alpha {objective.alpha:g})"
    if share < _SMALL_SHARE:
        line += (
            "\nwarning: under 1 % the run is plain SFT on the chosen answers; values near 0.1 to 0.5 weigh both terms"
            " (small values such as 0.0006 belong to an older formula, see README)"
        )
    return line


def make_schedule(config: TrainConfig, work: Work) -> Schedule:
    """Learning rate over the optimizer steps of the epochs 0 … epoch_count - 1."""
    steps_per_epoch = work.batches_per_epoch // config.accumulate_grad_batches
    samples = config.devices * config.num_nodes * config.micro_bsz * config.accumulate_grad_batches
    return Schedule(
        lr_init=config.lr_init,
        lr_final=config.lr_final,
        warmup_steps=config.warmup_steps,
        total_steps=steps_per_epoch * config.epoch_count,
        first_step=steps_per_epoch * config.epoch_begin,
        weight_decay=config.weight_decay,
        weight_decay_final=config.weight_decay_final,
        exit_tokens=config.my_exit_tokens,
        tokens_per_step=samples * config.ctx_len,
    )


def _epochs(config: TrainConfig) -> int:
    return min(config.epoch_count, config.my_exit + 1) - config.epoch_begin


def _plan(
    config: TrainConfig, hardware: Hardware, shape: ModelShape, work: Work, schedule: Schedule, folder: Path
) -> str:
    steps_per_epoch = work.batches_per_epoch // config.accumulate_grad_batches
    steps = steps_per_epoch * _epochs(config)
    rates = ", ".join(f"{schedule.learning_rate(step):.4g}" for step in (0, steps // 2, max(steps - 1, 0)))
    weights = f"{config.quant_type} matrices" if config.quantised else "unquantised"
    if config.trains_states:
        trainable = f"{shape.state_parameter_count:,} state values; all weights frozen"
    else:
        trainable = f"all {shape.parameter_count:,} weights"
    batch = config.micro_bsz * config.accumulate_grad_batches * config.devices * config.num_nodes
    return "\n".join(
        [
            f"model      {config.load_model or 'fresh'}: {shape.parameter_count / 1e9:.3g} B parameters, "
            f"{shape.n_layer} layers, n_embd {shape.n_embd}, {shape.n_head} heads of {shape.head_size}, {weights}",
            f"training   {trainable}",
            f"hardware   {hardware.describe()}, grad_cp {config.grad_cp}",
            *work.lines,
            f"steps      {steps:,} ({_epochs(config)} epochs of {steps_per_epoch:,}), {batch} rows a step, "
            f"ctx_len {config.ctx_len}",
            f"rate       {rates} (start, middle, end); warm-up {config.warmup_steps} steps",
            f"results    {folder}/",
        ]
    )


def load_options(config: TrainConfig, hardware: Hardware) -> LoadOptions:
    """How the flags want the model on its device."""
    return LoadOptions(
        device=hardware.device,
        compute_dtype=hardware.compute_dtype,
        quant_type=config.quant_type if config.quantised else None,
        train_weights=not config.trains_states,
        recompute=Recompute.NOTHING if config.grad_cp == 0 else Recompute.ALL,
        head_size_divisor=config.head_size_divisor,
        dropout=config.dropout,
    )


def _load_model(config: TrainConfig, hardware: Hardware, shape: ModelShape, folder: Path) -> RWKV6:
    tensors: Mapping[str, torch.Tensor]
    if config.load_model:
        tensors = open_checkpoint(config.load_model)
    else:
        tensors = fresh_parameters(shape, config.random_seed, torch.float32)
        if global_rank() == 0:
            save_model(folder / "rwkv-init.pth", tensors, _file_dtype(hardware))
    states = load_state(config.load_state, shape) if config.load_state else None
    quiet = global_rank() != 0 or shape.parameter_count < 200_000_000
    with tqdm(total=len(parameter_shapes(shape)), desc="loading", unit="tensor", disable=quiet) as bar:
        model = build_model(tensors, shape, load_options(config, hardware), lambda name: bar.update() and None)
    if states is not None:
        set_states(model, states)
    return model


def choose_recomputation(model: RWKV6, work: Work, config: TrainConfig) -> None:
    """`--grad_cp 2`: from free memory on a GPU; on a CPU, where memory is not the limit, the light mode."""
    if config.grad_cp != 2:
        return
    if model.device.type == "cuda":
        plan = plan_memory(model, work.row_tokens, config.memory_gib)
    else:
        plan = MemoryPlan(model.shape.n_layer, model.shape.n_layer, keep_dequantized=False)
    plan.apply(model)
    say(f"memory     {plan}")


def _file_dtype(hardware: Hardware) -> torch.dtype:
    return torch.float32 if hardware.compute_dtype == torch.float32 else torch.bfloat16


def _save(model: RWKV6, config: TrainConfig, path: Path) -> None:
    """Writes the state alone, or with --train_type none the whole model in bf16."""
    if config.trains_states:
        save_state(path, state_tensors(model))
    else:
        names = parameter_shapes(model.shape)
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters() if name in names}
        save_model(path, {name: tensors[name] for name in names}, torch.bfloat16)


def _evaluate(label: str, model: RWKV6, work: Work) -> HeldOut | None:
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
    epochs = _epochs(config)
    if epochs < 1:
        raise ConfigError(f"--my_exit {config.my_exit} lies before --epoch_begin {config.epoch_begin}: raise it")
    accumulate = config.accumulate_grad_batches
    trained_elements = sum(parameter.numel() for _, parameter in module.trained())
    control = StepControl(schedule, accumulate)
    sinks = _sinks(config, hardware, module, folder, work.batches_per_epoch // accumulate * epochs, trained_elements)
    monitor = TrainingMonitor(control, sinks, config.epoch_begin, config.ctx_len)
    saver = CheckpointSaver(
        lambda path: _save(module.model, config, path), folder, config.epoch_begin, config.epoch_save
    )
    stopper = Stopper(schedule)
    _quieten_lightning()
    trainer = pl.Trainer(
        **trainer_arguments(hardware, config, trained_elements),
        max_epochs=epochs,
        limit_train_batches=work.batches_per_epoch,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=GRADIENT_CLIP,
        callbacks=[control, monitor, saver, stopper, AtEnd(finish)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        deterministic=hardware.device.type == "cpu",
    )
    try:
        trainer.fit(module, work.loader)
    except TrainingError as error:
        last_good = folder / "rwkv-last-good.pth"
        if global_rank() == 0:
            _save(module.model, config, last_good)
        raise TrainingError(f"{error}; the weights before this step are in {last_good}") from error
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
        sinks.append(
            WandbSink(config, f"{shape.vocab_size} ctx{config.ctx_len} L{shape.n_layer} D{shape.n_embd}")
        )
    if config.fapi_logging_callback:
        sinks.append(HttpSink(config.fapi_logging_address))
    return sinks


def _memory_advice(config: TrainConfig, hardware: Hardware) -> str:
    total = torch.cuda.get_device_properties(hardware.device).total_memory / 2**30
    changes = []
    if config.grad_cp != 1:
        changes.append("--grad_cp 1")
    if config.micro_bsz > 1:
        accumulate = config.accumulate_grad_batches * 2
        changes.append(f"--micro_bsz {config.micro_bsz // 2} --accumulate_grad_batches {accumulate}")
    if not config.quantised and config.trains_states:
        changes.append("--quant 1 --quant_type nf4")
    if config.orpo:
        changes.append(f"--rlhf_max_corpus_len {max(config.rlhf_max_corpus_len // 2, 1)}")
    else:
        changes.append(f"--ctx_len {max(config.ctx_len // 2, 1)}")
    if config.quantised and config.quant_type == "int8":
        changes.append("--quant_type nf4")
    changes += ["a GPU that no other program uses (see nvidia-smi)", "a smaller base model"]
    return f"the GPU ran out of its {total:.1f} GiB; the cheapest ways out: {', or '.join(changes[:3])}"


def _summary(config: TrainConfig, result: RunResult, monitor: TrainingMonitor) -> str:
    lines = [""]
    if result.stopped_by:
        lines.append(f"stopped by {result.stopped_by} after {len(result.losses)} steps; the state so far is saved")
    if result.losses:
        lines.append(f"steps      {len(result.losses):,}, loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}")
    steady = sorted(monitor.step_seconds[2:])
    if steady:
        lines.append(f"speed      {steady[len(steady) // 2]:.3f} s/step (median)")
    if monitor.used_bytes:
        peak, used = monitor.peak_bytes / 2**30, monitor.used_bytes / 2**30
        lines.append(f"memory     allocator peak {peak:.2f} GiB, device used {used:.2f} GiB")
    if result.before is not None and result.after is not None:
        lines += [f"held out   before: {result.before}", f"           after:  {result.after}"]
    lines.append(f"saved      {', '.join(str(path) for path in result.files)}")
    if config.trains_states:
        merged = Path(config.proj_dir) / "merged.pth"
        lines += [
            "next       use the state file in a client that loads states, or make a model that contains it:",
            f"           python merge_state.py {config.load_model} {result.final_file} {merged}",
        ]
    else:
        lines += [
            "next       tune a state on it:",
            f"           python train.py --load_model {result.final_file} --data_file YOUR.jsonl",
        ]
    return "\n".join(lines)


def _quieten_lightning() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
