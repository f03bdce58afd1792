"""`python train.py --evaluate 1`: held-out data with a base model, and with what was trained on it; nothing is trained.

The numbers are those that a run with the same flags prints of the same data, because they are measured by the same
function on a model that was put together in the same way.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from src.adapters.files import said_beside
from src.adapters.trained import Told, Trained, read_tuned
from src.checkpoint import open_checkpoint
from src.config import TrainConfig
from src.config.model import METHOD_DEFAULTS, quant_name
from src.device import apply_device, resolve_device, without_memory
from src.identity import FileIdentity
from src.loading import LoadOptions
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.training.evaluation import HeldOut
from src.training.references import Reference
from src.training.report import counted, say
from src.training.run import model_shape, with_seed
from src.training.work import HeldOutWork, prepare_held_out
from src.tuned import Tuned


def evaluate(config: TrainConfig) -> tuple[HeldOut, HeldOut | None]:
    """Measures what `--val_file` or `--val_share` holds out, and prints it.

    Args:
        config: the flags of a run; those of training have no effect.

    Returns:
        What the base model gave, and what it gave with `--load_state` or `--load_adapter`, if there is one.

    Raises:
        UserError: for everything the user can put right.
    """
    config = with_seed(config)
    base = open_checkpoint(config.load_model)
    shape = model_shape(config, base)
    trained = _trained(config, shape)
    config = _packed_as_trained(config, trained)
    held_out = prepare_held_out(config, shape)
    device = resolve_device(config.accelerator, config.precision)
    apply_device(device)
    packed = quant_name(config.quant_type) if config.quantised else None
    say(
        f"model      {config.load_model}: {shape.family}, {counted(shape.parameter_count)} parameters, "
        f"{f'{packed} matrices' if packed else 'unquantised'}"
    )
    say(f"hardware   {device.describe()}")
    if trained is not None:
        say(f"tuned      with {' and '.join(filter(None, (config.load_state, config.load_adapter)))}")
        if trained.quant not in (None, "none" if packed is None else packed):
            say(f"           which was trained on {'unpacked' if trained.quant == 'none' else trained.quant} weights")
        if trained.beside:
            say(f"           which was trained beside the states of {trained.beside}: give them with --load_state")
    say("\n".join(held_out.lines))
    options = LoadOptions(
        device.device, device.compute_dtype, packed, bool(config.quant_head), head_size_divisor=config.head_size_divisor
    )
    with without_memory(lambda: "no memory left for the model: use --quant 1, or a smaller --ctx_len"):
        tuned = Tuned(base, trained, options)
        tuned.use(tuned=False)
        for line in _prepared(held_out, tuned.model, config):
            say(line)
        before = held_out.measure(tuned.model)
        say(f"held out   untuned: {before}")
        if not tuned.differs:
            return before, None
        tuned.use(tuned=True)
        after = held_out.measure(tuned.model)
    say(f"held out   tuned: {after}")
    return before, after


def _packed_as_trained(config: TrainConfig, trained: Trained | None) -> TrainConfig:
    """With the quantisation that the result was trained on, or the method's, where no flag says one."""
    if config.quant >= 0:
        return config
    if trained is None or trained.quant is None:
        return dataclasses.replace(config, quant=METHOD_DEFAULTS[config.method]["quant"])
    if trained.quant == "none":
        return dataclasses.replace(config, quant=0)
    return dataclasses.replace(config, quant=1, quant_type=trained.quant, quant_head=int(trained.quant_head))


def _trained(config: TrainConfig, shape: ModelShape) -> Trained | None:
    """What is measured beside the base model."""
    told = Told(init=config.pissa_init)
    if config.load_adapter and said_beside(Path(config.load_adapter)) is None:
        kind = "" if config.adapter in ("none", "lisa") else config.adapter
        told = Told(kind, config.lora_alpha if kind == "lora" else 0.0, config.pissa_init)
    return read_tuned(config.load_state, config.load_adapter, shape, told)


def _prepared(held_out: HeldOutWork, model: LanguageModel, config: TrainConfig) -> list[str]:
    """Measures what the loss needs of the base model, and leaves no file of it."""
    with tempfile.TemporaryDirectory() as folder:
        alone = dataclasses.replace(config, load_state="", load_adapter="")
        return held_out.prepare(model, Reference(alone, FileIdentity(config.load_model, at_once=False), Path(folder)))
