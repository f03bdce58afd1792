"""The WKV7 operator on NVIDIA GPUs: memory and autograd around the kernels of `cuda/wkv7.cu`.

Shapes: B batch, T tokens, H heads, N head size (64), S packed sequences. The state is [H, value, key].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.ops.kernels import Kernel, usable
from src.ops.node import Node, once

CUDA_HEAD_SIZE = 64
_TILE_TOKENS = 16
_CHUNK_TOKENS = 32
_GRADIENT_THREADS = 256
_MOST_ROWS = 2**27
"""The kernels number 4-byte words with 32 bits."""

_SCAN = "(PPPPPP PPPPP iiii PPPP)"
_VALUE_WARPS = 4


@dataclass(frozen=True)
class Form:
    """One way of spreading a head's work.

    Attributes:
        forward, backward: the scans.
        producers: warps of a block that make tiles.
        consumers: warps of a block that walk over them, with a quarter of the values each.
    """

    forward: Kernel
    backward: Kernel
    producers: int
    consumers: int

    @classmethod
    def of(cls, producers: int, consumers: int, *shared_bytes: int) -> Form:
        """With the shared memory of the two scans' blocks."""
        forward, backward = (
            Kernel(
                "wkv7.cu", f"wkv7::scan_kernel<{name}, {producers}, {consumers}>", _SCAN, shared_bytes=bytes_of_block
            )
            for name, bytes_of_block in zip(("false", "true"), shared_bytes, strict=True)
        )
        return cls(forward, backward, producers, consumers)

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * (self.producers + self.consumers)

    @property
    def blocks(self) -> int:
        """Of a head."""
        return _VALUE_WARPS // self.consumers

    def fits(self, shared_bytes: int) -> bool:
        """Whether a GPU whose blocks may have so much shared memory can run it."""
        return max(self.forward.shared_bytes, self.backward.shared_bytes) <= shared_bytes


SMALL = Form.of(4, 4, 90_240, 85_888)
"""The one that every GPU has the shared memory for."""
WIDE = Form.of(8, 4, 180_352, 154_624)
"""More warps make tiles. On an H100 faster than two small blocks on each multiprocessor, too."""
HALVES = Form.of(10, 2, 225_536, 188_928)
"""Where there are two for each head, too: two blocks make the same tiles and walk over half of the values each."""
FORMS = (HALVES, WIDE, SMALL)
GRADIENTS = Kernel("wkv7.cu", "wkv7::gradients_kernel", "(PPPPPPP PPPP P iiii PPPPPP)", shared_bytes=100_864)
KERNELS = (*(kernel for form in FORMS for kernel in (form.forward, form.backward)), GRADIENTS)


def kernel_is_available(device: torch.device) -> bool:
    """Whether the kernels can be used on this GPU; warns once, with the reason, when they cannot."""
    instead = "The torch form of RWKV-7's operator is used instead, which is several times slower."
    return usable(kernels_for(device), device, instead)


def kernels_for(device: torch.device) -> tuple[Kernel, ...]:
    """Those of KERNELS that are used on a GPU: its shared memory suffices for their form, and for no better one."""
    forms = [form for form in FORMS[:-1] if form.fits(_limits(device)[1])] or [SMALL]
    return (*(kernel for form in forms for kernel in (form.forward, form.backward)), GRADIENTS)


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens of a packed row, or all tokens, that one launch runs over.

    Attributes:
        first, count: tokens of the row, or of each row of a batch.
        borders: int32 [S + 1] of the packed sequences, None for a batch.
        parents: int64 [S], the sequence of the part before that each of them continues; None for the first part.
    """

    first: int
    count: int
    borders: Tensor | None
    parents: Tensor | None

    def of(self, tensor: Tensor) -> Tensor:
        """Its tokens of [B, T, H, N], contiguous."""
        return tensor if self.count == tensor.shape[1] else tensor[:, self.first : self.first + self.count]

    def sequences(self, batch: int) -> int:
        return batch if self.borders is None else self.borders.numel() - 1

    def chunks(self, batch: int) -> int:
        """An upper bound, as the kernels lay them out."""
        if self.borders is None:
            return batch * -(-self.count // _CHUNK_TOKENS)
        return self.count // _CHUNK_TOKENS + self.sequences(batch)


def one_part(tokens: int, borders: Tensor | None) -> tuple[Part, ...]:
    """All tokens at once; borders as for `wkv7`."""
    return (Part(0, tokens, None if borders is None else borders.int().contiguous(), None),)


def two_parts(
    tokens: int, root_borders: Tensor, child_borders: Tensor, parents: Tensor, root_tokens: int
) -> tuple[Part, ...]:
    """Roots, and sequences that continue them; arguments as for `wkv7_branching`, 0 < root_tokens < tokens."""
    return (
        Part(0, root_tokens, root_borders.int().contiguous(), None),
        Part(root_tokens, tokens - root_tokens, child_borders.int().contiguous(), parents.contiguous()),
    )


class _WKV7(Node):
    """One part, or roots and then the sequences that continue them, over one row."""

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        w_raw: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        parts: Sequence[Part],
        recorded: bool,
    ) -> tuple[Tensor, Tensor]:
        tokens = [prepared_tokens(x) for x in (r, w_raw, k, v, a, b)]
        of_tokens = recorded and any(ctx.needs_input_grad[:6])
        of_state = recorded and ctx.needs_input_grad[6]
        y, final, kept = walk(parts, tokens, state, keeps=of_tokens)
        ctx.parts, ctx.state_is_shared = parts, state.dim() == 3
        ctx.set_materialize_grads(False)
        r, w_raw, k, v, a, b = tokens
        if of_tokens:
            ctx.save_for_backward(r, w_raw, a, b, k, v, *kept)
        elif of_state:
            ctx.save_for_backward(r, w_raw, a, b)  # the state's gradient alone needs neither k nor v
        return y, final

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        r, w_raw, a, b, *of_tokens = ctx.saved_tensors
        dy = torch.zeros_like(r) if dy is None else prepared_tokens(dy)
        need, need_state = ctx.needs_input_grad[:6], ctx.needs_input_grad[6]
        found = [torch.empty_like(r) if wanted else None for wanted in need]
        k, v, *kept = of_tokens or (None, None)
        shared = ctx.state_is_shared if need_state else None
        dstate = walk_back(ctx.parts, (r, w_raw, k, v, a, b), kept, dy, dfinal, found, shared=shared)
        return *found, dstate, None, None


def walk(
    parts: Sequence[Part], tokens: Sequence[Tensor], state: Tensor, *, keeps: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The recurrence over one part, or roots and then the sequences that continue them, outside autograd.

    Args:
        parts: of the tokens.
        tokens: r, w_raw, k, v, a, b, each [B, T, H, N], contiguous and aligned.
        state: as for `wkv7`.
        keeps: whether gradients of tokens will be asked for.

    Returns:
        (y, final states of the first part, what `walk_back` needs for the gradients of tokens).
    """
    _check_start(state, parts[0].sequences(tokens[0].shape[0]), tokens[0])
    start = prepared_tokens(state)
    y = torch.empty_like(tokens[0])
    finals: list[Tensor] = []
    kept: list[Tensor] = []
    for part in parts:
        final, *of_part = _run_forward(part, tokens, finals[-1] if finals else start, y, keeps=keeps)
        finals.append(final)
        kept += of_part
    return y, finals[0], kept


def walk_back(
    parts: Sequence[Part],
    tokens: Sequence[Any],
    kept: Sequence[Tensor],
    dy: Tensor,
    dfinal: Tensor | None,
    found: Sequence[Tensor | None],
    *,
    shared: bool | None,
    adds: bool = False,
) -> Tensor | None:
    """Writes the gradients of the tokens that are there, and returns that of the start state; outside autograd.

    Args:
        parts, tokens: as for `walk`; k and v may be None where no gradient of a token is asked for.
        kept: what `walk` returned.
        dy: gradient of y, contiguous and aligned.
        dfinal: that of the first part's final states, None for zero.
        found: where the gradients of r, w_raw, k, v, a and b are written; None: not asked for.
        shared: whether one start state is all sequences'; None: its gradient is not asked for.
        adds: whether those of r, k and v are added to what stands there: in fp32, rounded once.
    """
    r, w_raw, _, _, a, b = tokens
    of_tokens = any(x is not None for x in found)
    dstate: Tensor | None = None
    later: tuple[Tensor, Tensor] | None = None  # the children's gradients, and whose children they are
    for index, part in reversed(list(enumerate(parts))):
        start = (None if dfinal is None else prepared_tokens(dfinal)) if index == 0 else None
        wants_state = shared is not None or index > 0
        gradients, answers, dstate = _run_backward(part, r, w_raw, a, b, dy, start, later, wants_state, of_tokens)
        if of_tokens:
            of_part: list[Any] = list(kept[2 * index : 2 * index + 2])
            _run_gradients(part, (*tokens, dy), (*of_part, gradients, answers), found, adds)
        if part.parents is not None:
            assert dstate is not None
            later = dstate, part.parents
    if shared is None:
        return None
    assert dstate is not None
    if not shared:
        return dstate
    return dstate[0] if dstate.shape[0] == 1 else dstate.sum(0)


def _check_start(state: Tensor, sequences: int, r: Tensor) -> None:
    alone = (r.shape[2], CUDA_HEAD_SIZE, CUDA_HEAD_SIZE)
    if state.shape != alone and state.shape != (sequences, *alone):
        shape = list(state.shape)
        raise RuntimeError(f"state has shape {shape}, expected {list(alone)}, alone or {sequences} times")
    if state.dtype is not torch.float32:
        raise RuntimeError(f"state has dtype {state.dtype}, expected float32")
    if state.device != r.device:
        raise RuntimeError(f"state is on {state.device}, expected r's device {r.device}")


def prepared_tokens(tensor: Tensor) -> Tensor:
    """Contiguous and aligned, as the kernels read it; copied only when it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _form_for(heads: int, device: torch.device) -> Form:
    """The fastest for so many heads, those of all sequences together."""
    multiprocessors, shared_bytes = _limits(device)
    if HALVES.fits(shared_bytes) and HALVES.blocks * heads <= multiprocessors:
        return HALVES
    return WIDE if WIDE.fits(shared_bytes) else SMALL


@functools.cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, and the bytes of shared memory that one block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    # Where torch does not say it: what every card from sm_80 on has.
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return properties.multi_processor_count, shared_bytes


def _run_forward(part: Part, tokens: Sequence[Tensor], start: Tensor, y: Tensor, *, keeps: bool) -> list[Tensor]:
    """Writes y; returns final states, and with `keeps` the states before chunks and U, which the backward reads."""
    batch, _, heads, size = y.shape
    sequences, chunks = part.sequences(batch), part.chunks(batch)
    final = y.new_empty((sequences, heads, size, size), dtype=torch.float32)
    kept: list[Tensor] = []
    if keeps:
        kept = [
            y.new_empty((chunks, heads, size, size)),
            y.new_empty((chunks, _CHUNK_TOKENS // _TILE_TOKENS, heads, size, _TILE_TOKENS)),
        ]
    form = _form_for(sequences * heads, y.device)
    form.forward(
        y, form.blocks * sequences * heads, form.threads, *(part.of(x) for x in tokens), start, part.parents, None,
        None, part.borders, int(start.dim() == 3), 0, part.count, heads, part.of(y), final, *(kept or (None, None)),
    )  # fmt: skip
    return [final, *kept]


def _run_backward(
    part: Part,
    r: Tensor,
    w_raw: Tensor,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    later: tuple[Tensor, Tensor] | None,
    wants_state: bool,
    wants_tokens: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The states' gradients after chunks, those of what T is applied to, and those of the start states."""
    batch, _, heads, size = r.shape
    sequences, chunks = part.sequences(batch), part.chunks(batch)
    gradients = answers = dstate = None
    if wants_tokens:
        gradients = r.new_empty((chunks, heads, size, size))
        answers = r.new_empty((chunks, _CHUNK_TOKENS // _TILE_TOKENS, heads, size, _TILE_TOKENS))
    if wants_state:
        dstate = r.new_empty((sequences, heads, size, size), dtype=torch.float32)
    added, added_to = later or (None, None)
    r_of, w_of, a_of, b_of, dy_of = (part.of(x) for x in (r, w_raw, a, b, dy))
    form = _form_for(sequences * heads, r.device)
    form.backward(
        r, form.blocks * sequences * heads, form.threads, r_of, w_of, None, dy_of, a_of, b_of, dfinal, None, added,
        added_to, part.borders, 0, 0 if added is None else added.shape[0], part.count, heads, None, dstate, gradients,
        answers,
    )  # fmt: skip
    return gradients, answers, dstate


def _run_gradients(
    part: Part, tokens: Sequence[Any], kept: Sequence[Tensor | None], found: Sequence[Tensor | None], adds: bool
) -> None:
    """Writes the gradients of the tokens that are there: r, w_raw, k, v, a, b; `adds`: see `walk_back`."""
    batch, _, heads, _ = tokens[0].shape
    GRADIENTS(
        tokens[0], part.chunks(batch) * heads, _GRADIENT_THREADS, *(part.of(x) for x in tokens), *kept, part.borders,
        part.sequences(batch), part.count, heads, int(adds), *(None if x is None else part.of(x) for x in found),
    )  # fmt: skip


def wkv7_cuda(
    r: Tensor,
    w_raw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the CUDA kernels; arguments and results as `src.ops.wkv7.wkv7`, in bfloat16 at head size 64.

    Numerics: running state, its gradient and all sums in float32. Operands of the products that both walk through
    are rounded to tf32; those of the tokens' gradients to bfloat16, most of them in two terms. Saved for the
    backward: the inputs, the state every 32 tokens and the answers U, both in bfloat16 (together three times y);
    nothing when no gradient is wanted, and only r, w_raw, a and b when the state's alone is. Results are the same
    bits in every run.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
        RuntimeError: a launch failed.
        ValueError: there are too many tokens.
    """
    check_rows(r)
    parts = one_part(r.shape[1], cu_seqlens)
    y, final = _WKV7.apply(r, w_raw, k, v, a, b, state, parts, torch.is_grad_enabled())
    return y, final


def wkv7_branching_cuda(
    r: Tensor,
    w_raw: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    root_borders: Tensor,
    child_borders: Tensor,
    parents: Tensor,
    root_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Runs the kernels for roots and children in turn; arguments and results as `src.ops.wkv7.wkv7_branching`.

    Numerics, and what is saved, as `wkv7_cuda`. Unlike two calls of it this copies no tokens and no states; a root
    adds its children's gradients in their order.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
        RuntimeError: a launch failed.
        ValueError: there are too many tokens.
    """
    check_rows(r)
    parts = two_parts(r.shape[1], root_borders, child_borders, parents, root_tokens)
    y, final = _WKV7.apply(r, w_raw, k, v, a, b, state, parts, torch.is_grad_enabled())
    return y, final


def check_rows(r: Tensor) -> None:
    """Raises ValueError where [B, T, H, N] has more rows than the kernels can number."""
    rows = r.numel() // CUDA_HEAD_SIZE
    if rows >= _MOST_ROWS:
        raise ValueError(f"r has {rows} rows of {CUDA_HEAD_SIZE}, expected fewer than {_MOST_ROWS}")
