"""Every form of data set, from a file as its tool writes it, to the text that is trained on."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.config import TrainConfig
from src.config.data import LossMask
from src.config.fields import fields_in
from src.config.recognition import recognise
from src.data.sources import open_documents, template_of
from src.errors import DataError
from src.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
ASKED = {"role": "user", "content": "a"}
CALL = {"name": "weather", "arguments": {"city": "Kyoto"}}
SAID = {"role": "assistant", "content": "b"}
APART = "messages of one speaker in a row that cannot be joined"
UNLEARNABLE: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "no answer"),
    ({"messages": [ASKED]}, "no answer"),
    ({"conversations": [{"from": "human", "value": "a"}] * 2}, "no answer"),
    ({"messages": [ASKED, {**SAID, "weight": 0}]}, "answers of the weight 0 alone"),
    ({"prompt": [ASKED], "completion": [{**SAID, "weight": 0}]}, "answers of the weight 0 alone"),
    ({"messages": [ASKED, {**SAID, "content": None}]}, "an empty answer"),
    ({"prompt": "a", "response": "b", "history": [["", "c"]]}, "an empty question"),
    ({"messages": [ASKED, SAID, {"role": "system", "content": "s"}, ASKED, SAID]}, "a system message behind others"),
    ({"system": "s", "prompt": [{"role": "system", "content": "t"}, ASKED], "response": [SAID]},
     "a system message behind others"),
    ({"messages": [ASKED, {"role": "tool", "content": "r"}, SAID]}, APART),
    ({"messages": [ASKED, SAID, {**SAID, "weight": 0}]}, APART),
    ({"messages": [ASKED, SAID, {**SAID, "reasoning": "r"}]}, APART),
    ({"messages": [ASKED, SAID, {**SAID, "tool_calls": [{"function": CALL}]}]}, APART),
    ({"messages": [ASKED, {**SAID, "tool_calls": [{"function": CALL}]}, SAID]}, APART),
    ({"messages": [ASKED, SAID, {"role": "tool", "content": " "}, SAID]}, "an empty result of a tool"),
    ({"messages": [ASKED, SAID, {"role": "tool", "content": None}, SAID]}, "an empty result of a tool"),
    ({"messages": [ASKED, {**SAID, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
     "a call whose arguments are a text that is no JSON"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAID]},
     "a part of the type 'image_url', which is no text"),
]  # fmt: skip
"""Entries of known forms that have nothing to learn or cannot be written, and what they have."""


def texts(path: Path | str, **options: Any) -> tuple[list[str], tuple[str, ...]]:
    """What of every document is trained on, in ⟦ ⟧, and what is said about them."""
    if isinstance(options.get("fields"), str):
        options["fields"] = fields_in(options["fields"])[0]
    documents = open_documents("jsonl", str(path), 257, ctx_len=64, **options)
    rendered = []
    for index in range(len(documents)):
        tokens, counted = documents.tokens(index), documents.counted(index)
        counted = np.ones(len(tokens), np.bool_) if counted is None else counted
        text, before = "", False
        for begin in range(len(tokens)):
            text += ("⟦" if counted[begin] else "⟧") if counted[begin] != before else ""
            before = counted[begin]
            text += "∎" if tokens[begin] == 0 else chr(tokens[begin] - 1)
        rendered.append((text + ("⟧" if before else "")).encode("latin-1", "xmlcharrefreplace").decode("latin-1"))
    return [text.replace("&#10214;", "⟦").replace("&#10215;", "⟧").replace("&#8718;", "∎") for text in rendered], (
        documents.statements
    )


def one(tmp_path: Path, entry: object, name: str = "data.json", **options: Any) -> tuple[str, tuple[str, ...]]:
    """The text of a file's only document, and what is said about it."""
    (tmp_path / name).write_text(json.dumps(entry, indent=2), encoding="utf-8")
    (text,), said = texts(tmp_path / name, **options)
    return text, said


FORMS: list[tuple[str, dict[str, Any], str]] = [
    ("plain text", {"text": "One.\n\nTwo."}, "⟦One.\n\nTwo.∎⟧"),
    (
        "Alpaca",
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        "User: Add.\n1, 2\n\nAssistant:⟦ 3\n\n∎⟧",
    ),
    ("Alpaca", {"instruction": "Sing.", "input": "", "output": "La."}, "User: Sing.\n\nAssistant:⟦ La.\n\n∎⟧"),
    (
        "Alpaca",
        {"instruction": "c", "output": "d", "system": "S", "history": [["a", "b"]]},
        "System: S\n\nUser: a\n\nAssistant:⟦ b\n\n⟧User: c\n\nAssistant:⟦ d\n\n∎⟧",
    ),
    (
        "Dolly",
        {"instruction": "Who?", "context": "Ann was.", "response": "Ann.", "category": "closed_qa"},
        "User: Who?\nAnn was.\n\nAssistant:⟦ Ann.\n\n∎⟧",
    ),
    (
        "ShareGPT",
        {
            "id": "x_0",
            "conversations": [
                {"from": "system", "value": "S"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"},
            ],
        },
        "System: S\n\nUser: a\n\nAssistant:⟦ b\n\n⟧User: c\n\nAssistant:⟦ d\n\n∎⟧",
    ),
    (
        "ShareGPT",
        {
            "system": "S", "tools": json.dumps([{"name": "weather"}]),
            "conversations": [
                {"from": "human", "value": "Rain?"}, {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": '{"rain": true}'}, {"from": "gpt", "value": "Yes."},
            ],
        },
        'System: S\nTools:\n[{"name": "weather"}]\nReturn only a JSON function call.\n\nUser: Rain?\n\nAssistant:'
        '⟦ ```json\n{"name": "weather", "arguments": {"city": "Kyoto"}}\n```\n\n⟧'
        'User: Function output:\n{"rain": true}\n\nAssistant:⟦ Yes.\n\n∎⟧',
    ),
    (
        "messages",
        {"messages": [
            {"role": "developer", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        ]},
        "System: S\n\nUser: a\n\nAssistant:⟦ b\n\n∎⟧",
    ),
    (
        "messages",
        {"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "model": "m"},
        "User: a\n\nAssistant:⟦ b\n\n∎⟧",
    ),
    (
        "messages",
        {"messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": id, "type": "function", "function": {"name": "f", "arguments": json.dumps({"x": id})}}
                for id in "12"
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
            {"role": "tool", "tool_call_id": "2", "content": "4"},
            {"role": "assistant", "content": "7"},
        ]},
        'User: a\n\nAssistant:⟦ ```json\n'
        '[{"name": "f", "arguments": {"x": "1"}}, {"name": "f", "arguments": {"x": "2"}}]'
        "\n```\n\n⟧User: Function output:\n3\n4\n\nAssistant:⟦ 7\n\n∎⟧",
    ),
    (
        "messages",
        {"messages": [
            ASKED, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "3"}, {"role": "assistant", "content": "b"},
        ], "functions": [{"name": "f"}]},
        'System: Tools:\n[{"name": "f"}]\nReturn only a JSON function call.\n\nUser: a\n\nAssistant:'
        '⟦ ```json\n{"name": "f", "arguments": {"x": 1}}\n```\n\n⟧'
        "User: Function output:\n3\n\nAssistant:⟦ b\n\n∎⟧",
    ),
    (
        "messages",
        {"messages": [
            ASKED, {"role": "assistant", "content": "b", "weight": 0}, ASKED,
            {"role": "assistant", "content": "c", "weight": 1},
        ]},
        "User: a\n\nAssistant: b\n\nUser: a\n\nAssistant:⟦ c\n\n∎⟧",
    ),
    ("prompt and response", {"prompt": "a", "response": "b"}, "User: a\n\nAssistant:⟦ b\n\n∎⟧"),
    ("prompt and completion", {"prompt": "a", "completion": " b"}, "User: a\n\nAssistant:⟦ b\n\n∎⟧"),
    (
        "prompt and completion",
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        "User: a\n\nAssistant:⟦ b\n\n∎⟧",
    ),
    ("question and answer", {"Question": "a", "Answer": "b"}, "User: a\n\nAssistant:⟦ b\n\n∎⟧"),
    ("query and response", {"query": "a", "response": "b", "text": "ab"}, "User: a\n\nAssistant:⟦ b\n\n∎⟧"),
    ("input and output", {"input": "a", "output": "b"}, "User: a\n\nAssistant:⟦ b\n\n∎⟧"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "entry", "text"), FORMS, ids=[form for form, _, _ in FORMS])
@pytest.mark.parametrize("container", ["list", "lines"])
def test_forms(tmp_path: Path, form: str, entry: dict[str, Any], text: str, container: str) -> None:
    path = tmp_path / "data.json"
    content = json.dumps([entry, entry], indent=2) if container == "list" else f"{json.dumps(entry)}\n" * 2
    path.write_text(content, encoding="utf-8")
    found, said = texts(path)
    assert found == [text, text]
    assert said[0] == f"Recognised as {form}, 2 {'texts' if form == 'plain text' else 'conversations'}."
    second = "entry" if container == "list" else "line"
    assert (
        f"1 document of 2 repeats an earlier one (first: {path}, {second} 2) and counts as often as it stands"
        in " ".join(said)
    )


class TestTables:
    ROWS = ({"question": 'a, "b"', "answer": "c\nd"}, {"question": "é", "answer": "f"})
    TEXTS = ('User: a, "b"\n\nAssistant:⟦ c\nd\n\n∎⟧', "User: Ã©\n\nAssistant:⟦ f\n\n∎⟧")

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("a.csv", {}), ("a.csv", {"delimiter": ";"}), ("a.tsv", {"delimiter": "\t"}), ("a.txt", {}),
            ("a.csv", {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}),
            ("a.csv", {"quoting": csv.QUOTE_ALL, "lineterminator": "\r"}),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_as_spreadsheets_write_them(
        self, tmp_path: Path, name: str, options: dict[str, Any], encoding: str
    ) -> None:
        with (tmp_path / name).open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"], **options)
            writer.writeheader()
            writer.writerows(self.ROWS)
        found, said = texts(tmp_path / name)
        assert tuple(found) == self.TEXTS
        assert said[0] == "Recognised as question and answer, 2 conversations."
        assert recognise(str(tmp_path / name)).data_type == "jsonl"

    def test_columns_by_name(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("Frage Text,id,Antwort\na,1,b\n,2,c\n", encoding="utf-8")
        found, said = texts(tmp_path / "a.csv", fields='["Frage Text", "Antwort"]')
        assert found == ["User: a\n\nAssistant:⟦ b\n\n∎⟧"]
        assert "Left out: 1 with an empty question" in said[2]
        assert said[-1] == "Not read: 'id' (1 line)."
        with pytest.raises(DataError, match=r"2 entries .*lines 2, 3: its keys are 'Frage Text', 'id', 'Antwort'"):
            texts(tmp_path / "a.csv")

    def test_messages_in_a_cell(self, tmp_path: Path) -> None:
        messages = json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])
        with (tmp_path / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["conversations"], [messages]])
        assert texts(tmp_path / "a.csv")[0] == ["User: a\n\nAssistant:⟦ b\n\n∎⟧"]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('question,answer\na,b\nc,"d\n', 'line 3 has a quote that is never closed'),
            ("question,answer\na,b,c\n", "line 2: it has 3 fields, the header 2"),
            ("question,answer\na\n", "line 2: it has 'question', but no \"answer\", expected"),
            ("question,question\na,b\n", "has several columns 'question'"),
            ("question,answer\na,\xe9\n".encode("latin-1"), "line 2: not UTF-8"),
            ("question,answer\na,b\n".encode("utf-16"), "is UTF-16"),
            ("question,answer\na,b\0\n", "holds a NUL character"),
            ("question,answer\n", "is empty"),
        ],
    )  # fmt: skip
    def test_wrong_ones(self, tmp_path: Path, content: str | bytes, reason: str) -> None:
        (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=reason) as refused:
            texts(tmp_path / "a.csv")
        assert str(tmp_path / "a.csv") in str(refused.value)


def test_a_parquet_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    table = pyarrow.Table.from_pylist(
        [{"messages": [{**messages[0], "name": None}, messages[1]], "source": "x"}, {"messages": messages}]
    )
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    found, said = texts(tmp_path / "train-00000-of-00001.parquet")
    assert found == ["User: a\n\nAssistant:⟦ b\n\n∎⟧"] * 2
    assert said[0] == "Recognised as messages, 2 conversations."
    assert "Not read: 'source' (1 row)." in said
    content = (tmp_path / "train-00000-of-00001.parquet").read_bytes()
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": None}, {"prompt": None, "response": "d"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "empty-cells.parquet")
    found, said = texts(tmp_path / "empty-cells.parquet")
    assert found == ["User: a\n\nAssistant:⟦ b\n\n∎⟧"]
    assert "Left out: 1 with an empty answer, 1 with an empty question" in said[2]
    rows = [{"messages": messages}, {"messages": [messages[0], {"role": "assistant", "content": None}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "empty-message.parquet")
    found, said = texts(tmp_path / "empty-message.parquet")
    assert found == ["User: a\n\nAssistant:⟦ b\n\n∎⟧"]
    assert "Left out: 1 with an empty answer" in said[2]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": b"a"}]), tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match='row 1: "text" is bytes, expected a string'):
        texts(tmp_path / "bytes.parquet")
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet is damaged, or no Parquet table"):
        texts(tmp_path / "cut.parquet")


def test_a_parquet_table_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(40))
    with pytest.raises(DataError, match="is a Parquet table, which needs a package: pip install pyarrow"):
        texts(tmp_path / "a.parquet")
    assert "needs a package: pip install pyarrow" in recognise(str(tmp_path / "a.parquet")).problem


class TestPackedFiles:
    LINES = ('{"prompt": "a", "response": "b"}\n' * 3).encode()

    @pytest.mark.parametrize(
        ("name", "pack"),
        [("a.jsonl.gz", gzip.compress), ("a.json.bz2", bz2.compress), ("a.jsonl.xz", lzma.compress),
         ("a", gzip.compress)],
    )  # fmt: skip
    def test_are_unpacked(self, tmp_path: Path, name: str, pack: Any) -> None:
        (tmp_path / name).write_bytes(pack(self.LINES))
        assert recognise(str(tmp_path / name)).data_type == "jsonl"
        assert len(texts(tmp_path / name)[0]) == 3
        (tmp_path / name).write_bytes(pack(self.LINES)[:-6])
        with pytest.raises(DataError, match=rf"{name} is damaged: \w+ cannot unpack it"):
            texts(tmp_path / name)

    def test_zstd(self, tmp_path: Path) -> None:
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        packed = zstandard.compress(self.LINES)
        (tmp_path / "a.jsonl.zst").write_bytes(packed + packed)
        assert len(texts(tmp_path / "a.jsonl.zst")[0]) == 6
        for damage in (packed[:-3], packed[:6] + b"\xff" * 9 + packed[9:]):
            (tmp_path / "a.jsonl.zst").write_bytes(damage)
            with pytest.raises(DataError, match="is damaged: zstd cannot unpack it"):
                texts(tmp_path / "a.jsonl.zst")

    def test_zstd_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
        (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
        with pytest.raises(DataError, match="packed by zstd, which needs a package: pip install zstandard"):
            texts(tmp_path / "a.jsonl.zst")
        assert "pip install zstandard" in recognise(str(tmp_path / "a.jsonl.zst")).problem

    def test_text(self, tmp_path: Path) -> None:
        (tmp_path / "book.txt.gz").write_bytes(gzip.compress(b"one\r\ntwo"))
        assert recognise(str(tmp_path / "book.txt.gz")).data_type == "utf-8"
        documents = open_documents("utf-8", str(tmp_path / "book.txt.gz"), 257, ctx_len=64)
        assert BYTES.decode(documents.tokens(0).tolist()) == "one\ntwo"


class TestLists:
    def test_elements_across_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        entries = [{"text": 'x"\\' * n, "more": [1, {"c": "],["}], "é": "é" * n} for n in range(1, 60, 7)]
        expected = ["⟦" + entry["text"] + "∎⟧" for entry in entries]
        for piece in (5, 64, 1 << 20):
            monkeypatch.setattr("src.data.containers._PIECE_BYTES", piece)
            for indent in (None, 3):
                (tmp_path / "a.json").write_text("\ufeff" + json.dumps(entries, indent=indent), encoding="utf-8")
                assert texts(tmp_path / "a.json")[0] == expected

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('[{"text": "a"}', "a.json ends inside the list that begins it: it was cut short"),
            ('[{"text": "a"},\n{"text": ', "ends inside the list"),
            ('[{"text": "a"}]\n{"text": "b"}', "line 2: something follows the list"),
            ('[{"text": "a"},\n 7]', "entry 2: it is a number, expected an object; it begins in line 2"),
            ('[{"text": "a"},,{"text": "b"}]', "entry 2: not valid JSON"),
            ('[{"text": "a"}}', "closed that was not opened"),
            ("[]", "a.json is empty"),
            ("{\n}\n", "2 entries cannot be read: line 1: not valid JSON"),
            (
                json.dumps({"data": [{"text": "a"}]}, indent=2),
                r"a.json begins with a JSON object that takes several lines: write an array of entries, \[",
            ),
            (
                json.dumps({"data": [{"text": "a"}]}),
                "line 1: its keys are 'data' \\('data' is a list of objects: if those are the entries",
            ),
            (
                '[{"txt": "a"}, {"txt": "a"}]',
                "2 entries cannot be read: entries 1, 2: its keys are 'txt', expected",
            ),
        ],
    )
    def test_wrong_ones(self, tmp_path: Path, content: str, reason: str) -> None:
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=reason):
            texts(tmp_path / "a.json")


class TestWhatIsSaid:
    def test_all_bad_lines_at_once(self, tmp_path: Path) -> None:
        lines = ['{"text": "fine"}', '{"txt": "a"}', "{", '{"txt": "b"}', *['{"txt": "c"}'] * 9, '{"text": 3}']
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        with pytest.raises(DataError) as refused:
            texts(tmp_path / "a.jsonl")
        said = str(refused.value)
        assert said.startswith(
            f"{tmp_path}/a.jsonl: 13 entries cannot be read: lines 2, 4, 5, 6, 7, 8 and 5 more: its keys are 'txt', "
        )
        assert "; line 3: not valid JSON (" in said
        assert said.endswith('; line 14: "text" is a number, expected a string.')
        assert said.count(str(tmp_path)) == 1

    def test_reasons_beyond_the_first_are_counted(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("\n".join(f'{{"k{n}": 1}}' for n in range(20)))
        with pytest.raises(
            DataError,
            match=r"20 entries .*; lines 6, 7, 8, 9, 10, 11 and 9 more: other reasons\. Expected are \{.*field\.$",
        ):
            texts(tmp_path / "a.jsonl")

    def test_what_has_nothing_to_learn_is_left_out(self, tmp_path: Path) -> None:
        entries = [
            {"instruction": "a", "output": "b"}, {"instruction": "a", "output": " "},
            {"instruction": "", "output": "b"},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [], "function_call": None}]},
            {"prompt": [ASKED], "completion": [{"role": "assistant", "content": " "}]},
            {"prompt": "a", "response": None},
        ]  # fmt: skip
        (tmp_path / "a.json").write_text(json.dumps(entries))
        found, said = texts(tmp_path / "a.json")
        assert found == ["User: a\n\nAssistant:⟦ b\n\n∎⟧"]
        assert said[2] == (
            f"Left out: 5 with an empty answer, 1 with an empty question (first: {tmp_path}/a.json, entry 2)."
        )
        (tmp_path / "a.json").write_text(json.dumps(entries[1:2]))
        with pytest.raises(
            DataError, match=r"a\.json cannot be used, because every entry is left out: 1 with an empty"
        ):
            texts(tmp_path / "a.json")

    def test_a_second_kind_of_calls_and_weights_without_effect_are_said(self, tmp_path: Path) -> None:
        call = {"name": "f", "arguments": "{}"}
        answers = [
            {"role": "assistant", "content": None, "tool_calls": [{"function": call}], "function_call": call},
            {"role": "assistant", "content": "b", "weight": 0},
        ]
        (tmp_path / "a.json").write_text(json.dumps([{"messages": [ASKED, answers[0], ASKED, answers[1]]}]))
        _, said = texts(tmp_path / "a.json")
        assert "Not read: 'messages: function_call' (1 entry)." in said
        assert "1 answer of the weight 0, read and not learnt." in said
        _, said = texts(tmp_path / "a.json", mask=LossMask("pad"))
        assert "1 answer of the weight 0, read and learnt as all others are." in said

    @pytest.mark.parametrize(("entry", "reason"), UNLEARNABLE)
    def test_an_entry_that_cannot_be_learned_is_left_out_and_counted(
        self, tmp_path: Path, entry: dict[str, Any], reason: str
    ) -> None:
        (tmp_path / "data.json").write_text(json.dumps([entry, {"prompt": "a", "response": "b"}, entry]))
        found, said = texts(tmp_path / "data.json")
        assert found == ["User: a\n\nAssistant:⟦ b\n\n∎⟧"]
        assert said[0] == "Recognised as prompt and response, 1 conversation."
        assert f"Left out: 2 with {reason} (first: {tmp_path}/data.json, entry 1)." in said
        (tmp_path / "data.json").write_text(json.dumps([entry] * 2))
        every = f"data.json cannot be used, because every entry is left out: 2 with {reason} (first: "
        with pytest.raises(DataError, match=re.escape(every)):
            texts(tmp_path / "data.json")

    def test_messages_of_one_speaker_in_a_row_become_a_turn(self, tmp_path: Path) -> None:
        said_by = {"s": "system", "u": "user", "a": "assistant"}
        words = ("s1", "s2", "u1", "u2", "u3", "a1", "a2", "u4", "a3")
        messages = [{"role": said_by[word[0]], "content": word} for word in words]
        (tmp_path / "data.json").write_text(json.dumps({"messages": messages}))
        found, said = texts(tmp_path / "data.json")
        assert found == [
            "System: s1\ns2\n\nUser: u1\nu2\nu3\n\nAssistant:⟦ a1\na2\n\n⟧User: u4\n\nAssistant:⟦ a3\n\n∎⟧"
        ]
        assert "4 messages joined to the one before, of the same speaker." in said
        messages[5] |= {"reasoning_content": "r"}
        (tmp_path / "data.json").write_text(json.dumps({"messages": messages}))
        assert "Assistant: <think⟦>\nr\n</think>\na1\na2" in texts(tmp_path / "data.json", template="think")[0][0]

    @pytest.mark.parametrize(("mask", "learnt"), [("", "not learnt"), ("pad", "learnt as all others are")])
    def test_questions_and_answers_at_the_wrong_end_are_said(self, tmp_path: Path, mask: str, learnt: str) -> None:
        turns = [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "a"}]
        (tmp_path / "data.json").write_text(json.dumps({"conversations": turns}))
        found, said = texts(tmp_path / "data.json", mask=LossMask(mask))
        assert found[0].translate({ord(mark): None for mark in "⟦⟧"}) == "Assistant: hi\n\nUser: a\n\n∎"
        assert f"1 conversation with a question at the end, which is {learnt}." in said
        assert "Taken as they are: 1 conversation with an answer before any question." in said

    @pytest.mark.parametrize(
        ("entry", "reason"),
        [
            ({"prompt": "p", "chosen": "c", "rejected": "r"}, "it is a preference pair; make pairs with PrepareOrpo"),
            ({"conversations": [], "chosen": {}, "rejected": {}}, "it is a preference pair"),
            ({"conversations": [{"from": "alien", "value": "a"}]}, "role 'alien'; known are system, human, gpt"),
            ({"conversations": "a"}, '"conversations" is a string, expected a list'),
            ({"messages": [{"role": "user", "content": ["a"]}]}, "message 1 holds a string; only text"),
            (
                {"conversations": [{"from": "function_call", "value": "x"}]},
                "message 1 is a function call that is",
            ),
            ({"instruction": ["a"], "output": "b"}, '"instruction" is a list, expected a string'),
            ({"Question": "a", "Answer": 4}, '"Answer" is a number, expected a string'),
            (
                {"Prompt": "a", "answer": "b"},
                "it has 'Prompt', 'answer', but no \"response\" or \"completion\", expected",
            ),
            ({"messages": [ASKED, {"role": "assistant", "content": "b", "weight": 2}]}, "has the weight 2; known are"),
            (
                {"messages": [ASKED, {"role": "assistant", "content": None, "function_call": {"arguments": "{}"}}]},
                'message 2: a call has no name of a function, expected {"name": …, "arguments": {…}}',
            ),
        ],
    )
    def test_wrong_ones_in_one_sentence(self, tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
        (tmp_path / "data.json").write_text(json.dumps(entry))
        with pytest.raises(DataError, match=r"data\.json, line 1: ") as refused:
            texts(tmp_path / "data.json")
        assert reason in str(refused.value)
        assert "\n" not in str(refused.value)


class TestNamedFields:
    @pytest.mark.parametrize(
        ("fields", "entry", "text"),
        [
            ("q a", {"q": "x", "a": "y"}, "User: x\n\nAssistant:⟦ y\n\n∎⟧"),
            ("q i a", {"q": "x", "i": "z", "a": "y"}, "User: x\nz\n\nAssistant:⟦ y\n\n∎⟧"),
            ("q i a", {"q": "x", "a": "y"}, "User: x\n\nAssistant:⟦ y\n\n∎⟧"),
            ("b", {"b": "some text", "text": "other"}, "⟦some text∎⟧"),
            ("b", {"b": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
             "User: x\n\nAssistant:⟦ y\n\n∎⟧"),
            ("system=s question=q answer=a", {"s": "S", "q": "x", "a": "y", "system": "no"},
             "System: S\n\nUser: x\n\nAssistant:⟦ y\n\n∎⟧"),
        ],
    )  # fmt: skip
    def test_stand_for_known_ones(self, tmp_path: Path, fields: str, entry: dict[str, Any], text: str) -> None:
        found, said = one(tmp_path, [entry], fields=fields)
        assert found == text
        assert said[0].startswith("Recognised as the fields of --sft_field, 1 ")


class TestReasoning:
    ENTRY = (
        {"messages": [ASKED, {"role": "assistant", "content": "<think>\nhm\n\n</think>\n\nb"}]},
        {"messages": [ASKED, {"role": "assistant", "content": "b", "reasoning_content": "hm"}]},
        {"question": "a", "answer": "b", "reasoning": "hm"},
    )  # fmt: skip

    @pytest.mark.parametrize("entry", ENTRY)
    def test_think(self, tmp_path: Path, entry: dict[str, Any]) -> None:
        text, said = one(tmp_path, [entry], template="think")
        assert text == "User: a\n\nAssistant: <think⟦>\nhm\n</think>\nb\n\n∎⟧"
        assert 'in the template think, "User: …\\n\\nAssistant: <think>\\n…\\n</think>\\n…\\n\\n"' in said[1]
        assert not [line for line in said if "Not read" in line]

    def test_answers_without(self, tmp_path: Path) -> None:
        text, said = one(tmp_path, [{"question": "a", "answer": "b"}], template="think")
        assert text == "User: a\n\nAssistant: <think>\n</think⟦>\nb\n\n∎⟧"
        assert "1 answer without reasoning written as --template no-think has them." in said

    @pytest.mark.parametrize("entry", ENTRY)
    def test_no_think(self, tmp_path: Path, entry: dict[str, Any]) -> None:
        text, said = one(tmp_path, [entry], template="no-think")
        assert text == "User: a\n\nAssistant: <think>\n</think⟦>\nb\n\n∎⟧"
        assert "The reasoning of 1 answer left out: --template think has it." in said

    def test_as_text(self, tmp_path: Path) -> None:
        text, said = one(tmp_path, [self.ENTRY[0]])
        assert text == "User: a\n\nAssistant:⟦ <think>\nhm\n</think>\nb\n\n∎⟧"
        assert "Answers that begin with <think>, which is taken as text: 1; --template think" in " ".join(said)
        text, said = one(tmp_path, [self.ENTRY[1]])
        assert text == "User: a\n\nAssistant:⟦ b\n\n∎⟧"
        assert "The reasoning of 1 answer left out: --template think has it." in said


@pytest.mark.parametrize(
    ("template", "text"),
    [("question", "Question: a\n\nAnswer:⟦ b\n\n∎⟧"), ("input", "Input: a\n\nResponse:⟦ b\n\n∎⟧")],
)
def test_other_templates(tmp_path: Path, template: str, text: str) -> None:
    assert one(tmp_path, [{"question": "a", "answer": "b"}], template=template)[0] == text


class TestSeveralFiles:
    def test_a_list_and_a_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        (folder / "sub").mkdir(parents=True)
        (folder / ".hidden.jsonl").write_text("{")
        (folder / "README.md").write_text("notes")
        (folder / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
        (folder / "sub" / "b.csv").write_text("prompt,response\nq,r\n")
        for path in (str(folder), f"{folder}/a.jsonl, {folder}/sub/b.csv", f"{folder}/a.jsonl,{folder}/sub"):
            found, said = texts(path)
            assert found == ["⟦one∎⟧", "⟦two∎⟧", "User: q\n\nAssistant:⟦ r\n\n∎⟧"]
            assert said[0] == "2 files: a.jsonl, sub/b.csv."
            assert recognise(path).data_type == "jsonl"
        assert texts(folder)[1][1] == "Not read, since their names say nothing of data: README.md."
        documents = open_documents("jsonl", str(folder), 257, ctx_len=64)
        assert documents.named([0, 1, 2]) == f"lines 1, 3 of {folder}/a.jsonl, line 2 of {folder}/sub/b.csv"

    def test_a_bad_line_in_each(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n{"t": 1}\n')
        with pytest.raises(DataError, match=r"2 entries .*a\.jsonl, lines 2, .*b\.jsonl 2: its keys are 't'"):
            texts(tmp_path)

    def test_texts(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one")
        (tmp_path / "b.txt").write_text("two" * 30)
        documents = open_documents("utf-8", str(tmp_path), 257, ctx_len=64)
        assert BYTES.decode(documents.tokens(0).tolist()) == "one"
        assert documents.named([0, 2]) == f"piece 1 of {tmp_path}/a.txt, piece 2 of {tmp_path}/b.txt"

    def test_kinds_are_not_mixed(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one")
        (tmp_path / "b.jsonl").write_text('{"text": "a"}')
        said = recognise(str(tmp_path)).problem
        assert said.startswith("holds several kinds of data, ")
        assert "a.txt (utf-8)" in said

    def test_a_comma_in_a_name(self, tmp_path: Path) -> None:
        (tmp_path / "a,b.jsonl").write_text('{"text": "one"}')
        assert texts(tmp_path / "a,b.jsonl")[0] == ["⟦one∎⟧"]

    def test_words_of_the_command_line(self, tmp_path: Path) -> None:
        from src.cli import given_train_flags

        assert given_train_flags(["--data_file", "a.jsonl", "b.jsonl"]) == {"data_file": "a.jsonl,b.jsonl"}
        flags = {"load_model": "m.pth", "data_file": f"{tmp_path}/none.jsonl,{tmp_path}"}
        assert TrainConfig.from_flags(flags).data_type == "jsonl"


@pytest.mark.parametrize(
    ("entries", "options", "template"),
    [
        ([{"text": "Once upon a time."}] * 3, {}, "text"),
        ([{"text": "User: a\n\nAssistant: b"}] * 2 + [{"text": "prose"}], {}, "user"),
        ([{"text": "Question: a\n\nAnswer: b"}], {}, "question"),
        ([{"question": "a", "answer": "b"}], {}, "user"),
        ([{"question": "a", "answer": "b"}], {"template": "input"}, "input"),
        ([{"question": "a", "answer": "b"}], {"template": "no-think"}, "no-think"),
    ],
)
def test_the_template_of_a_chat(
    tmp_path: Path, entries: list[dict[str, str]], options: dict[str, str], template: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(entries))
    documents = open_documents("jsonl", str(tmp_path / "a.json"), 257, ctx_len=64, **options)
    assert template_of(documents, 257, options.get("template", "user")) == template
    assert template_of(documents, 300_000, "user") is None
