"""Learning rate and weight decay over the steps."""

import itertools
import math
from typing import ClassVar

import pytest

from src.schedule import Schedule


def schedule(**changes: object) -> Schedule:
    """The recipe of RWKV-LM-State-4bit: 1 to 0.01 over 1000 epochs of 1000 steps, warm-up 10."""
    values = {"lr_init": 1.0, "lr_final": 0.01, "warmup_steps": 10, "total_steps": 1_000_000, **changes}
    return Schedule(**values)  # type: ignore[arg-type]


class TestExponential:
    @pytest.mark.parametrize(
        ("step", "rate"),
        [(0, 0.2), (5, 0.6), (10, 1.0), (1_000, 0.9954), (10_000, 0.955), (100_000, 0.631), (500_000, 0.1)],
    )
    def test_published_values(self, step: int, rate: float) -> None:
        assert schedule().learning_rate(step) == pytest.approx(rate, abs=6e-5 if step == 1000 else 6e-4)

    def test_the_last_step_has_lr_final(self) -> None:
        assert schedule(total_steps=37).learning_rate(36) == pytest.approx(0.01, rel=1e-12)

    def test_it_falls_by_a_constant_factor(self) -> None:
        rates = [schedule(total_steps=50, warmup_steps=0).learning_rate(step) for step in range(50)]
        assert rates[0] == pytest.approx(0.01 ** (1 / 50))
        factors = {round(later / earlier, 9) for earlier, later in itertools.pairwise(rates)}
        assert factors == {round(0.01 ** (1 / 50), 9)}

    def test_a_rate_of_zero_at_one_end_makes_it_linear(self) -> None:
        falling = schedule(lr_final=0.0, warmup_steps=0, total_steps=10)
        assert [falling.learning_rate(step) for step in (0, 4, 9)] == pytest.approx([0.9, 0.5, 0.0])
        rising = schedule(lr_init=0.0, lr_final=1.0, warmup_steps=0, total_steps=10)
        assert [rising.learning_rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])

    def test_equal_rates_stay(self) -> None:
        constant = schedule(lr_final=1.0)
        assert {constant.learning_rate(step) for step in (10, 100, 999_999)} == {1.0}

    @pytest.mark.parametrize("total_steps", [1, 5, 10, 11])
    def test_a_run_no_longer_than_its_warm_up_divides_by_nothing(self, total_steps: int) -> None:
        rates = [schedule(total_steps=total_steps).learning_rate(step) for step in range(total_steps)]
        assert all(0 < rate <= 1 for rate in rates)

    @pytest.mark.parametrize("warmup_steps", [0, -1])
    def test_no_warm_up(self, warmup_steps: int) -> None:
        assert schedule(warmup_steps=warmup_steps).learning_rate(0) == pytest.approx(1.0, rel=1e-4)

    def test_later_epochs_begin_further_down_with_a_warm_up_of_their_own(self) -> None:
        later = schedule(first_step=500_000)
        assert later.learning_rate(20) == schedule().learning_rate(500_020)
        assert later.learning_rate(0) == pytest.approx(0.2 * schedule().learning_rate(500_000))


class TestTokenSchedule:
    VALUES: ClassVar = {"exit_tokens": 1_000_000, "tokens_per_step": 1000, "warmup_steps": 0}

    def test_a_cosine_over_the_tokens(self) -> None:
        cosine = schedule(**self.VALUES)
        middle = 0.5 + 0.01 / 2
        assert [cosine.learning_rate(step) for step in (0, 500, 1000)] == pytest.approx([1.0, middle, 0.01])

    def test_negative_tokens_average_it_with_the_exponential(self) -> None:
        both = schedule(**{**self.VALUES, "exit_tokens": -1_000_000})
        cosine, exponential = schedule(**self.VALUES), schedule(warmup_steps=0)
        for step in (0, 300, 900):
            mean = (cosine.learning_rate(step) + exponential.learning_rate(step)) / 2
            assert both.learning_rate(step) == pytest.approx(mean)

    def test_it_ends_when_the_tokens_are_trained(self) -> None:
        assert not schedule(**self.VALUES).exhausted(999)
        assert schedule(**self.VALUES).exhausted(1000)
        assert not schedule().exhausted(10**9)

    def test_tokens_of_epochs_before_this_run_count(self) -> None:
        later = schedule(**self.VALUES, first_step=400)
        assert not later.exhausted(599)
        assert later.exhausted(600)


class TestWeightDecay:
    def test_constant_without_a_final_value(self) -> None:
        assert {schedule(weight_decay=0.1).weight_decay_at(step) for step in (0, 999_999)} == {0.1}

    def test_it_moves_like_the_rate(self) -> None:
        moving = schedule(weight_decay=0.1, weight_decay_final=0.001, total_steps=100, warmup_steps=0)
        assert moving.weight_decay_at(99) == pytest.approx(0.001)
        assert moving.weight_decay_at(49) == pytest.approx(math.sqrt(0.1 * 0.001))

    def test_a_final_value_without_weight_decay_changes_nothing(self) -> None:
        assert schedule(weight_decay=0.0, weight_decay_final=0.1).weight_decay_at(5) == 0.0


class TestOtherShapes:
    def test_a_cosine_from_end_to_end(self) -> None:
        cosine = schedule(decay="cos", warmup_steps=0, total_steps=100)
        for step in (0, 24, 49, 74, 99):
            share = (step + 1) / 100
            expected = 0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2
            assert cosine.learning_rate(step) == pytest.approx(expected, rel=1e-12)
        assert cosine.learning_rate(49) == pytest.approx(0.505)
        assert cosine.learning_rate(99) == pytest.approx(0.01)
        assert cosine.learning_rate(150) == pytest.approx(0.01)

    def test_stable_until_the_last_tenth(self) -> None:
        stable = schedule(decay="wsd", total_steps=110)
        assert [stable.learning_rate(step) for step in (0, 5)] == pytest.approx([0.2, 0.6])
        assert {stable.learning_rate(step) for step in range(10, 100)} == {1.0}
        falling = [stable.learning_rate(step) for step in range(100, 110)]
        assert falling == pytest.approx([0.01 + 0.99 * (1 - math.sqrt(share / 10)) for share in range(1, 11)])
        assert falling[-1] == pytest.approx(0.01)

    @pytest.mark.parametrize("decay", ["cos", "wsd"])
    def test_they_warm_up_and_go_down_to_zero_if_asked(self, decay: str) -> None:
        rates = [schedule(decay=decay, lr_final=0.0, total_steps=60).learning_rate(step) for step in range(60)]
        assert rates[0] == pytest.approx(0.2)
        assert rates[-1] == pytest.approx(0, abs=1e-12)
        assert rates[:10] == sorted(rates[:10])
        assert rates[10:] == sorted(rates[10:], reverse=True)

    @pytest.mark.parametrize("decay", ["cos", "wsd"])
    @pytest.mark.parametrize("total_steps", [1, 5, 10, 11])
    def test_a_run_no_longer_than_its_warm_up(self, decay: str, total_steps: int) -> None:
        rates = [schedule(decay=decay, total_steps=total_steps).learning_rate(step) for step in range(total_steps)]
        assert all(0 < rate <= 1 for rate in rates)
