"""The configuration of the chat."""

from dataclasses import dataclass

from src.config.flags import INPUT, Flags, Given, Lines, flag
from src.config.hardware import accelerator_flag, precision_flag
from src.config.model import QUANT_TYPES
from src.config.sampling import SamplingFlags, alpha_frequency_flag, top_p_flag
from src.config.templates import CHAT_TEMPLATE_NAMES, TEXT
from src.config.told import ToldFlags


@dataclass(frozen=True)
class _Files(Flags, group="files"):
    load_model: str = flag("", "base model (.pth), or a merged one", path=INPUT)
    load_state: str = flag(
        "", "chat with this tuned state; beside load_adapter: the one it was trained beside", path=INPUT
    )
    load_adapter: str = flag("", "chat with this adapter, parts of the weights, or folder of HF's peft", path=INPUT)

    def _contradictions(self, given: Given) -> Lines:
        if not self.load_model:
            yield "--load_model is missing: name the model to chat with"


@dataclass(frozen=True)
class _Sampling(SamplingFlags, group="sampling"):
    top_p: float = top_p_flag(0.6)
    alpha_frequency: float = alpha_frequency_flag(0.0)
    template: str = flag(
        "user",
        "what stands around a prompt; think, no-think: for reasoning models; text: nothing, each is gone on with",
        (*CHAT_TEMPLATE_NAMES, TEXT),
    )
    stop: str = flag("", r"text that ends an answer; \n is a line break; default: \n\n, with --template text none")


@dataclass(frozen=True)
class _Hardware(Flags, group="hardware"):
    accelerator: str = accelerator_flag()
    precision: str = precision_flag()
    quant: str = flag("none", "packs the matrices, for models larger than the GPU", ("none", *QUANT_TYPES))


@dataclass(frozen=True)
class ChatConfig(_Hardware, _Sampling, ToldFlags, _Files):
    """Every flag of `src.commands.chat`."""
