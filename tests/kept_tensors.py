"""What a layer keeps between forward and backward, measured."""

import torch
from factories import tiny_parameters, tiny_shape

from src.adapters.full import FullTraining
from src.adapters.kept import KeptByLayers
from src.adapters.method import method_of
from src.config import TrainConfig
from src.loading import LoadOptions, build_model
from src.model.recompute import Recompute

RUNS: dict[str, dict[str, str]] = {
    "states": {},
    **{kind: {"peft": kind, "train_parts": "[]"} for kind in ("lora", "bone", "bat", "pissa")},
    **{f"{kind} ln": {"peft": kind, "train_parts": "ln"} for kind in ("lora", "bone", "bat", "pissa")},
    **{f"{kind} time ln": {"peft": kind, "train_parts": "time,ln"} for kind in ("lora", "bone", "bat", "pissa")},
    "lora dense": {"peft": "lora", "train_parts": "ln", "quant": "0"},
    "lora dropout": {"peft": "lora", "train_parts": "[]", "lora_dropout": "0.1"},
    "states dropout": {"dropout": "0.1"},
    "parts": {"train_parts": "time,ln"},
    "full": {"train_type": "none"},
    "full bf16": {"train_type": "none", "weights": "bf16"},
}
"""What is trained -> flags."""


def kept_and_estimated(
    device: str, dtype: torch.dtype, recompute: Recompute, run: str, architecture: str, tokens: int = 512
) -> tuple[float, float]:
    """Bytes that one more layer keeps, by storage, and what `KeptByLayers` says of it.

    Args:
        run: one of RUNS; its adapters have r 32.
    """
    flags = dict(RUNS[run])
    if kind := flags.get("peft"):
        flags["bone_r" if kind in ("bone", "bat") else f"{kind}_r"] = "32"
    config = TrainConfig.from_flags({"load_model": "m.pth", "data_file": "d", **flags})
    method = method_of(config)
    dense = flags.get("quant") == "0"
    kept, estimates = [], []
    for layers in (2, 3):
        shape = tiny_shape(n_layer=layers, n_embd=256, head_size=64, mix_lora_width=32, architecture=architecture)
        options = LoadOptions(
            torch.device(device),
            dtype,
            quant_type="nf4" if method.freezes_matrices and not dense else None,
            trained=method.trained_names(shape),
            narrow=method.narrow_names(shape) if isinstance(method, FullTraining) else (),
            adapters=method.adapters,
            dropout=config.dropout,
            reserves_room=dense and torch.empty(0, device=device).is_cuda,
        )
        model = build_model(tiny_parameters(shape), shape, options)
        model.take_room()
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
        options = {"dense": model.reserves_room, "dropout": model.dropout > 0}
        by_layer = KeptByLayers(method, shape, fused=model.is_fused, itemsize=dtype.itemsize, **options)
        estimates.append(by_layer.of_all(recompute, tokens))
    return kept[1] - kept[0], estimates[1] - estimates[0]
