"""The flags of adapters: RWKV-PEFT's JSON, plain ones, and what they mean together."""

from __future__ import annotations

import json
import math

import pytest

from src.cli import given_train_flags
from src.config import TrainConfig
from src.config.flags import names_in
from src.errors import ConfigError

BASE = {"load_model": "base.pth", "data_file": "data"}


def config(**flags: object) -> TrainConfig:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flags.items()}
    return TrainConfig.from_flags({**BASE, **texts})


def problem(**flags: object) -> str:
    with pytest.raises(ConfigError) as refused:
        config(**flags)
    return str(refused.value)


class TestMethod:
    @pytest.mark.parametrize(
        ("flags", "method", "r"),
        [
            ({}, "states", 64),
            ({"peft": "lora"}, "lora", 64),
            ({"peft": "lora", "lora_config": {}}, "lora", 8),
            ({"peft": "lora", "lora_config": {"lora_r": 32}}, "lora", 32),
            ({"peft": "pissa", "pissa_config": {"svd_niter": 2}}, "pissa", 8),
            ({"peft": "bone"}, "bone", 64),
            ({"peft": "bone", "bone_config": {"bone_load": "", "bone_r": 32}}, "bat", 32),
            ({"peft": "bone", "bone_config": {"bone_mode": "bone", "bone_r": 32}}, "bone", 32),
            ({"peft": "bat", "bone_config": {"bone_r": 32}}, "bat", 32),
            ({"peft": "bat", "bone_r": 16}, "bat", 16),
            ({"peft": "disha"}, "bone", 64),
            ({"peft": "disha", "disha_config": {"mode": "bat", "r": 16}}, "bat", 16),
            ({"peft": "lisa"}, "lisa", 64),
            ({"train_type": "none"}, "full", 64),
            ({"train_type": "states", "train_parts": "ln"}, "parts", 64),
        ],
        ids=str,
    )
    def test_and_its_r(self, flags: dict[str, object], method: str, r: int) -> None:
        made = config(**flags)
        assert (made.method, made.adapter_r) == (method, r)

    def test_states_are_trained_unless_something_else_is(self) -> None:
        assert config().trains_states
        assert not config(peft="lora").trains_states
        assert config(peft="lora", train_type="states").trains_states

    def test_the_command_of_rwkv_peft_means_what_it_does_there(self) -> None:
        made = config(peft="lora", lora_config={"lora_load": "a.pth", "lora_r": 32, "lora_alpha": 16})
        assert (made.lora_r, made.lora_alpha, made.lora_dropout, made.load_adapter) == (32, 16.0, 0.01, "a.pth")
        assert (made.quant, made.lr_init, made.lr_final, made.parts) == (0, 2e-5, 2e-5, ("time", "ln"))

    @pytest.mark.parametrize("said", [{"lisa_config": {"lisa_r": 3, "lisa_k": 7}}, {"lisa_r": 3, "lisa_k": 7}], ids=str)
    def test_lisa_in_json_and_plainly(self, said: dict[str, object]) -> None:
        made = config(peft="lisa", **said)
        assert (made.lisa_r, made.lisa_k, made.parts, made.quant) == (3, 7, ("emb", "head"), 0)
        assert not made.trains_states
        assert config(peft="lisa", lisa_config={}).lisa_k == 100

    def test_pissa_s_first_factors(self) -> None:
        assert config(peft="pissa", pissa_config={"pissa_init": "i.pth", "pissa_load": "p.pth"}).pissa_init == "i.pth"


class TestNotes:
    @pytest.mark.parametrize(
        ("flags", "note"),
        [
            ({"peft": "bone", "bone_config": {"bone_r": 8}}, "--bone_config without bone_mode means bat"),
            ({"peft": "disha"}, "--peft disha without a mode means bone"),
            ({"peft": "bone", "lora_r": 8}, "--lora_r 8 has no effect without --peft lora"),
            ({"lora_config": {"lora_r": 8}}, "has no effect without --peft lora"),
            ({"peft": "pissa", "bone_r": 8}, "--bone_r 8 has no effect without --peft bone or bat or disha"),
            ({"targets": "key"}, "--targets key has no effect without --peft lora or"),
            ({"peft": "lora", "lisa_k": 8}, "--lisa_k 8 has no effect without --peft lisa"),
            ({"peft": "lora", "lr_state": 0.5}, "--lr_state 0.5 has no effect unless states and other things are"),
            ({"peft": "lora", "train_type": "states", "lr_init": 1}, "; such rates suit states, whose rate is --lr_"),
            ({"peft": "lora", "lr_init": 1e-7}, "--lr_init 1e-07 is below the usual 1e-05 to 0.01 of lora and"),
            ({"train_type": "none", "lr_init": 0.1}, "--lr_init 0.1 is above the usual 1e-07 to 0.001 of all"),
            ({"lr_init": 1e-5}, "--lr_init 1e-05 is below the usual 0.01 to 50 of states"),
            ({"lr_init": 100}, "--lr_init 100 is above the usual 0.01 to 50 of states and may"),
            ({"peft": "lora", "train_type": "states", "lr_state": 1e-4}, "--lr_state 0.0001 is below the usual"),
        ],
        ids=str,
    )
    def test_what_is_doubtful_is_said(self, flags: dict[str, object], note: str) -> None:
        notes = config(**flags).notes()
        assert len(notes) == 1
        assert note in notes[0]

    @pytest.mark.parametrize("peft", ["lora", "pissa", "bone", "bat"])
    def test_a_short_command_has_none(self, peft: str) -> None:
        assert config(peft=peft).notes() == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"peft": "dora"}, "--peft dora is unknown: use one of none, lora, pissa, bone, bat, disha, lisa"),
            ({"peft": "lora", "lora_config": "{'lora_r': 8}"}, "--lora_config {'lora_r': 8} is no JSON"),
            ({"peft": "lora", "lora_config": "[8]"}, "--lora_config [8] is no JSON object"),
            ({"peft": "lora", "lora_config": {"r": 8}}, "--lora_config has the unknown key 'r': it may have lora_load"),
            ({"peft": "lora", "lora_config": {"lora_r": 8.5}}, "lora_r is 8.5, expected a whole number"),
            ({"peft": "lora", "lora_config": {"lora_r": True}}, "lora_r is true, expected a whole number"),
            ({"peft": "lora", "lora_config": {"lora_load": 1}}, "lora_load is 1, expected a text"),
            ({"peft": "lora", "lora_config": {"lora_dropout": "0"}}, 'lora_dropout is "0", expected a number'),
            (
                {"peft": "lora", "lora_config": {"lora_dropout": 1}},
                "--lora_config: lora_dropout 1 must be at least 0 and below 1",
            ),
            ({"peft": "lora", "lora_config": {"lora_alpha": math.inf}}, "lora_alpha Infinity is not a finite number"),
            ({"peft": "lora", "lora_config": {"lora_alpha": math.nan}}, "lora_alpha NaN is not a finite number"),
            ({"peft": "lora", "lora_config": '{"lora_alpha": 1e400}'}, "lora_alpha 1e400 is not a finite number"),
            (
                {"peft": "lora", "lora_config": {"lora_alpha": 1e300}},
                "lora_alpha 1e+300 is too large: it takes at",
            ),
            ({"peft": "lora", "lora_config": {"lora_alpha": 10**400}}, "is too large: it takes at most 1e+12"),
            (
                {"peft": "lora", "lora_config": {"lora_r": 10**9}},
                "lora_r 1000000000 is too large: it takes at most",
            ),
            (
                {"peft": "pissa", "pissa_config": {"svd_niter": 10**5}},
                "svd_niter 100000 is too large: it takes at",
            ),
            ({"peft": "lisa", "lisa_config": {"lisa_k": 10**12}}, "lisa_k 1000000000000 is too large: it takes at"),
            ({"peft": "lora", "lora_config": {"lora_load": " "}}, 'lora_load " " is white space alone'),
            ({"peft": "pissa", "pissa_config": {"pissa_init": "a\0"}}, "holds a NUL character"),
            (
                {"peft": "lora", "lora_config": '{"lora_r": 8, "lora_r": 4}'},
                "has the key 'lora_r' twice: leave one",
            ),
            ({"peft": "pissa", "pissa_config": {"pissa_r": 0}}, "--pissa_config: pissa_r 0 must be at least 1"),
            (
                {"peft": "bone", "bone_config": {"bone_mode": "Bone"}},
                "bone_mode 'Bone' is unknown: use one of bone, bat",
            ),
            ({"peft": "disha", "disha_config": {"mode": "mode"}}, "mode 'mode' is unknown"),
            ({"peft": "bat", "bone_config": {"bone_mode": "bone"}}, "name two methods"),
            ({"peft": "lora", "lora_r": 4, "lora_config": {"lora_r": 8}}, "--lora_r 4 and --lora_config both say it"),
            ({"peft": "lora", "lora_config": '{"lora_alpha": 1e-400}'}, "lora_alpha 1e-400 is too close to 0"),
            ({"peft": "lora", "lora_config": '{"lora_dropout": 1.50}'}, "--lora_config: lora_dropout 1.50 must be at"),
            ({"peft": "lora", "lora_config": '{"lora_r": 8.0}'}, "--lora_config: lora_r is 8.0, expected a whole"),
            ({"peft": "lora", "lora_plus": 0}, "--lora_plus 0 must be above 0"),
            ({"peft": "bone", "bone_r": -1}, "--bone_r -1 must be at least 1"),
            ({"load_adapter": "a.pth"}, "--load_adapter a.pth needs --peft"),
            ({"peft": "lisa", "lisa_k": 0}, "--lisa_k 0 must be at least 1"),
            ({"peft": "lisa", "lisa_k": 9, "lisa_config": {"lisa_r": 2}}, "--lisa_k 9 and --lisa_config both say it"),
            ({"peft": "lisa", "lisa_moments": "keep"}, "--lisa_moments keep is unknown: use one of drop, park"),
            ({"peft": "lisa", "load_adapter": "a.pth"}, "has no use with --peft lisa, whose results are whole models"),
            ({"train_type": "none", "train_parts": "ln"}, "--train_parts ln has no use where every weight is trained"),
            ({"peft": "lora", "train_type": "states", "lr_init": 0}, "and --lr_init is 0: raise it"),
            ({"peft": "lora", "load_model": ""}, "--load_model is missing: an adapter needs a base model"),
        ],
        ids=str,
    )
    def test_one_sentence(self, flags: dict[str, object], expected: str) -> None:
        message = problem(**flags)
        assert expected in message
        assert "\n" not in message


class TestParts:
    @pytest.mark.parametrize(
        "text",
        [
            "time,ln",
            "time ln",
            "time, ln",
            '["time","ln"]',
            "['time', 'ln']",
            "[time, ln]",
            "[time,ln]",
            "time,ln,time",
        ],
    )
    def test_every_form(self, text: str) -> None:
        assert names_in(text) == ("time", "ln")

    @pytest.mark.parametrize("text", ["[]", "", " [ ] ", '[""]'])
    def test_none(self, text: str) -> None:
        assert names_in(text) == ()

    def test_words_of_the_command_line(self) -> None:
        def parts(*words: str) -> tuple[str, ...]:
            common = ("--load_model", "b", "--peft", "lora", *words, "--data_file", "d")
            return TrainConfig.from_flags(given_train_flags(common)).parts

        assert parts("--train_parts", "[time,", "ln]") == ("time", "ln")
        assert parts("--train_parts", "[]") == parts("--train_parts") == ()
        assert parts() == ("time", "ln")
