"""Models with what was trained put in."""

import os
from dataclasses import dataclass

from src import storage
from src.checkpoint import load_state, open_checkpoint
from src.errors import CheckpointError
from src.model.shape import ModelShape, state_key
from src.storage import PathLike


@dataclass(frozen=True)
class MergeReport:
    """What `merge_state` did.

    Attributes:
        shape: sizes of the base model.
        base_dtype: dtype of the base model's weights, as in CheckpointInfo.
        state_dtype: dtype of the merged state.
        replaced_state: whether the base already had a state, now replaced.
        size_bytes: size of the written file.
    """

    shape: ModelShape
    base_dtype: str
    state_dtype: str
    replaced_state: bool
    size_bytes: int


def merge_state(base_path: PathLike, state_path: PathLike, output_path: PathLike) -> MergeReport:
    """Writes a copy of the base model that starts from the given state.

    Every other tensor is copied bit for bit, in its dtype; a state that the base already has is
    replaced; the new one keeps the dtype of its file. Key prefixes are taken off, because inference
    clients do not know them. Tensors go from the base's memory map to the output one by one.

    Raises:
        CheckpointError: An input cannot be used, the state does not fit the base, the output is one
            of the inputs, or it cannot be written. Nothing is then written.
    """
    for role, source in (("base model", base_path), ("state file", state_path)):
        if _same_file(source, output_path):
            raise CheckpointError(
                f"the output {output_path} is the {role} itself and would overwrite it; give another name"
            )
    base = open_checkpoint(base_path)
    states = load_state(state_path, base.info.shape)
    storage.save(output_path, {**base, **states})
    return MergeReport(
        shape=base.info.shape,
        base_dtype=base.info.dtype,
        state_dtype=str(states[state_key(0)].dtype).removeprefix("torch."),
        replaced_state=base.info.has_state,
        size_bytes=os.path.getsize(output_path),
    )


def _same_file(first: PathLike, second: PathLike) -> bool:
    """Whether two paths name one file, by links too; the second need not exist."""
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
