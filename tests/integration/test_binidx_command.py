"""python -m src.commands.binidx: data of every kind to tokens, and back."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from binidx_files import write_binidx
from factories import tiny_checkpoint
from running import ROOT, Ended, run_script, train

from src.data.binidx import read_binidx
from src.data.sources import open_documents
from src.tokenizer import ByteTokenizer, WorldTokenizer

CHATS = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}!"} for n in range(5)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data of several kinds."""
    monkeypatch.chdir(tmp_path)
    Path("alpaca.json").write_text(json.dumps(CHATS), encoding="utf-8")
    Path("lines.jsonl.gz").write_bytes(gzip.compress('{"text": "héllo"}\n{"text": ""}\n'.encode()))
    Path("book.txt").write_bytes(b"Once\r\nupon")
    write_binidx("tokens", [[7, 8, 0], [9, 0]])
    return tmp_path


def written(*words: object, **flags: object) -> Ended:
    ended = run_script("src/commands/binidx.py", *words, **flags)
    assert ended.code == 0, ended.err
    return ended


def as_rwkv_lm_reads(prefix: str) -> list[list[int]]:
    """The documents, by the offsets and sizes of the index, as RWKV-LM's `MMapIndexedDataset` takes them."""
    content = Path(f"{prefix}.idx").read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00"
    version, code, items, borders = struct.unpack_from("<QBQQ", content, 9)
    assert (version, code) == (1, 8)
    sizes = np.frombuffer(content, np.int32, items, 34)
    pointers = np.frombuffer(content, np.int64, items, 34 + sizes.nbytes)
    documents = np.frombuffer(content, np.int64, borders, 34 + sizes.nbytes + pointers.nbytes)
    assert documents.tolist() == list(range(items + 1))
    assert len(content) == 34 + sizes.nbytes + pointers.nbytes + documents.nbytes
    stream = Path(f"{prefix}.bin").read_bytes()
    return [
        np.frombuffer(stream, np.uint16, size, pointer).tolist()
        for size, pointer in zip(sizes, pointers, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("tokenizer", ["bytes", "world"])
def test_documents_are_those_of_training(tokenizer: str) -> None:
    ended = written("alpaca.json", "out", tokenizer=tokenizer)
    vocab_size = {"bytes": 257, "world": 65536}[tokenizer]
    trained = open_documents("jsonl", "alpaca.json", vocab_size, ctx_len=64)
    expected = [trained.tokens(index).tolist() for index in range(5)]
    assert as_rwkv_lm_reads("out") == expected
    documents = read_binidx("out", vocab_size)
    assert [documents.tokens(index).tolist() for index in range(5)] == expected
    assert all(tokens[-1] == 0 and 0 not in tokens[:-1] for tokens in expected)
    decode = {"bytes": ByteTokenizer, "world": WorldTokenizer}[tokenizer]().decode
    assert decode(expected[3]) == "User: Say 3.\n\nAssistant: 3!\n\n"
    assert "Recognised as Alpaca, 5 conversations." in ended.out
    assert '"User: …\\n\\nAssistant: …\\n\\n".\n' in ended.out
    assert "loss is on answers only" not in ended.out
    assert f"next       python {ROOT}/train.py --load_model MODEL.pth --data_file out --loss_mask qa\n" in ended.out
    assert f"written    out.bin and out.idx: 5 documents, {sum(map(len, expected))} tokens (uint16)" in ended.out


def test_kinds_are_put_together() -> None:
    ended = written("alpaca.json", "lines.jsonl.gz", "book.txt", "tokens", "out", tokenizer="bytes")
    encode = ByteTokenizer().encode
    documents = as_rwkv_lm_reads("out")
    assert documents[5:] == [[*encode("héllo"), 0], [*encode("Once\nupon"), 0], [7, 8, 0], [9, 0]]
    for line in (
        "Recognised as Alpaca, 5 conversations; plain text, 2 texts.", "1 text without a character left out.",
        "read       book.txt: plain text, one document", "1 line end CR LF or CR read as LF, as clients send them.",
        "read       tokens: 2 documents of tokens, taken as they are",
    ):  # fmt: skip
        assert line in ended.out


def test_passes_have_orders_of_their_own() -> None:
    written("alpaca.json", "plain", tokenizer="bytes")
    whole = as_rwkv_lm_reads("plain")
    written("alpaca.json", "twice", tokenizer="bytes", repeat=2)
    assert as_rwkv_lm_reads("twice") == whole * 2
    written("alpaca.json", "mixed", tokenizer="bytes", repeat=3, shuffle=1)
    mixed = as_rwkv_lm_reads("mixed")
    passes = [mixed[begin : begin + 5] for begin in (0, 5, 10)]
    assert all(sorted(one) == sorted(whole) for one in passes)
    assert len({str(one) for one in [whole, *passes]}) == 4
    written("alpaca.json", "again", tokenizer="bytes", repeat=3, shuffle=1)
    assert Path("again.bin").read_bytes() == Path("mixed.bin").read_bytes()
    written("alpaca.json", "other", tokenizer="bytes", repeat=3, shuffle=1, seed=1)
    assert Path("other.bin").read_bytes() != Path("mixed.bin").read_bytes()


def test_what_rwkv_lm_wants_to_know() -> None:
    """The prime is the largest that is 2 modulo 3 among the numbers below that of whole rows."""
    tokens = sum(map(len, as_rwkv_lm_reads("tokens"))) * 100
    ended = written("tokens", "out", tokenizer="bytes", repeat=100, ctx_len=5)
    assert tokens == 500
    assert "RWKV-LM    --my_exit_tokens 500 --magic_prime 89 --ctx_len 5" in ended.out
    assert "are too few for its pre-training" in written("tokens", "few", tokenizer="bytes", ctx_len=5).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bad.jsonl", "out"), "bad.jsonl: 2 entries cannot be read: lines 2, 3: its keys are 'txt', expected"),
        (("gone.jsonl", "out"), "gone.jsonl does not exist; check the path"),
        (("tokens", "tokens"), "would be written over, because it is the same file as the output tokens.bin"),
        (("alpaca.json", "no/where/out"), "no/where/out.bin and .idx cannot be written (No such file or directory)"),
        (("void.jsonl", "out"), "void.jsonl cannot be used: there is no document in it"),
    ],
)
def test_nothing_is_written_where_something_is_wrong(words: tuple[str, ...], message: str) -> None:
    Path("bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n{"txt": "c"}\n')
    Path("void.jsonl").write_text('{"text": ""}\n')
    before = sorted(path.name for path in Path().iterdir())
    ended = run_script("src/commands/binidx.py", *words, tokenizer="bytes")
    assert ended.code == 2
    assert message in ended.err
    assert sorted(path.name for path in Path().iterdir()) == before


def test_training_takes_it(tmp_path: Path) -> None:
    tiny_checkpoint("base.pth")
    written("alpaca.json", "out", tokenizer="bytes")
    ended = train(tmp_path / "run", load_model="base.pth", data_file="out", loss_mask="qa", epoch_count=1)
    assert "out: binidx, 5 documents" in ended.out
    assert "answers only (--loss_mask qa)" in ended.out
