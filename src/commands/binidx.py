"""Writes data as tokens, in binidx files: python -m src.commands.binidx IN ... OUT; -h lists flags."""

import sys
from importlib.util import find_spec

if find_spec("src") is None:
    print(
        "error: a module is started by name, python -m src.commands.binidx, in the folder of train.py", file=sys.stderr
    )
    sys.exit(2)

from src.cli import given_binidx_flags
from src.config import BinidxConfig
from src.errors import exit_on_user_error


def main() -> None:
    """Flags -> configuration -> files."""
    config = BinidxConfig.from_flags(given_binidx_flags())
    from src.commands.tokens import write_tokens

    write_tokens(config)


if __name__ == "__main__":
    exit_on_user_error(main)
