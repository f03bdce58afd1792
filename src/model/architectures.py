"""Which architectures there are, and which of them a file is of."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from src.errors import CheckpointError
from src.model.rwkv6 import RWKV6Shape
from src.model.rwkv7 import RWKV7Shape, from_hf, is_hf
from src.model.shape import ModelShape, Shape

SHAPES: tuple[type[ModelShape], ...] = (RWKV7Shape, RWKV6Shape)
FRESH = RWKV6Shape
"""What a model without a file is, unless the flags say it."""

_FAMILIES = " or ".join(shape.family for shape in reversed(SHAPES))


def named(architecture: str) -> type[ModelShape]:
    """The architecture that `--my_testing` names."""
    return next(shape for shape in SHAPES if shape.architecture == architecture)


def recognise(keys: Collection[str]) -> type[ModelShape]:
    """The architecture of a model with these keys.

    Raises:
        CheckpointError: they are those of another kind of file. The sentence begins with its verb.
    """
    problem = _other_kind(keys) or next(filter(None, (shape.relative(keys) for shape in SHAPES)), "")
    if problem:
        raise CheckpointError(problem)
    for shape in SHAPES:
        if shape.recognises(keys):
            return shape
    raise CheckpointError(
        f"is no {_FAMILIES} model: none of its {len(keys)} keys belongs to a time mix of theirs; name another"
    )


def with_own_names(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's tensors under their names here, where they come in a form that can be translated."""
    return from_hf(content) if is_hf(content) else content


def shape_of(shapes: Mapping[str, Shape]) -> ModelShape:
    """The sizes of a model whose tensors have these shapes.

    Raises:
        CheckpointError: see `recognise` and `ModelShape.from_shapes`.
    """
    return recognise(shapes).from_shapes(shapes)


def _other_kind(keys: Collection[str]) -> str:
    """Which kind of file that is no model of RWKV's own, as the end of a sentence; "" for none of these."""

    def has(*parts: str) -> bool:
        return any(part in key for key in keys for part in parts)

    if has(".lora_A", ".lora_B", ".bone", ".disha", ".miss_block", ".base_layer"):
        return (
            "holds an unmerged adapter (LoRA, Bone or DiSHA); merge it into its base model first "
            "(merge_state.py BASE FILE OUTPUT)"
        )
    if any(key in keys for key in ("_strategy", "_version", "_rescale_layer")):
        return (
            "was converted by the pip package rwkv (ln0 folded into the embedding, matrices transposed and "
            "rescaled), which cannot be undone; use the original .pth"
        )
    if has(".attention.", ".attn."):
        return "has the key names of a Hugging Face conversion, read of RWKV-7 alone; use the original .pth"
    return ""
