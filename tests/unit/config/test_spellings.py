"""RWKV-PEFT's spellings: what each means here, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from src.cli import given_train_flags
from src.config import UNDERSTOOD, TrainConfig, translated
from src.errors import ConfigError

BASE = {"load_model": "base.pth", "data_file": "data"}


def config(**flags: str) -> TrainConfig:
    return TrainConfig.from_flags({**BASE, **flags})


def notes(**flags: str) -> list[str]:
    return translated({**BASE, **flags}).notes


def problem(**flags: str) -> str:
    with pytest.raises(ConfigError) as refused:
        config(**flags)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_command_without_them_stays_as_it_is() -> None:
    given = {**BASE, "quant": "1", "quant_type": "nf4", "train_type": "states", "optim": "none", "data_shuffle": "1"}
    made = translated(given)
    assert (made.given, made.notes, made.problems) == (given, [], [])


def test_the_ones_that_are_no_flags_here_are_these() -> None:
    names = {"state_tune", "fla", "fused_kernel", "op", "avg_loss", "LISA"}
    assert UNDERSTOOD.keys() == names
    assert not names & TrainConfig.__dataclass_fields__.keys()


class TestQuantisation:
    @pytest.mark.parametrize("quant_type", ["int8", "nf4", "fp4", "4bit"])
    def test_a_type_in_the_place_of_1(self, quant_type: str) -> None:
        made = config(quant=quant_type, peft="lora")
        assert (made.quant, made.quant_type) == (1, quant_type)
        assert notes(quant=quant_type) == [
            f"--quant {quant_type} is --quant 1 --quant_type {quant_type}{', which is fp4' * (quant_type == '4bit')}"
        ]

    def test_none(self) -> None:
        assert config(quant="none").quant == 0
        assert notes(quant="none") == ["--quant none is --quant 0"]

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"quant": "NF4"}, "--quant NF4 is unknown: use one of 0, 1, none, nf4, fp4, 4bit, int8"),
            ({"quant": "fp8"}, "--quant fp8 is a cast without scales, which in as many bytes loses more than int8"),
            ({"quant": "int8", "quant_type": "nf4"}, "--quant int8 and --quant_type nf4 name two types: leave one out"),
            ({"quant": "int4"}, "--quant int4 is unknown: use one of 0, 1, none, nf4"),
            ({"quant": "2"}, "--quant 2 is unknown: use one of 0, 1"),
        ],
    )
    def test_what_is_refused(self, flags: dict[str, str], expected: str) -> None:
        assert expected in problem(**flags)

    @pytest.mark.parametrize(
        ("flags", "quant"),
        [
            ({}, 1),
            ({"train_type": "states"}, 1),
            ({"train_type": "state"}, 0),
            ({"train_type": "state", "quant": "nf4"}, 1),
            ({"train_type": "state", "quant": "1"}, 1),
            ({"train_type": "state", "quant_type": "int8"}, 1),
            ({"state_tune": "1"}, 0),
            ({"fla": "1"}, 0),
            ({"loss_mask": "pad"}, 1),
            ({"peft": "lora"}, 0),
            ({"peft": "lora", "fla": "1"}, 0),
            ({"peft": "lora", "fla": "1", "quant": "int8"}, 1),
        ],
        ids=str,
    )
    def test_unquantised_unless_asked_where_the_command_is_theirs(self, flags: dict[str, str], quant: int) -> None:
        assert config(**flags).quant == quant
        said = any("unquantised without --quant, as there" in note for note in notes(**flags))
        assert said == (quant == 0 and "peft" not in flags)

    def test_a_run_that_goes_on_stays_what_it_was(self) -> None:
        assert config(resume="1", fla="1").quant == 1
        assert config(resume="1", fla="1", quant="0").quant == 0


class TestWhatIsTrained:
    def test_states(self) -> None:
        assert config(train_type="state").method == "states"
        assert "--train_type state is --train_type states" in notes(train_type="state")
        assert config(state_tune="1").method == "states"
        assert "--state_tune is --train_type states" in notes(state_tune="1")
        assert config(state_tune="0", peft="lora").method == "lora"
        assert config(LISA="1", lisa_k="7").method == "lisa"
        assert "--LISA is --peft lisa" in notes(LISA="1")
        both = config(state_tune="1", peft="lora")
        assert (both.method, both.trains_states) == ("lora", True)

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"state_tune": "1", "train_type": "infctx"}, "--state_tune and --train_type infctx contradict"),
            ({"train_type": "infctx", "quant": "nf4"}, "--quant 1 freezes the matrices, --train_type none trains them"),
            ({"LISA": "1", "peft": "lora"}, "--LISA and --peft lora contradict: leave one out"),
            ({"state_tune": "1", "train_type": "none"}, "--state_tune and --train_type none contradict"),
        ],
    )
    def test_what_is_refused(self, flags: dict[str, str], expected: str) -> None:
        assert expected in problem(**flags)


class TestInfctx:
    @pytest.mark.parametrize(
        ("flags", "method", "chunk_ctx"),
        [
            ({"chunk_ctx": "256", "ctx_len": "2048"}, "full", 256),
            ({"ctx_len": "2048"}, "full", 512),
            ({"ctx_len": "300"}, "full", 300),
            ({"peft": "lora", "lora_r": "8"}, "lora", 512),
            ({"peft": "bone", "quant": "nf4"}, "bone", 512),
        ],
    )
    def test_it_trains_no_states_in_chunks(self, flags: dict[str, str], method: str, chunk_ctx: int) -> None:
        made = config(train_type="infctx", **flags)
        assert (made.method, made.trains_states, made.chunk_ctx, made.bptt_chunks) == (method, False, chunk_ctx, 0)
        assert notes(train_type="infctx", **flags)[0] == (
            f"--train_type infctx is --train_type none --chunk_ctx {chunk_ctx}; the gradient passes from chunk to "
            "chunk, unlike there (--bptt_chunks 1)"
        )

    def test_a_length_that_is_none_is_told_as_ever(self) -> None:
        assert problem(train_type="infctx", ctx_len="long") == "--ctx_len 'long' is not a whole number"


class TestTheRest:
    @pytest.mark.parametrize(
        ("flags", "note"),
        [
            ({"fla": "1"}, "--fla has no effect: the operator is chosen by the device"),
            ({"op": "triton"}, "--op has no effect: the operator is chosen by the device"),
            ({"fused_kernel": "1"}, "--fused_kernel has no effect: no loss here keeps all logits"),
            ({"avg_loss": "0"}, "--avg_loss has no effect: it sets nothing there, either"),
        ],
    )
    def test_what_has_no_effect(self, flags: dict[str, str], note: str) -> None:
        assert note in notes(**flags)
        assert config(**flags).quant == 0

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"data_type": "sft", "data_file": "org/set"}, "--data_file org/set is no file, and data sets are not"),
        ],
    )
    def test_what_is_refused(self, flags: dict[str, str], expected: str) -> None:
        assert expected in problem(**flags)

    def test_data_of_questions_and_answers(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.touch()
        flags = {"data_type": "sft", "data_file": str(path), "sft_field": "query response", "sft_split": "train[:1000]"}
        made = config(**flags)
        assert (made.data_type, made.named_fields.names, made.lines_used) == (
            "jsonl", {"question": "query", "answer": "response"}, slice(None, 1000),
        )  # fmt: skip
        assert (made.method, made.quant) == ("full", 0)
        assert "--data_type sft without --peft and --train_type trains every weight, as there" in notes(**flags)
        masked = {**flags, "loss_mask": "pad"}
        assert config(**masked).mask.kind == ""
        assert "--data_type sft trains on answers alone, as there: --loss_mask pad has no effect" in notes(**masked)
        assert config(**{**flags, "loss_mask": "qa"}).mask.kind == "qa"
        assert config(**flags, peft="lora").method == "lora"
        assert config(**flags, train_type="state").method == "states"

    @pytest.mark.parametrize(
        ("text", "lines"),
        [("", slice(None)), ("train", slice(None)), ("train[5:]", slice(5, None)), ("train[2:7]", slice(2, 7))],
    )
    def test_parts_of_the_lines(self, text: str, lines: slice) -> None:
        assert config(data_file="a.jsonl", sft_split=text).lines_used == lines


def test_some_stand_alone_on_the_command_line() -> None:
    given = given_train_flags(["--fla", "--train_type", "state", "--state_tune", "--fused_kernel", "--ctx_len", "8"])
    assert given == {"fla": "1", "train_type": "state", "state_tune": "1", "fused_kernel": "1", "ctx_len": "8"}
    assert given_train_flags(["--sft_field", "query", "response"]) == {"sft_field": "query response"}


def test_their_problems_are_told_with_all_others() -> None:
    with pytest.raises(ConfigError) as refused:
        config(quant="fp8", loss_mask="q", ctx_len="0")
    assert str(refused.value).startswith("3 problems:")
