"""What a step costs the host where it is issued kernel by kernel, and what of it; see `bench/bench_host.py`."""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from factories import tiny_parameters, tiny_shape
from recompute_cases import adapt
from torch.utils._python_dispatch import TorchDispatchMode
from without_gpu import issued

from src import quant
from src.adapters import adapter
from src.data.batches import packed_batch, padded_batch
from src.data.preference_batches import PairForm, PreferenceDataset
from src.data.preferences import PreferencePair
from src.loading import LoadOptions, build_model
from src.model import casts, language_model, layers, recompute, rwkv6, rwkv7
from src.model.recompute import Recompute
from src.ops import delta_rule_cuda, delta_rule_whole, elementwise_cuda, small_maps, wkv6_cuda, wkv7_cuda
from src.ops.kernels import Kernel
from src.training import objectives
from src.training.objectives import PreferenceObjective, SFTObjective, outcome_of

LAYERS = 32
TOKENS = 72
_FIRST_STEPS = 3


@dataclass(frozen=True)
class Row:
    """What is trained, and on what."""

    architecture: str
    adapts: bool = False
    quant_type: str | None = "nf4"
    batch: str = "pad"
    grad_cp: int = 1


ROWS = {
    "states-x060": Row("x060"),
    "states-x060-pack": Row("x060", batch="pack"),
    "states-x060-keep": Row("x060", grad_cp=0),
    "states-x070": Row("x070"),
    "lora-x060": Row("x060", adapts=True, quant_type=None),
    "qlora-x060": Row("x060", adapts=True),
    "lora-x070": Row("x070", adapts=True, quant_type=None),
    "orpo-x060": Row("x060", batch="orpo"),
    "orpo-x070": Row("x070", batch="orpo"),
}


def step_of(row: Row, layer_count: int = LAYERS) -> Callable[[], None]:
    """A function that makes one step's gradients; to be made and called where kernels are `issued`."""
    shape = tiny_shape(n_layer=layer_count, n_embd=64, head_size=64, vocab_size=256, architecture=row.architecture)
    trained = set(shape.state_shapes())
    if row.adapts:
        trained |= {*shape.part("time"), *shape.part("ln")}
    options = LoadOptions(torch.device("cpu"), torch.bfloat16, quant_type=row.quant_type, trained=trained)
    model = build_model(tiny_parameters(shape), shape, options)
    if row.adapts:
        adapt(model, "lora", shape.matrix_names())
    mode = Recompute.ALL if row.grad_cp else Recompute.NOTHING
    model.set_recomputation([mode] * layer_count, keep_dequantized=bool(row.grad_cp))
    drawn = torch.randint(1, 256, (TOKENS + 3,), generator=torch.Generator().manual_seed(1)).numpy()
    objective: Any = SFTObjective()
    batch: Any
    if row.batch == "orpo":
        third = len(drawn) // 3
        pair = PreferencePair(*(part.tolist() for part in (drawn[:third], drawn[third : 2 * third], drawn[:third])))
        objective = PreferenceObjective(0.1, 0)
        data = PreferenceDataset([pair], source="", form=PairForm.SHARED_PROMPT, longest=TOKENS, micro_bsz=1, seed=1)
        batch = data.batch([0])
    elif row.batch == "pack":
        batch = packed_batch([drawn[:40], drawn[40 : TOKENS + 2]], [None, None], [0, 1])
    else:
        batch = padded_batch([drawn[: TOKENS + 1]], [None], [0])
    staged = objective.stage(model, batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        outcome_of(objective, model, staged).loss.backward()

    return step


class Operators(TorchDispatchMode):
    """Counts calls that reach a device's implementation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.calls[str(function)] += 1
        return function(*arguments, **(named or {}))


@dataclass
class Figures:
    """Of one step."""

    milliseconds: float
    launches: int
    operators: Counter[str]
    functions: int


def measured(row: Row, steps: int) -> Figures:
    """One step's cost, the least of several."""
    launched = 0

    def launch(*arguments: Any) -> int:
        nonlocal launched
        launched += 1
        return 0

    with issued(launch):
        step = step_of(row)
        step()
        launched = 0
        with Operators() as operators:
            step()
        launches = launched
        functions = _function_calls(step)
    with issued():
        step = step_of(row)
        seconds = [_cpu_seconds(step) for _ in range(steps + _FIRST_STEPS)][_FIRST_STEPS:]
    return Figures(1e3 * min(seconds), launches, operators.calls, functions)


def _function_calls(step: Callable[[], None]) -> int:
    """Python functions that a step calls, those of the launcher's stand-in among them."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def _cpu_seconds(step: Callable[[], None]) -> float:
    gc.collect()
    gc.disable()
    begin = time.process_time()
    step()
    seconds = time.process_time() - begin
    gc.enable()
    return seconds


COLUMNS = ("first pass", "second pass", "backward")
REST = "autograd, and what has no line"
Place = tuple[Any, str]


def watched_places() -> dict[str, tuple[list[Place], list[Place], list[Place]]]:
    """Lines of the table: functions of a pass forward, functions of the backward, and those that either may call."""
    of = elementwise_cuda
    return {
        "launches": ([], [], [(Kernel, "__call__")]),
        "dequantised matrices": ([], [], [(quant.DequantizationWorkspace, "matrix")]),
        "packed products": ([(quant.FrozenLinear, "forward")], [(quant._FrozenProduct, "backward")], []),
        "dense products": ([(layers.Linear, "forward")], [], []),
        "adapters": ([(adapter.Adapter, "forward")], [(adapter._Adapted, "backward")], []),
        "casts of trained tensors": ([], [], [(casts.LayerCasts, "cast")]),
        "small products": (
            [(layers.Mixer, "product"), (rwkv7, "small_maps")],
            [(casts.WideProduct, "backward"), (small_maps._SmallMaps, "backward")],
            [],
        ),
        "stacked mixes": ([(layers.Mixer, "stacked")], [], []),
        "token shifts": (
            [(rwkv6, "shift_mixes"), (rwkv7, "shift_mixes"), (rwkv6, "modulated_shift_mixes")],
            [(of._ShiftMix, "backward"), (of._ModulatedShiftMix, "backward")],
            [],
        ),
        "norms": ([(layers.Norm, "of_sum")], [(of._AddNorm, "backward")], []),
        "group norm and gate": (
            [(rwkv6, "group_norm_silu_gate"), (rwkv7, "group_norm_bonus_gate")],
            [(of._GroupNormSiluGate, "backward"), (delta_rule_cuda._GroupNormBonusGate, "backward")],
            [],
        ),
        "keys and value residual": (
            [(rwkv7, "removal_and_replacement"), (rwkv7, "value_residual")],
            [(delta_rule_cuda._RemovalAndReplacement, "backward"), (delta_rule_cuda._ValueResidual, "backward")],
            [],
        ),
        "recurrence": (
            [(rwkv6.TimeMix, "_recur"), (rwkv7.TimeMix, "_recur"), (delta_rule_whole, "whole")],
            [(wkv6_cuda._Wkv6, "backward"), (wkv6_cuda._Wkv6Branching, "backward"), (wkv7_cuda._WKV7, "backward"),
             (delta_rule_whole._Whole, "backward")],
            [],
        ),
        "feed-forward": (
            [(mixer, name) for mixer in (rwkv6.ChannelMix, rwkv7.ChannelMix) for name in ("feed", "feed_again")],
            [(rwkv6._FeedAgain, "backward"), (rwkv7._FeedAgain, "backward"), (of._SigmoidGatedResidual, "backward"),
             (of._SquaredRelu, "backward")],
            [],
        ),
        "time mix": (
            [(mixer, name) for mixer in (rwkv6.TimeMix, rwkv7.TimeMix) for name in ("mixed_inputs", "attend")], [], []
        ),
        "a layer around its mixers": ([(language_model.Block, "forward")], [], []),
        "recomputation": ([(language_model, "recomputed")], [(recompute._Again, "backward")], []),
        "head and loss": ([(objectives, "head_sft_loss"), (objectives, "token_logps")], [], []),
    }  # fmt: skip


class Stopwatch:
    """Adds up seconds by line and column, innermost first."""

    def __init__(self) -> None:
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._stack = [(REST, COLUMNS[0])]
        self._last = 0.0

    def wrap(self, function: Callable[..., Any], line: str, kind: int) -> Callable[..., Any]:
        """Watched from now on; kind 0 runs forward, 1 backward, 2 in either."""

        def watched(*arguments: Any, **named: Any) -> Any:
            column = self._stack[-1][1]
            if kind == 1:
                column = COLUMNS[2]
            elif kind == 0 and column == COLUMNS[2]:
                column = COLUMNS[1]
            self._turn()
            self._stack.append((line, column))
            try:
                return function(*arguments, **named)
            finally:
                self._turn()
                self._stack.pop()

        return watched

    def start(self) -> None:
        self._last = time.process_time()

    def stop(self) -> None:
        self._turn()

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now


@contextmanager
def watching(watch: Stopwatch) -> Iterator[None]:
    """Puts the stopwatch around all that `watched_places` names."""
    with pytest.MonkeyPatch.context() as patch:
        for line, kinds in watched_places().items():
            for kind, places in enumerate(kinds):
                for holder, name in places:
                    given = vars(holder)[name]
                    function = given.__func__ if isinstance(given, staticmethod) else given
                    watched: Any = watch.wrap(function, line, kind)
                    patch.setattr(holder, name, staticmethod(watched) if isinstance(given, staticmethod) else watched)
        patch.setattr(torch.Tensor, "backward", watch.wrap(torch.Tensor.backward, REST, 1))
        yield


def where_it_goes(row: Row, steps: int) -> dict[tuple[str, str], float]:
    """Microseconds of a layer by line and column, in the shortest of several steps."""
    with issued():
        step = step_of(row)
        for _ in range(_FIRST_STEPS):
            step()
        seen = []
        for _ in range(steps):
            watch = Stopwatch()
            with watching(watch):
                watch.start()
                step()
                watch.stop()
            seen.append(watch.seconds)
    least = min(seen, key=lambda seconds: sum(seconds.values()))
    return {place: 1e6 / LAYERS * seconds for place, seconds in least.items()}
