// Launcher of the dequantisation kernel, between dequantize.cu (no torch header) and dequantize_binding.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dequantize {

// A matrix as bitsandbytes packs it. 4-bit types: two values per byte, the first in the high nibble, blocks of 64
// values. 8-bit: one value per byte, blocks of 256.
struct Packed {
  const void* packed;          // 16-byte aligned
  const void* absmax;          // one per block: uint8 when absmax_scale is given, else fp32
  const float* absmax_scale;   // one per 256 absmax; null: no double quantisation (always so with 8 bits)
  const float* absmax_offset;  // one; null exactly when absmax_scale is
  const float* absmax_code;    // 256 values; needed when absmax_scale is given
  const float* value_code;     // 16 values (4 bits) or 256 (8 bits)
  int bits;                    // 4 or 8
  int64_t count;               // values, a multiple of 8
};

// Writes `count` bf16 values, contiguous and 16-byte aligned: bf16(code[value] * absmax) with
// absmax = absmax_code[q] * scale + offset, each operation rounded in fp32 as bitsandbytes does.
cudaError_t to_bf16(const Packed& matrix, void* output, cudaStream_t stream);

}  // namespace dequantize
