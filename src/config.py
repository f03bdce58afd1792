"""The configuration of a training run: one frozen value, made from flags, checked as a whole.

Flags keep the names of RWKV-LM-State-4bit. Each is declared once, as a field of `TrainConfig`; the
command line, its help and README's table come from these declarations. No torch import here, so that
a wrong flag is refused within milliseconds.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from src.errors import ConfigError

QUANT_TYPES = ("nf4", "fp4", "4bit", "int8")
ACCELERATORS = ("auto", "gpu", "cuda", "cpu")
PRECISIONS = ("bf16", "fp32", "fp16", "tf32")
STRATEGIES = (
    "auto",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
)


def flag(default: Any, text: str, choices: tuple[Any, ...] = (), group: str = "run") -> Any:
    """Declares one command-line flag as a dataclass field."""
    return field(default=default, metadata={"help": text, "choices": choices, "group": group})


@dataclass(frozen=True)
class TrainConfig:
    """Every flag of `train.py`; after `from_flags` all values are final and consistent.

    Sizes that the checkpoint also holds are 0 when not given; given, they are checked against it.
    """

    # Files
    load_model: str = flag("", "base model, an RWKV-6 (x060) .pth", group="files")
    load_state: str = flag("", "start from this state file instead of zeros", group="files")
    proj_dir: str = flag("out", "folder for checkpoints and logs, created if missing", group="files")
    data_file: str = flag("", "training data: binidx prefix, .jsonl or text file", group="files")
    data_type: str = flag(
        "", "binidx, jsonl, utf-8 (plain text) or dummy; found from the file if not given",
        ("binidx", "jsonl", "utf-8", "dummy"), "files",
    )  # fmt: skip
    val_file: str = flag("", "held-out data of the same kind; its loss is printed before and after", group="files")
    demo: str = flag("", "run the bundled demonstration: sft or orpo", ("sft", "orpo"), "files")

    # Model
    my_testing: str = flag("x060", "architecture; x060 is the only one", ("x060",), "model")
    train_type: str = flag(
        "states", "states: train time_state alone; none: train every weight (small models)", ("states", "none"), "model"
    )
    vocab_size: int = flag(0, "checked against the checkpoint", group="model")
    n_layer: int = flag(0, "checked against the checkpoint", group="model")
    n_embd: int = flag(0, "checked against the checkpoint", group="model")
    dim_att: int = flag(0, "checked against the checkpoint", group="model")
    dim_ffn: int = flag(0, "checked against the checkpoint", group="model")
    head_size_a: int = flag(0, "head size, checked against the checkpoint (64 for a fresh model)", group="model")
    head_size_divisor: int = flag(8, "group norm eps is 1e-5 times its square", group="model")
    double_extra_dim: int = flag(0, "recognised from the checkpoint; 1 is checked against it", (0, 1), "model")
    load_partial: int = flag(0, "accepted for old commands; a base model without states always loads", (0, 1), "model")
    quant: int = flag(-1, "1 quantises the frozen matrices (default for states), 0 does not", (-1, 0, 1), "model")
    quant_type: str = flag("nf4", "4bit means fp4; int8 is blockwise 8-bit", QUANT_TYPES, "model")
    quant_head: int = flag(0, "1 packs the head, too: less memory, a slower loss", (0, 1), "model")
    dropout: float = flag(0.0, "after the embedding and both residual additions", group="model")

    # Data
    ctx_len: int = flag(1024, "longest row in tokens", group="data")
    dataload: str = flag(
        "", "pack: whole documents share a row, states reset at their borders (default for states); pad: one a row, "
        "padded; only: one alone; get: windows anywhere (default for none)",
        ("pack", "pad", "only", "get"), "data",
    )  # fmt: skip
    micro_bsz: int = flag(1, "rows (ORPO: pairs) per device and step", group="data")
    accumulate_grad_batches: int = flag(1, "micro-batches per optimizer step", group="data")
    epoch_steps: int = flag(0, "micro-batches of an epoch on each device; 0 is one pass over the data", group="data")
    epoch_count: int = flag(4, "the run ends after this many epochs", group="data")
    epoch_begin: int = flag(0, "number of the first epoch; the schedule starts there", group="data")
    epoch_save: int = flag(1, "save every so many epochs; 0 saves at the end only", group="data")
    random_seed: int = flag(42, "-1 draws one", group="data")

    # Optimizer
    lr_init: float = flag(1.0, "learning rate after warm-up", group="optimizer")
    lr_final: float = flag(0.01, "learning rate at the last step", group="optimizer")
    warmup_steps: int = flag(10, "optimizer steps; the rate starts at a fifth; 0 or -1: none", group="optimizer")
    beta1: float = flag(0.9, "Adam", group="optimizer")
    beta2: float = flag(0.99, "Adam", group="optimizer")
    adam_eps: float = flag(1e-8, "Adam", group="optimizer")
    weight_decay: float = flag(0.0, "above 0: AdamW", group="optimizer")
    weight_decay_final: float = flag(-1.0, "above 0: weight decay moves there like the rate", group="optimizer")
    layerwise_lr: int = flag(
        1, "with train_type none, 2x the rate for time_decay; no effect on states", (0, 1), "optimizer"
    )
    my_exit: int = flag(99999999, "stop after the epoch with this number", group="optimizer")
    my_exit_tokens: int = flag(0, "cosine schedule over that many nominal tokens, then stop", group="optimizer")

    # Preference training
    orpo: int = flag(0, "1 trains on preference pairs", (0, 1), "orpo")
    orpo_type: int = flag(0, "0: the paper's loss; 1: the formula RWKV-LM-State-4bit released", (0, 1), "orpo")
    orpo_alpha: float = flag(0.1, "weight of the preference term, the NLL has 1 - alpha", group="orpo")
    orpo_debug: int = flag(0, "1 prints the preference term of every pair", (0, 1), "orpo")
    orpo_shared_prompt: int = flag(1, "compute each prompt once; 0: two full rows per pair", (0, 1), "orpo")
    rlhf_max_corpus_len: int = flag(600, "longest prompt and longest answer in tokens", group="orpo")
    rlhf_train_file: str = flag("trainset.save", "pairs made by PrepareOrpoDataset.py", group="orpo")

    # Hardware
    accelerator: str = flag("auto", "auto takes a GPU if there is one", ("auto", "gpu", "cuda", "cpu"), "hardware")
    devices: int = flag(1, "GPUs per machine", group="hardware")
    num_nodes: int = flag(1, "machines", group="hardware")
    strategy: str = flag("auto", "auto: one device without DeepSpeed, several with stage 1", STRATEGIES, "hardware")
    precision: str = flag("", "bf16 (default on a GPU), fp32 (default on a CPU), fp16, tf32", PRECISIONS, "hardware")
    grad_cp: int = flag(
        1, "1 recomputes each layer in the backward pass, 0 keeps everything, 2 keeps what fits into memory",
        (0, 1, 2), "hardware",
    )  # fmt: skip
    memory_gib: float = flag(0.0, "GPU memory --grad_cp 2 may use in all; 0 is the whole card", group="hardware")
    cuda_graph: int = flag(1, "1 records a step per shape and replays it, 0 issues every kernel", (0, 1), "hardware")
    offload_activations: int = flag(
        0, "1 keeps what the backward needs in host memory; steps are then not recorded", (0, 1), "hardware"
    )
    ds_bucket_mb: int = flag(200, "upper limit of DeepSpeed's buckets, million bytes", group="hardware")

    # Logs
    wandb: str = flag("", "Weights & Biases project; empty is off", group="logs")
    fapi_logging_callback: int = flag(0, "1 posts step and loss to fapi_logging_address", (0, 1), "logs")
    fapi_logging_address: str = flag("http://localhost:5000/", "see above", group="logs")

    @property
    def quantised(self) -> bool:
        """Whether the frozen matrices are packed."""
        return self.quant == 1

    @property
    def trains_states(self) -> bool:
        """Whether `time_state` alone is trained."""
        return self.train_type == "states"

    @property
    def uses_deepspeed(self) -> bool:
        """Whether a DeepSpeed engine was asked for."""
        return self.strategy.startswith("deepspeed")

    def notes(self) -> list[str]:
        """One line for each flag that was accepted without having an effect."""
        lines = []
        if self.load_partial:
            lines.append("--load_partial 1 is not needed: states missing in a base model start at zero")
        if self.orpo and self.data_file:
            lines.append(f"--data_file {self.data_file} is ignored: --orpo 1 trains on --rlhf_train_file")
        if not self.trains_states and self.lr_init > _LARGE_RATE:
            lines.append(
                f"--lr_init {self.lr_init:g} suits states; weights (--train_type none) usually want 1e-3 or less"
            )
        if self.layerwise_lr == 0 and self.trains_states:
            lines.append("--layerwise_lr 0 has no effect on states: they all have one rate")
        if self.weight_decay_final > 0 and not self.weight_decay:
            lines.append(f"--weight_decay_final {self.weight_decay_final:g} has no effect with --weight_decay 0")
        for spec in dataclasses.fields(self):
            switch, on = _SWITCHES.get(spec.name, ("", 0))
            value = getattr(self, spec.name)
            if switch and value != spec.default and getattr(self, switch) != on:
                lines.append(f"--{spec.name} {value} has no effect without --{switch} {on}")
        return lines

    @classmethod
    def from_flags(cls, given: Mapping[str, str]) -> TrainConfig:
        """Builds the configuration from flag texts, without the dashes.

        Raises:
            ConfigError: naming every problem at once.
        """
        problems = [
            f"--{name} {text} is not supported ({UNSUPPORTED[name][1]}): leave it out"
            for name, text in given.items()
            if name in UNSUPPORTED and not _same(text, UNSUPPORTED[name][0])
        ]
        values, wrong = _converted(cls, {name: given[name] for name in given if name not in UNSUPPORTED})
        config = cls(**_with_dependent_defaults(values))
        problems += [*wrong, *config._contradictions(given)]
        if problems:
            raise ConfigError(_together(problems))
        return config

    def _contradictions(self, given: Mapping[str, str]) -> list[str]:
        problems = []
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                problems.append(f"--{name} {getattr(self, name)} must be at least 1")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                problems.append(f"--{name} {getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2", "dropout", "orpo_alpha"):
            if not 0 <= getattr(self, name) < 1 and not (name == "orpo_alpha" and self.orpo_alpha == 1):
                problems.append(f"--{name} {getattr(self, name)} must lie between 0 and 1")
        if self.quant_head and not self.quantised:
            problems.append("--quant_head 1 packs the head as the matrices are packed: use --quant 1, or leave it out")
        if self.epoch_begin >= self.epoch_count:
            problems.append(
                f"--epoch_begin {self.epoch_begin} leaves nothing to train with --epoch_count {self.epoch_count}: "
                "epochs are numbered from epoch_begin to epoch_count - 1"
            )
        elif self.my_exit < self.epoch_begin:
            problems.append(f"--my_exit {self.my_exit} lies before --epoch_begin {self.epoch_begin}: raise it")
        if self.warmup_steps < -1:
            problems.append(f"--warmup_steps {self.warmup_steps} must not be negative: 0 is no warm-up, and so is -1")
        if self.random_seed < -1:
            problems.append(f"--random_seed {self.random_seed} must be at least 0, or -1 to draw one")
        if self.random_seed == -1 and self.devices * self.num_nodes > 1:
            problems.append("--random_seed -1 would draw one for each GPU, and all need the same: give a number")
        if self.trains_states and not self.load_model:
            problems.append("--load_model is missing: state tuning needs a base model (.pth)")
        if not self.trains_states:
            problems += self._full_training_contradictions()
        if self.orpo:
            if not self.rlhf_train_file:
                problems.append("--rlhf_train_file is missing: --orpo 1 trains on a .save file of pairs")
            if "dataload" in given:
                problems.append("--dataload has no meaning with --orpo 1: pairs are packed on their own")
        elif not self.data_file and self.data_type != "dummy":
            problems.append("--data_file is missing: name a binidx prefix, a .jsonl or a text file")
        if self.dataload == "only" and self.micro_bsz > 1:
            problems.append(f"--dataload only gives rows of unequal length: --micro_bsz {self.micro_bsz} must be 1")
        if self.strategy.startswith("deepspeed_stage_3") and self.quantised:
            problems.append(
                f"--strategy {self.strategy} shards every weight, which packed weights cannot take: use "
                "deepspeed_stage_1, or deepspeed_stage_2 to shard gradients too"
            )
        if self.offload_activations and self.grad_cp == 2:
            problems.append("--grad_cp 2 fills a GPU, --offload_activations 1 empties it: use --grad_cp 1 or 0 with it")
        if self.data_type == "dummy" and self.val_file:
            problems.append("--val_file has no meaning with --data_type dummy: leave one of them out")
        if self.fapi_logging_callback and not self.fapi_logging_address:
            problems.append("--fapi_logging_address is empty: --fapi_logging_callback 1 needs an address")
        if self.accelerator == "cpu" and self.precision in ("fp16", "tf32"):
            problems.append(f"--precision {self.precision} needs a GPU: use fp32 or bf16 with --accelerator cpu")
        return problems

    def _full_training_contradictions(self) -> list[str]:
        problems = []
        if self.quantised:
            problems.append("--quant 1 freezes the matrices, --train_type none trains them: use --quant 0")
        if self.orpo:
            problems.append("--orpo 1 trains states: use --train_type states")
        if self.load_state:
            problems.append("--load_state has no use with --train_type none: leave it out")
        if not self.load_model:
            problems += [
                f"--{name} is missing: a fresh model (no --load_model) needs its sizes"
                for name in ("n_layer", "n_embd", "vocab_size")
                if getattr(self, name) == 0
            ]
        return problems


_LARGE_RATE = 1e-2

_POSITIVE = (
    "ctx_len", "micro_bsz", "accumulate_grad_batches", "epoch_count", "devices", "num_nodes",
    "head_size_divisor", "rlhf_max_corpus_len", "ds_bucket_mb",
)  # fmt: skip
_NOT_NEGATIVE = (
    "vocab_size", "n_layer", "n_embd", "dim_att", "dim_ffn", "head_size_a", "epoch_steps", "epoch_begin",
    "epoch_save", "lr_init", "lr_final", "adam_eps", "weight_decay", "memory_gib",
)  # fmt: skip

# Flags that mean something only when another has this value.
_SWITCHES: dict[str, tuple[str, int]] = {
    "quant_type": ("quant", 1),
    "memory_gib": ("grad_cp", 2),
    "orpo_type": ("orpo", 1),
    "orpo_alpha": ("orpo", 1),
    "orpo_debug": ("orpo", 1),
    "orpo_shared_prompt": ("orpo", 1),
    "rlhf_max_corpus_len": ("orpo", 1),
    "rlhf_train_file": ("orpo", 1),
    "fapi_logging_address": ("fapi_logging_callback", 1),
}

_PRETRAINING = "it belongs to pre-training"
_UNREAD = "the original never read it"

# Flags of RWKV-LM-State-4bit without a meaning here: their default, which is accepted, and why others are not.
UNSUPPORTED: dict[str, tuple[str, str]] = {
    "pre_ffn": ("0", "the original crashes on it"),
    "head_qk": ("0", _PRETRAINING),
    "tiny_att_dim": ("0", _PRETRAINING),
    "tiny_att_layer": ("-999", _PRETRAINING),
    "my_pile_version": ("1", _PRETRAINING),
    "my_pile_stage": ("0", _PRETRAINING),
    "my_pile_shift": ("-1", _PRETRAINING),
    "my_pile_edecay": ("0", _PRETRAINING),
    "my_sample_len": ("0", "it belongs to a data type that does not exist here"),
    "my_ffn_shift": ("1", _UNREAD),
    "my_att_shift": ("1", _UNREAD),
    "my_pos_emb": ("0", _PRETRAINING),
    "magic_prime": ("0", _PRETRAINING),
    "my_random_steps": ("0", _PRETRAINING),
    "my_qa_mask": ("0", "it names files of its author"),
    "dpo": ("0", "no DPO loss exists; see --orpo"),
    "dpo_beta": ("0.01", _UNREAD),
}


def _with_dependent_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fills the defaults that depend on other flags."""
    filled = dict(values)
    full_training = filled.get("train_type") == "none"
    if filled.get("quant", -1) == -1:
        filled["quant"] = 0 if full_training else 1
    if not filled.get("dataload"):
        filled["dataload"] = "get" if full_training else "pack"
    if not filled.get("data_type"):
        filled["data_type"] = _data_type_of(filled.get("data_file", ""))
    return filled


def _data_type_of(data_file: str) -> str:
    if data_file.endswith((".jsonl", ".json")):
        return "jsonl"
    if data_file.endswith((".bin", ".idx")):
        return "binidx"
    if os.path.exists(data_file + ".idx") or not os.path.isfile(data_file):
        return "binidx"
    return "utf-8"


def _converted(cls: type, given: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Texts as the types of the fields of `cls`, and what is wrong with those left out."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    hints = get_type_hints(cls)
    for name, text in given.items():
        try:
            value = hints[name](text)
        except ValueError:
            kind = {int: "a whole number", float: "a number"}[hints[name]]
            problems.append(f"--{name} {text!r} is not {kind}")
            continue
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"--{name} {text} is not a finite number")
            continue
        values[name] = value
    for spec in dataclasses.fields(cls):
        choices = spec.metadata["choices"]
        if choices and spec.name in values and values[spec.name] not in choices:
            allowed = ", ".join(str(choice) for choice in choices if choice != -1)
            problems.append(f"--{spec.name} {values.pop(spec.name)} is unknown: use one of {allowed}")
    return values, problems


def _same(text: str, default: str) -> bool:
    try:
        return float(text) == float(default)
    except ValueError:
        return text == default


def _together(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems)


@dataclass(frozen=True)
class RejectConfig:
    """Every flag of `rlhf_generate_reject.py`."""

    load_model: str = flag("base_model/Anarchy-RWKV-2B-68.pth", "base model (.pth)", group="files")
    load_state: str = flag("", "sample with this tuned state", group="files")
    input_csv: str = flag("example.csv", "CSV or JSONL with prompt, chosen and perhaps reject", group="files")
    output_csv: str = flag("rlhfoutput.csv", "CSV to write; a second start goes on at its end", group="files")
    overwrite: int = flag(0, "1 also replaces rejects that the input has", (0, 1), "files")

    template: str = flag("user", "what stands around a prompt", ("user", "question", "input"), "sampling")
    temperature: float = flag(1.0, "0 takes the most probable token", group="sampling")
    top_p: float = flag(0.3, "share of probability that may be sampled, from the top", group="sampling")
    alpha_presence: float = flag(0.0, "taken off the logit of tokens already in the answer", group="sampling")
    alpha_frequency: float = flag(1.0, "taken off once more for every time they are", group="sampling")
    alpha_decay: float = flag(0.996, "factor on these counts per token", group="sampling")
    max_tokens: int = flag(1000, "longest answer", group="sampling")
    stop: str = flag(r"\n\n", r"text that ends an answer; \n is a line break", group="sampling")
    allow_end: int = flag(0, "1: token 0 may be sampled and ends an answer", (0, 1), "sampling")
    seed: int = flag(42, "the same seed gives the same answers", group="sampling")

    batch: int = flag(16, "rows generated at a time", group="hardware")
    accelerator: str = flag("auto", "auto takes a GPU if there is one", ACCELERATORS, "hardware")
    precision: str = flag("", "default: bf16 on a GPU, fp32 on a CPU", PRECISIONS, "hardware")
    quant: int = flag(0, "1 quantises the matrices, for models larger than the GPU", (0, 1), "hardware")
    quant_type: str = flag("nf4", "4bit means fp4; int8 is blockwise 8-bit", QUANT_TYPES, "hardware")

    @classmethod
    def from_flags(cls, given: Mapping[str, str]) -> RejectConfig:
        """Builds the configuration from flag texts.

        Raises:
            ConfigError: naming every problem at once.
        """
        values, problems = _converted(cls, given)
        config = cls(**values)
        checks = {
            f"--temperature {config.temperature} must not be negative": config.temperature >= 0,
            f"--top_p {config.top_p} must lie between 0 and 1": 0 <= config.top_p <= 1,
            f"--alpha_decay {config.alpha_decay} must lie between 0 and 1": 0 <= config.alpha_decay <= 1,
            f"--max_tokens {config.max_tokens} must be at least 1": config.max_tokens >= 1,
            f"--batch {config.batch} must be at least 1": config.batch >= 1,
            f"--seed {config.seed} must not be negative": config.seed >= 0,
            "--load_model is empty: name a .pth file": bool(config.load_model),
        }
        problems += [problem for problem, fine in checks.items() if not fine]
        if os.path.realpath(config.input_csv) == os.path.realpath(config.output_csv):
            problems.append(f"--output_csv {config.output_csv} is the input: give another name")
        if problems:
            raise ConfigError(_together(problems))
        return config


@dataclass(frozen=True)
class PairConfig:
    """Every flag of `PrepareOrpoDataset.py`."""

    load_model: str = flag("", "its vocabulary is used; empty: the World vocabulary", group="files")
    input_csv: str = flag("ojousamatalkscript200.csv", "CSV or JSONL: prompt, chosen, reject", group="files")
    output_save: str = flag("ojousama.save", "pairs for train.py; texts go to .texts.jsonl beside", group="files")

    target_pair_count: int = flag(10000, "pairs to make, the rows in order and again", group="pairs")
    template: str = flag(
        "mixed", "what stands around a prompt; mixed: 80 % user, 10 % question, 10 % input",
        ("mixed", "user", "question", "input"), "pairs",
    )  # fmt: skip
    max_len: int = flag(
        0, "most tokens of a prompt (cut at its beginning) and of an answer (at its end); 0: no limit",
        group="pairs",
    )  # fmt: skip
    seed: int = flag(100, "of templates and order", group="pairs")

    base_logp: int = flag(0, "1 stores log-probabilities under the model", (0, 1), "log-probabilities")
    accelerator: str = flag("auto", "for --base_logp 1", ACCELERATORS, "log-probabilities")
    precision: str = flag("", "default: bf16 on a GPU, fp32 on a CPU", PRECISIONS, "log-probabilities")
    quant: int = flag(0, "1 quantises the model's matrices", (0, 1), "log-probabilities")
    quant_type: str = flag("nf4", "for --quant 1", QUANT_TYPES, "log-probabilities")

    fapi_logging_callback: int = flag(0, "1 posts the progress to fapi_logging_address", (0, 1), "logs")
    fapi_logging_callback_step: int = flag(1000, "pairs between two posts", group="logs")
    fapi_logging_address: str = flag("http://localhost:5000/", "see above", group="logs")

    @property
    def text_file(self) -> str:
        """JSONL of the pairs' texts."""
        return os.path.splitext(self.output_save)[0] + ".texts.jsonl"

    @classmethod
    def from_flags(cls, given: Mapping[str, str]) -> PairConfig:
        """Builds the configuration from flag texts.

        Raises:
            ConfigError: naming every problem at once.
        """
        values, problems = _converted(cls, given)
        config = cls(**values)
        files = {os.path.realpath(path) for path in (config.input_csv, config.output_save, config.text_file)}
        checks = {
            f"--target_pair_count {config.target_pair_count} must be at least 1": config.target_pair_count > 0,
            f"--max_len {config.max_len} must not be negative": config.max_len >= 0,
            f"--fapi_logging_callback_step {config.fapi_logging_callback_step} must be at least 1": (
                config.fapi_logging_callback_step > 0
            ),
            "--base_logp 1 needs --load_model": bool(config.load_model) or not config.base_logp,
            f"--output_save {config.output_save} cannot be used: it, the texts in {config.text_file} and the "
            "input must be three files": len(files) == 3,
        }
        problems += [problem for problem, fine in checks.items() if not fine]
        if problems:
            raise ConfigError(_together(problems))
        return config
