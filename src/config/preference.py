"""Training on preference pairs, and what stands around the prompts of pairs."""

import functools
from dataclasses import dataclass

from src.config.flags import AT_LEAST_1, INPUT, SHARE, Flags, Given, Lines, flag

TEMPLATE_NAMES = ("user", "question", "input")
MIXED = "mixed"
"""Instead of the name of one template: all of them, drawn."""

_orpo_flag = functools.partial(flag, only_with=("orpo", 1))


@dataclass(frozen=True)
class PreferenceFlags(Flags, group="orpo"):
    """The preference loss and its pairs."""

    orpo: int = flag(0, "1 trains on preference pairs", (0, 1))
    orpo_type: int = _orpo_flag(0, "0: the paper's loss; 1: the formula RWKV-LM-State-4bit released", (0, 1))
    orpo_alpha: float = _orpo_flag(0.1, "weight of the preference term, the NLL has 1 - alpha", must=SHARE)
    orpo_debug: int = _orpo_flag(0, "1 prints the preference term of every pair", (0, 1))
    orpo_shared_prompt: int = _orpo_flag(1, "compute each prompt once; 0: two full rows per pair", (0, 1))
    rlhf_max_corpus_len: int = _orpo_flag(
        600, "longest prompt and longest answer in tokens", must=AT_LEAST_1, most=10**8
    )
    rlhf_train_file: str = _orpo_flag("trainset.save", "pairs made by PrepareOrpoDataset.py", path=INPUT)

    def _contradictions(self, given: Given) -> Lines:
        if self.orpo and not self.rlhf_train_file:
            yield "--rlhf_train_file is missing: --orpo 1 trains on a .save file of pairs"
