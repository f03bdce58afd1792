"""Whole runs of train.py with adapters: every method, packed and not, however much is computed again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_checkpoint, tiny_shape, tiny_state_file
from running import Ended, files_in, go_on, left_by_run, metrics, refusal, stopped, train, try_train, write_documents
from tables import covering, some
from torch import Tensor

from src.adapters.adapter import Adapter

pytestmark = pytest.mark.usefixtures("architecture")

LENGTHS = [30, 12, 25, 18, 9, 33]
METHODS = ("lora", "pissa", "bone", "bat")
QUANT: dict[str, dict[str, object]] = {
    "none": {"quant": 0},
    "nf4": {"quant": 1, "quant_type": "nf4"},
    "int8": {"quant": 1, "quant_type": "int8"},
}


@pytest.fixture(scope="module")
def base(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.pth"
    tiny_checkpoint(path, dtype=torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data") / "documents", LENGTHS)


def sized(peft: str, r: int = 8) -> dict[str, object]:
    """The flags of a method with blocks and ranks that fit the tiny model."""
    return {"peft": peft, {"lora": "lora_r", "pissa": "pissa_r"}.get(peft, "bone_r"): r}


def tensors_in(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
    return tensors


def described(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "rwkv-final.json").read_text(encoding="utf-8"))
    return content


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in metrics(folder)]


def held_out(ended: Ended, label: str) -> float:
    """The loss on held-out data that the run printed."""
    line = next(line for line in ended.out.splitlines() if line.startswith(f"held out   {label}"))
    return float(line.partition("loss ")[2].split()[0])


@pytest.mark.parametrize(("peft", "quant"), covering(METHODS, QUANT))
def test_a_run_is_the_same_however_much_is_computed_again(
    peft: str, quant: str, base: Path, data: Path, tmp_path: Path
) -> None:
    runs = []
    for grad_cp in (0, 1, 2):
        folder = tmp_path / str(grad_cp)
        flags = {**sized(peft), **QUANT[quant], "grad_cp": grad_cp, "dataload": "pack", "ctx_len": 64}
        train(
            folder, load_model=base, data_file=data, epoch_steps=4, epoch_count=1, lr_init=1e-2, lr_final=1e-3, **flags
        )
        factors = {"init_pissa.pth", "init_pissa.json"} if peft == "pissa" else set()
        assert files_in(folder) == left_by_run("rwkv-0.pth") | factors
        written = tensors_in(folder / "rwkv-final.pth")
        assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
        assert not any("weight" in name and "ln" not in name for name in written)
        runs.append((losses(folder), written))
    for values, written in runs[1:]:
        assert values == pytest.approx(runs[0][0], rel=1e-5)
        assert written.keys() == runs[0][1].keys()


@pytest.mark.parametrize("peft", some(METHODS, "pissa"))
def test_training_lowers_the_loss_and_the_file_goes_on_where_it_ended(
    peft: str, base: Path, data: Path, tmp_path: Path
) -> None:
    common = {"load_model": base, "data_file": data, "val_file": data, "epoch_count": 1, "lr_init": 1e-2, **sized(peft)}
    common["lr_final"] = 1e-2
    first = train(tmp_path / "first", epoch_steps=12, warmup_steps=0, **common)
    assert held_out(first, "tuned") < held_out(first, "untuned") - 0.5
    file = tmp_path / "first" / "rwkv-final.pth"
    again = train(tmp_path / "again", epoch_steps=2, load_adapter=file, **common)
    assert held_out(again, "loaded") == pytest.approx(held_out(first, "tuned"), abs=0.02)

    # The same file by RWKV-PEFT's own flag, with the keys of its later writers.
    renamed = tmp_path / "renamed.pth"
    torch.save({f"model.{name}".replace(".bone", ".disha"): t for name, t in tensors_in(file).items()}, renamed)
    loads: dict[str, dict[str, object]] = {
        "lora": {"lora_config": {"lora_load": str(renamed), "lora_r": 8, "lora_alpha": 64, "lora_dropout": 0}},
        "pissa": {
            "pissa_config": {
                "pissa_load": str(renamed), "pissa_r": 8, "svd_niter": 4, "pissa_init": f"{file.parent}/init_pissa.pth",
            }
        },
        "bone": {"bone_config": {"bone_mode": "bone", "bone_load": str(renamed), "bone_r": 8}},
        "bat": {"peft": "disha", "disha_config": {"mode": "bat", "load": str(renamed), "r": 8}},
    }  # fmt: skip
    theirs = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in loads[peft].items()}
    plain = {name: value for name, value in common.items() if name not in ("lora_r", "pissa_r", "bone_r")}
    train(tmp_path / "theirs", epoch_steps=2, **{**plain, **theirs})
    assert losses(tmp_path / "theirs") == losses(tmp_path / "again")
    if peft == "pissa":
        one, other = (tensors_in(tmp_path / name / "init_pissa.pth") for name in ("first", "again"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_losses_stand_beside_what_they_led_to(base: Path, data: Path, tmp_path: Path) -> None:
    """Of all steps up to the file, those before an interruption included."""
    flags = {"load_model": base, "data_file": data, "epoch_steps": 15, "epoch_count": 2, "lr_init": 1e-2}
    stopped(20, tmp_path, **flags, **sized("bone"))
    assert described(tmp_path)["losses"]["steps"] == 20
    go_on(tmp_path)
    values = losses(tmp_path)
    for name, steps in (("rwkv-0", 15), ("rwkv-1", 30), ("rwkv-final", 30)):
        said = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["losses"]
        over = steps // 10
        first, last = sum(values[:over]) / over, sum(values[steps - over : steps]) / over
        assert said == {"steps": steps, "first": pytest.approx(first), "last": pytest.approx(last), "over": over}


@pytest.mark.parametrize("peft", some(METHODS, "bat"))
def test_what_was_trained_on_a_packed_base_is_measured_on_the_unpacked_one(
    peft: str, base: Path, data: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.pth"
    tiny_state_file(state, tiny_shape())
    common = {"data_file": data, "val_file": data, "load_model": base, "epoch_count": 1, "load_state": state}
    flags = {**common, **sized(peft), "lr_init": 1e-2, "epoch_steps": 8}
    ended = train(tmp_path / "out", quant=1, quant_type="int8", **flags)
    assert held_out(ended, "unpacked") == pytest.approx(held_out(ended, "tuned"), abs=0.02)
    assert held_out(ended, "unpacked") < held_out(ended, "loaded") - 0.05
    again = {**flags, "epoch_steps": 1, "load_adapter": tmp_path / "out" / "rwkv-final.pth"}
    loaded = train(tmp_path / "again", quant=0, **again)
    assert held_out(loaded, "loaded") == pytest.approx(held_out(ended, "unpacked"), abs=2e-4)


@pytest.mark.parametrize(
    ("flags", "optim"),
    covering([{}, {"peft": "lora", "lora_r": 8, "lr_init": 5e-3, "quant": 1}], ["adamw8bit", "lion8bit", "adamw"]),
)
def test_every_optimizer_lowers_the_loss(
    flags: dict[str, object], optim: str, base: Path, data: Path, tmp_path: Path
) -> None:
    common = {"load_model": base, "data_file": data, "val_file": data, "epoch_count": 1, "lr_init": 0.3, **flags}
    common["lr_final"] = common["lr_init"]
    ended = train(tmp_path, epoch_steps=16, warmup_steps=0, optim=optim, **common)
    assert held_out(ended, "tuned") < held_out(ended, "untuned") - 0.03


@pytest.mark.parametrize("lr_schedule", some(["cos", "wsd"], "wsd"))
def test_the_rate_follows_its_schedule(lr_schedule: str, base: Path, data: Path, tmp_path: Path) -> None:
    rate = {"lr_init": 0.1, "lr_final": 0.02, "lr_schedule": lr_schedule, "warmup_steps": 0}
    train(tmp_path, load_model=base, data_file=data, epoch_steps=20, epoch_count=1, **rate, **sized("bone"))
    rates = [record["lr"] for record in metrics(tmp_path)]
    assert rates[-1] == pytest.approx(0.02)
    if lr_schedule == "wsd":
        assert rates[:18] == [0.1] * 18
    else:
        assert rates[9] == pytest.approx(0.06)


@pytest.mark.parametrize("peft", some(METHODS, "bone"))
def test_in_bf16_a_run_is_bitwise_that_of_casts_at_each_use(
    peft: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accumulation, held-out losses, and a stop in between."""
    flags = {
        "load_model": base, "data_file": data, "val_file": data, "precision": "bf16", "lr_init": 1e-2, "micro_bsz": 1,
        "accumulate_grad_batches": 2, "epoch_steps": 4, "epoch_count": 2, "train_type": "states", **sized(peft),
    }  # fmt: skip
    stopped(3, tmp_path / "together", **flags)
    go_on(tmp_path / "together")
    monkeypatch.setattr(Adapter, "cast_with", lambda self, layer: None)
    train(tmp_path / "apart", **flags)
    assert losses(tmp_path / "together") == losses(tmp_path / "apart")
    one, other = (tensors_in(tmp_path / name / "rwkv-final.pth") for name in ("together", "apart"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_states_and_adapters_together(base: Path, data: Path, tmp_path: Path) -> None:
    flags = {**sized("lora"), "train_type": "states", "lr_state": 0.3, "train_parts": "[]", "quant": 1}
    ended = train(tmp_path, load_model=base, data_file=data, epoch_steps=2, epoch_count=1, **flags)
    written = tensors_in(tmp_path / "rwkv-final.pth")
    assert sum("time_state" in name for name in written) == 2
    assert {name.rpartition(".")[2] for name in written} == {"time_state", "lora_A", "lora_B"}
    assert all(tensor.any() for tensor in written.values())
    assert "states: 512" in ended.out


def test_an_adapter_is_trained_on_a_state_that_stays(base: Path, data: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.pth"
    shape = tiny_checkpoint(tmp_path / "unused.pth")
    tiny_state_file(state, shape)
    common = {"load_model": base, "data_file": data, "epoch_steps": 2, "epoch_count": 1, **sized("bone")}
    train(tmp_path / "with", load_state=state, **common)
    train(tmp_path / "without", **common)
    assert losses(tmp_path / "with") != losses(tmp_path / "without")
    assert not any("state" in name for name in tensors_in(tmp_path / "with" / "rwkv-final.pth"))


def test_what_stands_beside_a_file(base: Path, data: Path, tmp_path: Path) -> None:
    import hashlib

    flags = {**sized("lora"), "lora_alpha": 16, "targets": "att.key,ffn.value", "train_parts": "ln", "quant": 1}
    train(tmp_path, load_model=base, data_file=data, epoch_steps=1, epoch_count=1, **flags)
    said = described(tmp_path)
    assert said["base"] == {
        "file": "base.pth", "size_bytes": base.stat().st_size, "sha256": hashlib.sha256(base.read_bytes()).hexdigest(),
    }  # fmt: skip
    expected = {
        "method": "lora", "r": 8, "alpha": 16.0, "scale": 2.0, "scale_rule": "alpha / r", "dropout": 0.0,
        "targets": ["att.key", "ffn.value"], "train_parts": ["ln"], "states": False, "quant": "nf4",
    }  # fmt: skip
    assert {name: said[name] for name in expected} == expected
    assert said["flags"]["lora_r"] == 8  # type: ignore[index]
    assert said["versions"]["torch"] == torch.__version__.partition("+")[0] or said["versions"]["torch"]  # type: ignore[index]


def test_dropout_is_the_same_however_much_is_computed_again(base: Path, data: Path, tmp_path: Path) -> None:
    common = {"load_model": base, "data_file": data, "epoch_steps": 4, "epoch_count": 1, "lr_init": 1e-2}
    for grad_cp in (0, 1):
        train(tmp_path / str(grad_cp), grad_cp=grad_cp, lora_dropout=0.3, **common, **sized("lora"))
    train(tmp_path / "none", **common, **sized("lora"))
    assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    assert losses(tmp_path / "0") != pytest.approx(losses(tmp_path / "none"), rel=1e-5)


@pytest.mark.parametrize(
    "parts", some([('["time","ln"]',), ("[time,", "ln]"), ("time,ln",), ("time", "ln"), ()], ("[time,", "ln]")), ids=str
)
def test_parts_in_every_form(parts: tuple[str, ...], architecture: str, base: Path, data: Path, tmp_path: Path) -> None:
    from running import run_script

    words = ["--train_parts", *parts] if parts else []
    flags = {"load_model": base, "data_file": data, "proj_dir": tmp_path, "accelerator": "cpu", "epoch_steps": 1}
    ended = run_script("train.py", *words, epoch_count=1, **flags, **sized("bone"))
    assert ended.code == 0, ended.err
    assert f"time: {'7,808' if architecture == 'x060' else '7,328'}, ln: 512 values" in ended.out


def test_no_parts(base: Path, data: Path, tmp_path: Path) -> None:
    train(tmp_path, load_model=base, data_file=data, epoch_steps=1, epoch_count=1, train_parts="[]", **sized("bat"))
    assert {name.rpartition(".")[2] for name in tensors_in(tmp_path / "rwkv-final.pth")} == {"bone"}


class TestPissaFolders:
    def test_an_earlier_start_in_the_folder_is_used_again(self, base: Path, data: Path, tmp_path: Path) -> None:
        common = {"load_model": base, "data_file": data, "epoch_steps": 1, "epoch_count": 1, **sized("pissa")}
        train(tmp_path, **common)
        first = (tmp_path / "init_pissa.pth").read_bytes()
        (tmp_path / "rwkv-0.pth").unlink()
        (tmp_path / "rwkv-final.pth").unlink()  # as if the run had been killed early
        train(tmp_path, **common)
        assert (tmp_path / "init_pissa.pth").read_bytes() == first
        assert losses(tmp_path)[0] == losses(tmp_path)[1]

    def test_one_of_another_training_is_not_written_over(self, base: Path, data: Path, tmp_path: Path) -> None:
        common = {"load_model": base, "data_file": data, "epoch_steps": 1, "epoch_count": 1}
        train(tmp_path, **common, **sized("pissa"))
        kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
        for name in ("rwkv-0.pth", "rwkv-final.pth"):
            (tmp_path / name).unlink()
            del kept[name]
        ended = try_train(tmp_path, **common, **sized("pissa", r=4))
        assert ended.code == 2
        assert "was made with r 8" in ended.err
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")} == kept
        train(tmp_path, **common, **sized("pissa", r=4), overwrite=1)


class TestRefusals:
    """One sentence, exit code 2, no file."""

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"peft": "lora", "lora_config": "{lora_r: 8}"}, "--lora_config {lora_r: 8} is no JSON"),
            ({"peft": "lora", "lora_config": '{"lora_rank": 8}'}, "unknown key 'lora_rank': it may have lora_load,"),
            ({"peft": "lora", "lora_config": '{"lora_r": "8"}'}, 'lora_r is "8", expected a whole number'),
            ({"peft": "lora", "lora_config": '{"lora_r": 0}'}, "--lora_config: lora_r 0 must be at least 1"),
            ({"peft": "disha", "disha_config": '{"mode": "mode"}'}, "mode 'mode' is unknown: use one of bone, bat"),
            ({"peft": "lora", "lora_r": 33}, "--lora_r 33 is larger than"),
            ({"peft": "bat", "bone_r": 24}, "--bone_r 24 does not divide"),
            ({"peft": "bat", "bone_r": 8, "targets": "query"}, "--targets query is no matrix of this model"),
            ({"peft": "bone", "bone_r": 8, "train_parts": "timo"}, "--train_parts timo is part of no weight's name"),
            ({"peft": "lora", "lora_r": 8, "load_adapter": "nowhere.pth"}, "adapter file nowhere.pth does not exist"),
        ],
        ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
    )
    def test_flags(self, flags: dict[str, object], expected: str, base: Path, data: Path, tmp_path: Path) -> None:
        ended = try_train(tmp_path / "out", load_model=base, data_file=data, **flags)
        assert expected in refusal(ended, tmp_path / "out")

    def test_states_from_two_files(self, base: Path, data: Path, tmp_path: Path) -> None:
        state = tmp_path / "state.pth"
        tiny_state_file(state, tiny_shape())
        common = {"load_model": base, "data_file": data, "epoch_steps": 1, "epoch_count": 1, "train_type": "states"}
        train(tmp_path / "made", **common, **sized("bone"))
        both = {"load_state": state, "load_adapter": tmp_path / "made" / "rwkv-final.pth"}
        ended = try_train(tmp_path / "out", **common, **both, **sized("bone"))
        assert "both hold states: leave the former out" in refusal(ended, tmp_path / "out")

    def test_a_file_of_another_model_method_or_scale(self, base: Path, data: Path, tmp_path: Path) -> None:
        common = {"data_file": data, "epoch_steps": 1, "epoch_count": 1}
        train(tmp_path / "made", load_model=base, **common, **sized("lora"))
        file = tmp_path / "made" / "rwkv-final.pth"
        other = tmp_path / "other.pth"
        tiny_checkpoint(other, n_layer=3)
        same_size = tmp_path / "same-size.pth"
        tiny_checkpoint(same_size, dtype=torch.bfloat16, seed=5)
        assert same_size.stat().st_size == base.stat().st_size
        for flags, expected in (
            ({"load_model": same_size, **sized("lora")}, "was made on base.pth with SHA-256 "),
            ({"load_model": base, **sized("pissa")}, "was made with --peft lora (rwkv-final.json), not pissa"),
            ({"load_model": base, **sized("lora"), "lora_alpha": 8}, "was made with alpha 64.0"),
            ({"load_model": other, **sized("lora")}, "it only fits the model it was trained on"),
            ({"load_model": base, **sized("lora", r=4)}, "was made with r 8"),
        ):
            ended = try_train(tmp_path / "out", load_adapter=file, **common, **flags)
            assert expected in refusal(ended, tmp_path / "out")
