"""One of the processes that train together on a CPU: DeepSpeed's engine over gloo, in place of Lightning's loop.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python tests/rank_of_two.py FLAG VALUE …

The program itself trains on several GPUs only; data, weights of the batches, objective, optimizer and the engine's
configuration are the ones it uses there. Rank 0 writes `norms.json`, the states in fp32, the result's file, what was
measured on held-out data of --val_file after every step and a run file to --proj_dir; --resume 1 goes on from that.
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
from src.training.folder import Places
from src.training.module import TrainingModule
from src.training.optimizers import GRADIENT_CLIP, can_be_resumed
from src.training.resume import OptimizerMoments, RunWriter, SavedRun, TrainedTensors, saved_run
from src.training.run import choose_recomputation, load_options
from src.training.sharded import computable, is_sharded, readable
from src.training.work import epochs_of, make_schedule, prepare_work


def main() -> None:
    torch.set_num_threads(1)
    torch.Tensor.record_stream = lambda *_: None  # a CPU has no streams; stage 3 asks all the same
    config = TrainConfig.from_flags(given_train_flags([*sys.argv[1:], "--devices", os.environ["WORLD_SIZE"]]))
    method = method_of(config)
    base = open_checkpoint(config.load_model)
    shape = base.info.shape
    work = prepare_work(config, shape)
    schedule = make_schedule(config, work)
    hardware = Hardware(torch.device("cpu"), config.precision, config.strategy)
    model = build_model(base, shape, load_options(config, method, hardware, shape))
    choose_recomputation(model, work, config, method)
    module = TrainingModule(model, work.objective, config, method, work.dataset)
    folder, accumulate = Path(config.proj_dir), config.accumulate_grad_batches
    saved = saved_run(folder) if config.resume else None
    if saved:
        TrainedTensors(module.trained()).restore(saved.parts["trained"])
    optimizer = module.configure_optimizers()
    trained = [parameter for _, parameter in module.trained()]

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    elements, flat = sum(parameter.numel() for parameter in trained), module.updates_flat
    engine_config = deepspeed_config(config.strategy, config, elements, updates_flat=flat)
    clip = 0.0 if module.updates_clip else GRADIENT_CLIP
    engine_config |= {"gradient_accumulation_steps": accumulate, "gradient_clipping": clip}
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    module.forward = module.training_step
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, model_parameters=trained, config=engine_config)
    module.on_fit_start()
    assert any(map(is_sharded, trained)) == config.strategy.startswith("deepspeed_stage_3")
    moments = OptimizerMoments(module.trained(), engine.optimizer, engine=True, joined=module.joined)
    if saved:
        moments.restore(saved.parts["optimizer"])
    norms, measured = [], []
    begin = saved.steps * accumulate if saved else 0
    for batch in range(begin, work.batches_per_epoch * epochs_of(config)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(batch // accumulate) * group["lr_scale"]
        loss = engine(module.objective.stage(model, work.dataset[batch]), batch)
        engine.backward(loss / accumulate, scale_wrt_gas=False)
        engine.step()
        if (batch + 1) % accumulate == 0:
            norms.append(module.sight.read()[1] if module.sight else float(engine.get_global_grad_norm()))
            if work.measure is not None:
                with computable(model):
                    measured.append(work.measure(model).score)
    assert {name: parameter.dtype for name, parameter in module.named_parameters()} == dtypes
    parts = {"trained": TrainedTensors(module.trained()).state()}
    if can_be_resumed(config, config.strategy):
        parts["optimizer"] = moments.state()
    with readable(model):
        if engine.global_rank == 0:
            method.save(model, folder / "rwkv-final.pth")
            torch.save({name: state.float() for name, state in state_tensors(model).items()}, folder / "states.pt")
    if engine.global_rank == 0:
        steps = work.batches_per_epoch * epochs_of(config) // accumulate
        writer = RunWriter(Places(folder, "run", print))
        writer.write(SavedRun(folder, "run", steps, {}, {}, {}, parts, None))
        writer.wait()
        for name, values in {"norms": norms, "measured": measured}.items():
            (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    # Threads of gloo and of its store that still run while an interpreter takes itself down can abort the process.
    sys.stderr.flush()
    os._exit(0)
