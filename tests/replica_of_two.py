"""train.py as one of two processes on a CPU that each have everything; Lightning starts the other.

    python tests/replica_of_two.py --proj_dir FOLDER FLAG VALUE …

The program itself has several processes on several GPUs only; told that a CPU will do, it does all the rest. At the end
each process writes a digest of every trained tensor, and which layers have their turn, to FOLDER/digest-RANK.json.
In the environment, STOP_AFTER=N has the first process get a Ctrl-C in step N, and CLIP=N is the largest norm.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed
from running import after_step, interrupt

import train
from src.config import TrainConfig
from src.device import global_rank
from src.errors import exit_on_user_error
from src.training import fitting, run
from src.training import module as training
from src.training.engine import REPLICAS, Hardware
from src.training.module import TrainingModule


def on_cpu(config: TrainConfig) -> Hardware:
    return Hardware(torch.device("cpu"), config.precision or "fp32", REPLICAS)


def end(module: TrainingModule) -> None:
    trained = module.turns.trained() if module.turns else {name: p.detach() for name, p in module.trained()}
    digests = {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in trained.items()
    }
    layers = list(module.turns.layers) if module.turns else []
    path = Path(module.config.proj_dir) / f"digest-{global_rank()}.json"
    path.write_text(json.dumps({"tensors": digests, "layers": layers}), encoding="utf-8")
    torch.distributed.barrier()  # the first process ends the other with itself


if __name__ == "__main__":
    torch.set_num_threads(1)
    TrainingModule.on_train_end = end  # Lightning's hook, in every process
    run.resolve_hardware = on_cpu
    fitting.GRADIENT_CLIP = training.GRADIENT_CLIP = float(os.environ.get("CLIP", fitting.GRADIENT_CLIP))
    stop = int(os.environ.get("STOP_AFTER", "0"))
    with after_step(stop, interrupt) if stop and global_rank() == 0 else contextlib.nullcontext():
        try:
            exit_on_user_error(train.main)
        except SystemExit as ended:
            code = ended.code
    sys.stderr.flush()
    os._exit(int(code or 0))  # see rank_of_two.py
