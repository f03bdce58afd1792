"""The memory between tokens."""

import torch

from src.model.state import LayerState, by_layer, last_tokens, select_rows, stacked


def layer(rows: int, seed: int) -> LayerState:
    """Random memory of one layer."""
    generator = torch.Generator().manual_seed(seed)
    return LayerState(
        torch.randn(rows, 6, generator=generator),
        torch.randn(rows, 2, 3, 3, generator=generator),
        torch.randn(rows, 6, generator=generator),
    )


def test_rows_are_selected_in_every_layer_and_part() -> None:
    state = [layer(4, 0), layer(4, 1)]
    chosen = select_rows(state, torch.tensor([2, 2, 0]))
    assert len(chosen) == 2
    for before, after in zip(state, chosen, strict=True):
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new, old[[2, 2, 0]])


def test_last_tokens_of_rows_are_their_last_positions() -> None:
    z = torch.arange(24.0).view(2, 4, 3)
    assert last_tokens(z, None).tolist() == [[9, 10, 11], [21, 22, 23]]


def test_last_tokens_do_not_hold_the_others() -> None:
    last = last_tokens(torch.zeros(2, 4, 3), None)
    assert last.untyped_storage().nbytes() == last.nbytes


def test_all_layers_in_one_and_back() -> None:
    state = [layer(4, 0), layer(4, 1)]
    stack = stacked(state)
    assert stack.wkv.shape == (2, 4, 2, 3, 3)
    for before, after in zip(state, by_layer(stack), strict=True):
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_last_tokens_of_segments_and_zeros_for_an_empty_one() -> None:
    z = torch.arange(12.0).view(1, 4, 3)
    assert last_tokens(z, torch.tensor([1, -1, 3])).tolist() == [[3, 4, 5], [0, 0, 0], [9, 10, 11]]
