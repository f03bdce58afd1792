// Sum and layer norm: one block for each row, which it holds in registers, kHeld vectors a thread.
#ifndef ELEMENTWISE_ADD_NORM_CUH
#define ELEMENTWISE_ADD_NORM_CUH

#include "elementwise.h"
#include "elementwise_primitives.cuh"

namespace elementwise {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int kMostHeld = 4;
static_assert(kMostNormChannels == kMostHeld * kNormThreads * kVector);

// First channel of the i-th vector that this thread holds; beyond the row's channels there is none.
__device__ __forceinline__ int held_channel(int i) { return (int(threadIdx.x) + i * kNormThreads) * kVector; }

// The sum over the block of every thread's value; `of_warp` is used for this sum only.
__device__ __forceinline__ float block_sum(float value, float (&of_warp)[kNormWarps]) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kNormWarps; ++warp) total += of_warp[warp];
  return total;
}

template <int kHeld, bool kAdds>
__global__ void __launch_bounds__(kNormThreads)
    add_norm_forward_kernel(const void* x, const void* delta, const void* weight, const void* bias, float eps,
                            void* sum, void* normed, float* statistics, int channels, int wide) {
  __shared__ float of_warp[2][kNormWarps];
  const int row = blockIdx.x;
  const int64_t base = int64_t(row) * channels;
  float value[kHeld][kVector];
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int channel = held_channel(i);
    if (channel >= channels) break;
    load(x, base + channel, value[i]);
    if (kAdds) {
      float added[kVector];
      load(delta, base + channel, added);
#pragma unroll
      for (int j = 0; j < kVector; ++j) value[i][j] += added[j];
      const Packed rounded = pack(value[i]);
      store(sum, base + channel, rounded);
      unpack(rounded, value[i]);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) total += value[i][j];
  }
  const float mean = block_sum(total, of_warp[0]) / float(channels);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (held_channel(i) >= channels) break;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      value[i][j] -= mean;
      squares = fmaf(value[i][j], value[i][j], squares);
    }
  }
  const float inverse = rsqrtf(block_sum(squares, of_warp[1]) / float(channels) + eps);
  if (threadIdx.x == 0) {
    statistics[row] = mean;
    statistics[gridDim.x + row] = inverse;
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int channel = held_channel(i);
    if (channel >= channels) break;
    float scale[kVector], shift[kVector];
    load_parameter(weight, channel, wide, scale);
    load_parameter(bias, channel, wide, shift);
#pragma unroll
    for (int j = 0; j < kVector; ++j) scale[j] = fmaf(value[i][j] * inverse, scale[j], shift[j]);
    store(normed, base + channel, scale);
  }
}

template <int kHeld>
__global__ void __launch_bounds__(kNormThreads)
    add_norm_backward_kernel(const void* sum, const float* statistics, const void* weight, const void* grad_normed,
                             const void* grad_sum, void* grad_x, int channels, int wide) {
  __shared__ float of_warp[2][kNormWarps];
  const int row = blockIdx.x;
  const int64_t base = int64_t(row) * channels;
  const float mean = statistics[row], inverse = statistics[gridDim.x + row];
  float value[kHeld][kVector], grad[kHeld][kVector];
  float total = 0.0f, projection = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int channel = held_channel(i);
    if (channel >= channels) break;
    float scale[kVector];
    load(sum, base + channel, value[i]);
    load(grad_normed, base + channel, grad[i]);
    load_parameter(weight, channel, wide, scale);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      value[i][j] = (value[i][j] - mean) * inverse;
      grad[i][j] *= scale[j];
      total += grad[i][j];
      projection = fmaf(grad[i][j], value[i][j], projection);
    }
  }
  total = block_sum(total, of_warp[0]) / float(channels);
  projection = block_sum(projection, of_warp[1]) / float(channels);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int channel = held_channel(i);
    if (channel >= channels) break;
    float result[kVector];
    if (grad_sum != nullptr) {
      load(grad_sum, base + channel, result);
    } else {
      clear(result);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) result[j] += inverse * (grad[i][j] - total - value[i][j] * projection);
    store(grad_x, base + channel, result);
  }
}

// Sums over each tile of rows what the bias gets, grad_normed, and what the weight gets, that times the normalised sum.
__global__ void __launch_bounds__(kSumThreads)
    add_norm_sums_kernel(const void* sum, const float* __restrict__ statistics, const void* grad_normed, int rows,
                         int channels, int tile, NormSums sums) {
  int channel, first, end;
  own_rows(rows, channels, tile, channel, first, end);
  float of_weight[kVector], of_bias[kVector];
  clear(of_weight);
  clear(of_bias);
#pragma unroll 4
  for (int row = first; row < end; row += kSumWarps) {
    const int64_t offset = int64_t(row) * channels + channel;
    float grad[kVector];
    load(grad_normed, offset, grad);
#pragma unroll
    for (int j = 0; j < kVector; ++j) of_bias[j] += grad[j];
    if (sums.weight != nullptr) {
      const float mean = statistics[row], inverse = statistics[rows + row];
      float value[kVector];
      load(sum, offset, value);
#pragma unroll
      for (int j = 0; j < kVector; ++j) of_weight[j] = fmaf(grad[j], (value[j] - mean) * inverse, of_weight[j]);
    }
  }
  store_norm_sums(sums, channels, of_weight, of_bias);
}

}  // namespace elementwise

#endif
