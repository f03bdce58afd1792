"""Rows, batches and epochs."""

from dataclasses import dataclass

from src.config.flags import AT_LEAST_1, MOST_SEED, MOST_STEPS, NOT_NEGATIVE, Flags, Given, Lines, Rule, flag

DATALOAD_MODES = ("pack", "pad", "only", "get")


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
    accumulate_grad_batches: int = flag(1, "micro-batches per optimizer step", must=AT_LEAST_1, most=10**6)
    epoch_steps: int = flag(
        0, "micro-batches of an epoch on each device; 0 is one pass over the data", must=NOT_NEGATIVE, most=MOST_STEPS
    )
    epoch_count: int = flag(4, "the run ends after this many epochs", must=AT_LEAST_1, most=MOST_STEPS)
    epoch_begin: int = flag(
        0, "number of the first epoch; the schedule starts there", must=NOT_NEGATIVE, most=MOST_STEPS
    )
    epoch_save: int = flag(1, "save every so many epochs; 0 saves at the end only", must=NOT_NEGATIVE, most=MOST_STEPS)
    random_seed: int = flag(
        42, "-1 draws one", most=MOST_SEED,
        must=Rule(lambda seed: seed >= -1, "must be at least 0, or -1 to draw one"),
    )  # fmt: skip

    @property
    def order_seed(self) -> int | None:
        """Of the order of passes; None: that of the file."""
        return self.random_seed if self.data_shuffle else None

    def _contradictions(self, given: Given) -> Lines:
        if self.epoch_begin >= self.epoch_count:
            yield (
                f"--epoch_begin {self.epoch_begin} leaves nothing to train with --epoch_count {self.epoch_count}: "
                "epochs are numbered from epoch_begin to epoch_count - 1"
            )
        if self.dataload == "get" and not self.data_shuffle:
            yield "--data_shuffle 0 has no meaning with --dataload get, which takes windows anywhere: use pad or pack"
        if self.dataload == "only" and self.micro_bsz > 1:
            yield f"--dataload only gives rows of unequal length: --micro_bsz {self.micro_bsz} must be 1"
