"""`--data_type` and `--data_file` to documents."""

from __future__ import annotations

from src.config.files import DATA_TYPES
from src.data.binidx import read_binidx
from src.data.documents import Documents
from src.data.text import generated_documents, read_jsonl, read_text
from src.tokenizer import tokenizer_for_vocabulary


def open_documents(data_type: str, path: str, vocab_size: int, *, ctx_len: int) -> Documents:
    """Opens training or held-out data.

    Args:
        data_type: one of DATA_TYPES.
        path: the file; for binidx the common prefix of its two files; unused for dummy.
        vocab_size: the model's vocabulary; it chooses the tokenizer of text.
        ctx_len: tokens of a row; plain text is read in pieces of ctx_len + 1.

    Raises:
        DataError: data that cannot be read or used; the message names the place.
    """
    assert data_type in DATA_TYPES, f"{data_type} is none of {DATA_TYPES}"
    if data_type == "binidx":
        return read_binidx(path, vocab_size)
    if data_type == "jsonl":
        return read_jsonl(path, tokenizer_for_vocabulary(vocab_size), vocab_size)
    if data_type == "utf-8":
        return read_text(path, tokenizer_for_vocabulary(vocab_size), vocab_size, ctx_len + 1)
    return generated_documents(vocab_size)
