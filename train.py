"""Trains the initial state, adapters or weights of an RWKV-6 or RWKV-7 model; `python train.py -h` lists the flags."""

from src.cli import given_train_flags
from src.errors import exit_on_user_error


def main() -> int | None:
    """Flags -> configuration -> run. Without any flag: the bundled demonstration."""
    given = given_train_flags()
    if given.get("doctor") == "1":
        from src.commands.doctor import run_doctor

        return run_doctor(given)
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

        run_demo(given)
        return None
    if config.dry_run:
        from src.commands.dry_run import dry_run

        return dry_run(config)
    if config.evaluate:
        from src.commands.evaluate import evaluate

        evaluate(config)
        return None
    if config.preview:
        from src.training.preview import preview

        preview(config)
        return None
    from src.training.run import train

    train(config)
    return None


if __name__ == "__main__":
    exit_on_user_error(main)
