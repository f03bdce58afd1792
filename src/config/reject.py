"""The configuration of sampling rejected answers."""

import os
from dataclasses import dataclass

from src.config.flags import (
    AT_LEAST_1,
    INPUT,
    OUTPUT,
    Flags,
    Given,
    Lines,
    empty_paths,
    flag,
    unset_inputs,
)
from src.config.hardware import accelerator_flag, precision_flag
from src.config.model import quant_type_flag
from src.config.sampling import SamplingFlags
from src.config.templates import TEMPLATE_NAMES


@dataclass(frozen=True)
class _Files(Flags, group="files"):
    load_model: str = flag("base_model/Anarchy-RWKV-2B-68.pth", "base model (.pth)", path=INPUT)
    load_state: str = flag("", "sample with this tuned state", path=INPUT)
    input_csv: str = flag("example.csv", "CSV or JSONL with prompt, chosen and perhaps reject", path=INPUT)
    output_csv: str = flag("rlhfoutput.csv", "CSV to write; a second start goes on at its end", path=OUTPUT)
    overwrite: int = flag(0, "1 also replaces rejects that the input has", (0, 1))

    def _contradictions(self, given: Given) -> Lines:
        yield from empty_paths(self, "load_model", "input_csv", "output_csv")
        yield from unset_inputs(self, given, "load_model", "input_csv")
        if os.path.realpath(self.input_csv) == os.path.realpath(self.output_csv):
            yield f"--output_csv {self.output_csv} is the input: give another name"


@dataclass(frozen=True)
class _Sampling(SamplingFlags, group="sampling"):
    template: str = flag("user", "what stands around a prompt", TEMPLATE_NAMES)
    stop: str = flag(r"\n\n", r"text that ends an answer; \n is a line break")
    allow_end: int = flag(0, "1: token 0 may be sampled and ends an answer", (0, 1))


@dataclass(frozen=True)
class _Hardware(Flags, group="hardware"):
    batch: int = flag(16, "rows generated at a time", must=AT_LEAST_1, most=10**6)
    accelerator: str = accelerator_flag()
    precision: str = precision_flag()
    quant: int = flag(0, "1 quantises the matrices, for models larger than the GPU", (0, 1))
    quant_type: str = quant_type_flag()


@dataclass(frozen=True)
class RejectConfig(_Hardware, _Sampling, _Files):
    """Every flag of `rlhf_generate_reject.py`."""
