"""The configuration of making preference pairs."""

import os
from dataclasses import dataclass

from src.config.flags import (
    AT_LEAST_1,
    INPUT,
    MOST_SEED,
    NOT_NEGATIVE,
    OUTPUT,
    Flags,
    Given,
    Lines,
    empty_paths,
    flag,
    unset_inputs,
)
from src.config.hardware import accelerator_flag, precision_flag
from src.config.logs import logging_address_flag, missing_address
from src.config.model import quant_type_flag
from src.config.templates import MIXED, TEMPLATE_NAMES


@dataclass(frozen=True)
class _Files(Flags, group="files"):
    load_model: str = flag("", "its vocabulary is used; empty: the World vocabulary", path=INPUT)
    input_csv: str = flag("ojousamatalkscript200.csv", "CSV or JSONL: prompt, chosen, reject", path=INPUT)
    output_save: str = flag("ojousama.save", "pairs for train.py; texts go to .texts.jsonl beside", path=OUTPUT)

    @property
    def text_file(self) -> str:
        """JSONL of the pairs' texts."""
        return os.path.splitext(self.output_save)[0] + ".texts.jsonl"

    def _contradictions(self, given: Given) -> Lines:
        yield from empty_paths(self, "input_csv", "output_save")
        yield from unset_inputs(self, given, "input_csv")
        if len({os.path.realpath(path) for path in (self.input_csv, self.output_save, self.text_file)}) < 3:
            yield (
                f"--output_save {self.output_save} cannot be used: it, the texts in {self.text_file} and the input "
                "must be three files"
            )


@dataclass(frozen=True)
class _Pairs(Flags, group="pairs"):
    target_pair_count: int = flag(10000, "pairs to make, the rows in order and again", must=AT_LEAST_1, most=10**7)
    template: str = flag(
        MIXED, "what stands around a prompt; mixed: 80 % user, 10 % question, 10 % input", (MIXED, *TEMPLATE_NAMES)
    )
    max_len: int = flag(
        0, "most tokens of a prompt (cut at its beginning) and of an answer (at its end); 0: no limit",
        must=NOT_NEGATIVE, most=10**8,
    )  # fmt: skip
    seed: int = flag(100, "of templates and order", most=MOST_SEED)


@dataclass(frozen=True)
class _LogProbabilities(Flags, group="log-probabilities"):
    base_logp: int = flag(0, "1 stores log-probabilities under the model", (0, 1))
    accelerator: str = accelerator_flag("for --base_logp 1")
    precision: str = precision_flag()
    quant: int = flag(0, "1 quantises the model's matrices", (0, 1))
    quant_type: str = quant_type_flag("for --quant 1")


@dataclass(frozen=True)
class _Logs(Flags, group="logs"):
    fapi_logging_callback: int = flag(0, "1 posts the progress to fapi_logging_address", (0, 1))
    fapi_logging_callback_step: int = flag(1000, "pairs between two posts", must=AT_LEAST_1, most=10**9)
    fapi_logging_address: str = logging_address_flag()


@dataclass(frozen=True)
class PairConfig(_Logs, _LogProbabilities, _Pairs, _Files):
    """Every flag of `PrepareOrpoDataset.py`."""

    def _contradictions(self, given: Given) -> Lines:
        yield from missing_address(self.fapi_logging_callback, self.fapi_logging_address)
        if self.base_logp and not self.load_model:
            yield "--base_logp 1 needs --load_model"
