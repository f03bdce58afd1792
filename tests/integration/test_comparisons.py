"""Runs of train.py --dpo 1 and --simpo 1: with every method, from every start, and where the reference is from."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint, tiny_state_file
from running import Ended, files_in, go_on, left_by_run, metrics, refusal, run_script, stopped, train, try_train
from tables import covering, some

from src.data.pair_file import load_pairs, save_pairs
from src.data.preferences import PreferencePair
from src.training import references

pytestmark = pytest.mark.usefixtures("architecture")

LN_2 = math.log(2)
CSV = """prompt,chosen,reject
What is rain?,Water that falls from clouds.,It is a kind of stone.
And snow?,The same,"Frozen rain, which falls slowly, and stays."
Why?,Because it is cold up there.,
How?,Slowly and in flakes.,I do not know.
"""
LOGGED = {
    "nll", "logp_chosen", "logp_rejected", "reward_chosen", "reward_rejected", "margin", "accuracy", "pref_percentage",
}  # fmt: skip
HELD_OUT = r"loss (\d\.\d{4}), accuracy (\d+\.\d)%, reward margin ([+-]\d+\.\d{4}), nll (\d+\.\d{4}) over (\d+) pairs"
METHODS: dict[str, dict[str, object]] = {
    "states": {"lr_init": 0.3},
    "packed states": {"lr_init": 0.3, "quant": 1},
    "lora": {"peft": "lora", "lora_r": 8, "lr_init": 2e-3},
    "pissa": {"peft": "pissa", "pissa_r": 8, "lr_init": 2e-3},
    "packed pissa": {"peft": "pissa", "pissa_r": 8, "lr_init": 2e-3, "quant": 1},
    "bone": {"peft": "bone", "bone_r": 8, "lr_init": 2e-3},
    "bat": {"peft": "bat", "bone_r": 8, "lr_init": 2e-3},
    "states and lora": {"peft": "lora", "lora_r": 8, "train_type": "states", "lr_state": 0.3, "lr_init": 2e-3},
    "parts": {"train_type": "states", "train_parts": "ln", "lr_init": 2e-3},
    "full": {"train_type": "none", "lr_init": 1e-3},
}
LOSSES: dict[str, dict[str, object]] = {"dpo": {"dpo": 1}, "simpo": {"simpo": 1}}


@pytest.fixture(scope="module")
def files(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base.pth`, and three pairs with a reject and one without: `pairs.save`; `scored.save` with the base's values,
    `scored-nf4.save` with those of the packed base."""
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "base.pth", dtype=torch.bfloat16)
    (folder / "in.csv").write_text(CSV, encoding="utf-8")
    for name, base_logp, quant in (("pairs.save", 0, 0), ("scored.save", 1, 0), ("scored-nf4.save", 1, 1)):
        ended = run_script(
            "PrepareOrpoDataset.py", load_model=folder / "base.pth", input_csv=folder / "in.csv", base_logp=base_logp,
            output_save=folder / name, target_pair_count=4, accelerator="cpu", quant=quant,
        )  # fmt: skip
        assert ended.code == 0, ended.err
    return folder


def flags_of(files: Path, **flags: object) -> dict[str, object]:
    """A short run on the pairs; the learning rate stays as it is."""
    base = {"load_model": files / "base.pth", "rlhf_train_file": files / "pairs.save", "warmup_steps": 0}
    together = {**base, "epoch_steps": 2, "epoch_count": 1, "micro_bsz": 4, **flags}
    return {"lr_final": together.get("lr_init", 0.01), **together}


def run(folder: Path, files: Path, **flags: object) -> Ended:
    return train(folder, **flags_of(files, **flags))


def reference(ended: Ended) -> str:
    """Where the run says its reference is from."""
    return next(line for line in ended.out.splitlines() if line.startswith("reference  ")).removeprefix("reference  ")


@pytest.mark.parametrize(("loss", "method"), covering(LOSSES, METHODS))
def test_every_method_learns_to_prefer(loss: str, method: str, files: Path, tmp_path: Path) -> None:
    common = {**LOSSES[loss], **METHODS[method], "val_file": files / "pairs.save", "epoch_steps": 8}
    ended = run(tmp_path, files, **common)
    records = metrics(tmp_path)
    assert all(record.keys() >= LOGGED for record in records)
    if loss == "dpo":
        assert records[0]["loss"] == pytest.approx(LN_2, abs=1e-5)
        assert records[0]["margin"] == pytest.approx(0, abs=1e-4)
        assert reference(ended) == "measured over 3 pairs"
    assert records[-1]["loss"] < records[0]["loss"] - 0.02
    assert records[-1]["margin"] > records[0]["margin"] + 0.02
    before, after = re.search(f"before: {HELD_OUT}", ended.out), re.search(f"after:  {HELD_OUT}", ended.out)
    assert before
    assert after
    assert float(before[1]) == pytest.approx(records[0]["loss"], abs=1e-4)
    assert float(after[1]) < float(before[1])
    assert before[5] == "3"
    factors = {"init_pissa.pth", "init_pissa.json"} if "pissa" in method else set()
    assert files_in(tmp_path) == left_by_run("rwkv-0.pth") | factors


def test_the_plan_says_which_pairs_are_left_out(files: Path, tmp_path: Path) -> None:
    out = run(tmp_path / "dpo", files, dpo=1).out
    assert "1 of 4 pairs have no reject and are left out: the loss compares two answers." in out
    save_pairs(tmp_path / "plain.save", [PreferencePair([5, 6], [7, 8], [])] * 2)
    for loss in LOSSES.values():
        ended = try_train(tmp_path / "out", **flags_of(files, rlhf_train_file=tmp_path / "plain.save", **loss))
        assert "plain.save: none of its 2 pairs has a reject" in refusal(ended, tmp_path / "out")


@pytest.mark.parametrize("loss", some(LOSSES, "dpo"))
def test_a_shared_prompt_changes_nothing_but_the_work(loss: str, files: Path, tmp_path: Path) -> None:
    for shared in (1, 0):
        run(tmp_path / str(shared), files, orpo_shared_prompt=shared, lr_init=0.3, **LOSSES[loss])
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "0")
    assert one[0]["tokens"] < two[0]["tokens"]
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in one] == pytest.approx([record[name] for record in two], rel=1e-4)


@pytest.mark.parametrize("loss", some(LOSSES, "simpo"))
def test_accumulated_pairs_equal_pairs_at_once(loss: str, files: Path, tmp_path: Path) -> None:
    """Three pairs in a step: together, or two and one."""
    common = {"epoch_steps": 0, "epoch_count": 2, "lr_init": 0.3, **LOSSES[loss]}
    run(tmp_path / "together", files, **common, micro_bsz=3)
    run(tmp_path / "apart", files, **common, micro_bsz=2, accumulate_grad_batches=2)
    together, apart = metrics(tmp_path / "together"), metrics(tmp_path / "apart")
    assert [len(together), len(apart)] == [2, 2]
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in apart] == pytest.approx([record[name] for record in together], rel=1e-4)


class TestReference:
    def test_stored_equals_measured(self, files: Path, tmp_path: Path) -> None:
        measured = run(tmp_path / "measured", files, dpo=1, lr_init=0.3, precision="bf16")
        scored = {"rlhf_train_file": files / "scored.save", "precision": "bf16"}
        stored = run(tmp_path / "stored", files, dpo=1, lr_init=0.3, **scored)
        assert reference(stored) == f"{files / 'scored.save'}, where --base_logp 1 stored it"
        assert reference(measured) == "measured over 3 pairs"
        # Stored with the precision of a CPU, fp32; measured in bf16.
        one, other = (metrics(tmp_path / name) for name in ("stored", "measured"))
        assert one[0]["loss"] == pytest.approx(other[0]["loss"], abs=0.02)
        exact = [run(tmp_path / f"exact {name}", files, dpo=1, lr_init=0.3, rlhf_train_file=files / name).out
                 for name in ("pairs.save", "scored.save")]  # fmt: skip
        assert len(exact) == 2
        one, other = (metrics(tmp_path / f"exact {name}") for name in ("pairs.save", "scored.save"))
        assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in other], rel=1e-6)

    @pytest.mark.parametrize("method", some(METHODS, "lora", "packed states", "packed pissa"))
    def test_every_method_takes_what_is_stored(self, method: str, files: Path, tmp_path: Path) -> None:
        """And begins at ln 2. But a packed PiSSA is not the packed base: its residual is what is packed."""
        source = files / ("scored-nf4.save" if METHODS[method].get("quant") else "scored.save")
        ended = run(tmp_path, files, dpo=1, rlhf_train_file=source, **METHODS[method])
        if method == "packed pissa":
            assert reference(ended) == "measured over 3 pairs"
        else:
            assert reference(ended) == f"{source}, where --base_logp 1 stored it"
        first, second = (record["loss"] for record in metrics(tmp_path))
        assert first == pytest.approx(LN_2, abs=1e-5)
        assert second < first

    def test_values_of_the_unpacked_base_serve_a_packed_one_nearly(self, files: Path, tmp_path: Path) -> None:
        flags = {"rlhf_train_file": files / "scored.save", **METHODS["packed states"]}
        ended = run(tmp_path, files, dpo=1, **flags)
        assert reference(ended) == f"{files / 'scored.save'}, where --base_logp 1 stored it"
        off = abs(metrics(tmp_path)[0]["loss"] - LN_2)
        assert 1e-5 < off < 0.05  # what packing moved: 0.007 was measured

    def test_a_run_that_goes_on_compares_its_start_with_what_is_stored(self, files: Path, tmp_path: Path) -> None:
        """Not what it has become, which is another model by far."""
        source = files / "scored.save"
        whole = {"train_type": "none", "lr_init": 1e-2, "epoch_steps": 3, "epoch_count": 2}
        common = {"rlhf_train_file": source, "dpo": 1, **whole}
        run(tmp_path / "whole", files, **common)
        stopped(4, tmp_path / "parts", **flags_of(files, **common))
        first, *_, last = (record["logp_rejected"] for record in metrics(tmp_path / "parts"))
        assert abs(last / first - 1) > 0.05  # beyond what stored and measured values may differ by
        ended = go_on(tmp_path / "parts")
        assert reference(ended) == f"{source}, where --base_logp 1 stored it"
        finals = [torch.load(tmp_path / name / "rwkv-final.pth", weights_only=True) for name in ("whole", "parts")]
        assert all(torch.equal(finals[1][key], tensor) for key, tensor in finals[0].items())

    def test_the_start_is_the_reference_whatever_it_is(self, files: Path, tmp_path: Path) -> None:
        first = run(tmp_path / "first", files, dpo=1, **METHODS["lora"])
        assert metrics(tmp_path / "first")[1]["loss"] < LN_2 - 1e-3
        assert first.code == 0
        adapter = tmp_path / "first" / "rwkv-final.pth"
        shape = tiny_checkpoint(tmp_path / "unused.pth")
        tiny_state_file(tmp_path / "state.pth", shape)
        starts: list[dict[str, object]] = [
            {**METHODS["lora"], "load_adapter": adapter},
            {"load_state": tmp_path / "state.pth", "lr_init": 0.3},
        ]
        for number, start in enumerate(starts):
            folder = tmp_path / f"again {number}"
            ended = run(folder, files, dpo=1, rlhf_train_file=files / "scored.save", **start)
            assert reference(ended) == "measured over 3 pairs"
            assert metrics(folder)[0]["loss"] == pytest.approx(LN_2, abs=1e-5)

    def test_values_of_another_model_are_measured_again(self, files: Path, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path / "other.pth", seed=9)
        common = {"load_model": tmp_path / "other.pth", "rlhf_train_file": files / "scored.save"}
        ended = run(tmp_path / "out", files, dpo=1, **common)
        said = r"measured over 3 pairs: those in .*scored.save are not this model's \(pair \d"
        assert re.match(said, reference(ended))
        assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(LN_2, abs=1e-5)

    def test_answers_that_are_cut_have_none(self, files: Path, tmp_path: Path) -> None:
        common = {"rlhf_train_file": files / "scored.save", "rlhf_max_corpus_len": 26}
        ended = run(tmp_path, files, dpo=1, **common)
        assert reference(ended).startswith("measured over 3 pairs: 2 of them have no stored value, or were cut by")
        assert metrics(tmp_path)[0]["loss"] == pytest.approx(LN_2, abs=1e-5)

    def test_a_short_run_measures_what_it_sees(self, files: Path, tmp_path: Path) -> None:
        assert reference(run(tmp_path, files, dpo=1, micro_bsz=1)) == "measured over 2 pairs"

    def test_a_run_that_begins_with_a_later_epoch_measures_the_pairs_of_that_one(
        self, files: Path, tmp_path: Path
    ) -> None:
        """Its two are one that the first epoch has not and one that it has."""
        ended = run(tmp_path, files, dpo=1, micro_bsz=1, epoch_begin=1, epoch_count=2, data_shuffle=0)
        assert reference(ended) == "measured over 2 pairs"
        assert metrics(tmp_path)[0]["loss"] == pytest.approx(LN_2, abs=1e-5)

    def test_large_sets_are_kept_for_the_next_run(
        self, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(references, "LARGE_SET", 3)
        folder = tmp_path / "out"
        path = folder / "dpo-reference.pth"
        common = {"dpo": 1, "lr_init": 0.3, "overwrite": 1}
        assert reference(run(folder, files, **common)) == f"measured over 3 pairs, kept in {path}"
        first = metrics(folder)
        assert reference(run(folder, files, **common)) == f"{path}, where an earlier run from this start kept it"
        assert [record["loss"] for record in metrics(folder)[2:]] == [record["loss"] for record in first]
        for other in ({"quant": 1}, {"rlhf_max_corpus_len": 26}):
            assert reference(run(folder, files, **common, **other)) == f"measured over 3 pairs, kept in {path}"
        path.write_bytes(b"something else")
        assert reference(run(folder, files, **common)) == f"measured over 3 pairs, kept in {path}"


def test_placeholders_are_known() -> None:
    assert not PreferencePair([1], [2], [3]).has_base_logps
    assert PreferencePair([1], [2], [3], -1.5, -2.0).has_base_logps
    cut = PreferencePair([1, 1], [2, 2], [3], -1.5, -2.0).shortened(1)
    assert not cut.has_base_logps


def test_a_file_keeps_its_values(files: Path) -> None:
    assert all(pair.has_base_logps for pair in load_pairs(files / "scored.save", 257))
