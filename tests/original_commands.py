"""The commands of RWKV-LM-State-4bit's README, word for word, and how tests take them apart."""

import shlex

COMMON = (
    "--train_type states --data_type binidx --vocab_size 65536 --ctx_len 4096 --epoch_steps 1000 --epoch_count 1000 "
    "--epoch_begin 0 --epoch_save 1 --micro_bsz 1 --lr_init 1 --lr_final 0.01 --beta1 0.9 --beta2 0.999 "
    "--adam_eps 1e-8 --accelerator gpu --devices 1 --precision bf16 --grad_cp 1 --my_testing x060 "
    "--strategy deepspeed_stage_1 --quant 1 --quant_type nf4 --double_extra_dim 0"
)
SFT = (
    'python train.py --load_model base_model/rwkv-16.pth --load_partial 1 --wandb "RWKV-LM State-tuning" '
    "--proj_dir 1B6-State-Tuning --data_file dataset/dataset --n_layer 24 --n_embd 2048 --warmup_steps 10 " + COMMON
)
ORPO = (
    'python train.py --load_model base_model/Anarchy-RWKV-2B-68.pth --wandb "RWKV-LM State-4bit Orpo 2B" '
    "--proj_dir 2BStateOrpo12 --data_file default_text_document --n_layer 32 --n_embd 2048 "
    "--weight_decay 0.000 --warmup_steps 100 --orpo 1 --orpo_alpha 0.0006 --rlhf_max_corpus_len 1024 "
    "--orpo_debug 0 --orpo_type 0 --rlhf_train_file orpotest.save " + COMMON + " \\\n"
)
"""Ends in a stray backslash, as it does there."""
REJECTS = "python rlhf_generate_reject.py --load_model M --input_csv IN --output_csv OUT"
PAIRS = "python PrepareOrpoDataset.py --load_model M --input_csv IN --output_save OUT --target_pair_count 1000"


def words(command: str, script: str = "train.py") -> list[str]:
    """The command's words as a shell makes them, without `python SCRIPT`."""
    joined = command.replace("\\\n", " ")
    python, given_script, *arguments = shlex.split(joined)
    assert (python, given_script) == ("python", script)
    return arguments


def replaced(arguments: list[str], **values: str) -> list[str]:
    """The words with other values for flags that are there."""
    for flag, value in values.items():
        arguments[arguments.index(f"--{flag}") + 1] = value
    return arguments
