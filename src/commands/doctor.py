"""`python train.py --doctor 1`: looks at what a run needs; each line is good, or says the one thing to change.

Any flags of the run may stand beside it: model, sizes, device and folder are then those of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from src.checkpoint import open_checkpoint
from src.config import TrainConfig
from src.config.flags import INPUT, INPUTS
from src.config.recognition import files_of
from src.device import Device, memory_bytes, resolve_device
from src.errors import EXIT_CODE, ConfigError, KernelError, UserError
from src.model.shape import ModelShape
from src.ops import delta_rule_cuda, dequantize_cuda, elementwise, elementwise_cuda, wkv6_cuda, wkv7_cuda
from src.ops.kernels import Kernel, driver_cuda_version
from src.ops.wkv6 import wkv6
from src.ops.wkv7 import wkv7
from src.quant import DequantizationWorkspace, FrozenLinear
from src.training.engine import resolve_hardware
from src.training.logs import require_loggers

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
OLDEST_PYTHON = (3, 10)
_REQUIREMENT = re.compile(r"([\w-]+)([^;#]*)(;[^#]*)?")
_WITHOUT = {
    "deepspeed": "only several GPUs and --strategy deepspeed_* need it",
    "wandb": "only --wandb needs it",
    "matplotlib": "only loss.png needs it",
    "pyrwkv-tokenizer": "text for World models needs it",
}
_HEADS, _TOKENS = 32, 1024
"""What operators are tried at where no model is named: those of 1.6B."""
_CPU_TOKENS = 128
_LEAST_DISK_BYTES = 2**30
_NARROW_LIMIT, _WIDE_LIMIT = 1e-2, 1e-4
"""Largest relative error (rms) of an operator in 16-bit and in wider numbers; measured ones are under a third of it."""
_PACKING_ERRORS = {"nf4": (0.07, 0.11), "int8": (0.001, 0.02)}
"""Between which relative errors (rms) of packed normal numbers lie."""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        subject: what was looked at.
        seen: what was found.
        advice: the one thing to change; "" if all is good.
        matters: whether training needs it.
    """

    subject: str
    seen: str
    advice: str = ""
    matters: bool = True

    @property
    def mark(self) -> str:
        """good, note or BAD."""
        return "good" if not self.advice else "BAD" if self.matters else "note"

    def lines(self) -> list[str]:
        """As printed."""
        first = f"{self.mark:<5} {self.subject:<17} {self.seen}"
        return [first, *([f"{'':<24}-> {self.advice}"] if self.advice else [])]


def run_doctor(given: Mapping[str, str]) -> int:
    """Looks at everything and prints the table; returns the exit code, `EXIT_CODE` if something must be changed.

    Args:
        given: flags of the command line as texts.
    """
    bad = 0
    for finding in findings({name: text for name, text in given.items() if name != "doctor"}):
        print(*finding.lines(), sep="\n", flush=True)
        bad += finding.mark == "BAD"
    print(f"\n{bad} to change" if bad else "\nall that training needs is there")
    return EXIT_CODE if bad else 0


def findings(given: Mapping[str, str]) -> Iterator[Finding]:
    """All lines, in order.

    Args:
        given: flags of a run as texts, perhaps none.
    """
    yield python_finding()
    yield from package_findings()
    config, problem = _config_of(given)
    if given:
        yield Finding("flags", "understood" if not problem else "not understood", problem)
    yield from _file_findings(config, given)
    device, gpu = _gpu_finding(config)
    yield gpu
    if device is not None:
        yield from _engine_findings(config)
    shape = None
    if os.path.exists(given.get("load_model", "")):
        shape, model = _model_finding(given["load_model"])
        yield model
    yield from _host_findings(config)
    if device is None:
        return
    if device.on_gpu:
        yield from _kernel_findings(device.device)
    heads, size = (shape.n_head, shape.head_size) if shape else (_HEADS, 64)
    tokens = config.ctx_len if shape else _TOKENS
    architecture = shape.architecture if shape else config.my_testing or "x060"
    yield _tried("operator", lambda: operator_finding(device, architecture, heads, size, tokens))
    if device.on_gpu:
        yield _tried("kernels", lambda: elementwise_finding(device, heads * size))
    for quant_type in _PACKING_ERRORS:
        yield _tried(quant_type, lambda quant_type=quant_type: packing_finding(device, quant_type))  # type: ignore[misc]


def python_finding(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """The interpreter, and the system it runs on."""
    seen = f"{version[0]}.{version[1]} on {platform.system()} {platform.release()}, {platform.machine()}"
    advice = "" if version >= OLDEST_PYTHON else f"install Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer"
    return Finding("python", seen, advice)


def package_findings(
    requirements: Path = REQUIREMENTS, version_of: Callable[[str], str] = importlib.metadata.version
) -> Iterator[Finding]:
    """What requirements.txt names.

    Args:
        requirements: that file.
        version_of: the installed version of a package; raises PackageNotFoundError.
    """
    for line in requirements.read_text(encoding="utf-8").splitlines():
        found = _REQUIREMENT.match(line.strip())
        if not found:
            continue
        name, wanted, marker = found[1], found[2].strip(), found[3] or ""
        if "linux" in marker and sys.platform != "linux":
            continue
        try:
            version = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            reason = f" ({_WITHOUT[name]})" if name in _WITHOUT else ""
            yield Finding(name, "not installed", f'pip install "{name}{wanted}"{reason}', name not in _WITHOUT)
            continue
        fits = all(_holds(version, rule) for rule in wanted.split(","))
        advice = "" if fits else f'this program was tried with {wanted} only: pip install "{name}{wanted}"'
        yield Finding(name, version, advice, matters=False)


def _holds(version: str, rule: str) -> bool:
    """Whether a version meets a rule as in `>=2.11` or `<2.14`."""
    compare, bound = re.fullmatch(r"(>=|<|==)([\d.]+)", rule.strip()).groups()  # type: ignore[union-attr]
    numbers = [int(part) for part in re.findall(r"\d+", version.split("+")[0])]
    bounds = [int(part) for part in bound.split(".")]
    numbers = numbers[: len(bounds)] + [0] * (len(bounds) - len(numbers))
    return {">=": numbers >= bounds, "<": numbers < bounds, "==": numbers == bounds}[compare]


def _config_of(given: Mapping[str, str]) -> tuple[TrainConfig, str]:
    """The run's flags, and what is wrong with them; model and data it does not name have stand-ins."""
    stand_ins = {"load_model": "model.pth"}
    if not {"data_file", "orpo", "dpo", "simpo"} & given.keys():
        stand_ins["data_type"] = "dummy"
    try:
        return TrainConfig.from_flags({**stand_ins, **given}), ""
    except ConfigError as error:
        return TrainConfig(), str(error)


def _file_findings(config: TrainConfig, given: Mapping[str, str]) -> Iterator[Finding]:
    """The files that are named and not there."""
    for spec in dataclasses.fields(config):
        path = given.get(spec.name, "")
        try:
            named = {INPUT: (path,), INPUTS: files_of(path)}.get(spec.metadata["path"], ()) if path else ()
        except ConfigError as error:
            seen, _, advice = str(error).partition(": ")
            yield Finding("files", f"--{spec.name}: {seen}", advice)
            continue
        for file in named:
            if not any(map(os.path.exists, (file, f"{file}.idx"))):
                yield Finding("files", f"--{spec.name} {file} is not there", "give the path of a file that is")


def _gpu_finding(config: TrainConfig) -> tuple[Device | None, Finding]:
    build = f"torch for CUDA {torch.version.cuda}" if torch.version.cuda else "torch for the CPU"
    try:
        device = resolve_device(config.accelerator, config.precision)
    except ConfigError as error:
        return None, Finding("gpu", build, str(error))
    if device.on_gpu:
        free, whole = (number / 2**30 for number in torch.cuda.mem_get_info(device.device))
        major, minor = torch.cuda.get_device_capability(device.device)
        seen = f"{device.describe()}, compute capability {major}.{minor}, {free:.1f} of {whole:.1f} GiB free"
        with contextlib.suppress(KernelError):  # kernels that cannot be loaded say why
            build += ", driver for CUDA {}.{}".format(*driver_cuda_version())
        seen += f", {build}"
        advice = "other programs hold half of its memory: end them (nvidia-smi names them)" if 2 * free < whole else ""
        return device, Finding("gpu", seen, advice, matters=False)
    if config.accelerator == "cpu":
        return device, Finding("gpu", f"none is asked for: {device.describe()}")
    advice = "training on a CPU is for trials: install a driver (nvidia-smi must list the card)"
    if not torch.version.cuda:
        advice = "training on a CPU is for trials: with an NVIDIA card install a CUDA build of torch (pytorch.org)"
    return device, Finding("gpu", f"none: {device.describe()}, {build}", advice, matters=False)


def _engine_findings(config: TrainConfig) -> Iterator[Finding]:
    """What the run's flags need that is not here, besides the device."""
    for subject, look in (("strategy", resolve_hardware), ("loggers", require_loggers)):
        try:
            look(config)
        except ConfigError as error:
            yield Finding(subject, "not possible here", str(error))


def _model_finding(path: str) -> tuple[ModelShape | None, Finding]:
    try:
        shape = open_checkpoint(path).info.shape
    except UserError as error:
        return None, Finding("model", path, str(error))
    size = os.path.getsize(path)
    seen = f"{path}: {shape.parameter_count:,} parameters, {shape.n_layer} layers, {size / 2**30:.2f} GiB"
    return shape, Finding("model", seen)


def _host_findings(config: TrainConfig) -> Iterator[Finding]:
    there = memory_bytes(torch.device("cpu"))
    if there is not None:
        advice = "" if there > 4 * 2**30 else "under 4 GiB models of 1.6B and more hardly load: use a larger machine"
        yield Finding("memory", f"{there / 2**30:.1f} GiB", advice, matters=False)
    folder = Path(config.proj_dir)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding("disk", f"{folder}: {error.strerror}", "choose another --proj_dir")
        return
    advice = "free some space, or choose another --proj_dir" if free < _LEAST_DISK_BYTES else ""
    if not os.access(folder, os.W_OK):
        advice = f"{folder} cannot be written: choose another --proj_dir"
    yield Finding("disk", f"{free / 2**30:.1f} GiB free where --proj_dir {config.proj_dir} is", advice)


def _kernel_findings(device: torch.device) -> Iterator[Finding]:
    """The CUDA kernels, compiled now unless they were before."""
    families: dict[str, tuple[Kernel, ...]] = {
        "wkv6": wkv6_cuda.KERNELS,
        "wkv7": wkv7_cuda.kernels_for(device),
        "elementwise": (*elementwise_cuda.KERNELS, *delta_rule_cuda.KERNELS),
        "dequantize": tuple(dequantize_cuda.KERNELS.values()),
    }
    index = device.index or 0
    with contextlib.suppress(KernelError):  # said below
        for kernel in itertools.chain(*families.values()):
            kernel.compile(index)
    for name, kernels in families.items():
        try:
            for kernel in kernels:
                kernel.load(index)
            yield Finding(f"cuda/{name}", f"{len(kernels)} kernels, compiled and loaded")
        except KernelError as error:
            yield Finding(f"cuda/{name}", "not usable: slower torch operations stand in", str(error), matters=False)


def _tried(subject: str, look: Callable[[], Finding]) -> Finding:
    """What `look` finds; what fails in it is a finding, too: that is what a doctor is for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no kernel was said
            return look()
    except (ImportError, OSError, RuntimeError, UserError) as error:
        return Finding(subject, f"fails: {str(error).splitlines()[0]}", "reinstall torch and bitsandbytes for this GPU")


def operator_finding(device: Device, architecture: str, heads: int, size: int, tokens: int) -> Finding:
    """The recurrence as training has it, forward and all gradients, against the loop in float64.

    Args:
        device: where and in what.
        architecture: whose recurrence.
        heads, size, tokens: of a row. On a CPU at most 128 tokens are tried: the loop takes long there.
    """
    if not device.on_gpu:
        tokens = min(tokens, _CPU_TOKENS)
    operator, inputs = _of_architecture(architecture, heads, size, tokens)
    inputs = {name: tensor.to(device.compute_dtype).double().to(device.device) for name, tensor in inputs.items()}
    cotangent = torch.randn(inputs["r"].shape, generator=torch.Generator().manual_seed(1)).to(device.device)

    def results(dtype: torch.dtype, backend: str | None) -> dict[str, Tensor]:
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
        if dtype != torch.float64:
            leaves["state"] = inputs["state"].float().requires_grad_()
        y, _ = operator(**leaves, backend=backend)
        gradients = torch.autograd.grad(y, list(leaves.values()), cotangent.to(device.compute_dtype).to(y.dtype))
        return {"y": y.detach(), **{f"d{name}": found for name, found in zip(leaves, gradients, strict=True)}}

    expected = results(torch.float64, "reference")
    found = results(device.compute_dtype, None)
    shape = f"[1, {tokens}, {heads}, {size}] {device.precision}"
    return _compared("operator", f"{operator.__name__} {shape}", found, expected, device)


def _of_architecture(
    architecture: str, heads: int, size: int, tokens: int
) -> tuple[Callable[..., tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """An architecture's recurrence, and random arguments for it by name; shapes as the operators name them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    row = (1, tokens, heads, size)
    inputs = {name: drawn(*row) for name in ("r", "k", "v", "w_raw")} | {"state": drawn(heads, size, size)}
    if architecture == "x060":
        return wkv6, inputs | {"u": drawn(heads, size)}
    key = torch.nn.functional.normalize(drawn(*row), dim=-1)
    return wkv7, inputs | {"a": -key, "b": key * drawn(*row).sigmoid()}


def elementwise_finding(device: Device, channels: int) -> Finding:
    """The fused element-wise kernels, forward, against their definitions."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device.device, device.compute_dtype)

    x, delta, weight, bias = drawn(1, 64, channels), drawn(1, 64, channels), drawn(channels), drawn(channels)
    maa = drawn(2, channels)
    fused = (
        elementwise.add_norm(x, delta, weight, bias, 1e-5)[1],
        *elementwise.shift_mixes(x, None, maa, None, None),
        elementwise.squared_relu(x),
    )
    defined = (
        elementwise.add_norm_torch(x.float(), delta.float(), weight.float(), bias.float(), 1e-5)[1],
        *elementwise.shift_mixes_torch(x.float(), None, maa.float(), None, None),
        elementwise.squared_relu_torch(x.float()),
    )
    names = ("norm", "mix 1", "mix 2", "relu²")
    return _compared(
        "kernels",
        f"element-wise, {channels} channels",
        dict(zip(names, fused, strict=True)),
        dict(zip(names, defined, strict=True)),
        device,
    )


def packing_finding(device: Device, quant_type: str) -> Finding:
    """A matrix packed and unpacked by bitsandbytes, and its product."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding(quant_type, "bitsandbytes is not installed", "pip install bitsandbytes, or train with --quant 0")
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(256, 256, generator=generator).to(device.device, device.compute_dtype) for _ in range(2))
    layer = FrozenLinear.from_weight(weight, quant_type, device.compute_dtype, workspace=DequantizationWorkspace())
    unpacked = layer.dequantized()
    error = _error(unpacked, weight)
    least, most = _PACKING_ERRORS[quant_type]
    product = _error(layer(x), x.double() @ unpacked.double().T)
    right = least < error < most and product < _limit(device)
    seen = f"packed and unpacked: {error:.3f} of the values' size lost; products within {product:.0e}"
    advice = "" if right else f"that is not {least} to {most}: reinstall bitsandbytes, or use another --quant_type"
    return Finding(quant_type, seen, advice)


def _compared(
    subject: str, what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], device: Device
) -> Finding:
    errors = {name: _error(found[name], value) for name, value in expected.items()}
    shown = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    wrong = [name for name, error in errors.items() if not error < _limit(device)]
    advice = f"{' and '.join(wrong)} must stay under {_limit(device):.0e}: report this, with GPU, driver and torch"
    return Finding(subject, f"{what}: {shown}", advice if wrong else "")


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative, rms."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _limit(device: Device) -> float:
    return _NARROW_LIMIT if device.compute_dtype in (torch.bfloat16, torch.float16) else _WIDE_LIMIT
