"""What the user asked for: flags by subject, made into one frozen value a script and checked as a whole.

Flags keep the names of RWKV-LM-State-4bit. Each is declared once, as a field; the command line, its help and README's
table come from these declarations. No torch import here, so that a wrong flag is refused within milliseconds.
"""

from src.config.chat import ChatConfig
from src.config.merge import MergeConfig
from src.config.pairs import PairConfig
from src.config.reject import RejectConfig
from src.config.spellings import UNDERSTOOD, translated
from src.config.state import STATE_COMMANDS
from src.config.tokens import BinidxConfig
from src.config.train import UNSUPPORTED, TrainConfig

__all__ = [
    "STATE_COMMANDS",
    "UNDERSTOOD",
    "UNSUPPORTED",
    "BinidxConfig",
    "ChatConfig",
    "MergeConfig",
    "PairConfig",
    "RejectConfig",
    "TrainConfig",
    "translated",
]
