"""The configuration of a training run, and what its subjects have to do with each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from src.config.adapters import AdapterFlags
from src.config.chunks import AS_MANY_AS_FIT, AUTO, ChunkFlags
from src.config.data import DataFlags
from src.config.files import FileFlags
from src.config.flags import Given, Lines, shortened
from src.config.hardware import STRATEGIES, HardwareFlags
from src.config.logs import LogFlags
from src.config.model import METHOD_DEFAULTS, USUAL_RATES, ModelFlags
from src.config.optimizer import OptimizerFlags
from src.config.preference import PreferenceFlags
from src.config.recognition import recognise
from src.config.spellings import UNDERSTOOD, translated

_PRETRAINING = "it belongs to pre-training"
_UNREAD = "the original never read it"

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
}
"""Flags of RWKV-LM-State-4bit without a meaning here: their default, which is accepted, and why others are not."""


@dataclass(frozen=True)
class TrainConfig(
    LogFlags, HardwareFlags, PreferenceFlags, OptimizerFlags, ChunkFlags, DataFlags, AdapterFlags, ModelFlags, FileFlags
):
    """Every flag of `train.py`; after `from_flags` all values are final and consistent."""

    unsupported: ClassVar[Mapping[str, tuple[str, str]]] = UNSUPPORTED
    understood: ClassVar[Mapping[str, bool]] = UNDERSTOOD

    @classmethod
    def _translated(cls, given: Given) -> tuple[Given, list[str]]:
        made = translated(given)
        if made.given.get("chunk_ctx") == AUTO:
            made.given["chunk_ctx"] = str(AS_MANY_AS_FIT)
        elif made.given.get("chunk_ctx", "").strip() == str(AS_MANY_AS_FIT):
            made.problems.append(f"--chunk_ctx {AS_MANY_AS_FIT} must be at least 1, or {AUTO}")
        return made.given, made.problems

    def told_apart(self) -> dict[str, Any]:
        """The flags, by name, that make this configuration when they are given."""
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)} | METHOD_DEFAULTS[self.method]
        said_by_json = self._said_by_json()
        values = {
            name: getattr(self, name)
            for name, default in defaults.items()
            if getattr(self, name) != default and name not in said_by_json
        }
        if self.preference:
            values.pop("dataload", None)
        if self.strategy not in STRATEGIES:
            values.pop("strategy", None)
        return values

    @property
    def method(self) -> str:
        """The way of training, a key of METHOD_DEFAULTS."""
        if self.adapter != "none":
            return self.adapter
        if not self.trains_states:
            return "full"
        return "parts" if self.parts else "states"

    @property
    def holds_out(self) -> bool:
        """Whether there are held-out data."""
        return bool(self.val_file or self.val_share)

    @property
    def _file_measured(self) -> str:
        """The only data that are read where nothing is trained; "" elsewhere."""
        return self.val_file if self.evaluate else ""

    @property
    def updates_by_tensor(self) -> bool:
        """Whether tensors are updated one by one: rounded stochastically, or in the backward.

        A DeepSpeed engine does not: beside bf16 weights it has fp32 masters of its own.
        """
        return bool(self.fused_update) or (self.weights == "bf16" and not self.has_engine)

    @property
    def one_backward(self) -> bool:
        """Whether a step's gradient is that of one backward of one process, and no sum."""
        return self.accumulate_grad_batches == 1 and not self.chunk_ctx and self.processes == 1

    @property
    def shards_weights(self) -> bool:
        """Whether each process has a share of every weight."""
        return self.strategy.startswith("deepspeed_stage_3")

    @property
    def dense_and_whole(self) -> bool:
        """Whether frozen matrices are neither packed nor shared out among processes."""
        return not (self.quantised or self.shards_weights)

    @property
    def has_engine(self) -> bool:
        """Whether DeepSpeed trains: where it was asked for, and on several GPUs, unless it could not.

        It keeps to the tensors that it was given first, which excludes layers by turns, and updates all as one.
        """
        return self.uses_deepspeed or (self.processes > 1 and self.method != "lisa" and not self.fused_update)

    def _completed(self) -> TrainConfig:
        chosen = dataclasses.replace(
            self,
            data_type=self.data_type or recognise(self._file_measured or self.data_file).data_type,
            train_type=self.train_type or ("states" if self.peft == "none" else "none"),
            **self._said_by_json(),
        )
        filled = {
            name: value
            for name, value in METHOD_DEFAULTS[chosen.method].items()
            if getattr(chosen, name) == getattr(TrainConfig, name)
        }
        if self.evaluate and (self.quant_type, self.quant_head) == (TrainConfig.quant_type, TrainConfig.quant_head):
            filled.pop("quant", None)  # which the file that is measured says, too
        return dataclasses.replace(chosen, **filled)

    def _contradictions(self, given: Given) -> Lines:
        instead = [self._seen(name, given) for name in ("dry_run", "evaluate", "preview") if getattr(self, name)]
        if len(instead) > 1:
            yield f"{' and '.join(instead)} are different things to do instead of training: leave all but one out"
        if self.evaluate and self.resume:
            yield "--resume 1 has no meaning with --evaluate 1, which measures a file: name it with --load_state"
        if self.my_exit < self.epoch_begin < self.epoch_count:
            yield f"{self._seen('my_exit', given)} lies before {self._seen('epoch_begin', given)}: raise it"
        if self.random_seed == -1 and self.processes > 1:
            yield "--random_seed -1 would draw one for each GPU, and all need the same: give a number"
        if self.method == "full":
            yield from self._full_training_contradictions()
        else:
            for name, value in (("weights", self.weights), ("fused_update", self.fused_update)):
                if value != getattr(TrainConfig, name):
                    yield f"--{name} {value} is for --train_type none, which trains every weight: leave it out"
        if self.method != "full" and not self.load_model:
            what = {"states": "state tuning"}.get(self.method, "an adapter")
            yield f"--load_model is missing: {what} needs a base model (.pth)"
        if self.fused_update and self.accumulate_grad_batches > 1:
            yield (
                "--fused_update 1 uses each gradient up at once, and "
                f"{self._seen('accumulate_grad_batches', given)} adds several: use --micro_bsz, or --fused_update 0"
            )
        if self._has_two_rates and self.lr_state and not self.lr_init:
            yield f"{self._seen('lr_state', given)} moves as the other rate does, and --lr_init is 0: raise it"
        if self.val_steps and not self.holds_out:
            yield (
                f"{self._seen('val_steps', given)} has nothing to measure: give held-out data with --val_file, or hold "
                "some out with --val_share 0.05"
            )
        if self.val_share and self.dataload == "get":
            yield (
                f"{self._seen('val_share', given)} holds documents out, and --dataload get takes windows anywhere: "
                "use pack or pad"
            )
        if self.early_stop and not self.val_steps:
            yield f"{self._seen('early_stop', given)} counts measurements of --val_steps, which is 0: give it, too"
        if self.sample_steps and not self.sample_prompts:
            yield f"{self._seen('sample_steps', given)} has nothing to answer: give a file of prompts, --sample_prompts"
        if self.preference and "dataload" in given:
            yield f"--dataload has no meaning with --{self.preference} 1: pairs are packed on their own"
        for name in ("loss_mask", "mask_id", "preview", "template", "mix"):
            if self.preference and name in given:
                yield f"--{name} has no meaning with --{self.preference} 1, which trains on pairs: leave it out"
        if self.mix and self.dataload == "get":
            yield "--mix has no meaning with --dataload get, which takes windows anywhere: use pack or pad"
        for mix in self.mixes:
            if problem := recognise(mix.path).problem:
                yield f"--mix {mix.path} {problem}"
        if self.loss_mask in ("qa", "se") and self.data_type == "dummy":
            yield f"--loss_mask {self.loss_mask} looks for texts, which --data_type dummy has none of: leave it out"
        yield from self._evaluate_contradictions()
        trains_on_file = not self.preference and self.data_type != "dummy"
        if trains_on_file and not self.data_file and (self.val_share or not self.evaluate):
            yield "--data_file is missing: name a binidx prefix, a file of entries (.jsonl, .json, .csv) or a text file"
        if not self.preference and self.data_type != "dummy":
            yield from self._data_contradictions(given)
        if not self.preference and self.data_type != "jsonl" and (self.sft_field or self.sft_split):
            name = "sft_field" if self.sft_field else "sft_split"
            yield (
                f"--{name} belongs to entries, and --data_file {shortened(self.data_file)} is {self.data_type}: "
                "leave it out"
            )
        yield from self._chunk_contradictions(given)
        if self.shards_weights and self.quantised:
            yield (
                f"--strategy {self.strategy} shards every weight, which packed weights cannot take: use "
                "deepspeed_stage_1, or deepspeed_stage_2 to shard gradients too"
            )

        if self.shards_weights and self.chunk_ctx:
            yield (
                f"{self._seen('chunk_ctx', given)} computes layers again apart from the calls around which --strategy "
                f"{self.strategy} gathers their weights: use deepspeed_stage_2"
            )
        if self.shards_weights and self.offload_activations:
            yield (
                f"--offload_activations 1 would take the weights that --strategy {self.strategy} gathers for "
                "activations: use deepspeed_stage_2"
            )
        if self.shards_weights and self.sample_prompts:
            yield (
                f"--sample_prompts are answered by one process, and --strategy {self.strategy} spreads the weights "
                "over all: use deepspeed_stage_2"
            )

    def _evaluate_contradictions(self) -> Lines:
        if not self.evaluate:
            return
        if not self.holds_out:
            yield "--evaluate 1 has nothing to measure: name held-out data with --val_file"
        if not self.load_model:
            yield "--evaluate 1 measures a model: name it with --load_model"

    def _chunk_contradictions(self, given: Given) -> Lines:
        if self.preference:
            longest, what = 2 * self.rlhf_max_corpus_len, "prompt and answer of --rlhf_max_corpus_len"
            limit = self.rlhf_max_corpus_len
        else:
            longest, what, limit = self.ctx_len, "a row of --ctx_len", self.ctx_len
        if self.chunk_ctx > longest:
            yield f"{self._seen('chunk_ctx', given)} is more than {what} {limit}, so it cuts nothing: lower it"
        if self.chunk_ctx and self.offload_activations:
            yield (
                "--offload_activations 1 has no use with --chunk_ctx, which keeps the activations of one chunk only: "
                "leave it out, and choose a smaller --chunk_ctx where memory is short"
            )

    def _data_contradictions(self, given: Given) -> Lines:
        """What the data are by their content, unless the user has said it."""
        if given.get("data_type"):
            return
        for name in ("data_file", "val_file"):
            path = "" if name == "data_file" and self._file_measured else getattr(self, name)
            found = recognise(path) if path else None
            if found and found.problem:
                yield f"--{name} {path} {found.problem}"
            elif found and found.data_type != self.data_type:
                yield (
                    f"--{name} {path} is read as {found.data_type}, but --data_file {self.data_file} as "
                    f"{self.data_type}: give held-out data of the same kind, or --data_type"
                )

    def _full_training_contradictions(self) -> Lines:
        if self.quantised:
            yield "--quant 1 freezes the matrices, --train_type none trains them: use --quant 0"
        if self.parts:
            yield f"--train_parts {self.train_parts} has no use where every weight is trained: leave it out"
        if self.load_state:
            yield "--load_state has no use with --train_type none: leave it out"
        if not self.load_model:
            for name in ("n_layer", "n_embd", "vocab_size"):
                if getattr(self, name) == 0:
                    yield f"--{name} is missing: a fresh model (no --load_model) needs its sizes"

    def _remarks(self) -> Lines:
        if self.preference and self.data_file:
            yield f"--data_file {self.data_file} is ignored: --{self.preference} 1 trains on --rlhf_train_file"
        if not self.preference and self.data_type in ("jsonl", "utf-8"):
            for name, path in (("data_file", self.data_file), ("val_file", self.val_file)):
                found = recognise(path) if path else None
                if found and found.surprise and self.data_type == found.data_type:
                    yield f"--{name} {path} holds {found.surprise} and is read as --data_type {found.data_type}"
                elif found and found.data_type == "jsonl" and self.data_type == "utf-8":
                    held = found.surprise or "entries"
                    yield f"--{name} {path} holds {held} and is read as plain text, as --data_type utf-8 says"
        if self.template != TrainConfig.template and self.data_type != "jsonl" and not self.preference:
            yield f"--template {self.template} has no effect on --data_type {self.data_type}, which is taken as it is"
        yield from self._unusual_rate("lr_init", self.method)
        if self._has_two_rates:
            yield from self._unusual_rate("lr_state", "states")
        if self.fused_update and self.chunk_ctx:
            yield (
                "--fused_update 1 frees no gradient early where rows are cut by --chunk_ctx: their chunks add up "
                "gradients of every layer"
            )
        if self.layerwise_lr == 0 and self.method == "states":
            yield "--layerwise_lr 0 has no effect on states: they all have one rate"
        if self.lr_state != TrainConfig.lr_state and not self._has_two_rates:
            yield f"--lr_state {self.lr_state:g} has no effect unless states and other things are trained"

    def _unusual_rate(self, name: str, method: str) -> Lines:
        """A warning where a rate is far from what a method usually takes."""
        least, most = USUAL_RATES[method]
        rate = getattr(self, name)
        what = {"states": "states", "full": "all weights", "parts": "parts of the weights"}.get(method, method)
        usual = f"the usual {least:g} to {most:g} of {what}"
        if rate > most:
            suits = "" if method == "states" else "; such rates suit states"
            apart = ", whose rate is --lr_state" if suits and self.trains_states else ""
            yield f"--{name} {rate:g} is above {usual} and may ruin the model{suits}{apart}"
        elif rate < least:
            yield f"--{name} {rate:g} is below {usual} and may change nothing"

    @property
    def _has_two_rates(self) -> bool:
        return self.trains_states and self.method != "states"
