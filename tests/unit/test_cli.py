"""The command lines, and what they refuse."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src.cli import given_flags, given_merge_flags, given_state_flags, given_train_flags
from src.config import STATE_COMMANDS, ChatConfig, MergeConfig, PairConfig, RejectConfig, TrainConfig
from src.config.flags import Flags
from src.config.synonyms import meant_by
from src.errors import ConfigError


def refusal(*arguments: str) -> str:
    """The message that refuses this command line."""
    with pytest.raises(ConfigError) as refused:
        given_train_flags(arguments)
    return str(refused.value)


def test_only_given_flags_are_returned_as_texts() -> None:
    assert given_train_flags([]) == {}
    assert given_train_flags(["--ctx_len", "512", "--lr_init=1e-2"]) == {"ctx_len": "512", "lr_init": "1e-2"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML from 3.11 on")
class TestConfigFile:
    def test_the_command_line_comes_first(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text('ctx_len = 256\nlr_init = 0.5\nload_model = "base.pth"\n')
        given = given_train_flags(["--config", str(path), "--ctx_len", "512"])
        assert given == {"config": str(path), "ctx_len": "512", "lr_init": "0.5", "load_model": "base.pth"}

    @pytest.mark.parametrize(
        ("key", "said"),
        [("lr_inti", "unknown flag --lr_inti: did you mean --lr_init?"), ("epochs", "use --epoch_count")],
    )
    def test_unknown_keys_are_answered_like_flags(self, key: str, said: str, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text(f"{key} = 1\n")
        message = refusal("--config", str(path))
        assert message.startswith(f"--config {path}: ")
        assert said in message


def test_a_negative_number_is_a_value() -> None:
    given = given_train_flags(["--weight_decay_final", "-1", "--random_seed", "-1", "--tiny_att_layer", "-999"])
    assert given == {"weight_decay_final": "-1", "random_seed": "-1", "tiny_att_layer": "-999"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--ctxlen", "--ctx_len"),
        ("--load-model", "--load_model"),
        ("--quant-type", "--quant_type"),
        ("--epochs_count", "--epoch_count"),
        ("--orpo_alhpa", "--orpo_alpha"),
    ],
)
def test_an_unknown_flag_suggests_the_nearest(typed: str, meant: str) -> None:
    assert f"unknown flag {typed}: did you mean {meant}?" in refusal(typed, "1")


def test_a_flag_like_no_other_points_to_the_help() -> None:
    assert "unknown flag --zzzzzzz; see train.py -h" in refusal("--zzzzzzz", "1")


def test_all_unknown_flags_are_named_at_once() -> None:
    message = refusal("--ctxlen", "5", "--micro_bzs=2")
    assert "--ctxlen" in message
    assert "did you mean --micro_bsz?" in message


def test_a_shortened_flag_is_not_guessed() -> None:
    assert "unknown flag --ctx" in refusal("--ctx", "5")


def test_a_missing_value_is_named() -> None:
    assert "--ctx_len" in refusal("--ctx_len")


def test_no_file_is_no_list() -> None:
    """As a shell has it whose variable is empty; no word of a list is an empty one."""
    given = given_train_flags(["--data_file", "", "--val_file", "", "--train_parts"])
    assert given == {"data_file": "", "val_file": "", "train_parts": "[]"}


def test_a_stray_word_is_named() -> None:
    said = refusal("--proj_dir", "my", "models")
    assert said == "'models' belongs to no flag; what holds spaces has to stand in quotes"
    assert "quotes" not in refusal("--ctx", "5")


def help_of_train() -> dict[str, str]:
    return given_train_flags(["-h"])


def help_of_pairs() -> dict[str, str]:
    return given_flags(PairConfig, "PrepareOrpoDataset.py", "Makes pairs.")


def help_of_merge() -> dict[str, str]:
    return given_merge_flags(["-h"])


def help_of_chat() -> dict[str, str]:
    return given_flags(ChatConfig, "python -m src.commands.chat", "Chats.")


def help_of_export() -> dict[str, str]:
    return given_state_flags(["export", "-h"])[1]


def help_of_reject() -> dict[str, str]:
    return given_flags(RejectConfig, "rlhf_generate_reject.py", "Samples.")


@pytest.mark.parametrize(
    ("ask", "config_class"),
    [
        (help_of_train, TrainConfig),
        (help_of_pairs, PairConfig),
        (help_of_reject, RejectConfig),
        (help_of_merge, MergeConfig),
        (help_of_chat, ChatConfig),
        (help_of_export, STATE_COMMANDS["export"]),
    ],
)
def test_the_help_shows_every_flag_in_its_group(
    ask: Callable[[], dict[str, str]],
    config_class: type[Flags],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "-h"])
    with pytest.raises(SystemExit) as ended:
        ask()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    wanted = [line for title, specs in config_class.groups().items() for line in (title, *(s.name for s in specs))]
    shown = re.findall(r"^(?:  --(\w+) |([\w-]+):$)", text[text.index("\nfiles:") :], re.MULTILINE)
    assert [flag or title for flag, title in shown] == wanted
    assert "--my_pile" not in text
    assert "None" not in text


class TestFlagsOfOtherPrograms:
    @pytest.mark.parametrize(
        ("typed", "said"),
        [
            ("--lr", "use --lr_init"),
            ("--learning_rate", "use --lr_init"),
            ("--learning-rate", "use --lr_init"),
            ("--epochs", "use --epoch_count"),
            ("--num_epochs", "use --epoch_count"),
            ("--batch_size", "use --micro_bsz"),
            ("--max_steps", "use --epoch_steps N --epoch_count 1"),
            ("--output_dir", "use --proj_dir"),
            ("--model", "use --load_model"),
            ("--dataset", "use --data_file"),
            ("--seed", "use --random_seed"),
            ("--load_in_4bit", "use --quant 1 --quant_type nf4"),
            ("--gradient_checkpointing", "use --grad_cp 1"),
            ("--bf16", "use --precision bf16"),
            ("--max_grad_norm", "gradients are always clipped at norm 1"),
        ],
    )
    def test_what_people_type_is_answered(self, typed: str, said: str) -> None:
        assert refusal(typed, "1") == f"unknown flag {typed}: {said}"

    def test_a_switch_without_a_value_is_one_too(self) -> None:
        assert (
            refusal("--bf16", "--lr", "-1")
            == "unknown flag --bf16: use --precision bf16; unknown flag --lr: use --lr_init"
        )

    def test_another_script_has_other_flags(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["x.py", "--batch_size", "3", "--max_new_tokens", "5", "--output", "o"])
        with pytest.raises(ConfigError) as refused:
            help_of_reject()
        for said in ("--batch_size: use --batch;", "use --max_tokens;", "use --output_csv"):
            assert said in str(refused.value)

    def test_a_flag_that_does_not_exist_is_never_suggested(self) -> None:
        assert meant_by("--resume_from_checkpoint", ["--resume", "--load_state", "--epoch_begin"]) == "--resume 1"
        assert "--load_state" in meant_by("--resume_from_checkpoint", ["--load_state", "--epoch_begin"])
        assert meant_by("--resume_from_checkpoint", ["--lr_init"]) == ""
        assert meant_by("--rank", ["--lora_r"]) == "--lora_r"


def test_a_value_that_begins_with_a_dash_is_explained() -> None:
    assert "is written --flag=VALUE" in refusal("--lr_init", "-1e-3")


class TestMergeWords:
    expected = {"base_model": "base.pth", "peft_checkpoint": "state.pth", "output": "merged.pth"}  # noqa: RUF012

    @pytest.mark.parametrize(
        "line",
        [
            "base.pth state.pth merged.pth",
            "--base_model base.pth --peft_checkpoint state.pth --output merged.pth",
            "base.pth state.pth --output merged.pth",
        ],
    )
    def test_in_place_of_flags(self, line: str) -> None:
        assert given_merge_flags(line.split()) == self.expected

    @pytest.mark.parametrize("line", ["--verify 1 {}", "base.pth --verify 1 state.pth merged.pth", "{} --verify=1"])
    def test_among_flags(self, line: str) -> None:
        words = line.format("base.pth state.pth merged.pth").split()
        assert given_merge_flags(words) == {**self.expected, "verify": "1"}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("a b c d e", "'d' belongs to no flag; 'e' belongs to no flag; what holds spaces has to stand in quotes"),
            ("a b c --base_model d", "--base_model d and 'a' are the same: give one of them"),
            ("a b c --lora_alhpa 3", "did you mean --lora_alpha?"),
            ("a b c --quant", "--quant"),
        ],
    )
    def test_what_is_wrong_is_named(self, line: str, message: str) -> None:
        with pytest.raises(ConfigError) as refused:
            given_merge_flags(line.split())
        assert message in str(refused.value)
        assert "'a' belongs" not in str(refused.value)


class TestStateCommands:
    @pytest.mark.parametrize(
        ("line", "command", "given"),
        [
            ("inspect a.pth", "inspect", {"file": "a.pth"}),
            ("export a.pth b.st --to ai00", "export", {"file": "a.pth", "output": "b.st", "to": "ai00"}),
            ("verify --base m.pth a.pth", "verify", {"file": "a.pth", "base": "m.pth"}),
            ("verify a.pth m.pth", "verify", {"file": "a.pth", "base": "m.pth"}),
            ("diff a b", "diff", {"first": "a", "second": "b"}),
            ("blend a:0.3 b:0.7 c.pth", "blend", {"states": "a:0.3 b:0.7", "output": "c.pth"}),
            ("blend a:0.3 b:0.7 --output c.pth", "blend", {"states": "a:0.3 b:0.7", "output": "c.pth"}),
            ("blend a:1 c.pth", "blend", {"states": "a:1", "output": "c.pth"}),
        ],
    )
    def test_words_and_flags(self, line: str, command: str, given: dict[str, str]) -> None:
        assert given_state_flags(line.split()) == (command, given)

    def test_words_keep_their_spaces(self) -> None:
        assert given_state_flags(["blend", "a b:0.3", "c:0.7", "d"])[1]["states"] == "'a b:0.3' c:0.7"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("", "no command is given: use one of inspect, export, blend, diff, verify"),
            ("exprot a b", "'exprot' is no command: did you mean export?"),
            ("--file a", "'--file' is no command"),
            ("inspect a b", "'b' belongs to no flag"),
            ("export a b --too hf", "did you mean --to?"),
            ("diff a --second b c", "--second b and 'c' are the same"),
        ],
    )
    def test_what_is_wrong_is_named(self, line: str, message: str) -> None:
        with pytest.raises(ConfigError) as refused:
            given_state_flags(line.split())
        assert message in str(refused.value)

    def test_the_help_lists_the_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            given_state_flags(["-h"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert all(f"\n{name} " in shown and command.about in shown for name, command in STATE_COMMANDS.items())


class TestRepetition:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("--ctx_len 5 --ctx_len 6", "--ctx_len is given 2 different values ('5', '6'): leave one of them"),
            ("--ctx_len=5 --quant 0 --ctx_len 6 --ctx_len=7", "--ctx_len is given 3 different values ('5', '6', '7')"),
            ("--lr_init 1 --lr_init 1.0", "('1', '1.0')"),
            ("--quant 1 --lr_init 1 --quant 0 --lr_init 2", "'0'): leave one of them; --lr_init is given 2 different"),
            ("--my_pile_stage 0 --my_pile_stage 1", "--my_pile_stage is given 2"),
            ("--fla --fla 0", "--fla is given 2 different values ('1', '0')"),
            ("--train_parts a b --train_parts a", "--train_parts is given 2 different values ('a b', 'a')"),
        ],
    )
    def test_two_values_are_refused(self, words: str, said: str) -> None:
        assert said in refusal(*words.split())

    def test_the_same_value_again_is_none(self) -> None:
        words = "--ctx_len 5 --ctx_len=5 --fla --fla 1 --train_parts a b --train_parts a b --wandb p --wandb p"
        given = {"ctx_len": "5", "fla": "1", "train_parts": "a b", "wandb": "p"}
        assert given_train_flags(words.split()) == given

    def test_every_script_refuses_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigError, match="--output is given 2"):
            given_merge_flags(["a", "b", "--output", "c", "--output", "d"])
        for config_class in (PairConfig, RejectConfig):
            monkeypatch.setattr(sys, "argv", ["x", "--seed", "1", "--seed", "2"])
            with pytest.raises(ConfigError, match="--seed is given 2"):
                given_flags(config_class, "x", "")
