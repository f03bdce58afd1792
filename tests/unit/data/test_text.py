"""Text to documents: what the loss is taken on, and every line that is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from src.config.fields import fields_in
from src.data.forms import content_of_entry
from src.data.sources import open_documents
from src.data.templates import CHAT_TEMPLATES, WORLD_CHAT, Part, Rendering, Turn
from src.data.text import read_entries
from src.errors import DataError
from src.tokenizer import ByteTokenizer, WorldTokenizer

BYTES = ByteTokenizer()
QA = fields_in("q a")[0]
WRITTEN = (
    'Conversations are written in the template World chat, "User: …\\n\\nAssistant: …\\n\\n"; the loss is on answers '
    "only."
)


def write_lines(path, *entries):
    lines = (entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read_lines(path, *entries, vocab_size=257):
    return open_documents("jsonl", write_lines(path / "data.jsonl", *entries), vocab_size, ctx_len=64)


def text_and_counted(documents, index, tokenizer=BYTES):
    """A document's text, and what the loss is taken on; end of document written as ∎."""
    counted = documents.counted(index)
    pieces = []
    for chosen in (np.ones_like(counted), counted):
        tokens = np.where(chosen, documents.tokens(index), -1).tolist()
        pieces.append("".join("∎" if t == 0 else "." if t < 0 else tokenizer.decode([t]) for t in tokens))
    return pieces[0], pieces[1].strip(".")


def test_plain_lines_are_taken_as_they_stand_and_counted_whole(tmp_path):
    documents = read_lines(tmp_path, {"text": " a\n\nb "}, {"text": "é"})
    assert documents.tokens(0).tolist() == [*BYTES.encode(" a\n\nb "), 0]
    assert documents.tokens(1).tolist() == [*BYTES.encode("é"), 0]
    assert documents.counted(0) is None
    assert documents.counted_targets(4).tolist() == [3, 2]
    assert documents.statements == ("Recognised as plain text, 2 texts.",)


def test_prompt_and_response(tmp_path):
    documents = read_lines(tmp_path, {"prompt": " hi ", "response": "yo\n"})
    text, counted = text_and_counted(documents, 0)
    assert text == "User: hi\n\nAssistant: yo\n\n∎"
    assert counted == " yo\n\n∎"


def test_tools_calls_and_results_as_g1_models_know_them(tmp_path):
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Kyoto"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": {"rain": True}, "tool_call_id": "1"},
        {"role": "assistant", "content": "Yes."},
    ]
    tools = [{"name": "weather", "parameters": {"city": "string"}}]
    documents = read_lines(
        tmp_path,
        {"messages": messages, "tools": tools},
        {"messages": messages[1:], "tools": ["weather(city: string)", " time() "]},
    )
    turns = [
        "User: Rain?\n\nAssistant:",
        ' ```json\n{"name": "weather", "arguments": {"city": "Kyoto"}}\n```\n\n',
        'User: Function output:\n{"rain": true}\n\nAssistant:',
        " Yes.\n\n∎",
    ]
    listed = '[{"name": "weather", "parameters": {"city": "string"}}]'
    system = f"System: Be brief.\nTools:\n{listed}\nReturn only a JSON function call.\n\n"
    text, counted = text_and_counted(documents, 0)
    assert text == system + "".join(turns)
    silent = "." * len(turns[2].encode())
    assert counted == turns[1] + silent + turns[3]
    lines = "System: Tools:\n- weather(city: string)\n- time()\nReturn only a JSON function call.\n\n"
    assert text_and_counted(documents, 1)[0] == lines + "".join(turns)
    assert "Not read: 'messages: tool_call_id' (2 lines)." in documents.statements


def test_several_calls_at_once_and_what_they_give_back(tmp_path):
    """Results one after another are one turn; a list of texts in parts is their text, another list is JSON."""
    calls = [{"function": {"name": "a", "arguments": "{}"}}, {"function": {"name": "b", "arguments": {"x": 1}}}]
    documents = read_lines(
        tmp_path,
        {
            "messages": [
                {"role": "user", "content": "Both?"},
                {"role": "assistant", "content": [{"type": "text", "text": "At once."}], "tool_calls": calls},
                {"role": "tool", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " more"}]},
                {"role": "tool", "content": [1, 2]},
                {"role": "assistant", "content": "Done.", "tool_calls": []},
            ]
        },
    )
    text, _ = text_and_counted(documents, 0)
    made = '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}]'
    assert text == (
        f"User: Both?\n\nAssistant: ```json\n{made}\n```\nAt once.\n\n"
        "User: Function output:\none more\n[1, 2]\n\nAssistant: Done.\n\n∎"
    )
    assert not any("Not read" in statement for statement in documents.statements)


def test_an_answer_that_calls_may_reason_before():
    call = {"function": {"name": "a", "arguments": {}}}
    answer = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]}
    content = content_of_entry({"messages": [{"role": "user", "content": "Go."}, answer]})
    assert content.unread == set()
    parts = CHAT_TEMPLATES["think"].render(content.turns, Rendering())
    block = '```json\n{"name": "a", "arguments": {}}\n```'
    assert "".join(part.text for part in parts) == f"User: Go.\n\nAssistant: <think>\nhm\n</think>\n{block}\n\n"


def test_a_conversation(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2", "model": "x"},
    ]
    documents = read_lines(tmp_path, {"messages": messages, "text": "ignored", "prompt": "ignored"})
    text, counted = text_and_counted(documents, 0)
    assert text == "System: Be brief.\n\nUser: One?\n\nAssistant: 1\n\nUser: Two?\n\nAssistant: 2\n\n∎"
    expected = " 1\n\n" + "." * len("User: Two?\n\nAssistant:") + " 2\n\n∎"
    assert counted == expected
    assert documents.statements == (
        "Recognised as messages, 1 conversation.",
        WRITTEN,
        "Not read: 'messages: model' (1 line), 'prompt' (1 line), 'text' (1 line).",
    )


def test_a_closing_question_is_not_counted(tmp_path):
    messages = [{"role": role, "content": text} for role, text in (("assistant", "hello"), ("user", "bye"))]
    text, counted = text_and_counted(read_lines(tmp_path, {"messages": messages}), 0)
    assert text == "Assistant: hello\n\nUser: bye\n\n∎"
    assert counted == " hello\n\n"


def test_system_and_history_come_before_a_prompt(tmp_path):
    entry = {"system": "Be brief.", "history": [["a", "b"]], "prompt": "c", "response": "d", "tools": []}
    documents = read_lines(tmp_path, entry, {**entry, "history": None, "system": None})
    text, counted = text_and_counted(documents, 0)
    assert text == "System: Be brief.\n\nUser: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n∎"
    assert counted == " b\n\n" + "." * len("User: c\n\nAssistant:") + " d\n\n∎"
    assert text_and_counted(documents, 1)[0] == "User: c\n\nAssistant: d\n\n∎"
    assert documents.statements[2] == "Not read: 'tools' (2 lines)."


def test_system_comes_before_messages(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    documents = read_lines(tmp_path, {"system": "s", "messages": messages})
    assert text_and_counted(documents, 0)[0] == "System: s\n\nUser: a\n\nAssistant: b\n\n∎"


def test_an_empty_system_message_is_left_out(tmp_path):
    messages = [
        {"role": role, "content": text} for role, text in (("system", " \n"), ("user", "a"), ("assistant", "b"))
    ]
    documents = read_lines(tmp_path, {"messages": messages})
    assert text_and_counted(documents, 0)[0] == "User: a\n\nAssistant: b\n\n∎"
    assert documents.statements[2] == "1 empty system message left out."


@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_a_prompt_that_stands_in_a_template_is_taken_as_it_is(tmp_path, end):
    earlier = "User: a\r\n\r\nAssistant: b\n\nUser: c\n\nAssistant:" + end
    documents = read_lines(
        tmp_path, {"prompt": earlier, "response": "d"}, {"prompt": "User: e", "response": "Assistant: f"}
    )
    text, counted = text_and_counted(documents, 0)
    assert text == "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n∎"
    assert counted == " d\n\n∎"
    said = "\n".join(documents.statements)
    assert "Taken as they are, since the template (User: …, Assistant:) stands in them: 1 prompt." in said
    assert "Trained with their speaker's name twice, since they begin with it: 2 turns" in said


def test_line_ends_are_those_of_clients(tmp_path):
    documents = read_lines(tmp_path, {"text": "a\r\n\r\nb"}, {"prompt": "c\rd", "response": "e\r\nf"})
    assert text_and_counted(documents, 0)[0] == "a\n\nb∎"
    assert text_and_counted(documents, 1)[0] == "User: c\nd\n\nAssistant: e\nf\n\n∎"
    assert "4 line ends CR LF or CR read as LF, as clients send them." in documents.statements


def test_a_file_with_carriage_returns_only(tmp_path):
    (tmp_path / "data").write_bytes(b'{"text": "one"}\r\r{"text": "two"}\r')
    documents = open_documents("jsonl", str(tmp_path / "data"), 257, ctx_len=8)
    assert documents.numbers.tolist() == [1, 3]
    (tmp_path / "data").write_bytes(b"one\rtwo")
    documents = open_documents("utf-8", str(tmp_path / "data"), 257, ctx_len=8)
    assert BYTES.decode(documents.tokens(0)) == "one\ntwo"
    assert documents.statements == ("1 line end CR LF or CR read as LF, as clients send them.",)


def test_masks_are_exact_with_a_tokenizer_that_joins_characters(tmp_path):
    world = WorldTokenizer()
    documents = read_lines(tmp_path, {"prompt": "hi", "response": "好。"}, vocab_size=65536)
    prompt, answer = world.encode("User: hi\n\nAssistant:"), world.encode(" 好。\n\n")
    assert documents.tokens(0).tolist() == [*prompt, *answer, 0]
    assert documents.counted(0).tolist() == [False] * len(prompt) + [True] * (len(answer) + 1)


def test_blank_lines_inside_turns_are_replaced_and_counted(tmp_path):
    documents = read_lines(
        tmp_path,
        {"prompt": "a\n\nb\n\n\n\nc", "response": "\n\nd\r\n\r\ne\n\n"},
        {"prompt": "a\nb", "response": "c"},
    )
    assert text_and_counted(documents, 0)[0] == "User: a\nb\nc\n\nAssistant: d\ne\n\n∎"
    assert documents.statements[2].startswith("3 runs of blank lines inside turns replaced")


def test_counted_and_uncounted_documents_mix(tmp_path):
    documents = read_lines(tmp_path, {"text": "abc"}, {"prompt": "a", "response": "b"})
    assert documents.counted(0).all()
    assert documents.counted_targets(1000).tolist() == [3, 5]
    assert documents.counted_targets(len("User: a\n\nAssistant: b")).tolist() == [3, 2]
    assert documents.statements == (
        "Recognised as plain text, 1 text; prompt and response, 1 conversation.",
        WRITTEN.replace(
            "; the loss is on answers only", ": the loss is on answers only; of plain text it is on every token"
        ),
    )


def test_rendering_gives_a_prompt_as_clients_write_it():
    met = Rendering()
    parts = WORLD_CHAT.render([Turn("user", "x"), Turn("assistant", "y")], met)
    assert parts == [Part("User: x\n\nAssistant:", False), Part(" y\n\n", True)]
    assert met == Rendering()


def test_byte_order_mark_blank_lines_and_carriage_returns_are_tolerated(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}')
    documents = open_documents("jsonl", str(path), 257, ctx_len=8)
    assert BYTES.decode(documents.stream.tolist()) == "onetwo"
    assert documents.numbers.tolist() == [1, 4]


def test_empty_texts_are_left_out_and_counted(tmp_path):
    documents = read_lines(tmp_path, {"text": ""}, {"text": "a"})
    assert (documents.unit, documents.numbers.tolist()) == ("line", [2])
    assert documents.statements[1:] == ("1 line of fewer than two tokens left out.",)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'text': 'a'}", r"not valid JSON \(single quotes, as Python prints a dict: write it with json.dumps\)"),
        ("{text: 'a'}", r"not valid JSON \(Expecting property name .* at column 2\)"),
        ('{"text": "a"},', r"not valid JSON \(a comma behind it, as in an array: take the commas out\)"),
        ('{"text": "a"}, {"text": "b"}', r"not valid JSON \(Extra data at column 14\)"),
        ('{"text": "a"', "not valid JSON"),
        ('{"text": "a"', r"not valid JSON \(Expecting ',' delimiter at column 13\)"),
        ('{"text": "a', r"not valid JSON \(Unterminated string starting at column 10\)"),
        ('{"text": "a"} {"text": "b"}', r"not valid JSON \(Extra data at column 15\)"),
        ("[" * 100_000, "nested too deeply"),
        ('["a"]', "it is a list, expected an object"),
        ("7", "it is a number"),
        ("{}", "its keys are none"),
        (
            '{"content": "a", "prompt": "b"}',
            r"it has 'content', 'prompt', but no \"response\" or \"completion\", expected \{\"mess.*--sft_field",
        ),
        ('{"text": 5}', '"text" is a number, expected a string'),
        ('{"text": null}', '"text" is null'),
        (r'{"text": "a\ud800"}', "half of a surrogate pair"),
        ('{"prompt": "a", "response": ["b"]}', '"response" is a list'),
        ('{"prompt": "a", "chosen": "b"}', "preference pair; make pairs with PrepareOrpoDataset.py"),
        ('{"prompt": "a", "response": "b", "history": [["c"]]}', r'"history" is no list of \[question, answer\]'),
        ('{"prompt": "a", "response": "b", "history": [["c", 1]]}', '"history" is a number'),
        ('{"text": "a", "text": "b"}', "it has the key 'text' twice"),
        ('{"text": "a", "id": 1%s}' % ("0" * 5000), "a number of thousands of digits"),
        (r'{"text": "a\u0000b"}', '"text" holds a NUL character'),
        ('{"text": "a\0b"}', "a NUL character"),
        ('[{"text": "a"}]', "it is a list, expected an object"),
        ('{"messages": {}}', '"messages" is an object, expected a list'),
        ('{"messages": ["a"]}', "message 1 is a string, expected an object"),
        ('{"messages": [{"role": "user"}]}', 'message 1 has no "content"'),
        ('{"messages": [{"role": "user", "content": true}]}', '"content" is true or false'),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "role 'robot'; known are system, user, assistant, tool"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": {}}', '"tools" is an object, expected'),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"arguments": {}}]}]}',
            "message 1: a call has no name of a function",
        ),
        (
            '{"system": "s", "messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "a"}]}',
            'a "system" and a system message',
        ),
    ],
)
def test_a_malformed_line_is_named_with_file_number_and_reason(tmp_path, line, reason):
    with pytest.raises(DataError, match=rf"data\.jsonl, line 3: .*{reason}"):
        read_lines(tmp_path, {"text": "fine"}, "", line, {"text": "fine"})


@pytest.mark.parametrize("data_type", ["jsonl", "utf-8"])
class TestFilesThatCannotBeRead:
    def check_refused(self, data_type, path, message):
        with pytest.raises(DataError, match=message):
            open_documents(data_type, str(path), 257, ctx_len=8)

    def test_missing(self, data_type, tmp_path):
        self.check_refused(data_type, tmp_path / "none", "none does not exist; check the path")
        (tmp_path / "link").symlink_to("gone")
        self.check_refused(
            data_type, tmp_path / "link", "link does not exist; it is a link to gone, which is not there"
        )
        (tmp_path / "none.idx").touch()
        self.check_refused(data_type, tmp_path / "none", "use --data_type binidx")

    def test_directory(self, data_type, tmp_path):
        self.check_refused(data_type, tmp_path, "is a directory without data in it")

    @pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
    def test_empty(self, data_type, tmp_path, content):
        (tmp_path / "data").write_bytes(content)
        self.check_refused(data_type, tmp_path / "data", "data is empty")

    def test_blank(self, data_type, tmp_path):
        (tmp_path / "data").write_bytes(b"  \r\n\t\n")
        words = "data holds white space alone" if data_type == "utf-8" else "data is empty"
        self.check_refused(data_type, tmp_path / "data", words)

    def test_latin1(self, data_type, tmp_path):
        (tmp_path / "data").write_bytes(b'{"text": "a"}\n{"text": "\xe9t\xe9"}\n')
        self.check_refused(data_type, tmp_path / "data", r"data, line 2: not UTF-8 \(byte 0xe9")

    def test_nul(self, data_type, tmp_path):
        (tmp_path / "data").write_bytes(b'{"text": "a"}\n{"text": "b"}\0\0\n')
        self.check_refused(data_type, tmp_path / "data", "data, line 2: a NUL character")

    def test_pipes_and_devices(self, data_type, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        self.check_refused(data_type, tmp_path / "pipe", "pipe is a pipe; write what comes out of it to a file")
        self.check_refused(data_type, "/dev/zero", "/dev/zero is a device")

    def test_a_name_no_file_can_have(self, data_type, tmp_path):
        self.check_refused(data_type, tmp_path / ("n" * 300), "cannot be read: File name too long")

    def test_a_file_that_grows_while_it_is_read(self, data_type, tmp_path, monkeypatch):
        path = tmp_path / "data"
        path.write_bytes(b'{"text": "a"}\n')
        whole = os.fstat

        def grown(descriptor):
            status = whole(descriptor)
            with open(path, "ab") as file:
                file.write(b'{"text": "b"}\n')
            return status

        monkeypatch.setattr(os, "fstat", grown)
        self.check_refused(data_type, path, "was changed while it was read")

    def test_utf16(self, data_type, tmp_path):
        (tmp_path / "data").write_bytes('{"text": "a"}\n'.encode("utf-16"))
        self.check_refused(data_type, tmp_path / "data", "is UTF-16, expected UTF-8; convert it: `iconv")

    def test_vocabulary_without_tokenizer(self, data_type, tmp_path):
        with pytest.raises(DataError, match="vocabulary of 256"):
            open_documents(data_type, str(tmp_path / "data"), 256, ctx_len=8)


def test_lines_that_are_all_empty(tmp_path):
    with pytest.raises(DataError, match="longest line has one token"):
        read_lines(tmp_path, {"text": ""}, {"text": ""})


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 100])
def test_every_token_of_a_text_file_is_a_target_once(tmp_path, length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    (tmp_path / "book.txt").write_text(text)
    documents = open_documents("utf-8", str(tmp_path / "book.txt"), 257, ctx_len=8)
    assert documents.sizes.max() <= 9
    targets = np.concatenate([documents.tokens(index)[1:] for index in range(len(documents))])
    assert targets.tolist() == [*BYTES.encode(text)[1:], 0]
    assert bool(documents.statements) == (len(documents) > 1) == (length > 8)


def test_text_files_have_unix_lines_and_no_byte_order_mark(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    documents = open_documents("utf-8", str(tmp_path / "book.txt"), 257, ctx_len=8)
    assert documents.tokens(0).tolist() == [*BYTES.encode("a\nb\n"), 0]


@pytest.mark.parametrize("vocab_size", [3, 17, 65536])
def test_generated_data_are_the_same_every_time(vocab_size):
    first, second = (open_documents("dummy", "", vocab_size, ctx_len=8) for _ in range(2))
    assert len(first) == 64
    assert first.stream.max() < vocab_size
    assert (first.stream == second.stream).all()
    assert all(first.tokens(index)[-1] == 0 and (first.tokens(index)[:-1] > 0).all() for index in range(64))


def test_generated_data_need_a_vocabulary():
    with pytest.raises(DataError, match="at least 3 entries, not 2"):
        open_documents("dummy", "", 2, ctx_len=8)


class TestNamedFields:
    LINES = "".join(f'{{"q": "Why {n}?", "a": "For {n}.", "text": "other"}}\n\n' for n in range(4))

    def test_question_and_answer_by_name(self, tmp_path: Path) -> None:
        path = tmp_path / "named.jsonl"
        path.write_text(self.LINES, encoding="utf-8")
        documents = read_entries([str(path)], ByteTokenizer(), 257, fields=QA)
        plain = tmp_path / "plain.jsonl"
        plain.write_text(self.LINES.replace('"q"', '"prompt"').replace('"a"', '"response"'), encoding="utf-8")
        expected = read_entries([str(plain)], ByteTokenizer(), 257)
        assert np.array_equal(documents.stream, expected.stream)
        assert np.array_equal(documents.stream_counted, expected.stream_counted)

    def test_some_of_the_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "named.jsonl"
        path.write_text(self.LINES, encoding="utf-8")
        made = read_entries([str(path)], ByteTokenizer(), 257, fields=QA, part=slice(1, 3))
        assert made.numbers.tolist() == [3, 5]
        assert len(read_entries([str(path)], ByteTokenizer(), 257, part=slice(None, 100))) == 4
        for part in (slice(0, 0), slice(99, 100)):
            with pytest.raises(DataError, match="--sft_split takes none of the entries"):
                read_entries([str(path)], ByteTokenizer(), 257, fields=QA, part=part)
        path.write_text("\n", encoding="utf-8")
        with pytest.raises(DataError, match="holds no tokens to train on"):
            read_entries([str(path)], ByteTokenizer(), 257, fields=QA, part=slice(1, 3))

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"q": "a"}', "its keys are 'q', and --sft_field names 'a'"),
            ('{"q": 1, "a": "b"}', '"q" is a number, expected a string'),
            (
                '{"q": "x", "a": null}',
                "cannot be used, because every entry is left out: 1 with an empty answer (first: ",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, line: str, reason: str, tmp_path: Path) -> None:
        path = tmp_path / "named.jsonl"
        path.write_text(line, encoding="utf-8")
        with pytest.raises(DataError, match="line 1") as refused:
            read_entries([str(path)], ByteTokenizer(), 257, fields=QA)
        assert reason in str(refused.value)
