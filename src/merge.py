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
        ConfigError: The output is one of the inputs.
        CheckpointError: An input cannot be used, the state does not fit the base, or the output cannot
            be written. Nothing is then written.
    """
    storage.refuse_overlap({"base model": base_path, "state file": state_path}, {"output": output_path})
    base = open_checkpoint(base_path)
    states = load_state(state_path, base.info.shape)
    try:
        storage.save(output_path, {**base, **states})
    except MemoryError as error:
        raise CheckpointError(f"no memory left to write {output_path}: end other programs, or add swap") from error
    return MergeReport(
        shape=base.info.shape,
        base_dtype=base.info.dtype,
        state_dtype=str(states[state_key(0)].dtype).removeprefix("torch."),
        replaced_state=base.info.has_state,
        size_bytes=os.path.getsize(output_path),
    )
