"""DPO's reference: how probable the model that a run starts from finds the answers.

No second model is held for it. The log-probabilities stand in the pairs' file where PrepareOrpoDataset.py put them
(`--base_logp 1`) and the run starts from the base model itself. Otherwise they are measured once, before the first
step, with the model as it then stands: with everything that a state or adapter file brought, and with adapters that as
yet add nothing. Those of large sets are kept in the run's folder for the next run from the same start.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from src import storage
from src.config import TrainConfig
from src.data.preference_batches import PreferenceDataset
from src.device import global_rank
from src.errors import CheckpointError
from src.generate import answer_logps
from src.identity import FileIdentity
from src.model.language_model import LanguageModel

LARGE_SET = 1000
"""Pairs from which on what was measured is kept in a file."""

_COMPARED_PAIRS = 4
_TOLERANCE_DENSE, _TOLERANCE_PACKED = (0.5, 0.02), (2.0, 0.1)
"""Nats and share by which stored and measured sums may differ: rounding in bf16, or packing of the matrices."""
_SHOWN_PAIRS = 200


@dataclass(frozen=True)
class Reference:
    """What the reference model, from which a run starts, is made of.

    Attributes:
        config: the flags.
        base: the base model's file; None for a fresh model.
        folder: the run's.
    """

    config: TrainConfig
    base: FileIdentity | None
    folder: Path

    @property
    def is_base(self) -> bool:
        """Whether it is the base model, up to the packing of its matrices."""
        config = self.config
        packed_residual = config.method == "pissa" and config.quantised
        return not (config.load_state or config.load_adapter or packed_residual) and self.base is not None

    def key(self, model: LanguageModel, dataset: PreferenceDataset) -> str:
        """A digest that is the same where the same would be measured."""
        config = self.config
        files = (config.load_state, config.load_adapter, config.pissa_init)
        facts: dict[str, Any] = {
            "base": None if self.base is None else self.base.sha256,
            "start": [FileIdentity(path).sha256 if path else "" for path in files],
            "dtype": str(model.compute_dtype),
            "packing": [config.quant, config.quant_type, config.quant_head],
            "first values": [config.random_seed, config.method, config.pissa_r, config.svd_niter, config.targets],
            "head_size_divisor": config.head_size_divisor,
            "pairs": [dataset.pair(number).as_tuple()[:3] for number in range(dataset.plan.pairs)],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def attach_references(
    model: LanguageModel, dataset: PreferenceDataset, numbers: list[int], start: Reference, file_name: str
) -> str:
    """Gives a data set the reference's log-probabilities of some of its pairs.

    Args:
        model: as the run starts from it.
        dataset: its `references` are set; those of other pairs are NaN.
        numbers: the pairs that are needed.
        start: what the model was made of.
        file_name: of what is kept in the run's folder.

    Returns:
        Where they are from, for the user.

    Raises:
        CheckpointError: what was measured cannot be written.
    """
    reason, chunk_tokens = "", start.config.chunk_ctx
    if start.is_base:
        tolerance = _TOLERANCE_PACKED if start.config.quantised else _TOLERANCE_DENSE
        stored, reason = _stored(model, dataset, numbers, tolerance, chunk_tokens)
        if stored is not None:
            dataset.references = stored
            return f"{dataset.source}, where --base_logp 1 stored it"
    large = len(numbers) >= LARGE_SET
    path, key = start.folder / file_name, start.key(model, dataset) if large else ""
    known = _read(path, key, dataset.plan.pairs) if large else None
    if known is not None and not known[numbers].isnan().any():
        dataset.references = known
        return f"{path}, where an earlier run from this start kept it"
    dataset.references = _measured(model, dataset, numbers, chunk_tokens)
    said = f"measured over {len(numbers):,} pairs{reason}"
    if large and global_rank() == 0:
        storage.save(path, {"key": _as_tensor(key), "logps": dataset.references})
        said += f", kept in {path}"
    return said


def _stored(
    model: LanguageModel,
    dataset: PreferenceDataset,
    numbers: list[int],
    tolerance: tuple[float, float],
    chunk_tokens: int,
) -> tuple[Tensor | None, str]:
    """What the pairs' file holds, or None and why that cannot be taken."""
    values = torch.full((dataset.plan.pairs, 2), torch.nan, dtype=torch.float64)
    missing = [number for number in numbers if not dataset.pair(number).has_base_logps]
    if missing:
        if len(missing) == len(numbers):
            return None, ""
        return None, f": {len(missing):,} of them have no stored value, or were cut by --rlhf_max_corpus_len"
    for number in numbers:
        pair = dataset.pair(number)
        values[number] = torch.tensor([pair.chosen_base_logp, pair.rejected_base_logp], dtype=torch.float64)
    compared = numbers[:_COMPARED_PAIRS]
    measured = _measured(model, dataset, compared, chunk_tokens)[compared]
    distance = (values[compared] - measured).abs()
    allowed = tolerance[0] + tolerance[1] * measured.abs()
    if (distance > allowed).any():
        row, side = divmod(int((distance - allowed).argmax()), 2)
        return None, (
            f": those in {dataset.source} are not this model's (pair {compared[row] + 1} has "
            f"{values[compared[row], side]:.1f} there, {measured[row, side]:.1f} here)"
        )
    return values, ""


def _measured(model: LanguageModel, dataset: PreferenceDataset, numbers: list[int], chunk_tokens: int) -> Tensor:
    """fp64 [all pairs, 2], NaN where nothing was measured."""
    hidden = len(numbers) < _SHOWN_PAIRS or global_rank() != 0
    with tqdm(total=len(numbers), desc="reference", unit="pair", disable=hidden, dynamic_ncols=True) as bar:
        pairs = [dataset.pair(number) for number in numbers]
        sums = answer_logps(model, pairs, lambda _: bar.update() and None, chunk_tokens=chunk_tokens)
    values = torch.full((dataset.plan.pairs, 2), torch.nan, dtype=torch.float64)
    values[numbers] = torch.tensor(sums, dtype=torch.float64)
    return values


def _read(path: Path, key: str, pairs: int) -> Tensor | None:
    """What an earlier run kept, if it had the same start and pairs."""
    if not path.exists():
        return None
    try:
        content = storage.load(path, "file of reference log-probabilities")
    except CheckpointError:  # it is only a copy of what can be measured again
        return None
    if not isinstance(content, dict) or content.keys() != {"key", "logps"}:
        return None
    found, logps = content["key"], content["logps"]
    if not isinstance(found, Tensor) or not isinstance(logps, Tensor) or logps.shape != (pairs, 2):
        return None
    return logps.clone() if torch.equal(found, _as_tensor(key)) else None


def _as_tensor(key: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)
