"""Writes the weights that the demonstration's base model began its training with; see README.md beside this file.

Fresh weights as `train.py --train_type none` makes them, but with slower decays: the slowest channels then remember for
thousands of tokens instead of four hundred, as they do in large models after long training. A learned state is felt
for as long as the decays let it live.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

if find_spec("src") is None:
    print(
        "error: a module is started by name, python -m src.demo.make_start, in the folder of train.py", file=sys.stderr
    )
    sys.exit(2)

import torch

from src.checkpoint import save_model
from src.model.rwkv6 import RWKV6Shape

SHAPE = RWKV6Shape.from_sizes(n_layer=6, n_embd=192, vocab_size=257, head_size=64)
SEED = 42
DECAY_SHIFT = -2.5  # on the checkpoint's scale, decay = exp(-exp(time_decay))


def main() -> None:
    """Writes the file named on the command line."""
    weights = SHAPE.fresh_parameters(SEED, torch.float32)
    for name, tensor in weights.items():
        if name.endswith("time_decay"):
            tensor += DECAY_SHIFT
    save_model(sys.argv[1], weights)


if __name__ == "__main__":
    main()
