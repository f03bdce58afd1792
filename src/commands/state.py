"""Inspects, exports, blends and compares states and adapters: python -m src.commands.state COMMAND; -h lists them."""

import sys
from importlib.util import find_spec

if find_spec("src") is None:
    print(
        "error: a module is started by name, python -m src.commands.state, in the folder of train.py", file=sys.stderr
    )
    sys.exit(2)

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
