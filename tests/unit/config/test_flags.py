"""How flags are declared, read and checked, on a configuration of two subjects."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from src.config import PairConfig, RejectConfig, TrainConfig
from src.config.flags import AT_LEAST_1, INPUT, SHARE, Flags, Given, Lines, flag, path_problem
from src.errors import ConfigError


@dataclass(frozen=True)
class Fruit(Flags, group="fruit"):
    apples: int = flag(1, "how many", must=AT_LEAST_1)
    kind: str = flag("red", "which", ("red", "green"))

    def _contradictions(self, given: Given) -> Lines:
        if self.kind == "green" and self.apples > 3:
            yield "--apples: too many green ones"

    def _remarks(self) -> Lines:
        if self.apples == 2:
            yield "--apples 2 is a pair"


@dataclass(frozen=True)
class Cake(Flags, group="cake"):
    sugar: float = flag(0.5, "share", must=SHARE)
    bake: int = flag(0, "1 bakes", (0, 1))
    minutes: int = flag(40, "in the oven", only_with=("bake", 1))


@dataclass(frozen=True)
class Kitchen(Cake, Fruit):
    unsupported: ClassVar[Mapping[str, tuple[str, str]]] = {"pears": ("0", "out of season")}

    def _contradictions(self, given: Given) -> Lines:
        if self.bake and "kind" in given:
            yield "--kind is not seen with --bake 1"


def problem(**given: str) -> str:
    """The message that refuses these flags."""
    with pytest.raises(ConfigError) as refused:
        Kitchen.from_flags(given)
    return str(refused.value)


def test_subjects_are_in_order_with_their_flags() -> None:
    named = {title: [spec.name for spec in specs] for title, specs in Kitchen.groups().items()}
    assert named == {"fruit": ["apples", "kind"], "cake": ["sugar", "bake", "minutes"]}
    assert [spec.name for spec in dataclasses.fields(Kitchen)] == [name for names in named.values() for name in names]


def test_texts_become_values_of_the_type_of_the_default() -> None:
    made = Kitchen.from_flags({"apples": "3", "sugar": "1", "pears": "0.0"})
    assert made == Kitchen(apples=3, sugar=1.0)
    assert isinstance(made.sugar, float)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"apples": "many"}, "--apples 'many' is not a whole number"),
        ({"sugar": "much"}, "--sugar 'much' is not a number"),
        ({"sugar": "nan"}, "--sugar nan is not a finite number"),
        ({"kind": "blue"}, "--kind blue is unknown: use one of red, green"),
        ({"apples": "0"}, "--apples 0 must be at least 1"),
        ({"sugar": "1.5"}, "--sugar 1.5 must lie between 0 and 1"),
        ({"pears": "1"}, "--pears 1 is not supported (out of season): leave it out"),
    ],
)
def test_one_problem_is_one_sentence(given: dict[str, str], message: str) -> None:
    assert problem(**given) == message


def test_all_problems_are_told_together_those_of_every_subject_and_of_the_whole() -> None:
    assert problem(apples="4", kind="green", bake="1", sugar="-1", minutes="x") == (
        "4 problems:\n"
        "  - --minutes 'x' is not a whole number\n"
        "  - --sugar -1 must lie between 0 and 1\n"
        "  - --apples: too many green ones\n"
        "  - --kind is not seen with --bake 1"
    )


def test_notes_come_from_subjects_and_from_flags_that_need_another() -> None:
    expected = ["--apples 2 is a pair", "--minutes 5 has no effect without --bake 1"]
    assert Kitchen.from_flags({"apples": "2", "minutes": "5"}).notes() == expected
    assert Kitchen.from_flags({"bake": "1", "minutes": "5"}).notes() == []


@pytest.mark.parametrize("config_class", [TrainConfig, RejectConfig, PairConfig])
def test_every_flag_of_every_script_is_well_declared(config_class: type[Flags]) -> None:
    specs = dataclasses.fields(config_class)
    assert [spec.name for spec in specs if len(spec.metadata["help"]) < 4] == []
    wrong = [spec.name for spec in specs if spec.type not in (type(spec.default), type(spec.default).__name__)]
    assert wrong == []
    switches = [spec.metadata["only_with"][0] for spec in specs if spec.metadata["only_with"]]
    assert [name for name in switches if name not in config_class.__dataclass_fields__] == []
    assert sum(len(group) for group in config_class.groups().values()) == len(specs)


class TestNumbers:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"apples": "9" * 20}, "--apples 99999999999999999999 is too large: it takes at most 2,147,483,647"),
            ({"apples": "-" + "9" * 20}, "is too large: it takes at most 2,147,483,647"),
            ({"apples": "9" * 400}, f"--apples {'9' * 60}… (400 characters) is too large"),
            ({"apples": "9" * 5000}, f"--apples {'9' * 60}… (5,000 characters) is too large"),
            ({"apples": "٣"}, "--apples '٣' is not a whole number"),
            ({"apples": "３"}, "--apples '３' is not a whole number"),
            ({"apples": "1\0"}, "is not a whole number"),
            ({"apples": ""}, "--apples '' is not a whole number"),
            ({"sugar": "1e400"}, "--sugar 1e400 is not a finite number"),
            ({"sugar": "9" * 5000}, "is not a finite number"),
            ({"sugar": "1e300"}, "--sugar 1e300 is too large: it takes at most 1e+12"),
            ({"kind": "x" * 500}, f"--kind {'x' * 60}… (500 characters) is unknown"),
        ],
    )
    def test_what_is_no_number_of_this_world_is_refused_shortly(self, given: dict[str, str], message: str) -> None:
        assert message in problem(**given)
        assert len(problem(**given)) < 200

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"apples": "1e3"}, "--apples '1e3' is not a whole number: write 1000"),
            ({"apples": "2.0"}, "--apples '2.0' is not a whole number: write 2"),
            ({"apples": "0x10"}, "--apples '0x10' is not a whole number: write 16"),
            ({"sugar": "0x1"}, "--sugar '0x1' is not a number: write 1"),
            ({"apples": "1.5"}, "--apples '1.5' is not a whole number"),
            ({"apples": "1e30"}, "--apples '1e30' is not a whole number"),
            ({"apples": "inf"}, "--apples 'inf' is not a whole number"),
            ({"apples": "-00_7"}, "--apples -00_7 must be at least 1"),
            ({"sugar": "1.50"}, "--sugar 1.50 must lie between 0 and 1"),
            ({"sugar": " 2 "}, "--sugar 2 must lie between 0 and 1"),
            ({"sugar": "1.0000001"}, "--sugar 1.0000001 must lie between 0 and 1"),
            ({"sugar": "1e-400"}, "--sugar 1e-400 is too close to 0: take 0, or a larger number"),
            ({"bake": "002"}, "--bake 002 is unknown: use one of 0, 1"),
        ],
    )
    def test_it_is_shown_as_it_was_typed(self, given: dict[str, str], message: str) -> None:
        assert problem(**given) == message

    @pytest.mark.parametrize("zero", ["0", "-0.0", "0e5", "0.000E-9"])
    def test_nothing_is_nothing(self, zero: str) -> None:
        assert Kitchen.from_flags({"sugar": zero}).sugar == 0

    @pytest.mark.parametrize("config_class", [TrainConfig, RejectConfig, PairConfig])
    def test_every_number_has_a_largest(self, config_class: type[Flags]) -> None:
        numbers = [s for s in dataclasses.fields(config_class) if isinstance(s.default, (int, float))]
        assert len(numbers) > 3
        for spec in numbers:
            for text in ("9" * 30, "-" + "9" * 30):
                with pytest.raises(ConfigError, match=f"--{spec.name} {text}.*(at most|unknown)"):
                    config_class.from_flags({spec.name: text})


class TestPaths:
    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("a\0b", "holds a NUL character"),
            ("  ", "is white space alone"),
            ("x" * 256, "holds a name of 256 bytes, and file systems take 255"),
            ("é" * 128, "holds a name of 256 bytes"),
            ("d/" * 2100, "has 4,200 bytes, and systems take 4,095"),
            ("\ud800", "holds a character that names of files cannot have here"),
            ("/dev/zero", "is a pipe or a device: name an ordinary file"),
        ],
    )
    def test_what_names_no_file_is_refused(self, path: str, message: str) -> None:
        with pytest.raises(ConfigError) as refused:
            TrainConfig.from_flags({"load_model": path, "data_file": "d"})
        assert "--load_model" in str(refused.value)
        assert message in str(refused.value)

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ConfigError, match="is a pipe or a device"):
            PairConfig.from_flags({"input_csv": str(tmp_path / "pipe")})

    @pytest.mark.parametrize("name", ["load_model", "data_file"])
    def test_what_was_refused_is_not_missing_too(self, name: str) -> None:
        flags = {"load_model": "m.pth", "data_file": "d", "peft": "lora"} | {name: "/dev/null"}
        with pytest.raises(ConfigError) as refused:
            TrainConfig.from_flags(flags)
        assert str(refused.value) == f"--{name} '/dev/null' is a pipe or a device: name an ordinary file"

    @pytest.mark.parametrize(
        ("config_class", "name"), [(TrainConfig, "proj_dir"), (RejectConfig, "output_csv"), (PairConfig, "output_save")]
    )
    def test_an_empty_path_is_not_the_current_folder(self, config_class: type[Flags], name: str) -> None:
        with pytest.raises(ConfigError, match=f"--{name} is empty: give a path, or leave the flag out"):
            config_class.from_flags({name: ""})

    def test_a_file_to_write_is_no_folder(self) -> None:
        with pytest.raises(ConfigError, match="--output_save 'x/' ends like a folder"):
            PairConfig.from_flags({"output_save": "x/"})

    def test_the_longest_name_passes(self) -> None:
        assert path_problem("d/" + "x" * 255, INPUT) == ""
