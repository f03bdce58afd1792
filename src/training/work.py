"""What a run works on: its data, objective and schedule, from the flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from src.config import TrainConfig
from src.config.recognition import recognise
from src.config.templates import TEMPLATE_NAMES
from src.data.documents import Documents
from src.data.evaluation import evaluable
from src.data.held_out import (
    overlap_statements,
    shared_documents,
    shared_prompts,
    split_documents,
    split_pairs,
)
from src.data.mixing import MixedIn, mixed
from src.data.pair_file import load_pairs
from src.data.passes import PassDataset
from src.data.preference_batches import PreferenceDataset
from src.data.preferences import PreferencePair
from src.data.rounding import ceil_div
from src.data.sampling import BatchDataset
from src.data.sources import open_documents, template_of
from src.data.unseen import unseen_of
from src.device import global_rank
from src.errors import DataError
from src.model.language_model import LanguageModel
from src.model.shape import ModelShape
from src.output import plural_of, several
from src.schedule import Schedule
from src.tokenizer import Tokenizer, tokenizer_for_vocabulary
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

_FEW = 0.05
"""A share of the targets that teaches little for the time it takes."""
_KINDS = {"binidx": "binidx", "jsonl": "entries", "utf-8": "plain text", "dummy": "counting"}


@dataclass(frozen=True)
class Work:
    """Data and objective of a run.

    Attributes:
        dataset: micro-batches of this rank.
        objective: maps them to losses.
        measure: scores a model on the held-out data; None without.
        batches_per_epoch: micro-batches of an epoch on each rank, a multiple of the accumulation.
        row_tokens: most positions of a micro-batch that are computed at a time.
        describe: names what a micro-batch was made of, for messages.
        lines: what the plan says about the data.
        memories: most memories of sequences that chunks of a micro-batch leave for others.
        all_tokens: most positions of a micro-batch.
        chats: whether it is known that a question is followed by an answer.
        prepare: measures what the loss needs of the model that the run starts from, and says what it did.
        template: in which one talks to a model that was trained on the data; None if one cannot.
        held_out_positions: of the held-out texts, each as long as the longest; 0 of pairs.
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
    chats: bool = False
    prepare: Callable[[LanguageModel, Reference], list[str]] = lambda model, start: []
    template: str | None = TEMPLATE_NAMES[0]
    held_out_positions: int = 0


def prepare_work(config: TrainConfig, shape: ModelShape) -> Work:
    """Opens the data and chooses the objective.

    Raises:
        DataError: for data that cannot be read or used.
    """
    return _preference_work(config, shape) if config.preference else _text_work(config, shape)


@dataclass(frozen=True)
class HeldOutWork:
    """What is held out, and how a model does on it.

    Attributes:
        measure: scores a model.
        lines: what there is to say about the data.
        prepare: measures what the loss needs of the base model, and says what it did.
    """

    measure: Callable[[LanguageModel], HeldOut]
    lines: list[str]
    prepare: Callable[[LanguageModel, Reference], list[str]] = lambda model, start: []


def prepare_held_out(config: TrainConfig, shape: ModelShape) -> HeldOutWork:
    """Opens what a run with these flags would hold out, and nothing else where `--val_file` names it.

    Raises:
        DataError: for data that cannot be read or used.
    """
    if not config.preference:
        training = _open_text(config, shape, config.data_file, config.lines_used) if config.val_share else None
        _, held_out = _text_split(config, shape, training)
        assert held_out is not None
        return HeldOutWork(_text_measure(config, held_out), _text_held_out_lines(config, held_out, None))
    pairs = load_pairs(config.rlhf_train_file, shape.vocab_size) if config.val_share else []
    split = _pair_split(config, shape, pairs)
    dataset = _pair_dataset(config, shape, split.held_out, split.held_out_numbers, is_held_out=True)
    work = HeldOutWork(
        _pair_measure(dataset, _pair_objective(config)), _pair_held_out_lines(config, dataset, split.held_out, [])
    )
    return dataclasses.replace(work, prepare=partial(_with_references, None, dataset)) if config.dpo else work


def _open_text(config: TrainConfig, shape: ModelShape, path: str, part: slice = slice(None)) -> Documents:
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


def _text_split(
    config: TrainConfig, shape: ModelShape, documents: Documents | None
) -> tuple[Documents | None, Documents | None]:
    """(what of the documents is trained on, what is held out, of them or of `--val_file`)."""
    if config.val_share:
        assert documents is not None
        return split_documents(documents, config.val_share, config.random_seed, config.ctx_len + 1)
    return documents, _open_text(config, shape, config.val_file) if config.val_file else None


def _text_measure(config: TrainConfig, held_out: Documents) -> Callable[[LanguageModel], HeldOut]:
    evaluable(held_out, config.ctx_len)  # refused now, not when the model has been loaded
    return partial(held_out_loss, documents=held_out, ctx_len=config.ctx_len, chunk_tokens=config.chunk_ctx)


def _text_held_out_lines(config: TrainConfig, held_out: Documents, training: Documents | None) -> list[str]:
    amount = f"{several(len(held_out), 'document')}, {several(held_out.total_tokens, 'token')}"
    unseen = unseen_of(held_out, evaluable(held_out, config.ctx_len), config.ctx_len + 1).statements("not evaluated")
    if config.val_share:
        source, said = f"{_held_out_share(config)}: {amount}, not trained on", unseen
        return [f"held out   {source}", *(f"           {statement}" for statement in said)]
    said = [*held_out.statements, *unseen]
    if training is not None:
        shared = shared_documents(held_out, training)
        where = f"in --data_file {config.data_file}"
        said += overlap_statements(shared, len(held_out), plural_of(held_out.unit), where)
    return [f"held out   {config.val_file}: {amount}", *(f"           {statement}" for statement in said)]


def _held_out_share(config: TrainConfig) -> str:
    return f"{100 * config.val_share:.3g} % of the data by --random_seed {config.random_seed}"


def _text_work(config: TrainConfig, shape: ModelShape) -> Work:
    own, held_out = _text_split(config, shape, _open_text(config, shape, config.data_file, config.lines_used))
    assert own is not None
    documents, mixes = _with_mixes(config, shape, own)
    dataset = BatchDataset(
        documents,
        mixes=mixes,
        mode=config.dataload,
        ctx_len=config.ctx_len,
        micro_bsz=config.micro_bsz,
        seed=config.order_seed,
        rank=global_rank(config.devices),
        world_size=config.processes,
        epoch_steps=config.epoch_steps,
        accumulate=config.accumulate_grad_batches,
    )
    plan = dataset.plan
    lines = [
        f"data       {config.data_file or 'generated'}: {_KINDS[config.data_type]}, "
        f"{several(plan.documents, 'document')}, {plan.tokens:,} tokens, {plan.counted_targets_per_pass:,} targets a "
        f"pass, --dataload {plan.mode}",
        *(
            f"           {statement}"
            for statement in (*dataset.documents.statements, *plan.statements(), *dataset.statements())
        ),
        *_loss_lines(config, dataset),
    ]
    measure: Callable[[LanguageModel], HeldOut] | None = None
    if held_out is not None:
        lines += _text_held_out_lines(config, held_out, documents)
        measure = _text_measure(config, held_out)
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
        chats=own.stream_counted is not None and config.loss_mask != "se",
        template=template_of(own, shape.vocab_size, config.template),
        held_out_positions=_held_out_positions(config, held_out),
    )


def _held_out_positions(config: TrainConfig, held_out: Documents | None) -> int:
    return 0 if held_out is None else len(held_out) * min(int(held_out.sizes.max()), config.ctx_len)


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


def _loss_lines(config: TrainConfig, dataset: BatchDataset) -> list[str]:
    """Which tokens the loss is taken on, and how many."""
    plan = dataset.plan
    by_data = "pad" if dataset.documents.stream_counted is None else "by role"
    words = {
        "by role": "answers where roles are known (--loss_mask qa)",
        "qa": "answers only (--loss_mask qa)",
        "se": "what stands between the texts of --mask_id (--loss_mask se)",
    }.get(config.loss_mask or by_data, f"every token (--loss_mask {config.loss_mask or 'pad'})")
    share = plan.counted_targets_per_pass / plan.targets_per_pass
    lines = [
        f"loss       on {words}: {plan.counted_targets_per_pass:,} of {plan.targets_per_pass:,} targets a pass "
        f"({share:.1%})"
    ]
    if share < _FEW:
        lines.append(
            "           warning: all others are only read; --preview 3 shows what counts, --loss_mask pad takes all"
        )
    return lines


@dataclass(frozen=True)
class _PairSplit:
    """Pairs that are trained on and pairs that are held out, with their numbers in the file where it is one."""

    training: list[PreferencePair]
    held_out: list[PreferencePair]
    training_numbers: list[int] | None = None
    held_out_numbers: list[int] | None = None


def _pair_split(config: TrainConfig, shape: ModelShape, pairs: list[PreferencePair]) -> _PairSplit:
    if not config.val_share:
        return _PairSplit(pairs, load_pairs(config.val_file, shape.vocab_size) if config.val_file else [])
    kept, held = split_pairs(pairs, config.val_share, config.random_seed, config.rlhf_train_file)
    return _PairSplit([pairs[number] for number in kept], [pairs[number] for number in held], kept, held)


def _pair_dataset(
    config: TrainConfig,
    shape: ModelShape,
    pairs: Sequence[PreferencePair],
    numbers: Sequence[int] | None,
    *,
    is_held_out: bool = False,
) -> PreferenceDataset:
    return PreferenceDataset(
        pairs,
        source=config.val_file if is_held_out and config.val_file else config.rlhf_train_file,
        numbers=numbers,
        form=PreferenceObjective.form(_orpo_type(config), bool(config.orpo_shared_prompt)),
        longest=config.rlhf_max_corpus_len,
        micro_bsz=config.micro_bsz,
        seed=config.order_seed,
        tokenizer=_pair_tokenizer(shape),
        compares=not config.orpo,
        rank=global_rank(config.devices),
        world_size=config.processes,
        epoch_steps=0 if is_held_out else config.epoch_steps,
        accumulate=config.accumulate_grad_batches,
    )


def _pair_tokenizer(shape: ModelShape) -> Tokenizer | None:
    """What recognises rejects of white space, if there is one: pairs are tokens already."""
    try:
        return tokenizer_for_vocabulary(shape.vocab_size)
    except DataError:
        return None


def _orpo_type(config: TrainConfig) -> int:
    return config.orpo_type if config.orpo else 0


def _pair_measure(
    held_out: PreferenceDataset, objective: PreferenceObjective | ComparisonObjective
) -> Callable[[LanguageModel], HeldOut]:
    if isinstance(objective, PreferenceObjective):
        return partial(held_out_preference, dataset=held_out, objective=objective)
    return partial(held_out_comparison, dataset=held_out, objective=objective)


def _pair_held_out_lines(
    config: TrainConfig,
    held_out: PreferenceDataset,
    pairs: Sequence[PreferencePair],
    training: Sequence[PreferencePair],
) -> list[str]:
    source, end = (_held_out_share(config), ", not trained on") if config.val_share else (config.val_file, "")
    where = f"on prompts of --rlhf_train_file {config.rlhf_train_file}"
    said = overlap_statements(shared_prompts(pairs, training), len(pairs), "pairs", where)
    return [
        f"held out   {source}: {len(held_out.visited):,} pairs{end}",
        *(f"           {statement}" for statement in (*held_out.plan.statements(), *said)),
    ]


def _preference_work(config: TrainConfig, shape: ModelShape) -> Work:
    split = _pair_split(config, shape, load_pairs(config.rlhf_train_file, shape.vocab_size))
    dataset = _pair_dataset(config, shape, split.training, split.training_numbers)
    objective = _pair_objective(config)
    plan = dataset.plan
    lines = [
        f"pairs      {config.rlhf_train_file}: {plan.pairs:,} pairs, {plan.positions_per_pass:,} positions a pass",
        *(f"           {statement}" for statement in (*plan.statements(), *dataset.statements())),
    ]
    measure: Callable[[LanguageModel], HeldOut] | None = None
    held_out = None
    if split.held_out:
        held_out = _pair_dataset(config, shape, split.held_out, split.held_out_numbers, is_held_out=True)
        lines += _pair_held_out_lines(config, held_out, split.held_out, split.training)
        measure = _pair_measure(held_out, objective)
    parts = 3 if config.orpo_shared_prompt and _orpo_type(config) == 0 else 4
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
        chats=True,
        template=None if _pair_tokenizer(shape) is None else TEMPLATE_NAMES[0],
    )
    return dataclasses.replace(work, prepare=partial(_with_references, dataset, held_out)) if config.dpo else work


def _pair_objective(config: TrainConfig) -> PreferenceObjective | ComparisonObjective:
    objective: PreferenceObjective | ComparisonObjective
    match config.preference:
        case "dpo":
            objective = DPOObjective(config.dpo_beta)
        case "simpo":
            objective = SimPOObjective(config.simpo_beta, config.simpo_gamma)
        case _:
            objective = PreferenceObjective(config.orpo_alpha, config.orpo_type, debug=bool(config.orpo_debug))
    objective.chunk_tokens = config.chunk_ctx
    return objective


def _with_references(
    dataset: PreferenceDataset | None, held_out: PreferenceDataset | None, model: LanguageModel, start: Reference
) -> list[str]:
    """The pairs that this rank will see, and on rank 0, which alone measures them, the held-out ones."""
    lines = []
    if dataset is not None:
        epochs = range(start.config.epoch_begin, start.config.epoch_begin + epochs_of(start.config))
        seen = dataset.seen_in(range(len(dataset) * epochs.start, len(dataset) * epochs.stop))
        lines.append(f"reference  {attach_references(model, dataset, seen, start, 'dpo-reference.pth')}")
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
