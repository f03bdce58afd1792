"""Frozen, quantised linear layers on bitsandbytes' functional interface.

The only module that imports bitsandbytes, but for its optimizers in `src.training`. A `FrozenLinear` keeps packed bytes
and their scales, nothing else: forward and backward each write the dense matrix into a buffer that layers share, unless
it still stands there, and multiply.

Storage of a [out, in] matrix, row-major, as bitsandbytes packs it (CPU and GPU alike):

    nf4, fp4, 4bit   two values per byte (the first in the high nibble), one absmax per 64 values; the absmax are
                     8-bit themselves, with one fp32 scale per 256 of them and one fp32 offset per matrix
                     ("double quantisation"): 4.127 bits per weight. "4bit" is fp4, bitsandbytes' default.
    int8             one byte per value into bitsandbytes' dynamic 256-entry code, one fp32 absmax per 256

Source: QLoRA, arXiv 2305.14314, sections 3 (NF4, double quantisation); 8-bit: arXiv 2110.02861, section 2.1.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from src.config.model import QUANT_TYPES, quant_name
from src.ops.dequantize_cuda import KERNELS, MOST_TOGETHER, OF_SEVERAL, PackedMatrix, filler
from src.ops.kernels import Kernel, usable
from src.ops.node import Node
from src.startup import uncompiled_imports

_FOUR_BIT_BLOCK = 64
_ABSMAX_BLOCK = 256
_INT8_BLOCK = 256
_HEAD_PART_VALUES = 1 << 24


@functools.cache
def _bitsandbytes_functional() -> Any:
    """Imports bitsandbytes on first use; silences its CPU backend's note on an optional package."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with uncompiled_imports():
        import bitsandbytes.functional

    return bitsandbytes.functional


def kernels_for(quant_type: str) -> tuple[Kernel, ...]:
    """The CUDA kernels that a type of packing needs, in double quantisation as far as it has one."""
    kind = (8, False) if quant_type == "int8" else (4, True)
    return KERNELS[kind], OF_SEVERAL[kind]


def dequantization_kernels(device: torch.device) -> bool:
    """Whether the kernels of `cuda/dequantize.cu` can be used on this GPU; one warning says why not."""
    return usable(
        (*KERNELS.values(), *OF_SEVERAL.values()), device, "bitsandbytes dequantises instead, at half the speed."
    )


@functools.cache
def _dynamic_code(device: torch.device) -> Tensor:
    """bitsandbytes' signed dynamic 8-bit code, fp32 [256], once per device."""
    code: Tensor = _bitsandbytes_functional().create_dynamic_map()
    return code.to(device=device, dtype=torch.float32)


@functools.cache
def _four_bit_code(name: str, device: torch.device) -> Tensor:
    """The 16 values of "nf4" or "fp4", fp32, once per device; fp4's code 8 is -0, as in bitsandbytes' kernel."""
    code: Tensor = _bitsandbytes_functional().get_4bit_type(name, device=device)
    if name == "fp4":
        code[8] = -0.0
    return code


@dataclass(eq=False)
class _Held:
    """One buffer of a workspace.

    Attributes:
        owner: `FrozenLinear.identity` of the layer whose matrix it holds; None: nobody's.
        version: of that layer's packed data.
        places: of layers in it.
    """

    buffer: Tensor
    owner: object | None = None
    version: int = 0
    places: weakref.WeakSet[_Place] = field(default_factory=weakref.WeakSet)


@dataclass(eq=False)
class _Place:
    """A layer's matrix in a workspace.

    Attributes:
        held: the buffer.
        dense: a view of it, [out, in]; None where the buffer is gone.
        fill: has the kernel write the matrix there; None where it does not.
        together: of matrices of which this is the first.
    """

    held: _Held
    dense: Tensor | None
    fill: Callable[[], None] | None
    together: _Together | None = None


@dataclass(frozen=True)
class _Together:
    """Matrices that are written by one launch.

    Attributes:
        identities: of the layers.
        held: the buffers.
        fill: writes them; None where they have to be written one by one.
    """

    identities: list[object]
    held: list[_Held]
    fill: Callable[[], None] | None


def _holds(held: _Held, identity: object, version: int) -> bool:
    return held.owner is identity and held.version == version


class DequantizationWorkspace:
    """The buffers that hold dense matrices between dequantisation and product.

    With `keep_dequantized` off there is one buffer per (device, dtype), as large as the largest matrix. With it
    on there is one per matrix kind (`FrozenLinear.kind`); kinds without a name go on sharing one. A buffer that
    still holds the caller's matrix is used as it is: the backward of a recomputed layer then finds what its
    recomputation dequantised, all of it or, in one buffer, the last.

    A buffer's contents are overwritten by the next dequantisation, in stream order: all layers that share a
    workspace must run on one stream per device, as a model's forward and backward do. Call `forget` before
    capturing a CUDA graph and after it and each replay: neither must find matrices that are not there.
    """

    def __init__(self, keep_dequantized: bool = False) -> None:
        self._keep_dequantized = keep_dequantized
        self._held: dict[tuple[torch.device, torch.dtype, str], _Held] = {}

    @property
    def keep_dequantized(self) -> bool:
        """Whether matrices of different kinds have buffers of their own; setting it frees all buffers."""
        return self._keep_dequantized

    @keep_dequantized.setter
    def keep_dequantized(self, keep: bool) -> None:
        self._keep_dequantized = keep
        self.clear()

    def clear(self) -> None:
        """Frees every buffer; later calls allocate anew."""
        for key in list(self._held):
            self._free(key)

    def forget(self) -> None:
        """Takes every buffer's contents for unknown."""
        for held in self._held.values():
            held.owner = None

    def reserve(self, layers: Iterable[FrozenLinear]) -> None:
        """Allocates the buffers that these layers will use, side by side, so that none is put between other tensors.

        It does so by dequantising each, the largest first: a buffer that had to grow would move.
        """
        for layer in sorted(layers, key=lambda layer: -layer.out_features * layer.in_features):
            layer.shared_dense()

    def buffers(self) -> list[Tensor]:
        """All buffers there are; a CUDA graph that uses them has to keep them."""
        return [held.buffer for held in self._held.values()]

    def __deepcopy__(self, memo: dict[int, Any]) -> DequantizationWorkspace:
        """Copies of layers go on sharing the buffers."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickles the setting, not the buffers."""
        return {"_keep_dequantized": self._keep_dequantized, "_held": {}}

    def matrix(self, layer: FrozenLinear) -> Tensor:
        """The layer's dense matrix [out, in] in a shared buffer, written there unless it still is."""
        place = layer.place
        if place is None or (dense := place.dense) is None:
            place, dense = self._place_for(layer)
        held, version = place.held, layer.version()
        if not _holds(held, layer.identity, version):
            held.owner = None
            if place.fill is not None:
                place.fill()
            else:
                layer.fill(dense)
            held.owner, held.version = layer.identity, version
        return dense

    def fill_together(self, layers: Sequence[FrozenLinear]) -> None:
        """Dequantises several layers' matrices by one launch, where each has a buffer of its own.

        It takes no more memory than to do so one by one, as these buffers outlast their use.
        """
        if not self._keep_dequantized or not 1 < len(layers) <= MOST_TOGETHER:
            return
        first, identities = layers[0].place, [layer.identity for layer in layers]
        known = None if first is None else first.together
        if known is None or known.identities != identities:
            known = self._together(layers, identities)
        if known.fill is None:
            return
        versions = [layer.version() for layer in layers]
        if all(map(_holds, known.held, identities, versions)):
            return
        for held in known.held:
            held.owner = None
        known.fill()
        for held, identity, version in zip(known.held, identities, versions, strict=True):
            held.owner, held.version = identity, version

    def _together(self, layers: Sequence[FrozenLinear], identities: list[object]) -> _Together:
        """Without `fill` where they share a buffer or there is no kernel."""
        places, dense = zip(*map(self._place_for, layers), strict=True)
        matrices = [matrix for layer in layers if (matrix := layer.packed_matrix())]
        held = [place.held for place in places]
        gone = any(place.dense is None for place in places)  # one's buffer, for a larger one of its kind
        one_by_one = len(matrices) < len(layers) or len(set(held)) < len(layers) or gone
        together = _Together(identities, held, None if one_by_one else filler(matrices, dense))
        places[0].together = together
        return together

    def _place_for(self, layer: FrozenLinear) -> tuple[_Place, Tensor]:
        """A layer's place and its matrix there, in a new buffer where there is none or one that is too small."""
        if layer.place is not None and layer.place.dense is not None:
            return layer.place, layer.place.dense
        device = layer.packed.device
        key = (device, layer.compute_dtype, layer.kind if self._keep_dequantized else "")
        held = self._held.get(key)
        rows, columns = layer.out_features, layer.in_features
        if held is None or held.buffer.numel() < rows * columns:
            del held
            self._free(key)
            held = self._held[key] = _Held(torch.empty(rows * columns, dtype=layer.compute_dtype, device=device))
        dense = held.buffer.as_strided((rows, columns), (columns, 1))
        matrix = layer.packed_matrix()
        place = layer.place = _Place(held, dense, matrix.filler(dense) if matrix else None)
        held.places.add(place)
        return place, dense

    def _free(self, key: tuple[torch.device, torch.dtype, str]) -> None:
        freed = self._held.pop(key, None)
        for held in self._held.values():
            for place in held.places:
                place.together = None
        if freed is not None:
            freed.buffer = freed.buffer.new_empty(0)  # layers still know their places in it
            for place in freed.places:
                place.dense = place.fill = place.together = None


class FrozenLinear(nn.Module):
    """y = x @ W.T with W [out, in] packed in 4 or 8 bits, no bias, never a gradient for W.

    Attributes:
        packed: uint8 [ceil(out * in / 2)] (4-bit types) or [out * in] (int8).
        absmax: scale per block: uint8 when double-quantised, else fp32.
        absmax_scale: fp32 [blocks / 256], scales of the 8-bit absmax; None without double quantisation.
        absmax_offset: fp32 0-d, mean absmax, subtracted before quantising them; None without double quantisation.
        kind: e.g. "key": matrices of one kind share a buffer in `keep_dequantized` mode.
        identity: of the packed data; another one when they are replaced.
        room: see `layers.Linear`; none.
        place: where the dense matrix is written, once it has been.
    """

    room = 0
    packed: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        *,
        shape: tuple[int, int],
        quant_type: str,
        compute_dtype: torch.dtype,
        kind: str = "",
        workspace: DequantizationWorkspace,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.quant_type = quant_type
        self.compute_dtype = compute_dtype
        self.kind = kind
        self.workspace = workspace
        self.identity = object()
        self.place: _Place | None = None
        self._data: tuple[Tensor, ...] | None = None
        self._packed_matrix: PackedMatrix | None = None
        self._kernel_sought = False
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.register_buffer("absmax_scale", absmax_scale, persistent=False)
        self.register_buffer("absmax_offset", absmax_offset, persistent=False)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        quant_type: str,
        compute_dtype: torch.dtype,
        *,
        kind: str = "",
        double_quantization: bool = True,
        workspace: DequantizationWorkspace,
    ) -> FrozenLinear:
        """Quantises a matrix on the device where it lies.

        Args:
            weight: [out, in], bf16, fp16 or fp32; not kept.
            quant_type: one of `QUANT_TYPES`.
            compute_dtype: dtype of the dense matrix and of the product.
            kind: see `DequantizationWorkspace`.
            double_quantization: 8-bit absmax for the 4-bit types; otherwise fp32 (4.5 instead of 4.127 bits).
            workspace: where dense matrices are written: one for all layers of a model.
        """
        assert quant_type in QUANT_TYPES, f"{quant_type} is none of {QUANT_TYPES}"
        assert weight.ndim == 2, f"weight has shape {tuple(weight.shape)}, expected [out, in]"
        functional = _bitsandbytes_functional()
        dense = weight.detach().contiguous()
        shape = (weight.shape[0], weight.shape[1])
        absmax_scale = absmax_offset = None
        if quant_type == "int8":
            packed, state = functional.quantize_blockwise(
                dense, code=_dynamic_code(weight.device), blocksize=_INT8_BLOCK
            )
        else:
            packed, state = functional.quantize_4bit(
                dense,
                blocksize=_FOUR_BIT_BLOCK,
                compress_statistics=double_quantization,
                quant_type=quant_name(quant_type),
            )
            if double_quantization:
                absmax_scale, absmax_offset = state.state2.absmax, state.offset
        return cls(
            packed.view(-1),
            state.absmax,
            absmax_scale,
            absmax_offset,
            shape=shape,
            quant_type=quant_type,
            compute_dtype=compute_dtype,
            kind=kind,
            workspace=workspace,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype; the product runs in `compute_dtype`."""
        if x.shape[-1] != self.in_features or x.device != self._buffers["packed"].device:  # type: ignore[union-attr]
            raise RuntimeError(
                f"x has shape {list(x.shape)} and is on {x.device}, expected [..., {self.in_features}] on "
                f"{self.packed.device}"
            )
        if x.dtype is not self.compute_dtype:
            return self._product(x.to(self.compute_dtype)).to(x.dtype)
        return self._product(x)

    def trained(self) -> list[nn.Parameter]:
        """Nothing; see `layers.Linear`."""
        return []

    def remembers(self) -> Tensor | None:
        """Nothing; see `layers.Linear`."""
        return None

    def kept(self, x: Tensor, known: Tensor | None = None) -> tuple[Tensor, ...]:
        """Nothing; see `layers.Linear`."""
        return ()

    def product(self, x: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """See `layers.Linear`."""
        return self(x)  # type: ignore[no-any-return]

    def add_product(self, x: Tensor, y: Tensor) -> None:
        """See `layers.Linear`."""
        if x.dtype is self.compute_dtype:
            y.addmm_(x, self.shared_dense().t())
        else:
            y.add_(self(x))

    def gradient_into(self, grad_output: Tensor, grad_x: Tensor) -> None:
        """See `layers.Linear`."""
        if grad_output.dtype is self.compute_dtype:
            torch.mm(grad_output, self.shared_dense(), out=grad_x)
        else:
            grad_x.copy_(self.gradients(grad_output)[0])

    def add_gradient(self, grad_output: Tensor, grad_x: Tensor) -> None:
        """See `layers.Linear`."""
        if grad_output.dtype is self.compute_dtype:
            grad_x.addmm_(grad_output, self.shared_dense())
        else:
            grad_x.add_(self.gradients(grad_output)[0])

    def gradients(self, grad_output: Tensor) -> tuple[Tensor, Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]]:
        """The gradient of x [..., in] from that of the result [..., out], in its dtype; see `layers.Linear`."""
        if grad_output.dtype is self.compute_dtype:
            return grad_output @ self.shared_dense(), _nothing
        grad_x = (grad_output.to(self.compute_dtype) @ self.shared_dense()).to(grad_output.dtype)
        return grad_x, _nothing

    def dequantized(self) -> Tensor:
        """The matrix [out, in] in `compute_dtype`, in memory of its own."""
        dense = torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype, device=self.packed.device)
        self.fill(dense)
        return dense

    def version(self) -> int:
        """Changes when the packed data are written in place."""
        if self._data is None:
            self._data = tuple(self.buffers())
        version = 0
        for tensor in self._data:
            version += tensor._version
        return version

    def shared_dense(self) -> Tensor:
        """The matrix [out, in] in the workspace: valid until the next dequantisation, never to be kept."""
        return self.workspace.matrix(self)

    def _product(self, x: Tensor) -> Tensor:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.shared_dense())
        result: Tensor = _FrozenProduct.apply(x, self)
        return result

    def packed_matrix(self) -> PackedMatrix | None:
        """This matrix as the kernel takes it where it can (GPU, bf16), None elsewhere."""
        if not self._kernel_sought:
            self._kernel_sought = True
            on_gpu = self.packed.is_cuda and self.compute_dtype is torch.bfloat16
            whole_vectors = self.in_features * self.out_features % 8 == 0
            if on_gpu and whole_vectors and dequantization_kernels(self.packed.device):
                self._packed_matrix = self._described()
        return self._packed_matrix

    def _described(self) -> PackedMatrix:
        device = self.packed.device
        dynamic = _dynamic_code(device)
        four_bit = self.quant_type != "int8"
        return PackedMatrix(
            self.packed,
            self.absmax,
            self.absmax_scale,
            self.absmax_offset,
            dynamic,
            _four_bit_code(quant_name(self.quant_type), device) if four_bit else dynamic,
            4 if four_bit else 8,
            self.out_features * self.in_features,
        )

    def extra_repr(self) -> str:
        """Shape and storage, for `print(model)`."""
        return f"in={self.in_features}, out={self.out_features}, {self.quant_type}, {self.compute_dtype}"

    def fill(self, dense: Tensor) -> None:
        """Writes the dense matrix into `dense`, [out, in] in `compute_dtype`, contiguous."""
        if (matrix := self.packed_matrix()) is not None:
            matrix.fill(dense)
        else:
            self._fill_by_bitsandbytes(dense)

    def _fill_by_bitsandbytes(self, dense: Tensor) -> None:
        functional = _bitsandbytes_functional()
        code = _dynamic_code(self.packed.device)
        if self.quant_type == "int8":
            arguments = (self.packed.view(dense.shape), self.absmax, code, _INT8_BLOCK, dense.dtype)
            if dense.is_cuda:
                torch.ops.bitsandbytes.dequantize_blockwise.out(*arguments, out=dense)
            else:
                dense.copy_(torch.ops.bitsandbytes.dequantize_blockwise.default(*arguments))
            return
        nested = None
        if self.absmax_scale is not None:
            nested = functional.QuantState(
                absmax=self.absmax_scale, code=code, blocksize=_ABSMAX_BLOCK, dtype=torch.float32
            )
        state = functional.QuantState(
            absmax=self.absmax,
            shape=dense.shape if dense.is_cuda else self._rows_of_blocks(),
            dtype=dense.dtype,
            blocksize=_FOUR_BIT_BLOCK,
            quant_type=quant_name(self.quant_type),
            offset=self.absmax_offset,
            state2=nested,
        )
        packed = self.packed.view(-1, 1)
        if dense.is_cuda:
            functional.dequantize_4bit(packed, state, out=dense)
        else:
            dense.copy_(functional.dequantize_4bit(packed, state).reshape(dense.shape))

    def _rows_of_blocks(self) -> tuple[int, int]:
        """The shape in which bitsandbytes' CPU kernel is to see a 4-bit matrix: whole blocks a row, or a single row.

        With AVX-512 it takes a row to begin with scale number row * (in_features // block), whatever the size.
        """
        numel = self.out_features * self.in_features
        return (1, numel) if numel % _FOUR_BIT_BLOCK else (numel // _FOUR_BIT_BLOCK, _FOUR_BIT_BLOCK)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Moves buffers between devices; a change of dtype would destroy them and is not followed."""

        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(move, recurse)
        self._forget_derived()
        return self

    def _forget_derived(self) -> None:
        """Drops what refers to the buffers as they were."""
        self.identity = object()
        self.place = self._data = self._packed_matrix = None
        self._kernel_sought = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles without what refers to the buffers; the copy makes its own."""
        derived = ("place", "_data", "_packed_matrix")
        return {**self.__dict__, "identity": object(), "_kernel_sought": False, **dict.fromkeys(derived)}


def _nothing(kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of what a frozen matrix trains."""
    return ()


class FrozenHead(nn.Module):
    """y = x @ W.T with W [vocabulary, in] packed in parts of the vocabulary, so that no dense whole need exist.

    Attributes:
        parts: `FrozenLinear`s of consecutive rows.
    """

    def __init__(self, parts: Iterable[FrozenLinear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    @classmethod
    def from_weight(
        cls, weight: Tensor, quant_type: str, compute_dtype: torch.dtype, workspace: DequantizationWorkspace
    ) -> FrozenHead:
        """Quantises a matrix where it lies; arguments as for `FrozenLinear.from_weight`."""
        parts = weight.split(max(1, _HEAD_PART_VALUES // weight.shape[1]))
        return cls(FrozenLinear.from_weight(part, quant_type, compute_dtype, workspace=workspace) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., vocabulary]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def dense_parts(self) -> list[Callable[[], Tensor]]:
        """Functions that give the parts' matrices [V_i, in], in order; see `FrozenLinear.shared_dense`."""
        return [part.shared_dense for part in self.parts if isinstance(part, FrozenLinear)]


class _FrozenProduct(Node):
    """x @ W.T whose backward is dy @ W, with W dequantised in each of them; autograd keeps no tensor."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer  # type: ignore[attr-defined]
        return F.linear(x, layer.shared_dense())

    @staticmethod
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("the product with a packed matrix has no second derivative")
        return grad_output @ ctx.layer.shared_dense(), None  # type: ignore[attr-defined]
