"""Training on preference pairs, and what stands around the prompts of pairs."""

import functools
from dataclasses import dataclass

from src.config.flags import ABOVE_0, AT_LEAST_1, INPUT, NOT_NEGATIVE, SHARE, Flags, Given, Lines, flag, shortened

_orpo_flag = functools.partial(flag, only_with=("orpo", 1))
_LOSSES = ("orpo", "dpo", "simpo")


@dataclass(frozen=True)
class PreferenceFlags(Flags, group="preferences"):
    """The preference loss and its pairs."""

    orpo: int = flag(0, "1 trains on preference pairs: odds ratio and NLL", (0, 1))
    orpo_type: int = _orpo_flag(0, "0: the paper's loss; 1: the formula RWKV-LM-State-4bit released", (0, 1))
    orpo_alpha: float = _orpo_flag(0.1, "weight of the preference term, the NLL has 1 - alpha", must=SHARE)
    orpo_debug: int = _orpo_flag(0, "1 prints the preference term of every pair", (0, 1))
    dpo: int = flag(0, "1 trains on preference pairs: against the run's start as reference", (0, 1))
    dpo_beta: float = flag(0.1, "the larger, the closer to the reference", must=ABOVE_0, most=1e6, only_with=("dpo", 1))
    simpo: int = flag(0, "1 trains on preference pairs: mean log-probabilities, no reference", (0, 1))
    simpo_beta: float = flag(2.0, "factor on mean log-probabilities", must=ABOVE_0, most=1e6, only_with=("simpo", 1))
    simpo_gamma: float = flag(
        1.0,
        "margin that is aimed for, in units of beta times nats",
        must=NOT_NEGATIVE,
        most=1e6,
        only_with=("simpo", 1),
    )
    orpo_shared_prompt: int = flag(1, "compute each prompt once; 0: two full rows per pair", (0, 1))
    rlhf_max_corpus_len: int = flag(600, "longest prompt and longest answer in tokens", must=AT_LEAST_1, most=10**8)
    rlhf_train_file: str = flag("trainset.save", "pairs made by PrepareOrpoDataset.py", path=INPUT)

    @property
    def preference(self) -> str:
        """The preference loss: orpo, dpo, simpo, or "" where a run trains on text."""
        return next((name for name in _LOSSES if getattr(self, name)), "")

    def _contradictions(self, given: Given) -> Lines:
        chosen = [f"--{name} 1" for name in _LOSSES if getattr(self, name)]
        if len(chosen) > 1:
            yield f"{' and '.join(chosen)} are different losses: choose one"
        if self.preference and not self.rlhf_train_file:
            yield f"--rlhf_train_file is missing: --{self.preference} 1 trains on a .save file of pairs"

    def _remarks(self) -> Lines:
        if self.preference:
            return
        for name in ("orpo_shared_prompt", "rlhf_max_corpus_len", "rlhf_train_file"):
            value = getattr(self, name)
            if value != getattr(PreferenceFlags, name):
                yield f"--{name} {shortened(str(value))} has no effect without --orpo 1, --dpo 1 or --simpo 1"
