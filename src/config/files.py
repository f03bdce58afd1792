"""What a run reads and where it writes."""

import re
from dataclasses import dataclass

from src.config.fields import Fields, fields_in
from src.config.flags import (
    FOLDER,
    INPUT,
    INPUTS,
    NOT_NEGATIVE,
    SHARE_BELOW_1,
    Flags,
    Given,
    Lines,
    empty_paths,
    flag,
    shortened,
)
from src.config.mixing import MixedShare, mixes_in
from src.config.recognition import DATA_TYPES
from src.config.templates import CHAT_TEMPLATE_NAMES

_SPLIT = re.compile(r"train(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class FileFlags(Flags, group="files"):
    """Files of a training run."""

    config: str = flag("", "TOML file of flags, as each run leaves one (run.toml); others come before", path=INPUT)
    load_model: str = flag("", "base model, an RWKV-6 (x060) or RWKV-7 (x070) .pth", path=INPUT)
    load_state: str = flag("", "start from this state file instead of zeros", path=INPUT)
    proj_dir: str = flag("out", "folder for checkpoints and logs, created if missing", path=FOLDER)
    resume: int = flag(0, "1 goes on with the run in proj_dir; flags not given are those it was begun with", (0, 1))
    overwrite: int = flag(0, "1 begins anew in a folder that holds results, which are removed", (0, 1))
    save_minutes: float = flag(
        0.0, "minutes between saves of what --resume 1 goes on from; 0 lets the run choose, from 1 up",
        must=NOT_NEGATIVE, most=1e6,
    )  # fmt: skip
    data_file: str = flag(
        "", "training data: entries (JSON, CSV, Parquet), text, a binidx prefix or a folder; several with commas",
        path=INPUTS,
    )  # fmt: skip
    data_type: str = flag(
        "",
        "binidx, jsonl (entries, in whatever form), utf-8 (plain text) or dummy; found from the file if not given",
        DATA_TYPES,
    )
    val_file: str = flag(
        "", "held-out data of the same kind: loss before and after, with quant 1 also on the unpacked base", path=INPUTS
    )
    val_share: float = flag(
        0.0, "hold this share of the training data out instead, chosen by random_seed: whole documents, or preference "
        "pairs by their prompts",
        must=SHARE_BELOW_1,
    )  # fmt: skip
    sft_field: str = flag(
        "",
        "names of fields of entries: question and answer; question, input, answer; a text or messages; or what=name",
        several=True,
    )
    sft_split: str = flag("", "which of the entries: train (default), train[:1000], train[500:], train[500:1000]")
    template: str = flag(
        "user",
        "what stands around questions and answers of entries: user (World models' chats), question, input; think, "
        "no-think: of RWKV-7's reasoning models",
        CHAT_TEMPLATE_NAMES,
    )
    mix: str = flag(
        "", "FILE:SHARE ...: further data, as data_file, and their share of the documents of each pass; drawn by seed",
        several=True,
    )  # fmt: skip
    demo: str = flag("", "run the bundled demonstration: sft or orpo", ("sft", "orpo"))
    dry_run: int = flag(
        0, "1 trains nothing: the plan, memory by part against the card, the time by a few steps that are tried, and "
        "the largest ctx_len and micro_bsz that fit", (0, 1),
    )  # fmt: skip
    evaluate: int = flag(
        0,
        "1 trains nothing: measures held-out data with the base model, and with load_state, load_adapter or both",
        (0, 1),
    )
    doctor: int = flag(0, "1 trains nothing: looks at packages, GPU, operators, disk and the flags beside it", (0, 1))

    @property
    def named_fields(self) -> Fields | None:
        """Which field of an entry holds what; None: the known ones do."""
        return fields_in(self.sft_field)[0]

    @property
    def mixes(self) -> tuple[MixedShare, ...]:
        """What is mixed into the training data."""
        return mixes_in(self.mix)[0]

    @property
    def lines_used(self) -> slice:
        """Which of the entries are training data."""
        found = _SPLIT.fullmatch(self.sft_split)
        first, last = found.groups() if found else (None, None)
        return slice(int(first) if first else None, int(last) if last else None)

    def _contradictions(self, given: Given) -> Lines:
        yield from empty_paths(self, "proj_dir")
        if self.resume and self.overwrite:
            yield "--resume 1 keeps what --overwrite 1 removes: leave one of them out"
        if self.data_type == "dummy" and self.val_file:
            yield "--val_file has no meaning with --data_type dummy: leave one of them out"
        if self.val_file and self.val_share:
            yield f"--val_file and {self._seen('val_share', given)} both say what is held out: leave one of them out"
        if problem := mixes_in(self.mix)[1]:
            yield f"--mix {shortened(self.mix)} {problem}"
        if self.mix and self.data_type == "dummy":
            yield "--mix has no meaning with --data_type dummy: leave it out"
        if problem := fields_in(self.sft_field)[1]:
            yield f"--sft_field {shortened(self.sft_field)} {problem}"
        if self.sft_split and not _SPLIT.fullmatch(self.sft_split):
            yield f"--sft_split {shortened(self.sft_split)} is not understood: write train, or lines as in train[:1000]"
