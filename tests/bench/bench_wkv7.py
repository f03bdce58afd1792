"""Times the WKV7 operator: this project's CUDA kernels, flash-linear-attention if installed, and the torch form.

    python tests/bench/bench_wkv7.py [--shapes B,T,H ...] [--skip fla torch wall]

Prints a markdown table, or, when a quick comparison with float64 fails, the errors and nothing else (exit code
1).

Columns as in bench_wkv6.py: milliseconds of forward, and of forward + backward with all gradients, the start state's
among them. FLA takes a log decay in float32, ours the raw one: "FLA" is its `chunk_rwkv7` alone, "FLA + decay" adds
that transformation in both directions (the like-for-like figure), "FLA bounded" also tells it how strong decays can be,
which permits it larger chunks. "Floor" is 37 times the bytes of y at 4.3 TB/s, what
the three kernels read and write: the forward 10 (six inputs, y, U, and states, which are 2), the states' backward 8,
the tokens' gradients 19.
"""

import argparse
import sys
from functools import partial

import torch
import torch.nn.functional as F
from bench_wkv6 import (
    FLOOR_BYTES_PER_SECOND,
    Inputs,
    Operator,
    forward_only,
    kernel_milliseconds,
    versions,
    wall_milliseconds,
)
from torch import Tensor

from src.ops.wkv7 import wkv7
from src.ops.wkv7_cuda import wkv7_cuda
from src.ops.wkv7_reference import STRONGEST_LOG_DECAY

SHAPES = ("1,1024,32", "1,1024,64", "1,4096,64", "8,1024,64", "1,16384,64")
SIZE = 64
FLOOR_TENSORS = 37
NAMES = ("r", "w_raw", "k", "v", "a", "b", "state")
LIMITS = {"y": 7e-3, "r": 7e-3, "k": 7e-3, "v": 7e-3, "w_raw": 8e-3, "a": 8e-3, "b": 8e-3, "state": 5e-3}


def draw(batch: int, tokens: int, heads: int) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, tokens, heads, SIZE)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    removal_key, rate = F.normalize(normal(*shape), dim=-1), torch.sigmoid(normal(*shape))
    inputs = {"r": normal(*shape), "w_raw": normal(*shape) * 2 - 1, "k": normal(*shape), "v": normal(*shape)}
    inputs |= {"a": -removal_key, "b": removal_key * rate}
    inputs = {name: tensor.bfloat16().requires_grad_() for name, tensor in inputs.items()}
    inputs["state"] = normal(heads, SIZE, SIZE).requires_grad_()
    inputs["dy"] = normal(*shape).bfloat16()
    return inputs


def ours(x: Inputs) -> Tensor:
    return wkv7_cuda(*(x[name] for name in NAMES))[0]


def in_torch(x: Inputs) -> Tensor:
    return wkv7(*(x[name] for name in NAMES), backend="chunked")[0]


def fla_operators() -> dict[str, Operator]:
    try:
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError as error:
        print(f"FLA is left out: {error}")
        return {}

    def log_decay(w_raw: Tensor) -> Tensor:
        return STRONGEST_LOG_DECAY * torch.sigmoid(w_raw.float())

    def call(x: Inputs, w: Tensor, **options: float) -> Tensor:
        state = x["state"].transpose(-1, -2).unsqueeze(0).expand(x["r"].shape[0], -1, -1, -1)
        y: Tensor
        y, _ = chunk_rwkv7(x["r"], w, x["k"], x["v"], x["a"], x["b"], scale=1.0, initial_state=state, **options)
        return y

    def alone(x: Inputs) -> Tensor:
        if "log_decay" not in x:
            x["log_decay"] = log_decay(x["w_raw"].detach()).requires_grad_()
        return call(x, x["log_decay"])

    return {
        "FLA": alone,
        "FLA + decay": lambda x: call(x, log_decay(x["w_raw"])),
        "FLA bounded": lambda x: call(x, log_decay(x["w_raw"]), lower_bound=STRONGEST_LOG_DECAY),
    }


def forward_and_backward(operator: Operator, x: Inputs) -> None:
    y = operator(x)
    sources = [x["log_decay"] if name == "w_raw" and "log_decay" in x else x[name] for name in NAMES]
    torch.autograd.grad(y, sources, x["dy"])


def errors_against_float64() -> dict[str, float]:
    x = draw(1, 300, 4)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    y, _ = wkv7(*(exact[name] for name in NAMES), backend="reference")
    truth = [y, *torch.autograd.grad(y, [exact[name] for name in NAMES], exact["dy"])]
    own = ours(x)
    results = [own, *torch.autograd.grad(own, [x[name] for name in NAMES], x["dy"])]
    return {
        name: float((result.double() - true).norm() / true.norm())
        for name, result, true in zip(["y", *NAMES], results, truth, strict=True)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the WKV7 operator on one GPU.")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="B,T,H")
    parser.add_argument("--skip", nargs="*", default=[], choices=["fla", "torch", "wall"])
    arguments = parser.parse_args()

    errors = errors_against_float64()
    if not all(errors[name] <= LIMITS[name] for name in LIMITS):
        print(f"the kernel is wrong, so nothing is timed: {errors}, limits {LIMITS}")
        return 1

    operators: dict[str, Operator] = {"ours": ours}
    if "fla" not in arguments.skip:
        operators |= fla_operators()
    if "torch" not in arguments.skip:
        operators["torch form"] = in_torch

    print(versions())
    print("| shape | operator | GPU fwd | GPU fwd + bwd | wall fwd + bwd | floor |")
    print("|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        batch, tokens, heads = map(int, shape.split(","))
        floor = FLOOR_TENSORS * batch * tokens * heads * SIZE * 2 / FLOOR_BYTES_PER_SECOND * 1000
        for name, operator in operators.items():
            x = draw(batch, tokens, heads)
            both_ways = partial(forward_and_backward, operator, x)
            figures = [
                f"{kernel_milliseconds(partial(forward_only, operator, x), 5):.3f}",
                f"{kernel_milliseconds(both_ways, 5):.3f}",
                "-" if "wall" in arguments.skip else f"{wall_milliseconds(both_ways):.3f}",
                f"{floor:.3f}",
            ]
            print(f"| B{batch} T{tokens} H{heads} | {name} | {' | '.join(figures)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
