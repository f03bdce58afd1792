"""Micro-batches of preference pairs, packed into one row.

Three ways to lay out a pair, as `PairForm` names them. In the first, the prompt is computed once: all of
it but its last token is a root segment, and each answer is a segment that continues it, beginning with the
prompt's last token, whose successor is the answer's first:

    root      inputs p0 … p(n-2)          targets p1 … p(n-1)
    chosen    inputs p(n-1), c0 … c(m-2)  targets c0 … c(m-1)
    rejected  inputs p(n-1), r0 … r(k-2)  targets r0 … r(k-1)

so every target is scored in the same context as in two full rows. A prompt of one token leaves nothing
for a root; its answers are roots themselves.

Which pairs make up which batch: see `src.data.passes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from src.data.documents import Positions
from src.data.passes import PassDataset, listed, shuffled_batches
from src.data.preferences import PreferencePair
from src.data.rounding import EXACT, PADDING_TOKEN, Rounding, ceil_div
from src.errors import DataError
from src.layout import SegmentLayout
from src.losses import IGNORED_TARGET, PLAIN_REJECT_TOKENS, Role, group_number
from src.tokenizer import Tokenizer

_MUCH = 0.1
"""Of the pairs, texts that are cut."""


class PairForm(Enum):
    """How a pair becomes segments."""

    SHARED_PROMPT = "shared prompt"
    """Prompt once, then both answers; for `orpo_loss`."""
    TWO_ROWS = "two rows"
    """Prompt and answer twice; the same loss for more work, for comparison."""
    RELEASED = "released"
    """Two rows padded with token 0 to the longer; for `orpo_loss_released`.

    Which pairs train on the chosen answer alone, and which end of a long prompt is cut, is the original's, too.
    """


@dataclass(frozen=True, eq=False)
class PreferenceBatch:
    """Inputs and targets of several pairs in one row; T positions, P pairs.

    Attributes:
        tokens: int64 [1, T].
        targets: int64 [T], the token to predict at each position; -100 where nothing counts.
        groups: int64 [T]. `losses.group_number` of pair and role; with PairForm.RELEASED row numbers, two per pair.
        reject_lengths: int64 [P], tokens of each rejected answer; 0 where the pair trains on the chosen one alone.
        layout: borders of the segments.
        sample_indices: the pairs, by their place in the data set.
        token_count: positions that are not padding.
        rounding: to which it is filled up.
        step_weight: factor on the batch's mean loss that makes the plain mean over all batches of an
            optimizer step (accumulated ones, all ranks) the mean over the step's pairs.
        reference: fp64 [P, 2], see `PreferenceDataset.references`; None without.
    """

    tokens: Tensor
    targets: Tensor
    groups: Tensor
    reject_lengths: Tensor
    layout: SegmentLayout
    sample_indices: tuple[int, ...]
    token_count: int
    rounding: Rounding = EXACT
    step_weight: float = 1.0
    reference: Tensor | None = None

    @property
    def pairs(self) -> int:
        """P."""
        return len(self.sample_indices)

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            groups=self.groups.to(device),
            reject_lengths=self.reject_lengths.to(device),
            layout=self.layout.to(device),
        )


@dataclass(frozen=True)
class PreferencePlan:
    """What a run will see, in numbers for the user.

    Attributes:
        pairs: in the data set.
        plain_pairs: whose rejected answer is blank or too short: trained on the chosen one alone, or left out.
        equal_pairs: whose rejected answer is the chosen one: the same.
        left_out: whether they are left out.
        shortest_reject: tokens of the shortest rejected answer that counts.
        shortened_prompts: prompts that lost their beginning, or in the released form their end.
        keeps_prompt_end: which of the two.
        shortened_answers: answers that lost their end.
        longest: most tokens of a prompt and of an answer.
        positions_per_pass: of all pairs in the chosen form, padding included.
    """

    pairs: int
    plain_pairs: int
    equal_pairs: int
    shortest_reject: int
    shortened_prompts: int
    keeps_prompt_end: bool
    shortened_answers: int
    longest: int
    positions_per_pass: int
    left_out: bool = False

    def statements(self) -> tuple[str, ...]:
        """What the user should know about the pairs, one sentence each."""
        said = []
        if self.plain_pairs:
            reject = "reject" if self.shortest_reject == 1 else f"reject of {self.shortest_reject} tokens or more"
            fate = "are left out: the loss compares two answers" if self.left_out else "train on the chosen answer"
            said.append(f"{self.plain_pairs} of {self.pairs} pairs have no {reject} and {fate}.")
        if self.equal_pairs:
            fate = "are left out" if self.left_out else "train on that alone"
            said.append(
                f"{self.equal_pairs} of {self.pairs} pairs have a reject that is their chosen answer and {fate}."
            )
        if self.shortened_prompts or self.shortened_answers:
            cut_at = "beginning" if self.keeps_prompt_end else "end, as the original does"
            much = "warning: " if self.shortened_prompts + self.shortened_answers >= _MUCH * self.pairs else ""
            said.append(
                f"{much}--rlhf_max_corpus_len {self.longest} cuts {self.shortened_prompts} prompts (at their "
                f"{cut_at}) and {self.shortened_answers} answers (at their end)."
            )
        return tuple(said)


class PreferenceDataset(PassDataset[PreferenceBatch]):
    """Every batch of a run on pairs, by its step; see `PassDataset`.

    Args:
        pairs: at least one.
        source: the file they came from, for messages.
        form: how a pair becomes segments.
        longest: most tokens of a prompt and of an answer, see `PreferencePair.shortened`. Answers that it makes
            equal are equal.
        micro_bsz: pairs of a batch.
        seed: 0 or more; None: every pass in the order of the data.
        tokenizer: recognises rejects of nothing but white space; None: only a reject without tokens is blank. In the
            released form the number of tokens alone counts.
        compares: whether the loss has nothing to say of pairs without a reject of their own, which are left out.
        numbers: of each pair in its file, from 0, where they are some of its pairs.
        **share: `rank`, `world_size`, `epoch_steps` and `accumulate` of `PassDataset`.

    Attributes:
        references: fp64 [number of pairs, 2], log-probabilities of chosen and rejected answers under a reference
            model, for losses that need them; None until somebody knows them.

    Raises:
        DataError: `longest` cuts every chosen answer, or no pair is left.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        *,
        source: str,
        form: PairForm,
        longest: int,
        micro_bsz: int,
        seed: int | None,
        tokenizer: Tokenizer | None = None,
        compares: bool = False,
        numbers: Sequence[int] | None = None,
        **share: int,
    ) -> None:
        assert pairs
        assert min(longest, micro_bsz) >= 1
        assert seed is None or seed >= 0
        shortest, largest = (pick(len(pair.chosen) for pair in pairs) for pick in (min, max))
        if shortest > longest:
            raise DataError(
                f"--rlhf_max_corpus_len {longest} cuts every chosen answer of {source}: the shortest has "
                f"{shortest} tokens, the longest {largest}; give at least {shortest}, better {largest}."
            )
        self.source = source
        self._numbers = range(len(pairs)) if numbers is None else numbers
        as_released = form is PairForm.RELEASED
        self._pairs = [pair.shortened(longest, keeps_prompt_end=not as_released) for pair in pairs]
        shortest_reject = PLAIN_REJECT_TOKENS + 1 if as_released else 1
        lacking = [
            len(pair.rejected) < shortest_reject or (not as_released and _is_blank(pair.rejected, tokenizer))
            for pair in self._pairs
        ]
        self._plain = [
            lacks or (not as_released and pair.rejected == pair.chosen)
            for lacks, pair in zip(lacking, self._pairs, strict=True)
        ]
        plain = np.array(self._plain)
        self._visited: Positions = np.flatnonzero(~plain) if compares else np.arange(len(pairs))
        if not len(self._visited):
            raise DataError(
                f"{source}: none of its {len(pairs)} pairs has a reject, and the loss compares two answers; "
                "rlhf_generate_reject.py makes rejects."
            )
        self.references: Tensor | None = None
        self._form = form
        self._micro_bsz = micro_bsz
        self._seed = seed
        super().__init__(ceil_div(len(self._visited), micro_bsz), **share)
        self.plan = PreferencePlan(
            pairs=len(pairs),
            plain_pairs=sum(lacking),
            equal_pairs=sum(self._plain) - sum(lacking),
            shortest_reject=shortest_reject,
            keeps_prompt_end=not as_released,
            shortened_prompts=sum(len(pair.prompt) > longest for pair in pairs),
            shortened_answers=sum(len(tokens) > longest for pair in pairs for tokens in (pair.chosen, pair.rejected)),
            longest=longest,
            positions_per_pass=sum(self._positions(number) for number in self._visited.tolist()),
            left_out=compares,
        )

    def _divide(self, pass_number: int) -> list[Positions]:
        return shuffled_batches(self._visited, self._micro_bsz, self._seed, pass_number)

    def _batch(self, number: int, rounding: Rounding) -> PreferenceBatch:
        return self.batch(self._indices(number).tolist(), rounding)

    @property
    def tokens_per_pass(self) -> int:
        return sum(self._positions(number, padded=False) for number in range(len(self._pairs)))

    def _weight(self, number: int) -> int:
        return len(self._indices(number))

    def _positions_in(self, number: int) -> int:
        return sum(self._positions(index) for index in self._indices(number).tolist())

    def batch(self, indices: Sequence[int], rounding: Rounding = EXACT) -> PreferenceBatch:
        """The named pairs as one batch."""
        segments = _Segments()
        for place, index in enumerate(indices):
            _ADD[self._form](segments, place, self._pairs[index], self._plain[index])
        lengths = [0 if self._plain[index] else len(self._pairs[index].rejected) for index in indices]
        made = segments.batch(indices, lengths, rounding)
        return made if self.references is None else replace(made, reference=self.references[list(indices)])

    def batches_in_order(self) -> Iterator[PreferenceBatch]:
        """Every pair once, in the order of the data set; for evaluation."""
        for start in range(0, len(self._visited), self._micro_bsz):
            yield self.batch(self._visited[start : start + self._micro_bsz].tolist())

    @property
    def visited(self) -> list[int]:
        """Numbers of the pairs that are not left out."""
        return list(map(int, self._visited))

    def seen_in(self, steps: range) -> list[int]:
        """Numbers of the pairs in these batches of this rank."""
        seen: set[int] = set()
        for step in steps:
            seen.update(self._indices(step * self._world_size + self._rank).tolist())
            if len(seen) == len(self._visited):
                break
        return sorted(seen)

    def pair(self, number: int) -> PreferencePair:
        """A pair as it is trained on, cut to the longest."""
        return self._pairs[number]

    def describe(self, batch: PreferenceBatch) -> str:
        """Names what a batch was made of, for messages; pairs count from 1."""
        numbers = [self._numbers[index] + 1 for index in batch.sample_indices]
        return f"pair{'s' if batch.pairs > 1 else ''} {listed(numbers)} of {self.source}"

    def _positions(self, index: int, *, padded: bool = True) -> int:
        pair = self._pairs[index]
        prompt, chosen, rejected = len(pair.prompt) - 1, len(pair.chosen), len(pair.rejected)
        if self._form is PairForm.RELEASED:
            return 2 * prompt + (2 * max(chosen, rejected) if padded else chosen + rejected)
        if self._plain[index]:
            return prompt + chosen
        return (prompt if self._form is PairForm.SHARED_PROMPT else 2 * prompt) + chosen + rejected


_Segment = tuple[list[int], list[int], list[int]]
"""Inputs, targets and groups."""


class _Segments:
    """Roots and continuations of a row in the making."""

    def __init__(self) -> None:
        self._roots: list[_Segment] = []
        self._children: list[_Segment] = []
        self._parents: list[int] = []
        self._padding = 0

    def add_root(self, inputs: list[int], targets: list[int], groups: list[int], padding: int = 0) -> int:
        """Its number; `padding` of its positions are filled up with token 0."""
        self._roots.append((inputs, targets, groups))
        self._padding += padding
        return len(self._roots) - 1

    def add_child(self, inputs: list[int], targets: list[int], groups: list[int], parent: int) -> None:
        """A segment that continues root number `parent`."""
        self._children.append((inputs, targets, groups))
        self._parents.append(parent)

    def batch(self, indices: Sequence[int], reject_lengths: Sequence[int], rounding: Rounding) -> PreferenceBatch:
        """All segments in one row. Positions that do not count are in the group beyond the last pair's."""
        token_count = sum(len(inputs) for inputs, _, _ in (*self._roots, *self._children)) - self._padding
        roots, children = _filled(self._roots, rounding), _filled(self._children, rounding)
        joined = [np.fromiter(chain.from_iterable(part), np.int64) for part in zip(*roots, *children, strict=True)]
        tokens, targets, groups = map(torch.from_numpy, joined)
        return PreferenceBatch(
            tokens=tokens[None],
            targets=targets,
            groups=groups.masked_fill(targets == IGNORED_TARGET, group_number(len(indices), Role.PROMPT)),
            reject_lengths=torch.tensor(reject_lengths, dtype=torch.int64),
            layout=SegmentLayout.branching(
                [len(inputs) for inputs, _, _ in roots],
                [len(inputs) for inputs, _, _ in children],
                [*self._parents, *[0] * (len(children) - len(self._parents))],
            ),
            sample_indices=tuple(indices),
            token_count=token_count,
            rounding=rounding,
        )


def _filled(segments: list[_Segment], rounding: Rounding) -> list[_Segment]:
    """With segments of padding after them."""
    lengths = rounding.padding([len(inputs) for inputs, _, _ in segments])
    return segments + [([PADDING_TOKEN] * length, [IGNORED_TARGET] * length, [0] * length) for length in lengths]


def _answers(pair: PreferencePair, plain: bool) -> list[tuple[Role, list[int]]]:
    chosen = (Role.CHOSEN, pair.chosen)
    return [chosen] if plain else [chosen, (Role.REJECTED, pair.rejected)]


def _add_shared_prompt(segments: _Segments, place: int, pair: PreferencePair, plain: bool) -> None:
    prompt = pair.prompt
    parent = None
    if len(prompt) > 1:
        parent = segments.add_root(prompt[:-1], prompt[1:], [group_number(place, Role.PROMPT)] * (len(prompt) - 1))
    for role, answer in _answers(pair, plain):
        inputs, groups = prompt[-1:] + answer[:-1], [group_number(place, role)] * len(answer)
        if parent is None:
            segments.add_root(inputs, answer, groups)
        else:
            segments.add_child(inputs, answer, groups, parent)


def _add_two_rows(segments: _Segments, place: int, pair: PreferencePair, plain: bool) -> None:
    for role, answer in _answers(pair, plain):
        row = pair.prompt + answer
        prompt_targets = pair.prompt[1:] if role is Role.CHOSEN else [IGNORED_TARGET] * (len(pair.prompt) - 1)
        groups = [group_number(place, Role.PROMPT)] * len(prompt_targets) + [group_number(place, role)] * len(answer)
        segments.add_root(row[:-1], prompt_targets + answer, groups)


def _add_released(segments: _Segments, place: int, pair: PreferencePair, plain: bool) -> None:
    rows = (pair.prompt + pair.chosen, pair.prompt + pair.rejected)
    width = max(map(len, rows)) - 1
    for side, row in enumerate(rows):
        padding = [0] * (width + 1 - len(row))
        segments.add_root(row[:-1] + padding, row[1:] + padding, [2 * place + side] * width, padding=len(padding))


_ADD = {
    PairForm.SHARED_PROMPT: _add_shared_prompt,
    PairForm.TWO_ROWS: _add_two_rows,
    PairForm.RELEASED: _add_released,
}


def _is_blank(tokens: list[int], tokenizer: Tokenizer | None) -> bool:
    return tokenizer is not None and not tokenizer.decode(tokens).strip()
