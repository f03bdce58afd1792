"""`--data_type` and `--data_file` to documents."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from src.config.data import BY_DATA, LossMask
from src.config.fields import Fields
from src.config.recognition import DATA_TYPES, files_of, left_out_of
from src.config.templates import TEMPLATE_NAMES, TEXT
from src.data.binidx import read_binidx
from src.data.documents import Documents, joined
from src.data.masks import marked
from src.data.templates import CHAT_TEMPLATES
from src.data.text import generated_documents, read_entries, read_text
from src.data.turns import answers_in, speakers_in
from src.errors import DataError
from src.output import plural_of, several
from src.tokenizer import Decoder, decoder_for_vocabulary, tokenizer_for_vocabulary

_LOOKED_FOR = "files are taken whose names end in .jsonl, .json, .csv, .tsv, .parquet, .txt (packed or not) or .idx"
_SHOWN_CHARACTERS = 60
_SHOWN_FILES = 8
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
    fields: Fields | None = None,
    part: slice = slice(None),
    mask: LossMask = BY_DATA,
    template: str = "user",
) -> Documents:
    """Opens training or held-out data.

    Args:
        data_type: one of DATA_TYPES.
        path: a file, for binidx the common prefix of its two; a folder; or several of them divided by commas. Unused
            for dummy.
        vocab_size: the model's vocabulary; it chooses the tokenizer of text.
        ctx_len: tokens of a row; plain text is read in pieces of ctx_len + 1.
        fields: names that fields of entries have; None: the known ones.
        part: which of the entries.
        mask: what the loss is taken on.
        template: in which conversations are written, a key of CHAT_TEMPLATES.

    Raises:
        DataError: data that cannot be read or used; the message names the place.
    """
    assert data_type in DATA_TYPES, f"{data_type} is none of {DATA_TYPES}"
    if data_type == "dummy":
        return generated_documents(vocab_size)
    files = files_of(path)
    if not files:
        raise DataError(f"{path} is a directory without data in it: {_LOOKED_FOR}.")
    if data_type == "binidx":
        documents = joined([_binidx(file, vocab_size, mask) for file in files], path)
        if mask.finds_in_text:
            return _with_left_out(documents, path)
    elif data_type == "jsonl":
        tokenizer = tokenizer_for_vocabulary(vocab_size)
        documents = read_entries(
            files,
            tokenizer,
            vocab_size,
            source=path,
            template=CHAT_TEMPLATES[template],
            fields=fields,
            part=part,
            mask=mask,
        )
    else:
        tokenizer = tokenizer_for_vocabulary(vocab_size)
        documents = joined([read_text(file, tokenizer, vocab_size, ctx_len + 1, mask=mask) for file in files], path)
    documents = _with_left_out(documents, path)
    if mask.kind or documents.stream_counted is not None:
        return documents
    return replace(documents, statements=(*documents.statements, *_unmasked_answers(documents, vocab_size)))


def _binidx(prefix: str, vocab_size: int, mask: LossMask) -> Documents:
    """Documents of tokens, with how they read, and what a mask finds in them."""
    documents = read_binidx(prefix, vocab_size)
    documents = replace(documents, statements=(*documents.statements, *_as_text(documents, vocab_size)))
    return marked(documents, mask, decoder_of(documents, vocab_size)) if mask.finds_in_text else documents


def _with_left_out(documents: Documents, path: str) -> Documents:
    """Says of which files the data are where a path names several, and what of its folders is not read."""
    files, left_out = files_of(path), left_out_of(path)
    said = [f"{several(len(files), 'file')}: {_file_names(files)}."] if files != (path,) else []
    if left_out:
        said.append(f"Not read, since their names say nothing of data: {_file_names(left_out)}.")
    return replace(documents, statements=(*said, *documents.statements))


def _file_names(paths: Sequence[str]) -> str:
    """The first of them, without the folder that they share."""
    folder = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)
    more = f" and {len(paths) - _SHOWN_FILES} more" if len(paths) > _SHOWN_FILES else ""
    return ", ".join(os.path.relpath(path, folder or ".") for path in paths[:_SHOWN_FILES]) + more


def decoder_of(documents: Documents, vocab_size: int) -> Decoder:
    """What reads the tokens of documents.

    Raises:
        DataError: nothing does for this vocabulary.
    """
    return decoder_for_vocabulary(vocab_size, documents.tokens(0, _SAMPLED_TOKENS).tolist())


def template_of(documents: Documents, vocab_size: int, template: str) -> str | None:
    """The template in which one talks to a model that was trained on these documents; None if no text becomes tokens.

    Args:
        documents: of training.
        vocab_size: of the model.
        template: in which their conversations were written.

    Returns:
        A key of CHAT_TEMPLATES; TEXT where most documents are no conversations.
    """
    try:
        tokenizer = tokenizer_for_vocabulary(vocab_size)
    except DataError:
        return None
    probed = _probed(documents)
    found = Counter(
        speakers_in(tokenizer.decode(documents.tokens(index, _SAMPLED_TOKENS).tolist())) for index in probed
    )
    speakers, _ = found.most_common(1)[0]
    if speakers is None:
        return TEXT
    if speakers.answering == CHAT_TEMPLATES[template].speakers["assistant"]:
        return template
    names = {CHAT_TEMPLATES[name].speakers["assistant"]: name for name in TEMPLATE_NAMES}
    return names[speakers.answering]


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
        f"{answered} of {len(probed)} {plural_of(documents.unit)} looked at are conversations: --loss_mask qa takes "
        "the loss on their answers only."
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
