"""Flags as RWKV-PEFT spells them, in this program's words.

Translation is a function of texts, before anything is converted or checked: `translated` gives the flags that are
meant, a line for the user about every spelling that was understood, and a sentence for each that cannot be.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from src.config.flags import Given, shortened
from src.config.model import QUANT_TYPES, quant_name
from src.config.recognition import files_of

UNDERSTOOD = {
    "state_tune": True, "fla": True, "fused_kernel": True, "op": False, "avg_loss": False, "LISA": True,
}  # fmt: skip
"""Its flags that are none here, and whether they stand without a value."""

_WITHOUT_EFFECT = {
    "fla": "the operator is chosen by the device",
    "op": "the operator is chosen by the device",
    "fused_kernel": "no loss here keeps all logits",
    "avg_loss": "it sets nothing there, either",
}
_CHUNK_TOKENS = 512
"""Its default of `--chunk_ctx`."""


@dataclass
class Translation:
    """What became of a command line.

    Attributes:
        given: flags of this program and their texts.
        notes: what was understood in which way.
        problems: what cannot be.
    """

    given: dict[str, str]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def translated(given: Given) -> Translation:
    """The flags that a command line in RWKV-PEFT's spelling means; one without its spellings stays as it is."""
    made = Translation({name: text for name, text in given.items() if name not in UNDERSTOOD})
    for name, reason in _WITHOUT_EFFECT.items():
        if name in given:
            made.notes.append(f"--{name} has no effect: {reason}")
    _translate_what_is_trained(given, made)
    _translate_quantisation(given, made)
    _translate_data(given, made)
    return made


def _whole_number(given: Given, name: str) -> int:
    """A flag's number; what is none is left to the flag's own check."""
    text = given.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() else _CHUNK_TOKENS


def _is_on(given: Given, name: str) -> bool:
    return given.get(name, "0") not in ("0", "False", "false")


def _translate_what_is_trained(given: Given, made: Translation) -> None:
    if given.get("train_type") == "infctx":
        made.given["train_type"] = "none"
        tokens = made.given.setdefault("chunk_ctx", str(min(_CHUNK_TOKENS, _whole_number(given, "ctx_len"))))
        made.notes.append(
            f"--train_type infctx is --train_type none --chunk_ctx {tokens}; the gradient passes from chunk to chunk, "
            "unlike there (--bptt_chunks 1)"
        )
    elif given.get("train_type") == "state":
        made.given["train_type"] = "states"
        made.notes.append("--train_type state is --train_type states")
    if _is_on(given, "LISA"):
        if made.given.setdefault("peft", "lisa") != "lisa":
            made.problems.append(f"--LISA and --peft {given['peft']} contradict: leave one out")
        made.notes.append("--LISA is --peft lisa")
    if _is_on(given, "state_tune"):
        if made.given.setdefault("train_type", "states") != "states":
            made.problems.append(f"--state_tune and --train_type {given['train_type']} contradict: leave one out")
        made.notes.append("--state_tune is --train_type states")


def _translate_quantisation(given: Given, made: Translation) -> None:
    text = given.get("quant", "")
    if text == "none":
        made.given["quant"] = "0"
        made.notes.append("--quant none is --quant 0")
    elif text == "fp8":
        del made.given["quant"]
        made.problems.append(
            "--quant fp8 is a cast without scales, which in as many bytes loses more than int8: use int8, or nf4"
        )
    elif text in QUANT_TYPES:
        if given.get("quant_type", text) != text:
            made.problems.append(f"--quant {text} and --quant_type {given['quant_type']} name two types: leave one out")
        made.given |= {"quant": "1", "quant_type": text}
        known_as = f", which is {quant_name(text)}" if quant_name(text) != text else ""
        made.notes.append(f"--quant {text} is --quant 1 --quant_type {text}{known_as}")
    elif text.strip() not in ("0", "1", "-1") and "quant" in given:
        del made.given["quant"]
        shown = shortened(text) if text.isprintable() else repr(shortened(text))
        made.problems.append(f"--quant {shown} is unknown: use one of {', '.join(('0', '1', 'none', *QUANT_TYPES))}")
    elif given.get("resume") == "1":
        return  # the flags not given are those that the run was begun with
    elif not {"quant", "quant_type"} & given.keys() and given.get("peft", "none") == "none":
        theirs = _own_spelling(given)
        if theirs:
            made.given["quant"] = "0"
            made.notes.append(f"{theirs} is RWKV-PEFT's spelling: unquantised without --quant, as there")


def _own_spelling(given: Given) -> str:
    """What on a command line only RWKV-PEFT says; "" if nothing."""
    for name, text in (("train_type", "state"), ("data_type", "sft")):
        if given.get(name) == text:
            return f"--{name} {text}"
    return next((f"--{name}" for name in UNDERSTOOD if name in given), "")


def _translate_data(given: Given, made: Translation) -> None:
    if given.get("data_type") == "sft":
        made.given["data_type"] = "jsonl"
        made.notes.append("--data_type sft is --data_type jsonl, written as chats of World models")
        path = given.get("data_file", "")
        missing = [file for file in files_of(path) if path and not os.path.isfile(file)]
        if missing:
            made.problems.append(
                f"--data_file {missing[0]} is no file, and data sets are not downloaded: save it as JSON lines and "
                "name those"
            )
        if given.get("peft", "none") == "none" and "train_type" not in made.given:
            made.given["train_type"] = "none"
            made.notes.append("--data_type sft without --peft and --train_type trains every weight, as there")
        if given.get("loss_mask") in ("pad", "none"):
            del made.given["loss_mask"]
            made.notes.append(
                f"--data_type sft trains on answers alone, as there: --loss_mask {given['loss_mask']} has no effect"
            )
