"""From a CSV of preferences to a tuned state: PrepareOrpoDataset.py, then train.py --orpo 1."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint, tiny_shape
from running import Ended, files_in, left_by_run, metrics, refusal, run_script, train, try_train

from src.checkpoint import load_state
from src.data.pair_file import load_pairs, save_pairs
from src.data.preferences import PreferencePair
from src.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("architecture")

BYTES = ByteTokenizer()
CSV = """prompt,chosen,reject
What is rain?,Water that falls from clouds.,It is a kind of stone.
And snow?,The same,"Frozen rain, which falls slowly, and stays."
Why?,Because it is cold up there.,
"Say

yes",Yes,N
"""
ORIGINAL_NAMES = {"pref_percentage", "loss_1_token_chosen", "loss_2_odds_ratio"}
ALWAYS_NAMES = ORIGINAL_NAMES | {"nll", "preference_share", "plain_pairs"}
COMPARED_NAMES = {"log_odds", "logp_chosen", "logp_rejected", "margin", "accuracy"}
RUN_NAMES = {
    "run", "step", "epoch", "loss", "lr", "weight_decay", "grad_norm", "seconds", "tokens", "tokens_per_s",
}  # fmt: skip
HELD_OUT = r"accuracy (\d+\.\d)%, margin ([+-]\d+\.\d{4}) over (\d+) pairs, nll (\d+\.\d{4}) over (\d+)"


@pytest.fixture(scope="module")
def files(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base.pth`, a byte model, and `pairs.save`: three pairs with a reject, one without."""
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "base.pth", dtype=torch.bfloat16)
    (folder / "in.csv").write_text(CSV, encoding="utf-8")
    ended = run_script(
        "PrepareOrpoDataset.py", load_model=folder / "base.pth", input_csv=folder / "in.csv",
        output_save=folder / "pairs.save", target_pair_count=4,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    return folder


def preference_flags(files: Path, **flags: object) -> dict[str, object]:
    """A short run on the pairs."""
    base = {"load_model": files / "base.pth", "orpo": 1, "rlhf_train_file": files / "pairs.save", "orpo_alpha": 0.5}
    return {**base, "epoch_steps": 2, "epoch_count": 1, "micro_bsz": 4, **flags}


def run(folder: Path, files: Path, **flags: object) -> Ended:
    """Trains on the pairs; it must end well."""
    return train(folder, **preference_flags(files, **flags))


def states_of(folder: Path, name: str = "rwkv-final.pth") -> torch.Tensor:
    """All states of a file in one row, fp32."""
    states = load_state(folder / name, tiny_shape())
    return torch.cat([state.float().flatten() for state in states.values()])


@pytest.fixture(scope="module")
def finished(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """A run of ten steps, measured on its own pairs, with a flag that has no effect; and its folder."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    return run(folder, files, val_file=files / "pairs.save", epoch_steps=10, data_file="elsewhere"), folder


@pytest.mark.parametrize(
    "peft", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pissa", "bone", "bat"))]
)
def test_adapters_learn_preferences_too(peft: str, files: Path, tmp_path: Path) -> None:
    sizes = {"lora_r": 8} if peft == "lora" else {"pissa_r": 8} if peft == "pissa" else {"bone_r": 8}
    flags = {"peft": peft, "lr_init": 1e-2, "lr_final": 1e-2, "warmup_steps": 0, "epoch_steps": 10, **sizes}
    run(tmp_path, files, **flags)
    losses = [record["loss"] for record in metrics(tmp_path)]
    assert losses[-1] < losses[0] - 0.1
    assert not any("state" in name for name in torch.load(tmp_path / "rwkv-final.pth", weights_only=True))


class TestARun:
    def test_exactly_these_files(self, finished: tuple[Ended, Path]) -> None:
        assert files_in(finished[1]) == left_by_run("rwkv-0.pth")

    def test_the_states_have_moved(self, finished: tuple[Ended, Path]) -> None:
        states = states_of(finished[1])
        assert states.isfinite().all()
        assert states.count_nonzero() > 0.9 * states.numel()

    def test_metrics_have_the_originals_names_and_more(self, finished: tuple[Ended, Path]) -> None:
        lines = metrics(finished[1])
        assert [set(line) for line in lines] == [RUN_NAMES | ALWAYS_NAMES | COMPARED_NAMES] * 10
        for line in lines:
            assert line["loss_1_token_chosen"] == line["nll"]
            assert line["margin"] == pytest.approx(line["logp_chosen"] - line["logp_rejected"], abs=1e-5)
            assert line["preference_share"] == pytest.approx(line["loss_2_odds_ratio"] / line["loss"], rel=1e-4)
            assert line["plain_pairs"] == 1
        # The running average starts at one half; log_odds > 0 exactly where the chosen answer is more probable.
        assert lines[0]["pref_percentage"] == pytest.approx(0.9 * 0.5 + 0.1 * lines[0]["accuracy"])

    def test_accuracy_and_margin_are_printed_before_and_after(self, finished: tuple[Ended, Path]) -> None:
        out = finished[0].out
        assert "held out   untuned: accuracy" in out
        before, after = re.search(f"before: {HELD_OUT}", out), re.search(f"after:  {HELD_OUT}", out)
        assert before
        assert after
        assert (before[3], after[3]) == ("3", "3")
        assert (before[5], after[5]) == ("4", "4")
        assert float(after[2]) > float(before[2])
        assert float(after[4]) < float(before[4])
        first = metrics(finished[1])[0]
        assert float(before[1]) == pytest.approx(100 * first["accuracy"], abs=0.051)
        assert float(before[2]) == pytest.approx(first["margin"], abs=1e-4)

    def test_a_data_file_is_said_to_be_ignored(self, finished: tuple[Ended, Path]) -> None:
        assert "note: --data_file elsewhere is ignored: --orpo 1 trains on --rlhf_train_file" in finished[0].out

    def test_the_plan_counts_pairs_and_empty_rejects(self, finished: tuple[Ended, Path]) -> None:
        assert "pairs.save: 4 pairs" in finished[0].out
        assert "1 of 4 pairs have no reject and train on the chosen answer." in finished[0].out


class TestPreferenceShare:
    @pytest.mark.parametrize(("alpha", "warned"), [(0.0006, True), (0.1, False)])
    def test_less_than_a_hundredth_is_a_warning(self, alpha: float, warned: bool, files: Path, tmp_path: Path) -> None:
        out = run(tmp_path, files, orpo_alpha=alpha, epoch_steps=1).out
        share = re.search(rf"preference (\d+\.\d\d)% of the first loss is the preference term \(alpha {alpha}\)", out)
        assert share
        assert float(share[1]) == pytest.approx(100 * metrics(tmp_path)[0]["preference_share"], abs=0.006)
        assert (float(share[1]) < 1) == warned
        assert ("warning: under 1 % the run is plain SFT" in out) == warned

    @pytest.mark.parametrize("orpo_type", [0, 1])
    def test_a_first_pair_without_a_reject_is_passed_over(self, orpo_type: int, files: Path, tmp_path: Path) -> None:
        prompt, chosen = BYTES.encode("User: a\n\nAssistant:"), BYTES.encode(" b c d\n\n")
        with_reject = PreferencePair(prompt, chosen, BYTES.encode(" quite another\n\n"))
        save_pairs(tmp_path / "one.save", [PreferencePair(prompt, chosen, [])] * 5 + [with_reject])
        flags = {"orpo_type": orpo_type, "micro_bsz": 1, "epoch_steps": 0}
        out = run(tmp_path / "out", files, rlhf_train_file=tmp_path / "one.save", **flags).out
        lines = metrics(tmp_path / "out")
        assert lines[0]["plain_pairs"] == 1
        assert float(re.search(r"preference (\d+\.\d\d)% of the first loss", out)[1]) > 1
        assert "warning" not in out

    @pytest.mark.parametrize("orpo_type", [0, 1])
    def test_no_reject_at_all_is_said_in_words(self, orpo_type: int, files: Path, tmp_path: Path) -> None:
        save_pairs(tmp_path / "plain.save", [PreferencePair([5, 6], [7, 8], [])] * 2)
        flags = {"rlhf_train_file": tmp_path / "plain.save", "val_file": tmp_path / "plain.save"}
        out = run(tmp_path / "out", files, orpo_type=orpo_type, **flags).out
        assert "warning: no pair of the first epoch has a reject to compare with" in out
        assert re.search(r"before: nll \d+\.\d{4} over \d+ pairs, none has a reject to compare with", out)
        assert "nan" not in out


class TestLosses:
    def test_a_shared_prompt_changes_nothing_but_the_work(self, files: Path, tmp_path: Path) -> None:
        for shared in (1, 0):
            run(tmp_path / str(shared), files, orpo_shared_prompt=shared)
        one, two = metrics(tmp_path / "1")[0], metrics(tmp_path / "0")[0]
        assert one["tokens"] < two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)

    def test_the_released_formula_is_another_loss_of_the_same_nll(self, files: Path, tmp_path: Path) -> None:
        for orpo_type in (0, 1):
            run(tmp_path / str(orpo_type), files, orpo_type=orpo_type)
        paper, released = metrics(tmp_path / "0"), metrics(tmp_path / "1")
        assert set(released[0]) == set(paper[0])
        # The prompts and answers here hold no token 0, which is all that the two disagree on in NLL.
        assert released[0]["nll"] == pytest.approx(paper[0]["nll"], rel=1e-5)
        assert released[0]["log_odds"] != pytest.approx(paper[0]["log_odds"], rel=1e-2)
        # It takes " N\n\n", four tokens, for a missing reject.
        assert (paper[0]["plain_pairs"], released[0]["plain_pairs"]) == (1, 2)
        assert states_of(tmp_path / "1").any()

    @pytest.mark.parametrize("reject", ["", " \n\n", " \t"], ids=["no token", "the original's blank", "white space"])
    def test_a_pair_without_a_reject_trains_plain_nll(self, reject: str, files: Path, tmp_path: Path) -> None:
        pair = PreferencePair(*map(BYTES.encode, ("User: a\n\nAssistant:", " b c d\n\n", reject)))
        save_pairs(tmp_path / "plain.save", [pair])
        losses = set()
        for alpha in (0.0, 0.9):
            folder = tmp_path / str(alpha)
            run(folder, files, rlhf_train_file=tmp_path / "plain.save", orpo_alpha=alpha, micro_bsz=1)
            first = metrics(folder)[0]
            assert set(first) == RUN_NAMES | ALWAYS_NAMES
            assert first["loss"] == first["nll"]
            assert first["loss_2_odds_ratio"] == 0
            assert (first["plain_pairs"], first["pref_percentage"]) == (1, 0.5)
            losses.add(first["loss"])
        assert len(losses) == 1

    def test_token_0_is_an_ordinary_byte(self, files: Path, tmp_path: Path) -> None:
        """As text in UTF-16 has many."""
        pair = PreferencePair([65, 0, 66, 0], [67, 0, 0, 0], [0, 0, 68])
        save_pairs(tmp_path / "zeros.save", [pair])
        run(tmp_path / "out", files, rlhf_train_file=tmp_path / "zeros.save", epoch_steps=1, micro_bsz=1)
        first = metrics(tmp_path / "out")[0]
        # Three inputs before the answers, then an input for each target.
        assert first["tokens"] == 3 + 4 + 3
        assert first["plain_pairs"] == 0

    @pytest.mark.parametrize(
        ("pairs", "micro_bsz", "accumulate"), [(4, 1, 4), (4, 2, 2), (3, 2, 2)], ids=["4 x 1", "2 x 2", "2 + 1"]
    )
    def test_accumulated_pairs_equal_pairs_at_once(
        self, pairs: int, micro_bsz: int, accumulate: int, files: Path, tmp_path: Path
    ) -> None:
        """A step is a pass over the pairs either way; the last micro-batch may be smaller, its pairs weigh as much."""
        save_pairs(tmp_path / "some.save", load_pairs(files / "pairs.save", 257)[:pairs])
        common = {"rlhf_train_file": tmp_path / "some.save", "epoch_steps": 0, "epoch_count": 2}
        run(tmp_path / "together", files, **common, micro_bsz=pairs)
        run(tmp_path / "apart", files, **common, micro_bsz=micro_bsz, accumulate_grad_batches=accumulate)
        together, apart = metrics(tmp_path / "together"), metrics(tmp_path / "apart")
        assert [len(together), len(apart)] == [2, 2]
        assert apart[0]["loss"] == pytest.approx(together[0]["loss"], rel=1e-5)
        assert apart[0]["grad_norm"] == pytest.approx(together[0]["grad_norm"], rel=1e-4)
        assert apart[1]["loss"] == pytest.approx(together[1]["loss"], rel=1e-4)
        assert apart[1]["tokens"] == together[1]["tokens"]


@pytest.mark.parametrize("orpo_type", [0, 1])
def test_a_loss_that_is_not_finite_stops_before_the_step(orpo_type: int, files: Path, tmp_path: Path) -> None:
    tensors = torch.load(files / "base.pth", weights_only=True)
    tensors["head.weight"][40] = 3e38
    tensors["head.weight"][40, ::2] = -3e38
    torch.save(tensors, tmp_path / "huge.pth")
    ended = try_train(
        tmp_path / "out", **preference_flags(files, load_model=tmp_path / "huge.pth", quant=0, orpo_type=orpo_type)
    )
    assert ended.code == 2
    assert "the loss is not finite at step 1 (pairs" in ended.err
    assert not metrics(tmp_path / "out")
    assert "it is the first, so that what was loaded gives it" in ended.err


class TestBadInput:
    def message(self, files: Path, folder: Path, **flags: object) -> str:
        """The one sentence a run is refused with; nothing is trained."""
        return refusal(try_train(folder, **preference_flags(files, **flags)), folder)

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("missing", "does not exist; make it with PrepareOrpoDataset.py"),
            ("model", "holds dict, not a list of preference pairs"),
            ("text", "is a text file, not a pair file"),
            ("pickle", "is a Python pickle"),
            ("cut", "is incomplete"),
            ("no pairs", "holds an empty list, not a list of preference pairs"),
            ("triples", "pair 1 has 3 entries, not (prompt, chosen, reject, logp, logp)"),
            ("texts", "pair 1 has no list of token ids as its prompt"),
            ("no answer", "pair 1 has an empty chosen"),
        ],
    )
    @pytest.mark.parametrize("flag", ["rlhf_train_file", "val_file"])
    def test_a_save_file_that_is_not_ours(
        self, flag: str, kind: str, expected: str, files: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "wrong.save"
        contents = {
            "no pairs": [],
            "triples": [([1], [2], [3])],
            "texts": [("a", "b", "c", 0.5, 0.5)],
            "no answer": [([1], [], [3], 0.5, 0.5)],
        }
        if kind == "model":
            path.write_bytes((files / "base.pth").read_bytes())
        elif kind == "text":
            path.write_text(CSV, encoding="utf-8")
        elif kind == "pickle":
            path.write_bytes(pickle.dumps([([1], [2], [3], 0.5, 0.5)]))
        elif kind == "cut":
            path.write_bytes((files / "pairs.save").read_bytes()[:300])
        elif kind != "missing":
            torch.save(contents[kind], path)
        message = self.message(files, tmp_path / "out", **{flag: path})
        assert str(path) in message
        assert expected in message

    @pytest.mark.parametrize("place", range(3))
    @pytest.mark.parametrize("token", [257, -1])
    def test_tokens_beyond_the_vocabulary(self, token: int, place: int, files: Path, tmp_path: Path) -> None:
        lists = [[1, 2], [3, 4], [5, 6]]
        lists[place][1] = token
        save_pairs(tmp_path / "beyond.save", [PreferencePair([1], [2], [3]), PreferencePair(*lists)])
        message = self.message(files, tmp_path / "out", rlhf_train_file=tmp_path / "beyond.save")
        name = ("prompt", "chosen", "reject")[place]
        assert f"pair 2 has token {token} in its {name}, but the model knows 0 to 256" in message

    def test_no_answer_fits(self, files: Path, tmp_path: Path) -> None:
        message = self.message(files, tmp_path / "out", rlhf_max_corpus_len=5)
        assert "--rlhf_max_corpus_len 5 cuts every chosen answer" in message
        assert "the shortest has 6 tokens, the longest 32; give at least 6, better 32" in message

    def test_answers_that_are_cut_are_counted(self, files: Path, tmp_path: Path) -> None:
        out = run(tmp_path, files, rlhf_max_corpus_len=24, epoch_steps=1).out
        pairs = load_pairs(files / "pairs.save", 257)
        prompts = sum(len(pair.prompt) > 24 for pair in pairs)
        answers = sum(len(tokens) > 24 for pair in pairs for tokens in (pair.chosen, pair.rejected))
        assert f"cuts {prompts} prompts (at their beginning) and {answers} answers (at their end)" in out
        assert prompts > 0
        assert answers > 0


def utf16(text: str) -> list[int]:
    """Tokens of the model of UTF-16 bytes."""
    return list(text.encode("utf-16-le"))


def style_pairs(folder: Path) -> list[PreferencePair]:
    """Beginnings of answers without capitals and punctuation, preferred to the same as they were written."""
    pairs = []
    for line in (folder / "demo.jsonl").read_text(encoding="utf-8").splitlines():
        before, turn, answer = json.loads(line)["text"].partition("\n\nAssistant:")
        answer = answer[:24]
        plain = re.sub(r"[^a-z0-9 \n]", "", answer.lower())
        if plain.strip():
            pairs.append(PreferencePair(utf16((before + turn)[-16:]), utf16(plain), utf16(answer)))
    return pairs


@pytest.mark.slow
def test_a_trained_model_learns_to_prefer_a_style(real_inputs: Path, tmp_path: Path) -> None:
    """Measured with torch 2.13 on a CPU: accuracy 28 % before, 94 % after; margin -0.04, +0.29."""
    pairs = style_pairs(real_inputs)
    save_pairs(tmp_path / "held-out.save", pairs[::5])
    save_pairs(tmp_path / "pairs.save", [pair for number, pair in enumerate(pairs) if number % 5])
    ended = train(
        tmp_path / "out", load_model=real_inputs / "tiny-rwkv6-3m-utf16.pth", orpo=1, orpo_alpha=0.8, grad_cp=0,
        rlhf_train_file=tmp_path / "pairs.save", val_file=tmp_path / "held-out.save", micro_bsz=4, epoch_steps=12,
        epoch_count=1, lr_init=10, lr_final=0.1, warmup_steps=2,
    )  # fmt: skip
    before, after = re.search(f"before: {HELD_OUT}", ended.out), re.search(f"after:  {HELD_OUT}", ended.out)
    assert before
    assert after
    assert float(before[1]) < 40
    assert float(after[1]) > 75
    assert float(after[2]) > float(before[2]) + 0.15
    assert float(after[4]) < float(before[4])
