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

// A parameter's values, which are used as bf16 has them; `wide`: they are stored in fp32.
__device__ __forceinline__ Packed load_parameter(const void* base, int64_t offset, int wide) {
  if (!wide) return load(base, offset);
  const float4* four = reinterpret_cast<const float4*>(static_cast<const float*>(base) + offset);
  const float4 one = four[0], other = four[1];
  return {{pack_bf16(one.x, one.y), pack_bf16(one.z, one.w), pack_bf16(other.x, other.y),
           pack_bf16(other.z, other.w)}};
}

__device__ __forceinline__ void load_parameter(const void* base, int64_t offset, int wide, float (&values)[kVector]) {
  unpack(load_parameter(base, offset, wide), values);
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

__device__ __forceinline__ void clear(float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = 0.0f;
}

// Sums over tiles of rows, for the gradient of a parameter: a block has 32 vectors of channels, a warp of it every eighth
// row of the tile. src/ops/rows.py chooses the grid: (channels, tiles).
constexpr int kSumWarps = 8;
constexpr int kSumThreads = 32 * kSumWarps;
constexpr int kSumChannels = 32 * kVector;

// This thread's vector, and its rows: every kSumWarps-th from `first` to `end`. Behind the last channel there are none.
__device__ __forceinline__ void own_rows(int rows, int channels, int tile, int& channel, int& first, int& end) {
  channel = blockIdx.x * kSumChannels + int(threadIdx.x % 32) * kVector;
  first = blockIdx.y * tile + int(threadIdx.x / 32);
  end = channel < channels ? min(rows, int(blockIdx.y + 1) * tile) : 0;
}

// Writes the sums over warps of what every thread has for its vector, in one order; to [channels].
__device__ __forceinline__ void store_sums(float* to, int channels, const float (&sums)[kVector]) {
  __shared__ float of_warp[kSumWarps][kSumChannels];
  const int thread = threadIdx.x;
  float4* own = reinterpret_cast<float4*>(&of_warp[thread / 32][thread % 32 * kVector]);
  own[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  own[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kSumWarps; ++warp) total += of_warp[warp][thread];
  const int channel = blockIdx.x * kSumChannels + thread;
  if (channel < channels) to[channel] = total;
  __syncthreads();
}

// What a block has summed over its tile, as far as it is asked for.
__device__ __forceinline__ void store_norm_sums(const NormSums& sums, int channels, const float (&of_weight)[kVector],
                                                const float (&of_bias)[kVector]) {
  if (sums.weight != nullptr) store_sums(sums.weight + blockIdx.y * sums.stride, channels, of_weight);
  if (sums.bias != nullptr) store_sums(sums.bias + blockIdx.y * sums.stride, channels, of_bias);
}

// Sums over tiles that a launch adds up: total [count] of sums [tiles, count], `count` a multiple of 4. `end` counts
// blocks up to a total's last one, and goes on with the same number behind the last total.
constexpr int kMostTotals = 8;

struct Totals {
  const float* sums[kMostTotals];
  float* total[kMostTotals];
  int tiles[kMostTotals];
  int count[kMostTotals];
  int end[kMostTotals];
};

// A block has 128 values of one total, a warp of it every eighth tile.
constexpr int kTotalWarps = 8;

__global__ void __launch_bounds__(32 * kTotalWarps) totals_kernel(Totals totals) {
  __shared__ float of_warp[kTotalWarps][32][4];
  const int block = blockIdx.x;
  int number = 0;
#pragma unroll
  for (int step = kMostTotals / 2; step; step /= 2)
    if (block >= totals.end[number + step - 1]) number += step;
  const float* sums = totals.sums[number];
  const int tiles = totals.tiles[number], count = totals.count[number];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int at = ((block - (number ? totals.end[number - 1] : 0)) * 32 + lane) * 4;
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (at < count) {
#pragma unroll 4
    for (int tile = warp; tile < tiles; tile += kTotalWarps) {
      const float4 value = *reinterpret_cast<const float4*>(sums + int64_t(tile) * count + at);
      sum[0] += value.x, sum[1] += value.y, sum[2] += value.z, sum[3] += value.w;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) of_warp[warp][lane][i] = sum[i];
  __syncthreads();
  if (warp != 0 || at >= count) return;
#pragma unroll
  for (int other = 1; other < kTotalWarps; ++other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += of_warp[other][lane][i];
  }
  *reinterpret_cast<float4*>(totals.total[number] + at) = make_float4(sum[0], sum[1], sum[2], sum[3]);
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
