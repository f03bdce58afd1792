"""Fills the reject column of a preference file with answers sampled from a base model; -h lists the flags."""

from src.cli import given_flags
from src.config import RejectConfig
from src.errors import exit_on_user_error


def main() -> None:
    """Flags -> configuration -> generation."""
    given = given_flags(
        RejectConfig,
        "rlhf_generate_reject.py",
        "Samples a rejected answer for every prompt of a CSV or JSONL file. Interrupted, it goes on where it was.",
    )
    config = RejectConfig.from_flags(given)
    from src.commands.preparation import generate_rejects

    generate_rejects(config)


if __name__ == "__main__":
    exit_on_user_error(main)
