"""The readers that are given damaged files: one table, to which each new reader adds its entry."""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from src import safetensors
from src.config.data import BY_DATA, LossMask
from src.config.recognition import recognise
from src.data.binidx import MAGIC
from src.data.documents import Documents
from src.data.preferences import PreferenceRow, make_pairs, read_rows
from src.data.reject_file import RejectFile, plan_groups
from src.data.sources import open_documents
from src.tokenizer import ByteTokenizer


@dataclass(frozen=True)
class Reader:
    """A function that reads a file.

    Attributes:
        read: what is tried; it may raise a UserError and nothing else.
        seeds: contents that it reads without complaint.
        name: of the damaged file.
        beside: further files of its folder, as they should be, by name.
    """

    read: Callable[[Path], object]
    seeds: tuple[bytes, ...]
    name: str
    beside: Mapping[str, bytes] = field(default_factory=dict)


def _documents(
    data_type: str, vocab_size: int = 257, mask: LossMask = BY_DATA, template: str = "user"
) -> Callable[[Path], object]:
    """Opens them and reads each to its end."""

    def read(path: Path) -> None:
        documents: Documents = open_documents(
            data_type, str(path), vocab_size, ctx_len=16, mask=mask, template=template
        )
        for index in range(len(documents)):
            tokens = documents.tokens(index)
            assert len(tokens) >= 2
            assert mask.kind == "" or len(documents.counted(index)) == len(tokens)
            assert 0 <= tokens.min() <= tokens.max() < vocab_size

    return read


def _pairs(path: Path) -> None:
    rows = read_rows(str(path))
    assert all(isinstance(row.rejected, str) for row in rows)
    make_pairs(str(path), rows, ByteTokenizer(), 5, longest=50)


_ROWS = [PreferenceRow(2, "a", "b", ""), PreferenceRow(3, 'c "q"', "d\r\ne", "has one"), PreferenceRow(4, "f", "é", "")]
_GROUPS = plan_groups(_ROWS, 1, overwrite=False)
_REJECTS_CSV = b'prompt,chosen,reject\r\na,b,new\r\n"c ""q""","d\r\ne",has one\r\nf,\xc3\xa9,new\r\n'


def _rejects(path: Path) -> None:
    """Goes on with a reject file; whatever is not refused becomes the file of a run without a stop."""
    output = path.with_name("out.csv")
    with RejectFile(str(output), _ROWS, {"seed": 1}) as file:
        for group in _GROUPS:
            if group.start >= file.rows_done:
                file.append(group, dict.fromkeys(group.generated, "new"))
    assert output.read_bytes() == _REJECTS_CSV


def _reject_run(groups: int, folder: Path) -> tuple[bytes, bytes]:
    """The CSV and its `.run.json` after so many groups."""
    with RejectFile(str(folder / "out.csv"), _ROWS, {"seed": 1}) as file:
        for group in _GROUPS[:groups]:
            file.append(group, dict.fromkeys(group.generated, "new"))
    return (folder / "out.csv").read_bytes(), (folder / "out.csv.run.json").read_bytes()


def _one_document(tokens: bytes) -> tuple[bytes, bytes]:
    """An index and its tokens, a byte each, of a single document."""
    index = struct.pack("<9sQBQQ", MAGIC, 1, 1, 1, 2) + struct.pack("<i3q", len(tokens), 0, 0, 1)
    return index, tokens


def _binidx(code: int, token_bytes: int) -> tuple[bytes, bytes]:
    """An index and its tokens: documents of 3, 0 and 2 tokens."""
    sizes, offsets = (3, 0, 2), (0, 3 * token_bytes, 3 * token_bytes)
    index = struct.pack("<9sQBQQ", MAGIC, 1, code, 3, 4) + struct.pack("<3i3q4q", *sizes, *offsets, 0, 1, 2, 3)
    return index, b"".join(token.to_bytes(token_bytes, "little") for token in (70, 71, 0, 72, 0))


_JSONL = tuple(
    "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries).encode()
    for entries in (
        [{"text": "one\r\n\r\ntwo é"}, {"text": "", "id": 3}],
        [{"prompt": "hi", "response": "yo\n\nyes", "system": "s", "history": [["a", "b"]]}],
        [{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "User: x\n\nAssistant:"},
                       {"role": "assistant", "content": "z", "tools": []}]}],
    )
)  # fmt: skip
_TABLES = (
    b'\xef\xbb\xbfprompt,chosen,reject,note\r\n"a, ""b""","one\ntwo",worse,x\r\n\r\nc,d\r\n',
    b"chosen,prompt,rejected\nyes,User: hi,no\n,,\nq,r\n",
)
_TABLE_LINES = (
    b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n\n{"prompt": "q", "chosen": "d\\n", "reject": null, "x": 3}\n',
)
_ARRAYS = (
    json.dumps([{"instruction": "a", "input": "b", "output": "c"}, {"text": 'x"\\'}], indent=1).encode(),
    json.dumps([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "é"}]}]).encode(),
)
_SHEETS = b'question,answer,id\r\n"a, ""b""","c\nd",1\r\n\r\ne,f,2\r\n', b"text;n\none;1\ntwo;2\n"
_MESSAGE_PAIRS = (
    json.dumps([{"prompt": "p", "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}],
                 "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}]).encode(),
)  # fmt: skip
_TEXT = ("One.\r\n\r\nTwo: é, 好。\n" * 3).encode(), b"User: a\n\nAssistant: b\n\n" * 4
_TURNS = (json.dumps({"text": "User: a\n\nAssistant: b"}).encode(),)
_ANSWERS = LossMask("qa")
_CHAT = _one_document(bytes(ByteTokenizer().encode("User: a\n\nAssistant: b\n\n")) + b"\0")
_CHAT16 = _one_document("User: a\n\nAssistant: é".encode("utf-16-le"))
_INDEX, _TOKENS = _binidx(8, 2)
_WIDE_INDEX, _WIDE_TOKENS = _binidx(4, 4)


def _shard(name: str) -> bytes:
    """A safetensors file of one tensor of four bytes."""
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


_SHARDS = {f"m-0000{n}-of-00002.safetensors": _shard(f"t{n}") for n in (1, 2)}
_SHARD_INDEX = json.dumps({"weight_map": {f"t{n}": name for n, name in enumerate(_SHARDS, start=1)}}).encode()


def _with_packages(folder: Path) -> dict[str, Reader]:
    """Those whose packages are installed here; neither is needed otherwise."""
    made = {}
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"question": "a", "answer": "é"}]), folder / "seed")
        made["Parquet"] = Reader(_documents("jsonl"), ((folder / "seed").read_bytes(),), "data.parquet")
    with contextlib.suppress(ImportError):
        import zstandard

        made["zstd"] = Reader(_documents("jsonl"), tuple(map(zstandard.compress, _JSONL)), "data.jsonl.zst")
    return made


def readers(folder: Path) -> dict[str, Reader]:
    """All of them; `folder` is an empty one in which seeds are made."""
    half_csv, half_progress = _reject_run(1, folder)
    return {
        **_with_packages(folder),
        "jsonl": Reader(_documents("jsonl"), _JSONL, "data.jsonl"),
        "jsonl, World tokens": Reader(_documents("jsonl", 65536), _JSONL, "data.jsonl"),
        "text": Reader(_documents("utf-8"), _TEXT, "data.txt"),
        "text, World tokens": Reader(_documents("utf-8", 65536), _TEXT, "data.txt"),
        "JSON array": Reader(_documents("jsonl"), _ARRAYS, "data.json"),
        "JSON array, thinking": Reader(_documents("jsonl", template="think"), _ARRAYS, "data.json"),
        "table": Reader(_documents("jsonl"), _SHEETS, "data.csv"),
        "gzip": Reader(_documents("jsonl"), tuple(gzip.compress(lines, mtime=0) for lines in _JSONL), "data.jsonl.gz"),
        "xz": Reader(_documents("jsonl"), tuple(map(lzma.compress, _JSONL)), "data.jsonl.xz"),
        "JSON array of preferences": Reader(_pairs, _MESSAGE_PAIRS, "rows.json"),
        "CSV of preferences": Reader(_pairs, _TABLES, "rows.csv"),
        "JSON lines of preferences": Reader(_pairs, _TABLE_LINES, "rows.jsonl"),
        "jsonl, answers": Reader(_documents("jsonl", mask=_ANSWERS), (*_JSONL[1:], *_TURNS), "data.jsonl"),
        "text, answers, World tokens": Reader(_documents("utf-8", 65536, _ANSWERS), _TEXT[1:], "data.txt"),
        "text between two": Reader(_documents("utf-8", mask=LossMask("se", ":", ".")), _TEXT[:1], "data.txt"),
        "binidx tokens, answers": Reader(
            _documents("binidx", mask=_ANSWERS), (_CHAT[1],), "data.bin", {"data.idx": _CHAT[0]}
        ),
        "binidx of bytes, answers": Reader(
            _documents("binidx", 256, _ANSWERS), (_CHAT16[1],), "data.bin", {"data.idx": _CHAT16[0]}
        ),
        "binidx index": Reader(_documents("binidx"), (_INDEX,), "data.idx", {"data.bin": _TOKENS}),
        "binidx index of int32": Reader(_documents("binidx"), (_WIDE_INDEX,), "data.idx", {"data.bin": _WIDE_TOKENS}),
        "binidx tokens": Reader(_documents("binidx"), (_TOKENS,), "data.bin", {"data.idx": _INDEX}),
        "run.json of rejects": Reader(_rejects, (half_progress,), "out.csv.run.json", {"out.csv": half_csv}),
        "CSV of rejects": Reader(_rejects, (half_csv,), "out.csv", {"out.csv.run.json": half_progress}),
        "index of shards": Reader(safetensors.load_model, (_SHARD_INDEX,), "m.safetensors.index.json", _SHARDS),
        "kind of data": Reader(
            lambda path: recognise(str(path)),
            (*_JSONL, *_TABLES, *_TEXT, *_ARRAYS, *_SHEETS, gzip.compress(_JSONL[0], mtime=0)),
            "data",
        ),
    }
