"""Going on with a run as if it had never stopped.

Every part of a run that has a state says so (`Part`). What all of them say after an optimizer step is a snapshot on the
host; a thread writes it to `rwkv-resume.pth` while training goes on, and what was there before becomes
`rwkv-resume-previous.pth`. A snapshot knows nothing of devices: tensors stand under their checkpoint keys, whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from src import storage
from src.config import TrainConfig
from src.config.hardware import STRATEGIES
from src.config.recognition import files_of
from src.errors import CheckpointError, ConfigError
from src.identity import files_of_model
from src.system import command_here
from src.training.folder import PREVIOUS, RESUME, Places
from src.training.joined import Joined
from src.training.sharded import is_sharded, values_on_host

_FORMAT = 1
_SLOWEST_BYTES_PER_SECOND = 20e6
_SHARE_OF_TIME = 100
_SHORTEST_SECONDS = 60.0
_HASHED_BYTES = 2**24
_SAMPLES, _SAMPLE_BYTES = 256, 2**16

FREE = {
    "val_file", "val_steps", "early_stop", "load_partial", "epoch_save", "save_minutes", "my_exit", "orpo_debug",
    "wandb", "plot", "sample_prompts", "sample_steps", "tensorboard", "fapi_logging_callback", "fapi_logging_address",
    "ds_bucket_mb", "memory_gib", "cuda_graph", "offload_activations", "chunk_keep",
}  # fmt: skip
"""Flags that may differ when a run goes on: they change nothing that is trained."""
ROUNDING = {
    "accelerator", "strategy", "grad_cp", "chunk_ctx", "devices", "num_nodes", "accumulate_grad_batches", "epoch_steps",
}  # fmt: skip
"""Flags that may differ as well, but change the order of sums; steps and their batches must stay what they are."""
_OF_THE_COMMAND = {"proj_dir", "resume", "overwrite", "demo", "dry_run", "evaluate", "doctor", "config", "preview"}
TRAINED = "trained"
"""Name of the part that holds what is trained."""
_INPUTS = ("load_model", "data_file", "mix", "rlhf_train_file")


class Part(Protocol):
    """A part of a run that has a state between two optimizer steps."""

    def state(self) -> dict[str, Any]:
        """Tensors, numbers, texts, and dicts of them by name; every rank is asked, rank 0's answer is kept."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes on what `state` gave, on every rank; tensors are on the host."""
        ...


@dataclass(frozen=True)
class Settled:
    """A tensor on the host, in a part's state, that nobody writes to any more: a snapshot needs no copy of it."""

    tensor: Tensor


class AskedAnew:
    """A part that is made for every question, because what it is about changes."""

    def __init__(self, make: Callable[[], Part]) -> None:
        self._make = make

    def state(self) -> dict[str, Any]:
        """See Part."""
        return self._make().state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Part."""
        self._make().restore(state)


class TrainedTensors:
    """What is trained, fp32, by checkpoint key."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = dict(named)

    def state(self) -> dict[str, Any]:
        """See Part; a collective where they are sharded, and whole on the first rank."""
        if any(map(is_sharded, self._named.values())):
            return values_on_host(self._named.items())
        return {name: parameter.detach() for name, parameter in self._named.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Part; in place, and before an engine makes copies of its own."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(state[name])


class OptimizerMoments:
    """An optimizer's numbers by checkpoint key, whole tensors, whichever rank's engine keeps a piece of them.

    Args:
        named: what is trained, by checkpoint key.
        optimizer: torch's, or DeepSpeed's around one.
        engine: whether it is DeepSpeed's.
        joined: wholes that this engine was given, of whose pieces `named` is; None if it was given these themselves.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        optimizer: Any,
        *,
        engine: bool,
        joined: Joined | None = None,
    ) -> None:
        self._named = dict(named)
        self._joined = joined
        self._optimizer = optimizer
        self._engine = engine
        self._sharded = any(map(is_sharded, self._named.values()))

    def state(self) -> dict[str, Any]:
        """See Part; under an engine a collective."""
        if not self._engine:
            return {name: dict(self._optimizer.state[p]) for name, p in self._named.items()}
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        flat = next(iter(self._optimizer.optimizer.state.values()))
        shared = {key: value for key, value in flat.items() if not _is_moment(value)}
        keys = sorted(flat.keys() - shared.keys())

        def moments_of(parameter: nn.Parameter) -> dict[str, Any]:
            return {key: safe_get_full_optimizer_state(parameter, key) for key in keys}

        if self._joined:
            return {
                piece.name: {**shared, **{key: piece.of(whole) for key, whole in moments.items()}}
                for given, pieces in self._joined.pieces.items()
                for moments in [moments_of(given)]
                for piece in pieces
            }
        return {name: {**shared, **moments_of(parameter)} for name, parameter in self._named.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Part."""
        if self._engine:
            self._restore_engine(state)
            return
        names = {parameter: name for name, parameter in self._named.items()}
        now = self._optimizer.state_dict()
        order = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        now["state"] = {n: dict(state[names[parameter]]) for n, parameter in enumerate(order) if parameter in names}
        self._optimizer.load_state_dict(now)  # which puts each where this optimizer wants it

    def _restore_engine(self, state: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        inner = self._optimizer.optimizer
        sample = next(iter(state.values()))
        on_host = type(inner).__module__.startswith("deepspeed")  # its steps are plain numbers
        for group, flat in self._pieces():
            for key, value in sample.items():
                if _is_moment(value):
                    inner.state[flat][key] = torch.zeros_like(flat)
                elif on_host:
                    inner.state[flat][key] = int(value)
                else:
                    where = flat.device if group.get("fused") or group.get("capturable") else "cpu"
                    inner.state[flat][key] = torch.tensor(float(value), device=where)
        self._link()
        for key in [key for key, value in sample.items() if _is_moment(value)]:
            if self._joined:
                values = [(given, self._joined.whole_of(given, state, key)) for given in self._joined.pieces]
            else:
                values = [(parameter, state[name][key]) for name, parameter in self._named.items()]
            for parameter, value in values:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _pieces(self) -> list[tuple[dict[str, Any], Any]]:
        """Each of this rank's flat tensors with its group."""
        groups = self._optimizer.optimizer.param_groups
        if not self._sharded:
            return list(zip(groups, self._optimizer.single_partition_of_fp32_groups, strict=True))
        flats = enumerate(self._optimizer.fp32_partitioned_groups_flat)
        return [(groups[self._optimizer.sub_group_to_group_id[number]], flat) for number, flat in flats]

    def _link(self) -> None:
        """Tells DeepSpeed where each tensor's moments lie, which it does itself after its first step of one group."""
        if self._sharded:  # whose tensors know it from the beginning
            return
        from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

        groups = zip(self._optimizer.bit16_groups, self._optimizer.single_partition_of_fp32_groups, strict=True)
        for parameters, flat in groups:
            lazy_init_hp_params_optimizer_state(parameters, flat, self._optimizer.optimizer.state)


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


class RandomState:
    """torch's random numbers of every rank, on the host and on its device; dropout draws from them.

    Args:
        device: of this rank.
        gather: from a rank's tensor to all ranks', [ranks, …]; a collective.
    """

    def __init__(self, device: torch.device, rank: int = 0, gather: Callable[[Tensor], Tensor] | None = None) -> None:
        self._device = device
        self._rank = rank
        self._gather = gather

    def state(self) -> dict[str, Any]:
        """See Part."""
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        if self._gather is None:
            return {name: state[None] for name, state in states.items()}
        return {name: self._gather(state.to(self._device)) for name, state in states.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Part; ranks that the run did not have keep what their seed gave them."""
        if self._rank < len(state["cpu"]):
            torch.set_rng_state(state["cpu"][self._rank].clone())
        if self._device.type == "cuda" and self._rank < len(state.get("cuda", ())):
            torch.cuda.set_rng_state(state["cuda"][self._rank].clone(), self._device)


@dataclass(frozen=True)
class SavedRun:
    """A run file's content.

    Attributes:
        path: of the file.
        run: the run's name in `metrics.jsonl`.
        steps: optimizer steps done.
        values: the flags it was begun with, all of them.
        figures: what else must stay as it was: batches of a step, steps of an epoch.
        inputs: fingerprints by flag.
        parts: states by name; those of a file are read when they are asked for.
        before: what held-out data gave before training, or None.
        notes: what to say about the file.
    """

    path: Path
    run: str
    steps: int
    values: Mapping[str, Any]
    figures: Mapping[str, int]
    inputs: Mapping[str, str]
    parts: Mapping[str, Any]
    before: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()

    def content(self) -> dict[str, Any]:
        """As it is written."""
        return {"format": _FORMAT, **{name: getattr(self, name) for name in _KEPT}}


_KEPT = [spec.name for spec in dataclasses.fields(SavedRun) if spec.name not in ("path", "notes")]


def saved_run(folder: Path) -> SavedRun:
    """The newest readable run file of a folder.

    Raises:
        ConfigError: there is none.
        CheckpointError: none can be read.
    """
    paths = [path for path in (folder / RESUME, folder / PREVIOUS) if path.exists()]
    if not paths:
        finished = (folder / "rwkv-final.pth").exists()
        what = "the run there is finished" if finished else f"there is no {RESUME}"
        raise ConfigError(f"--resume 1 has nothing to go on with in --proj_dir {folder}: {what}; leave it out")
    problems: list[CheckpointError] = []
    for path in paths:
        try:
            run = _read(path)
        except CheckpointError as problem:
            problems.append(problem)
            continue
        if problems:
            note = f"{problems[0]}; going on from the save before it, {path.name} (step {run.steps})"
            run = dataclasses.replace(run, notes=(note,))
        return run
    raise problems[0]


def _read(path: Path) -> SavedRun:
    file = storage.TensorFile(path, "run file")
    content = file.content
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a run file that this version can go on from: begin the run anew")
    if missing := [name for name in _KEPT if name not in content]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: begin the run anew")
    kept = {name: file.whole(content[name]) for name in _KEPT if name != "parts"}
    return SavedRun(path=path, parts=storage.StoredDict(file, content["parts"]), **kept)


def completed_flags(given: Mapping[str, str]) -> dict[str, str]:
    """The flags of a command line with `--resume 1`, those that it leaves out as the run was begun.

    Raises:
        UserError: there is no run to go on with.
    """
    folder = Path(given.get("proj_dir", str(TrainConfig.proj_dir)))
    return {**saved_run(folder).values["given"], **given}


def values_of(config: TrainConfig, precision: str) -> dict[str, Any]:
    """What a run file keeps of the flags: final values, and as texts those that make the same configuration.

    Args:
        config: final.
        precision: that is computed in.
    """
    final = {**dataclasses.asdict(config), "precision": precision}
    return {**final, "given": {name: str(value) for name, value in flags_of_run(config).items()}}


def flags_of_run(config: TrainConfig) -> dict[str, str | int | float]:
    """The flags that make this configuration when they are given, but for those of one command alone."""
    return {name: value for name, value in config.told_apart().items() if name not in _OF_THE_COMMAND}


def check_flags(config: TrainConfig, precision: str, figures: Mapping[str, int], saved: SavedRun) -> list[str]:
    """Compares a run with the one that it goes on with; returns what to say about harmless differences.

    Raises:
        ConfigError: naming every difference that would change what is trained.
    """
    now, notes, problems = values_of(config, precision), [], []
    prints = fingerprints(config)
    for spec in dataclasses.fields(TrainConfig):
        name, old, new = spec.name, saved.values.get(spec.name, spec.default), now[spec.name]
        same_file = name in _INPUTS and saved.inputs.get(name) == prints.get(name)
        if name in _OF_THE_COMMAND or (name == "data_type" and saved.inputs == prints):
            continue
        if name in _INPUTS and name in prints and not same_file:
            changed = f"was {old}" if old != new else "has changed since"
            problems.append(f"--{name} {new} {changed}")
        elif old != new:
            cuts_elsewhere = name == "chunk_ctx" and config.bptt_chunks > 0
            if _typed(name, old) == _typed(name, new):  # the machine differs, and no flag
                continue
            if name in FREE or same_file or (name in ROUNDING and not cuts_elsewhere):
                effect = "; sums are rounded in another order" if name in ROUNDING else ""
                notes.append(f"--{name} {_typed(name, new)} was {_typed(name, old)} before{effect}")
            else:
                problems.append(f"--{name} {_typed(name, new)} was {_typed(name, old)}")
    for name, value in saved.figures.items():
        if figures[name] != value:
            problems.append(f"{name.replace('_', ' ')}: {figures[name]}, was {value}")
    if problems:
        raise ConfigError(
            f"--resume 1 would not go on with the run of {saved.path.parent} but with another one: "
            f"{'; '.join(problems)}; leave these as they were, or choose another --proj_dir for a new run"
        )
    return notes


def _typed(name: str, value: Any) -> str:
    """A flag's final value as it can be given: a text that no flag takes is what `auto` chose."""
    if name == "strategy" and value not in STRATEGIES:
        return "auto"
    return repr(value) if value == "" else str(value)


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """By flag, what tells a run's input files from others: sizes, and hashes of them or of pieces all over them."""
    unused = {"data_file", "mix"} if config.preference else {"rlhf_train_file"}
    found = {}
    for name in _INPUTS:
        if name in unused or not getattr(config, name):
            continue
        if name == "load_model":
            named = list(map(str, files_of_model(config.load_model)))
        elif name == "rlhf_train_file":
            named = [config.rlhf_train_file]
        else:
            paths = [mix.path for mix in config.mixes] if name == "mix" else [config.data_file]
            named = [file for path in paths for file in files_of(path)]
        files = [Path(f"{file}{suffix}") for file in named for suffix in ("", ".bin", ".idx")]
        if present := [file for file in files if file.is_file()]:
            shares = [f"{mix.share:g}" for mix in config.mixes] if name == "mix" else []
            found[name] = " ".join([*shares, *map(_fingerprint, present)])
    return found


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _HASHED_BYTES:
            digest.update(file.read())
        else:
            for piece in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * piece // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return f"{size}:{digest.hexdigest()[:32]}"


def command_to_go_on(folder: Path) -> str:
    """The command that continues a run, ready to copy."""
    return command_here("train.py", "--proj_dir", str(folder), "--resume", "1")


def seconds_between_saves(size_bytes: int, writing_seconds: float) -> float:
    """What a run chooses by itself, from the size of a save and how long the last one took."""
    return max(_SHORTEST_SECONDS, _SHARE_OF_TIME * writing_seconds, size_bytes / _SLOWEST_BYTES_PER_SECOND)


class RunWriter:
    """Writes snapshots, one at a time, in a thread of its own.

    Args:
        places: where they go.
        folder: where the newest snapshot is; None while there is none.
        step: of that snapshot.
    """

    def __init__(self, places: Places, folder: Path | None = None, step: int = 0) -> None:
        self.places = places
        self._thread: threading.Thread | None = None
        self._buffers: dict[str, Tensor] = {}
        self.folder = folder
        self.step = step
        self.seconds = 0.0
        self.bytes = 0

    @property
    def busy(self) -> bool:
        """Whether a file is being written."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, saved: SavedRun) -> None:
        """Takes a snapshot and begins to write it; what it is made of may change once this returns."""
        self.wait()
        begun = time.perf_counter()
        content = saved.content()
        used: dict[str, Tensor] = {}
        snapshot = self._on_host(content, "", used)
        self._buffers = used  # what takes turns does not leave a buffer for each
        self.bytes = storage.tensor_bytes(snapshot)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        # Not a daemon: a process that ends lets it finish.
        self._thread = threading.Thread(target=self._write, args=(snapshot, begun), name="run file")
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def remove(self) -> None:
        """Removes what was written: the run is complete."""
        self.wait()
        for folder in {self.places.folder, self.folder or self.places.folder}:
            for name in (RESUME, PREVIOUS):
                self.places.remove(folder / name)
        self.folder = None

    def _write(self, content: Mapping[str, Any], begun: float) -> None:
        try:
            path = self.places.save(lambda path: storage.save(path, content, previous=path.with_name(PREVIOUS)), RESUME)
        except CheckpointError as problem:
            self.places.say(
                RESUME, "nowhere", f"{problem}; training goes on, but after a stop only from the save before"
            )
        else:
            self.folder, self.step = path.parent, content["steps"]
        self.seconds = time.perf_counter() - begun

    def _on_host(self, value: Any, name: str, used: dict[str, Tensor]) -> Any:
        """A copy; tensors of a GPU go to pinned memory, which is kept for the next one in `used`."""
        if isinstance(value, Mapping):
            return {key: self._on_host(entry, f"{name}/{key}", used) for key, entry in value.items()}
        if isinstance(value, Settled):
            return value.tensor
        if not isinstance(value, Tensor):
            return value
        if not value.is_cuda:
            return value.detach().clone(memory_format=torch.contiguous_format)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        used[name] = buffer
        return buffer.copy_(value, non_blocking=True)


@dataclass(frozen=True)
class Session:
    """What makes a process part of a run.

    Attributes:
        saved: as the run is now, with empty `parts` if it begins.
        writer: of run files.
        save_seconds: between two of them; 0 lets size and speed decide.
    """

    saved: SavedRun
    writer: RunWriter
    save_seconds: float = 0.0
