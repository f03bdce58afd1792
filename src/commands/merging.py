"""Merging and exporting, said in words; and whether a merged model computes what was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from src.adapters.trained import Told
from src.checkpoint import Checkpoint, open_checkpoint
from src.commands.comparison import compared_tokens, logits_on, relative_error
from src.config import MergeConfig
from src.config.model import quant_name
from src.errors import CheckpointError, ConfigError
from src.identity import size_of_model
from src.loading import LoadOptions, build_model
from src.merge import Apart, Merged, MergeReport, export_hf, merge
from src.output import several
from src.system import command_here

_WIDE_LIMIT, _NARROW_LIMIT = 1e-5, 1e-2
"""Relative errors of logits that rounding explains, in fp32 and in 16 bits."""
_WRONG = 10
"""So many times the limit is no rounding."""


def run(config: MergeConfig) -> int:
    """Merges or exports, and prints what was done.

    Returns:
        The exit code.

    Raises:
        UserError: an input cannot be used, or the merged model is wrong.
    """
    told = Told.by(config)
    if config.export:
        for subject, said in export_hf(config.base_model, config.file, config.output, told).lines(config.output):
            print(f"{subject:<8} {said}")
        return 0
    device = _device(config.device)
    base = open_checkpoint(config.base_model).info.shape if config.verify else None
    tokens = None if base is None else compared_tokens(config.verify_text, base)
    quant = config.quant or "none"
    report = merge(config.base_model, config.file, config.output, told, quant=quant, device=device)
    for line in [*_report(report, config, quant), *(f"note     {line}" for line in config.notes())]:
        print(line)
    if tokens is not None:
        _verify(report, Path(config.output), quant, device, tokens)
    return 0


def _report(report: MergeReport, config: MergeConfig, quant: str) -> Iterator[str]:
    shape, trained = report.shape, report.trained
    if trained.adapters:
        packed = f", after packing and unpacking as {quant_name(quant)}" if quant != "none" else ""
        yield f"merged   {trained.describe()}, computed in fp32 and rounded once{packed}"
    if trained.weights:
        weights, first = several(len(trained.weights), "further weight"), next(iter(trained.weights))
        yield f"merged   {weights} in place of the base model's, {first} among them"
    if trained.states:
        yield (
            f"merged   {shape.n_layer} layers of state [{shape.n_head}, {shape.head_size}, {shape.head_size}] "
            f"in {report.state_dtype}{', replacing the one that was there' if report.replaced_state else ''}"
        )
    changed = len(trained.adapters.keys() | trained.weights.keys())
    rest = f"; {len(shape.parameter_shapes()) - changed} of {len(shape.parameter_shapes())} tensors" if changed else ","
    yield f"base     {shape.parameter_count:,} weights in {report.base_dtype}{rest} copied bit for bit"
    yield f"written  {config.output} ({report.size_bytes:,} bytes)"
    yield from _notes(report, config)
    if config.output.endswith(".safetensors"):
        yield (
            "next     put the config.json and tokenizer of the base model in Hugging Face's form beside it;\n"
            "         train.py --load_model takes it as it is"
        )
    else:
        yield "next     load it like the base model" + (f": {shape.merged_state}" if trained.states else "")


def _notes(report: MergeReport, config: MergeConfig) -> Iterator[str]:
    """What a user should know of this merge."""
    trained = report.trained
    if trained.adapters and not config.quant:
        if trained.quant is None:
            yield (
                "note     nothing says whether it was trained on packed weights; it was merged into unpacked ones, and "
                "--quant nf4, fp4 or int8 merges it as such a training had it"
            )
        elif trained.quant != "none":
            how_far = "" if config.verify else "--verify 1 says how far, "
            yield (
                f"note     it was trained on {trained.quant} weights and merged into unpacked ones, which differ: "
                f"{how_far}--quant {trained.quant} merges it as it was trained"
            )
    if trained.beside:
        command = command_here("merge_state.py", config.output, trained.beside, "MERGED.pth")
        yield f"note     it was trained beside {trained.beside}, whose states are not in it; with them: {command}"
    made_on = trained.base.get("size_bytes")
    if made_on not in (None, size_of_model(config.base_model)):
        yield f"note     the state was trained on {trained.base.get('file')} of {made_on} bytes, which is another model"


def _verify(report: MergeReport, output: Path, quant: str, device: torch.device, tokens: Tensor) -> None:
    """Prints how far the merged model is from the base model with what was trained beside it.

    Raises:
        CheckpointError: further than any rounding.
        ConfigError: there is no such model here.
    """
    trained, shape = report.trained, report.shape
    if trained.by_output:
        raise ConfigError("--verify 1 cannot compare a Bat of peft's, which no model here computes: leave it out")

    def logits_of(tensors: Mapping[str, Tensor], quant_type: str | None = None, *, quant_head: bool = False) -> Tensor:
        own = tensors.info.shape if isinstance(tensors, Checkpoint) else shape
        model = build_model(tensors, own, LoadOptions(device, torch.float32, quant_type, quant_head)).eval()
        if isinstance(tensors, Apart):
            for key, adapter in trained.adapters.items():
                model.adapt(key, adapter.module)
        return logits_on(model, tokens)

    merged = logits_of(open_checkpoint(output))
    error = relative_error(merged, logits_of(Apart(Merged(report.base, trained, quant, device), trained)))
    limit = _WIDE_LIMIT if report.base_dtype in ("float32", "float64") else _NARROW_LIMIT
    amount = several(tokens.numel(), "token")
    print(f"verify   logits of {amount}: the merged model's are {error:.1e} from base + trained (rms)")
    if error > _WRONG * limit:
        raise CheckpointError(
            f"{output} is no merge of its inputs: its logits are {error:.1e} from theirs, and rounding to "
            f"{report.base_dtype} explains {limit:.0e}; do not use it"
        )
    if error > limit:
        print(f"warning  that is more than the {limit:.0e} that rounding to {report.base_dtype} explains")
    trained_on = trained.quant or quant_name(quant)
    if trained_on != "none":  # with matrices packed that have no adapter, and the head
        unpacked = Apart(Merged(report.base, trained, device=device), trained)
        error = relative_error(merged, logits_of(unpacked, trained_on, quant_head=trained.quant_head))
        print(f"verify   they are {error:.1e} from the {trained_on} model as it was trained (rms)")


def _device(name: str) -> torch.device:
    """Where matrices are computed.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for and no CUDA GPU is visible: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
