"""Rows, batches and epochs, and which tokens the loss is taken on."""

from __future__ import annotations

import json
from dataclasses import dataclass

from src.config.flags import (
    AT_LEAST_1,
    MOST_SEED,
    MOST_STEPS,
    NOT_NEGATIVE,
    Flags,
    Given,
    Lines,
    Rule,
    flag,
    parsed_json,
    shortened,
)

DATALOAD_MODES = ("pack", "pad", "only", "get")
MASK_KINDS = ("none", "pad", "qa", "se")

_MASK_KEYS = ("mask0", "mask1")
_MASK_EXAMPLE = '{"mask0": "text that ends", "mask1": "text that begins"}'


@dataclass(frozen=True)
class LossMask:
    """Which tokens the loss is taken on; on padding never.

    Attributes:
        kind: none and pad: every one; qa: answers; se: what stands between two texts; "": qa where roles are known from
            the data's structure, else pad.
        begin, end: the two texts, with `se`.
    """

    kind: str = ""
    begin: str = ""
    end: str = ""

    @property
    def finds_in_text(self) -> bool:
        """Whether what counts is found in the text of documents."""
        return self.kind in ("qa", "se")

    @property
    def takes_all(self) -> bool:
        """Whether every token counts, whatever the data say."""
        return self.kind in ("none", "pad")


BY_DATA = LossMask()
"""What the data say themselves."""


@dataclass(frozen=True)
class DataFlags(Flags, group="data"):
    """How the data are cut into steps and epochs."""

    ctx_len: int = flag(1024, "longest row in tokens", must=AT_LEAST_1, most=10**8)
    dataload: str = flag(
        "", "pack (default): whole documents share a row, states reset at their borders; pad: one a row, padded; only: "
        "one alone; get: windows anywhere",
        DATALOAD_MODES,
    )  # fmt: skip
    data_shuffle: int = flag(1, "1: every pass in an order of its own; 0: in the order of the file", (0, 1))
    micro_bsz: int = flag(1, "rows (or preference pairs) per device and step", must=AT_LEAST_1, most=10**6)
    accumulate_grad_batches: int = flag(1, "micro-batches per optimizer step", must=AT_LEAST_1, most=10**5)
    epoch_steps: int = flag(
        0, "micro-batches of an epoch on each device; 0 is one pass over the data", must=NOT_NEGATIVE, most=MOST_STEPS
    )
    epoch_count: int = flag(4, "the run ends after this many epochs", must=AT_LEAST_1, most=MOST_STEPS)
    epoch_begin: int = flag(
        0, "number of the first epoch; the schedule starts there", must=NOT_NEGATIVE, most=MOST_STEPS
    )
    epoch_save: int = flag(1, "save every so many epochs; 0 saves at the end only", must=NOT_NEGATIVE, most=MOST_STEPS)
    val_steps: int = flag(
        0, "measure held-out data every so many optimizer steps, too, and keep the best result as rwkv-best.pth; 0 "
        "does not",
        must=NOT_NEGATIVE, most=MOST_STEPS,
    )  # fmt: skip
    early_stop: int = flag(
        0, "end the run after so many of these measurements without a better one; 0 does not",
        must=NOT_NEGATIVE, most=MOST_STEPS,
    )  # fmt: skip
    loss_mask: str = flag(
        "", "tokens the loss is on: pad or none: every one; qa: answers; se: from one text of mask_id to the other; "
        "default: qa for entries with roles, else pad. Padding never counts",
        MASK_KINDS,
    )  # fmt: skip
    mask_id: str = flag("", f"the two texts of se, as JSON: {_MASK_EXAMPLE}")
    preview: int = flag(
        0, "print so many documents with what the loss is on, and end: nothing is trained or written",
        must=NOT_NEGATIVE, most=10**6,
    )  # fmt: skip
    random_seed: int = flag(
        42, "-1 draws one", most=MOST_SEED,
        must=Rule(lambda seed: seed >= -1, "must be at least 0, or -1 to draw one"),
    )  # fmt: skip

    @property
    def order_seed(self) -> int | None:
        """Of the order of passes; None: that of the file."""
        return self.random_seed if self.data_shuffle else None

    @property
    def mask(self) -> LossMask:
        """`loss_mask` and `mask_id` as one value."""
        texts = _mask_texts(self.mask_id)[0] if self.loss_mask == "se" else {}
        return LossMask(self.loss_mask, texts.get("mask1", ""), texts.get("mask0", ""))

    def _contradictions(self, given: Given) -> Lines:
        if self.mask_id:
            yield from _mask_texts(self.mask_id)[1]
        elif self.loss_mask == "se":
            yield f"--loss_mask se needs --mask_id, the two texts it takes the loss between: '{_MASK_EXAMPLE}'"
        if self.epoch_begin >= self.epoch_count:
            yield (
                f"{self._seen('epoch_begin', given)} leaves nothing to train with {self._seen('epoch_count', given)}: "
                "epochs are numbered from epoch_begin to epoch_count - 1"
            )
        if self.dataload == "get" and not self.data_shuffle:
            yield "--data_shuffle 0 has no meaning with --dataload get, which takes windows anywhere: use pad or pack"
        if self.dataload == "only" and self.micro_bsz > 1:
            yield f"--dataload only gives rows of unequal length: {self._seen('micro_bsz', given)} must be 1"

    def _remarks(self) -> Lines:
        if self.mask_id and self.loss_mask != "se":
            yield f"--mask_id {shortened(self.mask_id)} has no effect without --loss_mask se"


def _mask_texts(text: str) -> tuple[dict[str, str], list[str]]:
    """The texts of `--mask_id` by key, and a sentence for everything that is wrong with it."""
    try:
        content, twice = parsed_json(text)
    except (ValueError, RecursionError) as error:
        return {}, [f"--mask_id {shortened(text)} is no JSON ({error}): write it as '{_MASK_EXAMPLE}'"]
    if not isinstance(content, dict):
        return {}, [f"--mask_id {shortened(text)} is no JSON object: write it as '{_MASK_EXAMPLE}'"]
    problems = [f"--mask_id has the key {shortened(key)!r} twice: leave one out" for key in twice]
    problems += [
        f"--mask_id has the unknown key {shortened(key)!r}: it has {' and '.join(_MASK_KEYS)}"
        for key in content
        if key not in _MASK_KEYS
    ]
    for key in _MASK_KEYS:
        if key not in content:
            problems.append(f"--mask_id {shortened(text)} lacks {key}: write it as '{_MASK_EXAMPLE}'")
        elif not isinstance(content[key], str) or not content[key].strip(" "):
            problems.append(f"--mask_id: {key} is {shortened(json.dumps(content[key]))}, expected a text")
    if not problems and content["mask0"] == content["mask1"]:
        problems.append(
            f"--mask_id: mask0 and mask1 are both {shortened(json.dumps(content['mask0']))}: give two texts"
        )
    return ({} if problems else content), problems
