"""Trains the initial state, adapters or weights of an RWKV-6 or RWKV-7 model; `python train.py -h` lists the flags."""

from collections.abc import Callable
from functools import partial

from src.cli import given_train_flags
from src.errors import exit_on_user_error
from src.startup import keep_bytecode, quick_imports


def main() -> int | None:
    """Flags -> configuration -> run. Without any flag: the bundled demonstration."""
    given = given_train_flags()
    keep_bytecode()
    with quick_imports():
        command = _command(given)
    code = command()
    return code if isinstance(code, int) else None


def _command(given: dict[str, str]) -> Callable[[], object]:
    """What the flags ask for."""
    if given.get("doctor") == "1":
        from src.commands.doctor import run_doctor

        return partial(run_doctor, given)
    from src.config import TrainConfig, translated

    if given.get("resume") == "1" and "demo" not in given:
        from src.training.resume import completed_flags

        given = completed_flags(given)
    config = TrainConfig.from_flags(given) if given and not given.get("demo") else None
    from src.training.report import say

    for note in translated(given).notes:
        say(f"note: {note}")
    if config is None:
        from src.commands.demo import run_demo

        return partial(run_demo, given)
    if config.dry_run:
        from src.commands.dry_run import dry_run

        return partial(dry_run, config)
    if config.evaluate:
        from src.commands.evaluate import evaluate

        return partial(evaluate, config)
    if config.preview:
        from src.training.preview import preview

        return partial(preview, config)
    from src.training.run import train

    return partial(train, config)


if __name__ == "__main__":
    exit_on_user_error(main)
