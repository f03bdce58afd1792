"""Merging and exporting, said in words; and whether a merged model computes what was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from src.adapters.trained import Told, Trained
from src.checkpoint import open_checkpoint
from src.config import MergeConfig
from src.errors import CheckpointError, ConfigError, DataError
from src.loading import LoadOptions, build_model
from src.merge import Merged, MergeReport, export_hf, merge
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.tokenizer import tokenizer_for_vocabulary

VERIFIED_TOKENS = 256
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
    told = Told(config.type, config.alpha, config.lora_init, config.writer)
    if config.export:
        exported = export_hf(config.base_model, config.file, config.output, told)
        print(
            f"exported {exported.describe()}\nwritten  {config.output}/adapter_model.safetensors, adapter_config.json"
        )
        return 0
    device = _device(config.device)
    tokens = _tokens(config.verify_text) if config.verify else None
    quant = config.quant or "none"
    report = merge(config.base_model, config.file, config.output, told, quant=quant, device=device)
    for line in [*_report(report, config, quant), *config.notes()]:
        print(line)
    if tokens is not None:
        _verify(report, Path(config.output), quant, device, tokens(report.shape))
    return 0


def _report(report: MergeReport, config: MergeConfig, quant: str) -> Iterator[str]:
    shape, trained = report.shape, report.trained
    if trained.adapters:
        packed = f", after packing and unpacking as {quant}" if quant != "none" else ""
        yield f"merged   {trained.describe()}, computed in fp32 and rounded once{packed}"
    if trained.weights:
        first = next(iter(trained.weights))
        yield f"merged   {len(trained.weights)} further weights in place of the base model's, {first} among them"
    if trained.states:
        yield (
            f"merged   {shape.n_layer} layers of state [{shape.n_head}, {shape.head_size}, {shape.head_size}] "
            f"in {report.state_dtype}{', replacing the one that was there' if report.replaced_state else ''}"
        )
    changed = len(trained.adapters.keys() | trained.weights.keys())
    rest = f", {len(shape.parameter_shapes()) - changed} of {len(shape.parameter_shapes())} tensors" if changed else ""
    yield f"base     {shape.parameter_count:,} weights in {report.base_dtype}{rest}, copied bit for bit"
    yield f"written  {config.output} ({report.size_bytes:,} bytes)"
    yield from _notes(report, config)
    yield "next     load it like the base model" + (
        ": clients on the rwkv package (0.8.26 and later) start every\n"
        "         conversation from the state; ChatRWKV and RWKV-Runner take the state file itself instead"
        if trained.states
        else ""
    )


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
            yield (
                f"note     it was trained on {trained.quant} weights and merged into unpacked ones, which differ: "
                f"--verify 1 says how far, --quant {trained.quant} merges it as it was trained"
            )
    made_on = trained.base.get("size_bytes")
    if made_on not in (None, Path(config.base_model).stat().st_size):
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

    def logits_of(tensors: Mapping[str, Tensor], quant_type: str | None = None) -> Tensor:
        model = build_model(tensors, shape, LoadOptions(device, torch.float32, quant_type)).eval()
        if isinstance(tensors, _Apart):
            for key, adapter in trained.adapters.items():
                model.adapt(key, adapter.module, 0)
        return _logits(model, tokens)

    merged = logits_of(open_checkpoint(output))
    error = _relative(merged, logits_of(_Apart(Merged(report.base, trained, quant, device), trained)))
    limit = _WIDE_LIMIT if report.base_dtype in ("float32", "float64") else _NARROW_LIMIT
    print(f"verify   logits of {tokens.numel()} tokens: the merged model's are {error:.1e} from base + trained (rms)")
    if error > _WRONG * limit:
        raise CheckpointError(
            f"{output} is no merge of its inputs: its logits are {error:.1e} from theirs, and rounding to "
            f"{report.base_dtype} explains {limit:.0e}; do not use it"
        )
    if error > limit:
        print(f"warning  that is more than the {limit:.0e} that rounding to {report.base_dtype} explains")
    if quant == "none" and trained.quant not in (None, "none"):
        packed = logits_of(_Apart(Merged(report.base, trained, device=device), trained), trained.quant)
        print(
            f"verify   they are {_relative(merged, packed):.1e} from the {trained.quant} model as it was trained (rms)"
        )


class _Apart(Mapping[str, Tensor]):
    """A merged model's tensors, but what stood frozen beside adapters where there are some."""

    def __init__(self, merged: Merged, trained: Trained) -> None:
        self._merged, self._trained = merged, trained

    def __getitem__(self, key: str) -> Tensor:
        return self._merged.frozen(key) if key in self._trained.adapters else self._merged[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._merged)

    def __len__(self) -> int:
        return len(self._merged)


@torch.no_grad()
def _logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """[T, V] fp32 on the CPU."""
    hidden, _ = model(tokens[None])
    return model.logits(hidden)[0].float().cpu()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _tokens(text_file: str) -> Callable[[ModelShape], Tensor]:
    """From the model's sizes to int64 [T]: the text's first tokens, or random ones.

    Raises:
        DataError: the file cannot be read, or is empty.
    """
    if not text_file:
        return lambda shape: torch.randint(
            shape.vocab_size, (VERIFIED_TOKENS,), generator=torch.Generator().manual_seed(0)
        )
    try:
        text = Path(text_file).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--verify_text {text_file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--verify_text {text_file} is no UTF-8 text: convert it") from error
    if not text:
        raise DataError(f"--verify_text {text_file} is empty: name another text")
    return lambda shape: torch.tensor(tokenizer_for_vocabulary(shape.vocab_size).encode(text)[:VERIFIED_TOKENS])


def _device(name: str) -> torch.device:
    """Where matrices are computed.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked for and no CUDA GPU is visible: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
