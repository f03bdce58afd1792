"""Which tokens the loss is taken on: documents built by hand, and random ones against a marker of another make."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from binidx_files import write_binidx

from src.config.data import BY_DATA, LossMask
from src.data.documents import Documents
from src.data.masks import Marker
from src.data.sources import open_documents
from src.errors import DataError
from src.tokenizer import ByteTokenizer, Decoder, PlainBytes, Tokenizer, WorldTokenizer

WORLD = WorldTokenizer()
BYTES = ByteTokenizer()
QA = LossMask("qa")
END = "∎"
NAMES = ("System", "User", "Assistant", "Question", "Answer", "Instruction", "Input", "Response")
FAMILIES = (({"User"}, "Assistant"), ({"Question"}, "Answer"), ({"Instruction", "Input"}, "Response"))


def between(begin: str, end: str) -> LossMask:
    return LossMask("se", begin, end)


def encoded(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of a text in which ∎ ends documents."""
    ids: list[int] = []
    for number, part in enumerate(text.split(END)):
        ids += [0] * (number > 0) + tokenizer.encode(part)
    return np.array(ids, np.int64)


def shown(text: str, mask: LossMask = QA, tokenizer: Tokenizer = BYTES) -> str:
    """The text with what counts in braces."""
    tokens = encoded(text, tokenizer)
    counted = Marker(mask, tokenizer).mark(tokens, 0)
    content, before = b"", False
    for token, counts in zip(tokens.tolist(), counted.tolist(), strict=True):
        content += (b"" if counts == before else b"{" if counts else b"}") + (
            END.encode() if token == 0 else tokenizer.decode_bytes([token])
        )
        before = counts
    return (content + b"}" * before).decode()


@pytest.mark.parametrize("tokenizer", [BYTES, WORLD], ids=["bytes", "World"])
@pytest.mark.parametrize(
    "expected",
    [
        # whole conversations
        "User: a\n\nAssistant:{ b\n\n∎}",
        "User: a\n\nAssistant:{ b\n\n}User: c\n\nAssistant:{ d∎}",
        "User: a\n\nAssistant:{ b\n\n}User: bye\n\n∎",
        "System: s\n\nUser: a\n\nAssistant:{ b}",
        "\n\nUser: a\n\nAssistant:{ b\n\n∎}",
        "Assistant:{ hello\n\n}User: a\n\nAssistant:{ b∎}",
        "The following is a talk.\n\nUser: a\n\nAssistant:{ b∎}",
        # several systems
        "System: s\n\nSystem: t\n\nUser: a\n\nAssistant:{ b\n\n}System: u\n\nUser: c\n\nAssistant:{ d\n\n∎}",
        # answers of several paragraphs, and longer breaks
        "User: a\n\nb\n\nAssistant:{ c\n\nd\n\n\n\n}User: e\n\nAssistant:{ f\n\n\n∎}",
        "User: a\n \t\nAssistant:{ b\n  \n}User: c\n\n\n\n\nAssistant:{ d∎}",
        # labels inside what is said
        "User: is Assistant: a word?\n\nAssistant:{ User: and Assistant: are.\n\n∎}",
        "User: a\nAssistant: quoted\n\nAssistant:{ b\nUser: quoted\nAssistant: too\n\n∎}",
        "User: a\n\n Assistant: indented\n\nAssistant:{ b\n\n\tUser: indented∎}",
        "User: a\n\nAssistants: many\n\nAssistant :no\n\nassistant: no\n\nAssistant:{ b∎}",
        "User: Question: 1?\n\nQuestion: 2?\n\nAnswer: 3\n\nAssistant:{ Answer: 4\n\nQuestion: 5∎}",
        # quotes and other signs after the colon
        'User: a\n\nAssistant:{ "b"\n\n∎}',
        "User: a\n\nAssistant:{ (b)∎}",
        "User: a\n\nAssistant:{ 好。\n\n}User: 你\n\nAssistant:{ 👩‍👩‍👧∎}",
        # other line ends
        "User: a\r\n\r\nAssistant:{ b\r\n\r\n}User: c\r\n\r\nAssistant:{ d\r\n\r\n∎}",
        "User: a\r\rAssistant:{ b\r\r}User: c\r\rAssistant:{ d∎}",
        "User: a\r\nAssistant: no\r\n\r\nAssistant:{ b\r\nUser: no∎}",
        # other speakers
        "Question: a\n\nAnswer:{ b\n\n}Question: c\n\nAnswer:{ d\n\nUser: e∎}",
        "Instruction: a\n\nInput: b\n\nResponse:{ c\n\n}Instruction: d\n\nResponse:{ e∎}",
        # turns that are lines
        "User: a\nAssistant:{ b\n}User: c\nAssistant:{ d\n∎}",
        "User: a\r\nAssistant:{ b\r\n}User: c\r\nAssistant:{ d∎}",
        # several documents in one
        "User: a\n\nAssistant:{ b\n\n∎}User: c\n\nAssistant:{ d∎}Assistant:{ e∎}no∎∎",
        # nothing to learn
        "User: a\n\nUser talks of the Assistant: no∎",
        "User: a\n\nAssistant:\n\n∎",
        "User: a\n\nAssistant: \n\nUser: b\n\nAssistant:{ c∎}",
        "prose∎",
        "",
    ],
)
def test_answers(expected: str, tokenizer: Tokenizer) -> None:
    assert shown(expected.replace("{", "").replace("}", ""), tokenizer=tokenizer) == expected


@pytest.mark.parametrize(
    ("expected", "bytes_too"),
    [
        # A token that begins in the label belongs to the label: `:"` and `:**` are one token each.
        ('User: a\n\nAssistant:"{b"∎}', False),
        ('User: a\n\nAssistant:{"b"∎}', True),
        ("User: a\n\nAssistant:**{b**∎}", False),
        ("User: a\n\nAssistant:{\nb∎}", False),
        ("User: a\n\nAssistant:{\nb∎}", True),
    ],
)
def test_signs_at_once_after_the_colon(expected: str, bytes_too: bool) -> None:
    text = expected.replace("{", "").replace("}", "")
    assert shown(text, tokenizer=BYTES if bytes_too else WORLD) == expected


@pytest.mark.parametrize("tokenizer", [BYTES, WORLD], ids=["bytes", "World"])
@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        ("<a>", "</a>", "x <a>{ y </a>} z <a>{ w∎}"),
        ("<a>", "</a>", "</a> x <a>{ y <a> z</a>∎}"),
        ("<a>", "</a>", "<a></a> <a> </a> x∎<a>{y</a>∎}"),
        ("Assistant:", "User:", "User: a\n\nAssistant:{ b\n\nUser:} c\n\nAssistant:{ d\n\n∎}"),
        ("\n\nAssistant:", "\n\n", "User: a\r\n\r\nAssistant:{ b\r\n\r\n}User: c\n\nAssistant:{ d\r\r}e∎"),
        ("a.", "b*", "ab ab aa a.{ bb b*} b*∎"),
    ],
)
def test_between_two_texts(begin: str, end: str, expected: str, tokenizer: Tokenizer) -> None:
    text = expected.replace("{", "").replace("}", "")
    assert shown(text, between(begin, end), tokenizer) == expected


def lines_of(text: str) -> list[str]:
    """Lines with their ends: LF, CR LF or CR."""
    lines, line = [], ""
    for place, character in enumerate(text):
        line += character
        if character == "\n" or (character == "\r" and text[place + 1 : place + 2] != "\n"):
            lines.append(line)
            line = ""
    return [*lines, line]


def labels(text: str, *, blank_line: bool) -> list[tuple[int, int, str]]:
    """(begin, end, name) of every label of a turn, line by line."""
    found, place, before = [], 0, ""
    for line in lines_of(text):
        at_start = not text[:place].strip()
        indent = len(line) - len(line.lstrip()) if at_start else 0
        if at_start or not blank_line or not before.strip(" \t\r\n"):
            for name in NAMES:
                if line[indent:].startswith(f"{name}:"):
                    found.append((place + indent, place + indent + len(name) + 1, name))
        place += len(line)
        before = line
    return found


def answer_characters(text: str) -> list[bool]:
    """Whether each character of a document belongs to an answer, and at last whether its end does."""
    flags = [False] * (len(text) + 1)
    for blank_line in (True, False):
        found = labels(text, blank_line=blank_line)
        names = [name for _, _, name in found]
        for name in names:
            family = next((f for f in FAMILIES if name in f[0] or name == f[1]), None)
            if family and family[1] in names:
                found = [label for label in found if label[2] in {*family[0], family[1], "System"}]
                speakers = [label for _, _, label in found]
                if any(first == second != "System" for first, second in pairwise(speakers)):
                    return flags
                for number, (_, end, label) in enumerate(found):
                    until = found[number + 1][0] if number + 1 < len(found) else len(text) + 1
                    if label == family[1] and text[end:until].strip():
                        flags[end:until] = [True] * (until - end)
                return flags
    return flags


def between_characters(begin: str, end: str) -> Callable[[str], list[bool]]:
    def characters(text: str) -> list[bool]:
        flags, place = [False] * (len(text) + 1), 0
        while (found := text.find(begin, place)) >= 0:
            found += len(begin)
            closed = text.find(end, found)
            place = closed + len(end) if closed >= 0 else len(text) + 1
            if text[found : closed if closed >= 0 else None].strip():
                flags[found:place] = [True] * (place - found)
            if place == len(text):
                flags[place] = flags[place - 1]
        return flags

    return characters


def by_characters(tokens: list[int], decoder: Decoder, characters: Callable[[str], list[bool]]) -> list[bool]:
    """The marks of tokens from those of the characters they begin in, one token and one character at a time."""
    marks: list[bool] = []
    document: list[int] = []
    for token in [*tokens, None]:
        if token is not None and token != decoder.ends_documents:
            document.append(token)
            continue
        text = b"".join(decoder.decode_bytes([t]) for t in document).decode(decoder.encoding)
        flags = characters(text)
        of_bytes = [flag for flag, c in zip(flags, text, strict=False) for _ in range(len(c.encode(decoder.encoding)))]
        place = 0
        for member in document:
            marks.append(of_bytes[place])
            place += len(decoder.decode_bytes([member]))
        if token is not None:
            marks.append(bool(document) and flags[-1])
        document = []
    return marks


PIECES = (
    *(f"{name}:" for name in NAMES), "User:", "Assistant:", "User:", "Assistant:", 'Assistant:"', "Assistant: ",
    "User :", " User:", "\tAssistant:", "assistant:", "<a>", "</a>", "<a>", "</a>",
    "\n", "\n\n", "\n\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r\n\r\n", "\r", "\r\r", "\n \t\n", "\n\r\n", "\n ",
    " ", "a", " word", "Hi.", "。", "好", "é", "👩‍👩‍👧", '"', "(", ":", "1. ", "\u2028", "\x85", "\u3000", END,
)  # fmt: skip


def random_document(generator: random.Random) -> str:
    begin = generator.choice(("", "", "User: ", "System: x\n\nUser:", "Question:"))
    return begin + "".join(generator.choices(PIECES, k=generator.randrange(1, 18)))


def test_ten_thousand_random_documents_against_another_marker() -> None:
    generator = random.Random(13)
    cases = ((QA, answer_characters), (between("<a>", "</a>"), between_characters("<a>", "</a>")))
    markers = [(Marker(mask, tokenizer), tokenizer, of) for mask, of in cases for tokenizer in (BYTES, WORLD)]
    counted = total = 0
    for number in range(10_000):
        marker, tokenizer, characters = markers[number % 4]
        text = random_document(generator)
        tokens = encoded(text, tokenizer)
        found = marker.mark(tokens, number).tolist()
        assert found == by_characters(tokens.tolist(), tokenizer, characters), (number, text)
        counted += sum(found)
        total += len(found)
    assert 0.1 < counted / total < 0.9


def test_bytes_of_utf16_are_read_as_such() -> None:
    generator = random.Random(14)
    for number in range(200):
        text = "User:" + random_document(generator).replace(END, "")
        tokens = list(text.encode("utf-16-le"))
        decoder = PlainBytes(tokens)
        found = Marker(QA, decoder).mark(np.array(tokens), number).tolist()
        assert found == by_characters(tokens, decoder, answer_characters), text


@pytest.mark.parametrize("vocab_size", [256, 257, 65536])
def test_tokens_that_are_no_text_are_no_trouble(vocab_size: int) -> None:
    generator = np.random.default_rng(15)
    for number in range(200):
        tokens = generator.integers(0, vocab_size, size=generator.integers(0, 40))
        decoder: Decoder = {256: PlainBytes(tokens.tolist()), 257: BYTES, 65536: WORLD}[vocab_size]
        answer = (
            decoder.encode("User: a\n\nAssistant: b") if isinstance(decoder, (ByteTokenizer, WorldTokenizer)) else []
        )
        assert len(Marker(QA, decoder).mark(np.array([*answer, *tokens], np.int64), number)) == len(tokens) + len(
            answer
        )


CONTENTS = (
    "hi", "Assistant: x", "User: y\nAssistant: z", "a\n\nUser: b", "a\r\n\r\nAssistant: c", '"quoted"', "(x)", "好。",
    "Answer: 4\n\nQuestion: 5", "1.\n\n2.\n\n", " padded ", "System: none", ":", "é\n",
)  # fmt: skip


@pytest.mark.parametrize("vocab_size", [257, 65536])
def test_by_text_as_by_structure(vocab_size: int, tmp_path: Path) -> None:
    """Chats from JSON lines, marked by their roles, and the same tokens as binidx, marked by their text."""
    generator = random.Random(16)
    lines = []
    for _ in range(120):
        roles = ["system"] * generator.randrange(2) + ["user", "assistant"] * generator.randrange(1, 4)
        roles = roles[: len(roles) - (len(roles) > 3 and generator.randrange(2))]
        lines.append({"messages": [{"role": role, "content": generator.choice(CONTENTS)} for role in roles]})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    by_role = open_documents("jsonl", str(path), vocab_size, ctx_len=64)
    count = len(by_role)
    write_binidx(tmp_path / "chats", [by_role.tokens(index) for index in range(count)], np.int32)
    by_text = open_documents("binidx", str(tmp_path / "chats"), vocab_size, ctx_len=64, mask=QA)
    assert [by_text.counted(i).tolist() for i in range(count)] == [by_role.counted(i).tolist() for i in range(count)]
    assert np.array_equal(by_text.counted_targets(30), by_role.counted_targets(30))


CHAT = {"prompt": "a", "response": "b"}
TURNS = {"text": "User: a\n\nAssistant: b"}
PROSE = {"text": "prose"}


class TestReaders:
    def lines(self, folder: Path, *entries: object, mask: LossMask = QA, vocab_size: int = 257) -> Documents:
        path = folder / "data.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        return open_documents("jsonl", str(path), vocab_size, ctx_len=64, mask=mask)

    def counts(self, documents: Documents) -> list[int]:
        return documents.counted_targets(1000).tolist()

    def test_lines_by_role_and_by_text(self, tmp_path: Path) -> None:
        answer = len(" b\n\n") + 1
        assert self.counts(self.lines(tmp_path, CHAT, TURNS, mask=BY_DATA)) == [answer, len(TURNS["text"])]
        documents = self.lines(tmp_path, CHAT, TURNS)
        assert self.counts(documents) == [answer, len(" b") + 1]
        assert documents.statements[1:] == (
            'Conversations are written in the template World chat, "User: …\\n\\nAssistant: …\\n\\n"; the loss is on '
            "answers only.",
        )

    @pytest.mark.parametrize("kind", ["none", "pad"])
    def test_every_token_of_a_conversation(self, kind: str, tmp_path: Path) -> None:
        documents = self.lines(tmp_path, CHAT, TURNS, mask=LossMask(kind))
        assert documents.stream_counted is None
        said = 'Conversations are written in the template World chat, "User: …\\n\\nAssistant: …\\n\\n".'
        assert documents.statements[1:] == (said,)

    def test_between_texts_whatever_the_roles(self, tmp_path: Path) -> None:
        documents = self.lines(
            tmp_path, {**CHAT, "response": "x<a>y</a>z"}, {"text": "<a>"}, mask=between("<a>", "</a>")
        )
        assert self.counts(documents) == [len("y</a>"), 0]
        assert documents.statements[2:] == (
            "Stretches without text, which are not trained on: 1.",
            "1 of 2 lines hold nothing that the loss is taken on.",
        )

    def test_lines_without_an_answer_are_counted(self, tmp_path: Path) -> None:
        assert (
            "2 of 3 lines hold nothing that the loss is taken on."
            in self.lines(tmp_path, PROSE, TURNS, PROSE).statements
        )
        assert self.counts(self.lines(tmp_path, CHAT, PROSE))[1] == 0

    def test_what_is_met_is_said(self, tmp_path: Path) -> None:
        said = self.lines(
            tmp_path, {"text": "User: a\nAssistant: b"}, {"text": f"User: b\n\nAssistant:\n\n{TURNS['text']}"}
        )
        assert said.statements[1:] == (
            "Turns are told apart by line ends alone, for want of blank lines, in 1 of 2 lines.",
            "Answers without text, which are not trained on: 1.",
        )
        said = self.lines(tmp_path, {"text": "<a>b"}, {"text": "<a>b</a>"}, mask=between("<a>", "</a>"))
        assert said.statements[1:] == ("Up to the end of the document, for want of '</a>': 1 stretches.",)

    @pytest.mark.parametrize(
        ("mask", "entries", "message"),
        [
            (
                QA,
                [PROSE, PROSE],
                "of 2 lines none holds an answer, which begins with Assistant: or Answer: or Response: at",
            ),
            (
                QA,
                [PROSE, {"text": "the Assistant: no"}],
                "at the start of a line, though 1 hold such a word; --loss_mask",
            ),
            (
                QA,
                [PROSE, {"text": "User: a\n\nUser: b\n\nAssistant: c"}],
                r"in 1 of 2 lines a speaker follows themselves \(first in number 2: User: after User: at character 9\)",
            ),
            (QA, [{"text": "Assistant: a\n\nAssistant: b"}], r"Assistant: after Assistant: at character 14\)"),
            (between("<a>", "</a>"), [PROSE], "of 1 line none holds '<a>' or '</a>' of --mask_id; compare with"),
            (between("prose", "</a>"), [CHAT, PROSE], "of 2 lines none holds '</a>' of --mask_id; compare"),
            (
                between("</a>", "<a>"),
                [{"text": "<a>x</a>"}],
                "of 1 line none holds a text between '</a>' and '<a>'; mask1 of --mask_id begins, mask0 ends",
            ),
        ],
    )
    def test_what_cannot_be_masked_is_refused(
        self, mask: LossMask, entries: list[object], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(DataError, match=message) as refused:
            self.lines(tmp_path, *entries, mask=mask)
        assert f"cannot be used with --loss_mask {mask.kind}: " in str(refused.value)

    def test_a_text_in_which_a_speaker_follows_themselves_is_not_learnt_from(self, tmp_path: Path) -> None:
        documents = self.lines(tmp_path, CHAT, {"text": "User: a\n\nUser: b\n\nAssistant: c"}, mask=QA)
        learnt = [documents.counted(index) for index in range(2)]
        assert [bool(counted is None or counted.any()) for counted in learnt] == [True, False]
        assert (
            "Not learnt from, since a speaker follows themselves there: 1 of 1 line (first in number 2: User: after "
            "User: at character 9)."
        ) in documents.statements

    def test_a_text_file_is_one_conversation(self, tmp_path: Path) -> None:
        path = tmp_path / "talk.txt"
        path.write_bytes(b"User: a\r\n\r\nAssistant: b\r\n\r\nUser: c and a long question\r\n\r\nAssistant: d")
        documents = open_documents("utf-8", str(path), 257, ctx_len=8, mask=QA)
        assert BYTES.decode(documents.stream[documents.stream_counted].tolist()) == " b\n\n d"
        counted = sum(documents.counted(index)[1:].sum() for index in range(len(documents)))
        assert counted == len(" b\n\n d") + 1
        path.write_text("prose", encoding="utf-8")
        with pytest.raises(DataError, match="of 1 document none holds an answer"):
            open_documents("utf-8", str(path), 257, ctx_len=8, mask=QA)

    def test_conversations_that_are_not_masked_are_mentioned(self, tmp_path: Path) -> None:
        hint = "2 of 3 lines looked at are conversations: --loss_mask qa takes the loss on their answers only."
        assert self.lines(tmp_path, TURNS, TURNS, PROSE, mask=BY_DATA).statements[2:] == (hint,)
        for mask, entries in ((BY_DATA, (TURNS, PROSE, PROSE)), (LossMask("pad"), (TURNS,)), (BY_DATA, (TURNS, CHAT))):
            assert not any("--loss_mask" in said for said in self.lines(tmp_path, *entries, mask=mask).statements)

    def test_a_vocabulary_that_nothing_reads(self, tmp_path: Path) -> None:
        write_binidx(tmp_path / "data", [[1, 2, 3]])
        with pytest.raises(DataError, match="No tokenizer is known for a vocabulary of 1000"):
            open_documents("binidx", str(tmp_path / "data"), 1000, ctx_len=8, mask=QA)


def test_answers_of_real_documents(real_inputs: Path) -> None:
    """182 chats of several kinds, as text and as bytes of UTF-16: the same answers, found by plain splitting."""
    utf16 = open_documents("binidx", str(real_inputs / "demo-utf16"), 256, ctx_len=64, mask=QA)
    world = open_documents("jsonl", str(real_inputs / "demo.jsonl"), 65536, ctx_len=64, mask=QA)
    lines = (real_inputs / "demo.jsonl").read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        (answer,) = json.loads(line)["text"].split("\n\nAssistant:")[1:]
        assert bytes(utf16.tokens(index)[utf16.counted(index)].tolist()).decode("utf-16-le") == answer
        assert WORLD.decode(world.tokens(index)[world.counted(index)].tolist()) == answer
        assert world.counted(index)[-1]
    assert not any("hold nothing" in said for said in (*utf16.statements, *world.statements))
