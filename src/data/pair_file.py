"""Pair files: the list of 5-tuples, in a `.save`, that PrepareOrpoDataset.py writes and train.py reads."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src import storage
from src.data.preferences import PreferencePair
from src.errors import CheckpointError, DataError
from src.storage import PathLike

_ROLE, _WRITER = "pair file", "PrepareOrpoDataset.py"
_ENTRIES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""How files end that it makes pairs of."""


def load_pairs(path: PathLike, vocab_size: int) -> list[PreferencePair]:
    """Reads preference pairs: a `.save` file of `save_pairs` or of RWKV-LM-State-4bit-Orpo.

    Raises:
        CheckpointError: The file is missing, damaged or was not written by `torch.save`.
        DataError: It holds something else, or tokens outside a vocabulary of `vocab_size`.
    """
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{_ROLE} {path} does not exist; make it with {_WRITER} --output_save, and give it as --rlhf_train_file"
        )
    try:
        content = storage.load(path, _ROLE, _WRITER)
    except CheckpointError as error:
        if Path(path).suffix in _ENTRIES:
            raise CheckpointError(
                f"{path} is no {_ROLE}: make one of it with {_WRITER} --input_csv {path} --output_save pairs.save"
            ) from error
        raise
    return pairs_from_tuples(str(path), content, vocab_size)


def save_pairs(path: PathLike, pairs: Sequence[PreferencePair]) -> None:
    """Writes preference pairs as a list of 5-tuples, atomically.

    Raises:
        CheckpointError: The file cannot be written.
    """
    storage.save(path, [pair.as_tuple() for pair in pairs], unit="pairs")


def pairs_from_tuples(source: str, content: Any, vocab_size: int) -> list[PreferencePair]:
    """Checks what a `.save` file held: a list of (prompt, chosen, reject, logp, logp).

    Raises:
        DataError: content of another kind; a pair without a prompt or chosen answer; a token outside
            the vocabulary.
    """
    remedy = f"make the file with {_WRITER}"
    if not isinstance(content, list) or not content:
        found = "an empty list" if isinstance(content, list) else type(content).__name__
        raise DataError(f"{source} holds {found}, not a list of preference pairs: {remedy}.")
    pairs = []
    for number, item in enumerate(content, start=1):
        if not isinstance(item, (tuple, list)) or len(item) != 5:
            found = f"{len(item)} entries" if isinstance(item, (tuple, list)) else type(item).__name__
            raise DataError(f"{source} pair {number} has {found}, not (prompt, chosen, reject, logp, logp): {remedy}.")
        for name, tokens in zip(("prompt", "chosen", "reject"), item[:3], strict=True):
            _check_tokens(f"{source} pair {number}", name, tokens, vocab_size, remedy)
        if not all(type(logp) in (int, float) for logp in item[3:]):
            raise DataError(f"{source} pair {number} has no number for a base log-probability: {remedy}.")
        pairs.append(PreferencePair(*item))
    return pairs


def _check_tokens(where: str, name: str, tokens: Any, vocab_size: int, remedy: str) -> None:
    if not isinstance(tokens, list) or not set(map(type, tokens)) <= {int}:
        raise DataError(f"{where} has no list of token ids as its {name}: {remedy}.")
    if not tokens:
        if name == "reject":
            return
        raise DataError(f"{where} has an empty {name}, so nothing can be learned from it: {remedy}.")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        outside = next(token for token in tokens if not 0 <= token < vocab_size)
        raise DataError(
            f"{where} has token {_in_digits(outside)} in its {name}, but the model knows 0 to {vocab_size - 1}: "
            "prepare the pairs for this model's vocabulary."
        )


def _in_digits(number: int) -> str:
    """A number for a message; Python writes none of thousands of digits."""
    return str(number) if abs(number) < 10**40 else "of more than 40 digits"
