// Dequantisation of bitsandbytes' packed matrices to bf16 in one pass: packed bytes and 8-bit absmax in, values out.
//
// Bound by memory: 4-bit types with double quantisation read 0.516 and write 2 bytes per value. A thread makes 8
// neighbouring values at a time (one 16-byte store, coalesced over the warp) and has kUnroll of them in flight. The
// output is left in the L2 cache on purpose: the matrix product that follows reads it.

#include "types.cuh"

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

constexpr int kThreads = 256;
constexpr int kVector = 8;
constexpr int kUnroll = 4;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kAbsmaxBlock = 256;
constexpr int kMostMatrices = 5;

// Matrices that one launch dequantises, each by the blocks of one blockIdx.y.
struct Several {
  Packed matrix[kMostMatrices];
  uint4* output[kMostMatrices];
};

template <int kBits>
struct Traits;
template <>
struct Traits<4> {
  using Raw = uint32_t;  // 8 values
  static constexpr int kBlock = 64;
  static constexpr int kCodes = 16;
};
template <>
struct Traits<8> {
  using Raw = uint2;
  static constexpr int kBlock = 256;
  static constexpr int kCodes = 256;
};

template <bool kDouble>
struct Absmax {
  using Type = float;
};
template <>
struct Absmax<true> {
  using Type = uint8_t;
};

__device__ __forceinline__ int value_index(uint32_t raw, int i) {
  // Value 0 is the high nibble of byte 0, value 1 its low nibble, value 2 the high nibble of byte 1, ...
  return (raw >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0))) & 15u;
}

__device__ __forceinline__ int value_index(uint2 raw, int i) {
  return ((i < 4 ? raw.x : raw.y) >> (8 * (i % 4))) & 255u;
}

template <int kBits, bool kDouble>
__device__ __forceinline__ void to_bf16(const Packed& matrix, uint4* __restrict__ output) {
  using Raw = typename Traits<kBits>::Raw;
  using Scale = typename Absmax<kDouble>::Type;
  constexpr unsigned kVectorsPerBlock = Traits<kBits>::kBlock / kVector;
  const Raw* packed = static_cast<const Raw*>(matrix.packed);
  const unsigned vectors = unsigned(matrix.count / kVector);
  const unsigned stride = gridDim.x * kThreads;
  unsigned start = blockIdx.x * kThreads + threadIdx.x;
  Raw raw[kUnroll];
  Scale absmax[kUnroll];
  float absmax_scale[kUnroll];
  const auto fetch = [&] {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned vector = min(start + u * stride, vectors - 1);
      raw[u] = __ldcs(packed + vector);  // read once: leave the L2 cache to the output
      const unsigned block = vector / kVectorsPerBlock;
      absmax[u] = __ldg(static_cast<const Scale*>(matrix.absmax) + block);
      if (kDouble) absmax_scale[u] = __ldg(matrix.absmax_scale + block / kAbsmaxBlock);
    }
  };
  fetch();  // on its way while the tables are filled

  __shared__ float value_code[Traits<kBits>::kCodes];
  __shared__ float absmax_code[kDouble ? 256 : 1];
  for (int i = threadIdx.x; i < Traits<kBits>::kCodes; i += kThreads) value_code[i] = matrix.value_code[i];
  if (kDouble) {
    for (int i = threadIdx.x; i < 256; i += kThreads) absmax_code[i] = matrix.absmax_code[i];
  }
  const float offset = kDouble ? *matrix.absmax_offset : 0.0f;
  __syncthreads();

  for (; start < vectors; start += kUnroll * stride, fetch()) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned vector = start + u * stride;
      if (vector >= vectors) break;
      float scale;
      if constexpr (kDouble) {
        // Rounded twice, as bitsandbytes' two kernels do.
        scale = __fadd_rn(__fmul_rn(absmax_code[absmax[u]], absmax_scale[u]), offset);
      } else {
        scale = absmax[u];
      }
      uint32_t pair[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pair[i] = pack_bf16(value_code[value_index(raw[u], 2 * i)] * scale,
                            value_code[value_index(raw[u], 2 * i + 1)] * scale);
      }
      output[vector] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
  }
}

template <int kBits, bool kDouble>
__global__ void __launch_bounds__(kThreads) to_bf16_kernel(Packed matrix, uint4* __restrict__ output) {
  to_bf16<kBits, kDouble>(matrix, output);
}

template <int kBits, bool kDouble>
__global__ void __launch_bounds__(kThreads) several_to_bf16_kernel(Several matrices) {
  to_bf16<kBits, kDouble>(matrices.matrix[blockIdx.y], matrices.output[blockIdx.y]);
}

}  // namespace dequantize
