"""Flags in a TOML file."""

import os
import sys
from pathlib import Path

import pytest

from src.cli import given_train_flags
from src.config import TrainConfig
from src.config.run_file import as_toml, read_flags
from src.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML from 3.11 on")

WRITTEN: dict[str, str | int | float] = {
    "load_model": 'a "quoted" \\ path\n雨\x7f.pth',
    "lr_init": 1e-05,
    "ctx_len": 512,
    "train_parts": "time,ln",
    "sft_field": "",
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(as_toml(WRITTEN), encoding="utf-8")
    assert read_flags(str(path)) == {name: str(value) for name, value in WRITTEN.items()}


def test_a_path_that_is_no_unicode_becomes_a_remark(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(as_toml({"data_file": "\udcff", "ctx_len": 8}), encoding="utf-8")
    assert read_flags(str(path)) == {"ctx_len": "8"}
    assert "data_file" in path.read_text()


def test_values_are_those_of_a_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('orpo = true\nquant = false\ntargets = ["att.key", "ffn.key"]\ntrain_parts = []\nlr_init = 2.5\n')
    assert read_flags(str(path)) == {
        "orpo": "1", "quant": "0", "targets": "att.key ffn.key", "train_parts": "[]", "lr_init": "2.5",
    }  # fmt: skip


def test_numbers_are_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("lr_init = 1e-400\nlr_final = 1.50\nbeta1 = nan\n")
    assert read_flags(str(path)) == {"lr_init": "1e-400", "lr_final": "1.50", "beta1": "nan"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"lr_init 1", "is no TOML"),
        (b"\xff\xfe", "is no TOML"),
        (b"a = " + b"[" * 5000, "is no TOML"),
        (b"a = " + b"9" * 5000, "is no TOML"),
        (b"[model]\nquant = 1", "section 'model'"),
        (b"lr_init = 2026-11-26", "gives lr_init a date"),
        (b"targets = [1]", "gives targets a list"),
        (b"targets = [1]\nlr_init = [2]", "gives targets a list: .*gives lr_init a list"),
        (b'config = "other.toml"', "names another file, config = 'other.toml'"),
        (b"#" * (1 << 21), "more than 1,048,576 bytes"),
    ],
)
def test_other_files_are_refused_in_a_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_flags(str(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\): name a file of flags"):
        read_flags(str(tmp_path / "none.toml"))


def test_a_configuration_makes_itself_again(tmp_path: Path) -> None:
    given = {"load_model": "base.pth", "data_type": "dummy", "peft": "lora", "lora_r": "4", "train_parts": "[]"}
    config = TrainConfig.from_flags(given)
    path = tmp_path / "run.toml"
    path.write_text(as_toml(config.told_apart()), encoding="utf-8")
    assert TrainConfig.from_flags(read_flags(str(path))) == config


def test_several_files_are_divided_as_on_a_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('data_file = ["a b.jsonl", "c.jsonl"]\nmix = ["d:0.1", "e:0.2"]\n')
    given = given_train_flags(["--config", str(path)])
    assert given == {"config": str(path), "data_file": "a b.jsonl,c.jsonl", "mix": "d:0.1 e:0.2"}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="is a pipe or a device: name an ordinary file"):
        read_flags(str(tmp_path / "run.toml"))
