"""Cuts the demonstration's texts out of Debian packages; README.md beside this file says how it is called.

Nothing in the program imports this file: it documents how the bundled files were made.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

NOVELS = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
JARGON = "usr/share/doc/jargon-text/jargon.txt.gz"
DEVIL = "usr/share/dictd/devil.dict.dz"

POETRY = {"Job", "Psa", "Prv", "Eccl", "SSol", "Lam"}  # book names as `bible` abbreviates them

HELD_OUT_CHAPTERS = 24
PASSAGE_BYTES = (256, 383)  # shortest and longest
PASSAGES_PER_HELD_OUT_CHAPTER = 2
TRAINING_PASSAGES = 800
PROMPT_BYTES = (24, 120)
ANSWER_BYTES = (48, 120)
TRAINING_PAIRS, HELD_OUT_PAIRS = 160, 48

_VERSE = re.compile(r"([0-9]?[A-Za-z]+)(\d+):(\d+) (.*)")
_CHAPTER = re.compile(r"chapter\b.*", re.IGNORECASE)
_R_STRING_VECTOR, _R_HEADER_BYTES = 16, 14


def main() -> None:
    """Writes the base model's text to the second folder, and the two demonstrations' data to the third."""
    packages, base_folder, demo_folder = map(Path, sys.argv[1:])
    base = [chapter for novel in read_novels(packages / NOVELS) for chapter in chapters(novel)]
    base += groups(jargon_entries(packages / JARGON), 4000) + groups(devil_entries(packages / DEVIL), 4000)
    random.Random(6).shuffle(base)
    write_documents(base_folder / "base-held-out.jsonl", base[:24])
    write_documents(base_folder / "base.jsonl", base[24:])

    chance = random.Random(5)
    poems = poetry_chapters()
    chance.shuffle(poems)
    held_out, training = poems[:HELD_OUT_CHAPTERS], poems[HELD_OUT_CHAPTERS:]
    choices = [passages(poem) for poem in held_out]
    picked = [chance.sample(some, min(PASSAGES_PER_HELD_OUT_CHAPTER, len(some))) for some in choices]
    write_documents(demo_folder / "sft-held-out.jsonl", [passage for some in picked for passage in some])
    everything = [passage for poem in training for passage in passages(poem)]
    write_documents(demo_folder / "sft.jsonl", chance.sample(everything, TRAINING_PASSAGES))
    for name, some, count in (("orpo", training, TRAINING_PAIRS), ("orpo-held-out", held_out, HELD_OUT_PAIRS)):
        pairs = [pair for poem in some for pair in verse_pairs(poem)]
        write_pairs(demo_folder / f"{name}.csv", chance.sample(pairs, count))


def read_novels(database: Path) -> Iterator[list[str]]:
    """Lines of each novel: the character vectors of an R lazy-load database (zlib chunks, XDR)."""
    content = database.read_bytes()
    start = 0
    while start < len(content):
        stream = zlib.decompressobj()
        chunk = stream.decompress(content[start + 4 :])
        start = len(content) - len(stream.unused_data)
        at = _R_HEADER_BYTES + 4 + struct.unpack_from(">I", chunk, _R_HEADER_BYTES)[0]
        kind, count = struct.unpack_from(">II", chunk, at)
        if kind != _R_STRING_VECTOR:
            continue
        at += 8
        lines = []
        for _ in range(count):
            (size,) = struct.unpack_from(">4xi", chunk, at)
            lines.append(chunk[at + 8 : at + 8 + size].decode())
            at += 8 + size
        yield lines


def chapters(lines: list[str]) -> list[str]:
    """A novel's chapters, headings included, without title page."""
    texts: list[list[str]] = []
    for line in lines:
        if _CHAPTER.fullmatch(line.strip()):
            texts.append([])
        if texts:
            texts[-1].append(line)
    return [unwrapped(text) for text in texts]


def jargon_entries(path: Path) -> list[str]:
    """Entries of the Jargon File's lexicon."""
    text = gzip.decompress(path.read_bytes()).decode()
    entries = re.split(r"\n(?=   :)", text)[1:]
    return [unwrapped(entry.splitlines()) for entry in entries]


def devil_entries(path: Path) -> list[str]:
    """Entries of The Devil's Dictionary."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    return [entry.strip() for entry in re.split(r"\n\n(?=[A-Z][A-Z' -]+, )", text)[1:]]


def poetry_chapters() -> list[list[tuple[str, str]]]:
    """(number, words) of the verses of each chapter of the King James Bible's books of poetry."""
    text = subprocess.run(["bible", "-f", "gen1:1-re22:21"], capture_output=True, text=True, check=True).stdout
    verses: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for book, chapter, verse, words in _VERSE.findall(text):
        if book in POETRY:
            verses.setdefault((book, chapter), []).append((f"{chapter}:{verse}", words.strip()))
    return list(verses.values())


def passages(poem: list[tuple[str, str]]) -> list[str]:
    """Runs of whole numbered verses, a line each."""
    shortest, longest = PASSAGE_BYTES
    runs = [""]
    for number, words in poem:
        line = f"{number} {words}\n"
        if len(runs[-1]) + len(line) > longest:
            runs.append("")
        runs[-1] += line
    return [run for run in runs if shortest <= len(run) <= longest]


def verse_pairs(poem: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(verse, the verse that follows it), every other one a prompt."""
    words = [text for _, text in poem]
    pairs = zip(words[::2], words[1::2], strict=False)
    (p_least, p_most), (a_least, a_most) = PROMPT_BYTES, ANSWER_BYTES
    return [(p, a) for p, a in pairs if p_least <= len(p) <= p_most and a_least <= len(a) <= a_most]


def unwrapped(lines: Iterable[str]) -> str:
    """Paragraphs, one line each, with a blank line between."""
    paragraphs = "\n".join(line.strip() for line in lines).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()) + "\n"


def groups(entries: list[str], least_characters: int) -> list[str]:
    """Neighbouring entries joined to documents."""
    documents = [""]
    for entry in entries:
        if len(documents[-1]) >= least_characters:
            documents.append("")
        documents[-1] += entry.rstrip() + "\n\n"
    return documents


def write_documents(path: Path, texts: list[str]) -> None:
    """One {"text": ...} a line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    """A CSV of prompts and chosen answers whose reject column is empty."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("prompt", "chosen", "reject"))
        table.writerows((prompt, answer, "") for prompt, answer in pairs)


if __name__ == "__main__":
    main()
