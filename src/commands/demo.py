"""The bundled demonstrations: a small base model learns a style it has never seen.

`python train.py` tunes a state on plain text; `python train.py --demo orpo` goes the whole way of preference
training, from a CSV of prompts and good answers. Both measure on texts that were not trained on. Any flag of
train.py given beside them overrides the demonstration's own. `src/demo/README.md` says where model and texts
come from.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from src.checkpoint import load_state, open_checkpoint
from src.commands.preparation import generate_rejects, prepare_pairs
from src.config import PairConfig, RejectConfig, TrainConfig
from src.data.preferences import TEMPLATES, read_rows
from src.device import global_rank
from src.errors import ConfigError
from src.generate import SamplingSettings, continued, encoded_prompt, inference, joined, read_prompts
from src.loading import LoadOptions, open_model
from src.storage import refuse_overlap
from src.system import command_here
from src.tokenizer import tokenizer_for_vocabulary
from src.training.engine import apply_hardware, resolve_hardware
from src.training.evaluation import START_POSITIONS, HeldOutLoss, HeldOutPreference
from src.training.report import RunResult, say
from src.training.run import train

BUNDLE = Path(__file__).resolve().parents[1] / "demo"

SFT_FLAGS = {
    "proj_dir": "out/demo-sft",
    "ctx_len": "512",
    "micro_bsz": "2",
    "epoch_steps": "130",
    "epoch_count": "1",
    "lr_init": "12",
    "lr_final": "0.5",
    "grad_cp": "0",
}
ORPO_FLAGS = {
    "orpo": "1",
    "proj_dir": "out/demo-orpo",
    "micro_bsz": "2",
    "epoch_steps": "160",
    "epoch_count": "1",
    "orpo_alpha": "0.8",
    "lr_init": "6",
    "lr_final": "0.1",
    "grad_cp": "0",
}
"""The demonstrations' own settings. So few steps want a larger rate than the default, which suits a long run."""

TEMPLATE = "user"
TURN_END = "\n\n"
SAMPLE_PROMPTS = ("23:1 The LORD", "9:10 The", "37:4 ")
"""How verses begin in what is trained on: with their number."""
SAMPLED_PAIRS = 2
SAMPLE_TOKENS = 110
REJECT_FLAGS = {"temperature": "1.2", "top_p": "1", "alpha_frequency": "0", "max_tokens": "100", "batch": "54"}
"""A frequency penalty would forbid the common letters of a byte vocabulary."""


def run_demo(given: Mapping[str, str]) -> RunResult:
    """Runs the demonstration that `--demo` names, by default sft.

    Args:
        given: flags of the command line as texts; they override the demonstration's.

    Raises:
        UserError: for everything the user can put right.
    """
    own = {} if {"resume", "proj_dir"} & given.keys() else {"overwrite": "1"}  # its own folder is there for that
    given = {"demo": "sft", **own, **given}
    reserved = ["train_type", "peft", "train_parts", "preview", "dry_run", "evaluate"]
    if given["demo"] == "orpo":
        reserved += ["rlhf_train_file", "val_file"]
    if wrong := [f"--{name} {given[name]}" for name in reserved if name in given]:
        raise ConfigError(f"--demo {given['demo']} brings its own: leave {' and '.join(wrong)} out")
    return _orpo_demo(given) if given["demo"] == "orpo" else _sft_demo(given)


def _sft_demo(given: Mapping[str, str]) -> RunResult:
    files = {"load_model": "base.pth", "data_file": "sft.jsonl", "val_file": "sft-held-out.jsonl"}
    config = TrainConfig.from_flags({**{flag: _bundled(name) for flag, name in files.items()}, **SFT_FLAGS, **given})
    say(
        "A demonstration: a small model of bytes, raised on novels and dictionaries, learns the style of biblical\n"
        "poetry, of which it has never seen a line. Only its initial state is trained.\n"
    )
    return _train_and_compare(config, SAMPLE_PROMPTS, command_here("train.py", "--demo", "orpo"))


def _orpo_demo(given: Mapping[str, str]) -> RunResult:
    folder = Path(given.get("proj_dir", ORPO_FLAGS["proj_dir"]))
    files = {
        "load_model": _bundled("base.pth"),
        "rlhf_train_file": str(folder / "pairs.save"),
        "val_file": str(folder / "held-out.save"),
    }
    config = TrainConfig.from_flags({**files, **ORPO_FLAGS, **given})
    say(
        "A demonstration: a small model of bytes, raised on novels and dictionaries, learns to prefer the verse that\n"
        "follows in the Bible to its own continuation. Only its initial state is trained.\n"
    )
    if global_rank() == 0:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        _make_pairs(config, "orpo.csv", config.rlhf_train_file, config.epoch_steps * config.micro_bsz)
        _make_pairs(config, "orpo-held-out.csv", config.val_file, most=0)
    rows = read_rows(_bundled("orpo-held-out.csv"))[:SAMPLED_PAIRS]
    prompts = [TEMPLATES[TEMPLATE].prompt(row.prompt) for row in rows]
    return _train_and_compare(config, prompts, command_here("rlhf_generate_reject.py", "-h"), stop=TURN_END)


def _train_and_compare(config: TrainConfig, prompts: Sequence[str], next_command: str, stop: str = "") -> RunResult:
    """Trains, and shows what that changed: continuations of the prompts, and the held-out figures.

    Args:
        next_command: shown at the end, with how to train a model of one's own.
    """
    result = train(config)
    before, after = _sampled(config, prompts, result.final_file, stop)
    say(_samples(prompts, before, after))
    if isinstance(result.before, HeldOutLoss) and isinstance(result.after, HeldOutLoss):
        say(_loss_table(result.before, result.after))
    if isinstance(result.before, HeldOutPreference) and isinstance(result.after, HeldOutPreference):
        say(_preference_table(result.before, result.after))
    say(_closing(config, next_command))
    return result


def _make_pairs(config: TrainConfig, source: str, pairs_file: str, most: int) -> None:
    """CSV -> rejects sampled from the base model -> pairs of tokens, by what the two scripts call.

    Args:
        config: of the training to come.
        source: bundled CSV without rejects.
        pairs_file: the `.save` file to write; two CSVs go beside it.
        most: rows to use, 0 for all.
    """
    stem = Path(pairs_file).with_suffix("")
    prompts, complete = f"{stem}-prompts.csv", f"{stem}-rejects.csv"
    refuse_overlap({"--load_model": config.load_model}, {"the prompts": prompts, "the rejects": complete})
    rows = read_rows(_bundled(source))[: most or None]
    with _writing(Path(config.proj_dir)):
        with open(prompts, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("prompt", "chosen", "reject"))
            table.writerows((row.prompt, row.chosen, "") for row in rows)
        for leftover in (complete, f"{complete}.run.json", pairs_file, f"{stem}.texts.jsonl"):
            Path(leftover).unlink(missing_ok=True)
    common = {"load_model": config.load_model, "accelerator": config.accelerator, "template": TEMPLATE}
    if config.precision:
        common["precision"] = config.precision
    say(f"{len(rows)} prompts of {source}: rejects by the base model, then pairs of tokens")
    rejecting = {"input_csv": prompts, "output_csv": complete}
    generate_rejects(RejectConfig.from_flags({**common, **REJECT_FLAGS, **rejecting}), alone=False)
    pairing = {"input_csv": complete, "output_save": pairs_file, "target_pair_count": str(len(rows))}
    prepare_pairs(PairConfig.from_flags({**common, **pairing}), alone=False)
    say()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Inside, what the system refuses is the folder's fault."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--proj_dir {folder} cannot be written ({error.filename}: {error.strerror}): choose another"
        ) from error


def _sampled(
    config: TrainConfig, prompts: Sequence[str], state_file: Path, stop: str
) -> tuple[Sequence[str], Sequence[str]]:
    """Continuations by the base model without and with a state; "" on other ranks than 0.

    The base is not quantised here, as in most clients, whatever it was while training. Sampling and random numbers are
    the same with and without the state.
    """
    if global_rank() != 0:
        return [""] * len(prompts), [""] * len(prompts)
    base = open_checkpoint(config.load_model)
    shape = base.info.shape
    hardware = resolve_hardware(config)
    apply_hardware(hardware, config, small_messages=True)
    options = LoadOptions(hardware.device, hardware.compute_dtype, head_size_divisor=config.head_size_divisor)
    model = open_model(base, options, quiet=True)
    tokenizer = tokenizer_for_vocabulary(shape.vocab_size)
    encoded = [encoded_prompt(tokenizer, prompt) for prompt in prompts]
    settings = SamplingSettings(top_p=0.5, frequency_penalty=0.0, max_tokens=SAMPLE_TOKENS, stop=stop)
    with inference(model):
        of_base, without = read_prompts(model, encoded)
        for name, state in load_state(state_file, shape).items():
            model.place(name, nn.Parameter(state.to(hardware.device, torch.float32), requires_grad=False))
        of_tuned, with_state = read_prompts(model, encoded)
    logits, numbers = torch.cat((of_base, of_tuned)), range(len(prompts))
    memory = joined((without, with_state))
    texts = continued(model, tokenizer, logits, memory, settings, row_numbers=[*numbers, *numbers])
    return texts[: len(prompts)], texts[len(prompts) :]


def _samples(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> str:
    lines = ["", "samples    of the base model and of the tuned one, with the same prompts and the same random numbers"]
    for prompt, *texts in zip(prompts, before, after, strict=True):
        for label, text in zip(("base", "tuned"), texts, strict=True):
            first, *rest = f"{prompt}{text}".rstrip().splitlines()
            lines += [f"  {label:<6} | {first}", *(f"         | {line}" for line in rest)]
        lines.append("")
    return "\n".join(lines).rstrip()


def _loss_table(before: HeldOutLoss, after: HeldOutLoss) -> str:
    rows = (
        ("whole documents", before.overall, after.overall),
        (f"first {START_POSITIONS} positions", before.start, after.start),
        ("the rest", before.rest, after.rest),
    )
    scope = f"{before.documents} documents of together {before.targets:,} tokens, not trained on"
    return "\n".join(
        [
            f"\nheld-out loss, nats per token: {scope}",
            f"  {'':<20}{'before':>9}{'after':>9}{'change':>9}",
            *(f"  {name:<20}{old:>9.4f}{new:>9.4f}{new / old - 1:>+9.1%}" for name, old, new in rows),
        ]
    )


def _preference_table(before: HeldOutPreference, after: HeldOutPreference) -> str:
    return "\n".join(
        [
            f"\nheld-out preference: {before.pairs} pairs, never trained on",
            f"  {'':<44}{'before':>9}{'after':>9}",
            f"  {'pairs whose chosen answer is more probable':<44}{before.accuracy:>9.1%}{after.accuracy:>9.1%}",
            f"  {'margin of log-probability, nats per token':<44}{before.margin:>+9.4f}{after.margin:>+9.4f}",
        ]
    )


def _closing(config: TrainConfig, other_command: str) -> str:
    folder = Path(config.proj_dir)
    files = [f"  {path} ({path.stat().st_size:,} bytes)" for path in sorted(folder.iterdir()) if path.is_file()]
    flags = ("--load_model", "MODEL.pth", "--data_file", "YOUR.jsonl", "--val_file", "HELD-OUT.jsonl")
    own = command_here("train.py", *flags)
    return "\n".join(["\nfiles", *files, "then", f"  {other_command}", f"  {own}"])


def _bundled(name: str) -> str:
    """Path of a bundled file as one would type it from here."""
    return os.path.relpath(BUNDLE / name)
