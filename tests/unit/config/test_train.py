"""Flags of train.py to a configuration: defaults, what is refused, and in which words."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from src.config import UNSUPPORTED, TrainConfig
from src.config.data import LossMask
from src.config.model import METHOD_DEFAULTS
from src.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]

FLAGS = (
    # files
    "config", "load_model", "load_state", "proj_dir", "resume", "overwrite", "save_minutes", "data_file", "data_type",
    "val_file", "val_share", "sft_field", "sft_split", "template", "mix", "demo", "dry_run", "evaluate", "doctor",
    # model
    "my_testing", "train_type", "weights", "vocab_size", "n_layer", "n_embd", "dim_att", "dim_ffn", "head_size_a",
    "head_size_divisor", "double_extra_dim", "load_partial", "quant", "quant_type", "quant_head", "dropout",
    # adapters
    "peft", "lora_config", "pissa_config", "bone_config", "disha_config", "lisa_config", "lora_r", "lora_alpha",
    "lora_dropout", "lora_rslora", "lora_plus", "pissa_r", "svd_niter", "bone_r", "lisa_r", "lisa_k", "lisa_moments",
    "targets", "train_parts", "load_adapter", "lr_state",
    # data
    "ctx_len", "dataload", "data_shuffle", "micro_bsz", "accumulate_grad_batches", "epoch_steps", "epoch_count",
    "epoch_begin", "epoch_save", "val_steps", "early_stop", "loss_mask", "mask_id", "preview", "random_seed",
    # chunks
    "chunk_ctx", "bptt_chunks", "chunk_keep",
    # optimizer
    "optim", "fused_update", "lr_init", "lr_final", "lr_schedule", "warmup_steps", "beta1", "beta2", "adam_eps",
    "weight_decay", "weight_decay_final", "layerwise_lr", "my_exit", "my_exit_tokens",
    # preference training
    "orpo", "orpo_type", "orpo_alpha", "orpo_debug", "dpo", "dpo_beta", "simpo", "simpo_beta", "simpo_gamma",
    "orpo_shared_prompt", "rlhf_max_corpus_len", "rlhf_train_file",
    # hardware
    "accelerator", "devices", "num_nodes", "strategy", "precision", "grad_cp", "memory_gib", "cuda_graph",
    "offload_activations", "ds_bucket_mb",
    # logs
    "plot", "sample_prompts", "sample_steps", "tensorboard", "wandb", "fapi_logging_callback", "fapi_logging_address",
)  # fmt: skip
"""Every flag of train.py. Adding one is a decision: it belongs here and in README's table too."""

REFUSED = (
    "pre_ffn", "head_qk", "tiny_att_dim", "tiny_att_layer", "my_pile_version", "my_pile_stage",
    "my_pile_shift", "my_pile_edecay", "my_sample_len", "my_ffn_shift", "my_att_shift", "my_pos_emb", "magic_prime",
    "my_random_steps", "my_qa_mask",
)  # fmt: skip
"""Flags of the original that mean nothing here."""

DEFAULTS = {
    "my_testing": "", "train_type": "states", "accelerator": "auto", "strategy": "auto", "devices": 1,
    "quant": 1, "quant_type": "nf4", "dataload": "pack", "ctx_len": 1024, "micro_bsz": 1, "epoch_steps": 0,
    "peft": "none", "lora_r": 64,
    "epoch_count": 4, "epoch_save": 1, "lr_init": 1.0, "lr_final": 0.01, "warmup_steps": 10, "beta1": 0.9,
    "beta2": 0.99, "adam_eps": 1e-8, "weight_decay": 0.0, "grad_cp": 1, "random_seed": 42, "orpo_type": 0,
    "orpo_alpha": 0.1, "fapi_logging_callback": 0, "accumulate_grad_batches": 1, "num_nodes": 1,
    "proj_dir": "out", "epoch_begin": 0, "orpo": 0,
}  # fmt: skip

BASE = {"load_model": "base.pth", "data_file": "data"}


def config(**flags: object) -> TrainConfig:
    """A configuration from the two necessary flags and these."""
    return TrainConfig.from_flags({**BASE, **{name: str(value) for name, value in flags.items()}})


def problem(flags: dict[str, str]) -> str:
    """The message that refuses these flags."""
    with pytest.raises(ConfigError) as refused:
        TrainConfig.from_flags(flags)
    return str(refused.value)


class TestFlagList:
    def test_the_flags_are_these(self) -> None:
        assert tuple(spec.name for spec in dataclasses.fields(TrainConfig)) == FLAGS

    def test_the_refused_flags_are_these(self) -> None:
        assert tuple(UNSUPPORTED) == REFUSED


class TestDefaults:
    def test_a_short_command_is_a_good_command(self) -> None:
        made = config()
        assert {name: getattr(made, name) for name in DEFAULTS} == DEFAULTS

    def test_full_training_has_its_own(self) -> None:
        made = config(train_type="none")
        assert (made.quant, made.dataload, made.lr_init, made.lr_final) == (0, "pack", 1e-5, 1e-6)

    def test_what_is_given_wins(self) -> None:
        made = config(train_type="none", dataload="pack", quant=0, lr_init="6e-4", ctx_len=77)
        assert (made.dataload, made.quant, made.lr_init, made.ctx_len) == ("pack", 0, 6e-4, 77)
        assert config(quant=-1).quant == 1

    def test_every_method_has_a_value_for_each_dependent_default(self) -> None:
        assert len({frozenset(defaults) for defaults in METHOD_DEFAULTS.values()}) == 1
        asked: dict[str, dict[str, str]] = {
            "states": {},
            "full": {"train_type": "none"},
            "parts": {"train_parts": "ln"},
        }
        for method, defaults in METHOD_DEFAULTS.items():
            made = config(**asked.get(method, {"peft": method}))
            wanted = {**defaults, **asked.get(method, {})}
            assert made.method == method
            assert {name: getattr(made, name) for name in wanted} == wanted

    def test_it_is_a_value(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            config().ctx_len = 1  # type: ignore[misc]
        assert config() == config()

    def test_the_data_type_is_found_unless_given(self) -> None:
        assert config(data_file="a.jsonl").data_type == "jsonl"
        assert config(data_file="a.jsonl", data_type="utf-8").data_type == "utf-8"


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"quant_type": "nf5"}, "--quant_type nf5 is unknown: use one of nf4, fp4, 4bit, int8"),
            ({"train_type": "lora"}, "--train_type lora is unknown: use one of states, none"),
            ({"my_testing": "x052"}, "--my_testing x052 is unknown: use one of x060, x070"),
            ({"strategy": "ddp"}, "--strategy ddp is unknown"),
            ({"precision": "bf17"}, "--precision bf17 is unknown"),
            ({"dataload": "all"}, "--dataload all is unknown"),
            ({"quant": "2"}, "--quant 2 is unknown: use one of 0, 1, none, nf4, fp4, 4bit, int8"),
            ({"ctx_len": "1k"}, "--ctx_len '1k' is not a whole number"),
            ({"micro_bsz": "1.5"}, "--micro_bsz '1.5' is not a whole number"),
            ({"lr_init": "high"}, "--lr_init 'high' is not a number"),
            ({"ctx_len": "0"}, "--ctx_len 0 must be at least 1"),
            ({"accumulate_grad_batches": "0"}, "--accumulate_grad_batches 0 must be at least 1"),
            ({"warmup_steps": "-4"}, "--warmup_steps -4 must not be negative"),
            ({"random_seed": "-5"}, "--random_seed -5 must be at least 0, or -1 to draw one"),
            ({"random_seed": "-1", "devices": "2"}, "--random_seed -1 would draw one for each GPU"),
            ({"my_exit": "1", "epoch_begin": "2"}, "--my_exit 1 lies before --epoch_begin 2: raise it"),
            ({"epoch_steps": "-1"}, "--epoch_steps -1 must not be negative"),
            ({"lr_final": "-1"}, "--lr_final -1 must not be negative"),
            ({"quant": "0", "quant_head": "1"}, "--quant_head 1 packs the head as the matrices are packed: use"),
            ({"grad_cp": "2", "offload_activations": "1"}, "use --grad_cp 1 or 0 with it"),
            ({"chunk_ctx": "0"}, "--chunk_ctx 0 must be at least 1: leave it out to compute rows whole"),
            ({"chunk_ctx": "-2"}, "--chunk_ctx -2 must be at least 1, or auto"),
            ({"chunk_ctx": "-1"}, "--chunk_ctx -1 must be at least 1, or auto"),
            ({"chunk_ctx": "half"}, "--chunk_ctx 'half' is not a whole number"),
            ({"chunk_ctx": "1025"}, "--chunk_ctx 1025 is more than a row of --ctx_len 1024, so it cuts nothing"),
            (
                {"chunk_ctx": "1201", "dpo": "1"},
                "--chunk_ctx 1201 is more than prompt and answer of --rlhf_max_corpus_len 600",
            ),
            ({"chunk_ctx": "9", "offload_activations": "1"}, "--offload_activations 1 has no use with --chunk_ctx"),
            ({"chunk_ctx": "9", "bptt_chunks": "-1"}, "--bptt_chunks -1 must not be negative"),
            ({"chunk_ctx": "9", "chunk_keep": "disk"}, "--chunk_keep disk is unknown: use one of device, host"),
            ({"dropout": "1"}, "--dropout 1 must be at least 0 and below 1"),
            ({"beta2": "1"}, "--beta2 1 must be at least 0 and below 1"),
            ({"optim": "adam_mini"}, "--optim adam_mini is unknown: use one of none, adam, adamw, adamw8bit, paged"),
            ({"optim": "adam", "weight_decay": "0.1"}, "--weight_decay 0.1 is AdamW's: use --optim adamw"),
            ({"lr_schedule": "cos", "my_exit_tokens": "9"}, "--my_exit_tokens 9 brings a cosine of its own"),
            ({"lr_schedule": "linear"}, "--lr_schedule linear is unknown: use one of exp, cos, wsd"),
            ({"data_shuffle": "0", "dataload": "get"}, "--data_shuffle 0 has no meaning with --dataload get"),
            ({"mix": "a.jsonl"}, "--mix a.jsonl is not understood: write FILE:SHARE for each, as in other.jsonl:0.2"),
            ({"mix": "a.jsonl:1"}, "--mix a.jsonl:1 gives a.jsonl the share 1: it must be above 0 and below 1"),
            ({"mix": "a:0.5,b:0.5"}, "leaves 0 of the documents to the training data: lower the shares"),
            ({"mix": "a.jsonl:0.2", "dataload": "get"}, "--mix has no meaning with --dataload get"),
            ({"mix": "a.jsonl:0.2", "data_type": "dummy"}, "--mix has no meaning with --data_type dummy"),
            ({"mix": "a.jsonl:0.2", "orpo": "1"}, "--mix has no meaning with --orpo 1, which trains on pairs"),
            (
                {"data_file": "a.jsonl", "sft_field": "a b c d"},
                "--sft_field a b c d must be one name (text, messages), two",
            ),
            ({"data_file": "a.jsonl", "sft_field": "asked=q"}, "says what 'asked' is, and fields are question, answer"),
            ({"data_file": "a.jsonl", "sft_field": "question=q"}, "must name the question's field and the answer's"),
            ({"data_file": "a.jsonl", "sft_field": "q q"}, "--sft_field q q must name each field once"),
            (
                {"data_file": "a.jsonl", "sft_split": "test"},
                "--sft_split test is not understood: write train, or",
            ),
            ({"sft_split": "train[:9]"}, "--sft_split belongs to entries, and --data_file data is binidx: leave it"),
            ({"orpo_alpha": "1.5"}, "--orpo_alpha 1.5 must lie between 0 and 1"),
            ({"epoch_begin": "4"}, "--epoch_begin 4 leaves nothing to train with --epoch_count 4"),
            ({"dataload": "only", "micro_bsz": "2"}, "--micro_bsz 2 must be 1"),
            ({"strategy": "deepspeed_stage_3"}, "shards every weight"),
            (
                {"strategy": "deepspeed_stage_3", "quant": "0", "chunk_ctx": "64"},
                "--chunk_ctx 64 computes layers again apart from the calls around which --strategy deepspeed_stage_3",
            ),
            (
                {"strategy": "deepspeed_stage_3", "quant": "0", "offload_activations": "1"},
                "--offload_activations 1 would take the weights that --strategy deepspeed_stage_3 gathers for",
            ),
            ({"strategy": "deepspeed_stage_3_offload"}, "which packed weights cannot take: use deepspeed_stage_1"),
            (
                {"train_type": "none", "quant": "1"},
                "--quant 1 freezes the matrices, --train_type none trains them",
            ),
            (
                {"train_type": "none", "fused_update": "1", "accumulate_grad_batches": "3"},
                "--fused_update 1 uses each gradient up at once, and --accumulate_grad_batches 3 adds several",
            ),
            ({"fused_update": "1"}, "--fused_update 1 is for --train_type none, which trains every weight: leave it"),
            ({"weights": "bf16"}, "--weights bf16 is for --train_type none, which trains every weight: leave it out"),
            ({"orpo": "1", "simpo": "1"}, "--orpo 1 and --simpo 1 are different losses: choose one"),
            ({"dpo": "1", "rlhf_train_file": ""}, "--rlhf_train_file is missing: --dpo 1 trains on a .save file"),
            ({"dpo": "1", "dpo_beta": "0"}, "--dpo_beta 0 must be above 0"),
            ({"simpo": "1", "simpo_gamma": "-1"}, "--simpo_gamma -1 must not be negative"),
            ({"simpo": "1", "dataload": "pad"}, "--dataload has no meaning with --simpo 1"),
            ({"train_type": "none", "load_state": "s.pth"}, "--load_state has no use with --train_type none"),
            ({"orpo": "1", "dataload": "pad"}, "--dataload has no meaning with --orpo 1"),
            ({"orpo": "1", "rlhf_train_file": ""}, "--rlhf_train_file is missing"),
            ({"data_type": "dummy", "val_file": "v"}, "--val_file has no meaning with --data_type dummy"),
            ({"loss_mask": "all"}, "--loss_mask all is unknown: use one of none, pad, qa, se"),
            ({"loss_mask": "se"}, "--loss_mask se needs --mask_id, the two texts it takes the loss between: '{"),
            ({"loss_mask": "se", "mask_id": "x"}, "--mask_id x is no JSON ("),
            ({"loss_mask": "se", "mask_id": "[1]"}, "--mask_id [1] is no JSON object: write it as '{"),
            (
                {"loss_mask": "se", "mask_id": '{"mask0":"a","mask1":"b","mask01":"c"}'},
                "--mask_id has the unknown key 'mask01': it has mask0 and mask1",
            ),
            (
                {"loss_mask": "se", "mask_id": '{"mask0":"a","mask0":"c","mask1":"b"}'},
                "--mask_id has the key 'mask0' twice: leave one out",
            ),
            ({"loss_mask": "se", "mask_id": '{"mask0":"a"}'}, '--mask_id {"mask0":"a"} lacks mask1: write it as'),
            ({"loss_mask": "se", "mask_id": '{"mask0":0,"mask1":"1"}'}, "--mask_id: mask0 is 0, expected a text"),
            ({"loss_mask": "se", "mask_id": '{"mask0":"a","mask1":" "}'}, '--mask_id: mask1 is " ", expected a text'),
            ({"loss_mask": "se", "mask_id": '{"mask0":"a","mask1":"a"}'}, 'mask0 and mask1 are both "a": give two'),
            ({"mask_id": "[" * 99999}, "is no JSON"),
            ({"loss_mask": "qa", "data_type": "dummy"}, "--loss_mask qa looks for texts, which --data_type dummy has"),
            ({"orpo": "1", "loss_mask": "qa"}, "--loss_mask has no meaning with --orpo 1, which trains on pairs"),
            ({"dpo": "1", "preview": "2"}, "--preview has no meaning with --dpo 1"),
            ({"preview": "-1"}, "--preview -1 must not be negative"),
            ({"preview": "2", "dry_run": "1"}, "--dry_run 1 and --preview 2 are different things to do instead of"),
            ({"evaluate": "1", "dry_run": "1", "val_file": "v"}, "--dry_run 1 and --evaluate 1 are different things"),
            ({"evaluate": "1", "resume": "1", "val_file": "v"}, "--resume 1 has no meaning with --evaluate 1, which"),
            ({"accelerator": "cpu", "precision": "fp16"}, "--precision fp16 needs a GPU"),
            ({"fapi_logging_callback": "1", "fapi_logging_address": ""}, "--fapi_logging_address is empty"),
        ],
        ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
    )
    def test_one_sentence_with_flag_value_and_way_out(self, flags: dict[str, str], expected: str) -> None:
        message = problem({**BASE, **flags})
        assert expected in message
        assert "\n" not in message

    @pytest.mark.parametrize("name", ["nan", "inf", "-inf"])
    @pytest.mark.parametrize("flag", ["lr_init", "lr_final", "adam_eps", "weight_decay", "beta1"])
    def test_numbers_are_finite(self, flag: str, name: str) -> None:
        assert f"--{flag}" in problem({**BASE, flag: name})

    def test_a_base_model_and_data_are_needed(self) -> None:
        message = problem({"ctx_len": "512"})
        assert "--load_model is missing" in message
        assert "--data_file is missing" in message

    def test_a_fresh_model_needs_its_sizes(self) -> None:
        message = problem({"train_type": "none", "data_file": "d", "n_layer": "2"})
        assert "--n_embd is missing" in message
        assert "--vocab_size is missing" in message
        assert "--n_layer is missing" not in message

    def test_generated_data_need_no_file(self) -> None:
        assert TrainConfig.from_flags({"load_model": "base.pth", "data_type": "dummy"}).data_type == "dummy"

    def test_all_problems_are_reported_at_once(self) -> None:
        message = problem(
            {
                "ctx_len": "0",
                "strategy": "deepspeed_stage_3",
                "dataload": "only",
                "micro_bsz": "4",
                "beta1": "2",
            }
        )
        lines = message.splitlines()
        assert lines[0] == "6 problems:"
        assert len(lines) == 7
        for flag in ("ctx_len", "strategy", "micro_bsz", "beta1", "load_model", "data_file"):
            assert any(f"--{flag}" in line for line in lines), flag

    def test_unreadable_values_and_contradictions_are_reported_together(self) -> None:
        flags = {
            "load_model": "b",
            "ctx_len": "x",
            "lr_init": "y",
            "quant_type": "z",
            "my_pile_stage": "1",
            "beta1": "3",
        }
        message = problem(flags)
        assert message.startswith("6 problems:")
        for flag in ("ctx_len", "lr_init", "quant_type", "my_pile_stage", "beta1", "data_file"):
            assert f"--{flag}" in message


class TestMask:
    def test_the_texts_of_se(self) -> None:
        made = config(loss_mask="se", mask_id='{"mask0": "\\n\\nUser:", "mask1": "Assistant:"}').mask
        assert (made.kind, made.begin, made.end) == ("se", "Assistant:", "\n\nUser:")

    @pytest.mark.parametrize(
        ("kind", "in_text", "all_of_it"),
        [("", False, False), ("none", False, True), ("pad", False, True), ("qa", True, False)],
    )
    def test_the_others_have_none(self, kind: str, in_text: bool, all_of_it: bool) -> None:
        made = config(**({"loss_mask": kind} if kind else {}), mask_id='{"mask0":"a","mask1":"b"}').mask
        assert made == LossMask(kind)
        assert (made.finds_in_text, made.takes_all) == (in_text, all_of_it)


class TestFlagsOfTheOriginal:
    @pytest.mark.parametrize("name", REFUSED)
    def test_accepted_at_the_default(self, name: str) -> None:
        assert config(**{name: UNSUPPORTED[name][0]}) == config()

    def test_a_default_may_be_written_differently(self) -> None:
        assert config(my_pile_shift="-1.0", my_pile_version="01") == config()

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused_by_name_otherwise(self, name: str) -> None:
        message = problem({**BASE, name: "7"})
        assert f"--{name} 7 is not supported" in message
        assert UNSUPPORTED[name][1] in message

    def test_what_has_no_effect_is_said(self) -> None:
        notes = " ".join(config(load_partial=1, orpo=1, layerwise_lr=0).notes())
        for flag in ("--load_partial 1", "--data_file data", "--layerwise_lr 0"):
            assert flag in notes
        assert config().notes() == []

    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ({"quant": 0, "quant_type": "fp4"}, "--quant_type fp4 has no effect without --quant 1"),
            ({"bptt_chunks": 1}, "--bptt_chunks 1 has no effect without --chunk_ctx"),
            ({"chunk_keep": "host"}, "--chunk_keep host has no effect without --chunk_ctx"),
            ({"memory_gib": 8}, "--memory_gib 8 has no effect without --grad_cp 2"),
            ({"orpo_alpha": 0.3}, "--orpo_alpha 0.3 has no effect without --orpo 1"),
            (
                {"rlhf_train_file": "a.save"},
                "--rlhf_train_file a.save has no effect without --orpo 1, --dpo 1 or --simpo 1",
            ),
            ({"dpo_beta": 0.01}, "--dpo_beta 0.01 has no effect without --dpo 1"),
            ({"orpo": 1, "data_file": "", "simpo_gamma": 2}, "--simpo_gamma 2 has no effect without --simpo 1"),
            (
                {"mask_id": '{"mask0":"a","mask1":"b"}'},
                '--mask_id {"mask0":"a","mask1":"b"} has no effect without --loss_mask se',
            ),
            ({"weight_decay_final": 0.1}, "--weight_decay_final 0.1 has no effect with --weight_decay 0"),
        ],
    )
    def test_a_flag_without_the_one_it_needs_is_said(self, flags: dict[str, object], expected: str) -> None:
        assert config(**flags).notes() == [expected]

    def test_a_flag_with_the_one_it_needs_is_not(self) -> None:
        assert config(grad_cp=2, memory_gib=8, quant_type="fp4").notes() == []


def test_a_wrong_flag_is_refused_without_loading_torch() -> None:
    program = (
        "import sys; sys.argv = ['train.py', '--ctx_len', '0']\n"
        "import runpy\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_gradients_of_chunks_are_not_freed_early() -> None:
    fused, chunks = {"train_type": "none", "fused_update": 1}, {"chunk_ctx": 64}
    assert "--fused_update 1 frees no gradient early where rows are cut" in " ".join(config(**fused, **chunks).notes())
    assert not config(**fused).notes()
