"""Encoding, decoding, and text that arrives token by token."""

import random

import pytest

from src.errors import DataError
from src.tokenizer import (
    ByteTokenizer,
    PlainBytes,
    WorldTokenizer,
    _world_tokenizer,
    decoder_for_vocabulary,
    tokenizer_for_vocabulary,
)

SCRIPTS = "Hello, wörld! 你好。\n\nこんにちは 👩‍👩‍👧 Привет\r\n\tदेवनागरी ﷽ \x00 \U0010ffff"


@pytest.fixture(scope="module")
def world():
    return WorldTokenizer()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("\x00", [1]),
        ("\n", [11]),
        ("\n\n", [261]),
        ("User:", [24281, 59]),
        ("Assistant:", [5585, 41693, 59]),
        ("User: hi\n\nAssistant:", [24281, 59, 4571, 261, 5585, 41693, 59]),
        (" hi\n\n", [4571, 261]),
        ("。\n\n", [28329, 11]),
        (" \n\n", [3336]),
        ("  \n\n", [3339, 11]),
    ],
)
def test_world_ids_are_those_of_the_reference(world, text, ids):
    assert world.encode(text) == ids
    assert world.decode(ids) == text


def test_world_entries_are_complete_and_the_first_256_are_the_bytes(world):
    entries = [world.decode_bytes([token]) for token in range(65530)]
    assert entries[0] == b""
    assert entries[1:257] == [bytes([byte]) for byte in range(256)]
    assert len(set(entries)) == 65530
    assert max(map(len, entries)) == 128


def test_world_greedily_takes_the_longest_entry(world):
    entries = {world.decode_bytes([token]): token for token in range(1, 65530)}
    generator = random.Random(5)
    text = "".join(generator.choice([*SCRIPTS, " the", "\n\n", "    ", "tion"]) for _ in range(2000))
    data, expected = text.encode(), []
    while data:
        length = next(n for n in range(128, 0, -1) if data[:n] in entries)
        expected.append(entries[data[:length]])
        data = data[length:]
    assert world.encode(text) == expected


def test_world_cuts_long_text_where_no_token_changes(world, monkeypatch):
    text = "line one.\n\n  indented\n你好。\n\n\n\nnext\r\nlast" * 20
    whole = world.encode(text)
    monkeypatch.setattr("src.tokenizer._BLOCK_CHARACTERS", 7)
    assert world.encode(text) == whole


def test_no_world_entry_joins_a_line_break_to_a_visible_character(world):
    for token in range(1, 65530):
        _, line_break, after = world.decode_bytes([token]).partition(b"\n")
        assert not line_break or not after.decode(errors="replace").strip(), token


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WorldTokenizer()], ids=["byte", "World"])
class TestEveryTokenizer:
    def test_round_trip(self, tokenizer):
        assert tokenizer.decode(tokenizer.encode(SCRIPTS)) == SCRIPTS

    def test_any_ids_decode(self, tokenizer):
        assert tokenizer.decode([0]) == ""
        assert tokenizer.decode([0x41 + 1, 0, 0x42 + 1]) == "AB"
        for unknown in (65530, 65535, 10**9, -1):
            assert tokenizer.decode([0x41 + 1, unknown, 0x42 + 1]) == "A\ufffdB"

    def test_half_a_surrogate_pair_is_refused(self, tokenizer):
        with pytest.raises(DataError, match=r"'\\ud83d' at character 2"):
            tokenizer.encode("ab\ud83d")


def test_byte_ids():
    assert ByteTokenizer().encode("aé\x00") == [0x62, 0xC4, 0xAA, 1]
    assert ByteTokenizer().decode([257]) == "\ufffd"


@pytest.mark.parametrize("vocab_size", [257, 300, 512])
def test_byte_vocabularies(vocab_size):
    assert isinstance(tokenizer_for_vocabulary(vocab_size), ByteTokenizer)


def test_the_world_vocabulary():
    assert isinstance(tokenizer_for_vocabulary(65536), WorldTokenizer)


@pytest.mark.parametrize("vocab_size", [0, 256, 513, 50277, 65529, 65537])
def test_another_vocabulary_is_an_error_that_names_what_works(vocab_size):
    with pytest.raises(DataError, match=rf"vocabulary of {vocab_size}.*--data_type binidx, or pairs in a .save file"):
        tokenizer_for_vocabulary(vocab_size)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyrwkv_tokenizer", None)
    _world_tokenizer.cache_clear()
    with pytest.raises(DataError, match="pip install pyrwkv-tokenizer"):
        tokenizer_for_vocabulary(65536)


def test_pieces_are_what_each_token_stands_for(world):
    assert ByteTokenizer().pieces([0, 98, 300]) == [b"", b"a", "\ufffd".encode()]
    assert world.pieces([24281, 59, 0, 65535]) == [b"User", b":", b"", "\ufffd".encode()]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_a_vocabulary_of_bytes_is_read_in_the_encoding_it_has(encoding):
    tokens = list("Hi, é 好 \U0010ffff".encode(encoding))
    decoder = decoder_for_vocabulary(256, tokens)
    assert isinstance(decoder, PlainBytes)
    assert (decoder.encoding, decoder.ends_documents) == (encoding, None)
    assert decoder.decode(tokens) == "Hi, é 好 \U0010ffff"
    assert b"".join(decoder.pieces(tokens)) == decoder.decode_bytes(tokens) == bytes(tokens)


def test_other_vocabularies_are_read_by_their_tokenizers():
    assert decoder_for_vocabulary(257, []).ends_documents == 0
    with pytest.raises(DataError, match="vocabulary of 255"):
        decoder_for_vocabulary(255, [])
