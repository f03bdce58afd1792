"""What train.py leaves, merged by merge_state.py, in its own words and in RWKV-PEFT's."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from factories import tiny_adapter, tiny_checkpoint, tiny_shape, tiny_state_file
from running import Ended, files_in, run_script, train, write_documents

from src.adapters import trained

METHODS = ("lora", "pissa", "bone", "bat")
RANK_FLAGS = {"lora": "lora_r", "pissa": "pissa_r", "bone": "bone_r", "bat": "bone_r"}
SHAPE = tiny_shape(n_embd=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in bf16, and a run of each method, on packed weights in `nf4-…`."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_checkpoint(folder / "base.pth", n_embd=64, dtype=torch.bfloat16)
    data = write_documents(folder / "documents", [30, 12, 25, 18])
    common = {"load_model": folder / "base.pth", "data_file": data, "epoch_steps": 4, "epoch_count": 1}
    for peft in METHODS:
        flags = {"peft": peft, RANK_FLAGS[peft]: 8, "lr_init": 1e-2, "lr_final": 1e-2, "epoch_save": 0}
        train(folder / peft, **common, **flags)
        train(folder / f"nf4-{peft}", quant=1, train_type="states", lr_state=0.1, **common, **flags)
    return folder


def merged(folder: Path, run: str, output: Path, base: Path | None = None, **flags: object) -> Ended:
    ended = run_script("merge_state.py", base or folder / "base.pth", folder / run / "rwkv-final.pth", output, **flags)
    assert ended.code == 0, ended.err
    return ended


def verified(ended: Ended) -> list[float]:
    """The distances that `--verify 1` printed."""
    return [float(number) for number in re.findall(r"are (\S+) from (?:base|the)", ended.out)]


@pytest.mark.parametrize("peft", METHODS)
def test_a_run_is_merged_without_a_word_on_what_it_was(peft: str, folder: Path, tmp_path: Path) -> None:
    ended = merged(folder, peft, tmp_path / "merged.pth", verify=1)
    (distance,) = verified(ended)
    assert distance < 3e-3
    assert f"{dict(zip(METHODS, ('LoRA', 'PiSSA', 'Bone', 'Bat'), strict=True))[peft]} r 8" in ended.out
    assert "44 further weights" in ended.out
    assert re.search(r"weights in \w+; \d+ of \d+ tensors copied bit for bit", ended.out)
    assert "note" not in ended.out
    assert files_in(tmp_path) == {"merged.pth"}
    # It trains on as a base model, from where the run ended.
    train(
        tmp_path / "on",
        load_model=tmp_path / "merged.pth",
        data_file=folder / "documents",
        epoch_steps=1,
        epoch_count=1,
    )


@pytest.mark.parametrize("peft", METHODS)
def test_a_run_on_packed_weights(peft: str, folder: Path, tmp_path: Path) -> None:
    ended = merged(folder, f"nf4-{peft}", tmp_path / "merged.pth", verify=1)
    near, far = verified(ended)
    assert near < 3e-3
    assert 0.01 < far < 0.2
    assert "note     it was trained on nf4 weights" in ended.out
    assert "--verify" not in ended.out  # it was given
    assert "2 layers of state" in ended.out
    as_trained = merged(folder, f"nf4-{peft}", tmp_path / "as-trained.pth", verify=1, quant="nf4")
    assert max(verified(as_trained)) < 3e-3
    assert "from the nf4 model as it was trained" in as_trained.out
    assert "note" not in as_trained.out


@pytest.mark.parametrize(("method", "quant_type"), [("states", "nf4"), ("bone", "int8")])
def test_verifying_a_run_with_a_packed_head(method: str, quant_type: str, folder: Path, tmp_path: Path) -> None:
    """The model as it was trained is compared with, with its head and with packed matrices that had no adapter."""
    adapter = {"peft": "bone", "bone_r": 8, "targets": "att.key", "train_parts": "[]"} if method == "bone" else {}
    common = {"load_model": folder / "base.pth", "data_file": folder / "documents", "epoch_steps": 2, "epoch_count": 1}
    distances = []
    for quant_head in (0, 1):
        run = tmp_path / str(quant_head)
        packing = {"quant": 1, "quant_type": quant_type, "quant_head": quant_head}
        train(run, **common, **adapter, **packing, lr_init=1e-2, lr_final=1e-2)
        ended = run_script("merge_state.py", folder / "base.pth", run / "rwkv-final.pth", run / "merged.pth", verify=1)
        assert ended.code == 0, ended.err
        near, far = verified(ended)
        assert near < 3e-3
        assert f"from the {quant_type} model as it was trained" in ended.out
        distances.append(far)
        if method == "states":
            continue
        again = run_script(
            "merge_state.py", folder / "base.pth", run / "rwkv-final.pth", run / "again.pth", verify=1, quant=quant_type
        )
        assert verified(again)[1] > 2e-3  # att.key alone was packed for it, and not what has no adapter
    # Measured, with either method: nf4 0.027 and 0.096, int8 0.0032 and 0.011.
    assert distances[1] > 2 * distances[0] > 2e-3


def test_an_adapter_beside_states_that_it_does_not_hold(folder: Path, tmp_path: Path) -> None:
    """Whoever uses it hears of them: its run's last lines, the chat, an evaluation, merging, and a run that goes on."""
    base, data, state = folder / "base.pth", folder / "documents", tmp_path / "state.pth"
    tiny_state_file(state, SHAPE)
    run, plain = tmp_path / "run", {"load_model": base, "data_file": data, "epoch_steps": 2, "epoch_count": 1}
    bone = {**plain, "peft": "bone", "bone_r": 8, "lr_init": 1e-2, "train_parts": "[]"}
    ended = train(run, **bone, load_state=state, val_file=data)
    both = {"load_state": state, "load_adapter": run / "rwkv-final.pth"}
    assert f"--load_state {state} --load_adapter {run}/rwkv-final.pth" in ended.out
    wanted = _held_out(ended)
    measured = {"evaluate": 1, "val_file": data, "dataload": "pad", "quant": 0, "accelerator": "cpu"}
    beside = run_script("train.py", **measured, load_model=base, **both)
    assert _held_out(beside) == pytest.approx(wanted, abs=1e-3)
    assert f"tuned      with {state} and {run}/rwkv-final.pth" in beside.out
    alone = run_script("train.py", **measured, load_model=base, load_adapter=run / "rwkv-final.pth")
    assert abs(_held_out(alone) - wanted) > 2e-3
    assert f"beside the states of {state}: give them with --load_state" in alone.out
    checked = run_script("src/commands/state.py", "verify", run / "rwkv-final.pth", base=base, accelerator="cpu")
    assert f"note       it was trained beside the states of {state}, which are not in it" in checked.out
    assert "note       it was trained on" not in checked.out
    packed = {"base": base, "accelerator": "cpu", "quant": "nf4", "type": "bone"}
    checked = run_script("src/commands/state.py", "verify", run / "rwkv-final.pth", **packed)
    assert "note       it was trained on unpacked weights: --quant none compares on such" in checked.out
    written = run_script(
        "src/commands/state.py", "export", run / "rwkv-final.pth", tmp_path / "peft", to="hf", base=base
    )
    assert f"note       it was trained beside {state}, whose states are not in it" in written.out
    again = train(tmp_path / "again", **bone, load_adapter=run / "rwkv-final.pth")
    assert f"beside the states of {state}: give them with --load_state" in again.out

    ended = merged(tmp_path, "run", tmp_path / "merged.pth", base=base)
    assert f"it was trained beside {state}, whose states are not in it" in ended.out
    command = re.search(r"merge_state\.py (\S+) (\S+)", ended.out)
    assert command
    assert command.groups() == (str(tmp_path / "merged.pth"), str(state))
    assert run_script("merge_state.py", *command.groups(), tmp_path / "whole.pth").code == 0
    whole = run_script("train.py", **measured, load_model=tmp_path / "whole.pth")
    assert _held_out(whole) == pytest.approx(_held_out(beside), abs=1e-3)


def _held_out(ended: Ended) -> float:
    """The last loss on held-out data that was printed."""
    assert ended.code == 0, ended.err
    return float(re.findall(r"loss (\d\.\d+) over", ended.out)[-1])


def test_a_packing_that_is_not_known(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "bone" / "rwkv-final.pth", tmp_path / "run.pth")
    said = json.loads((folder / "bone" / "rwkv-final.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**said, "quant": "nf5"}))
    ended = run_script("merge_state.py", folder / "base.pth", tmp_path / "run.pth", tmp_path / "merged.pth", verify=1)
    assert ended.code == 2
    assert "packed as 'nf5'" in ended.err
    assert files_in(tmp_path) == {"run.pth", "run.json"}


def test_an_fp32_model_is_merged_to_1e_5(folder: Path, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base.pth", n_embd=64)
    for peft in METHODS:
        tiny_adapter(tmp_path / f"{peft}.pth", SHAPE, peft)
        alpha = {"lora_alpha": 8} if peft == "lora" else {}
        paths = tmp_path / "base.pth", tmp_path / f"{peft}.pth", tmp_path / f"{peft}-merged.pth"
        ended = run_script("merge_state.py", *paths, verify=1, type=peft, **alpha)
        (distance,) = verified(ended)
        assert distance < 1e-6
        assert "nothing says whether it was trained on packed weights" in ended.out


@pytest.mark.parametrize(
    ("peft", "words"),
    [
        ("lora", "--base_model {base} --lora_checkpoint {file} --output {out} --type lora --lora_alpha 64"),
        ("pissa", "--base_model {base} --lora_init {init} --lora_checkpoint {file} --output {out} --type pissa"),
        ("bone", "--base_model {base} --lora_checkpoint {file} --output {out}"),
        ("bat", "--base_model {base} --peft_checkpoint {file} --output {out} --quant none --device cpu"),
        ("nf4-bone", "--base_model {base} --peft_checkpoint {file} --output {out} --quant nf4"),
    ],
)
def test_rwkv_peft_s_commands_on_files_without_json(peft: str, words: str, folder: Path, tmp_path: Path) -> None:
    quant = {"quant": "nf4"} if "nf4" in peft else {}
    merged(folder, peft, tmp_path / "expected.pth", **quant)
    shutil.copy(folder / peft / "rwkv-final.pth", tmp_path / "rwkv-0.pth")
    names = {"base": folder / "base.pth", "file": tmp_path / "rwkv-0.pth", "out": tmp_path / "merged.pth"}
    ended = run_script("merge_state.py", *words.format(**names, init=folder / "pissa" / "init_pissa.pth").split())
    assert ended.code == 0, ended.err
    expected, found = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("expected", "merged"))
    assert list(expected) == list(found)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_text_to_compare_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("A text that is compared on.", encoding="utf-8")
    ended = merged(folder, "bone", tmp_path / "merged.pth", verify=1, verify_text=tmp_path / "text")
    assert "logits of 27 tokens" in ended.out
    (tmp_path / "text").write_text("")
    flags = {"verify": 1, "verify_text": tmp_path / "text"}
    paths = folder / "base.pth", folder / "bone" / "rwkv-final.pth", tmp_path / "other.pth"
    empty = run_script("merge_state.py", *paths, **flags)
    assert (empty.code, (tmp_path / "other.pth").exists()) == (2, False)
    (tmp_path / "text").write_text('{"prompt": "a", "response": "b"}\n')
    ended = merged(folder, "bone", tmp_path / "third.pth", **flags)
    assert f"logits of {len('User: a__Assistant: b__')} tokens" in ended.out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wrong_merge_is_noticed(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks in the wrong order are 7 % off, which rounding to bf16 nearly explains."""
    right = trained.bone_weight
    monkeypatch.setattr(trained, "bone_weight", lambda weight, block: right(weight, block.flip(0)))
    tiny_checkpoint(tmp_path / "base.pth", n_embd=64, dtype=dtype)
    tiny_adapter(tmp_path / "bone.pth", SHAPE, "bone", scale=0.03)
    paths = tmp_path / "base.pth", tmp_path / "bone.pth", tmp_path / "merged.pth"
    ended = run_script("merge_state.py", *paths, verify=1)
    if dtype is torch.float32:
        assert ended.code == 2
        assert "is no merge of its inputs" in ended.err
    else:
        assert ended.code == 0
        assert "warning  that is more than the 1e-02" in ended.out


def test_a_folder_for_peft_and_back(folder: Path, tmp_path: Path) -> None:
    tiny_adapter(tmp_path / "lora.pth", SHAPE, "lora")
    paths = folder / "base.pth", tmp_path / "lora.pth", tmp_path / "hf"
    ended = run_script("merge_state.py", *paths, type="lora", lora_alpha=16, export="hf")
    assert (ended.code, ended.err) == (0, "")
    assert "exported LoRA r 8 (scale 2) on 16 matrices" in ended.out
    assert files_in(tmp_path / "hf") == {"adapter_model.safetensors", "adapter_config.json"}
    back = run_script("merge_state.py", folder / "base.pth", tmp_path / "hf", tmp_path / "merged.pth", verify=1)
    assert back.code == 0, back.err
    assert verified(back)[0] < 3e-3


@pytest.mark.parametrize(
    ("run", "flags", "expected"),
    [
        ("lora", {"type": "bone"}, "holds LoRA tensors, not bone"),
        ("lora", {"lora_alpha": 8}, "was trained with alpha 64.0"),
        ("lora", {"quant": "nf4"}, "was trained on weights that were not packed"),
        ("nf4-bone", {"quant": "int8"}, "was trained on nf4"),
        ("bone", {"device": "gpu"}, "--device gpu is unknown"),
        ("bone", {"lora_init": "nowhere.pth"}, "--lora_init nowhere.pth says nothing about"),
        ("pissa", {"lora_init": "nowhere.pth"}, "init file of PiSSA nowhere.pth does not exist"),
        ("nf4-bone", {"export": "hf"}, "tensors beside its adapter"),
        ("bat", {"export": "hf"}, "holds a Bat"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    run: str, flags: dict[str, object], expected: str, folder: Path, tmp_path: Path
) -> None:
    paths = folder / "base.pth", folder / run / "rwkv-final.pth", tmp_path / "merged.pth"
    ended = run_script("merge_state.py", *paths, **flags)
    assert (ended.code, ended.out) == (2, "")
    assert expected in ended.err
    assert ended.err.count("\n") == 1
    assert files_in(tmp_path) == set()


def test_the_adapter_of_another_model(folder: Path, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "other.pth", n_embd=64, dtype=torch.bfloat16, seed=1)
    paths = tmp_path / "other.pth", folder / "bone" / "rwkv-final.pth", tmp_path / "merged.pth"
    ended = run_script("merge_state.py", *paths)
    assert ended.code == 2
    assert "was trained on base.pth with sha256" in ended.err
    assert files_in(tmp_path) == {"other.pth"}


def test_pissa_without_its_init_file(folder: Path, tmp_path: Path) -> None:
    for name in ("rwkv-final.pth", "rwkv-final.json"):
        shutil.copy(folder / "pissa" / name, tmp_path / name)
    ended = run_script("merge_state.py", folder / "base.pth", tmp_path / "rwkv-final.pth", tmp_path / "merged.pth")
    assert ended.code == 2
    assert "name that file with --lora_init" in ended.err
    assert not (tmp_path / "merged.pth").exists()


def test_a_state_of_another_model_is_told(folder: Path, tmp_path: Path) -> None:
    held = torch.load(folder / "nf4-bone" / "rwkv-final.pth", weights_only=True)
    torch.save({key: tensor for key, tensor in held.items() if "time_state" in key}, tmp_path / "state.pth")
    said = {"method": "states", "quant": "nf4", "base": {"file": "small.pth", "size_bytes": 12, "sha256": "00"}}
    (tmp_path / "state.json").write_text(json.dumps(said))
    ended = run_script("merge_state.py", folder / "base.pth", tmp_path / "state.pth", tmp_path / "merged.pth", verify=1)
    assert ended.code == 0, ended.err
    assert "note     the state was trained on small.pth of 12 bytes, which is another model" in ended.out
    same, packed = verified(ended)
    assert same == 0
    assert 0.01 < packed < 0.2
