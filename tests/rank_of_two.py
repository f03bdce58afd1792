"""One of two processes that train together on a CPU: DeepSpeed's engine over gloo, in place of Lightning's loop.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python tests/rank_of_two.py FLAG VALUE …

The program itself trains on several GPUs only; data, weights of the batches, objective, optimizer and the engine's
configuration are the ones it uses there. Rank 0 writes `norms.json` and the states in fp32 to --proj_dir.
"""

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch

from src.adapters.method import method_of
from src.adapters.states import state_tensors
from src.checkpoint import open_checkpoint
from src.cli import given_train_flags
from src.config import TrainConfig
from src.loading import build_model
from src.training.engine import Hardware, deepspeed_config
from src.training.module import TrainingModule
from src.training.run import GRADIENT_CLIP, choose_recomputation, load_options
from src.training.work import make_schedule, prepare_work


def main() -> None:
    torch.set_num_threads(1)
    config = TrainConfig.from_flags(given_train_flags([*sys.argv[1:], "--devices", "2"]))
    method = method_of(config)
    base = open_checkpoint(config.load_model)
    shape = base.info.shape
    work = prepare_work(config, shape)
    schedule = make_schedule(config, work)
    hardware = Hardware(torch.device("cpu"), config.precision, config.strategy)
    model = build_model(base, shape, load_options(config, method, hardware, shape))
    choose_recomputation(model, work, config)
    module = TrainingModule(model, work.objective, config, method, work.dataset)
    optimizer = module.configure_optimizers()
    trained = [parameter for _, parameter in module.trained()]

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    engine_config = deepspeed_config(config.strategy, config, sum(parameter.numel() for parameter in trained))
    engine_config |= {"gradient_accumulation_steps": 1, "gradient_clipping": GRADIENT_CLIP}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, model_parameters=trained, config=engine_config)
    norms = []
    for step in range(work.batches_per_epoch * config.epoch_count):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step) * group["lr_scale"]
        loss = module.training_step(work.objective.stage(model, work.dataset[step]), step)
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    if engine.global_rank == 0:
        folder = Path(config.proj_dir)
        (folder / "norms.json").write_text(json.dumps(norms), encoding="utf-8")
        torch.save({name: state.float() for name, state in state_tensors(model).items()}, folder / "states.pt")


if __name__ == "__main__":
    main()
