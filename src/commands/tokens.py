"""Data of every kind as tokens in binidx files, document after document."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tqdm import tqdm

from src.config import BinidxConfig
from src.config.data import LossMask
from src.config.tokens import VOCABULARIES
from src.data.binidx import BinidxWriter, read_binidx
from src.data.documents import Tokens
from src.data.inputs import decoded, read_whole, unix_lines
from src.data.templates import CHAT_TEMPLATES
from src.data.text import Conversations, line_ends_statement
from src.errors import DataError
from src.storage import refuse_overlap
from src.tokenizer import Tokenizer, tokenizer_for_vocabulary

_EVERY_TOKEN = LossMask("pad")


def write_tokens(config: BinidxConfig) -> None:
    """Writes `OUT.bin` and `OUT.idx`; see `BinidxConfig`.

    One document is in memory at a time. Both files are complete or not there.

    Raises:
        UserError: for everything the user can put right; nothing is written then.
    """
    files = config.files
    inputs = {f"the input {file}{suffix}": f"{file}{suffix}" for file in files for suffix in ("", ".bin", ".idx")}
    refuse_overlap(
        {name: path for name, path in inputs.items() if os.path.isfile(path)},
        {"the output": f"{config.prefix}.bin", "its index": f"{config.prefix}.idx"},
    )
    for line in config.notes():
        print(f"note: {line}")
    vocab_size = VOCABULARIES[config.tokenizer]
    tokenizer = tokenizer_for_vocabulary(vocab_size)
    said: list[str] = []
    with BinidxWriter(config.prefix, repeat=config.repeat, seed=config.seed if config.shuffle else None) as writer:
        documents = _documents(config, files, tokenizer, vocab_size, said)
        for tokens in tqdm(documents, desc="documents", unit=" documents", dynamic_ncols=True):
            writer.add(tokens)
        if not writer.documents:
            raise DataError(f"{', '.join(files[:3])} cannot be used: there is no document in it.")
        written = writer.finish()
    for line in said:
        print(line)
    passes = f" in {config.repeat:,} passes" if config.repeat > 1 else ""
    print(
        f"written    {config.prefix}.bin and {config.prefix}.idx: {writer.documents:,} documents{passes}, "
        f"{written:,} tokens (uint16)"
    )
    if config.ctx_len:
        print(_pretraining_line(written, config.ctx_len))
    print(f"next       python train.py --load_model MODEL.pth --data_file {config.prefix}")
    print("           --loss_mask qa there takes the loss on answers only, which it finds in the text")


def _documents(
    config: BinidxConfig, files: list[str], tokenizer: Tokenizer, vocab_size: int, said: list[str]
) -> Iterator[list[int] | Tokens]:
    """Tokens of every document with the token that ends it; of binidx data as they are."""
    entries = [file for file in files if config.kind_of(file) == "jsonl"]
    if entries:
        template = CHAT_TEMPLATES[config.template]
        conversations = Conversations(entries, template, fields=config.named_fields)
        empty = 0
        for _, _, parts in conversations:
            # Parts apart, as training has them, so that what an answer begins with is the same token there and here.
            ids = [token for text, _ in parts for token in tokenizer.encode(text)]
            if ids:
                yield [*ids, tokenizer.end_of_document]
            empty += not ids
        said += [f"read       {', '.join(entries[:3])}{' …' if len(entries) > 3 else ''}"]
        said += [f"           {line}" for line in conversations.findings.statements(template, _EVERY_TOKEN)]
        if empty:
            said.append(f"           {empty:,} {'text' if empty == 1 else 'texts'} without a character left out.")
    for file in files:
        kind = config.kind_of(file)
        if kind == "utf-8":
            text, line_ends = unix_lines(decoded(file, read_whole(file, packed=True)))
            if text:
                yield [*tokenizer.encode(text), tokenizer.end_of_document]
            said.append(f"read       {file}: plain text, one document")
            said += [f"           {line_ends_statement(line_ends)}"] if line_ends else []
        elif kind == "binidx":
            documents = read_binidx(file, vocab_size)
            for index in range(len(documents)):
                yield documents.tokens(index)
            said.append(f"read       {file}: {len(documents):,} documents of tokens, taken as they are")
            said += [f"           {line}" for line in documents.statements]


def _pretraining_line(tokens: int, ctx_len: int) -> str:
    """RWKV-LM's flags for data of so many tokens: it visits rows by a prime that is 2 modulo 3, below their number."""
    rows = tokens // ctx_len - 1
    prime = next((number for number in range(rows, 1, -1) if number % 3 == 2 and _is_prime(number)), None)
    if prime is None:
        return f"RWKV-LM    {tokens:,} tokens are too few for its pre-training with --ctx_len {ctx_len}"
    return f"RWKV-LM    --my_exit_tokens {tokens} --magic_prime {prime} --ctx_len {ctx_len}"


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
