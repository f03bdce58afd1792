"""Trains the initial state of an RWKV-6 model; `python train.py -h` lists the flags."""

from src.cli import given_train_flags
from src.errors import exit_on_user_error


def main() -> None:
    """Flags -> configuration -> run. Without any flag: the bundled demonstration."""
    given = given_train_flags()
    from src.config import TrainConfig

    if given.get("resume") == "1" and "demo" not in given:
        from src.training.resume import completed_flags

        given = completed_flags(given)
    if given.get("demo") or not given:
        from src.commands.demo import run_demo

        run_demo(given)
        return
    config = TrainConfig.from_flags(given)
    from src.training.run import train

    train(config)


if __name__ == "__main__":
    exit_on_user_error(main)
