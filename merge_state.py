"""Puts a trained state or adapter into its base model: python merge_state.py BASE FILE OUTPUT; -h lists the flags."""

import signal
import sys

from src.cli import given_merge_flags
from src.config import MergeConfig
from src.errors import exit_on_user_error


def main() -> int:
    """Flags -> configuration -> merged model."""
    config = MergeConfig.from_flags(given_merge_flags())
    from src.commands.merging import run  # torch takes seconds to load; `-h` need not wait for it

    # An ended process must take its unfinished file with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return run(config)


if __name__ == "__main__":
    exit_on_user_error(main)
