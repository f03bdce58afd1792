// Vectors of 8 bf16 values, and which of them a thread owns.
#ifndef ELEMENTWISE_PRIMITIVES_CUH
#define ELEMENTWISE_PRIMITIVES_CUH

#include "elementwise.h"

namespace elementwise {

constexpr int kThreads = 128;

struct alignas(16) Packed {
  uint32_t pair[4];
};

__device__ __forceinline__ Packed load(const void* base, int64_t offset) {
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + offset));
  return {{raw.x, raw.y, raw.z, raw.w}};
}

__device__ __forceinline__ void unpack(const Packed& packed, float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = low_half(packed.pair[i]);
    values[2 * i + 1] = high_half(packed.pair[i]);
  }
}

__device__ __forceinline__ void load(const void* base, int64_t offset, float (&values)[kVector]) {
  unpack(load(base, offset), values);
}

// A plain load, for what the same kernel writes.
__device__ __forceinline__ void load_written(const void* base, int64_t offset, float (&values)[kVector]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + offset);
  unpack(Packed{{raw.x, raw.y, raw.z, raw.w}}, values);
}

__device__ __forceinline__ Packed pack(const float (&values)[kVector]) {
  Packed packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed.pair[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
  return packed;
}

__device__ __forceinline__ void store(void* base, int64_t offset, const Packed& packed) {
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(base) + offset) =
      make_uint4(packed.pair[0], packed.pair[1], packed.pair[2], packed.pair[3]);
}

__device__ __forceinline__ void store(void* base, int64_t offset, const float (&values)[kVector]) {
  store(base, offset, pack(values));
}

// A thread's sums of fp32, for the gradient of a parameter.
__device__ __forceinline__ void store_sums(float* base, int64_t offset, const float (&sums)[kVector]) {
  float4* target = reinterpret_cast<float4*>(base + offset);
  target[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  target[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
}

__device__ __forceinline__ void clear(float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = 0.0f;
}

// What a thread has summed over one tile, as far as it is asked for.
__device__ __forceinline__ void store_norm_sums(const NormSums& sums, int tile, int channel,
                                                const float (&of_weight)[kVector], const float (&of_bias)[kVector]) {
  const int64_t offset = tile * sums.stride + channel;
  if (sums.weight != nullptr) store_sums(sums.weight, offset, of_weight);
  if (sums.bias != nullptr) store_sums(sums.bias, offset, of_bias);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// The vector and the first row of this thread's tile; false for the threads left over at the end of the grid.
__device__ __forceinline__ bool own_tile(int rows, int channels, int tile, int& channel, int& first) {
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
  const unsigned vectors = unsigned(channels) / kVector;
  channel = int(thread % vectors) * kVector;
  first = int(thread / vectors) * tile;
  return first < rows;
}

}  // namespace elementwise

#endif
