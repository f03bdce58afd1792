"""Whole short runs from flags drawn at random, and what must hold of every one that is accepted."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from binidx_files import write_binidx
from factories import tiny_checkpoint, tiny_shape, tiny_state_file
from running import (
    Ended,
    after_step,
    assert_same_end,
    files_in,
    go_on,
    interrupt,
    metrics,
    run_script,
    write_documents,
)
from torch import Tensor

from src.data.pair_file import save_pairs
from src.data.preferences import PreferencePair
from src.tokenizer import ByteTokenizer

LAYERS = 3
FlagValues = dict[str, object]

_METHODS = ("states", "lora", "pissa", "bone", "bat", "disha", "parts", "lisa", "full")
_RATES = {"states": 0.3, "lisa": 5e-3, "full": 3e-3}
_ADAPTERS = {"lora": "lora_r", "pissa": "pissa_r", "bone": "bone_r", "bat": "bone_r", "disha": "bone_r"}
_TARGETS = ("att.key,ffn.value", "key", "receptance", "att.output")
_PARTS = (None, None, "[]", "time", "ln", "time,ln", '["time", "ln"]', "emb", "head", "blocks.1.ffn.time", "ln,head")
_PARTS_X070 = (None, None, "[]", "time", "ln", "time,ln", "emb", "head", "blocks.1.ffn.x_k", "ln,head")
_SHAPES_OF_ROWS: tuple[FlagValues, ...] = (
    {"dataload": "pack", "ctx_len": 40}, {"dataload": "pack", "ctx_len": 64, "micro_bsz": 2},
    {"dataload": "pad", "ctx_len": 24, "micro_bsz": 3}, {"dataload": "pad", "ctx_len": 64},
    {"dataload": "get", "ctx_len": 21, "micro_bsz": 2}, {"dataload": "only", "ctx_len": 50},
)  # fmt: skip
UNSEEN: dict[str, tuple[object, ...]] = {
    "grad_cp": (0, 1, 2), "chunk_ctx": (5, 16, 33), "cuda_graph": (0,), "val_steps": (1,), "save_minutes": (0.001,),
    "sample_steps": (1,),
}  # fmt: skip
"""Flags that must not change what is learned."""


@dataclass(frozen=True)
class Places:
    """Inputs of runs: base models by architecture and dtype, and data."""

    folder: Path

    def base(self, architecture: str, dtype: str, *, with_state: bool = False) -> Path:
        return self.folder / f"{architecture}-{dtype}{'-state' if with_state else ''}.pth"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.save"


def make_places(folder: Path) -> Places:
    """Writes the inputs."""
    places = Places(folder)
    for architecture in ("x060", "x070"):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            for with_state in (False, True):
                path = places.base(architecture, name, with_state=with_state)
                tiny_checkpoint(
                    path,
                    n_layer=LAYERS,
                    dtype=dtype,
                    architecture=architecture,
                    with_state=with_state,
                    seed=int(with_state),
                )
        shape = tiny_shape(n_layer=LAYERS, architecture=architecture)
        tiny_state_file(folder / f"state-{architecture}.pth", shape)
    write_documents(folder / "documents", [30, 12, 25, 18, 9, 33, 55, 21])
    write_documents(folder / "held-out", [26, 14], seed=3)
    chats = [f"User: {n} and {n}?\n\nAssistant: It is {2 * n}.\n\n" for n in range(9)]
    write_binidx(folder / "chats", [[*ByteTokenizer().encode(chat), 0] for chat in chats])
    rows = [{"prompt": f"{n} and {n}?", "response": f"It is {2 * n}."} for n in range(9)]
    (folder / "roles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = [PreferencePair(list(range(n, 2 * n)), [60 + n] * n, [90 + n] * (n + 1)) for n in range(3, 9)]
    (folder / "prompts.txt").write_text("3 and 3?\n", encoding="utf-8")
    save_pairs(places.pairs, [*made, PreferencePair([70, 71], [72, 73, 74], []), PreferencePair([5], [6, 7], [8] * 9)])
    return places


@dataclass(frozen=True)
class Drawn:
    """A run: its flags, and what the drawing knows of them."""

    architecture: str
    dtype: str
    method: str
    flags: FlagValues


class _Hand:
    """Draws flags one after the other."""

    def __init__(self, generator: random.Random) -> None:
        self.pick = generator.choice
        self.chance = generator.random
        self.flags: FlagValues = {}

    def maybe(self, chance: float, **values: object) -> None:
        """With this chance, these flags."""
        if self.chance() < chance:
            self.flags.update(values)


def draw(generator: random.Random, places: Places) -> Drawn:
    """Flags of a run that may contradict each other, but for which there is a sentence then."""
    hand = _Hand(generator)
    architecture, dtype, method = hand.pick(("x060", "x060", "x070")), hand.pick(("bf16", "fp32")), hand.pick(_METHODS)
    hand.flags["load_model"] = places.base(architecture, dtype, with_state=hand.chance() < 0.2)
    _draw_what_is_trained(hand, method, architecture)
    if method != "full":
        hand.maybe(0.5, quant=1, quant_type=hand.pick(("nf4", "fp4", "4bit", "int8")))
        if hand.flags.get("quant"):
            hand.maybe(0.3, quant_head=1)
        hand.maybe(0.2, load_state=places.folder / f"state-{architecture}.pth")
    _draw_data(hand, places)
    _draw_course(hand)
    return Drawn(architecture, dtype, method, hand.flags)


def _draw_what_is_trained(hand: _Hand, method: str, architecture: str) -> None:
    pick, maybe, flags = hand.pick, hand.maybe, hand.flags
    rate = _RATES.get(method, 1e-2)
    flags |= {"lr_init": rate, "lr_final": rate * pick((1, 0.5)), "warmup_steps": pick((0, 0, 2))}
    if method == "full":
        flags["train_type"] = "none"
        maybe(0.4, weights="bf16")
        maybe(0.4, fused_update=1)
    elif method == "parts":
        flags |= {"train_type": "states", "train_parts": pick(("ln", "time", "emb", "time,ln")), "lr_state": 0.1}
    elif method != "states":
        parts = pick(_PARTS if architecture == "x060" else _PARTS_X070)
        flags |= {"peft": method, **({} if parts is None else {"train_parts": parts})}
    if method == "lisa":
        flags |= {"lisa_r": pick((1, 2)), "lisa_k": pick((1, 2)), "lisa_moments": pick(("drop", "park"))}
    elif method == "disha":
        flags["disha_config"] = json.dumps({"mode": pick(("bone", "bat")), "r": pick((4, 8))})
    elif method in _ADAPTERS:
        flags[_ADAPTERS[method]] = pick((4, 8, 16))
    if method in _ADAPTERS:
        maybe(0.5, targets=pick(_TARGETS))
        maybe(0.3, train_type="states", lr_state=0.1)
    if method == "lora":
        maybe(0.4, lora_alpha=pick((1, 16, 40.5)))
        maybe(0.2, lora_rslora=1)
        maybe(0.2, lora_plus=4)
        maybe(0.15, lora_dropout=0.1)
    if method == "pissa":
        maybe(0.3, svd_niter=pick((0, 2)))


def _draw_data(hand: _Hand, places: Places) -> None:
    pick, maybe, flags = hand.pick, hand.maybe, hand.flags
    loss = pick(("sft", "sft", "sft", "orpo", "dpo", "simpo"))
    if loss == "sft":
        name = pick(("documents", "documents", "chats", "roles.jsonl"))
        flags |= {"data_file": places.folder / name, **pick(_SHAPES_OF_ROWS)}
        if name != "documents":
            maybe(0.4, loss_mask="qa")
            maybe(0.2, loss_mask="se", mask_id='{"mask0": ".", "mask1": " is"}')
        alike = name == "roles.jsonl" or "loss_mask" in flags or hand.chance() < 0.5
        flags["val_file"] = places.folder / (name if alike else "held-out")
        maybe(0.2, data_shuffle=0)
        if name == "documents":
            maybe(0.2, mix=f"{places.folder / 'held-out'}:0.3")
    else:
        longest = {"rlhf_max_corpus_len": pick((6, 20, 20)), "micro_bsz": pick((1, 2, 3))}
        flags |= {loss: 1, "rlhf_train_file": places.pairs, "val_file": places.pairs, **longest}
        maybe(0.3, orpo_shared_prompt=0)
        if loss == "orpo":
            flags |= {"orpo_alpha": 0.3, "orpo_type": pick((0, 0, 1))}


def _draw_course(hand: _Hand) -> None:
    pick, maybe, flags = hand.pick, hand.maybe, hand.flags
    maybe(0.3, chunk_ctx=pick((5, 16, 33)))
    if "chunk_ctx" in flags:
        maybe(0.5, chunk_keep=pick(("host", "inputs")))
        maybe(0.3, bptt_chunks=pick((1, 2)))
    accumulated = pick((1, 1, 2))
    flags |= {"grad_cp": pick((0, 1, 2)), "accumulate_grad_batches": accumulated, "epoch_count": pick((1, 1, 2))}
    flags["epoch_steps"] = pick((2, 3, 4)) * accumulated
    maybe(0.1, epoch_begin=1, epoch_count=2)
    maybe(0.1, epoch_save=0)
    maybe(0.3, optim=pick(("adam", "adamw", "adamw8bit", "lion8bit")))
    maybe(0.2, weight_decay=0.1)
    maybe(0.1, weight_decay_final=0.01)
    maybe(0.2, lr_schedule=pick(("cos", "wsd")))
    maybe(0.2, layerwise_lr=0)
    maybe(0.1, dropout=0.1)
    maybe(0.15, precision="bf16")
    maybe(0.15, val_steps=1)
    if "val_steps" in flags:
        maybe(0.5, early_stop=pick((1, 2)))
    maybe(0.15, my_exit_tokens=pick((60, 150)))
    maybe(0.03, offload_activations=1)


def command(drawn: Drawn) -> str:
    """The command line, to have a failure again."""
    return "python train.py --accelerator cpu " + " ".join(f"--{name} '{value}'" for name, value in drawn.flags.items())


def check_run(drawn: Drawn, folder: Path, places: Places, generator: random.Random) -> str:
    """Trains, and checks what came of it; returns what was seen.

    Raises:
        AssertionError: something that holds of every run does not.
    """
    flags = {"quant": 0, "plot": 0, **drawn.flags}
    out = folder / "out"
    ended = _run(out, flags)
    if ended.code != 0:
        return f"refused: {_refused(ended, out)}"
    values = [row["loss"] for row in metrics(out)]
    assert values, "no step"
    assert all(value == value and abs(value) < 1e4 for value in values), values
    _check_tensors(drawn, flags, out, ended)
    seen = ["trained"]
    if generator.random() < 0.35:
        seen.append(_check_resumed(flags, out, folder / "resumed", generator))
    if generator.random() < 0.2:
        again = run_script("train.py", config=out / "run.toml", proj_dir=folder / "again")
        assert again.code == 0, again.err
        assert_same_end(out, folder / "again")
        seen.append("again by run.toml")
    if generator.random() < 0.5:
        seen.append(_check_twin(drawn, flags, values, folder / "twin", places, generator))
    seen.append(_check_files(drawn, flags, out, folder, generator, ended))
    return ", ".join(seen)


def _run(folder: Path, flags: FlagValues) -> Ended:
    return run_script("train.py", **{"proj_dir": folder, "accelerator": "cpu", **flags})


def _refused(ended: Ended, folder: Path) -> str:
    """Why a run was refused, in sentences; nothing was left."""
    assert ended.code == 2, ended.out + ended.err
    assert "Traceback" not in ended.err + ended.out
    reason = ended.err[ended.err.index("error: ") + len("error: ") :].strip()
    assert len(reason) > 20
    assert not folder.is_dir() or not [name for name in files_in(folder) if "pth" in name]
    return reason


def tensors_of(path: Path) -> dict[str, Tensor]:
    """A checkpoint's."""
    loaded: dict[str, Tensor] = torch.load(path, weights_only=True)
    return loaded


def _names(value: object) -> list[str]:
    return [word for word in re.split(r"[\s,\"'\[\]]+", str(value)) if word]


def expected_names(drawn: Drawn, flags: FlagValues, base: Iterable[str]) -> set[str]:
    """Keys of what the run trains, by a rule of its own."""
    keys = [key for key in base if "time_state" not in key]
    idle = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")} if drawn.architecture == "x070" else set()
    states = {f"blocks.{layer}.att.time_state" for layer in range(LAYERS)}
    matrices = [
        k for k in keys if re.fullmatch(r"blocks\.\d+\.(att|ffn)\.(receptance|key|value|output|gate)\.weight", k)
    ]
    if drawn.method == "full":
        return set(keys)
    names: set[str] = set()
    adapter = drawn.method in _ADAPTERS
    if adapter:
        wanted = _names(flags.get("targets", ""))
        chosen = [k for k in matrices if not wanted or any(k.endswith(f".{w}.weight") for w in wanted)]
        suffixes = ["lora_A", "lora_B"] if drawn.method in ("lora", "pissa") else ["bone"]
        names |= {f"{k.removesuffix('.weight')}.{suffix}" for k in chosen for suffix in suffixes}
        matrices = chosen
    default = "emb,head" if drawn.method == "lisa" else "time,ln" if adapter else ""
    for part in _names(flags.get("train_parts", default)):
        if part == "time":
            mixers = [k for k in keys if re.match(r"blocks\.\d+\.(att|ffn)\.", k) and not k.endswith(".weight")]
            names |= {k for k in mixers if ".ln" not in k and k not in idle}
        else:
            names |= {k for k in keys if part in k and not (adapter and k in matrices) and k not in idle}
    if drawn.method in ("states", "parts") or flags.get("train_type") == "states":
        names |= states
    return names


def _check_tensors(drawn: Drawn, flags: FlagValues, out: Path, ended: Ended) -> None:
    """The file holds what was trained and nothing else, and all of that has moved."""
    base = tensors_of(Path(str(flags["load_model"])))
    written = tensors_of(out / "rwkv-final.pth")
    assert all(bool(tensor.isfinite().all()) for tensor in written.values())
    names = expected_names(drawn, flags, base)
    states = {key for key in names if "time_state" in key}
    if drawn.method in ("full", "lisa"):
        of_states = {f"blocks.{layer}.att.time_state" for layer in range(LAYERS)}
        assert set(written) - of_states == set(base) - of_states, set(written) ^ set(base)
        has_states = bool(states or flags.get("load_state") or of_states & base.keys())
        assert of_states.isdisjoint(written) != has_states
        assert {tensor.dtype for tensor in written.values()} <= {torch.bfloat16, torch.float32}
        moved = {
            key for key in base.keys() - of_states if not torch.equal(base[key].to(written[key].dtype), written[key])
        }
        if drawn.method == "lisa":
            layers = {key.split(".")[1] for key in moved - names if key.startswith("blocks")}
            assert moved - names <= {key for key in base if key.startswith("blocks.")}
            assert layers, "no layer had a turn"
        # A file in bf16 of an fp32 base differs by its rounding.
    else:
        assert set(written) == names, sorted(set(written) ^ names)
        start = {**base}
        if flags.get("load_state"):
            start |= tensors_of(Path(str(flags["load_state"])))
        zeros = {key: torch.zeros_like(tensor) for key, tensor in written.items()}
        still = {key for key in names if torch.equal({**zeros, **start}[key].float(), written[key].float())}
        idle = re.search(r"the gradient was 0 in (\d+) steps? of \1,", ended.err)
        if float(str(flags["lr_init"])) > 0 and len(metrics(out)) > 1 and not idle:
            assert len(still) <= 0.2 * len(names), sorted(still)


def held_out(ended: Ended, label: str) -> list[float] | None:
    """Numbers of the line of this measurement."""
    for line in ended.out.splitlines():
        if line.startswith(f"held out   {label}"):
            return [float(number) for number in re.findall(r"[-+]?\d+\.\d{3,}|nan|inf", line)]
    return None


def _measured(folder: Path, flags: FlagValues, **changed: object) -> list[float]:
    kept = (
        "val_file",
        "dataload",
        "ctx_len",
        "loss_mask",
        "mask_id",
        "orpo",
        "dpo",
        "simpo",
        "orpo_alpha",
        "orpo_type",
        "rlhf_max_corpus_len",
        "data_type",
        "precision",
        "rlhf_train_file",
    )
    chosen = {name: flags[name] for name in kept if name in flags}
    ended = _run(folder, {"evaluate": 1, **chosen, **changed})
    assert ended.code == 0, ended.err
    for line in ended.out.splitlines():
        if line.startswith("held out"):
            last = line
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d{3,}|nan|inf", last)]


def _check_resumed(flags: FlagValues, out: Path, folder: Path, generator: random.Random) -> str:
    """A run that is stopped or killed in a step and goes on ends with the same bits."""
    steps = len(metrics(out))
    if steps < 2:
        return "too short to be stopped"
    step = generator.randrange(1, steps)
    if generator.random() < 0.4:
        return _check_killed(flags, out, folder, step)
    with after_step(step, interrupt):
        ended = _run(folder, flags)
    assert ended.code == 0, ended.err
    assert "stopped by SIGINT" in ended.out
    go_on(folder)
    assert_same_end(out, folder)
    return "resumed"


def _check_killed(flags: FlagValues, out: Path, folder: Path, step: int) -> str:
    child = os.fork()
    if not child:
        with after_step(step, lambda _: os.kill(os.getpid(), signal.SIGKILL)):
            _run(folder, {**flags, "save_minutes": 1e-9})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    if not (folder / "rwkv-resume.pth").exists():
        return "killed before the first save"
    go_on(folder, **({} if "save_minutes" in flags else {"save_minutes": 0}))
    assert_same_end(out, folder)
    return "killed and resumed"


def _check_twin(
    drawn: Drawn, flags: FlagValues, values: Sequence[float], folder: Path, places: Places, generator: random.Random
) -> str:
    """A flag that says how to compute, and not what, changes no loss."""
    if flags.get("dropout") or flags.get("lora_dropout"):
        return "no twin"
    name = generator.choice(sorted(UNSEEN))
    twin: dict[str, Any] = {**flags, name: generator.choice(UNSEEN[name])}
    if name == "sample_steps":
        twin["sample_prompts"] = places.folder / "prompts.txt"
    if name == "chunk_ctx":
        twin.pop("bptt_chunks", None)
        if flags.get("bptt_chunks"):
            return "no twin"
    ended = _run(folder, twin)
    if ended.code != 0:
        _refused(ended, folder)
        return "twin refused"
    others = [row["loss"] for row in metrics(folder)]
    precise = flags.get("precision") != "bf16"
    unstable = flags.get("weights") == "bf16" or "8bit" in str(flags.get("optim", "")) or not precise
    # What is rounded at random or to 8 bits amplifies the last bit of a gradient.
    tolerance = 3e-2 if unstable else 2e-3
    count = min(len(values), len(others)) if "early_stop" in flags else len(values)
    assert len(others) == len(values) or "early_stop" in flags, (name, twin[name], values, others)
    for one, other in zip(values[:count], others[:count], strict=True):
        assert abs(one - other) <= tolerance * max(1, abs(one)), (name, twin[name], values, others)
    assert abs(values[0] - others[0]) <= (1e-2 if not precise else 2e-5) * max(1, abs(values[0])), (
        name,
        twin[name],
        values,
        others,
    )
    return f"{name} {twin[name]}"


def _check_files(
    drawn: Drawn, flags: FlagValues, out: Path, folder: Path, generator: random.Random, ended: Ended
) -> str:
    """The result, beside the base model and merged into it, is the model that was trained."""
    final = out / "rwkv-final.pth"
    tuned = held_out(ended, "tuned")
    place = -1 if "dpo" in flags else 0  # what DPO's loss and margin are depends on the model that a run begins with
    assert tuned, "no held-out loss"
    if drawn.method in ("full", "lisa"):
        again = _measured(folder / "e", flags, load_model=final, quant=0)
        unpacked = held_out(ended, "unpacked") or tuned
        _near(again, unpacked, 0.03, place)
        return "read"
    adapted = {"load_adapter": final} if drawn.method != "states" else {"load_state": final}
    beside = flags.get("load_state") if not any("time_state" in key for key in tensors_of(final)) else None
    if beside:
        adapted["load_state"] = beside
    packing = {name: flags[name] for name in ("quant", "quant_type", "quant_head") if name in flags}
    base = flags["load_model"]
    as_trained = _measured(folder / "e1", flags, load_model=base, **adapted, **packing)
    _near(as_trained, tuned, 0.03, place if flags.get("load_state") else 0)
    plain = _measured(folder / "e2", {**flags, "precision": "fp32"}, load_model=base, **adapted, quant=0)
    merged = folder / "merged.pth"
    ended = run_script("merge_state.py", base, final, merged, verify=1, device="cpu")
    assert ended.code == 0, ended.err
    distances = [float(number) for number in re.findall(r"are (\S+) from (?:base|the)", ended.out)]
    assert distances, ended.out
    assert distances[0] < (1e-5 if drawn.dtype == "fp32" else 1e-2), distances
    whole = merged
    if beside:
        assert f"trained beside {beside}" in ended.out
        whole = folder / "whole.pth"
        assert run_script("merge_state.py", merged, beside, whole).code == 0
    of_merged = _measured(folder / "e3", {**flags, "precision": "fp32"}, load_model=whole, quant=0)
    _near(of_merged, plain, 2e-4 if drawn.dtype == "fp32" else 0.03, place)
    before, after = tensors_of(Path(str(base))), tensors_of(merged)
    touched = {re.sub(r"\.(lora_[AB]|bone)$", ".weight", key) for key in tensors_of(final)}
    assert set(after) - set(before) <= {key for key in touched if "time_state" in key}
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype or "time_state" in key  # which keeps the dtype of its file
        assert key in touched or torch.equal(tensor, after[key]), key
    on = {**flags, "load_adapter": final} if drawn.method != "states" else {**flags, "load_state": final}
    if drawn.method != "states" and not beside:
        on.pop("load_state", None)
    ended = _run(folder / "on", on)
    assert ended.code == 0, ended.err
    first = held_out(ended, "loaded")
    assert first, ended.out
    _near(first, as_trained, 0.03, place)
    again = ""
    if generator.random() < 0.3:
        again = f", went on and {_check_resumed(on, folder / 'on', folder / 'on-resumed', generator)}"
    return f"merged {distances[0]:.0e}{again}"


def _near(one: Sequence[float], other: Sequence[float], tolerance: float, place: int = 0) -> None:
    """Compares one number of two lines: the first is the loss, the last of pairs the NLL of chosen answers."""
    assert len(one) == len(other), (one, other)
    assert abs(one[place] - other[place]) <= tolerance * max(1.0, abs(other[place])), (one, other)
