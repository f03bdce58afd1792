"""Which model, what of it is trained, and how the rest is kept."""

from dataclasses import dataclass
from typing import Any

from src.config.flags import AT_LEAST_1, NOT_NEGATIVE, SHARE_BELOW_1, Flags, Given, Lines, flag

ARCHITECTURES = ("x060", "x070")
QUANT_TYPES = ("nf4", "fp4", "4bit", "int8")

_STATES = {"quant": 1, "dataload": "pack", "lr_init": 1.0, "lr_final": 0.01, "train_parts": ""}
_ADAPTER = {"quant": 0, "dataload": "pack", "lr_init": 2e-5, "lr_final": 2e-5, "train_parts": "time,ln"}

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "states": _STATES,
    "lora": _ADAPTER,
    "pissa": _ADAPTER,
    "bone": _ADAPTER,
    "bat": _ADAPTER,
    "lisa": {**_ADAPTER, "train_parts": "emb,head"},
    "parts": {**_ADAPTER, "quant": 1, "train_parts": ""},
    "full": {"quant": 0, "dataload": "pack", "lr_init": 1e-5, "lr_final": 1e-6, "train_parts": ""},
}
"""Each way of training (`TrainConfig.method`), and what it makes of flags whose own default leaves that to it."""


USUAL_RATES: dict[str, tuple[float, float]] = {
    "states": (1e-2, 50),
    **dict.fromkeys(("lora", "pissa", "bone", "bat", "parts"), (1e-5, 1e-2)),
    "lisa": (1e-6, 1e-3),
    "full": (1e-7, 1e-3),
}
"""By method, between which rates runs learn without falling apart: README's sweep ("Methods": states 0.3 to 30,
adapters 2e-5 to 1e-2, of small models; one that is barely trained learns at more), and what others publish for 1.6B
and more (states 1 to 1e-2, adapters 2e-5 to 2e-4)."""


def quant_name(text: str) -> str:
    """The one name of a packing, for reports and files: `4bit` is bitsandbytes' word for its default, fp4."""
    return "fp4" if text == "4bit" else text


def quant_type_flag(text: str = "4bit means fp4; int8 is blockwise 8-bit") -> Any:
    """How matrices are packed, the same for every script."""
    return flag("nf4", text, QUANT_TYPES, only_with=("quant", 1))


@dataclass(frozen=True)
class ModelFlags(Flags, group="model"):
    """The model. Sizes that the checkpoint also holds are 0 when not given; given, they are checked against it."""

    my_testing: str = flag(
        "", "architecture: found from the base model, against which it is checked; a fresh model is x060 without it",
        ARCHITECTURES,
    )  # fmt: skip
    train_type: str = flag(
        "", "states: train time_state (default without --peft); none: no states, and without --peft every weight",
        ("states", "none"),
    )  # fmt: skip
    weights: str = flag(
        "fp32", "how --train_type none keeps weights: fp32; bf16: matrices, embedding and head, rounded stochastically",
        ("fp32", "bf16"),
    )  # fmt: skip
    vocab_size: int = flag(0, "checked against the checkpoint", must=NOT_NEGATIVE, most=2**24)
    n_layer: int = flag(0, "checked against the checkpoint", must=NOT_NEGATIVE, most=1000)
    n_embd: int = flag(0, "checked against the checkpoint", must=NOT_NEGATIVE, most=2**17)
    dim_att: int = flag(0, "checked against the checkpoint", must=NOT_NEGATIVE, most=2**17)
    dim_ffn: int = flag(0, "checked against the checkpoint", must=NOT_NEGATIVE, most=2**20)
    head_size_a: int = flag(
        0, "head size, checked against the checkpoint (64 for a fresh model)", must=NOT_NEGATIVE, most=2**12
    )  # fmt: skip
    head_size_divisor: int = flag(
        8, "group norm eps is 1e-5 times its square; RWKV-7 knows 8 only", must=AT_LEAST_1, most=1000
    )
    double_extra_dim: int = flag(0, "recognised from the checkpoint; 1 is checked against it", (0, 1))
    load_partial: int = flag(0, "accepted for old commands; a base model without states always loads", (0, 1))
    quant: int = flag(-1, "1 quantises the frozen matrices (default for states), 0 does not", (-1, 0, 1))
    quant_type: str = quant_type_flag()
    quant_head: int = flag(0, "1 packs the head, too: less memory, a slower loss", (0, 1))
    dropout: float = flag(
        0.0,
        "of embeddings, and of the whole residual stream after both additions of a layer, as in the original",
        must=SHARE_BELOW_1,
    )

    @property
    def quantised(self) -> bool:
        """Whether the frozen matrices are packed."""
        return self.quant == 1

    @property
    def trains_states(self) -> bool:
        """Whether `time_state` is trained."""
        return self.train_type == "states"

    def _contradictions(self, given: Given) -> Lines:
        if self.quant_head and not self.quantised:
            yield "--quant_head 1 packs the head as the matrices are packed: use --quant 1, or leave it out"

    def _remarks(self) -> Lines:
        if self.load_partial:
            yield "--load_partial 1 is not needed: states missing in a base model start at zero"
