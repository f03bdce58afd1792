"""Seconds per step and memory of whole training steps on random weights of the true shapes.

    python tests/bench/bench_step.py                       every row
    python tests/bench/bench_step.py --rows sft-7b-1024,orpo-14b --steps 8
    python tests/bench/bench_step.py --rows sft-7b-1024 --devices 2
    python tests/bench/bench_step.py --rows adapters --strategy auto,deepspeed_stage_1 --json figures.json
    python tests/bench/bench_step.py --rows sft-1.6b-1024 --steps 200 --documents demo.jsonl --dataload pack
    python tests/bench/bench_step.py --rows sft-7b-1024,lora-7b --apart --cuda_graph 0

Each row runs in a process of its own, so that its memory is its own; while one has the GPU, the next imports. With
--apart it does not: for steps that are not recorded, which wait for the host. Time is the median of the steps
after the first two; tokens/s are those of the second half of the steps, without padding, all GPUs together;
"peak" is torch's allocator, "used" what the device reports at the end, CUDA context included; "load s" is how long the
model took to be made: what PiSSA's exceeds LoRA's by is its start. A name in --rows may be that of a set of rows
(SETS); each row runs with every --strategy. --json is written anew after every row. Flags of train.py go at the end of
the command. Nothing is printed when gradients disagree with the plain fp32 path on a small model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from src.model.shape import ModelShape

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
sys.path.insert(0, str(REPOSITORY / "tests"))

SIZES = {"0.1b": (12, 768), "1.6b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096), "14b": (61, 4096)}
"""Of RWKV-6: layers, channels."""
RWKV7_SIZES = {
    "1.5b": (24, 2048, 96, 96, 64, 256),
    "2.9b": (32, 2560, 96, 96, 64, 320),
    "7.2b": (32, 4096, 128, 128, 96, 480),
    "13.3b": (61, 4096, 192, 192, 128, 384),
}
"""Layers, channels, and the widths of the maps to decay, rate, value residual and gate, as published."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what is trained on what."""

    size: str  # of SIZES, or of RWKV7_SIZES
    ctx_len: int
    grad_cp: int = 1
    preference: str = ""
    flags: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        kind = self.preference.upper() or "SFT"
        length = "512 + 512 / 512" if self.preference else f"ctx {self.ctx_len}"
        return " ".join([f"{kind} {self.size.upper()} {length}, grad_cp {self.grad_cp}", *self.flags])

    def shape(self) -> ModelShape:
        """Of a model of this size."""
        from src.model.rwkv6 import RWKV6Shape
        from src.model.rwkv7 import RWKV7Shape

        if self.size in SIZES:
            layers, channels = SIZES[self.size]
            sizes = {"n_layer": layers, "n_embd": channels, "vocab_size": 65536}
            return RWKV6Shape.from_sizes(**sizes, double_extra_dim=channels == 4096)
        layers, channels, *widths = RWKV7_SIZES[self.size]
        return RWKV7Shape(layers, channels, channels, 4 * channels, 65536, channels // 64, 64, *widths)


DENSE, EIGHT_BITS = ("--quant", "0"), ("--optim", "adamw8bit")
WHOLE = ("--train_type", "none", "--quant", "0")
IN_16_BITS = ("--weights", "bf16", "--fused_update", "1")
ROWS = {
    "sft-0.1b-128": Row("0.1b", 128),
    "sft-1.6b-1024": Row("1.6b", 1024),
    "sft-3b-1024": Row("3b", 1024),
    "sft-7b-1024": Row("7b", 1024),
    "sft-7b-4096": Row("7b", 4096),
    "sft-7b-4096-keep": Row("7b", 4096, grad_cp=0),
    "sft-7b-4096-fit": Row("7b", 4096, grad_cp=2, flags=("--memory_gib", "22.5")),
    "sft-14b-1024": Row("14b", 1024),
    "orpo-1.6b": Row("1.6b", 1024, preference="orpo"),
    "orpo-7b": Row("7b", 1024, preference="orpo"),
    "orpo-14b": Row("14b", 1024, preference="orpo"),
    "dpo-7b": Row("7b", 1024, preference="dpo"),
    "simpo-7b": Row("7b", 1024, preference="simpo"),
    "lora-1.6b": Row("1.6b", 1024, flags=("--peft", "lora", "--quant", "0")),
    "pissa-1.6b": Row("1.6b", 1024, flags=("--peft", "pissa", "--quant", "0")),
    "lora-3b": Row("3b", 1024, flags=("--peft", "lora", "--quant", "0")),
    "qlora-1.6b": Row("1.6b", 1024, flags=("--peft", "lora")),
    "qlora-3b": Row("3b", 1024, flags=("--peft", "lora")),
    "lora-7b": Row("7b", 1024, flags=("--peft", "lora", "--quant", "0")),
    "qlora-7b": Row("7b", 1024, flags=("--peft", "lora")),
    "qlora-14b": Row("14b", 1024, flags=("--peft", "lora")),
    "bone-7b": Row("7b", 1024, flags=("--peft", "bone", "--quant", "0")),
    "qbone-7b": Row("7b", 1024, flags=("--peft", "bone")),
    "qbat-7b": Row("7b", 1024, flags=("--peft", "bat")),
    "pissa-7b": Row("7b", 1024, flags=("--peft", "pissa", *DENSE)),
    "lora-7b-8rows": Row("7b", 1024, flags=("--peft", "lora", *DENSE, *EIGHT_BITS, "--micro_bsz", "8")),
    "qlora-7b-8rows": Row("7b", 1024, flags=("--peft", "lora", "--micro_bsz", "8")),
    "lora-7b-8bit": Row("7b", 1024, flags=("--peft", "lora", *DENSE, *EIGHT_BITS)),
    "qlora-7b-8bit": Row("7b", 1024, flags=("--peft", "lora", *EIGHT_BITS)),
    "qlora-14b-8bit": Row("14b", 1024, flags=("--peft", "lora", *EIGHT_BITS)),
    "bone-7b-8bit": Row("7b", 1024, flags=("--peft", "bone", *DENSE, *EIGHT_BITS)),
    "qbone-7b-8bit": Row("7b", 1024, flags=("--peft", "bone", *EIGHT_BITS)),
    "qbat-7b-8bit": Row("7b", 1024, flags=("--peft", "bat", *EIGHT_BITS)),
    **{
        f"sft-{size}-{kind}": Row(size, 1024, flags=("--quant", "1", "--quant_type", kind))
        for kind in ("int8", "fp4")
        for size in ("1.6b", "3b", "7b", "14b")
    },
    "full-1.6b": Row("1.6b", 1024, flags=WHOLE),
    "full16-1.6b": Row("1.6b", 1024, flags=(*WHOLE, *IN_16_BITS, "--optim", "adamw8bit")),
    "full16-3b": Row("3b", 1024, flags=(*WHOLE, *IN_16_BITS, "--optim", "adamw8bit")),
    "full16-7b": Row("7b", 1024, flags=(*WHOLE, *IN_16_BITS, "--optim", "paged_adamw8bit")),
    "full-3b-bf16": Row("3b", 1024, flags=(*WHOLE, "--weights", "bf16")),
    "full-7b-bf16": Row("7b", 1024, flags=(*WHOLE, "--weights", "bf16", "--optim", "adamw8bit")),
    "lisa-7b": Row("7b", 1024, flags=("--peft", "lisa")),
    "lisa-7b-8bit": Row("7b", 1024, flags=("--peft", "lisa", "--optim", "adamw8bit")),
    "lisa-7b-layers": Row("7b", 1024, flags=("--peft", "lisa", "--train_parts", "[]")),
    "lisa-7b-layers-8bit": Row("7b", 1024, flags=("--peft", "lisa", "--train_parts", "[]", "--optim", "adamw8bit")),
    "sft-1.5b-1024": Row("1.5b", 1024),
    "sft-2.9b-1024": Row("2.9b", 1024),
    "sft-7.2b-1024": Row("7.2b", 1024),
    "sft-7.2b-4096": Row("7.2b", 4096),
    "sft-7.2b-4096-fit": Row("7.2b", 4096, grad_cp=2, flags=("--memory_gib", "22.5")),
    "sft-13.3b-1024": Row("13.3b", 1024),
    "qlora-7.2b": Row("7.2b", 1024, flags=("--peft", "lora")),
    "lora-1.5b": Row("1.5b", 1024, flags=("--peft", "lora", "--quant", "0")),
    "orpo-7.2b": Row("7.2b", 1024, preference="orpo"),
    "orpo-13.3b": Row("13.3b", 1024, preference="orpo"),
    "full16-1.5b": Row("1.5b", 1024, flags=(*WHOLE, *IN_16_BITS, "--optim", "adamw8bit")),
}


SETS = {
    "adapters": (
        *("lora-1.6b", "pissa-1.6b", "lora-3b", "qlora-3b", "lora-7b", "pissa-7b", "qlora-7b"),
        *("bone-7b", "qbone-7b", "qbat-7b", "qlora-14b", "lora-7b-8rows", "qlora-7b-8rows"),
    ),
    "adapters-8bit": tuple(name for name, row in ROWS.items() if "-8bit" in name and "--peft" in row.flags[:1]),
    "packed-states": tuple(name for name in ROWS if name.endswith(("-int8", "-fp4"))),
    "pairs": ("orpo-7b", "dpo-7b", "simpo-7b"),
}
"""Rows that are read together; in ten minutes an H100 does any one set."""


def names_of(rows: str) -> list[str]:
    """Names of rows, those of sets among them replaced, each once, in order.

    Raises:
        argparse.ArgumentTypeError: one is neither.
    """
    names = [name for given in rows.split(",") for name in SETS.get(given, (given,))]
    for name in names:
        if name not in ROWS:
            raise argparse.ArgumentTypeError(f"{name} is no row and no set; there are {', '.join([*SETS, *ROWS])}")
    return list(dict.fromkeys(names))


def flags_of(row: Row, folder: Path, steps: int, strategy: str, extra: list[str], documents: str = "") -> list[str]:
    """A command line of train.py, for which data are made in `folder`; `extra` flags take the place of a row's own."""
    flags = [
        "--load_model", "random", "--proj_dir", str(folder), "--ctx_len", str(row.ctx_len),
        "--grad_cp", str(row.grad_cp), "--epoch_steps", str(steps), "--epoch_count", "1", "--epoch_save", "0",
        "--strategy", strategy, "--plot", "0",
        *([] if "--quant" in row.flags else ["--quant", "1", "--quant_type", "nf4"]), *row.flags,
        *([] if row.preference else ["--dataload", "pad"]),
    ]  # fmt: skip
    pairs = zip(flags[::2], flags[1::2], strict=True)
    flags = [word for flag, value in pairs if flag not in extra for word in (flag, value)] + extra
    if documents:
        return [*flags, "--data_file", documents, "--data_type", "jsonl"]
    if row.preference:
        return flags + _preference_flags(folder, row.preference)
    rows = int(flags[flags.index("--micro_bsz") + 1]) if "--micro_bsz" in flags else 1
    return flags + _text_flags(folder, row.ctx_len, steps * rows)


def run_row(row: Row, steps: int, strategy: str, extra: list[str], documents: str = "") -> dict[str, float]:
    """Trains `steps` steps in this process and returns the figures; `documents`: JSONL instead of random text."""
    from src.adapters.method import method_of
    from src.cli import given_train_flags
    from src.config import TrainConfig
    from src.loading import build_model
    from src.training.engine import apply_hardware, resolve_hardware
    from src.training.fitting import fit
    from src.training.module import TrainingModule
    from src.training.references import Reference
    from src.training.run import choose_recomputation, load_options, turns_of
    from src.training.work import make_schedule, prepare_work

    shape = row.shape()
    folder = Path(tempfile.mkdtemp())
    config = TrainConfig.from_flags(given_train_flags(flags_of(row, folder, steps, strategy, extra, documents)))
    hardware = resolve_hardware(config)
    method = method_of(config)
    apply_hardware(hardware, config, small_messages=method.small)
    work = prepare_work(config, shape)
    tensors = RandomTensors(shape, hardware.device)
    begin = time.perf_counter()
    model = build_model(tensors, shape, load_options(config, method, hardware, shape))
    load_seconds = time.perf_counter() - begin
    choose_recomputation(model, work, config, method)
    work.prepare(model, Reference(config, None, folder))
    turns = turns_of(method, model, OnHost(tensors), config, folder)
    module = TrainingModule(model, work.objective, config, method, work.dataset, turns=turns)
    _, monitor, _ = fit(module, work, make_schedule(config, work), hardware, config, folder)
    return {
        "seconds": statistics.median(monitor.step_seconds[2:]),
        "peak_gib": monitor.peak_bytes / 2**30,
        "used_gib": monitor.used_bytes / 2**30,
        "tokens_per_s": _tokens_per_second(folder / "metrics.jsonl"),
        "loss": monitor.losses[-1],
        "load_seconds": load_seconds,
    }


class RandomTensors(Mapping):  # type: ignore[type-arg]
    """A checkpoint of random weights, each tensor made on the device when it is asked for."""

    def __init__(self, shape: object, device: object) -> None:
        import torch

        self._shapes = shape.parameter_shapes()  # type: ignore[arg-type]
        self._device = device
        self._generator = torch.Generator(device).manual_seed(1)  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> object:
        import torch

        size = self._shapes[name]
        if name.endswith(("ln_x.weight", "ln0.weight", "ln1.weight", "ln2.weight", "ln_out.weight")):
            return torch.ones(size, dtype=torch.bfloat16)
        if name == "emb.weight":  # stays on the host; made in parts, because it is large and counts as peak
            rows = torch.empty(size, dtype=torch.bfloat16)
            for part in rows.split(8192):
                part.copy_(torch.randn(part.shape, device=self._device, generator=self._generator) * 0.1)
            return rows
        values = torch.randn(size, device=self._device, dtype=torch.bfloat16, generator=self._generator)
        if name.endswith("time_decay"):
            return values - 4
        if name.endswith((".k_k", ".k_a")):
            return values * 0.1 + 1
        return values * (0.02 if len(size) > 1 else 0.1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class OnHost(Mapping):  # type: ignore[type-arg]
    """The same on the host, as a file is: what is read of it after the start counts as no GPU's memory."""

    def __init__(self, tensors: RandomTensors) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> object:
        return self._tensors[name].cpu()  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _tokens_per_second(metrics: Path) -> float:
    if not metrics.exists():  # written by the first rank only
        return 0.0
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    settled = lines[len(lines) // 2 :]
    return sum(line["tokens"] for line in settled) / sum(line["seconds"] for line in settled)


def _text_flags(folder: Path, ctx_len: int, documents: int) -> list[str]:
    import numpy as np
    from binidx_files import write_binidx

    rng = np.random.default_rng(0)
    write_binidx(str(folder / "data"), [rng.integers(1, 65529, ctx_len + 1) for _ in range(documents)], np.int32)
    return ["--data_file", str(folder / "data")]


def _preference_flags(folder: Path, loss: str) -> list[str]:
    import numpy as np

    from src.data.pair_file import save_pairs
    from src.data.preferences import PreferencePair

    rng = np.random.default_rng(0)
    pairs = [PreferencePair(*(rng.integers(1, 65529, 512).tolist() for _ in range(3))) for _ in range(16)]
    save_pairs(folder / "pairs.save", pairs)
    return [f"--{loss}", "1", "--rlhf_train_file", str(folder / "pairs.save"), "--rlhf_max_corpus_len", "512"]


def gradients_agree(sizes: Collection[str]) -> bool:
    """Whether small bf16 models' state gradients on the GPU follow the fp32 chunked form; of these sizes' kinds."""
    from src.model.rwkv6 import RWKV6Shape
    from src.model.rwkv7 import RWKV7Shape

    architectures = {RWKV6Shape if size in SIZES else RWKV7Shape for size in sizes}
    return all(_agree(kind.from_sizes(n_layer=2, n_embd=256, vocab_size=1024)) for kind in architectures)


def _agree(shape: ModelShape) -> bool:
    import numpy as np
    import torch

    from src.data.batches import packed_batch
    from src.loading import LoadOptions, build_model
    from src.model.recompute import Recompute
    from src.training.objectives import SFTObjective, outcome_of

    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    tensors = dict(RandomTensors(shape, torch.device("cuda")))
    documents = [np.asarray(torch.randint(1, 1024, (n,), generator=generator)) for n in (70, 33, 129)]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(tensors, shape, LoadOptions(device=device, compute_dtype=dtype))
        model.set_recomputation([Recompute.ALL] * shape.n_layer)
        objective = SFTObjective()
        staged = objective.stage(model, packed_batch(documents, [None] * 3, [0, 1, 2]))
        outcome_of(objective, model, staged).loss.backward()
        gradients.append(torch.cat([block.att.time_state.grad.flatten() for block in model.blocks]))
    exact, fast = gradients
    error = ((fast - exact).norm() / exact.norm()).item()
    print(f"{shape.family}: state gradients, bf16 against fp32: relative error {error:.2e}", file=sys.stderr)
    return error < 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ",".join(name for name in ROWS if name != "sft-0.1b-128")
    parser.add_argument("--rows", type=names_of, default=everything, help="names of rows or sets, with commas")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--strategy", default="deepspeed_stage_1", help="one or several, with commas")
    parser.add_argument("--documents", default="", help="a JSONL file to train on instead of random text")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--apart", action="store_true", help="start no row before the one before has ended")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--waits", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="only compare gradients")
    options, extra = parser.parse_known_args()
    if options.one:
        from src.device import global_rank

        if options.waits and "LOCAL_RANK" not in os.environ:  # other ranks are started when it is their turn
            wait_for_turn()
        result = run_row(ROWS[options.one], options.steps, options.strategy, extra, options.documents)
        if global_rank() == 0:
            print("RESULT " + json.dumps(result))
        return

    if options.check:
        agree = gradients_agree({ROWS[name].size for name in options.rows})
        sys.exit(0 if agree else "the fast path's gradients are wrong")
    # In a process of its own: what it leaves on the GPU must not count as a row's memory.
    check = [sys.executable, __file__, "--check", "--rows", ",".join(options.rows)]
    if subprocess.run(check, cwd=REPOSITORY, check=False).returncode:
        sys.exit("nothing is timed")
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.strip()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {commit or 'unknown'}")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for strategy in options.strategy.split(","):
        print(f"\n{strategy}, nf4, bf16, median of {options.steps - 2} steps after 2\n", flush=True)
        print("| work | s/step | tokens/s | peak GiB | used GiB | load s |\n|---|---|---|---|---|---|", flush=True)
        tail = ["--steps", str(options.steps), "--strategy", strategy, "--documents", options.documents, *extra]
        commands = [[sys.executable, __file__, "--one", name, *tail] for name in options.rows]
        for name, (out, err) in zip(options.rows, in_turn(commands, apart=options.apart), strict=True):
            lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{name} failed:\n{out[-2000:]}\n{err[-3000:]}", file=sys.stderr)
                continue
            row = results.setdefault(strategy, {})[name] = json.loads(lines[0][7:])
            print(name, row, file=sys.stderr, flush=True)
            print(_line(" ".join([ROWS[name].title, *extra]), row), flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps(results))


def in_turn(commands: Sequence[Sequence[str]], *, apart: bool) -> Iterator[tuple[str, str]]:
    """Standard output and error of each command of this script, which has the GPU to itself.

    Args:
        commands: with `--one`.
        apart: not to start any before the one before it has ended; else one imports meanwhile, and waits.
    """
    ahead: list[subprocess.Popen[str]] = []
    try:
        for number in range(len(commands)):
            for command in commands[number + len(ahead) : number + (1 if apart else 2)]:
                pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
                ahead.append(subprocess.Popen([*command, "--waits"], cwd=REPOSITORY, text=True, **pipes))  # type: ignore[call-overload]
            yield ahead[0].communicate("\n")
            del ahead[0]
    finally:
        for process in ahead:
            with process:  # which closes its pipes and waits
                process.kill()


def wait_for_turn() -> None:
    """Imports what a row needs but what looks at GPUs, then waits for a line."""
    import src.training.fitting
    import src.training.run  # noqa: F401

    if not sys.stdin.readline():
        sys.exit("nobody waits for this row any more")


def _line(title: str, row: Mapping[str, float]) -> str:
    memory = f"{row['peak_gib']:.2f} | {row['used_gib']:.2f}"
    return f"| {title} | {row['seconds']:.4f} | {row['tokens_per_s']:,.0f} | {memory} | {row['load_seconds']:.1f} |"


if __name__ == "__main__":
    main()
