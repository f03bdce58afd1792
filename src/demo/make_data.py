"""Cuts the demonstration's texts out of Debian packages; README.md beside this file says how it is called.

Nothing in the program imports this file: it is the record of how the bundled files were made.
"""

from __future__ import annotations

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

LONGEST_PASSAGE_BYTES = 511
SHORTEST_PASSAGE_BYTES = 300
TRAINING_PASSAGES = 640
HELD_OUT_PASSAGES = 48
_VERSE = re.compile(r"([0-9]?[A-Za-z]+)(\d+):(\d+) (.*)")
_CHAPTER = re.compile(r"chapter\b.*", re.IGNORECASE)
_R_STRING_VECTOR, _R_HEADER_BYTES = 16, 14


def main() -> None:
    """Writes base.jsonl and base-held-out.jsonl, sft.jsonl and sft-held-out.jsonl."""
    packages, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    base = [chapter for novel in read_novels(packages / NOVELS) for chapter in chapters(novel)]
    base += groups(jargon_entries(packages / JARGON), 4000) + groups(devil_entries(packages / DEVIL), 4000)
    chance = random.Random(6)
    chance.shuffle(base)
    write(output / "base-held-out.jsonl", base[:24])
    write(output / "base.jsonl", base[24:])

    scripture = [list(chapter_passages(verses)) for verses in scripture_chapters()]
    scripture = [passages for passages in scripture if passages]
    chance.shuffle(scripture)
    held_out = [chance.choice(passages) for passages in scripture[:HELD_OUT_PASSAGES]]
    training = [passage for passages in scripture[HELD_OUT_PASSAGES:] for passage in passages]
    write(output / "sft-held-out.jsonl", held_out)
    write(output / "sft.jsonl", chance.sample(training, TRAINING_PASSAGES))


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


def scripture_chapters() -> Iterator[list[str]]:
    """Verses of each chapter of the King James Bible, a line each: "3:16 For God so loved ..."."""
    text = subprocess.run(["bible", "-f", "gen1:1-re22:21"], capture_output=True, text=True, check=True).stdout
    verses: dict[tuple[str, str], list[str]] = {}
    for line in text.splitlines():
        match = _VERSE.match(line)
        if match:
            book, chapter, verse, words = match.groups()
            verses.setdefault((book, chapter), []).append(f"{chapter}:{verse} {words.strip()}")
    yield from verses.values()


def chapter_passages(verses: Iterable[str]) -> Iterator[str]:
    """Runs of whole verses, each as long as a row takes."""
    run = ""
    for verse in verses:
        line = f"{verse}\n"
        if run and len(run) + len(line) > LONGEST_PASSAGE_BYTES:
            if len(run) >= SHORTEST_PASSAGE_BYTES:
                yield run
            run = ""
        run += line
    if SHORTEST_PASSAGE_BYTES <= len(run) <= LONGEST_PASSAGE_BYTES:
        yield run


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


def write(path: Path, texts: list[str]) -> None:
    """One {"text": ...} a line."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


if __name__ == "__main__":
    main()
