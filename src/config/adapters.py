"""Adapters beside the matrices, and which other weights are trained with them.

Flags of RWKV-PEFT keep their names; each of its JSON values also has a plain flag.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.config.flags import (
    ABOVE_0,
    AT_LEAST_1,
    INPUT,
    MOST_STEPS,
    NOT_NEGATIVE,
    SHARE_BELOW_1,
    Flags,
    Given,
    Lines,
    WrittenNumber,
    flag,
    limit_problem,
    lost_number,
    names_in,
    parsed_json,
    shortened,
)

PEFT_NAMES = ("none", "lora", "pissa", "bone", "bat", "disha", "lisa")
DEFAULT_PARTS = "time,ln"

_JSON_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora_config": {"lora_load": "", "lora_r": 8, "lora_alpha": 32.0, "lora_dropout": 0.01},
    "pissa_config": {"pissa_load": "", "pissa_init": "", "pissa_r": 8, "svd_niter": 4},
    "bone_config": {"bone_load": "", "bone_mode": "bat", "bone_r": 64},
    "disha_config": {"load": "", "mode": "bone", "r": 64},
    "lisa_config": {"lisa_r": 2, "lisa_k": 100},
}
"""Keys of each JSON flag and what RWKV-PEFT takes where one is missing; bone_mode: what it meant before it existed."""

_PLAIN = {
    "lora_load": "load_adapter", "pissa_load": "load_adapter", "bone_load": "load_adapter", "load": "load_adapter",
    "r": "bone_r",
}  # fmt: skip
"""The flag of a JSON key, where it is called otherwise; "" in `load` says nothing."""

_USED_BY = {
    "lora_config": ("lora",), "lora_r": ("lora",), "lora_alpha": ("lora",), "lora_dropout": ("lora",),
    "lora_rslora": ("lora",), "lora_plus": ("lora",), "pissa_config": ("pissa",), "pissa_r": ("pissa",),
    "svd_niter": ("pissa",), "bone_config": ("bone", "bat"), "disha_config": ("disha",),
    "bone_r": ("bone", "bat", "disha"), "lisa_config": ("lisa",), "lisa_r": ("lisa",), "lisa_k": ("lisa",),
    "lisa_moments": ("lisa",), "targets": ("lora", "pissa", "bone", "bat", "disha"),
}  # fmt: skip
"""Values of --peft that a flag has an effect with."""


@dataclass(frozen=True)
class AdapterFlags(Flags, group="adapters"):
    """What is trained beside, or instead of, the states."""

    peft: str = flag(
        "none", "adapter beside the matrices: disha is bone or bat; lisa: whole layers by turns", PEFT_NAMES
    )
    lora_config: str = flag("", "JSON of RWKV-PEFT: lora_load, lora_r (8), lora_alpha (32), lora_dropout (0.01)")
    pissa_config: str = flag("", "JSON of RWKV-PEFT: pissa_load, pissa_init, pissa_r (8), svd_niter (4)")
    bone_config: str = flag("", "JSON of RWKV-PEFT: bone_load, bone_mode (bone, or bat if missing), bone_r (64)")
    disha_config: str = flag("", "JSON of RWKV-PEFT: load, mode (bone or bat), r (64)")
    lisa_config: str = flag("", "JSON of RWKV-PEFT: lisa_r (2), lisa_k (100)")
    lora_r: int = flag(64, "rank; multiples of 8 are fastest on a GPU", must=AT_LEAST_1, most=2**14)
    lora_alpha: float = flag(64.0, "what the adapter adds is scaled by alpha / r", must=ABOVE_0)
    lora_dropout: float = flag(0.0, "on the adapter's input; steps are then not recorded", must=SHARE_BELOW_1)
    lora_rslora: int = flag(0, "1 scales by alpha / sqrt(r)", (0, 1))
    lora_plus: float = flag(1.0, "learning rate of B is so many times A's (LoRA+)", must=ABOVE_0)
    pissa_r: int = flag(64, "rank; multiples of 8 are fastest on a GPU", must=AT_LEAST_1, most=2**14)
    svd_niter: int = flag(4, "power iterations of the start's randomised SVD", must=NOT_NEGATIVE, most=1000)
    bone_r: int = flag(64, "block size of bone and bat", must=AT_LEAST_1, most=2**14)
    lisa_r: int = flag(2, "layers that are trained at a time", must=AT_LEAST_1, most=1000)
    lisa_k: int = flag(100, "optimizer steps after which others are drawn", must=AT_LEAST_1, most=MOST_STEPS)
    lisa_moments: str = flag(
        "drop", "the optimizer's moments of a layer that leaves: drop, or park until it is drawn again",
        ("drop", "park"),
    )  # fmt: skip
    targets: str = flag("", "matrices that get an adapter, e.g. att.key,ffn.value or key; empty: all of every layer")
    train_parts: str = flag(
        "", "further weights, by parts of their names: time,ln or [\"time\",\"ln\"] (default with --peft), emb,head "
        "(default with --peft lisa), or []",
        several=True,
    )  # fmt: skip
    load_adapter: str = flag("", "go on from this file of an earlier run", path=INPUT)
    lr_state: float = flag(
        1.0, "rate of the states where other things are trained, too; it moves as the other does", must=NOT_NEGATIVE
    )

    @property
    def adapter(self) -> str:
        """The kind of adapter: none, lora, pissa, bone or bat; or lisa, which has none."""
        if self.peft == "disha":
            return str(self._json("disha_config")[0]["mode"])
        if self.peft == "bone" and self.bone_config:
            return str(self._json("bone_config")[0]["bone_mode"])
        return self.peft

    @property
    def adapter_r(self) -> int:
        """Its rank or block size."""
        return {"lora": self.lora_r, "pissa": self.pissa_r}.get(self.adapter, self.bone_r)

    @property
    def pissa_init(self) -> str:
        """File of the factors that PiSSA began with; "" is none."""
        return str(self._json("pissa_config")[0]["pissa_init"])

    @property
    def parts(self) -> tuple[str, ...]:
        """`train_parts`, one by one."""
        return names_in(self.train_parts)

    @property
    def target_names(self) -> tuple[str, ...]:
        """`targets`, one by one."""
        return names_in(self.targets)

    def _json(self, name: str) -> tuple[dict[str, Any], list[str]]:
        return _read_json(name, getattr(self, name))

    def _said_by_json(self) -> dict[str, Any]:
        """Flags and values that the JSON of the chosen method gives."""
        name = self._config_in_use()
        if not name:
            return {}
        values = self._json(name)[0]
        plain = {_PLAIN.get(key, key): value for key, value in values.items()}
        if not plain.get("load_adapter"):
            plain.pop("load_adapter", None)
        return {flag: value for flag, value in plain.items() if flag in AdapterFlags.__dataclass_fields__}

    def _config_in_use(self) -> str:
        used = [name for name in _JSON_DEFAULTS if self.peft in _USED_BY[name] and getattr(self, name)]
        return used[0] if used else ""

    def _contradictions(self, given: Given) -> Lines:
        for name in _JSON_DEFAULTS:
            yield from self._json(name)[1]
        name = self._config_in_use()
        if name:
            twice = [flag for flag in self._said_by_json() if flag in given]
            for flag_name in twice:
                yield f"--{flag_name} {shortened(given[flag_name])} and --{name} both say it: give it in one place"
            if self.peft == "bat" and self._json("bone_config")[0]["bone_mode"] != "bat":
                yield "--peft bat and bone_mode in --bone_config name two methods: leave bone_mode out"
        if self.load_adapter and self.peft == "lisa":
            yield (
                f"--load_adapter {self.load_adapter} has no use with --peft lisa, whose results are whole models: give "
                "one to --load_model"
            )
        if self.load_adapter and self.peft == "none" and not self.parts and given.get("evaluate") != "1":
            yield f"--load_adapter {self.load_adapter} needs --peft, which names the adapter's method"

    def _remarks(self) -> Lines:
        for name, methods in _USED_BY.items():
            value = getattr(self, name)
            if value != getattr(AdapterFlags, name) and self.peft not in methods:
                yield f"--{name} {shortened(str(value))} has no effect without --peft {' or '.join(methods)}"
        if self.peft == "bone" and self.bone_config and "bone_mode" not in _keys_in(self.bone_config):
            yield "--bone_config without bone_mode means bat, as where it comes from; bone is another method"
        if self.peft == "disha" and "mode" not in _keys_in(self.disha_config):
            yield "--peft disha without a mode means bone"


def _read_json(name: str, text: str) -> tuple[dict[str, Any], list[str]]:
    """The values of a JSON flag with its defaults, and a sentence for everything that is wrong with it."""
    defaults = _JSON_DEFAULTS[name]
    if not text:
        return dict(defaults), []
    try:
        content, twice = parsed_json(text, as_written=True)
    except (ValueError, RecursionError) as error:
        return dict(defaults), [
            f"--{name} {shortened(text)} is no JSON ({error}): write it as '{json.dumps(defaults)}'"
        ]
    if not isinstance(content, Mapping):
        return dict(defaults), [f"--{name} {shortened(text)} is no JSON object: write it as '{json.dumps(defaults)}'"]
    values = dict(defaults)
    problems = [f"--{name} has the key {shortened(key)!r} twice: leave one out" for key in twice]
    for key, value in content.items():
        if key not in defaults:
            problems.append(f"--{name} has the unknown key {shortened(key)!r}: it may have {', '.join(defaults)}")
            continue
        kind: Any = type(defaults[key])
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            named = {str: "a text", int: "a whole number", float: "a number"}[kind]
            problems.append(f"--{name}: {key} is {_shown(value)}, expected {named}")
        elif key in ("mode", "bone_mode") and value not in ("bone", "bat"):
            problems.append(f"--{name}: {key} {shortened(str(value))!r} is unknown: use one of bone, bat")
        elif problem := _limit_problem(key, value):
            problems.append(f"--{name}: {key} {_shown(value)} {problem}")
        else:
            values[key] = kind(value)
    return values, problems


def _keys_in(text: str) -> set[str]:
    """The keys of a JSON object, whose problems `_read_json` tells; none of anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(text)
        return set(content) if isinstance(content, Mapping) else set()
    return set()


def _shown(value: Any) -> str:
    """A value of a JSON object, as it was written there."""
    return shortened(value.text if isinstance(value, WrittenNumber) else json.dumps(value))


def _limit_problem(key: str, value: Any) -> str:
    """What the plain flag of a JSON key would not take, as the end of a sentence."""
    spec = AdapterFlags.__dataclass_fields__.get("load_adapter" if key == "pissa_init" else _PLAIN.get(key, key))
    if spec is None:
        return ""
    if problem := limit_problem(spec, value):
        return problem
    if isinstance(value, WrittenNumber) and not value and (problem := lost_number(value.text)):
        return problem
    rule = spec.metadata["must"]
    return rule.words if rule and not rule.holds(value) else ""
