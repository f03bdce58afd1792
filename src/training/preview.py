"""`--preview`: the data as the model will meet them, with what it is trained on."""

from __future__ import annotations

import sys
import unicodedata
from dataclasses import dataclass
from itertools import groupby, islice

from src.checkpoint import open_checkpoint
from src.config import TrainConfig
from src.data.sampling import BatchDataset, Sample
from src.data.sources import decoder_of
from src.errors import DataError
from src.tokenizer import Decoder
from src.training.report import say
from src.training.run import model_shape, with_seed
from src.training.work import prepare_work


@dataclass(frozen=True)
class Marks:
    """What stands for a beginning and an end of what is trained on, and for the end of a document.

    Attributes:
        begin, end: around each stretch.
        end_of_document: for that token.
        colour: whether a terminal shows it, which takes colours, too.
    """

    begin: str
    end: str
    end_of_document: str
    colour: bool = False


MARKS = Marks("⟦", "⟧", "∎")
PLAIN_MARKS = Marks("[[", "]]", "<end>")
"""Where the output's encoding has no others."""

_GREEN, _NORMAL = "\x1b[32m", "\x1b[0m"


def preview(config: TrainConfig) -> None:
    """Prints what the plan says of the data, and the first documents of the first pass; trains and writes nothing.

    Raises:
        UserError: for data that cannot be read or used.
    """
    for line in config.notes():
        say(f"note: {line}")
    config = with_seed(config)
    shape = model_shape(config, open_checkpoint(config.load_model) if config.load_model else None)
    work = prepare_work(config, shape)
    assert isinstance(work.dataset, BatchDataset), "pairs have no preview"
    say("\n".join(work.lines))
    try:
        decoder = decoder_of(work.dataset.documents, shape.vocab_size)
    except DataError:
        decoder = None
    marks = marks_for(sys.stdout.encoding, sys.stdout.isatty())
    for sample in islice(work.dataset.samples(), config.preview):
        say("\n" + "\n".join(rendered(sample, decoder, marks)))
    say(f"\n{marks.begin} {marks.end} around what the loss is taken on, {marks.end_of_document} ends a document")
    say("nothing was trained or written: leave --preview out for that")


def marks_for(encoding: str | None, terminal: bool) -> Marks:
    """The marks that an output can show."""
    try:
        "".join((MARKS.begin, MARKS.end, MARKS.end_of_document)).encode(encoding or "ascii")
        chosen = MARKS
    except (UnicodeEncodeError, LookupError):
        chosen = PLAIN_MARKS
    return Marks(chosen.begin, chosen.end, chosen.end_of_document, colour=terminal)


def rendered(sample: Sample, decoder: Decoder | None, marks: Marks) -> list[str]:
    """Lines of a sample: its name and share, and its text; token ids where nothing reads them."""
    targets, counted = len(sample.tokens) - 1, int(sample.counted.sum())
    beyond = f", {sample.beyond:,} tokens beyond the row" if sample.beyond else ""
    lines = [f"{sample.name}: {counted:,} of {targets:,} targets ({counted / targets:.1%}){beyond}"]
    text = ""
    for is_counted, places in groupby(range(len(sample.tokens)), key=lambda place: bool(sample.counted[place])):
        ids = sample.tokens[list(places)].tolist()
        part = " ".join(map(str, ids)) if decoder is None else _visible(ids, decoder, marks)
        if is_counted:
            part = f"{marks.begin}{part}{marks.end}"
            if marks.colour:
                part = "\n".join(f"{_GREEN}{line}{_NORMAL}" for line in part.split("\n"))
        text += part if decoder is not None or not text else f" {part}"
    return lines + [f"  | {line}" for line in text.split("\n")]


def _visible(ids: list[int], decoder: Decoder, marks: Marks) -> str:
    """Tokens as text in which nothing moves the cursor but line ends and tabs."""
    parts = []
    for ends, group in groupby(ids, key=lambda token: token == decoder.ends_documents):
        stretch = list(group)
        parts.append(marks.end_of_document * len(stretch) if ends else decoder.decode(stretch))
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        else character.encode("unicode_escape").decode()
        for character in "".join(parts)
    )
