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
from src.output import several
from src.storage import refuse_existing, refuse_overlap
from src.system import command_here
from src.tokenizer import tokenizer_for_vocabulary

_EVERY_TOKEN = LossMask("pad")
_QUIET_SECONDS = 2.0


def write_tokens(config: BinidxConfig) -> None:
    """Writes `OUT.bin` and `OUT.idx`; see `BinidxConfig`.

    One document is in memory at a time. Both files are complete or not there.

    Raises:
        UserError: for everything the user can put right; nothing is written then.
    """
    files = config.files
    inputs = {f"the input {file}{suffix}": f"{file}{suffix}" for file in files for suffix in ("", ".bin", ".idx")}
    outputs = {"the output": f"{config.prefix}.bin", "its index": f"{config.prefix}.idx"}
    refuse_overlap({name: path for name, path in inputs.items() if os.path.isfile(path)}, outputs)
    refuse_existing(outputs)
    for line in config.notes():
        print(f"note: {line}")
    reader = _Reader(config, files)
    with BinidxWriter(config.prefix, repeat=config.repeat, seed=config.seed if config.shuffle else None) as writer:
        for tokens in tqdm(reader, desc="documents", unit=" documents", delay=_QUIET_SECONDS, dynamic_ncols=True):
            writer.add(tokens)
        if not writer.documents:
            raise DataError(f"{', '.join(files[:3])} cannot be used: there is no document in it.")
        written = writer.finish()
    for line in reader.said:
        print(line)
    passes = f" in {config.repeat:,} passes" if config.repeat > 1 else ""
    print(
        f"written    {config.prefix}.bin and {config.prefix}.idx: {several(writer.documents, 'document')}{passes}, "
        f"{written:,} tokens (uint16)"
    )
    if config.ctx_len:
        print(_pretraining_line(written, config.ctx_len))
    mask = ["--loss_mask", "qa"] if reader.has_conversations else []
    command = command_here("train.py", "--load_model", "MODEL.pth", "--data_file", config.prefix, *mask)
    print(f"next       {command}")
    if mask:
        print("           --loss_mask qa: the loss on answers only, which are found in the text; roles are not kept")


class _Reader:
    """Tokens of every document with the token that ends it, input by input; of binidx data as they are.

    Attributes:
        said: what the user should know, once all are read.
        has_conversations: whether somebody answers in some of them.
    """

    def __init__(self, config: BinidxConfig, files: list[str]) -> None:
        self.said: list[str] = []
        self.has_conversations = False
        self._config, self._files = config, files
        self._vocab_size = VOCABULARIES[config.tokenizer]
        self._tokenizer = tokenizer_for_vocabulary(self._vocab_size)

    def __iter__(self) -> Iterator[list[int] | Tokens]:
        kinds = {file: self._config.kind_of(file) for file in self._files}
        entries = [file for file in self._files if kinds[file] == "jsonl"]
        if entries:
            yield from self._of_entries(entries)
        for file in self._files:
            if kinds[file] == "utf-8":
                yield from self._of_text(file)
            elif kinds[file] == "binidx":
                yield from self._of_tokens(file)

    def _of_entries(self, files: list[str]) -> Iterator[list[int]]:
        template = CHAT_TEMPLATES[self._config.template]
        conversations = Conversations(files, template, fields=self._config.named_fields)
        empty = 0
        for _, _, parts in conversations:
            # Parts apart, as training has them, so that what an answer begins with is the same token there and here.
            ids = [token for text, _ in parts for token in self._tokenizer.encode(text)]
            if ids:
                yield [*ids, self._tokenizer.end_of_document]
            empty += not ids
        findings = conversations.findings
        self.has_conversations = findings.conversations > 0
        self.said.append(f"read       {', '.join(files[:3])}{' …' if len(files) > 3 else ''}")
        self.said += [f"           {line}" for line in findings.statements(template, _EVERY_TOKEN, conversations.unit)]
        if empty:
            self.said.append(f"           {several(empty, 'text')} without a character left out.")

    def _of_text(self, file: str) -> Iterator[list[int]]:
        text, line_ends = unix_lines(decoded(file, read_whole(file, packed=True)))
        if text:
            yield [*self._tokenizer.encode(text), self._tokenizer.end_of_document]
        self.said.append(f"read       {file}: plain text, one document")
        self.said += [f"           {line_ends_statement(line_ends)}"] if line_ends else []

    def _of_tokens(self, file: str) -> Iterator[Tokens]:
        documents = read_binidx(file, self._vocab_size)
        for index in range(len(documents)):
            yield documents.tokens(index)
        self.said.append(f"read       {file}: {len(documents):,} documents of tokens, taken as they are")
        self.said += [f"           {line}" for line in documents.statements]


def _pretraining_line(tokens: int, ctx_len: int) -> str:
    """RWKV-LM's flags for data of so many tokens: it visits rows by a prime that is 2 modulo 3, below their number."""
    rows = tokens // ctx_len - 1
    prime = next((number for number in range(rows, 1, -1) if number % 3 == 2 and _is_prime(number)), None)
    if prime is None:
        return f"RWKV-LM    {tokens:,} tokens are too few for its pre-training with --ctx_len {ctx_len}"
    return f"RWKV-LM    --my_exit_tokens {tokens} --magic_prime {prime} --ctx_len {ctx_len}"


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
