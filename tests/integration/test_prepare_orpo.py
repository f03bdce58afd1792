"""PrepareOrpoDataset.py, as a user runs it."""

from __future__ import annotations

import http.server
import json
import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch
from factories import tiny_checkpoint

from src.commands.preparation import prepare_pairs
from src.config import PairConfig
from src.data.pair_file import load_pairs
from src.errors import UserError
from src.generate import answer_logps
from src.loading import LoadOptions, build_model
from src.tokenizer import ByteTokenizer

SCRIPT = str(Path(__file__).parents[2] / "PrepareOrpoDataset.py")
BYTES = ByteTokenizer()
CSV = 'prompt,chosen,reject\n"What, now?","One\n\nTwo",Three\nAnd then?,Four,\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a byte model and two rows, the second without a reject."""
    tiny_checkpoint(tmp_path / "base.pth")
    (tmp_path / "in.csv").write_text(CSV, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(**changes: str) -> PairConfig:
    given = {"load_model": "base.pth", "input_csv": "in.csv", "output_save": "out.save", "target_pair_count": "12"}
    config = PairConfig.from_flags({**given, **changes})
    prepare_pairs(config)
    return config


def test_files_and_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert sorted(path.name for path in folder.iterdir()) == ["base.pth", "in.csv", "out.save", "out.texts.jsonl"]
    lines = (folder / "out.texts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert "".join(text[0] for text in texts) == "UUUQUUIUUUUU"
    assert texts[0] == "User: What, now?\n\nAssistant: One\nTwo\n\n"
    assert texts[3] == "Question: And then?\n\nAnswer: Four\n\n"

    content = torch.load(folder / "out.save", weights_only=True)
    assert type(content) is list
    assert len(content) == 12
    assert all(type(item) is tuple and item[3:] == (0.5, 0.5) for item in content)
    expected = ("User: And then?\n\nAssistant:", " Four\n\n", " \n\n")
    assert (*map(BYTES.encode, expected), 0.5, 0.5) in content

    output = capsys.readouterr().out
    assert "12 pairs, 6 without a reject, 0 shortened" in output
    assert "chosen tokens: min 7, median 7, max 10" in output
    assert "train.py --orpo 1 --load_model base.pth --rlhf_train_file out.save" in output


def test_the_same_seed_gives_the_same_pairs(folder: Path) -> None:
    run()
    first = load_pairs("out.save", 257)
    run(output_save="again.save")
    assert load_pairs("again.save", 257) == first
    run(output_save="other.save", seed="5")
    assert load_pairs("other.save", 257) != first
    run(output_save="short.save", max_len="6", template="input")
    assert all(BYTES.decode(pair.prompt) == "ponse:" for pair in load_pairs("short.save", 257))


def test_jsonl_with_rejected(folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"prompt": "é", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    run(input_csv="in.jsonl", target_pair_count="1", template="user")
    pair = load_pairs("out.save", 257)[0]
    assert [BYTES.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)] == [
        "User: é\n\nAssistant:",
        " b\n\n",
        " c\n\n",
    ]
    assert "é" in (folder / "out.texts.jsonl").read_text(encoding="utf-8")


def test_without_a_model_the_world_vocabulary_is_used(folder: Path) -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    run(load_model="", template="user", target_pair_count="2")
    pairs = load_pairs("out.save", 65536)
    assert all(pair.prompt[:2] == [24281, 59] and pair.prompt[-3:] == [5585, 41693, 59] for pair in pairs)
    assert [3336] in [pair.rejected for pair in pairs]
    with pytest.raises(UserError, match="but the model knows 0 to 256"):
        load_pairs("out.save", 257)
    with pytest.raises(UserError, match=r"in\.csv is no pair file: make one of it with PrepareOrpoDataset\.py --input"):
        load_pairs("in.csv", 257)


def test_base_log_probabilities_come_from_the_model(folder: Path) -> None:
    run(base_logp="1", accelerator="cpu")
    pairs = load_pairs("out.save", 257)
    parameters = torch.load(folder / "base.pth", weights_only=True)
    shape = tiny_checkpoint(folder / "same.pth")
    model = build_model(parameters, shape, LoadOptions(torch.device("cpu"), torch.float32))
    for pair, (chosen, rejected) in zip(pairs, answer_logps(model, pairs), strict=True):
        assert pair.chosen_base_logp == pytest.approx(chosen, rel=1e-4)
        assert pair.rejected_base_logp == pytest.approx(rejected, rel=1e-4)
        assert pair.chosen_base_logp < -5


def test_posts_only_when_asked_to(folder: Path) -> None:
    posted: list[tuple[str, object]] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.path, json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/"
        run(fapi_logging_address=address)
        assert posted == []
        run(
            output_save="posted.save",
            fapi_logging_address=address,
            fapi_logging_callback="1",
            fapi_logging_callback_step="5",
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert posted == [("/ProcessingCallback", {"statusinfo": f"{count} of 12 pairs"}) for count in (5, 10)]
    run(output_save="again.save", fapi_logging_address=address, fapi_logging_callback="1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"input_csv": "none.csv"}, "none.csv does not exist"),
        ({"load_model": "none.pth"}, "none.pth does not exist"),
        ({"output_save": "none/out.save"}, "there is no folder"),
        ({"target_pair_count": "0"}, "--target_pair_count 0"),
        ({"template": "other"}, "--template other is unknown: use one of mixed, user, question, input"),
        ({"output_save": "in.csv"}, "must be three files"),
        ({"input_csv": "out.texts.jsonl"}, "must be three files"),
        ({"output_save": "base.pth"}, "--load_model base.pth would be written over"),
        ({"load_model": "", "base_logp": "1"}, "--base_logp 1 needs --load_model"),
    ],
)
def test_bad_flags_write_nothing(folder: Path, changes: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        run(**changes)
    assert expected in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["base.pth", "in.csv"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt,answer\na,b\n", "no column 'chosen'"),
        ("", "is empty"),
        ("prompt,chosen\n", "holds no rows"),
        ("prompt,chosen\n,\n", "none of the 1 rows"),
        ('prompt,chosen\na,"b\n', "quote that is never closed"),
        ("prompt,chosen\nä,b\n".encode("latin-1"), "line 2: not UTF-8"),
    ],
)
def test_bad_input_writes_nothing(folder: Path, content: str | bytes, expected: str) -> None:
    (folder / "in.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        run()
    assert expected in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["base.pth", "in.csv"]


def script(*arguments: str) -> int:
    """Exit code of the script, run in this process."""
    before, sys.argv = sys.argv, [SCRIPT, *arguments]
    try:
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(SCRIPT, run_name="__main__")
    finally:
        sys.argv = before
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_the_original_command_line(folder: Path) -> None:
    given = "--load_model base.pth --input_csv in.csv --output_save OUT --target_pair_count 1000"
    assert script(*given.split()) == 0
    assert len(load_pairs("OUT", 257)) == 1000


def test_an_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("--target_pair_cont", "1") == 2
    assert "did you mean --target_pair_count?" in capsys.readouterr().err


def test_the_making_of_many_pairs_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("src.commands.preparation._LARGE_SET", 12)
    run(target_pair_count="12")
    shown = capsys.readouterr()
    assert "pairs: 100%" in shown.err
    assert "writing    out.save and out.texts.jsonl" in shown.out
    run(target_pair_count="11", output_save="other.save")
    shown = capsys.readouterr()
    assert "pairs:" not in shown.err
    assert "writing" not in shown.out
