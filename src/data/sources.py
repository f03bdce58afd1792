"""`--data_type` and `--data_file` to documents."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from src.config.data import BY_DATA, LossMask
from src.config.files import DATA_TYPES
from src.data.binidx import read_binidx
from src.data.documents import Documents
from src.data.masks import marked
from src.data.text import generated_documents, read_jsonl, read_text
from src.data.turns import answers_in
from src.errors import DataError
from src.tokenizer import Decoder, decoder_for_vocabulary, tokenizer_for_vocabulary

_SHOWN_CHARACTERS = 60
_SAMPLED_TOKENS = 4096
_PROBED_DOCUMENTS, _PROBED_TOKENS = 64, 256
_LEAST_ANSWERED = 0.5
_LEAST_AGREEMENT = 0.9  # text that was encoded in parts keeps 0.97 and more


def open_documents(
    data_type: str,
    path: str,
    vocab_size: int,
    *,
    ctx_len: int,
    fields: tuple[str, str] | None = None,
    part: slice = slice(None),
    mask: LossMask = BY_DATA,
) -> Documents:
    """Opens training or held-out data.

    Args:
        data_type: one of DATA_TYPES.
        path: the file; for binidx the common prefix of its two files; unused for dummy.
        vocab_size: the model's vocabulary; it chooses the tokenizer of text.
        ctx_len: tokens of a row; plain text is read in pieces of ctx_len + 1.
        fields: keys of question and answer in JSON lines; None: the known ones.
        part: which of the JSON lines.
        mask: what the loss is taken on.

    Raises:
        DataError: data that cannot be read or used; the message names the place.
    """
    assert data_type in DATA_TYPES, f"{data_type} is none of {DATA_TYPES}"
    if data_type == "dummy":
        return generated_documents(vocab_size)
    if data_type == "binidx":
        documents = read_binidx(path, vocab_size)
        documents = replace(documents, statements=(*documents.statements, *_as_text(documents, vocab_size)))
        if mask.finds_in_text:
            return marked(documents, mask, decoder_of(documents, vocab_size))
    elif data_type == "jsonl":
        tokenizer = tokenizer_for_vocabulary(vocab_size)
        documents = read_jsonl(path, tokenizer, vocab_size, fields=fields, part=part, mask=mask)
    else:
        documents = read_text(path, tokenizer_for_vocabulary(vocab_size), vocab_size, ctx_len + 1, mask=mask)
    if mask.kind or documents.stream_counted is not None:
        return documents
    return replace(documents, statements=(*documents.statements, *_unmasked_answers(documents, vocab_size)))


def decoder_of(documents: Documents, vocab_size: int) -> Decoder:
    """What reads the tokens of documents.

    Raises:
        DataError: nothing does for this vocabulary.
    """
    return decoder_for_vocabulary(vocab_size, documents.tokens(0, _SAMPLED_TOKENS).tolist())


def _unmasked_answers(documents: Documents, vocab_size: int) -> list[str]:
    """Says so where the loss is taken on every token, by default, of documents in which somebody answers."""
    try:
        decoder = decoder_of(documents, vocab_size)
    except DataError:
        return []
    probed = _probed(documents)
    texts = (decoder.decode(documents.tokens(index, _SAMPLED_TOKENS).tolist()) for index in probed)
    answered = sum(bool(answers_in(text).stretches) for text in texts)
    if answered < _LEAST_ANSWERED * len(probed):
        return []
    return [
        f"{answered} of {len(probed)} {documents.unit}s looked at are conversations: --loss_mask qa takes the loss on "
        "their answers only."
    ]


def _probed(documents: Documents) -> list[int]:
    """Some documents from all over the data."""
    return sorted(set(np.linspace(0, len(documents) - 1, _PROBED_DOCUMENTS).astype(int).tolist()))


def _as_text(documents: Documents, vocab_size: int) -> list[str]:
    """How tokens that came without text read, and a warning where they are not this tokenizer's.

    Text encoded again gives the tokens it was decoded from, or nearly so: what was made with another tokenizer reads as
    something else, or as no text at all.
    """
    try:
        tokenizer = tokenizer_for_vocabulary(vocab_size)
    except DataError:
        return []
    start = tokenizer.decode(documents.tokens(0, _PROBED_TOKENS).tolist())
    more = "…" if len(start) > _SHOWN_CHARACTERS or documents.sizes[0] > _PROBED_TOKENS else ""
    said = [f"{documents.unit.capitalize()} {documents.numbers[0]} begins {start[:_SHOWN_CHARACTERS]!r}{more}"]
    total = kept = 0
    for index in _probed(documents):
        tokens = [token for token in documents.tokens(index, _PROBED_TOKENS).tolist() if token]
        total += len(tokens)
        kept += (Counter(tokens) & Counter(tokenizer.encode(tokenizer.decode(tokens)))).total()
    if kept < _LEAST_AGREEMENT * total:
        said.append(
            f"warning: {1 - kept / total:.0%} of the tokens looked at are not what the tokenizer of this vocabulary "
            "makes of their text: the data were made with another one, or are no text."
        )
    return said
