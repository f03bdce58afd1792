"""Times the WKV6 operator: this project's CUDA kernel, flash-linear-attention if installed, and both torch forms.

    python tests/bench/bench_wkv6.py [--shapes B,T,H ...] [--skip fla torch loop] [--span_tokens N ...]

Prints a markdown table, or, when a quick comparison with float64 fails, the errors and nothing else (exit code
1).

Per operator: milliseconds of forward, and of forward + backward with all gradients but u's (frozen in state
tuning). "GPU" is the sum of kernel times from the profiler; "wall" the median over calls from launch to finish,
host included, caches flushed between calls. FLA takes a log decay in float32, ours the raw one: "FLA" is its
operator alone, "FLA + decay" adds that transformation in both directions (the like-for-like figure), "FLA safe"
also bounds log decay at -20. "torch form" is the chunked form, "loop" the token by token one (timed once).
"Floor" is 6 + 10 times the bytes of y (each tensor once, a bf16 checkpoint every 64 tokens) at 4.3 TB/s.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.ops.wkv6 import wkv6
from src.ops.wkv6_cuda import wkv6_cuda

SHAPES = ("1,1024,32", "1,1024,64", "2,1024,64", "1,4096,32", "1,4096,64", "8,1024,64", "1,16384,64")
SIZE = 64
FLOOR_BYTES_PER_SECOND = 4.3e12
LIMITS = {"y": 3.5e-3, "r": 3.5e-3, "k": 3.5e-3, "v": 3.5e-3, "w_raw": 4e-3, "state": 2.5e-3}

Inputs = dict[str, Tensor]
Operator = Callable[[Inputs], Tensor]


def draw(batch: int, tokens: int, heads: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, tokens, heads, SIZE)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    inputs = {name: (0.5 * normal(*shape)).bfloat16() for name in ("r", "k", "v")}
    inputs["w_raw"] = (1.5 * normal(*shape) - 3).bfloat16()
    inputs["state"] = 0.5 * normal(heads, SIZE, SIZE)
    for tensor in inputs.values():
        tensor.requires_grad_()
    inputs["u"] = (0.5 * normal(heads, SIZE)).bfloat16()
    inputs["dy"] = normal(*shape).bfloat16()
    return inputs


def ours(span_tokens: int) -> Operator:
    def run(x: Inputs) -> Tensor:
        return wkv6_cuda(x["r"], x["k"], x["v"], x["w_raw"], x["u"], x["state"], span_tokens=span_tokens)[0]

    return run


def in_torch(backend: str) -> Operator:
    def run(x: Inputs) -> Tensor:
        return wkv6(x["r"], x["k"], x["v"], x["w_raw"], x["u"], x["state"], backend=backend)[0]

    return run


def fla_operators() -> dict[str, Operator]:
    try:
        from fla.ops.rwkv6 import chunk_rwkv6
    except ImportError as error:
        print(f"FLA is left out: {error}")
        return {}

    def call(x: Inputs, log_decay: Tensor) -> Tensor:
        state = x["state"].transpose(-1, -2).unsqueeze(0).expand(x["r"].shape[0], -1, -1, -1)
        y, _ = chunk_rwkv6(x["r"], x["k"], x["v"], log_decay, x["u"], scale=1.0, initial_state=state)
        return y

    def alone(x: Inputs) -> Tensor:
        if "log_decay" not in x:
            x["log_decay"] = (-torch.exp(x["w_raw"].detach().float())).requires_grad_()
        return call(x, x["log_decay"])

    return {
        "FLA": alone,
        "FLA + decay": lambda x: call(x, -torch.exp(x["w_raw"].float())),
        "FLA safe": lambda x: call(x, (-torch.exp(x["w_raw"].float())).clamp(min=-20)),
    }


def wanted(x: Inputs) -> list[Tensor]:
    decay = x.get("log_decay")
    return [x["r"], x["k"], x["v"], x["w_raw"] if decay is None else decay, x["state"]]


def forward_only(operator: Operator, x: Inputs) -> None:
    operator(x)


def forward_and_backward(operator: Operator, x: Inputs) -> None:
    y = operator(x)
    torch.autograd.grad(y, wanted(x), x["dy"])


def kernel_milliseconds(run: Callable[[], None], repeats: int) -> float:
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / repeats / 1000


def wall_milliseconds(run: Callable[[], None], repeats: int = 20) -> float:
    flushed = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        flushed.zero_()
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def errors_against_float64() -> dict[str, float]:
    x = draw(1, 300, 4)
    names = ["r", "k", "v", "w_raw", "state"]
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    y, _ = wkv6(*(exact[name] for name in ("r", "k", "v", "w_raw", "u", "state")), backend="reference")
    truth = [y, *torch.autograd.grad(y, [exact[name] for name in names], exact["dy"])]
    own = ours(0)(x)
    results = [own, *torch.autograd.grad(own, [x[name] for name in names], x["dy"])]
    return {
        name: float((result.double() - true).norm() / true.norm())
        for name, result, true in zip(["y", *names], results, truth, strict=True)
    }


def versions() -> str:
    parts = [torch.cuda.get_device_name(), f"torch {torch.__version__}"]
    try:
        import fla

        parts.append(f"flash-linear-attention {fla.__version__}")
    except ImportError:
        pass
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True)
    return ", ".join([*parts, f"commit {commit.stdout.strip() or 'unknown'}"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the WKV6 operator on one GPU.")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="B,T,H")
    parser.add_argument("--skip", nargs="*", default=[], choices=["fla", "torch", "loop", "wall"])
    parser.add_argument("--span_tokens", nargs="*", type=int, default=[0], help="0: the kernel's own choice")
    arguments = parser.parse_args()

    errors = errors_against_float64()
    if not all(errors[name] <= LIMITS[name] for name in LIMITS):
        print(f"the kernel is wrong, so nothing is timed: {errors}, limits {LIMITS}")
        return 1

    operators: dict[str, Operator] = {}
    for span_tokens in arguments.span_tokens:
        operators[f"ours, spans of {span_tokens}" if span_tokens else "ours"] = ours(span_tokens)
    if "fla" not in arguments.skip:
        operators |= fla_operators()
    if "torch" not in arguments.skip:
        operators["torch form"] = in_torch("chunked")
    if "loop" not in arguments.skip:
        operators["loop"] = in_torch("reference")

    print(versions())
    print("| shape | operator | GPU fwd | GPU fwd + bwd | wall fwd + bwd | floor |")
    print("|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        batch, tokens, heads = map(int, shape.split(","))
        floor = 16 * batch * tokens * heads * SIZE * 2 / FLOOR_BYTES_PER_SECOND * 1000
        for name, operator in operators.items():
            if name == "loop" and tokens > 4096:  # half a million launches
                continue
            x = draw(batch, tokens, heads)
            both_ways = partial(forward_and_backward, operator, x)
            repeats = 1 if name == "loop" else 5
            figures = [
                f"{kernel_milliseconds(partial(forward_only, operator, x), repeats):.3f}",
                f"{kernel_milliseconds(both_ways, repeats):.3f}",
                "-" if "wall" in arguments.skip or name == "loop" else f"{wall_milliseconds(both_ways):.3f}",
                f"{floor:.3f}",
            ]
            print(f"| B{batch} T{tokens} H{heads} | {name} | {' | '.join(figures)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
