"""The two steps before preference training: rejects from the base model, and pairs of tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from src.adapters.files import refuse_other_architecture
from src.checkpoint import Checkpoint, load_state, open_checkpoint
from src.config import PairConfig, RejectConfig
from src.data.inputs import opened, unix_lines
from src.data.pair_file import save_pairs
from src.data.preferences import PreparedPairs, in_template, make_pairs, read_rows
from src.data.reject_file import RejectFile, plan_groups
from src.data.turns import formatted_statement, is_formatted
from src.device import apply_device, require_memory, resolve_device, without_memory
from src.errors import ConfigError, DataError
from src.generate import SamplingSettings, answer_logps, generate
from src.identity import files_of_model
from src.loading import LoadOptions, open_model
from src.output import several
from src.storage import refuse_existing, refuse_overlap, replacing
from src.system import command_here
from src.tokenizer import WORLD_VOCABULARY, Tokenizer, tokenizer_for_vocabulary

_POST_TIMEOUT_SECONDS = 2.0
_HASHED_BYTES = 1 << 28
_LARGE_SET = 100_000
"""Pairs that take so long that their making is shown."""
_PAIR_BYTES = 150
"""Of a pair's objects in memory, beside its text; tokens are shared by the pairs of a row."""


def generate_rejects(config: RejectConfig, *, alone: bool = True) -> None:
    """Fills the reject column of a preference file by sampling from a model; see `RejectConfig`.

    Rows are written in input order, a group at a time. Started again with the same flags, it goes on where the
    output ends, and the file comes out the same as from one run: random numbers belong to (seed, row), and groups
    are the same whatever was done before.

    Args:
        config: the flags.
        alone: whether the user takes the next step, which is said then.

    Raises:
        UserError: for everything the user can put right.
    """
    progress = f"{config.output_csv}.run.json"
    refuse_overlap(
        {"--load_model": config.load_model, "--load_state": config.load_state, "--input_csv": config.input_csv},
        {"--output_csv": config.output_csv, "its progress": progress},
    )
    rows = read_rows(config.input_csv, _note)
    checkpoint = open_checkpoint(config.load_model)
    tokenizer = tokenizer_for_vocabulary(checkpoint.info.shape.vocab_size)
    formatted = sum(is_formatted(unix_lines(row.prompt)[0]) for row in rows)
    if formatted:
        _note(formatted_statement(formatted))
    groups = plan_groups(rows, config.batch, overwrite=bool(config.overwrite))
    options = _load_options(config)
    settings = {**dataclasses.asdict(config), "precision": str(options.compute_dtype).removeprefix("torch.")}
    for irrelevant in ("input_csv", "output_csv", "accelerator", "load_model", "load_state"):
        del settings[irrelevant]
    settings["load_model"] = _identity(config.load_model)
    if config.load_state:
        # Refused before anything is written.
        refuse_other_architecture(config.load_state, checkpoint.info.shape)
        load_state(config.load_state, checkpoint.info.shape)
    settings["load_state"] = _identity(config.load_state)

    with RejectFile(config.output_csv, rows, settings) as file:
        left = [group for group in groups if group.start >= file.rows_done]
        total, to_generate = (sum(len(group.generated) for group in some) for some in (groups, left))
        if not left:
            print(f"{config.output_csv} is complete already, all {len(rows):,} rows of it")
            return
        if file.rows_done:
            print(f"{config.output_csv} has {file.rows_done:,} of {len(rows):,} rows, going on from there")
        sample = _sampler(config, checkpoint, options, tokenizer) if to_generate else None
        bar = tqdm(
            total=total, initial=total - to_generate, desc="rejects", unit="row", dynamic_ncols=True, disable=not total
        )
        with bar:
            for group in left:
                answers: list[str] = []
                if sample and group.generated:
                    prompts = [rows[number].prompt for number in group.generated]
                    answers = sample(prompts, group.generated, lambda *_: bar.update())
                file.append(group, dict(zip(group.generated, answers, strict=True)))
    print(f"written    {config.output_csv}: {several(len(rows), 'row')}, {total:,} with a new reject")
    flags = ("--output_save", "pairs.save", "--target_pair_count", str(len(rows)))
    words = ("PrepareOrpoDataset.py", "--load_model", config.load_model, "--input_csv", config.output_csv, *flags)
    if alone:
        print(f"next       {command_here(*words)}")


def _sampler(
    config: RejectConfig, checkpoint: Checkpoint, options: LoadOptions, tokenizer: Tokenizer
) -> Callable[[Sequence[str], Sequence[int], Callable[[int, int], None]], list[str]]:
    """Loads the model and returns a function of (prompts, row numbers, on_finished) that answers."""
    with without_memory(lambda: "no memory left for the model: use --quant 1, or a smaller model"):
        model = open_model(checkpoint, options, state_file=config.load_state)
    settings = sampling_settings(config)

    def sample(prompts: Sequence[str], numbers: Sequence[int], on_finished: Callable[[int, int], None]) -> list[str]:
        texts = [in_template(config.template, unix_lines(prompt)[0]) for prompt in prompts]
        with without_memory(
            lambda: (
                f"no memory left with {len(prompts)} rows at a time: use a smaller --batch than {config.batch}, or "
                f"--quant 1{', or --accelerator cpu' if options.device.type == 'cuda' else ''}"
            )
        ):
            return generate(model, tokenizer, texts, settings, row_numbers=numbers, on_finished=on_finished)

    return sample


def sampling_settings(config: RejectConfig) -> SamplingSettings:
    """The flags as `generate` wants them."""
    return SamplingSettings.by(config, stop=config.stop.replace("\\n", "\n"), may_end=bool(config.allow_end))


def prepare_pairs(config: PairConfig, *, alone: bool = True) -> PreparedPairs:
    """Turns a preference file into the `.save` file that train.py reads; see `PairConfig`.

    Args:
        config: the flags.
        alone: whether the user takes the next step, which is said then.

    Raises:
        UserError: for everything the user can put right; nothing is written then.
    """
    outputs = {"--output_save": config.output_save, "its texts": config.text_file}
    refuse_overlap({"--load_model": config.load_model, "--input_csv": config.input_csv}, outputs)
    refuse_existing(outputs)
    rows = read_rows(config.input_csv, _note)
    checkpoint = open_checkpoint(config.load_model) if config.load_model else None
    tokenizer = tokenizer_for_vocabulary(checkpoint.info.shape.vocab_size if checkpoint else WORLD_VOCABULARY)
    _require_folder(config.output_save)
    text_bytes = sum(len(row.prompt) + len(row.chosen) for row in rows) / len(rows)
    require_memory(
        f"--target_pair_count {config.target_pair_count}",
        "lower it",
        config.target_pair_count * (text_bytes + _PAIR_BYTES),
        torch.device("cpu"),
    )

    large = config.target_pair_count >= _LARGE_SET
    bar = tqdm(total=config.target_pair_count, desc="pairs", unit="pair", disable=not large, dynamic_ncols=True)

    def post(made: int) -> None:
        bar.update()
        if config.fapi_logging_callback and made % config.fapi_logging_callback_step == 0:
            _post_status(config.fapi_logging_address, f"{made} of {config.target_pair_count} pairs")

    with bar, without_memory(lambda: f"no memory left for --target_pair_count {config.target_pair_count}: lower it"):
        prepared = make_pairs(
            config.input_csv,
            rows,
            tokenizer,
            config.target_pair_count,
            template=config.template,
            longest=config.max_len or None,
            seed=config.seed,
            on_pair=post,
        )
    if checkpoint and config.base_logp:
        with without_memory(lambda: "no memory left for --base_logp 1: use --quant 1, or a smaller --max_len"):
            prepared = _with_base_logps(prepared, checkpoint, config)
    if large:
        print(f"writing    {config.output_save} and {config.text_file}", flush=True)
    _write_texts(config.text_file, prepared.texts)
    save_pairs(config.output_save, prepared.pairs)

    for line in prepared.summary():
        print(line)
    print(f"written    {config.output_save} and {config.text_file}")
    model, loss = config.load_model or "MODEL.pth", "dpo" if config.base_logp else "orpo"
    command = command_here("train.py", f"--{loss}", "1", "--load_model", model, "--rlhf_train_file", config.output_save)
    if alone:
        print(f"next       {command}")
    return prepared


def _with_base_logps(prepared: PreparedPairs, checkpoint: Checkpoint, config: PairConfig) -> PreparedPairs:
    """Scores each different pair once."""
    model = open_model(checkpoint, _load_options(config))
    different = {(*map(tuple, (pair.prompt, pair.chosen, pair.rejected)),): pair for pair in prepared.pairs}
    with tqdm(total=len(different), desc="log-probabilities", unit="pair", dynamic_ncols=True) as bar:
        scored = answer_logps(model, list(different.values()), lambda _: bar.update())
    logps = dict(zip(different, scored, strict=True))
    pairs = []
    for pair in prepared.pairs:
        chosen, rejected = logps[tuple(pair.prompt), tuple(pair.chosen), tuple(pair.rejected)]
        pairs.append(dataclasses.replace(pair, chosen_base_logp=chosen, rejected_base_logp=rejected))
    return dataclasses.replace(prepared, pairs=pairs)


def _load_options(config: RejectConfig | PairConfig) -> LoadOptions:
    chosen = resolve_device(config.accelerator, config.precision)
    apply_device(chosen)
    return LoadOptions(chosen.device, chosen.compute_dtype, config.quant_type if config.quant else None)


def _note(line: str) -> None:
    print(f"note: {line}")


def _identity(path: str) -> str:
    """What tells a file from another: its name and size, and for a state file's size its content too."""
    if not path:
        return ""
    files = files_of_model(path)
    if len(files) > 1 or os.path.isdir(path):
        return ", ".join(f"{file.name}, {file.stat().st_size} bytes" for file in files)
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _HASHED_BYTES:
            return f"{os.path.basename(path)}, {size} bytes"
        return f"{os.path.basename(path)}, sha256 {hashlib.sha256(file.read()).hexdigest()}"


def _require_folder(path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ConfigError(f"--output_save {path} cannot be written: there is no folder {folder}; create it first")


def _write_texts(path: str, texts: Sequence[str]) -> None:
    """One `{"text": …}` line per text, in a file that is complete or not there."""
    try:
        with replacing(path) as file:
            for text in texts:
                file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): name another --output_save.") from error


def _post_status(address: str, text: str) -> None:
    """POST of the progress; a listener that is not there is no error."""
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        request = urllib.request.Request(
            address.rstrip("/") + "/ProcessingCallback",
            data=json.dumps({"statusinfo": text}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=_POST_TIMEOUT_SECONDS).close()
