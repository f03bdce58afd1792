"""What a run reads, where it writes, and who else is told how it goes."""

import os
from dataclasses import dataclass
from typing import Any

from src.config.flags import NOT_NEGATIVE, Flags, Given, Lines, flag

DATA_TYPES = ("binidx", "jsonl", "utf-8", "dummy")


@dataclass(frozen=True)
class FileFlags(Flags, group="files"):
    """Files of a training run."""

    load_model: str = flag("", "base model, an RWKV-6 (x060) .pth")
    load_state: str = flag("", "start from this state file instead of zeros")
    proj_dir: str = flag("out", "folder for checkpoints and logs, created if missing")
    resume: int = flag(0, "1 goes on with the run in proj_dir; flags not given are those it was begun with", (0, 1))
    overwrite: int = flag(0, "1 begins anew in a folder that holds results, which are removed", (0, 1))
    save_minutes: float = flag(
        0.0,
        "minutes between saves of what --resume 1 goes on from; 0 lets the run choose, from 1 up",
        must=NOT_NEGATIVE,
    )
    data_file: str = flag("", "training data: binidx prefix, .jsonl or text file")
    data_type: str = flag(
        "", "binidx, jsonl, utf-8 (plain text) or dummy; found from the file if not given", DATA_TYPES
    )
    val_file: str = flag(
        "",
        "held-out data of the same kind: loss before and after, with quant 1 also on the unpacked base",
    )
    demo: str = flag("", "run the bundled demonstration: sft or orpo", ("sft", "orpo"))

    def _contradictions(self, given: Given) -> Lines:
        if self.resume and self.overwrite:
            yield "--resume 1 keeps what --overwrite 1 removes: leave one of them out"
        if self.data_type == "dummy" and self.val_file:
            yield "--val_file has no meaning with --data_type dummy: leave one of them out"


def logging_address_flag() -> Any:
    """Where figures are posted, the same for every script."""
    return flag("http://localhost:5000/", "see above", only_with=("fapi_logging_callback", 1))


@dataclass(frozen=True)
class LogFlags(Flags, group="logs"):
    """Weights & Biases and HTTP."""

    wandb: str = flag("", "Weights & Biases project; empty is off")
    fapi_logging_callback: int = flag(0, "1 posts step and loss to fapi_logging_address", (0, 1))
    fapi_logging_address: str = logging_address_flag()

    def _contradictions(self, given: Given) -> Lines:
        if self.fapi_logging_callback and not self.fapi_logging_address:
            yield "--fapi_logging_address is empty: --fapi_logging_callback 1 needs an address"


def data_type_of(data_file: str) -> str:
    """The data type of a file, or of the common prefix of a binidx' two files."""
    if data_file.endswith((".jsonl", ".json")):
        return "jsonl"
    if data_file.endswith((".bin", ".idx")):
        return "binidx"
    if os.path.exists(data_file + ".idx") or not os.path.isfile(data_file):
        return "binidx"
    return "utf-8"
