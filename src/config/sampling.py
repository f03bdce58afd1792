"""How tokens are sampled, the same for every program that samples."""

from dataclasses import dataclass
from typing import Any

from src.config.flags import AT_LEAST_1, MOST_SEED, NOT_NEGATIVE, SHARE, Flags, flag


def top_p_flag(default: float) -> Any:
    """Which tokens are sampled at all."""
    return flag(default, "share of probability that may be sampled, from the top", must=SHARE)


def alpha_frequency_flag(default: float) -> Any:
    """The penalty on repetitions."""
    return flag(default, "taken off once more for every time they are", most=1e6)


@dataclass(frozen=True)
class SamplingFlags(Flags):
    """Probabilities, penalties, limits. Defaults are those of RWKV-LM-State-4bit-Orpo's rejects."""

    temperature: float = flag(1.0, "0 takes the most probable token", must=NOT_NEGATIVE, most=1e6)
    top_p: float = top_p_flag(0.3)
    alpha_presence: float = flag(0.0, "taken off the logit of tokens already in the answer", most=1e6)
    alpha_frequency: float = alpha_frequency_flag(1.0)
    alpha_decay: float = flag(0.996, "factor on these counts per token", must=SHARE)
    max_tokens: int = flag(1000, "longest answer", must=AT_LEAST_1, most=10**8)
    seed: int = flag(42, "the same seed gives the same answers", must=NOT_NEGATIVE, most=MOST_SEED)
