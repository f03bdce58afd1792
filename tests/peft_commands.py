"""The training commands of RWKV-PEFT's scripts and README, as their flags stand there; P stands for a path."""

_SHARED = (
    "python train.py --load_model P --proj_dir P --data_file P --data_type binidx --vocab_size 65536 --ctx_len 512 "
    "--epoch_steps 1000 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --micro_bsz 8 --n_layer 32 --n_embd 2560 "
    "--pre_ffn 0 --head_qk 0 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 "
    '--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 --my_testing "x060" '
    "--dataload pad --loss_mask pad"
)


def _changed(command: str, **values: str) -> str:
    """The command with other values for some of its flags."""
    words = command.split(" ")
    for name, value in values.items():
        words[words.index(f"--{name}") + 1] = value
    return " ".join(words)


LORA = f"""{_SHARED} --peft lora --lora_config '{{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}}'"""
PISSA = f"""{_SHARED} --peft pissa --pissa_config '{{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}}'"""
BONE_SEED = f"""{_SHARED} --peft bone --bone_config '{{"bone_load":"","bone_r":64}}'"""
BONE_2024_12 = (
    _changed(_SHARED, ctx_len="1024", epoch_steps="200")
    + """ --peft bone --bone_config '{"bone_mode":"bone","bone_load":"","bone_r":64}'"""
    + " --wandb peft-loss --data_shuffle 0"
)
STATES = (
    _changed(
        _SHARED, micro_bsz="2", epoch_steps="800", epoch_count="10", lr_init="1", lr_final="1e-2", warmup_steps="10",
        n_layer="24", n_embd="2048",
    )
    + ' --train_type "state" --fla'
)  # fmt: skip
PRETRAIN = (
    _changed(_SHARED, data_type="sft", lr_init="3e-4", lr_final="1e-4").replace("--load_model P ", "")
    + ' --sft_field query response --sft_split "train[:1000]"'
)

INFCTX = f"{_changed(_SHARED, ctx_len='2048')} --train_type infctx --chunk_ctx 512"

COMMANDS = {
    "lora": LORA,
    "lora, packed": f"{LORA} --quant nf4",
    "pissa": PISSA,
    "bone of the seed": BONE_SEED,
    "bone of December 2024": BONE_2024_12,
    "states": STATES,
    "states, packed": f"{STATES} --quant int8",
    "pretraining": PRETRAIN,
    "infctx": INFCTX,
    "infctx, lora": INFCTX + LORA.removeprefix(_SHARED),
    "parts in brackets": f'{LORA} --train_parts ["time", "ln"]',
    "answers": _changed(STATES, loss_mask="qa"),
    "no parts": f"{LORA} --train_parts []",
}
