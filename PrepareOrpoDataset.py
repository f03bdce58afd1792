"""Turns a CSV or JSONL file of preferences into the token pairs that train.py reads; -h lists the flags."""

from src.cli import given_flags
from src.config import PairConfig
from src.errors import exit_on_user_error


def main() -> None:
    """Flags -> configuration -> pairs."""
    given = given_flags(
        PairConfig,
        "PrepareOrpoDataset.py",
        "Tokenises prompt, chosen and reject of every row for train.py --orpo 1. Needs no GPU.",
    )
    config = PairConfig.from_flags(given)
    from src.commands.preparation import prepare_pairs

    prepare_pairs(config)


if __name__ == "__main__":
    exit_on_user_error(main)
