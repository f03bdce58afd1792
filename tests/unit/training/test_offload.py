"""Saved tensors elsewhere. What leaves the device is chosen anew here, where there is only one."""

import gc
import weakref

import pytest
import torch
from tiny_training import state_gradients, tiny_model

from src.model.recompute import Recompute
from src.training import offload
from src.training.offload import KeptOnHost


@pytest.mark.parametrize("recompute", list(Recompute))
def test_gradients_are_the_same(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(offload, "_leaves", lambda tensor: (asked.append(tensor), True)[1])
    model = tiny_model()
    for block in model.blocks:
        block.recompute = recompute
    tokens = torch.arange(1, 41).view(2, 20)
    expected = state_gradients(model, model(tokens)[0].square().mean())
    model.zero_grad()
    with KeptOnHost(model):
        loss = model(tokens)[0].square().mean()
    assert asked
    torch.testing.assert_close(state_gradients(model, loss), expected, rtol=0, atol=0)


def test_parameters_and_views_of_them_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_leaves", lambda tensor: True)
    layer = torch.nn.Linear(3, 4).requires_grad_(False)
    other = torch.zeros(3)
    pack = KeptOnHost(layer).pack_hook
    for stays in (layer.weight, layer.weight.t()):
        assert pack(stays).data_ptr() == stays.data_ptr()
        assert torch.equal(offload._unpack(pack(stays)), stays)
    assert offload._unpack(pack(other)).data_ptr() != other.data_ptr()


def test_what_is_saved_twice_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_leaves", lambda tensor: True)
    sent: offload.Sent = {}
    saved = torch.arange(6.0).view(2, 3)
    first = offload._pack(saved, set(), sent)
    assert offload._pack(saved.detach(), set(), sent) is first
    assert offload._pack(saved.t(), set(), sent) is not first
    saved += 1
    changed = offload._pack(saved, set(), sent)
    assert changed is not first
    assert torch.equal(offload._unpack(changed), saved)
    del saved
    offload._pack(torch.zeros(1), set(), sent)
    assert len(sent) == 1


def test_on_a_cpu_nothing_leaves() -> None:
    kept = torch.zeros(1 << 20)
    packed = offload._pack(kept, set(), {})
    assert isinstance(packed, torch.Tensor)
    assert offload._unpack(packed).data_ptr() == kept.data_ptr()


def test_a_forward_that_is_given_up_keeps_nothing_alive() -> None:
    model = tiny_model(Recompute.ALL)
    results: list[weakref.ref[torch.Tensor]] = []
    hook = model.blocks[0].register_forward_hook(lambda module, given, out: results.append(weakref.ref(out[0])))
    with KeptOnHost(model):
        model(torch.arange(1, 21)[None])
    hook.remove()
    gc.collect()
    assert [result() for result in results] == [None]
