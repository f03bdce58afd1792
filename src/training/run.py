"""One training run from flags to files; `train` reads as its table of contents."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from src import storage
from src.adapters.files import refuse_other_architecture, said_beside, states_beside
from src.adapters.full import FullTraining
from src.adapters.lisa import Lisa
from src.adapters.method import Method, method_of
from src.adapters.turns import LayerTurns
from src.checkpoint import Checkpoint, fresh_checkpoint, load_state, open_checkpoint, read_tensors, save_model
from src.config import TrainConfig, run_file
from src.config.chunks import AS_MANY_AS_FIT
from src.config.recognition import files_of
from src.device import global_rank, is_started_by_first, spare_threads, without_memory
from src.errors import CheckpointError, ConfigError, UserError
from src.identity import FileIdentity
from src.loading import LoadOptions, open_model
from src.model.architectures import FRESH, named
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.ops.kernels import compile_ahead
from src.scratch import Scratch
from src.system import end_with_parent, process_bytes
from src.training import lightning
from src.training.console import warn
from src.training.engine import Hardware, apply_hardware, resolve_hardware
from src.training.evaluation import HeldOut, kept_held_out, restored_held_out
from src.training.exits import unharmed_by_save_requests
from src.training.folder import Places, clean, locked, new_run_id, refuse_results, spare_inputs
from src.training.logs import require_loggers
from src.training.memory import (
    MemoryPlan,
    bytes_of_trained,
    chunk_that_fits,
    plan_memory,
    recorded_bytes,
    require_memory_of_run,
)
from src.training.objectives import PreferenceObjective
from src.training.optimizers import can_be_resumed
from src.training.progress import Start
from src.training.references import Reference
from src.training.report import RunResult, beginning_of, memory_advice, plan_of, say, summary_of
from src.training.results import Results
from src.training.resume import (
    TRAINED,
    RunWriter,
    SavedRun,
    Session,
    check_flags,
    command_to_go_on,
    fingerprints,
    flags_of_run,
    saved_run,
    values_of,
)
from src.training.samples import Sampler, kept_answers, sampler_of
from src.training.sharded import any_sharded, computable, readable
from src.training.unpacked import measure_unpacked
from src.training.work import Work, epochs_of, make_schedule, prepare_work

DATA_FLAGS = ("data_file", "val_file")
INPUT_FLAGS = ("config", "load_model", "load_state", "load_adapter", "rlhf_train_file", *DATA_FLAGS, "sample_prompts")
SIZE_FLAGS = (
    *("n_layer", "n_embd", "dim_att", "dim_ffn", "vocab_size", "head_size_a", "double_extra_dim"),
    "head_size_divisor",
)
_SMALL_SHARE = 0.01
_PROBE_BYTES = 4096


def train(config: TrainConfig) -> RunResult:
    """Trains as the flags say and returns what came of it.

    Raises:
        UserError: for everything the user can put right, before any step where possible.
    """
    if is_started_by_first():
        end_with_parent()
    with contextlib.ExitStack() as held, unharmed_by_save_requests():
        folder = Path(config.proj_dir)
        if folder.is_dir():
            _take(folder, config, held)
        _prove_room(folder)
        saved = saved_run(folder) if config.resume else None
        config = with_seed(config)
        require_loggers(config)
        hardware = resolve_hardware(config)
        # From here on the engine is the one that runs, not what was asked for: `auto` with several GPUs is DeepSpeed.
        config = dataclasses.replace(config, strategy=hardware.strategy)
        method = method_of(config)
        lightning.begin()
        apply_hardware(hardware, config, small_messages=method.small)
        with without_memory(lambda: memory_advice(config, method, hardware, chunk_instead(config, method, hardware))):
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
        what = f"DeepSpeed's states of --optim {config.optim}"
        if saved:
            raise ConfigError(
                f"--resume 1 cannot go on under {hardware.strategy} with the run of {saved.path.parent}: {what} cannot "
                "be taken from its file; leave --strategy and --devices as they were"
            )
        say(f"note: --resume 1 cannot go on with this run: {what} are not saved")
    base = open_checkpoint(config.load_model) if config.load_model else None
    shape = model_shape(config, base)
    method.trained_names(shape)  # refuses what does not fit the model
    if config.chunk_ctx == AS_MANY_AS_FIT:
        tokens = chunk_that_fits(config, method, shape, hardware.device, hardware.compute_dtype)
        say(f"note: --chunk_ctx auto: {f'--chunk_ctx {tokens} fits' if tokens else 'whole rows fit'}")
        config = dataclasses.replace(config, chunk_ctx=tokens)
    for path in filter(None, (config.load_state, config.load_adapter)):
        refuse_other_architecture(path, shape)
    # What a resumed run goes on from replaces states that are trained, but for the start, with which a reference is
    # measured and samples are compared; those that stay as they are stand in no other file.
    wants_start = not saved or not config.trains_states or config.dpo or config.sample_prompts
    state_file = config.load_state if wants_start else ""
    if state_file:
        load_state(state_file, shape)
    identity = FileIdentity(config.load_model, at_once=global_rank() == 0) if config.load_model else None
    method.check_files(shape, identity)
    made_on = (said_beside(config.load_state) or {}).get("base") if config.load_state else None
    if made_on and identity and made_on.get("size_bytes", identity.size_bytes) != identity.size_bytes:
        size = made_on["size_bytes"]
        say(f"note: {config.load_state} was trained on {made_on.get('file')} of {size} bytes, another model")
    if config.load_adapter and not config.load_state and (beside := states_beside(said_beside(config.load_adapter))):
        say(f"note: {config.load_adapter} was trained beside the states of {beside}: give them with --load_state")
    work = prepare_work(config, shape)
    sampler = sampler_of(config, shape, chats=work.chats)
    require_memory_of_run(config, hardware.device, shape, work)
    figures = {
        "steps_per_epoch": work.batches_per_epoch // config.accumulate_grad_batches,
        "micro_batches_per_step": config.accumulate_grad_batches * config.processes,
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
    lightning.ready()  # operators of bitsandbytes import what Lightning does, and two threads must not do that at once
    from src.training.fitting import fit, trained_part
    from src.training.module import TrainingModule, kernels_of_updates

    base = base or fresh_base(config, hardware, shape, folder)
    options = load_options(config, method, hardware, shape)
    compile_ahead(kernels_of_updates(config, method), hardware.device)
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
        trained_part(module).restore(saved.parts[TRAINED])
        before = restored_held_out(saved.before)
    else:
        before = _evaluate(beginning_of(config), model, work)
        if isinstance(work.objective, PreferenceObjective):
            say(_preference_share(model, work, work.objective, first_batch))
    results = Results(method, config, identity)
    run = saved.run if saved else new_run_id()
    places = Places(folder, run, warn)
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


def _prove_room(folder: Path) -> None:
    """Proves, before anything is read, that a file can be written in a folder, or where it will be made.

    Raises:
        ConfigError: none can.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ConfigError(f"--proj_dir {folder} cannot be written: it is not a folder; choose another")
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    with _writing_to(folder), tempfile.TemporaryFile(dir=there) as probe:
        probe.write(b"\0" * _PROBE_BYTES)
        probe.flush()


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Inside, what the system refuses is the folder's fault."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--proj_dir {folder} cannot be written ({error.strerror}): choose another folder or free some space"
        ) from error


def _prepare_folder(config: TrainConfig) -> None:
    """Creates the output folder."""
    folder = Path(config.proj_dir)
    spare_inputs(folder, _inputs(config), range(config.epoch_begin, config.epoch_begin + epochs_of(config)))
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _prove_room(folder)


def _write_flags(config: TrainConfig, folder: Path) -> None:
    """Leaves the flags of this run for `--config`."""
    path = folder / run_file.NAME
    try:
        with storage.replacing(path) as file:
            file.write(run_file.as_toml(flags_of_run(config)).encode())
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror}); training goes on")


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


def chunk_instead(config: TrainConfig, method: Method, hardware: Hardware) -> int:
    """The `--chunk_ctx` with which a run would have fitted that ran out of memory; 0 where that cannot be said."""
    with contextlib.suppress(UserError, RuntimeError):  # of a device that answers nothing any more
        shape = model_shape(config, open_checkpoint(config.load_model) if config.load_model else None)
        own = torch.cuda.memory_allocated(hardware.device) if hardware.on_gpu else process_bytes()[0]
        return chunk_that_fits(config, method, shape, hardware.device, hardware.compute_dtype, own)
    return 0


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
        problems.insert(
            0,
            f"--my_testing {config.my_testing} contradicts the checkpoint, which is {shape.family}; leave the flag out "
            f"or give {shape.architecture}",
        )
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


def _preference_share(model: LanguageModel, work: Work, objective: PreferenceObjective, first: int) -> str:
    """How much of a micro-batch's loss the preference term is: of the first in which a pair has a reject."""
    # An epoch may be any number of passes, and none of them has what the first lacks.
    batches = min(work.batches_per_epoch, work.dataset.batches_per_pass)
    batch = next(filter(objective.compares, map(work.dataset.__getitem__, range(first, first + batches))), None)
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
    by_kernels = hardware.device.type == "cuda" and hardware.compute_dtype is torch.bfloat16
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
        lays_out=not hardware.has_engine,
        reserves_room=by_kernels and config.dense_and_whole,
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
    return method.turns(model, base, config.quant_type if config.quantised else None, Scratch(folder, warn))


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
        if work.memories:
            waiting += recorded_bytes(config, method, model.shape, work.row_tokens // config.chunk_ctx, 2)
        trained = bytes_of_trained(config, method, model.shape)
        plan = plan_memory(model, method, work.row_tokens, config.memory_gib, waiting, trained)
    else:
        plan = MemoryPlan(layers, light_layers=layers)
    plan.apply(model)
    if config.grad_cp == 2:
        say(f"memory     {plan}")


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
