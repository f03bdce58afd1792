"""What a layer keeps between forward and backward, measured."""

import torch
from factories import tiny_parameters, tiny_shape

from src.adapters.plan import AdapterPlan
from src.loading import LoadOptions, build_model
from src.model.recompute import Recompute


def kept_and_estimated(
    device: str, dtype: torch.dtype, recompute: Recompute, kind: str = "", architecture: str = "", tokens: int = 512
) -> tuple[float, int]:
    """Bytes per token that one more layer keeps, by storage, and what `kept_bytes` says of it.

    Args:
        kind: of adapters on all matrices; "" for none, states being trained.
    """
    kept = []
    for layers in (2, 3):
        shape = tiny_shape(n_layer=layers, n_embd=256, head_size=64, architecture=architecture)
        adapters = AdapterPlan(kind, r=32) if kind else None
        options = LoadOptions(torch.device(device), dtype, quant_type="nf4", adapters=adapters)
        model = build_model(tiny_parameters(shape), shape, options)
        model.set_recomputation([recompute] * layers)
        model(torch.arange(tokens)[None] % shape.vocab_size)  # what is made once is there
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        seen: dict[int, torch.UntypedStorage] = {}

        def note(
            tensor: torch.Tensor, own: set[int] = own, seen: dict[int, torch.UntypedStorage] = seen
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage  # held, so that no other takes its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden, _ = model(torch.arange(tokens)[None] % shape.vocab_size)
        kept.append(sum(storage.nbytes() for storage in seen.values()))
        del hidden
    return (kept[1] - kept[0]) / tokens, model.kept_bytes(recompute)
