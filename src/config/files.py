"""What a run reads and where it writes."""

import json
import os
import re
from dataclasses import dataclass

from src.config.flags import (
    FOLDER,
    INPUT,
    NOT_NEGATIVE,
    SHARE_BELOW_1,
    Flags,
    Given,
    Lines,
    empty_paths,
    flag,
    names_in,
    shortened,
)

DATA_TYPES = ("binidx", "jsonl", "utf-8", "dummy")
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
    data_file: str = flag("", "training data: binidx prefix, .jsonl or text file", path=INPUT)
    data_type: str = flag(
        "", "binidx, jsonl, utf-8 (plain text) or dummy; found from the file if not given", DATA_TYPES
    )
    val_file: str = flag(
        "", "held-out data of the same kind: loss before and after, with quant 1 also on the unpacked base", path=INPUT
    )
    val_share: float = flag(
        0.0, "hold this share of the training data out instead, chosen by random_seed: whole documents, or preference "
        "pairs by their prompts",
        must=SHARE_BELOW_1,
    )  # fmt: skip
    sft_field: str = flag(
        "", "names of the question's and the answer's field in JSON lines (default: prompt response)", several=True
    )
    sft_split: str = flag("", "which of the JSON lines: train (default), train[:1000], train[500:], train[500:1000]")
    demo: str = flag("", "run the bundled demonstration: sft or orpo", ("sft", "orpo"))
    dry_run: int = flag(
        0, "1 trains nothing: the plan, memory by part against the card, the time by a few steps that are tried, and "
        "the largest ctx_len and micro_bsz that fit", (0, 1),
    )  # fmt: skip
    evaluate: int = flag(
        0, "1 trains nothing: measures held-out data with the base model, and with load_state or load_adapter", (0, 1)
    )
    doctor: int = flag(0, "1 trains nothing: looks at packages, GPU, operators, disk and the flags beside it", (0, 1))

    @property
    def answer_fields(self) -> tuple[str, str] | None:
        """Keys of question and answer; None: the known ones."""
        names = names_in(self.sft_field)
        return (names[0], names[1]) if len(names) == 2 else None

    @property
    def lines_used(self) -> slice:
        """Which of the JSON lines are training data."""
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
            yield f"--val_file and --val_share {self.val_share:g} both say what is held out: leave one of them out"
        if self.sft_field and self.answer_fields is None:
            yield f"--sft_field {shortened(self.sft_field)} must be two names, the question's field and the answer's"
        if self.sft_split and not _SPLIT.fullmatch(self.sft_split):
            yield f"--sft_split {shortened(self.sft_split)} is not understood: write train, or lines as in train[:1000]"


_PEEKED_BYTES = 1 << 20
_PEEKED_LINES = 5
_TABLE_SUFFIXES = (".csv", ".tsv")
_BINIDX_MAGIC = (b"MMIDIDX", b"TNTIDX")
_FORMATS: dict[bytes, str] = {
    b"PK": "is a zip archive, as .pth and .save files are: pairs go to --rlhf_train_file with --orpo 1, models to "
    "--load_model",
    b"\x1f\x8b": "is packed by gzip: unpack it first (gunzip)",
    b"\xfd7zXZ": "is packed by xz: unpack it first (unxz)",
    b"BZh": "is packed by bzip2: unpack it first (bunzip2)",
    b"\x28\xb5\x2f\xfd": "is packed by zstd: unpack it first (unzstd)",
    b"PAR1": "is a parquet table: write it as JSON lines first",
}
"""First bytes of what is no training data, and what to do with it."""


@dataclass(frozen=True)
class Recognised:
    """What kind of data a file holds.

    Attributes:
        data_type: one of DATA_TYPES; where there is doubt, what its name says.
        problem: why it cannot be said or used without more ado, a sentence that goes on after the file's name; "" if
            it can.
        surprise: "" where name and content agree, else what the content is.
    """

    data_type: str
    problem: str = ""
    surprise: str = ""


def recognise(data_file: str) -> Recognised:
    """The data type of a file by its content, or of the common prefix of a binidx' two files.

    A file that is missing, or cannot be read, has the type its name says; its reader tells what is wrong.
    """
    suffix = os.path.splitext(data_file)[1].lower()
    if suffix in (".bin", ".idx"):
        return Recognised("binidx")
    named = "jsonl" if suffix in (".jsonl", ".json", ".ndjson") else "utf-8"
    is_prefix = os.path.isfile(data_file + ".idx")
    if not os.path.isfile(data_file):
        is_other = os.path.exists(data_file) and not is_prefix  # a pipe, a device, a folder
        return Recognised(named if is_other or named == "jsonl" else "binidx")
    if is_prefix:
        return Recognised("binidx", f"is a file, and {data_file}.idx is there too: say with --data_type which is meant")
    try:
        with open(data_file, "rb") as file:
            head = file.read(_PEEKED_BYTES)
    except OSError:
        return Recognised(named)
    return _by_content(head, named, suffix)


def _by_content(head: bytes, named: str, suffix: str) -> Recognised:
    if head.startswith(_BINIDX_MAGIC):
        return Recognised("binidx", "is the index of binidx data: call it NAME.idx, with NAME.bin beside it")
    for magic, problem in _FORMATS.items():
        if head.startswith(magic):
            return Recognised(named, problem)
    is_whole = len(head) < _PEEKED_BYTES
    lines = head.decode("utf-8-sig", errors="replace").splitlines()
    filled = [line for line in lines if line.strip()][: _PEEKED_LINES + 1]
    if not filled:
        return Recognised(named)
    header = {name.strip().strip("\"'") for name in re.split("[,;\t]", filled[0])}
    if {"prompt", "chosen"} <= header:
        return Recognised(
            named,
            "is a table of preference pairs: make pairs of it with PrepareOrpoDataset.py --input_csv and train on them "
            "with --orpo 1",
        )
    if named == "jsonl":
        return Recognised(named)
    if not is_whole and len(filled) == 1:
        objects = [filled[0].lstrip().startswith('{"')]  # cut off, so that no more can be said
    else:
        complete = filled if is_whole else filled[:-1]
        objects = [_is_json(line, dict) for line in complete[:_PEEKED_LINES]]
    if all(objects):
        return Recognised("jsonl", surprise="JSON lines")
    begins_json = _is_json(filled[0], list) or filled[0].strip() in ("{", "[")
    if any(objects) or begins_json:
        return Recognised(
            named,
            "is in part JSON, but not an object on every line: say with --data_type whether it is jsonl or utf-8 "
            "(plain text)",
        )
    if suffix in _TABLE_SUFFIXES:
        return Recognised(
            named,
            "is a table by its name: write it as JSON lines, or say --data_type utf-8 to train on it as plain text",
        )
    return Recognised(named)


def _is_json(line: str, kind: type) -> bool:
    try:
        return isinstance(json.loads(line), kind)
    except (ValueError, RecursionError):
        return False
