"""What a run works on: its data, objective and schedule, from the flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from src.config import TrainConfig
from src.config.recognition import recognise
from src.config.templates import TEMPLATE_NAMES
from src.data.documents import Documents
from src.data.mixing import MixedIn, mixed
from src.data.pair_file import load_pairs
from src.data.passes import PassDataset
from src.data.preference_batches import PreferenceDataset
from src.data.rounding import ceil_div
from src.data.sampling import BatchDataset
from src.data.sources import open_documents, template_of
from src.device import global_rank
from src.errors import DataError
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.schedule import Schedule
from src.tokenizer import tokenizer_for_vocabulary
from src.training.evaluation import HeldOut, held_out_comparison, held_out_loss, held_out_preference
from src.training.objectives import (
    ComparisonObjective,
    DPOObjective,
    PreferenceObjective,
    Scored,
    SFTObjective,
    SimPOObjective,
)
from src.training.references import Reference, attach_references

_KINDS = {"binidx": "binidx", "jsonl": "entries", "utf-8": "plain text", "dummy": "counting"}


@dataclass(frozen=True)
class Work:
    """Data and objective of a run.

    Attributes:
        dataset: micro-batches of this rank.
        objective: maps them to losses.
        measure: scores a model on the held-out data of `--val_file`; None without.
        batches_per_epoch: micro-batches of an epoch on each rank, a multiple of the accumulation.
        row_tokens: most positions of a micro-batch that are computed at a time.
        describe: names what a micro-batch was made of, for messages.
        lines: what the plan says about the data.
        memories: most memories of sequences that chunks of a micro-batch leave for others.
        all_tokens: most positions of a micro-batch.
        prepare: measures what the loss needs of the model that the run starts from, and says what it did.
        template: in which one talks to a model that was trained on the data; None if one cannot.
    """

    dataset: PassDataset[Any]
    objective: Scored
    measure: Callable[[LanguageModel], HeldOut] | None
    batches_per_epoch: int
    row_tokens: int
    describe: Callable[[Any], str]
    lines: list[str]
    memories: int = 0
    all_tokens: int = 0
    prepare: Callable[[LanguageModel, Reference], list[str]] = lambda model, start: []
    template: str | None = TEMPLATE_NAMES[0]


def prepare_work(config: TrainConfig, shape: ModelShape) -> Work:
    """Opens the data and chooses the objective.

    Raises:
        DataError: for data that cannot be read or used.
    """
    return _preference_work(config, shape) if config.preference else _text_work(config, shape)


def _text_work(config: TrainConfig, shape: ModelShape) -> Work:
    def documents_of(path: str, part: slice = slice(None)) -> Documents:
        return open_documents(
            config.data_type,
            path,
            shape.vocab_size,
            ctx_len=config.ctx_len,
            fields=config.named_fields,
            part=part,
            mask=config.mask,
            template=config.template,
        )

    documents, mixes = _with_mixes(config, shape, documents_of(config.data_file, config.lines_used))
    dataset = BatchDataset(
        documents,
        mixes=mixes,
        mode=config.dataload,
        ctx_len=config.ctx_len,
        micro_bsz=config.micro_bsz,
        seed=config.order_seed,
        rank=global_rank(config.devices),
        world_size=config.devices * config.num_nodes,
        epoch_steps=config.epoch_steps,
        accumulate=config.accumulate_grad_batches,
    )
    plan = dataset.plan
    lines = [
        f"data       {config.data_file or 'generated'}: {_KINDS[config.data_type]}, {plan.documents:,} documents, "
        f"{plan.tokens:,} tokens, {plan.counted_targets_per_pass:,} targets a pass, --dataload {plan.mode}",
        *(
            f"           {statement}"
            for statement in (*dataset.documents.statements, *plan.statements(), *dataset.statements())
        ),
        _loss_line(config, dataset),
    ]
    measure: Callable[[LanguageModel], HeldOut] | None = None
    if config.val_file:
        held_out = documents_of(config.val_file)
        lines.append(f"held out   {config.val_file}: {len(held_out):,} documents, {held_out.total_tokens:,} tokens")
        lines += [f"           {statement}" for statement in held_out.statements]
        measure = partial(held_out_loss, documents=held_out, ctx_len=config.ctx_len, chunk_tokens=config.chunk_ctx)
    rows = 1 if dataset.mode == "pack" else config.micro_bsz
    positions, memories = _at_a_time(config, dataset.most_positions, rows)
    return Work(
        dataset,
        SFTObjective(),
        measure,
        len(dataset),
        positions,
        dataset.describe,
        lines,
        memories=memories,
        all_tokens=dataset.most_positions,
        template=template_of(documents, shape.vocab_size, config.template),
    )


def _with_mixes(config: TrainConfig, shape: ModelShape, documents: Documents) -> tuple[Documents, tuple[MixedIn, ...]]:
    """The training data with those of `--mix`, each read as what it is, its fields by their known names."""
    others = [
        (
            open_documents(
                recognise(mix.path).data_type,
                mix.path,
                shape.vocab_size,
                ctx_len=config.ctx_len,
                mask=config.mask,
                template=config.template,
            ),
            mix.share,
        )
        for mix in config.mixes
    ]
    return mixed(documents, others)


def _at_a_time(config: TrainConfig, positions: int, rows: int) -> tuple[int, int]:
    """(positions that are computed at a time, memories that wait) of so many positions in so many rows at most."""
    if not config.chunk_ctx:
        return positions, 0
    chunk = rows * config.chunk_ctx
    return min(positions, chunk), rows * (ceil_div(positions, chunk) - 1)


def _loss_line(config: TrainConfig, dataset: BatchDataset) -> str:
    """Which tokens the loss is taken on, and how many."""
    plan = dataset.plan
    by_data = "pad" if dataset.documents.stream_counted is None else "by role"
    words = {
        "by role": "answers where roles are known (--loss_mask qa)",
        "qa": "answers only (--loss_mask qa)",
        "se": "what stands between the texts of --mask_id (--loss_mask se)",
    }.get(config.loss_mask or by_data, f"every token (--loss_mask {config.loss_mask or 'pad'})")
    share = plan.counted_targets_per_pass / plan.targets_per_pass
    return (
        f"loss       on {words}: {plan.counted_targets_per_pass:,} of {plan.targets_per_pass:,} targets a pass "
        f"({share:.1%})"
    )


def _preference_work(config: TrainConfig, shape: ModelShape) -> Work:
    try:
        tokenizer = tokenizer_for_vocabulary(shape.vocab_size)
    except DataError:  # pairs are tokens already; the tokenizer only recognises rejects of white space
        tokenizer = None

    orpo_type = config.orpo_type if config.orpo else 0

    def dataset_of(path: str, epoch_steps: int) -> PreferenceDataset:
        return PreferenceDataset(
            load_pairs(path, shape.vocab_size),
            source=path,
            form=PreferenceObjective.form(orpo_type, bool(config.orpo_shared_prompt)),
            longest=config.rlhf_max_corpus_len,
            micro_bsz=config.micro_bsz,
            seed=config.order_seed,
            tokenizer=tokenizer,
            compares=not config.orpo,
            rank=global_rank(config.devices),
            world_size=config.devices * config.num_nodes,
            epoch_steps=epoch_steps,
            accumulate=config.accumulate_grad_batches,
        )

    dataset = dataset_of(config.rlhf_train_file, config.epoch_steps)
    objective = _pair_objective(config)
    objective.chunk_tokens = config.chunk_ctx
    plan = dataset.plan
    lines = [
        f"pairs      {config.rlhf_train_file}: {plan.pairs:,} pairs, {plan.positions_per_pass:,} positions a pass",
        *(f"           {statement}" for statement in (*plan.statements(), *dataset.statements())),
    ]
    measure: Callable[[LanguageModel], HeldOut] | None = None
    held_out = dataset_of(config.val_file, 0) if config.val_file else None
    if held_out is not None:
        lines.append(f"held out   {config.val_file}: {len(held_out.visited):,} pairs")
        lines += [f"           {statement}" for statement in held_out.plan.statements()]
        if isinstance(objective, PreferenceObjective):
            measure = partial(held_out_preference, dataset=held_out, objective=objective)
        else:
            measure = partial(held_out_comparison, dataset=held_out, objective=objective)
    parts = 3 if config.orpo_shared_prompt and orpo_type == 0 else 4
    row_tokens = min(config.micro_bsz * parts * config.rlhf_max_corpus_len, plan.positions_per_pass)
    positions, memories = _at_a_time(config, row_tokens, 1)
    work = Work(
        dataset,
        objective,
        measure,
        len(dataset),
        positions,
        dataset.describe,
        lines,
        memories=memories,
        all_tokens=row_tokens,
        template=None if tokenizer is None else TEMPLATE_NAMES[0],
    )
    return dataclasses.replace(work, prepare=partial(_with_references, dataset, held_out)) if config.dpo else work


def _pair_objective(config: TrainConfig) -> PreferenceObjective | ComparisonObjective:
    match config.preference:
        case "dpo":
            return DPOObjective(config.dpo_beta)
        case "simpo":
            return SimPOObjective(config.simpo_beta, config.simpo_gamma)
    return PreferenceObjective(config.orpo_alpha, config.orpo_type, debug=bool(config.orpo_debug))


def _with_references(
    dataset: PreferenceDataset, held_out: PreferenceDataset | None, model: LanguageModel, start: Reference
) -> list[str]:
    """The pairs that this rank will see, and on rank 0, which alone measures them, the held-out ones."""
    seen = dataset.seen_in(len(dataset) * epochs_of(start.config))
    lines = [f"reference  {attach_references(model, dataset, seen, start, 'dpo-reference.pth')}"]
    if held_out is not None and global_rank() == 0:
        name = "dpo-reference-held-out.pth"
        lines.append(f"           held out: {attach_references(model, held_out, held_out.visited, start, name)}")
    return lines


def make_schedule(config: TrainConfig, work: Work) -> Schedule:
    """Learning rate over the optimizer steps of the epochs 0 … epoch_count - 1."""
    steps_per_epoch = work.batches_per_epoch // config.accumulate_grad_batches
    return Schedule(
        lr_init=config.lr_init,
        lr_final=config.lr_final,
        warmup_steps=max(config.warmup_steps, 0),
        total_steps=steps_per_epoch * config.epoch_count,
        first_step=steps_per_epoch * config.epoch_begin,
        weight_decay=config.weight_decay,
        weight_decay_final=config.weight_decay_final,
        exit_tokens=config.my_exit_tokens,
        tokens_per_step=work.dataset.tokens_per_step,
        decay=config.lr_schedule,
    )


def epochs_of(config: TrainConfig) -> int:
    """Epochs this run trains."""
    return min(config.epoch_count, config.my_exit + 1) - config.epoch_begin
