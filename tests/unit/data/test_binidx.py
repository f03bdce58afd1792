"""The binidx reader, and every file that is refused."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from binidx_files import write_binidx

from src.data.binidx import read_binidx
from src.data.sources import open_documents
from src.data.token_file import FileTokens
from src.errors import DataError
from src.tokenizer import ByteTokenizer, WorldTokenizer

DOCUMENTS = [[5, 6, 7, 0], [9, 10, 0], [1, 0]]


@pytest.fixture
def prefix(tmp_path):
    path = str(tmp_path / "data")
    write_binidx(path, DOCUMENTS)
    return path


def edit_index(prefix, offset, replacement):
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[offset : offset + len(replacement)] = replacement
    Path(f"{prefix}.idx").write_bytes(content)


def test_the_index_has_the_documented_bytes(prefix):
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 4, 3, 2) + struct.pack("<3q", 0, 8, 14) + struct.pack("<4q", 0, 1, 2, 3)
    assert Path(f"{prefix}.idx").read_bytes() == expected
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<9H", 5, 6, 7, 0, 9, 10, 0, 1, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_every_integer_type_reads_back(tmp_path, dtype):
    largest = int(min(np.iinfo(dtype).max, 2**40))
    write_binidx(tmp_path / "data", [*DOCUMENTS, [largest, 0]], dtype)
    documents = read_binidx(str(tmp_path / "data"), largest + 1)
    assert documents.stream.dtype == dtype
    assert not isinstance(documents.stream, np.memmap)
    assert [documents.tokens(i).tolist() for i in range(4)] == [*DOCUMENTS, [largest, 0]]
    assert documents.tokens(0).dtype == np.int64


def test_a_suffix_is_tolerated(prefix):
    for suffix in (".bin", ".idx"):
        assert len(read_binidx(prefix + suffix, 11)) == 3


def test_items_are_documents_even_where_the_document_index_joins_them(prefix):
    content = Path(f"{prefix}.idx").read_bytes()[:-32] + struct.pack("<2q", 0, 3)
    Path(f"{prefix}.idx").write_bytes(content)
    edit_index(prefix, 26, struct.pack("<Q", 2))
    assert read_binidx(prefix, 11).sizes.tolist() == [4, 3, 2]


def test_token_zero_is_no_border(tmp_path):
    write_binidx(tmp_path / "data", [[104, 0, 105, 0], [33, 0]], np.uint8)
    assert read_binidx(str(tmp_path / "data"), 256).sizes.tolist() == [4, 2]


def test_short_documents_are_left_out_and_counted(tmp_path):
    write_binidx(tmp_path / "data", [[0], [5, 0], [], [6, 7]])
    documents = read_binidx(str(tmp_path / "data"), 8)
    assert documents.numbers.tolist() == [1, 3]
    assert documents.tokens(1).tolist() == [6, 7]
    assert documents.unit == "document"
    assert documents.statements == ("2 documents of fewer than two tokens left out.",)


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_a_missing_file_is_named(prefix, suffix):
    os.remove(f"{prefix}.{suffix}")
    with pytest.raises(DataError, match=rf"data\.{suffix} is missing"):
        read_binidx(prefix, 11)


def test_text_given_as_binidx_is_recognised(tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}")
    for name in ("chats", "chats.jsonl"):
        with pytest.raises(DataError, match=r"--data_type jsonl --data_file .*chats\.jsonl"):
            read_binidx(str(tmp_path / name), 11)


@pytest.mark.parametrize(
    ("offset", "replacement", "message"),
    [
        (0, b"NOTANIDX\x00", "no binidx index"),
        (0, b"TNTIDX\x00\x00", "older kind TNTIDX"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x06", "floating-point"),
        (17, b"\x07", "floating-point"),
        (17, b"\x00", "dtype code 0; known are 1, 2, 3, 4, 5, 8"),
        (17, b"\x04", r"disagree: the index speaks of 36 bytes|should begin at byte 16"),
        (18, struct.pack("<Q", 4), "is damaged: 102 bytes"),
        (18, struct.pack("<Q", 2**63), "is damaged: 102 bytes"),
        (34, struct.pack("<i", -4), "document 0 has -4 tokens"),
        (38, struct.pack("<i", 2), "document 2 should begin at byte 12, it says 14"),
        (42, struct.pack("<i", 9), "disagree: the index speaks of 32 bytes of uint16 tokens, .* has 18"),
        (54, struct.pack("<q", 2), "document 1 should begin at byte 8, it says 2"),
        (78, struct.pack("<q", 5), "document index does not ascend from 0 to 3"),
        (94, struct.pack("<q", -1), "document index does not ascend"),
    ],
)
def test_a_damaged_index_is_refused(prefix, offset, replacement, message):
    edit_index(prefix, offset, replacement)
    with pytest.raises(DataError, match=message):
        read_binidx(prefix, 11)


@pytest.mark.parametrize("length", [0, 5, 20, 33, 34, 60, 101])
def test_an_index_cut_short_is_refused(prefix, length):
    Path(f"{prefix}.idx").write_bytes(Path(f"{prefix}.idx").read_bytes()[:length])
    with pytest.raises(DataError, match=r"no binidx index|is cut short|is damaged"):
        read_binidx(prefix, 11)


@pytest.mark.parametrize("change", [-1, -18, 2])
def test_tokens_of_another_length_are_refused(prefix, change):
    content = Path(f"{prefix}.bin").read_bytes() + b"\x00\x00"
    Path(f"{prefix}.bin").write_bytes(content[: len(content) - 2 + change])
    with pytest.raises(DataError, match=r"data\.idx and .*data\.bin disagree"):
        read_binidx(prefix, 11)


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_empty_data_are_refused(tmp_path, documents):
    write_binidx(tmp_path / "data", documents)
    with pytest.raises(DataError, match="is empty"):
        read_binidx(str(tmp_path / "data"), 11)


def test_documents_of_one_token_are_refused(tmp_path):
    write_binidx(tmp_path / "data", [[1], [2], []])
    with pytest.raises(DataError, match="longest document has one token"):
        read_binidx(str(tmp_path / "data"), 11)


def test_a_token_beyond_the_vocabulary_is_named(prefix):
    with pytest.raises(DataError, match=r"token id 10 in document 1, but the model's .* ids 0 to 9;"):
        read_binidx(prefix, 10)


def test_a_negative_token_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("src.data.documents._BLOCK_TOKENS", 4)
    write_binidx(tmp_path / "data", [[1, 2, 3], [4, 5, 6], [7, -8]], np.int32)
    with pytest.raises(DataError, match="token id -8 in document 2"):
        read_binidx(str(tmp_path / "data"), 65536)


class TestTokensThatStayInTheirFile:
    @pytest.fixture(autouse=True)
    def nothing_fits(self, monkeypatch):
        monkeypatch.setattr("src.data.binidx._IN_MEMORY_BYTES", 4)

    def test_slices_are_those_of_the_array(self, prefix):
        documents = read_binidx(prefix, 11)
        assert isinstance(documents.stream, FileTokens)
        everything = np.fromfile(f"{prefix}.bin", np.uint16)
        assert len(documents.stream) == len(everything) == documents.total_tokens
        for span in (slice(0, 3), slice(2, 100), slice(5, 5), slice(None)):
            assert documents.stream[span].tolist() == everything[span].tolist()
        assert documents.tokens(0).tolist() == everything[:4].tolist()

    @pytest.mark.parametrize("content", [b"", b"\1\0" * 8, b"\1\0" * 10])
    def test_a_file_cut_short_or_grown_under_the_run_is_refused(self, prefix, content):
        documents = read_binidx(prefix, 11)
        Path(f"{prefix}.bin").write_bytes(content)
        with pytest.raises(DataError, match=r"data\.bin was changed while the program reads it: it had 18 bytes, now"):
            documents.tokens(1)

    def test_a_file_written_over_is_refused(self, prefix):
        documents = read_binidx(prefix, 11)
        Path(f"{prefix}.bin").write_bytes(b"\1\0" * 9)
        os.utime(f"{prefix}.bin", (1, 1))  # clocks of file systems are coarse
        with pytest.raises(DataError, match="was changed while"):
            documents.tokens(0)

    def test_a_file_replaced_by_another_goes_unnoticed(self, prefix):
        documents = read_binidx(prefix, 11)
        before = documents.tokens(0).tolist()
        Path(f"{prefix}.new").write_bytes(b"")
        os.replace(f"{prefix}.new", f"{prefix}.bin")
        assert documents.tokens(0).tolist() == before

    def test_an_id_out_of_range_that_appears_later_is_refused(self, prefix):
        documents = read_binidx(prefix, 11)
        status = os.stat(f"{prefix}.bin")
        Path(f"{prefix}.bin").write_bytes(b"\1\0" * 2 + b"\xff\0" + b"\1\0" * 6)
        os.utime(f"{prefix}.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(DataError, match=r"holds id 255 as token 2, .* it did not when the run began"):
            documents.tokens(0)

    def test_an_id_out_of_range_names_its_document(self, prefix):
        with pytest.raises(DataError, match=r"token id 10 in document 1, but the model's"):
            read_binidx(prefix, 10)


def test_what_happens_to_a_small_file_does_not_touch_the_run(prefix):
    documents = read_binidx(prefix, 11)
    before = documents.tokens(0).tolist()
    Path(f"{prefix}.bin").write_bytes(b"")
    assert documents.tokens(0).tolist() == before


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_pipes_and_folders_are_refused(prefix, suffix):
    os.remove(f"{prefix}.{suffix}")
    os.mkfifo(f"{prefix}.{suffix}")
    with pytest.raises(DataError, match=rf"data\.{suffix} is a pipe"):
        read_binidx(prefix, 11)
    os.remove(f"{prefix}.{suffix}")
    os.mkdir(f"{prefix}.{suffix}")
    with pytest.raises(DataError, match=rf"data\.{suffix} is a directory"):
        read_binidx(prefix, 11)


class TestTokensAsText:
    def statements(self, tmp_path, documents, vocab_size):
        write_binidx(tmp_path / "data", documents)
        return open_documents("binidx", str(tmp_path / "data"), vocab_size, ctx_len=64).statements

    @pytest.mark.parametrize(("vocab_size", "tokenizer"), [(257, ByteTokenizer()), (65536, WorldTokenizer())])
    def test_own_tokens(self, tmp_path, vocab_size, tokenizer):
        text = "User: Où est\n\nAssistant: là-bas. " * 3
        said, hint = self.statements(tmp_path, [[*tokenizer.encode(text), 0], [1, 2]], vocab_size)
        assert said == f"Document 0 begins {text[:60]!r}…"
        assert hint.startswith("1 of 2 documents looked at are conversations: --loss_mask qa")

    def test_tokens_of_another_tokenizer(self, tmp_path):
        text = "The quick brown fox jumps over the lazy dog. "
        _, said = self.statements(tmp_path, [[*ByteTokenizer().encode(text), 0]], 65536)
        assert said.startswith("warning: 96% of the tokens looked at are not what the tokenizer of this vocabulary")

    def test_no_text(self, tmp_path):
        first, said = self.statements(tmp_path, [[200, 201, 202, 203]], 257)
        assert first == f"Document 0 begins {chr(0xFFFD) * 4!r}"
        assert said.startswith("warning: 100%")

    def test_a_vocabulary_without_tokenizer(self, tmp_path):
        assert self.statements(tmp_path, [[200, 201]], 1000) == ()
