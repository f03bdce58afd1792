"""python -m src.commands.state, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from assertions import assert_same_tensors
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_state_file, tiny_states
from running import ROOT, Ended, run_script

from src.checkpoint import load_state, open_checkpoint, save_state

SHAPE = tiny_shape()
MADE_ON = {"file": "base.pth", "size_bytes": 5, "sha256": "ab" * 32}


def tool(*words: object) -> Ended:
    return run_script("src/commands/state.py", *words)


def done(*words: object) -> str:
    ended = tool(*words)
    assert ended.code == 0, ended.err
    return ended.out


def refused(*words: object) -> str:
    ended = tool(*words)
    assert (ended.code, ended.out) == (2, ""), ended.out
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    return ended.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, states with and without their JSON, and an adapter."""
    tiny_checkpoint(tmp_path / "base.pth", dtype=torch.bfloat16)
    for seed, name in enumerate(("a", "b", "bare")):
        tiny_state_file(tmp_path / f"{name}.pth", SHAPE, seed)
    for name in ("a", "b"):
        said = {
            "method": "states", "architecture": "x060", "quant": "nf4", "base": MADE_ON,
            "flags": {"ctx_len": 77, "micro_bsz": 1, "load_model": "base.pth"},
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    tiny_adapter(tmp_path / "bone.pth", SHAPE, "bone")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_in_a_process_of_its_own(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "src.commands.state", "inspect", "a.pth"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "a state: 2 layers of [4, 8, 8] (head, value, key), bfloat16" in ended.stdout


class TestInspect:
    def test_a_state(self, folder: Path) -> None:
        shown = done("inspect", "a.pth")
        assert f"file       a.pth ({(folder / 'a.pth').stat().st_size:,} bytes)" in shown
        assert "trained    states on base.pth (5 bytes, sha256 abababababab...), nf4 weights" in shown
        assert "flags      --ctx_len 77 --load_model base.pth" in shown  # micro_bsz is as by default
        state = tiny_states(SHAPE, dtype=torch.bfloat16)["blocks.1.att.time_state"].double()
        row = re.search(r"^ +1 +1 +256 +(\S+) +(\S+)$", shown, re.MULTILINE)
        assert row is not None
        assert float(row[1]) == pytest.approx(float(state.square().mean().sqrt()), rel=1e-3)
        assert float(row[2]) == pytest.approx(float(state.abs().max()), rel=1e-3)
        assert re.search(r"^ +all +2 +512 ", shown, re.MULTILINE)

    def test_without_a_json(self, folder: Path) -> None:
        assert "made       by nothing that is known: there is no JSON beside it" in done("inspect", "bare.pth")

    def test_a_model_and_a_merged_one(self, folder: Path) -> None:
        shown = done("inspect", "base.pth")
        assert f"a model: RWKV-6 (x060), {SHAPE.parameter_count:,} parameters, 2 layers, n_embd 32" in shown
        assert re.search(r"^ +rest +4 ", shown, re.MULTILINE)
        tiny_checkpoint(folder / "merged.pth", with_state=True)
        assert "with a state in it" in done("inspect", "merged.pth")

    def test_adapters_and_parts(self, folder: Path) -> None:
        assert "an adapter: Bone or Bat on 16 matrices, bone [8, 32] first, bfloat16" in done("inspect", "bone.pth")
        further = {**tiny_states(SHAPE, dtype=torch.bfloat16), "ln_out.bias": torch.ones(32).bfloat16()}
        tiny_adapter(folder / "lora.pth", SHAPE, "lora", further=further)
        (folder / "lora.json").write_text('{"method": "lora", "r": 8, "alpha": 16.0, "scale": 2.0}')
        shown = done("inspect", "lora.pth")
        for part in (
            "an adapter: lora (r 8, alpha 16.0, scale 2.0) on 16 matrices, lora_A [8, 32] first, ",
            "1 further weight, the states of 2 layers, bfloat16",
        ):
            assert part in shown
        torch.save({"ln_out.bias": torch.ones(32)}, folder / "parts.pth")
        assert "weights of a model: 1 further weight, float32" in done("inspect", "parts.pth")

    def test_a_folder_of_peft(self, folder: Path) -> None:
        done("export", "bone.pth", "peft", "--to", "hf", "--base", "base.pth")
        assert "an adapter: bone (r 8) on 16 matrices" in done("inspect", "peft")

    def test_wrong_files_are_one_sentence(self, folder: Path) -> None:
        assert "gone.pth does not exist; this folder holds a.pth" in refused("inspect", "gone.pth")
        (folder / "text.pth").write_text("hello")
        assert "text.pth is a text file" in refused("inspect", "text.pth")
        (folder / "a.json").write_text("[")
        assert "a.json is damaged" in refused("inspect", "a.pth")


class TestExport:
    """What is in the files stands in tests/unit/test_export.py, and in test_client_agreement.py."""

    def test_the_json_goes_with_a_file_that_a_trainer_reads_too(self, folder: Path) -> None:
        shown = done("export", "a.pth", "runner.pth", "--to", "runner")
        assert "exported   2 layers of state [4, 8, 8] for RWKV-Runner: [head, value, key], bfloat16" in shown
        assert "next       put runner.pth into state-models/" in shown
        assert json.loads((folder / "runner.json").read_text())["flags"]["ctx_len"] == 77
        assert_same_tensors(load_state("runner.pth", SHAPE), load_state("a.pth", SHAPE))
        done("export", "bare.pth", "other.pth", "--to", "runner")
        assert not (folder / "other.json").exists()

    def test_one_file_for_others(self, folder: Path) -> None:
        before = set(os.listdir(folder))
        shown = done("export", "a.pth", "a.st", "--to", "ai00")
        assert "for Ai00: [head, key, value], float16" in shown
        assert set(os.listdir(folder)) - before == {"a.st"}

    @pytest.mark.parametrize("client", ["rwkv-pip", "rwkvcpp"])
    def test_the_architecture_is_asked_for_where_the_file_depends_on_it(self, folder: Path, client: str) -> None:
        message = refused("export", "bare.pth", "out.pth", "--to", client)
        assert "bare.pth does not say its model's architecture" in message
        assert "--my_testing x060 (RWKV-6), --my_testing x070 (RWKV-7), or the model with --base" in message
        for number, source in enumerate(
            (
                ("bare.pth", "--base", "base.pth"),
                ("bare.pth", "--my_testing", "x070"),
                ("a.pth", "--base", "base.pth"),
            )
        ):
            done("export", source[0], f"out-{number}.pth", "--to", client, *source[1:])

    def test_files_of_older_runs_say_it_among_their_flags(self, folder: Path) -> None:
        (folder / "bare.json").write_text('{"method": "states", "flags": {"my_testing": "x060"}}')
        assert "[head, key, value]" in done("export", "bare.pth", "out.bin", "--to", "rwkvcpp")

    def test_sources_that_contradict_each_other_are_refused(self, folder: Path) -> None:
        message = refused("export", "a.pth", "out.bin", "--to", "rwkvcpp", "--my_testing", "x070")
        assert "--my_testing says x070, and a.json says x060: leave --my_testing out" in message
        (folder / "a.json").write_text('{"architecture": "x070"}')
        message = refused("export", "a.pth", "out.bin", "--to", "rwkvcpp", "--base", "base.pth")
        assert "base.pth says x060, and a.json says x070: name a state and the model it was trained on" in message

    def test_an_x060_state_for_the_rwkv_package_is_in_a_model(self, folder: Path) -> None:
        assert "--base is missing: the PyPI package rwkv takes an x060 state inside of the model" in refused(
            "export", "a.pth", "out.pth", "--to", "rwkv-pip"
        )
        (folder / "a.json").unlink()
        done("export", "a.pth", "out.pth", "--to", "rwkv-pip", "--base", "base.pth")
        assert open_checkpoint("out.pth").info.has_state
        assert_same_tensors(load_state("out.pth", SHAPE), load_state("a.pth", SHAPE))

    def test_an_x070_state_for_the_rwkv_package_stands_alone(self, folder: Path) -> None:
        shown = done("export", "bare.pth", "out.pth", "--to", "rwkv-pip", "--my_testing", "x070")
        assert "states = torch.load('out.pth'); state = model.generate_zero_state();" in shown
        wide = {key: state.float() for key, state in load_state("bare.pth", SHAPE).items()}
        assert_same_tensors(load_state("out.pth", SHAPE), wide)

    def test_the_state_of_a_merged_model(self, folder: Path) -> None:
        tiny_checkpoint(folder / "merged.pth", with_state=True)
        done("export", "merged.pth", "out.bin", "--to", "rwkvcpp")  # which says its architecture itself
        assert (folder / "out.bin").stat().st_size == 2 * (2 * 32 + 32 * 8) * 4

    def test_adapters(self, folder: Path) -> None:
        assert f"merge it (python {ROOT}/merge_state.py BASE.pth bone.pth merged.pth)" in refused(
            "export", "bone.pth", "out.pth", "--to", "runner"
        )
        assert "--base is missing: an adapter is written for" in refused("export", "bone.pth", "out", "--to", "hf")
        shown = done("export", "bone.pth", "out", "--to", "hf", "--base", "base.pth")
        assert "Bone r 8 on 16 matrices" in shown
        assert sorted(os.listdir("out")) == ["adapter_config.json", "adapter_model.safetensors"]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("a.pth", "a.pth", "--to", "runner"), "FILE a.pth would be written over"),
            (("a.pth", "b/../a.pth", "--to", "runner"), "would be written over"),
            (("a.pth", "base.pth", "--to", "runner", "--base", "base.pth"), "--base base.pth would be written over"),
            (("a.pth", "a.json", "--to", "rwkvcpp"), "the JSON beside it a.json would be written over"),
            (("a.pth", "out.pth", "--to", "ai00"), "names for Ai00 end in .state or .st; call it out.state"),
            (("a.pth", "no/out.st", "--to", "ai00"), "no; create it first"),
            (("a.pth", "out.st", "--to", "all"), "error: --to all is unknown: use one of runner, ai00"),
            (("base.pth", "out.pth", "--to", "runner"), "base.pth holds no blocks.*.att.time_state"),
            (("a.st", "out.st", "--to", "web-rwkv"), "a.st is a client's form already: name the .pth file"),
        ],
    )
    def test_what_cannot_be_is_one_sentence_and_writes_nothing(
        self, folder: Path, words: tuple[str, ...], message: str
    ) -> None:
        (folder / "b").mkdir()
        done("export", "a.pth", "a.st", "--to", "ai00")
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert message in refused("export", *words)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    def test_a_state_of_another_model_is_refused(self, folder: Path) -> None:
        tiny_checkpoint(folder / "deep.pth", n_layer=3)
        message = refused("export", "a.pth", "out.bin", "--to", "rwkvcpp", "--base", "deep.pth")
        assert "a.pth holds the time_state of 2 layers, but the model has 3 layers" in message

    def test_overflow_is_refused(self, folder: Path) -> None:
        save_state("large.pth", {key: state * 1e6 for key, state in tiny_states(SHAPE).items()})
        assert "and Ai00 reads float16, which ends at 65504" in refused("export", "large.pth", "l.st", "--to", "ai00")
        assert not (folder / "l.st").exists()


class TestBlend:
    def test_a_state_with_itself_is_that_state_to_the_byte(self, folder: Path) -> None:
        done("blend", "a.pth:0.3", "a.pth:0.7", "out.pth")
        assert (folder / "out.pth").read_bytes() == (folder / "a.pth").read_bytes()

    def test_two_states(self, folder: Path) -> None:
        shown = done("blend", "a.pth:0.3", "b.pth:0.7", "out.pth")
        assert "blended    0.3 x a.pth + 0.7 x b.pth" in shown
        assert "add up" not in shown
        first, second = (tiny_states(SHAPE, seed, torch.bfloat16) for seed in (0, 1))
        expected = {key: (0.3 * first[key].double() + 0.7 * second[key].double()).bfloat16() for key in first}
        assert_same_tensors(load_state("out.pth", SHAPE), expected)
        said = json.loads((folder / "out.json").read_text())
        assert (said["method"], said["architecture"], said["base"]) == ("states", "x060", MADE_ON)
        assert "blended    0.3 x a.pth + 0.7 x b.pth" in done("inspect", "out.pth")

    def test_weights_that_are_no_average_are_noted(self, folder: Path) -> None:
        assert "the weights add up to 0.5" in done("blend", "a.pth:1", "b.pth:-0.5", "out.pth")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("a.pth:0.5", "b.pth:0.5", "b.pth"), "state 2 b.pth would be written over"),
            (("a.pth:1", "a.json"), "would be written over"),
            (("a.pth:0.5", "wide.pth:0.5", "out.pth"), "wide.pth has 2 layers of [8, 8, 8], and a.pth has 2 layers"),
            (("a.pth:0.5", "other.pth:0.5", "out.pth"), "other.pth was trained on x.pth and a.pth on base.pth"),
            (("a.pth:0.5", "bone.pth:0.5", "out.pth"), "bone.pth holds no blocks.*.att.time_state"),
            (("a.pth:0.5", "gone.pth:0.5", "out.pth"), "gone.pth does not exist"),
            (("a.pth:1e38", "b.pth:1e38", "out.pth"), "not finite"),
            (("a.pth", "b.pth", "out.pth"), "write FILE:WEIGHT"),
        ],
    )
    def test_what_cannot_be_is_refused_and_nothing_is_written(
        self, folder: Path, words: tuple[str, ...], message: str
    ) -> None:
        tiny_state_file(folder / "wide.pth", tiny_shape(n_embd=64))
        tiny_state_file(folder / "other.pth", SHAPE)
        (folder / "other.json").write_text(json.dumps({"base": {**MADE_ON, "file": "x.pth", "sha256": "cd"}}))
        save_state("b.pth", {key: torch.full_like(state, 9.0) for key, state in tiny_states(SHAPE).items()})
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        ended = tool("blend", *words)
        assert (ended.code, ended.out) == (2, "")
        assert message in ended.err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class TestDiff:
    def test_states(self, folder: Path) -> None:
        done("blend", "a.pth:2", "out.pth")
        shown = done("diff", "a.pth", "out.pth")
        assert re.findall(r"^ +(\w+) +[\d.]+ +[\d.]+ +(\S+) +(\S+)$", shown, re.MULTILINE) == [
            (name, "1", "1.0000") for name in ("0", "1", "all")
        ]
        assert re.search(r"^ +all +\S+ +\S+ +0 +1\.0000$", done("diff", "a.pth", "a.pth"), re.MULTILINE)

    def test_models(self, folder: Path) -> None:
        done("export", "a.pth", "one.pth", "--to", "rwkv-pip", "--base", "base.pth")
        done("export", "b.pth", "two.pth", "--to", "rwkv-pip", "--base", "base.pth")
        shown = done("diff", "one.pth", "two.pth")
        assert re.search(r"^ +rest +\S+ +\S+ +0 +1\.0000$", shown, re.MULTILINE)
        assert not re.search(r"^ +0 +\S+ +\S+ +0 +", shown, re.MULTILINE)

    def test_other_kinds_and_shapes_are_refused(self, folder: Path) -> None:
        tiny_state_file(folder / "deep.pth", tiny_shape(n_layer=3))
        tiny_state_file(folder / "wide.pth", tiny_shape(n_embd=64))
        assert "a.pth is a state and base.pth is a model" in refused("diff", "a.pth", "base.pth")
        assert "a.pth has no blocks.2.att.time_state" in refused("diff", "a.pth", "deep.pth")
        assert "has shape [8, 8, 8] in wide.pth and [4, 8, 8] in a.pth" in refused("diff", "wide.pth", "a.pth")
        done("export", "a.pth", "a.st", "--to", "ai00")
        assert "a.st is a client's form, [head, key, value]" in refused("diff", "a.pth", "a.st")


class TestVerify:
    def test_a_state(self, folder: Path) -> None:
        shown = done("verify", "bare.pth", "--base", "base.pth")
        assert "fits       base.pth: states of 2 layers" in shown
        assert "no JSON beside it says which model it was trained on" in shown
        assert "compared   on 256 tokens (random ones), CPU, 1 thread, fp32, unpacked weights" in shown
        percent = re.search(r"logits     (\S+)% from those without it", shown)
        assert percent is not None
        assert float(percent[1]) > 1

    def test_on_a_text(self, folder: Path) -> None:
        (folder / "text.txt").write_text("hello, world")
        shown = done("verify", "bone.pth", "--base", "base.pth", "--verify_text", "text.txt", "--quant", "nf4")
        assert "Bone r 8 on 16 matrices" in shown
        assert "on 12 tokens (text.txt), CPU, 1 thread, fp32, nf4 weights" in shown
        assert re.search(r"loss       \d+\.\d+ without it, \d+\.\d+ with it", shown)

    def test_the_model_it_was_trained_on_is_compared(self, folder: Path) -> None:
        from src.identity import FileIdentity

        own = FileIdentity("base.pth").as_dict()
        for base, expected in (
            (own, "it was trained on this model (base.pth: size and SHA-256 are the same)"),
            ({**own, "sha256": "ab"}, "warning    it was trained on base.pth, which had as many bytes and others"),
            (MADE_ON, "warning    it was trained on base.pth of 5 bytes, which is another model"),
        ):
            (folder / "a.json").write_text(json.dumps({"method": "states", "base": base}))
            assert expected in done("verify", "a.pth", "base.pth")

    def test_a_state_of_zeros_changes_nothing(self, folder: Path) -> None:
        save_state("zero.pth", {key: torch.zeros_like(state) for key, state in tiny_states(SHAPE).items()})
        assert "it changes nothing at all" in done("verify", "zero.pth", "base.pth")

    def test_what_does_not_fit_is_refused(self, folder: Path) -> None:
        tiny_checkpoint(folder / "deep.pth", n_layer=3)
        assert "but the model has 3 layers" in refused("verify", "a.pth", "--base", "deep.pth")
        assert "of 2 layers, but the model has 3" in refused("verify", "bone.pth", "--base", "deep.pth")
        assert "base.pth holds no blocks" in refused("verify", "base.pth", "base.pth")
