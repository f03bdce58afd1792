"""Inspects, exports, blends and compares states and adapters: python -m src.commands.state COMMAND; -h lists them."""

from src.cli import given_state_flags
from src.config import STATE_COMMANDS
from src.errors import exit_on_user_error


def main() -> None:
    """Flags -> configuration -> command."""
    command, given = given_state_flags()
    config = STATE_COMMANDS[command].from_flags(given)
    from src.commands.state_files import run  # torch takes seconds to load; `-h` need not wait for it

    run(config)


if __name__ == "__main__":
    exit_on_user_error(main)
