// Group norm of each head, times silu(gate). The lanes that share a head are neighbours in one warp.
#ifndef ELEMENTWISE_GROUP_NORM_GATE_CUH
#define ELEMENTWISE_GROUP_NORM_GATE_CUH

#include "elementwise.h"
#include "elementwise_primitives.cuh"

namespace elementwise {

// Sum over the lanes that share a head, the same in all of them.
template <int kLanes>
__device__ __forceinline__ float sum_over_head(float value, unsigned mask) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step);
  return value;
}

template <int kLanes>
__device__ __forceinline__ unsigned head_mask() {
  constexpr unsigned kOnes = (1u << kLanes) - 1u;
  return kOnes << ((threadIdx.x & 31u) & ~unsigned(kLanes - 1));
}

// Replaces y by (y - mean) / sqrt(variance + eps) and returns 1 / sqrt(variance + eps).
template <int kLanes>
__device__ __forceinline__ float normalise(float (&y)[kVector], float eps, unsigned mask) {
  constexpr float kShare = 1.0f / (kLanes * kVector);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kVector; ++j) sum += y[j];
  const float mean = sum_over_head<kLanes>(sum, mask) * kShare;
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    y[j] -= mean;
    squares = fmaf(y[j], y[j], squares);
  }
  const float inverse = rsqrtf(sum_over_head<kLanes>(squares, mask) * kShare + eps);
#pragma unroll
  for (int j = 0; j < kVector; ++j) y[j] *= inverse;
  return inverse;
}

template <int kLanes, int kTile>
__global__ void __launch_bounds__(kThreads)
    group_norm_silu_gate_forward_kernel(const void* y, const void* gate, const void* weight, const void* bias,
                                        float eps, void* output, int rows, int channels, int wide) {
  const unsigned mask = head_mask<kLanes>();
  int channel, first;
  if (!own_tile(rows, channels, kTile, channel, first)) return;
  const Packed packed_weight = load_parameter(weight, channel, wide);
  const Packed packed_bias = load_parameter(bias, channel, wide);
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int row = first + i;
    if (row >= rows) break;
    const int64_t offset = int64_t(row) * channels + channel;
    float value[kVector], g[kVector], scale[kVector], shift[kVector];
    load(y, offset, value);
    load(gate, offset, g);
    normalise<kLanes>(value, eps, mask);
    unpack(packed_weight, scale);
    unpack(packed_bias, shift);
#pragma unroll
    for (int j = 0; j < kVector; ++j) value[j] = fmaf(value[j], scale[j], shift[j]) * g[j] * sigmoid(g[j]);
    store(output, offset, value);
  }
}

template <int kLanes, int kTile>
__global__ void __launch_bounds__(kThreads)
    group_norm_silu_gate_backward_kernel(const void* y, const void* gate, const void* weight, const void* bias,
                                         float eps, const void* grad_output, void* grad_y, void* grad_gate, int rows,
                                         int channels, int wide) {
  constexpr float kShare = 1.0f / (kLanes * kVector);
  const unsigned mask = head_mask<kLanes>();
  int channel, first;
  if (!own_tile(rows, channels, kTile, channel, first)) return;
  const Packed packed_weight = load_parameter(weight, channel, wide);
  const Packed packed_bias = load_parameter(bias, channel, wide);
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int row = first + i;
    if (row >= rows) break;
    const int64_t offset = int64_t(row) * channels + channel;
    float value[kVector], g[kVector], grad[kVector], scale[kVector], shift[kVector];
    load(y, offset, value);
    load(gate, offset, g);
    load(grad_output, offset, grad);
    const float inverse = normalise<kLanes>(value, eps, mask);
    unpack(packed_weight, scale);
    unpack(packed_bias, shift);
    float sum = 0.0f, projection = 0.0f;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float s = sigmoid(g[j]), silu = g[j] * s;
      const float normed = fmaf(value[j], scale[j], shift[j]);
      // silu'(g) = s + silu * (1 - s); g becomes the gradient of the gate, grad that of the normalised value.
      g[j] = grad[j] * normed * fmaf(silu, 1.0f - s, s);
      grad[j] *= silu * scale[j];
      sum += grad[j];
      projection = fmaf(grad[j], value[j], projection);
    }
    store(grad_gate, offset, g);
    sum = sum_over_head<kLanes>(sum, mask) * kShare;
    projection = sum_over_head<kLanes>(projection, mask) * kShare;
#pragma unroll
    for (int j = 0; j < kVector; ++j) grad[j] = inverse * (grad[j] - sum - value[j] * projection);
    store(grad_y, offset, grad);
  }
}

// Sums over each tile of rows what the bias gets, grad_output * silu(gate), and what the weight gets, that times the
// normalised y.
template <int kLanes>
__global__ void __launch_bounds__(kSumThreads)
    group_norm_silu_gate_sums_kernel(const void* y, const void* gate, float eps, const void* grad_output, int rows,
                                     int channels, int tile, NormSums sums) {
  const unsigned mask = head_mask<kLanes>();
  int channel, first, end;
  own_rows(rows, channels, tile, channel, first, end);
  float of_weight[kVector], of_bias[kVector];
  clear(of_weight);
  clear(of_bias);
#pragma unroll 2
  for (int row = first; row < end; row += kSumWarps) {
    const int64_t offset = int64_t(row) * channels + channel;
    float g[kVector], grad[kVector];
    load(gate, offset, g);
    load(grad_output, offset, grad);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      grad[j] *= g[j] * sigmoid(g[j]);
      of_bias[j] += grad[j];
    }
    if (sums.weight != nullptr) {
      float value[kVector];
      load(y, offset, value);
      normalise<kLanes>(value, eps, mask);
#pragma unroll
      for (int j = 0; j < kVector; ++j) of_weight[j] = fmaf(grad[j], value[j], of_weight[j]);
    }
  }
  store_norm_sums(sums, channels, of_weight, of_bias);
}

}  // namespace elementwise

#endif
