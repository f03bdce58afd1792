"""Devices, precision, and how memory is traded for time."""

from dataclasses import dataclass
from typing import Any

from src.config.flags import AT_LEAST_1, NOT_NEGATIVE, Flags, Given, Lines, flag

ACCELERATORS = ("auto", "gpu", "cuda", "cpu")
PRECISIONS = ("bf16", "fp32", "fp16", "tf32")
STRATEGIES = (
    "auto",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
)


def accelerator_flag(text: str = "auto takes a GPU if there is one") -> Any:
    """Where to compute, the same for every script."""
    return flag("auto", text, ACCELERATORS)


def precision_flag(text: str = "default: bf16 on a GPU, fp32 on a CPU") -> Any:
    """What to compute in, the same for every script."""
    return flag("", text, PRECISIONS)


@dataclass(frozen=True)
class HardwareFlags(Flags, group="hardware"):
    """The machine and how much of its memory a run takes."""

    accelerator: str = accelerator_flag()
    devices: int = flag(1, "GPUs per machine", must=AT_LEAST_1, most=1024)
    num_nodes: int = flag(1, "machines", must=AT_LEAST_1, most=10_000)
    strategy: str = flag(
        "auto",
        "auto: one device without DeepSpeed, several with stage 1, where it can be",
        STRATEGIES,
    )
    precision: str = precision_flag("bf16 (default on a GPU), fp32 (default on a CPU), fp16, tf32")
    grad_cp: int = flag(
        1, "1 recomputes each layer in the backward pass, 0 keeps everything, 2 keeps what fits into memory", (0, 1, 2)
    )
    memory_gib: float = flag(
        0.0, "GPU memory --grad_cp 2 may use in all; 0 is the whole card",
        must=NOT_NEGATIVE, most=10**6, only_with=("grad_cp", 2),
    )  # fmt: skip
    cuda_graph: int = flag(
        1, "1 records a step, or a chunk of rows, once per shape and replays it, 0 issues every kernel", (0, 1)
    )
    offload_activations: int = flag(
        0, "1 keeps what the backward needs in host memory; steps are then not recorded", (0, 1)
    )
    ds_bucket_mb: int = flag(200, "upper limit of DeepSpeed's buckets, million bytes", must=AT_LEAST_1, most=10**6)

    @property
    def strategy_flag(self) -> str:
        """The strategy as a flag names it: what a run chose by itself, and no flag can ask for, is auto's choice."""
        return self.strategy if self.strategy in STRATEGIES else "auto"

    @property
    def uses_deepspeed(self) -> bool:
        """Whether a DeepSpeed engine was asked for."""
        return self.strategy.startswith("deepspeed")

    @property
    def processes(self) -> int:
        """That train together: one for each GPU of all machines."""
        return self.devices * self.num_nodes

    def _contradictions(self, given: Given) -> Lines:
        if self.offload_activations and self.grad_cp == 2:
            yield "--grad_cp 2 fills a GPU, --offload_activations 1 empties it: use --grad_cp 1 or 0 with it"
        if self.accelerator == "cpu" and self.precision in ("fp16", "tf32"):
            yield f"--precision {self.precision} needs a GPU: use fp32 or bf16 with --accelerator cpu"
