"""Frozen, quantised linear layers on bitsandbytes' functional interface.

The only module that imports bitsandbytes. A `FrozenLinear` keeps packed bytes and their scales, nothing else:
forward and backward each write the dense matrix into a buffer that all layers share, multiply, and forget it.

Storage of a [out, in] matrix, row-major, as bitsandbytes packs it (CPU and GPU alike):

    nf4, fp4, 4bit   two values per byte (the first in the high nibble), one absmax per 64 values; the absmax are
                     8-bit themselves, with one fp32 scale per 256 of them and one fp32 offset per matrix
                     ("double quantisation"): 4.127 bits per weight. "4bit" is fp4, bitsandbytes' default.
    int8             one byte per value into bitsandbytes' dynamic 256-entry code, one fp32 absmax per 256

Source: QLoRA, arXiv 2305.14314, sections 3 (NF4, double quantisation); 8-bit: arXiv 2110.02861, section 2.1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from src.errors import ConfigError

QUANT_TYPES = ("nf4", "fp4", "4bit", "int8")

_FOUR_BIT_CODE = {"nf4": "nf4", "fp4": "fp4", "4bit": "fp4"}
_FOUR_BIT_BLOCK = 64
_ABSMAX_BLOCK = 256
_INT8_BLOCK = 256


def _bitsandbytes_functional() -> Any:
    """Imports bitsandbytes on first use; silences its CPU backend's note on an optional package."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


_dynamic_codes: dict[torch.device, Tensor] = {}


def _dynamic_code(device: torch.device) -> Tensor:
    """bitsandbytes' signed dynamic 8-bit code, fp32 [256], once per device."""
    code = _dynamic_codes.get(device)
    if code is None:
        code = _bitsandbytes_functional().create_dynamic_map().to(device=device, dtype=torch.float32)
        _dynamic_codes[device] = code
    return code


@dataclass
class _Slot:
    """One buffer of a workspace and the layer whose matrix it holds at the moment (None: nobody's)."""

    buffer: Tensor
    owner: object | None = None


class DequantizationWorkspace:
    """The buffers that hold dense matrices between dequantisation and product.

    With `keep_dequantized` off there is one buffer per (device, dtype), as large as the largest matrix. With it
    on there is one per matrix kind (`FrozenLinear.slot`), and a buffer that still holds the caller's matrix is
    used as it is: the backward of a checkpointed layer then finds what its recomputation dequantised. That
    costs one layer of dense matrices.

    A buffer's contents are overwritten by the next dequantisation, in stream order: all layers that share a
    workspace must run on one stream per device, as a model's forward and backward do.
    """

    def __init__(self, keep_dequantized: bool = False) -> None:
        self._keep_dequantized = keep_dequantized
        self._slots: dict[tuple[torch.device, torch.dtype, str], _Slot] = {}

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
        self._slots.clear()

    @property
    def allocated_bytes(self) -> int:
        """Bytes all buffers take together."""
        return sum(slot.buffer.numel() * slot.buffer.element_size() for slot in self._slots.values())

    def matrix(self, layer: FrozenLinear, fill: Callable[[Tensor], None]) -> Tensor:
        """The layer's dense matrix [out, in] in a shared buffer, filled by `fill` unless still there."""
        name = layer.slot if self._keep_dequantized else ""
        key = (layer.packed.device, layer.compute_dtype, name)
        slot = self._slots.get(key)
        numel = layer.out_features * layer.in_features
        if slot is None or slot.buffer.numel() < numel:
            self._slots.pop(key, None)
            del slot
            slot = _Slot(torch.empty(numel, dtype=layer.compute_dtype, device=layer.packed.device))
            self._slots[key] = slot
        dense = slot.buffer[:numel].view(layer.out_features, layer.in_features)
        if not self._keep_dequantized or slot.owner is not layer.contents:
            slot.owner = None
            fill(dense)
            slot.owner = layer.contents
        return dense


SHARED_WORKSPACE = DequantizationWorkspace()
"""The workspace of every layer that is not given one of its own."""


class FrozenLinear(nn.Module):
    """y = x @ W.T with W [out, in] packed in 4 or 8 bits, no bias, never a gradient for W.

    Attributes:
        packed: uint8 [ceil(out * in / 2)] (4-bit types) or [out * in] (int8).
        absmax: scale per block: uint8 when double-quantised, else fp32.
        absmax_scale: fp32 [blocks / 256], scales of the 8-bit absmax; None without double quantisation.
        absmax_offset: fp32 0-d, mean absmax, subtracted before quantising them; None without double quantisation.
        slot: the matrix' kind, e.g. "key": matrices of one kind share a buffer in `keep_dequantized` mode.
    """

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
        slot: str = "",
        workspace: DequantizationWorkspace | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.quant_type = quant_type
        self.compute_dtype = compute_dtype
        self.slot = slot
        self.workspace = SHARED_WORKSPACE if workspace is None else workspace
        self.contents = object()
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
        slot: str = "",
        double_quantization: bool = True,
        workspace: DequantizationWorkspace | None = None,
    ) -> FrozenLinear:
        """Quantises a matrix on the device where it lies.

        Args:
            weight: [out, in], bf16, fp16 or fp32; not kept.
            quant_type: one of `QUANT_TYPES`.
            compute_dtype: dtype of the dense matrix and of the product.
            slot: the matrix' kind, see `DequantizationWorkspace`.
            double_quantization: 8-bit absmax for the 4-bit types; otherwise fp32 (4.5 instead of 4.127 bits).
            workspace: where dense matrices are written; None is the one all layers share.

        Raises:
            ConfigError: `quant_type` is none of `QUANT_TYPES`.
        """
        if quant_type not in QUANT_TYPES:
            raise ConfigError(
                f"--quant_type {quant_type} is unknown; choose one of {', '.join(QUANT_TYPES)}."
            )
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
                quant_type=_FOUR_BIT_CODE[quant_type],
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
            slot=slot,
            workspace=workspace,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype; the product runs in `compute_dtype`."""
        if x.dtype != self.compute_dtype:
            product: Tensor = _FrozenProduct.apply(x.to(self.compute_dtype), self)
            return product.to(x.dtype)
        result: Tensor = _FrozenProduct.apply(x, self)
        return result

    def dequantized(self) -> Tensor:
        """The matrix [out, in] in `compute_dtype`, in memory of its own."""
        dense = torch.empty(
            self.out_features, self.in_features, dtype=self.compute_dtype, device=self.packed.device
        )
        self._fill(dense)
        return dense

    def shared_dense(self) -> Tensor:
        """The matrix [out, in] in the workspace: valid until the next dequantisation, never to be kept."""
        return self.workspace.matrix(self, self._fill)

    def extra_repr(self) -> str:
        """Shape and storage, for `print(model)`."""
        return f"in={self.in_features}, out={self.out_features}, {self.quant_type}, {self.compute_dtype}"

    def _fill(self, dense: Tensor) -> None:
        """Writes the dense matrix into `dense`, [out, in] in `compute_dtype`, contiguous."""
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
            shape=dense.shape,
            dtype=dense.dtype,
            blocksize=_FOUR_BIT_BLOCK,
            quant_type=_FOUR_BIT_CODE[self.quant_type],
            offset=self.absmax_offset,
            state2=nested,
        )
        packed = self.packed.view(-1, 1)
        if dense.is_cuda:
            functional.dequantize_4bit(packed, state, out=dense)
        else:
            dense.copy_(functional.dequantize_4bit(packed, state))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        """Moves buffers between devices; a change of dtype would destroy them and is not followed."""

        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(move, recurse)
        self.contents = object()
        return self


class _FrozenProduct(torch.autograd.Function):
    """x @ W.T whose backward is dy @ W, with W dequantised in each of them; autograd keeps no tensor."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer  # type: ignore[attr-defined]
        return F.linear(x, layer.shared_dense())

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.layer.shared_dense(), None  # type: ignore[attr-defined]
