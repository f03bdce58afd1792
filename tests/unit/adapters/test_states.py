"""What state tuning trains and writes."""

from pathlib import Path

import torch
from factories import tiny_parameters, tiny_shape, tiny_states

from src.adapters.states import StateTuning
from src.loading import LoadOptions, build_model


def test_the_file_holds_every_state_as_the_model_has_it(tmp_path: Path) -> None:
    """Value before key: a transposed state is the same size and as good as random to a client."""
    shape = tiny_shape()
    states = tiny_states(shape)
    model = build_model({**tiny_parameters(shape), **states}, shape, LoadOptions(torch.device("cpu"), torch.float32))
    StateTuning().save(model, tmp_path / "state.pth")
    content = torch.load(tmp_path / "state.pth", weights_only=True)
    assert list(content) == StateTuning().trained_names(shape)
    for name, state in states.items():
        assert torch.equal(content[name], state.bfloat16())
        assert not torch.equal(content[name], content[name].transpose(1, 2))
