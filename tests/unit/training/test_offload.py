"""Saved tensors elsewhere. What leaves the device is chosen anew here, where there is only one."""

import pytest
import torch
from tiny_training import state_gradients, tiny_model

from src.model.recompute import Recompute
from src.training import offload
from src.training.offload import KeptOnHost


@pytest.mark.parametrize("recompute", list(Recompute))
def test_gradients_are_the_same(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []

    def leaves(tensor: torch.Tensor) -> bool:
        moved.append(tensor.shape)
        return not (tensor.is_leaf and tensor.requires_grad)

    monkeypatch.setattr(offload, "_leaves", leaves)
    model = tiny_model()
    for block in model.blocks:
        block.recompute = recompute
    tokens = torch.arange(1, 41).view(2, 20)
    expected = state_gradients(model, model(tokens)[0].square().mean())
    model.zero_grad()
    with KeptOnHost():
        loss = model(tokens)[0].square().mean()
    assert moved
    torch.testing.assert_close(state_gradients(model, loss), expected, rtol=0, atol=0)


def test_on_a_cpu_nothing_leaves() -> None:
    kept = torch.zeros(1 << 20)
    assert offload._pack(kept) is kept
    assert offload._unpack(kept) is kept
