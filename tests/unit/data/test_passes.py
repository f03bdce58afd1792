"""Steps of a run in order, the next one made ahead. Passes over data are tested where there are data."""

from __future__ import annotations

import pytest

from src.data.passes import Lookahead
from src.errors import DataError


class Making:
    """Makes "step N" and remembers of which it was asked."""

    def __init__(self, broken_step: int = -1, error: Exception | None = None) -> None:
        self.asked: list[int] = []
        self.broken_step = broken_step
        self.error = error

    def __call__(self, step: int) -> str:
        self.asked.append(step)
        if step == self.broken_step:
            assert self.error is not None
            raise self.error
        return f"step {step}"


@pytest.mark.parametrize("ahead", [False, True])
def test_epochs_go_on_where_the_last_ended(ahead: bool) -> None:
    making = Making()
    steps = Lookahead(making, 3)
    epochs = []
    for _ in range(3):
        iter(steps)  # Lightning asks for more iterators than it uses
        epochs.append([])
        for made in steps:
            epochs[-1].append(made)
            if ahead:
                steps.look_ahead(str)
    assert epochs == [[f"step {3 * epoch + place}" for place in range(3)] for epoch in range(3)]
    assert making.asked == list(range(10 if ahead else 9)), "each is made once"
    assert len(steps) == 3


def test_the_next_step_is_made_ahead_and_only_then() -> None:
    making = Making()
    steps = iter(lookahead := Lookahead(making, 5))
    next(steps)
    assert making.asked == [0]
    lookahead.look_ahead(lambda made: f"{made}, on its way")
    assert making.asked == [0, 1]
    assert next(steps) == "step 1, on its way"
    assert making.asked == [0, 1]
    assert next(steps) == "step 2"
    assert making.asked == [0, 1, 2]


@pytest.mark.parametrize("error", [DataError("document 5 is empty"), OSError("the disk is gone")])
def test_a_step_that_cannot_be_made_fails_in_its_own_turn(error: Exception) -> None:
    steps = iter(lookahead := Lookahead(Making(1, error), 5))
    assert next(steps) == "step 0"
    lookahead.look_ahead(str)
    with pytest.raises(type(error), match=str(error)):
        next(steps)


def test_a_programming_error_is_not_hidden() -> None:
    lookahead = Lookahead(Making(0, TypeError("wrong")), 5)
    with pytest.raises(TypeError):
        lookahead.look_ahead(str)


def test_a_first_iteration_is_what_is_left_of_an_epoch() -> None:
    lookahead = Lookahead(lambda step: step, 4, first_step=6)
    assert [list(lookahead) for _ in range(3)] == [[6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
