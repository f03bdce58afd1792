"""What a user says of a file of trained tensors where nothing beside it says so."""

from dataclasses import dataclass

from src.config.flags import ABOVE_0, BY_METHOD, INPUT, Flags, flag


@dataclass(frozen=True)
class ToldFlags(Flags, group="adapter"):
    """Method and scale of an adapter, for every program that reads one."""

    type: str = flag(
        "", "method, where no JSON beside FILE says it: disha is bone or bat", ("lora", "pissa", "bone", "bat", "disha")
    )
    lora_alpha: float = flag(
        BY_METHOD,
        "LoRA's alpha, where no JSON says it",
        must=ABOVE_0,
        most=1e6,
    )
    lora_init: str = flag("", "PiSSA: init_pissa.pth, if it does not lie beside FILE", path=INPUT)
    writer: str = flag("", "whose Bat it is: they number blocks differently", ("hf", "rwkv-peft"))

    @property
    def alpha(self) -> float:
        """`lora_alpha`; 0 where it was not given."""
        return 0.0 if self.lora_alpha == BY_METHOD else self.lora_alpha
