"""What people type out of other programs' habits, and the flags that do it here."""

from __future__ import annotations

import re
from collections.abc import Collection

_MEANT: dict[str, str] = {
    "lr learning_rate max_lr rate": "--lr_init",
    "min_lr lr_end end_lr": "--lr_final",
    "epochs num_epochs epoch n_epochs max_epochs num_train_epochs": "--epoch_count",
    "batch_size bsz batch bs micro_batch_size per_device_train_batch_size train_batch_size": "--micro_bsz | --batch",
    "gradient_accumulation_steps accumulate_grad_steps grad_accum accumulation_steps": "--accumulate_grad_batches",
    "max_steps steps num_steps total_steps train_steps": "--epoch_steps N --epoch_count 1",
    "output_dir output out out_dir save_dir save_path outdir": "--proj_dir | --output_csv | --output_save",
    "output_file out_file": "--output_csv | --output_save | --proj_dir",
    "model base_model model_path model_name model_name_or_path pretrained checkpoint ckpt base": "--load_model",
    "state state_file init_state": "--load_state",
    "dataset data train_file train_data data_path dataset_path dataset_name training_file": "--data_file | --input_csv",
    "input input_file csv": "--input_csv | --data_file",
    "eval_file val_data validation_file eval_data test_file val_dataset eval_dataset valid_file": "--val_file",
    "seed": "--random_seed",
    "resume_from_checkpoint resume_from continue": "--resume 1 | --load_state FILE --epoch_begin N",
    "load_in_4bit": "--quant 1 --quant_type nf4",
    "load_in_8bit": "--quant 1 --quant_type int8",
    "quantize quantization quantise": "--quant 1",
    "gradient_checkpointing grad_checkpointing activation_checkpointing": "--grad_cp 1",
    "bf16": "--precision bf16",
    "fp16 half amp": "--precision fp16",
    "fp32": "--precision fp32",
    "tf32": "--precision tf32",
    "dtype torch_dtype": "--precision",
    "rank lora_rank r": "--lora_r | train.py tunes states, which have no rank",
    "alpha": "--lora_alpha | --orpo_alpha",
    "max_length max_len max_seq_len max_seq_length": "--ctx_len | --max_len | --max_tokens",
    "seq_len sequence_length context_length block_size context cutoff_len": "--ctx_len | --max_len | --max_tokens",
    "chunk_size chunk_len chunk_length chunk_tokens chunk": "--chunk_ctx",
    "bptt tbptt truncated_bptt bptt_steps": "--bptt_chunks",
    "max_new_tokens": "--max_tokens",
    "temp": "--temperature",
    "warmup num_warmup_steps warmup_iters": "--warmup_steps",
    "warmup_ratio": "--warmup_steps, a number of optimizer steps",
    "lr_scheduler lr_scheduler_type scheduler": "--lr_schedule",
    "wd l2": "--weight_decay",
    "adam_beta1": "--beta1",
    "adam_beta2": "--beta2",
    "eps epsilon adam_epsilon": "--adam_eps",
    "max_grad_norm grad_clip gradient_clip_val clip": "gradients are always clipped at norm 1",
    "optimizer": "--optim",
    "gpus num_gpus n_gpu ngpu world_size": "--devices",
    "nodes nnodes": "--num_nodes",
    "gpu cuda device": "--accelerator",
    "cpu": "--accelerator cpu",
    "save_steps save_interval save_every save_freq": "--epoch_save, a number of epochs",
    "eval_steps eval_interval evaluation_strategy": "--val_steps",
    "early_stopping early_stopping_patience patience": "--early_stop",
    "logging_steps log_interval": "every step is in metrics.jsonl",
    "report_to wandb_project": "--wandb PROJECT",
    "deepspeed": "--strategy deepspeed_stage_1",
    "zero_stage": "--strategy deepspeed_stage_1 or deepspeed_stage_2",
    "num_workers dataloader_num_workers": "batches are made while the GPU computes: there is nothing to set",
    "packing pack": "--dataload pack",
    "shuffle": "--data_shuffle",
    "beta": "--dpo_beta",
    "field fields": "--sft_field",
    "mask_prompt completion_only_loss assistant_only_loss train_on_responses_only": "--loss_mask qa",
    "train_on_inputs train_on_prompt": "--loss_mask pad",
    "dry_run show_samples inspect": "--preview N",
    "split": "--sft_split",
    "force": "--overwrite 1",
    "num_pairs pairs count": "--target_pair_count",
    "version": "this program has no version; see README.md",
}
"""Names, and what to say: alternatives in order, of which the first whose flags all exist is said, or a sentence."""

_SAID = {name: meant.split(" | ") for names, meant in _MEANT.items() for name in names.split()}


def meant_by(name: str, flags: Collection[str]) -> str:
    """What a name of another program's flag is here; "" for a name that is in no table.

    Args:
        name: as it was typed, dashes included.
        flags: those of this script, dashes included.
    """
    said = _SAID.get(name.lstrip("-").replace("-", "_").lower(), [])
    return next((text for text in said if set(re.findall(r"--\w+", text)) <= set(flags)), "")
