"""What tests of several files assert."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from src.errors import CheckpointError


def refusal(action: Callable[[], object]) -> str:
    """The one sentence that `action` is refused with."""
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same_tensors(actual: Any, expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and values."""
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key
