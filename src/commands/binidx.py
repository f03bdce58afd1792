"""Writes data as tokens, in binidx files: python -m src.commands.binidx IN ... OUT; -h lists flags."""

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
