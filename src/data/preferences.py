"""Preference data: rows of prompt, chosen and rejected text; pairs of tokens made from them.

`read_rows` reads what people write (CSV, JSONL), `make_pairs` turns rows into tokens with a chat
template; `src.data.pair_file` keeps them.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from src.config.recognition import TABLE
from src.config.templates import MIXED, TEMPLATE_NAMES
from src.data.containers import BadEntries, Entries
from src.data.inputs import LeftOut, MalformedEntry, counted_reasons, listed_names, unix_lines, unread_keys
from src.data.preference_forms import PAIR, preference_of_entry
from src.data.templates import CHAT_TEMPLATES
from src.data.turns import formatted_statement, is_formatted, joined_statement
from src.errors import ConfigError, DataError
from src.output import several
from src.tokenizer import Tokenizer

PLACEHOLDER_LOGP = 0.5
"""What stands in a pair's two log-probability fields when none was computed; such are below 0."""


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
    """Rows of a preference file: a CSV (`prompt,chosen,reject`), or JSON lines, an array or Parquet of the same keys.

    UTF-8 with or without BOM. `reject` may also be called `rejected`, and may be missing or empty; where there are
    both, the filled one counts. A prompt may also be a list of messages, or a question or an instruction with its
    input; answers may be messages, or conversations that begin with the prompt. What has several turns before the
    answer becomes a prompt in the template of World chats.

    Args:
        path: the file.
        remark: called with a sentence for each thing that stands in the file and is not read, and for what it is.

    Raises:
        DataError: a file that is missing, not UTF-8 or empty; a column that is missing; rows that cannot be read, with
            their lines.
    """
    entries = Entries(path)
    if not entries.head.strip():
        raise DataError(f"{path} is empty: expected the columns prompt,chosen,reject and at least one row.")
    unread: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    first_left_out = ""
    joined = 0
    bad = BadEntries()
    rows: list[PreferenceRow] = []
    for number, entry in entries:
        try:
            if isinstance(entry, MalformedEntry):
                raise entry
            made = preference_of_entry(entry)
            rows.append(PreferenceRow(number, made.prompt, made.chosen, made.rejected))
            forms[made.form] += 1
            names = made.notes.unread
            unread.update(name for name in names if entries.container != TABLE or entry.get(name, name).strip())
            joined += made.notes.joined
        except LeftOut as reason:
            left_out[str(reason)] += 1
            first_left_out = first_left_out or f"{entries.unit} {number}"
        except MalformedEntry as error:
            if entries.container == TABLE and not rows and not bad:
                _check_columns(path, entries.columns)
            few = (
                f" (it has {len(entry)} of the {len(entries.columns)} fields of the header)"
                if (isinstance(entry, dict) and len(entry) < len(entries.columns))
                else ""
            )
            bad.add(path, entries.unit, number, MalformedEntry(f"{str(error).removesuffix('.')}{few}"))
    bad.refuse()
    if left_out and not rows:
        raise DataError(
            f"{path} cannot be used, because every row is left out: {counted_reasons(left_out, first_left_out)}."
        )
    if not rows:
        if entries.container == TABLE:
            _check_columns(path, entries.columns)
        raise DataError(f"{path} holds no rows: write at least one prompt with a chosen answer below the header.")
    if forms.keys() != {PAIR}:
        named = [f"{form}, {several(count, 'row')}" for form, count in forms.most_common()]
        remark(f"Recognised as {'; '.join(named)}.")
    repeated = len(rows) - len({(row.prompt, row.chosen, row.rejected) for row in rows})
    if repeated:
        remark(f"{repeated:,} of {len(rows):,} rows equal an earlier one and count as often as they stand there.")
    if left_out:
        remark(f"Left out: {counted_reasons(left_out, first_left_out)}.")
    if joined:
        remark(joined_statement(joined))
    for line in unread_keys(unread, unit="row"):
        remark(line)
    return rows


def _check_columns(path: str, columns: Sequence[str]) -> None:
    """Refuses a table that cannot hold pairs."""
    names = {name.lower() for name in columns}
    lacking = [] if "chosen" in names else ["chosen"]
    if not names & {"prompt", "question", "instruction", "messages", "conversations"}:
        lacking.insert(0, "prompt")
    if lacking:
        found, missing = (listed_names(some, " and ") for some in (columns, lacking))
        raise DataError(
            f"{path} has no column {missing} (its first line has {found or 'nothing'}): name the columns "
            "prompt,chosen,reject there."
        )


@dataclass(frozen=True)
class Template:
    """What stands around a prompt; answers always are " " + answer + blank line."""

    before: str
    after: str

    def prompt(self, text: str) -> str:
        """The prompt as the model reads it, ending where the answer begins."""
        return self.before + text + self.after


TEMPLATES = {
    name: Template(f"{CHAT_TEMPLATES[name].speakers['user']}: ", f"\n\n{CHAT_TEMPLATES[name].speakers['assistant']}:")
    for name in TEMPLATE_NAMES
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
        rows: that there are to make pairs of.
        unusable_lines: lines of rows left out because prompt or chosen answer is blank.
        shortened: pairs of which something was cut.
        empty_rejects: pairs without a rejected answer.
        equal_rejects: pairs whose rejected answer is the chosen one, between which nothing is preferred.
        formatted: pairs whose prompt stands in a template already and was taken as it is.
    """

    pairs: list[PreferencePair]
    texts: list[str]
    rows: int
    unusable_lines: list[int]
    shortened: int
    empty_rejects: int
    equal_rejects: int
    formatted: int

    def summary(self) -> list[str]:
        """The counts, a line each."""
        pairs, empty, shortened = len(self.pairs), self.empty_rejects, self.shortened
        lines = [f"{several(pairs, 'pair')}, {empty:,} without a reject, {shortened:,} shortened"]
        if self.rows < pairs:
            lines.append(f"{several(self.rows, 'row')}, taken again from the first until there were as many pairs")
        elif self.rows > pairs:
            lines.append(f"the first of {self.rows:,} rows: --target_pair_count {self.rows} takes all of them")
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
                f"{several(len(self.unusable_lines), 'row')} left out, prompt or chosen is blank "
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
    return PreparedPairs(pairs, texts, len(usable), unusable_lines, shortened, empty_rejects, equal_rejects, formatted)


def _drawn_template(number: float) -> str:
    if number < 0.8:
        return "user"
    return "question" if number < 0.9 else "input"
