"""How long a row fits a card with its memories on it, by the program's estimate (`--chunk_ctx auto`); needs no GPU.

    python tests/bench/longest_rows.py

Behind it the tokens of a chunk that `--chunk_keep host` leaves room for with a row of a million: then a row's length is
a matter of host memory, of which each chunk takes what the last column says.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

from src.adapters.method import method_of  # noqa: E402
from src.config import TrainConfig  # noqa: E402
from src.errors import ConfigError  # noqa: E402
from src.model.rwkv6 import RWKV6Shape  # noqa: E402
from src.training import memory  # noqa: E402

CARDS_GIB = (8, 12, 24)
CONTEXT_GIB = 0.5
"""What a CUDA context takes before the program has anything."""
LONGEST = 10**8
MILLION = 1 << 20
SIZES = {"1.6B": (24, 2048), "3B": (32, 2560), "7B": (32, 4096)}
WORK: dict[str, dict[str, str]] = {
    "states, nf4": {},
    "LoRA, nf4": {"peft": "lora", "quant": "1"},
    "LoRA, bf16": {"peft": "lora", "quant": "0"},
}


def chunk_of(shape: RWKV6Shape, flags: dict[str, str], tokens: int) -> int:
    """Tokens of a chunk of such a row on a card of which so much is free; 0: it fits whole, -1: not at all."""
    given = {"load_model": "b", "data_file": "d", "dataload": "pad", "chunk_ctx": "auto", "ctx_len": str(tokens)}
    config = TrainConfig.from_flags({**given, **flags})
    try:
        return memory.chunk_that_fits(config, method_of(config), shape, torch.device("cuda"), torch.bfloat16)
    except ConfigError:
        return -1


def longest(shape: RWKV6Shape, flags: dict[str, str]) -> int:
    """The most tokens of a row that fit, to three digits."""
    low, high = 0, LONGEST
    while high - low > max(low // 200, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if chunk_of(shape, flags, middle) >= 0 else (low, middle)
    return int(float(f"{low:.2e}"))


def main() -> None:
    """Prints the table."""
    print("| work | " + " | ".join(f"{gib} GB" for gib in CARDS_GIB) + " | host memory a chunk |")
    print("|---|" + "---|" * (len(CARDS_GIB) + 1))
    for size, (layers, channels) in SIZES.items():
        wide = channels == 4096
        shape = RWKV6Shape.from_sizes(n_layer=layers, n_embd=channels, vocab_size=65536, double_extra_dim=wide)
        for name, flags in WORK.items():
            cells = []
            for gib in CARDS_GIB:
                memory.free_bytes = lambda device, gib=gib: int((gib - CONTEXT_GIB) * 2**30)  # type: ignore[assignment, misc]
                tokens = longest(shape, flags)
                on_host = chunk_of(shape, {**flags, "chunk_keep": "host"}, MILLION)
                cells.append(f"{tokens:,} ({on_host:,})" if tokens else "–")
            print(f"| {size} {name} | " + " | ".join(cells) + f" | {shape.memory_bytes(2) / 2**20:.0f} MiB |")


if __name__ == "__main__":
    main()
