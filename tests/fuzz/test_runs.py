"""Whole short runs from flags drawn by a seed: what was trained, written, merged and gone on with; see `runs`."""

import random
from pathlib import Path

import pytest
from fuzz.runs import Places, check_run, command, draw, make_places

FAST_SEEDS = (1,)
SLOW_SEEDS = (2, 6, *range(100, 160))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return make_places(tmp_path_factory.mktemp("places"))


def checked(seed: int, places: Places, folder: Path) -> str:
    generator = random.Random(seed)
    drawn = draw(generator, places)
    print(command(drawn))
    return check_run(drawn, folder, places, generator)


@pytest.mark.parametrize("seed", FAST_SEEDS)
def test_a_run_is_what_its_flags_say(seed: int, places: Places, tmp_path: Path) -> None:
    assert checked(seed, places, tmp_path).startswith("trained")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS)
def test_and_where_they_contradict_each_other_there_is_a_sentence(seed: int, places: Places, tmp_path: Path) -> None:
    checked(seed, places, tmp_path)
