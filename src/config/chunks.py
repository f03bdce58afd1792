"""Rows longer than what fits into memory at a time."""

from dataclasses import dataclass

from src.config.flags import MOST_STEPS, NOT_NEGATIVE, Flags, Given, Lines, Rule, flag

KEPT_WHERE = ("device", "host", "inputs")
AUTO = "auto"
AS_MANY_AS_FIT = -1
"""What `--chunk_ctx auto` is as a number."""


@dataclass(frozen=True)
class ChunkFlags(Flags, group="chunks"):
    """How rows are cut into chunks that are computed one after the other."""

    chunk_ctx: int = flag(
        0, "rows of more tokens are computed in chunks of so many, with the whole row's gradient; auto: as many as "
        "fit; if not given rows are computed whole",
        must=Rule(lambda tokens: tokens >= AS_MANY_AS_FIT, "must be at least 1, or auto"), most=10**8,
    )  # fmt: skip
    bptt_chunks: int = flag(
        0, "the gradient passes borders within so many chunks, 1: none, as RWKV-PEFT's; 0: all",
        must=NOT_NEGATIVE, most=MOST_STEPS,
    )  # fmt: skip
    chunk_keep: str = flag(
        "device", "where the memory waits that each chunk begins from; inputs: on the host, and with it what enters "
        "each layer, which saves a forward pass",
        KEPT_WHERE,
    )  # fmt: skip

    def _contradictions(self, given: Given) -> Lines:
        text = given.get("chunk_ctx", "").strip("+- ")
        if text and not text.strip("0"):
            yield "--chunk_ctx 0 must be at least 1: leave it out to compute rows whole"

    def _remarks(self) -> Lines:
        if not self.chunk_ctx:
            for name in ("bptt_chunks", "chunk_keep"):
                if getattr(self, name) != getattr(ChunkFlags, name):
                    yield f"--{name} {getattr(self, name)} has no effect without --chunk_ctx"
