"""Who else is told how a run goes."""

import urllib.parse
from dataclasses import dataclass
from typing import Any

from src.config.flags import INPUT, MOST_STEPS, NOT_NEGATIVE, Flags, Given, Lines, Rule, flag

_LONGEST_HOST_LABEL = 63
_LONGEST_PROJECT = 128
_NOT_IN_PROJECTS = frozenset("/\\#?%:")


def is_address(text: str) -> bool:
    """Whether a text is an http or https address that can be asked; an empty one is none, and passes."""
    if not text:
        return True
    if not text.isascii() or not text.isprintable() or " " in text:
        return False
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    labels = (parts.hostname or "").rstrip(".").split(".")
    return (
        parts.scheme in ("http", "https")
        and port != 0
        and not parts.query
        and not parts.fragment
        and all(0 < len(label) <= _LONGEST_HOST_LABEL for label in labels)
    )


def is_project(text: str) -> bool:
    """Whether a text is a project of Weights & Biases, or an entity and a project."""
    entity, slash, project = text.rpartition("/")
    names = (entity, project) if slash else (project,)
    return not text or all(
        name.strip() and name.isprintable() and len(name) <= _LONGEST_PROJECT and not _NOT_IN_PROJECTS & set(name)
        for name in names
    )


def logging_address_flag() -> Any:
    """Where figures are posted, the same for every script."""
    return flag(
        "http://localhost:5000/", "see above", only_with=("fapi_logging_callback", 1),
        must=Rule(is_address, "is no address: write it like http://localhost:5000/"),
    )  # fmt: skip


def missing_address(callback: int, address: str) -> Lines:
    """A sentence where figures are to be posted to nowhere."""
    if callback and not address:
        yield "--fapi_logging_address is empty: --fapi_logging_callback 1 needs an address"


@dataclass(frozen=True)
class LogFlags(Flags, group="logs"):
    """A picture, TensorBoard, Weights & Biases and HTTP."""

    plot: int = flag(1, "1 draws loss.png in proj_dir, again and again as the run goes (with matplotlib)", (0, 1))
    sample_prompts: str = flag(
        "", "prompts of your own, one a line or as JSON lines: what the model answered before and answers now, on the "
        "console and in samples.jsonl", path=INPUT,
    )  # fmt: skip
    sample_steps: int = flag(
        0, "answer them every so many optimizer steps; 0: after the last step only", must=NOT_NEGATIVE, most=MOST_STEPS
    )
    tensorboard: int = flag(0, "1 writes proj_dir/tensorboard, too (with the package tensorboard)", (0, 1))
    wandb: str = flag(
        "", "Weights & Biases PROJECT or ENTITY/PROJECT; empty is off",
        must=Rule(is_project, "is no project: write PROJECT or ENTITY/PROJECT, without any of # ? % : \\"),
    )  # fmt: skip
    fapi_logging_callback: int = flag(0, "1 posts step and loss to fapi_logging_address", (0, 1))
    fapi_logging_address: str = logging_address_flag()

    def _contradictions(self, given: Given) -> Lines:
        yield from missing_address(self.fapi_logging_callback, self.fapi_logging_address)

    @property
    def wandb_names(self) -> tuple[str | None, str]:
        """(entity, project); None is the account's own."""
        entity, _, project = self.wandb.rpartition("/")
        return entity or None, project
