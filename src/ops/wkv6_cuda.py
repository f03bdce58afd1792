"""The WKV6 operator on NVIDIA GPUs: checks, memory and autograd around the kernels of `cuda/wkv6.cu`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from src.ops.kernels import SLOWER, Argument, Kernel, usable
from src.ops.node import Node
from src.ops.products import Places
from src.ops.totals import total_of_tiles

CUDA_HEAD_SIZE = 64
TILE_TOKENS = 16
_CHUNK_TOKENS = 64
_SHORTEST_SPAN = 2 * _CHUNK_TOKENS
_THREADS = 128
_MOST_ROWS = 2**27
"""The kernels number 4-byte words with 32 bits."""
_MOST_ITEMS = 65_535
"""Spans of sequences: what the second axis of a grid can have."""
_FORWARD_BLOCKS, _BACKWARD_BLOCKS = 4, 2
"""Blocks that fit on one multiprocessor of Hopper, as the kernels ask for."""

WITHOUT = f"The torch form of wkv6 is used instead, which is slower: {SLOWER}"

_LAYOUT = "(iiiPii)"
_SUMMARY = f"({_LAYOUT} PPPPP ?)"
_BACKWARD = f"({_LAYOUT} PPPPP P? PPP PPPP PPPP)"
FORWARD = Kernel("wkv6.cu", "wkv6::forward_kernel", f"({_LAYOUT} PPPP P? P?P PPPP PP)", shared_bytes=24_192)
FORWARD_SUMMARY = Kernel("wkv6.cu", "wkv6::summary_kernel<false>", _SUMMARY, shared_bytes=24_576)
BACKWARD_SUMMARY = Kernel("wkv6.cu", "wkv6::summary_kernel<true>", _SUMMARY, shared_bytes=24_576)
BACKWARD = Kernel("wkv6.cu", "wkv6::backward_kernel<false>", _BACKWARD, shared_bytes=83_968)
BACKWARD_WITH_U = Kernel("wkv6.cu", "wkv6::backward_kernel<true>", _BACKWARD, shared_bytes=83_968)
FOLD = Kernel("wkv6.cu", "wkv6::fold_kernel", _BACKWARD)
KERNELS = (FORWARD, FORWARD_SUMMARY, BACKWARD_SUMMARY, BACKWARD, BACKWARD_WITH_U, FOLD)


def kernels_for(head_size: int, *, trains_weights: bool) -> tuple[Kernel, ...]:
    """The kernels that training launches at this head size.

    Args:
        trains_weights: whether u is trained, too.
    """
    if head_size != CUDA_HEAD_SIZE:
        return ()
    return (BACKWARD_WITH_U if trains_weights else BACKWARD, FORWARD, FORWARD_SUMMARY, BACKWARD_SUMMARY, FOLD)


def kernel_is_available(device: torch.device) -> bool:
    """Whether the kernels can be used on this GPU; warns once, with the reason, when they cannot."""
    return usable((FORWARD, BACKWARD_SUMMARY, BACKWARD), device, WITHOUT)


def wkv6_cuda(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_raw: Tensor,
    u: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    span_tokens: int = 0,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the CUDA kernel; arguments and results as `src.ops.wkv6.wkv6`, in bfloat16 at head size 64.

    Numerics: running state, its gradient and all sums in float32; operands of matrix products rounded to
    bfloat16. Saved for the backward: the inputs, the state every 64 tokens in bfloat16 and the weights of token
    pairs inside tiles of 16 (together 1.25 times y); nothing when no gradient is wanted, and only r and w_raw when
    the state's alone is. Results are the same bits in every run.

    Args:
        span_tokens: long sequences are cut into spans of this many tokens (a multiple of 64) that run at
            the same time; 0 chooses from the size of the GPU.
        places: see `wkv6`.

    Raises:
        KernelError: the kernel cannot be compiled.
        RuntimeError: a tensor does not fit (named), or the launch failed.
    """
    tokens, u, state = _checked(r, k, v, w_raw, u, state)
    if cu_seqlens is not None:
        tokens = replace(tokens, borders=_borders(cu_seqlens, "cu_seqlens", tokens.r))
    _check_state(state, tokens)
    if not _need_gradient(tokens, u, state):
        y = torch.empty_like(tokens.r)
        return y, _run_forward(tokens, u, state, None, span_tokens, y, None)
    y, final = _Wkv6.apply(*tokens.all, u, state, tokens.borders, span_tokens, places)
    return y, final


def wkv6_branching_cuda(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w_raw: Tensor,
    u: Tensor,
    state: Tensor,
    root_borders: Tensor,
    child_borders: Tensor,
    parents: Tensor,
    root_tokens: int,
    *,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel for roots and children in turn; arguments and results as `src.ops.wkv6.wkv6_branching`.

    Numerics, and what is saved, as `wkv6_cuda`; results are the same bits in every run for at most two children of a
    root. Unlike two calls of it this copies no tokens and no states.

    Raises:
        KernelError: the kernel cannot be compiled.
        RuntimeError: a tensor does not fit (named), or the launch failed.
    """
    tokens, u, state = _checked(r, k, v, w_raw, u, state)
    root_borders = _borders(root_borders, "root_borders", tokens.r)
    child_borders = _borders(child_borders, "child_borders", tokens.r)
    _check_state(state, replace(tokens, borders=root_borders))
    _check_tensor(parents, "parents", tokens.r)
    children = child_borders.shape[0] - 1
    if parents.dtype is not torch.int64 or parents.shape != (children,):
        raise RuntimeError(f"parents is {parents.dtype} of shape {list(parents.shape)}, expected int64 [{children}]")
    if not 0 < root_tokens < tokens.r.shape[1]:
        raise RuntimeError(f"root_tokens is {root_tokens}, expected 1 to {tokens.r.shape[1] - 1}")
    arguments = (*tokens.all, u, state, root_borders, child_borders, parents, root_tokens)
    if not _need_gradient(tokens, u, state):
        return _Wkv6Branching.run(*arguments)[:2]  # type: ignore[arg-type]
    y, final = _Wkv6Branching.apply(*arguments, places)
    return y, final


@dataclass
class _Tokens:
    """The tokens of some sequences: r, k, v, w_raw [B, T, H, 64], and their borders when they are packed."""

    r: Tensor
    k: Tensor | None
    v: Tensor | None
    w_raw: Tensor
    borders: Tensor | None = None

    @property
    def all(self) -> tuple[Tensor | None, ...]:
        return self.r, self.k, self.v, self.w_raw

    @property
    def sequences(self) -> int:
        return self.r.shape[0] if self.borders is None else self.borders.shape[0] - 1

    def part(self, first: int, count: int, borders: Tensor | None) -> _Tokens:
        """Some tokens of a packed row."""
        k = None if self.k is None else self.k.narrow(1, first, count)
        v = None if self.v is None else self.v.narrow(1, first, count)
        return _Tokens(self.r.narrow(1, first, count), k, v, self.w_raw.narrow(1, first, count), borders)

    @classmethod
    def empty_like(cls, r: Tensor, places: Places | None) -> _Tokens:
        """r, k and v side by side, for those who take the gradients of all three (`ops.products`)."""
        places = places or Places(3)
        of_r, of_k, of_v = (places.empty_like(number, r) for number in range(3))
        return cls(of_r, of_k, of_v, torch.empty_like(r))


@dataclass
class _Kept:
    """What the backward of the tokens needs besides them."""

    checkpoints: Tensor
    pair_weights: Tensor

    @classmethod
    def empty_for(cls, tokens: _Tokens) -> _Kept:
        heads, length = tokens.r.shape[2], tokens.r.shape[1]
        if tokens.borders is None:
            chunks = tokens.sequences * _ceil_div(length, _CHUNK_TOKENS)
        else:
            chunks = length // _CHUNK_TOKENS + tokens.sequences
        tiles = _CHUNK_TOKENS // TILE_TOKENS
        return cls(
            tokens.r.new_empty(chunks, heads, CUDA_HEAD_SIZE, CUDA_HEAD_SIZE),
            tokens.r.new_empty(chunks, heads, tiles, TILE_TOKENS, TILE_TOKENS),
        )


class _Layout:
    """How the tokens divide into sequences, and these into spans that different blocks work on; scratch for spans.

    Attributes:
        values: the members of Wkv6Layout.
        grid: heads and items, which are spans of all sequences; with borders an upper bound.
        is_split: whether a sequence has more than one span.
        states, decays: scratch.
    """

    def __init__(self, tokens: _Tokens, span_tokens: int, blocks: int, *, needs_scratch: bool) -> None:
        r, borders = tokens.r, tokens.borders
        batch, length, heads, _ = r.shape
        if batch * length * heads >= _MOST_ROWS:
            raise RuntimeError(f"r has {batch * length * heads} rows of 64, expected fewer than {_MOST_ROWS}")
        if span_tokens == 0:
            span_tokens = _span_tokens_for(r, blocks)
        elif span_tokens < 0 or span_tokens % _CHUNK_TOKENS:
            raise RuntimeError(f"span_tokens is {span_tokens}, expected a multiple of {_CHUNK_TOKENS}")
        span_tokens = min(span_tokens, _ceil_div(length, _CHUNK_TOKENS) * _CHUNK_TOKENS)
        sequences = tokens.sequences
        items = batch * _ceil_div(length, span_tokens) if borders is None else length // span_tokens + sequences
        if items > _MOST_ITEMS:
            raise RuntimeError(f"there are {items} spans of sequences, more than a grid can have; use fewer rows")
        self.values: tuple[Argument, ...] = (heads, sequences, length, borders, span_tokens, items)
        self.grid = (heads, items, 1)
        self.is_split = span_tokens < length
        self.states = self.decays = None
        if needs_scratch or self.is_split:
            self.states = r.new_empty(items, heads, CUDA_HEAD_SIZE, CUDA_HEAD_SIZE, dtype=torch.float32)
            self.decays = r.new_empty(items, heads, CUDA_HEAD_SIZE, dtype=torch.float32)


def _run_forward(
    tokens: _Tokens, u: Tensor, state: Tensor, parents: Tensor | None, span_tokens: int, y: Tensor, kept: _Kept | None
) -> Tensor:
    """Writes y and returns the final states; writes `kept`, too, which the backward of the tokens needs.

    Args:
        parents: which of `state` each sequence starts from; None: its own.
    """
    r = tokens.r
    layout = _Layout(tokens, span_tokens, _FORWARD_BLOCKS, needs_scratch=False)
    scratch = (layout.states, layout.decays)
    final = r.new_empty(tokens.sequences, r.shape[2], CUDA_HEAD_SIZE, CUDA_HEAD_SIZE, dtype=torch.float32)
    if layout.is_split:
        FORWARD_SUMMARY(r, layout.grid, _THREADS, *layout.values, tokens.k, tokens.w_raw, tokens.v, *scratch, False)
    arguments: list[Argument] = [*layout.values, *tokens.all, u, u.dtype is torch.bfloat16]
    arguments += [state, state.ndim == 3, parents, y, final]
    arguments += [None, None] if kept is None else [kept.checkpoints, kept.pair_weights]
    FORWARD(r, layout.grid, _THREADS, *arguments, *scratch)
    return final


@dataclass
class _Gradients:
    """Gradients to be written: those of the tokens only where there are some, likewise the state's."""

    tokens: _Tokens | None = None
    state: Tensor | None = None
    u: Tensor | None = None


def _run_backward(
    tokens: _Tokens,
    u: Tensor | None,
    kept: _Kept | None,
    dy: Tensor,
    dfinal: Tensor | None,
    span_tokens: int,
    gradients: _Gradients,
    wants_u: bool,
) -> None:
    """Writes what `gradients` has room for; that of u, of each item, is made anew. `kept` goes with those of tokens."""
    to = gradients.tokens
    if to is None and gradients.state is None:
        return
    r = tokens.r
    blocks = _FORWARD_BLOCKS if to is None else _BACKWARD_BLOCKS
    layout = _Layout(tokens, span_tokens, blocks, needs_scratch=to is None)
    scratch = (layout.states, layout.decays)
    if to is None or layout.is_split:
        BACKWARD_SUMMARY(r, layout.grid, _THREADS, *layout.values, r, tokens.w_raw, dy, *scratch, to is None)
    if to is None:
        arguments: list[Argument] = [*layout.values, r, None, None, tokens.w_raw, dy, None, False, None, None, dfinal]
        arguments += [None, None, None, None, None, gradients.state]
        FOLD(r, (layout.grid[0], tokens.sequences, 1), _THREADS, *arguments, *scratch)
        return
    assert u is not None
    assert kept is not None
    heads, items, _ = layout.grid
    du = r.new_empty(items, heads, CUDA_HEAD_SIZE, dtype=torch.float32) if wants_u else None
    arguments = [*layout.values, *tokens.all, dy, u, u.dtype is torch.bfloat16]
    arguments += [kept.checkpoints, kept.pair_weights, dfinal, *to.all, du, gradients.state]
    (BACKWARD_WITH_U if wants_u else BACKWARD)(r, layout.grid, _THREADS, *arguments, *scratch)
    gradients.u = du


class _Wkv6(Node):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        w_raw: Tensor,
        u: Tensor,
        state: Tensor,
        borders: Tensor | None,
        span_tokens: int,
        places: Places | None,
    ) -> tuple[Tensor, Tensor]:
        tokens = _Tokens(r, k, v, w_raw, borders)
        kept = _Kept.empty_for(tokens) if any(ctx.needs_input_grad[:5]) else None
        y = torch.empty_like(r)
        final = _run_forward(tokens, u, state, None, span_tokens, y, kept)
        ctx.set_materialize_grads(False)
        ctx.span_tokens, ctx.state_is_shared, ctx.places = span_tokens, state.ndim == 3, places
        if kept is None:  # the state's gradient alone needs neither k nor v
            ctx.save_for_backward(r, w_raw, borders)
        else:
            ctx.save_for_backward(r, w_raw, borders, k, v, u, kept.checkpoints, kept.pair_weights)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        r, w_raw, borders, *rest = ctx.saved_tensors
        k, v, u, *kept = rest or (None, None, None)
        tokens = _Tokens(r, k, v, w_raw, borders)
        wants_state = ctx.needs_input_grad[5]
        gradients = _Gradients(
            _Tokens.empty_like(r, ctx.places) if rest else None,
            _empty_states(r, tokens.sequences) if wants_state else None,
        )
        dy = _output_gradient(dy, r)
        dfinal = None if dfinal is None else _prepared(dfinal)
        wants_u = ctx.needs_input_grad[4]
        of_tokens = _Kept(*kept) if rest else None
        _run_backward(tokens, u, of_tokens, dy, dfinal, ctx.span_tokens, gradients, wants_u)
        if gradients.u is not None:
            gradients.u = total_of_tiles(gradients.u)
        return *_input_gradients(gradients, u, ctx.state_is_shared), None, None, None


class _Wkv6Branching(Node):
    """Roots, then sequences that continue them: two passes over one row, so that nothing has to be cut or joined."""

    @staticmethod
    def run(
        r: Tensor,
        k: Tensor,
        v: Tensor,
        w_raw: Tensor,
        u: Tensor,
        state: Tensor,
        root_borders: Tensor,
        child_borders: Tensor,
        parents: Tensor,
        root_tokens: int,
        *,
        keeps: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[_Kept, _Kept] | None]:
        """y, final states, and what the backwards of roots and children need if `keeps`."""
        tokens, rest = _Tokens(r, k, v, w_raw), r.shape[1] - root_tokens
        y = torch.empty_like(r)
        roots = tokens.part(0, root_tokens, root_borders)
        children = tokens.part(root_tokens, rest, child_borders)
        kept = (_Kept.empty_for(roots), _Kept.empty_for(children)) if keeps else None
        of_roots, of_children = kept or (None, None)
        final = _run_forward(roots, u, state, None, 0, y.narrow(1, 0, root_tokens), of_roots)
        _run_forward(children, u, final, parents, 0, y.narrow(1, root_tokens, rest), of_children)
        return y, final, kept

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        w_raw: Tensor,
        u: Tensor,
        state: Tensor,
        root_borders: Tensor,
        child_borders: Tensor,
        parents: Tensor,
        root_tokens: int,
        places: Places | None,
    ) -> tuple[Tensor, Tensor]:
        keeps = any(ctx.needs_input_grad[:5])
        y, final, kept = _Wkv6Branching.run(
            r, k, v, w_raw, u, state, root_borders, child_borders, parents, root_tokens, keeps=keeps
        )
        ctx.set_materialize_grads(False)
        ctx.root_tokens, ctx.state_is_shared, ctx.places = root_tokens, state.ndim == 3, places
        always = (r, w_raw, root_borders, child_borders, parents)
        if kept is None:
            ctx.save_for_backward(*always)
        else:
            pieces = (part for of_part in kept for part in (of_part.checkpoints, of_part.pair_weights))
            ctx.save_for_backward(*always, k, v, u, *pieces)
        return y, final

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        r, w_raw, root_borders, child_borders, parents, *others = ctx.saved_tensors
        k, v, u, *pieces = others or (None, None, None)
        root_tokens, rest = ctx.root_tokens, r.shape[1] - ctx.root_tokens
        dy = _output_gradient(dy, r)
        tokens = _Tokens(r, k, v, w_raw)
        wants_u = ctx.needs_input_grad[4]
        whole, roots = _Gradients(), _Gradients()
        children = _Gradients(state=_empty_states(r, parents.shape[0]))
        if others:
            whole.tokens = _Tokens.empty_like(r, ctx.places)
            roots.tokens = whole.tokens.part(0, root_tokens, None)
            children.tokens = whole.tokens.part(root_tokens, rest, None)
        part, kept = tokens.part(root_tokens, rest, child_borders), _Kept(*pieces[2:]) if others else None
        _run_backward(part, u, kept, dy.narrow(1, root_tokens, rest), None, 0, children, wants_u)
        root_count = root_borders.shape[0] - 1
        dfinal = _empty_states(r, root_count).zero_() if dfinal is None else _prepared(dfinal.clone())
        assert children.state is not None
        dfinal.index_add_(0, parents, children.state)
        if ctx.needs_input_grad[5]:
            roots.state = _empty_states(r, root_count)
        part, kept = tokens.part(0, root_tokens, root_borders), _Kept(*pieces[:2]) if others else None
        _run_backward(part, u, kept, dy.narrow(1, 0, root_tokens), dfinal, 0, roots, wants_u)
        whole.state = roots.state
        if roots.u is not None and children.u is not None:
            whole.u = roots.u.sum(0) + children.u.sum(0)
        return *_input_gradients(whole, u, ctx.state_is_shared), None, None, None, None, None


def _input_gradients(gradients: _Gradients, u: Tensor | None, state_is_shared: bool) -> tuple[Tensor | None, ...]:
    """Those of r, k, v, w_raw, u and state."""
    of_tokens = (None, None, None, None) if gradients.tokens is None else gradients.tokens.all
    of_u = None if gradients.u is None or u is None else gradients.u.to(u.dtype)
    of_state = gradients.state
    if of_state is not None and state_is_shared:  # a sum in a fixed order: the same bits in every run
        of_state = of_state.squeeze(0) if of_state.shape[0] == 1 else of_state.sum(0)
    return *of_tokens, of_u, of_state


def _empty_states(r: Tensor, sequences: int) -> Tensor:
    return r.new_empty(sequences, r.shape[2], CUDA_HEAD_SIZE, CUDA_HEAD_SIZE, dtype=torch.float32)


def _output_gradient(given: Tensor | None, r: Tensor) -> Tensor:
    dy = torch.zeros_like(r) if given is None else _prepared(given)
    _check_tokens(dy, "the gradient of y", r)
    return dy


def _span_tokens_for(r: Tensor, blocks_per_multiprocessor: int) -> int:
    """Spans so short that the GPU is full, or whole sequences when these fill it."""
    blocks = blocks_per_multiprocessor * _multiprocessors(r.get_device())
    wanted = _ceil_div(_ceil_div(r.shape[0] * r.shape[1] * r.shape[2], blocks), _CHUNK_TOKENS) * _CHUNK_TOKENS
    return max(wanted, _SHORTEST_SPAN)


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _checked(
    r: Tensor, k: Tensor, v: Tensor, w_raw: Tensor, u: Tensor, state: Tensor
) -> tuple[_Tokens, Tensor, Tensor]:
    """The arguments of both operators, contiguous."""
    r, k, v, w_raw, state = _prepared(r), _prepared(k), _prepared(v), _prepared(w_raw), _prepared(state)
    u = _prepared(u if u.dtype in (torch.float32, torch.bfloat16) else u.float())
    if not r.is_cuda:
        raise RuntimeError(f"r is on {r.device}, expected a CUDA device")
    if r.ndim != 4 or r.shape[3] != CUDA_HEAD_SIZE or r.numel() == 0:
        raise RuntimeError(f"r has shape {list(r.shape)}, expected [B, T, H, 64]")
    for name, tensor in (("r", r), ("k", k), ("v", v), ("w_raw", w_raw)):
        _check_tokens(tensor, name, r)
    _check_tensor(u, "u", r)
    if u.shape != r.shape[2:]:
        raise RuntimeError(f"u has shape {list(u.shape)}, expected {list(r.shape[2:])}")
    _check_tensor(state, "state", r)
    if state.dtype is not torch.float32:
        raise RuntimeError(f"state has dtype {state.dtype}, expected float32")
    return _Tokens(r, k, v, w_raw), u, state


def _check_state(state: Tensor, tokens: _Tokens) -> None:
    alone = (tokens.r.shape[2], CUDA_HEAD_SIZE, CUDA_HEAD_SIZE)
    if state.shape != alone and state.shape != (tokens.sequences, *alone):
        raise RuntimeError(
            f"state has shape {list(state.shape)}, expected {list(alone)}, alone or {tokens.sequences} times"
        )


def _borders(given: Tensor, name: str, r: Tensor) -> Tensor:
    borders = given.to(torch.int32).contiguous()
    if borders.device != r.device:
        raise RuntimeError(f"{name} is on {borders.device}, expected r's device {r.device}")
    if borders.ndim != 1 or borders.shape[0] < 2 or r.shape[0] != 1:
        raise RuntimeError(
            f"{name} has shape {list(borders.shape)} beside batch size {r.shape[0]}, expected [S + 1] beside 1"
        )
    return borders


def _need_gradient(tokens: _Tokens, u: Tensor, state: Tensor) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (*tokens.all, u, state)
    )


def _check_tokens(tensor: Tensor, name: str, r: Tensor) -> None:
    _check_tensor(tensor, name, r)
    if tensor.dtype is not torch.bfloat16:
        raise RuntimeError(f"{name} has dtype {tensor.dtype}, expected bfloat16")
    if tensor.shape != r.shape:
        raise RuntimeError(f"{name} has shape {list(tensor.shape)}, expected r's {list(r.shape)}")


def _check_tensor(tensor: Tensor, name: str, r: Tensor) -> None:
    if tensor.device != r.device:
        raise RuntimeError(f"{name} is on {tensor.device}, expected the CUDA device of r, {r.device}")
    if not tensor.is_contiguous():
        raise RuntimeError(f"{name} is not contiguous")


def _prepared(tensor: Tensor) -> Tensor:
    """Contiguous and on 16 bytes, copied only when it is not."""
    dense = tensor if tensor.is_contiguous() else tensor.contiguous()
    return dense.clone() if dense.data_ptr() % 16 else dense


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("wkv6 has no second derivative")
