"""Preference data: rows of prompt, chosen and rejected text; pairs of tokens made from them.

`read_rows` reads what people write (CSV, JSONL), `make_pairs` turns rows into tokens with a chat
template; `src.data.pair_file` keeps them.
"""

from __future__ import annotations

import csv
import io
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from src.config.preference import MIXED
from src.data.inputs import (
    MalformedEntry,
    decoded,
    json_object,
    listed_names,
    read_whole,
    shown,
    string_of,
    unix_lines,
    unread_keys,
)
from src.data.turns import formatted_statement, is_formatted
from src.errors import ConfigError, DataError
from src.tokenizer import Tokenizer

PLACEHOLDER_LOGP = 0.5
"""What stands in a pair's two log-probability fields when none was computed; such are below 0."""

_COLUMNS = ("prompt", "chosen", "reject", "rejected")
_CSV_FIELD_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class PreferenceRow:
    """One line of a preference file.

    Attributes:
        line: where it begins in the file, counted from 1.
        prompt: the user's words.
        chosen: the good answer.
        rejected: the worse answer, "" if there is none.
    """

    line: int
    prompt: str
    chosen: str
    rejected: str


def read_rows(path: str, remark: Callable[[str], None] = lambda line: None) -> list[PreferenceRow]:
    """Rows of a CSV (`prompt,chosen,reject`) or, by its suffix or first character, JSONL file of the same keys.

    UTF-8 with or without BOM. `reject` may also be called `rejected`, and may be missing or empty; where there are
    both, the filled one counts.

    Args:
        path: the file.
        remark: called with a sentence for each thing that stands in the file and is not read.

    Raises:
        DataError: a file that is missing, not UTF-8 or empty; a column that is missing; a row that
            cannot be read, with its line.
    """
    text = decoded(path, read_whole(path), nul=True)  # models write them, so that rejects may hold some
    if not text.strip():
        raise DataError(f"{path} is empty: expected the columns prompt,chosen,reject and at least one row.")
    is_jsonl = Path(path).suffix.lower() in (".jsonl", ".json", ".ndjson") or text.lstrip().startswith("{")
    unread: Counter[str] = Counter()
    rows = list(_jsonl_rows(path, text, unread) if is_jsonl else _csv_rows(path, text, unread))
    if not rows:
        raise DataError(f"{path} holds no rows: write at least one prompt with a chosen answer below the header.")
    for line in unread_keys(unread, unit="row"):
        remark(line)
    return rows


def _csv_rows(path: str, text: str, unread: Counter[str]) -> Iterator[PreferenceRow]:
    entries = _csv_entries(path, text)
    _, header = next(entries, (1, []))
    names = [name.strip() for name in header]
    missing = [name for name in ("prompt", "chosen") if name not in names]
    if missing:
        found, lacking = (listed_names(some, " and ") for some in (names, missing))
        raise DataError(
            f"{path} has no column {lacking} (its first line has {found or 'nothing'}): name the columns "
            "prompt,chosen,reject there."
        )
    repeated = [name for name in _COLUMNS if names.count(name) > 1]
    if repeated:
        raise DataError(f"{path} has several columns {repeated[0]!r}: give each of prompt,chosen,reject once.")
    for line, fields in entries:
        if len(fields) > len(names):
            raise DataError(
                f"{path} line {line} has {len(fields)} fields, the header {len(names)}: put fields with commas in "
                f"quotes (the last field read is {shown(fields[-1])})."
            )
        entry = dict(zip(names, fields, strict=False))
        if not {"prompt", "chosen"} <= entry.keys():
            raise DataError(
                f"{path} line {line} has {len(fields)} of the {len(names)} fields of the header: write "
                "prompt and chosen, in quotes where they hold commas or line breaks."
            )
        unread.update(name for name, value in entry.items() if name not in _COLUMNS and value.strip())
        try:
            rejected = _filled_reject(entry.get("reject", ""), entry.get("rejected", ""))
            yield PreferenceRow(line, string_of(entry, "prompt"), string_of(entry, "chosen"), rejected)
        except MalformedEntry as error:
            raise DataError(f"{path} line {line}: {error}.") from error


def _filled_reject(reject: str, rejected: str) -> str:
    """The one that is filled of the two columns for a worse answer."""
    if reject.strip() and rejected.strip() and reject != rejected:
        raise MalformedEntry(
            f"'reject' is {shown(reject)} and 'rejected' is {shown(rejected)}: leave one of them empty"
        )
    return reject if reject.strip() or not rejected else rejected


def _csv_entries(path: str, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, fields) of every entry that is not blank.

    The strict reader is used because the lenient one takes an unbalanced quote for the start of a field that
    reaches to the end of the file.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit_before = csv.field_size_limit(_CSV_FIELD_LIMIT)
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "has a quote that is never closed" if "end of data" in str(error) else f"is no CSV ({error})"
        raise DataError(
            f"{path} line {line} {reason}: put fields with quotes, commas or line breaks in quotes, "
            "and write each quote inside twice."
        ) from error
    finally:
        csv.field_size_limit(limit_before)


def _jsonl_rows(path: str, text: str, unread: Counter[str]) -> Iterator[PreferenceRow]:
    for line, content in enumerate(unix_lines(text)[0].split("\n"), start=1):
        if not content.strip():
            continue
        try:
            entry = json_object(content)
            unread.update(entry.keys() - set(_COLUMNS))
            reject, rejected = (
                "" if entry.get(key) is None else string_of(entry, key, nul=True) for key in ("reject", "rejected")
            )
            yield PreferenceRow(
                line, string_of(entry, "prompt"), string_of(entry, "chosen"), _filled_reject(reject, rejected)
            )
        except MalformedEntry as error:
            raise DataError(f'{path} line {line}: {error}; write {{"prompt": …, "chosen": …}}.') from error


@dataclass(frozen=True)
class Template:
    """What stands around a prompt; answers always are " " + answer + blank line."""

    before: str
    after: str

    def prompt(self, text: str) -> str:
        """The prompt as the model reads it, ending where the answer begins."""
        return self.before + text + self.after


TEMPLATES = {
    "user": Template("User: ", "\n\nAssistant:"),
    "question": Template("Question: ", "\n\nAnswer:"),
    "input": Template("Input: ", "\n\nResponse:"),
}


def clean_text(text: str) -> str:
    """Strips, and removes blank lines inside, because a blank line ends a turn.

    In a single pass, as RWKV-LM-State-4bit-Orpo does it: three line breaks in a row become two.
    """
    return unix_lines(text.strip())[0].replace("\n\n", "\n")


def clean_prompt(text: str) -> str:
    """`clean_text`, but of a prompt that stands in a template already only outer white space and line ends."""
    ready = unix_lines(text.strip())[0]
    return ready if is_formatted(ready) else clean_text(text)


def in_template(name: str, prompt: str) -> str:
    """A prompt, with Unix lines, as the model reads it; one that stands in a template already gets no other."""
    return prompt.strip() if is_formatted(prompt) else TEMPLATES[name].prompt(prompt)


def answer_text(text: str) -> str:
    """A cleaned answer as the model reads it after the prompt."""
    return f" {text}\n\n"


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a chosen and a rejected answer, as token ids.

    The base log-probabilities are sums over an answer's tokens under the untuned model.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_base_logp: float = PLACEHOLDER_LOGP
    rejected_base_logp: float = PLACEHOLDER_LOGP

    def as_tuple(self) -> tuple[list[int], list[int], list[int], float, float]:
        """The pair as a `.save` file holds it."""
        return self.prompt, self.chosen, self.rejected, self.chosen_base_logp, self.rejected_base_logp

    @property
    def has_base_logps(self) -> bool:
        """Whether the base log-probabilities were computed."""
        return self.chosen_base_logp < 0 and self.rejected_base_logp < 0

    def shortened(self, longest: int, *, keeps_prompt_end: bool = True) -> PreferencePair:
        """At most `longest` tokens each: prompts lose their beginning, answers their end.

        The end of a prompt is where the answer is asked for; a model that never saw it there would
        learn to answer something else. Without `keeps_prompt_end` prompts lose it, as in the original. Log-
        probabilities of what was cut are not kept.
        """
        if max(len(self.prompt), len(self.chosen), len(self.rejected)) <= longest:
            return self
        return replace(
            self,
            prompt=self.prompt[-longest:] if keeps_prompt_end else self.prompt[:longest],
            chosen=self.chosen[:longest],
            rejected=self.rejected[:longest],
            chosen_base_logp=PLACEHOLDER_LOGP,
            rejected_base_logp=PLACEHOLDER_LOGP,
        )


@dataclass(frozen=True)
class PreparedPairs:
    """What `make_pairs` made.

    Attributes:
        pairs: shuffled.
        texts: prompt and chosen answer of every pair as text, in the order of the rows.
        unusable_lines: lines of rows left out because prompt or chosen answer is blank.
        shortened: pairs of which something was cut.
        empty_rejects: pairs without a rejected answer.
        equal_rejects: pairs whose rejected answer is the chosen one, between which nothing is preferred.
        formatted: pairs whose prompt stands in a template already and was taken as it is.
    """

    pairs: list[PreferencePair]
    texts: list[str]
    unusable_lines: list[int]
    shortened: int
    empty_rejects: int
    equal_rejects: int
    formatted: int

    def summary(self) -> list[str]:
        """The counts, a line each."""
        pairs, empty, shortened = len(self.pairs), self.empty_rejects, self.shortened
        lines = [f"{pairs:,} pairs, {empty:,} without a reject, {shortened:,} shortened"]
        for name in ("prompt", "chosen", "rejected"):
            sizes = [len(getattr(pair, name)) for pair in self.pairs]
            middle = statistics.median_low(sizes)
            lines.append(f"{name:>8} tokens: min {min(sizes):,}, median {middle:,}, max {max(sizes):,}")
        if self.equal_rejects:
            lines.append(f"{self.equal_rejects:,} pairs with the chosen answer as reject: they train on it alone")
        if self.formatted:
            lines.append(formatted_statement(self.formatted))
        if self.unusable_lines:
            lines.append(
                f"{len(self.unusable_lines):,} rows left out, prompt or chosen is blank "
                f"(first: line {self.unusable_lines[0]})"
            )
        return lines


def make_pairs(
    source: str,
    rows: Sequence[PreferenceRow],
    tokenizer: Tokenizer,
    count: int,
    *,
    template: str = MIXED,
    longest: int | None = None,
    seed: int = 100,
    on_pair: Callable[[int], None] = lambda made: None,
) -> PreparedPairs:
    """Makes exactly `count` pairs, taking the rows in order and again from the first.

    Two numbers are drawn for each pair, of which the first picks a template if `template` is "mixed"
    (80 % user, 10 % question, 10 % input; the second has no use here), then the pairs are shuffled: with
    seed 100 the result is that of RWKV-LM-State-4bit-Orpo. Prompt and answers are encoded apart, and no
    end-of-document token is added.

    Args:
        source: the file, for messages.
        rows: as `read_rows` gives them.
        tokenizer: of the model's vocabulary.
        count: pairs to make, at least 1.
        template: a key of `TEMPLATES`, or `MIXED`.
        longest: most tokens of a prompt and of an answer, see `PreferencePair.shortened`; None: no limit.
        seed: of the draws and the shuffle.
        on_pair: called with the number of pairs made so far.

    Raises:
        DataError: no row has both a prompt and a chosen answer.
        ConfigError: `count` or `longest` is below 1.
    """
    if count < 1:
        raise ConfigError(f"--target_pair_count {count} makes no pairs: give at least 1.")
    if longest is not None and longest < 1:
        raise ConfigError(f"--max_len {longest} leaves no tokens: give at least 1, or leave it out.")
    cleaned = [
        replace(row, prompt=clean_prompt(row.prompt), chosen=clean_text(row.chosen), rejected=clean_text(row.rejected))
        for row in rows
    ]
    usable = [row for row in cleaned if row.prompt and row.chosen]
    if not usable:
        raise DataError(f"{source}: none of the {len(rows)} rows has both a prompt and a chosen answer.")

    answers: dict[int, tuple[list[int], list[int]]] = {}
    prompts: dict[tuple[int, str], list[int]] = {}
    generator = random.Random(seed)
    pairs: list[PreferencePair] = []
    texts: list[str] = []
    shortened = empty_rejects = equal_rejects = formatted = 0
    for made in range(count):
        row = usable[made % len(usable)]
        drawn = _drawn_template(generator.random())
        generator.random()
        name = drawn if template == MIXED else template
        prompt_text = in_template(name, row.prompt)
        if row.line not in answers:
            chosen, rejected = (tokenizer.encode(answer_text(text)) for text in (row.chosen, row.rejected))
            answers[row.line] = (chosen, rejected)
        if (row.line, name) not in prompts:
            prompts[row.line, name] = tokenizer.encode(prompt_text)
        whole = PreferencePair(prompts[row.line, name], *answers[row.line])
        pair = whole if longest is None else whole.shortened(longest)
        shortened += pair is not whole
        empty_rejects += not row.rejected
        equal_rejects += row.rejected == row.chosen
        formatted += is_formatted(row.prompt)
        pairs.append(pair)
        texts.append(prompt_text + answer_text(row.chosen))
        on_pair(made + 1)
    generator.shuffle(pairs)
    unusable_lines = [row.line for row in cleaned if not (row.prompt and row.chosen)]
    return PreparedPairs(pairs, texts, unusable_lines, shortened, empty_rejects, equal_rejects, formatted)


def _drawn_template(number: float) -> str:
    if number < 0.8:
        return "user"
    return "question" if number < 0.9 else "input"
