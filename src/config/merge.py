"""The configuration of merging and exporting."""

import os
from dataclasses import dataclass

from src.config.flags import FOLDER, INPUT, Flags, Given, Lines, flag, shortened
from src.config.model import QUANT_TYPES
from src.config.told import ToldFlags

_FILE_FLAGS = ("lora_checkpoint", "peft_checkpoint", "state_checkpoint")


@dataclass(frozen=True)
class _Files(Flags, group="files"):
    base_model: str = flag("", "BASE: the model (.pth) it was trained on", path=INPUT)
    lora_checkpoint: str = flag(
        "", "FILE: an adapter, a state, parts of the weights, or a folder of HF's peft", path=INPUT
    )
    peft_checkpoint: str = flag("", "the same", path=INPUT)
    state_checkpoint: str = flag("", "the same", path=INPUT)
    output: str = flag("", "OUTPUT: the model to write; .safetensors: RWKV-7 in Hugging Face's form", path=FOLDER)
    export: str = flag("", "hf writes OUTPUT as a folder for Hugging Face's peft, instead of a model", ("hf",))

    @property
    def file(self) -> str:
        """What was trained."""
        return self.lora_checkpoint or self.peft_checkpoint or self.state_checkpoint

    def _contradictions(self, given: Given) -> Lines:
        files = [name for name in _FILE_FLAGS if getattr(self, name)]
        if len(files) > 1:
            yield f"--{files[0]} and --{files[1]} both name FILE: give one"
        missing = [word for word, there in (("BASE", self.base_model), ("FILE", files), ("OUTPUT", self.output))
                   if not there]  # fmt: skip
        if missing:
            yield f"{' and '.join(missing)} missing: python merge_state.py BASE FILE OUTPUT"
        if self.output.endswith(os.sep) and not self.export:
            yield f"--output {shortened(self.output)} ends like a folder: give the name of the file to write"


@dataclass(frozen=True)
class _Work(Flags, group="work"):
    quant: str = flag(
        "", "pack and unpack the matrices first: the model as it was trained; default: none", ("none", *QUANT_TYPES)
    )
    device: str = flag("auto", "where matrices are computed: auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    verify: int = flag(0, "1 compares logits of base + adapter and merged model, in fp32", (0, 1))
    verify_text: str = flag(
        "", "text or data file to compare on, instead of random tokens", only_with=("verify", 1), path=INPUT
    )


@dataclass(frozen=True)
class MergeConfig(_Work, ToldFlags, _Files):
    """Every flag of `merge_state.py`."""

    def _contradictions(self, given: Given) -> Lines:
        if self.export and self.verify:
            yield "--verify 1 compares merged models, and --export writes none: leave one out"
        if self.export and self.quant not in ("", "none"):
            yield f"--quant {self.quant} changes the base model, which --export does not write: leave it out"
