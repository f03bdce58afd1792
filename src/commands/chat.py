"""A chat with a model and what was trained on it: python -m src.commands.chat --load_model MODEL; -h lists flags."""

import sys
from importlib.util import find_spec

if find_spec("src") is None:
    print("error: a module is started by name, python -m src.commands.chat, in the folder of train.py", file=sys.stderr)
    sys.exit(2)

from src.cli import given_flags
from src.config import ChatConfig
from src.errors import exit_on_user_error


def main() -> None:
    """Flags -> configuration -> chat."""
    given = given_flags(
        ChatConfig,
        "python -m src.commands.chat",
        "A chat with a model, with a tuned state or an adapter. Without a terminal every line of standard input is a "
        "prompt, and answers are printed with a blank line between them.",
    )
    config = ChatConfig.from_flags(given)
    from src.commands.conversation import chat  # torch takes seconds to load; `-h` need not wait for it

    chat(config)


if __name__ == "__main__":
    exit_on_user_error(main)
