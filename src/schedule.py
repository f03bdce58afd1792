"""Learning rate and weight decay as functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

_WSD_STABLE = 0.9


@dataclass(frozen=True)
class Schedule:
    """Decay from lr_init to lr_final, exponential unless another is chosen, with a linear warm-up.

    Steps are optimizer steps of this run, the first is 0; gradient accumulation does not change
    their meaning. The rate reaches `lr_final` at the last step of the schedule.

    Attributes:
        lr_init, lr_final: rates at the two ends; if one is 0 an exponential decay is linear.
        warmup_steps: optimizer steps during which the rate rises from a fifth to its full value.
        total_steps: optimizer steps of the whole schedule, those before `first_step` included.
        first_step: schedule position at which this run begins (`epoch_begin` epochs).
        weight_decay, weight_decay_final: constant, or moving exponentially if the latter is > 0.
        exit_tokens: if not 0, cosine decay over |exit_tokens| tokens instead; positive
            values use the cosine alone, negative ones average it with the exponential.
        tokens_per_step: tokens of one optimizer step on all ranks in the mean, padding not counted.
        decay: "exp"; "cos", along half a cosine; or "wsd", which stays at lr_init until the last tenth and falls there
            by one minus the square root of that tenth's share done.

    Source: the schedule of RWKV-LM's trainer callback, with the division by zero at
    total_steps == warmup_steps removed.
    """

    lr_init: float
    lr_final: float
    warmup_steps: int
    total_steps: int
    first_step: int = 0
    weight_decay: float = 0.0
    weight_decay_final: float = -1.0
    exit_tokens: int = 0
    tokens_per_step: float = 0.0
    decay: str = "exp"

    def progress(self, step: int) -> float:
        """Share of the decay done at `step`, from 0 to 1."""
        return self._token_share(step) if self.exit_tokens else self._step_share(step)

    def learning_rate(self, step: int) -> float:
        """Rate for the optimizer step with this number."""
        rate = self._decayed(step)
        if step < self.warmup_steps:
            rate *= 0.2 + 0.8 * step / self.warmup_steps
        return rate

    def weight_decay_at(self, step: int) -> float:
        """Weight decay for the optimizer step with this number."""
        if self.weight_decay <= 0 or self.weight_decay_final <= 0:
            return self.weight_decay
        ratio = self.weight_decay_final / self.weight_decay
        return self.weight_decay * math.exp(math.log(ratio) * self.progress(step))

    def exhausted(self, step: int) -> bool:
        """Whether `exit_tokens` tokens have been trained when `step` begins."""
        if not self.exit_tokens:
            return False
        return (self.first_step + step) * self.tokens_per_step >= abs(self.exit_tokens)

    def _step_share(self, step: int) -> float:
        done = self.first_step + step - self.warmup_steps + 1
        return _clamped_ratio(done, self.total_steps - self.warmup_steps)

    def _token_share(self, step: int) -> float:
        done = (self.first_step + step - self.warmup_steps) * self.tokens_per_step
        return _clamped_ratio(done, abs(self.exit_tokens) - self.warmup_steps * self.tokens_per_step)

    def _decayed(self, step: int) -> float:
        if self.decay != "exp":
            return self.lr_final + (self.lr_init - self.lr_final) * self._share_left(self._step_share(step))
        exponential = self._exponential(self._step_share(step))
        if not self.exit_tokens:
            return exponential
        floor = self.lr_final / self.lr_init if self.lr_init else 0.0
        turn = math.cos(math.pi * self._token_share(step))
        cosine = self.lr_init * (0.5 + floor / 2 + (0.5 - floor / 2) * turn)
        return cosine if self.exit_tokens > 0 else (exponential + cosine) / 2

    def _share_left(self, share: float) -> float:
        """Of the way down, after this share of the decay."""
        if self.decay == "cos":
            return (1 + math.cos(math.pi * share)) / 2
        return 1 - math.sqrt(max(share - _WSD_STABLE, 0.0) / (1 - _WSD_STABLE))

    def _exponential(self, share: float) -> float:
        if self.lr_init == self.lr_final or self.total_steps == 0:
            return self.lr_init
        if self.lr_init == 0 or self.lr_final == 0:
            return self.lr_init + (self.lr_final - self.lr_init) * share
        return self.lr_init * math.exp(math.log(self.lr_final / self.lr_init) * share)


def _clamped_ratio(done: float, whole: float) -> float:
    if whole <= 0:
        return 1.0 if done > 0 else 0.0
    return min(max(done / whole, 0.0), 1.0)
