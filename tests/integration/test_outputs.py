"""What every program that writes a file does where one is: nothing that is there is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_state_file
from running import run_script

STATE_TOOL, BINIDX = "src/commands/state.py", "src/commands/binidx.py"
PREPARE = ["--load_model", "base.pth", "--input_csv", "pairs.csv", "--target_pair_count", "2"]
REJECT = ["--load_model", "base.pth", "--input_csv", "pairs.csv", "--max_tokens", "1", "--precision", "fp32"]
HF = ("out/adapter_model.safetensors", "out/adapter_config.json")

COMMANDS: dict[str, tuple[str, list[str], tuple[str, ...], str]] = {
    "merge": ("merge_state.py", ["base.pth", "state.pth", "out.pth"], ("out.pth",), "state.pth"),
    "merge for peft": ("merge_state.py", ["base.pth", "lora.pth", "out", "--export", "hf", "--lora_alpha", "8",
                                          "--type", "lora"], HF, ""),
    "pairs": ("PrepareOrpoDataset.py", [*PREPARE, "--output_save", "out.save"], ("out.save", "out.texts.jsonl"),
              "pairs.csv"),
    "rejects": ("rlhf_generate_reject.py", [*REJECT, "--output_csv", "out.csv"], ("out.csv",), "pairs.csv"),
    "binidx": (BINIDX, ["text.txt", "out", "--tokenizer", "bytes"], ("out.bin", "out.idx"), ""),
    "export": (STATE_TOOL, ["export", "state.pth", "out.pth", "--to", "runner"], ("out.pth", "out.json"), "state.pth"),
    "export of numbers": (STATE_TOOL, ["export", "state.pth", "out.st", "--to", "ai00"], ("out.st",), "state.pth"),
    "export into a model": (STATE_TOOL, ["export", "state.pth", "out.pth", "--to", "rwkv-pip", "--base", "base.pth"],
                            ("out.pth", "out.json"), "base.pth"),
    "export for peft": (STATE_TOOL, ["export", "bone.pth", "out", "--to", "hf", "--base", "base.pth"], HF, ""),
    "blend": (STATE_TOOL, ["blend", "state.pth:0.5", "other.pth:0.5", "out.pth"], ("out.pth", "out.json"), "other.pth"),
}  # fmt: skip
"""Script, words, the files it must not write over, and an input that ends as its output does; by what it makes."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_checkpoint(tmp_path / "base.pth")
    tiny_state_file(tmp_path / "state.pth", tiny_shape())
    tiny_state_file(tmp_path / "other.pth", tiny_shape(), 1)
    for kind in ("lora", "bone"):
        tiny_adapter(tmp_path / f"{kind}.pth", tiny_shape(), kind)
    (tmp_path / "pairs.csv").write_text("prompt,chosen,reject\na,b,c\n")
    (tmp_path / "text.txt").write_text("some text\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said_by(command: str, *, output: str = "") -> tuple[int, str, str]:
    """(exit code, output, error); `output` takes the place of the file that the command names."""
    script, words, files, _ = COMMANDS[command]
    ended = run_script(script, *(output if output and word == files[0] else word for word in words))
    return ended.code, ended.out, ended.err


@pytest.mark.parametrize(
    ("command", "file"), [(command, file) for command, (_, _, files, _) in COMMANDS.items() for file in files]
)
def test_no_program_writes_over_a_file_that_is_there(command: str, file: str, folder: Path) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"somebody's")
    before = contents(folder)
    code, _, said = said_by(command)
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert file in said
    assert "remove it" in said
    assert contents(folder) == before


@pytest.mark.parametrize("command", [command for command, (_, _, _, read) in COMMANDS.items() if read])
def test_no_output_is_an_input(command: str, folder: Path) -> None:
    before = contents(folder)
    code, _, said = said_by(command, output=COMMANDS[command][3])
    assert code == 2
    assert said.count("\n") == 1
    assert "would be written over" in said or "is the input: give another name" in said or "cannot be used: it," in said
    assert contents(folder) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_written_where_nothing_is(command: str, folder: Path) -> None:
    before = contents(folder)
    code, _, said = said_by(command)
    assert (code, said.replace("\r", "").startswith("error")) == (0, False), said
    made = {path.relative_to(folder).as_posix() for path in contents(folder).keys() - before.keys()}
    assert set(COMMANDS[command][2]) - {"out.json"} <= made
