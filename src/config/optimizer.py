"""The optimizer, its schedule, and when to stop before the last epoch."""

from dataclasses import dataclass

from src.config.flags import BY_METHOD, MOST_STEPS, NOT_NEGATIVE, SHARE_BELOW_1, Flags, Given, Lines, Rule, flag

OPTIMIZERS = ("none", "adam", "adamw", "adamw8bit", "paged_adamw8bit", "lion8bit")
LR_SCHEDULES = ("exp", "cos", "wsd")


@dataclass(frozen=True)
class OptimizerFlags(Flags, group="optimizer"):
    """Adam or another, and the schedules of its rate and weight decay."""

    optim: str = flag(
        "none", "none: adam, or adamw with weight decay; 8bit: bitsandbytes' states in 8 bits; paged: which may go to "
        "host memory; lion8bit wants a third of Adam's rate",
        OPTIMIZERS,
    )  # fmt: skip
    fused_update: int = flag(
        0, "with --train_type none: 1 updates each layer in the backward and frees its gradient", (0, 1)
    )
    lr_init: float = flag(
        BY_METHOD, "learning rate after warm-up (default: states 1, adapters 2e-5, all weights 1e-5)",
        must=NOT_NEGATIVE, most=1e6,
    )  # fmt: skip
    lr_final: float = flag(
        BY_METHOD, "learning rate at the last step (default: 0.01, 2e-5, 1e-6)", must=NOT_NEGATIVE, most=1e6
    )
    lr_schedule: str = flag(
        "exp", "from lr_init to lr_final exponentially; cos: along a cosine; wsd: stay, then fall in the last tenth",
        LR_SCHEDULES,
    )  # fmt: skip
    warmup_steps: int = flag(
        10, "optimizer steps; the rate starts at a fifth; 0 or -1: none", most=MOST_STEPS,
        must=Rule(lambda steps: steps >= -1, "must not be negative: 0 is no warm-up, and so is -1"),
    )  # fmt: skip
    beta1: float = flag(0.9, "Adam", must=SHARE_BELOW_1)
    beta2: float = flag(0.99, "Adam", must=SHARE_BELOW_1)
    adam_eps: float = flag(1e-8, "Adam", must=NOT_NEGATIVE, most=1e6)
    weight_decay: float = flag(0.0, "above 0: AdamW", must=NOT_NEGATIVE, most=1e6)
    weight_decay_final: float = flag(
        -1.0, "above 0: weight decay moves there exponentially", most=1e6,
        must=Rule(lambda value: value == -1 or value >= 0, "must not be negative, but for -1, which is none"),
    )  # fmt: skip
    layerwise_lr: int = flag(
        1, "2x the rate for time_decay (RWKV-7: w0) where weights are trained; no effect on states", (0, 1)
    )
    my_exit: int = flag(99999999, "stop after the epoch with this number", must=NOT_NEGATIVE, most=MOST_STEPS)
    my_exit_tokens: int = flag(
        0, "cosine schedule over that many tokens (padding not counted), then stop", must=NOT_NEGATIVE, most=10**15
    )

    def _contradictions(self, given: Given) -> Lines:
        if self.optim == "adam" and self.weight_decay:
            yield f"{self._seen('weight_decay', given)} is AdamW's: use --optim adamw, or leave --optim out"
        if self.my_exit_tokens and self.lr_schedule != "exp":
            yield (
                f"{self._seen('my_exit_tokens', given)} brings a cosine of its own: leave --lr_schedule "
                f"{self.lr_schedule} out"
            )

    def _remarks(self) -> Lines:
        if self.optim == "lion8bit" and self.adam_eps != OptimizerFlags.adam_eps:
            yield f"--adam_eps {self.adam_eps:g} has no effect with --optim lion8bit"
        if self.weight_decay_final > 0 and not self.weight_decay:
            yield f"--weight_decay_final {self.weight_decay_final:g} has no effect with --weight_decay 0"
