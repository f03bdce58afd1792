"""Errors a user can cause.

Each carries one sentence: the value seen, what was expected, the way out. Entry scripts
print it without a traceback and exit with code 2 (`EXIT_CODE`). Mistakes of the
programmer stay `assert`s and ordinary exceptions.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import NoReturn

from src.output import lasting_output

EXIT_CODE = 2


class UserError(Exception):
    """Something the user can put right; `str(error)` is the whole message."""


class ConfigError(UserError):
    """A flag, or a combination of flags, that cannot work."""


class CheckpointError(UserError):
    """A model or state file that is missing, damaged or of another kind."""


class DataError(UserError):
    """Training or preference data that cannot be read or used."""


class TrainingError(UserError):
    """A run that had to stop: a non-finite loss or gradient, or no memory left."""


class KernelError(UserError):
    """A CUDA operator, or what a library compiles at run time, could not be built or launched."""


_REQUIRED = ("torch", "pytorch_lightning", "bitsandbytes", "pyrwkv_tokenizer", "numpy", "tqdm")
"""Packages of requirements.txt that no program here does without, by the names they are imported by."""


def require_package(flags: str, name: str, instead: str) -> None:
    """Refuses flags without a package that only they need, before anything else takes time.

    Args:
        flags: as they were given.
        name: the package's, which is also that of its module.
        instead: what works without it.

    Raises:
        ConfigError: saying what to install.
    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"{flags} needs the package {name}, which is not installed: pip install {name}, or {instead}")


def exit_on_user_error(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with what `main` returns; a UserError, or a missing package, is one line and code 2."""
    with lasting_output():
        try:
            code = main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = EXIT_CODE
        except ModuleNotFoundError as error:
            if error.name not in _REQUIRED:
                raise
            print(
                f"error: {sys.executable} has no package {error.name}: activate the environment that holds them (as in "
                ". .venv/bin/activate), or install them, pip install -r requirements.txt",
                file=sys.stderr,
            )
            code = EXIT_CODE
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
    sys.exit(code or 0)
