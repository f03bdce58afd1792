"""README says what is so: its flag table, its commands, the files it names."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from binidx_files import write_binidx
from factories import tiny_checkpoint
from running import files_in, run_script, train

from src.cli import given_binidx_flags, given_flags, given_merge_flags, given_state_flags, given_train_flags
from src.config import (
    STATE_COMMANDS,
    UNDERSTOOD,
    UNSUPPORTED,
    BinidxConfig,
    ChatConfig,
    MergeConfig,
    PairConfig,
    RejectConfig,
    TrainConfig,
)
from src.config.model import METHOD_DEFAULTS
from src.tokenizer import tokenizer_for_vocabulary

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACES = {
    "train.py", "merge_state.py", "PrepareOrpoDataset.py", "rlhf_generate_reject.py", "python -m src.commands.state",
    "python -m src.commands.chat", "python -m src.commands.binidx",
}  # fmt: skip
BASES = re.compile(r"\b(BASE|RWKV-x060-World-1B6-v2\.1)\.pth\b")
"""The base models of commands that are the user's own."""


def flag_table() -> list[tuple[str, str]]:
    """(flag, default) of the rows of train.py's table."""
    section = README.partition("\n## Flags of train.py\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `--(\w+)` \| ([^|]*?) ?\|", section, re.MULTILINE)


def commands() -> list[str]:
    """Lines of code blocks that call one of the scripts, continued lines joined."""
    joined = README.replace("\\\n", " ")
    blocks = [line.strip() for line in joined.splitlines() if line.startswith("    ")]
    return [line for line in blocks if any(place in line for place in PLACES)]


def test_the_flag_table_is_complete_and_in_order() -> None:
    fields = {spec.name: spec.default for spec in dataclasses.fields(TrainConfig)}
    assert [name for name, _ in flag_table()] == list(fields)
    for name, shown in flag_table():
        assert shown.strip("` ") in ("", str(fields[name])), name


def test_every_flag_it_names_exists() -> None:
    known = {*TrainConfig.__dataclass_fields__, *UNSUPPORTED, *UNDERSTOOD}
    for config in (BinidxConfig, RejectConfig, PairConfig, MergeConfig, ChatConfig, *STATE_COMMANDS.values()):
        known |= set(config.__dataclass_fields__)
    named = re.findall(r"`--(\w+)(\*?)", README)
    unknown = [
        name for name, star in named if name not in known and not (star and any(k.startswith(name) for k in known))
    ]
    assert unknown == []


@pytest.mark.parametrize("command", [c for c in commands() if "train.py" in c and "&&" not in c])
def test_its_training_commands_are_accepted(command: str) -> None:
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    given = given_train_flags(words)
    if not {"demo", "resume"} & given.keys():  # which bring flags of their own
        TrainConfig.from_flags(given)


@pytest.mark.parametrize("command", [c for c in commands() if "merge_state.py" in c])
def test_its_merging_commands_are_accepted(command: str) -> None:
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "merge_state.py")
    MergeConfig.from_flags(given_merge_flags(words))


@pytest.mark.parametrize("command", [c for c in commands() if "src.commands.state" in c])
def test_its_commands_of_the_state_tool_are_accepted(command: str) -> None:
    name, given = given_state_flags(shlex.split(command)[3:])
    STATE_COMMANDS[name].from_flags(given)


@pytest.mark.parametrize("command", [c for c in commands() if "src.commands.chat" in c])
def test_its_chats_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["chat", *shlex.split(command)[3:]])
    ChatConfig.from_flags(given_flags(ChatConfig, "chat", ""))


@pytest.mark.parametrize("command", [c for c in commands() if "src.commands.binidx" in c])
def test_its_commands_that_write_tokens_are_accepted(command: str) -> None:
    BinidxConfig.from_flags(given_binidx_flags(shlex.split(command)[3:]))


def test_it_shows_a_chat_and_every_command_of_the_state_tool() -> None:
    shown = [shlex.split(command)[3] for command in commands() if "src.commands.state" in command]
    assert set(shown) == set(STATE_COMMANDS)
    assert any("src.commands.chat" in command for command in commands())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name: small models, chats, questions, a CSV; a LoRA without parts."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("BASE.pth", "RWKV-x060-World-1B6-v2.1.pth"):
        tiny_checkpoint(folder / name, n_embd=64, dim_ffn=256, dtype=torch.bfloat16)
    numbers = range(40)
    for name, keys in (("chats", ("prompt", "response")), ("held-out", ("prompt", "response")), ("qa", SFT_FIELDS)):
        texts = [(f"What comes after {n}?", f"After {n} comes {n + 1}.") for n in numbers]
        lines = [json.dumps(dict(zip(keys, pair, strict=True))) for pair in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    encode = tokenizer_for_vocabulary(257).encode
    chat = "User: What is this?\n\nAssistant: <|im_start|>assistant A number.<|im_end|>\n\n"
    write_binidx(folder / "chats", [[*encode(chat), 0] for _ in numbers])
    write_binidx(folder / "books", [[*encode(chat * 20), 0] for _ in numbers])
    rows = [f"What is {n}?,A number.,{'A letter.' if n % 2 else ''}" for n in range(6)]
    (folder / "pairs.csv").write_text("\n".join(["prompt,chosen,reject", *rows]), encoding="utf-8")
    common = {"load_model": folder / "BASE.pth", "data_file": folder / "chats.jsonl"}
    train(folder / "without-parts", peft="lora", train_parts="[]", epoch_steps=2, epoch_count=1, **common)
    return folder


SFT_FIELDS = ("query", "response")
SMALLER = {
    "train.py": [
        *("--accelerator", "cpu", "--epoch_steps", "2", "--epoch_count", "1", "--epoch_save", "0", "--plot", "0"),
    ],
    "rlhf_generate_reject.py": ["--accelerator", "cpu", "--max_tokens", "8"],
    "PrepareOrpoDataset.py": ["--accelerator", "cpu"],
    "merge_state.py": [],
}
"""What is put behind a command, so that it takes seconds."""
SHORTER = {"65536": "512", "16384": "512", "4096": "128", "2048": "128", "512": "64"}
"""In place of the lengths of long texts."""


@pytest.mark.slow
def test_its_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as far as they are a user's with one device: each finds what those before it left."""
    monkeypatch.chdir(workplace)
    chosen = [c for c in commands() if BASES.search(c) and " -m " not in c and "--devices 2" not in c]
    assert len(chosen) == len(set(chosen)) > 25
    copied = workplace / "held-out.save"
    for command in chosen:
        _, script, *words = shlex.split(command)
        if "books" in words:
            words = [SHORTER.get(word, word) for word in words]
        if "held-out.save" in words and not copied.exists():
            shutil.copy("pairs.save", copied)
        if "theirs/rwkv-0.pth" in words:  # RWKV-PEFT writes no JSON
            method = words[words.index("--type") + 1]
            Path("theirs").mkdir(exist_ok=True)
            shutil.copy(f"{method}/rwkv-final.pth", "theirs/rwkv-0.pth")
            shutil.copy("pissa/init_pissa.pth", "theirs/init_pissa.pth")
        ended = run_script(script, *words, *SMALLER[script])
        assert ended.code == 0, f"{command}\n{ended.err}"
        if script == "train.py" and not {"--preview", "--evaluate", "--dry_run"}.intersection(words):
            if "--proj_dir" not in words:
                words += ["--proj_dir", TrainConfig.proj_dir]
            folder = Path(words[words.index("--proj_dir") + 1])
            assert {"rwkv-final.pth", "rwkv-final.json", "metrics.jsonl"} <= files_in(folder), command
        elif script == "merge_state.py":
            output = Path(words[2])
            assert output.exists(), command
            if output.is_file():
                _merged_model_differs(output)
                output.unlink()


def test_there_is_a_command_for_every_method() -> None:
    """One to train and one to merge it, by the folder that it trains into."""
    merging = [shlex.split(command) for command in commands() if "merge_state.py" in command]
    trained = {}
    for command in commands():
        if command.startswith("python train.py") and BASES.search(command):
            config = TrainConfig.from_flags(given_train_flags(shlex.split(command)[2:]))
            packed, states = config.quantised, config.trains_states and config.method != "states"
            trained[config.proj_dir] = config.method, packed, states
    for method in [("states", True, False), ("lora", True, False), ("lora", False, True)]:
        assert method in trained.values()
    unpacked = {f"{folder}/rwkv-final.pth": method for folder, method in trained.items()}
    merged = {unpacked[words[3]][0] for words in merging if words[3] in unpacked}
    assert merged == {"states", "lora", "pissa", "bone", "bat"}
    assert "both/rwkv-final.pth" in {words[3] for words in merging}
    for loss in ("orpo", "dpo", "simpo"):
        assert any(f"--{loss} 1" in command and "--peft" not in command for command in commands())


def _merged_model_differs(path: Path) -> None:
    base, merged = (torch.load(name, weights_only=True) for name in ("BASE.pth", path))
    assert base.keys() <= merged.keys()
    assert merged.keys() - base.keys() or any(not torch.equal(base[key], merged[key]) for key in base), path


def test_the_two_commands_of_the_first_screen() -> None:
    first_screen = README[:2500]
    assert "pip install -r requirements.txt && python train.py\n" in first_screen
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n" in first_screen
    runner = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "-r requirements.txt -r tests/requirements.txt" in runner
    assert " python -m pytest " in runner


def test_the_files_it_names_exist() -> None:
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    named |= set(re.findall(r"`((?:src|tests|cuda)/[\w./-]+)`", README))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_table_of_defaults_by_method_is_true() -> None:
    def row(label: str) -> list[str]:
        line = next(line for line in README.splitlines() if line.startswith(f"| {label} |"))
        return [cell.strip() for cell in line.split("|")[2:5]]

    columns = [["states"], ["lora", "pissa", "bone", "bat", "lisa"], ["full"]]
    for cells, names in ((row("`--lr_init`, `--lr_final`"), ("lr_init", "lr_final")), (row("`--quant`"), ("quant",))):
        for cell, methods in zip(cells, columns, strict=True):
            shown = [float(number) for number in re.split("[;(]", cell)[0].split(",")]
            assert all(shown == [METHOD_DEFAULTS[method][name] for name in names] for method in methods)
    parts = {method: METHOD_DEFAULTS[method]["train_parts"] for methods in columns for method in methods}
    assert row("`--train_parts`") == ["none", f"{parts['lora']}; `lisa`: {parts['lisa']}", "all"]
    assert {parts["states"], parts["full"]} == {""}
    assert all(defaults["dataload"] == "pack" for defaults in METHOD_DEFAULTS.values())
    assert TrainConfig.warmup_steps == 10


@pytest.mark.slow
def test_how_long_a_text_fits_a_card_is_what_the_script_says() -> None:
    script = [sys.executable, str(ROOT / "tests/bench/longest_rows.py")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert printed.count("\n") > 5
    assert printed in README, printed
