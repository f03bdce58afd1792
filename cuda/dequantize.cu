// Dequantisation of bitsandbytes' packed matrices to bf16 in one pass: packed bytes and 8-bit absmax in, values out.
//
// Bound by memory: 4-bit types with double quantisation read 0.516 and write 2 bytes per value. A thread makes 8
// neighbouring values at a time (one 16-byte store, coalesced over the warp) and has kUnroll of them in flight. The
// output is left in the L2 cache on purpose: the matrix product that follows reads it.

#include <cuda_bf16.h>

#include <type_traits>

#include "dequantize.h"

namespace dequantize {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;
constexpr int kUnroll = 4;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kAbsmaxBlock = 256;

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

__device__ __forceinline__ int value_index(uint32_t raw, int i) {
  // Value 0 is the high nibble of byte 0, value 1 its low nibble, value 2 the high nibble of byte 1, ...
  return (raw >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0))) & 15u;
}

__device__ __forceinline__ int value_index(uint2 raw, int i) {
  return ((i < 4 ? raw.x : raw.y) >> (8 * (i % 4))) & 255u;
}

template <int kBits, bool kDouble>
__global__ void __launch_bounds__(kThreads) to_bf16_kernel(Packed matrix, uint4* __restrict__ output) {
  using Raw = typename Traits<kBits>::Raw;
  using Absmax = std::conditional_t<kDouble, uint8_t, float>;
  constexpr unsigned kVectorsPerBlock = Traits<kBits>::kBlock / kVector;
  const Raw* packed = static_cast<const Raw*>(matrix.packed);
  const unsigned vectors = unsigned(matrix.count / kVector);
  const unsigned stride = gridDim.x * kThreads;
  unsigned start = blockIdx.x * kThreads + threadIdx.x;
  Raw raw[kUnroll];
  Absmax absmax[kUnroll];
  float absmax_scale[kUnroll];
  const auto fetch = [&] {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned vector = min(start + u * stride, vectors - 1);
      raw[u] = __ldcs(packed + vector);  // read once: leave the L2 cache to the output
      const unsigned block = vector / kVectorsPerBlock;
      absmax[u] = __ldg(static_cast<const Absmax*>(matrix.absmax) + block);
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
        const __nv_bfloat162 rounded = __floats2bfloat162_rn(value_code[value_index(raw[u], 2 * i)] * scale,
                                                             value_code[value_index(raw[u], 2 * i + 1)] * scale);
        pair[i] = *reinterpret_cast<const uint32_t*>(&rounded);
      }
      output[vector] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
  }
}

}  // namespace

cudaError_t to_bf16(const Packed& matrix, void* output, cudaStream_t stream) {
  const int64_t vectors = matrix.count / kVector;
  // start + 2 * kUnroll * stride stays below 2^32.
  if (matrix.count % kVector != 0 || vectors >= int64_t(1) << 31) return cudaErrorInvalidValue;
  if (vectors == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  const int64_t full_grid = int64_t(multiprocessors) * kBlocksPerMultiprocessor;
  const int64_t needed = (vectors + kThreads - 1) / kThreads;
  const unsigned blocks = unsigned(needed < full_grid ? needed : full_grid);
  const auto launch = [&](auto kernel) {
    kernel<<<blocks, kThreads, 0, stream>>>(matrix, static_cast<uint4*>(output));
    return cudaGetLastError();
  };
  const bool double_quantised = matrix.absmax_scale != nullptr;
  if (matrix.bits == 4) return double_quantised ? launch(&to_bf16_kernel<4, true>) : launch(&to_bf16_kernel<4, false>);
  if (matrix.bits == 8 && !double_quantised) return launch(&to_bf16_kernel<8, false>);
  return cudaErrorInvalidValue;
}

}  // namespace dequantize
