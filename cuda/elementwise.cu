// Fused element-wise kernels of a layer, forward and backward.
//
// They are bound by memory: each tensor is read once and written once in 16-byte vectors, parameters ([channels] rows)
// stay in registers over a tile of tokens. Sums have a fixed order and there are no atomics, so results are
// reproducible bit for bit.
//
// A thread owns 8 neighbouring channels ("a vector") of a tile of consecutive rows; norms and logits, whose sums run
// along a row, have a block for each row.

#include <cuda_bf16.h>

#include <type_traits>

#include "elementwise.h"

namespace elementwise {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // bf16 values in 16 bytes

struct alignas(16) Packed {
  uint32_t pair[4];
};

__device__ __forceinline__ Packed load(const void* base, int64_t offset) {
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(base) + offset));
  return {{raw.x, raw.y, raw.z, raw.w}};
}

// bf16 is the upper half of fp32.
__device__ __forceinline__ void unpack(const Packed& packed, float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(packed.pair[i] << 16);
    values[2 * i + 1] = __uint_as_float(packed.pair[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void load(const void* base, int64_t offset, float (&values)[kVector]) {
  unpack(load(base, offset), values);
}

// A plain load, for what the same kernel writes.
__device__ __forceinline__ void load_written(const void* base, int64_t offset, float (&values)[kVector]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(base) + offset);
  unpack(Packed{{raw.x, raw.y, raw.z, raw.w}}, values);
}

__device__ __forceinline__ Packed pack(const float (&values)[kVector]) {
  Packed packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    packed.pair[i] = *reinterpret_cast<const uint32_t*>(&rounded);
  }
  return packed;
}

__device__ __forceinline__ void store(void* base, int64_t offset, const Packed& packed) {
  *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(base) + offset) =
      make_uint4(packed.pair[0], packed.pair[1], packed.pair[2], packed.pair[3]);
}

__device__ __forceinline__ void store(void* base, int64_t offset, const float (&values)[kVector]) {
  store(base, offset, pack(values));
}

__device__ __forceinline__ void clear(float (&values)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = 0.0f;
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

// ---- token shift and mix: out_g = z + (shifted - z) * (maa_g + modulation_g)

// The shifted input of a row: the row before, the carried row or zero.
__device__ __forceinline__ void load_shifted(const ShiftMix& a, int row, int channel, float (&shifted)[kVector]) {
  const void* source = a.z;
  int before = row - 1;
  if (a.previous != nullptr) {
    before = int(a.previous[row]);
  } else if (row % a.tokens == 0) {
    before = -1;
    if (a.carry != nullptr) {
      source = a.carry;
      before = row / a.tokens;
    }
  }
  if (before >= 0) {
    load(source, int64_t(before) * a.channels + channel, shifted);
  } else {
    clear(shifted);
  }
}

template <int kMixes, bool kModulated, int kTile>
__global__ void __launch_bounds__(kThreads) shift_mix_forward_kernel(ShiftMix a, MixPointers outputs) {
  int channel, first;
  if (!own_tile(a.rows, a.channels, kTile, channel, first)) return;
  Packed maa[kMixes];
#pragma unroll
  for (int g = 0; g < kMixes; ++g) maa[g] = load(a.maa, int64_t(g) * a.channels + channel);
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const int row = first + i;
    if (row >= a.rows) break;
    const int64_t offset = int64_t(row) * a.channels + channel;
    float z[kVector], delta[kVector];
    load(a.z, offset, z);
    load_shifted(a, row, channel, delta);
#pragma unroll
    for (int j = 0; j < kVector; ++j) delta[j] -= z[j];
#pragma unroll
    for (int g = 0; g < kMixes; ++g) {
      float proportion[kVector], mixed[kVector];
      unpack(maa[g], proportion);
      if (kModulated) {
        float modulation[kVector];
        load(a.modulation, int64_t(g) * a.rows * a.channels + offset, modulation);
#pragma unroll
        for (int j = 0; j < kVector; ++j) proportion[j] += modulation[j];
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) mixed[j] = fmaf(delta[j], proportion[j], z[j]);
      store(outputs.mix[g], offset, mixed);
    }
  }
}

// What a row sends back to the row it was mixed with: sum over g of grad_g * (maa_g + modulation_g).
template <int kMixes, bool kModulated>
__device__ __forceinline__ void gradient_to_previous(const ShiftMix& a, const MixPointers& grads,
                                                     const Packed (&maa)[kMixes], int row, int channel,
                                                     float (&to_previous)[kVector]) {
  const int64_t offset = int64_t(row) * a.channels + channel;
  clear(to_previous);
#pragma unroll
  for (int g = 0; g < kMixes; ++g) {
    if (grads.mix[g] == nullptr) continue;
    float grad[kVector], proportion[kVector];
    load(grads.mix[g], offset, grad);
    unpack(maa[g], proportion);
    if (kModulated) {
      float modulation[kVector];
      load(a.modulation, int64_t(g) * a.rows * a.channels + offset, modulation);
#pragma unroll
      for (int j = 0; j < kVector; ++j) proportion[j] += modulation[j];
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) to_previous[j] = fmaf(grad[j], proportion[j], to_previous[j]);
  }
}

// Walks its tile from the last row to the first: what row t + 1 sends back to row t is then at hand. Only the row after
// the tile is computed twice.
template <int kMixes, bool kModulated, int kTile>
__global__ void __launch_bounds__(kThreads)
    shift_mix_backward_kernel(ShiftMix a, MixPointers grads, const int* __restrict__ children, void* grad_z,
                              void* grad_carry, void* grad_modulation) {
  int channel, first;
  if (!own_tile(a.rows, a.channels, kTile, channel, first)) return;
  Packed maa[kMixes];
#pragma unroll
  for (int g = 0; g < kMixes; ++g) maa[g] = load(a.maa, int64_t(g) * a.channels + channel);
  float from_next[kVector];
  clear(from_next);
  if (first + kTile < a.rows) {
    gradient_to_previous<kMixes, kModulated>(a, grads, maa, first + kTile, channel, from_next);
  }
#pragma unroll
  for (int i = kTile - 1; i >= 0; --i) {
    const int row = first + i;
    if (row >= a.rows) continue;
    const int64_t offset = int64_t(row) * a.channels + channel;
    float delta[kVector];
    if (kModulated) {
      float z[kVector];
      load(a.z, offset, z);
      load_shifted(a, row, channel, delta);
#pragma unroll
      for (int j = 0; j < kVector; ++j) delta[j] -= z[j];
    }
    float total[kVector], to_previous[kVector];
    clear(total);
    clear(to_previous);
#pragma unroll
    for (int g = 0; g < kMixes; ++g) {
      float grad[kVector], proportion[kVector];
      if (grads.mix[g] != nullptr) {
        load(grads.mix[g], offset, grad);
      } else {
        clear(grad);
      }
      unpack(maa[g], proportion);
      if (kModulated) {
        const int64_t modulation_offset = int64_t(g) * a.rows * a.channels + offset;
        float modulation[kVector];
        load(a.modulation, modulation_offset, modulation);
#pragma unroll
        for (int j = 0; j < kVector; ++j) proportion[j] += modulation[j];
        if (grad_modulation != nullptr) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) modulation[j] = grad[j] * delta[j];
          store(grad_modulation, modulation_offset, modulation);
        }
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        total[j] += grad[j];
        to_previous[j] = fmaf(grad[j], proportion[j], to_previous[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) total[j] -= to_previous[j];
    if (children == nullptr) {
      // from_next is zero after the last row of all.
      if ((row + 1) % a.tokens != 0) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) total[j] += from_next[j];
      }
    } else {
      for (int child = children[row]; child >= 0; child = children[a.rows + child]) {
        float from_child[kVector];
        if (child == row + 1) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) from_child[j] = from_next[j];
        } else {
          gradient_to_previous<kMixes, kModulated>(a, grads, maa, child, channel, from_child);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) total[j] += from_child[j];
      }
    }
    store(grad_z, offset, total);
    if (grad_carry != nullptr && row % a.tokens == 0) {
      store(grad_carry, int64_t(row / a.tokens) * a.channels + channel, to_previous);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) from_next[j] = to_previous[j];
  }
}

// Blocks for one thread per vector and tile of rows.
int64_t blocks_for(int rows, int channels, int tile) {
  const int64_t threads = (int64_t(rows) + tile - 1) / tile * (channels / kVector);
  return (threads + kThreads - 1) / kThreads;
}

template <int kMixes, bool kModulated>
cudaError_t launch_forward(const ShiftMix& a, const MixPointers& outputs, cudaStream_t stream) {
  constexpr int kTile = 4;
  shift_mix_forward_kernel<kMixes, kModulated, kTile>
      <<<blocks_for(a.rows, a.channels, kTile), kThreads, 0, stream>>>(a, outputs);
  return cudaGetLastError();
}

template <int kMixes, bool kModulated>
cudaError_t launch_backward(const ShiftMix& a, const MixPointers& grads, const int* children, void* grad_z,
                            void* grad_carry, void* grad_modulation, cudaStream_t stream) {
  constexpr int kTile = 4;
  shift_mix_backward_kernel<kMixes, kModulated, kTile><<<blocks_for(a.rows, a.channels, kTile), kThreads, 0, stream>>>(
      a, grads, children, grad_z, grad_carry, grad_modulation);
  return cudaGetLastError();
}

// ---- group norm of each head, times silu(gate)

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
                                        float eps, void* output, int rows, int channels) {
  const unsigned mask = head_mask<kLanes>();
  int channel, first;
  if (!own_tile(rows, channels, kTile, channel, first)) return;
  const Packed packed_weight = load(weight, channel), packed_bias = load(bias, channel);
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
                                         int channels) {
  constexpr float kShare = 1.0f / (kLanes * kVector);
  const unsigned mask = head_mask<kLanes>();
  int channel, first;
  if (!own_tile(rows, channels, kTile, channel, first)) return;
  const Packed packed_weight = load(weight, channel), packed_bias = load(bias, channel);
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

// ---- sum and layer norm: one block per row, which it holds in registers, kHeld vectors a thread

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
                            void* sum, void* normed, float* statistics, int channels) {
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
    load(weight, channel, scale);
    load(bias, channel, shift);
#pragma unroll
    for (int j = 0; j < kVector; ++j) scale[j] = fmaf(value[i][j] * inverse, scale[j], shift[j]);
    store(normed, base + channel, scale);
  }
}

template <int kHeld>
__global__ void __launch_bounds__(kNormThreads)
    add_norm_backward_kernel(const void* sum, const float* statistics, const void* weight, const void* grad_normed,
                             const void* grad_sum, void* grad_x, int channels) {
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
    load(weight, channel, scale);
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

// Calls launch(std::integral_constant<int, kHeld>) with as many vectors as a thread has to hold.
template <typename Launch>
cudaError_t for_row_of(int channels, const Launch& launch) {
  const int held = (channels / kVector + kNormThreads - 1) / kNormThreads;
  if (held <= 1) return launch(std::integral_constant<int, 1>());
  if (held <= 2) return launch(std::integral_constant<int, 2>());
  if (held <= kMostHeld) return launch(std::integral_constant<int, kMostHeld>());
  return cudaErrorInvalidValue;
}

// ---- activations: one thread, kPerThread vectors a block's width apart

constexpr int kPerThread = 2;

template <typename Body>
__global__ void __launch_bounds__(kThreads) each_vector_kernel(int64_t count, Body body) {
  const int64_t start = (int64_t(blockIdx.x) * kThreads * kPerThread + threadIdx.x) * kVector;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t offset = start + int64_t(i) * kThreads * kVector;
    if (offset < count) body(offset);
  }
}

template <typename Body>
cudaError_t launch_each_vector(int64_t count, const Body& body, cudaStream_t stream) {
  constexpr int64_t kPerBlock = int64_t(kThreads) * kPerThread * kVector;
  each_vector_kernel<<<(count + kPerBlock - 1) / kPerBlock, kThreads, 0, stream>>>(count, body);
  return cudaGetLastError();
}

struct SquaredRelu {
  const void* x;
  void* output;
  __device__ void operator()(int64_t offset) const {
    float value[kVector];
    load(x, offset, value);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float positive = fmaxf(value[j], 0.0f);
      value[j] = positive * positive;
    }
    store(output, offset, value);
  }
};

struct SquaredReluGradient {
  const void* x;
  const void* grad_output;
  void* grad_x;
  __device__ void operator()(int64_t offset) const {
    float value[kVector], grad[kVector];
    load(x, offset, value);
    load_written(grad_output, offset, grad);
#pragma unroll
    for (int j = 0; j < kVector; ++j) grad[j] *= 2.0f * fmaxf(value[j], 0.0f);
    store(grad_x, offset, grad);
  }
};

struct SigmoidGatedResidual {
  const void* x;
  const void* r;
  const void* value;
  void* result;
  __device__ void operator()(int64_t offset) const {
    float residual[kVector], gate[kVector], v[kVector];
    load(x, offset, residual);
    load(r, offset, gate);
    load(value, offset, v);
#pragma unroll
    for (int j = 0; j < kVector; ++j) residual[j] = fmaf(sigmoid(gate[j]), v[j], residual[j]);
    store(result, offset, residual);
  }
};

struct SigmoidGatedResidualGradient {
  const void* x;
  const void* r;
  const void* result;
  const void* grad;
  void* grad_r;
  void* grad_value;
  __device__ void operator()(int64_t offset) const {
    float residual[kVector], gate[kVector], added[kVector], gradient[kVector];
    load(x, offset, residual);
    load(r, offset, gate);
    load(result, offset, added);
    load(grad, offset, gradient);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float s = sigmoid(gate[j]);
      gate[j] = gradient[j] * (added[j] - residual[j]) * (1.0f - s);
      gradient[j] *= s;
    }
    store(grad_r, offset, gate);
    store(grad_value, offset, gradient);
  }
};

// ---- log-probabilities of targets: one block per row of logits

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / 32;

// sum is that of exp(logit - maximum); index is where the maximum stands, the lowest of equal ones.
struct RowStatistics {
  float maximum;
  float sum;
  int index;
};

__device__ __forceinline__ RowStatistics combine(const RowStatistics& a, const RowStatistics& b) {
  const bool a_leads = a.maximum > b.maximum || (a.maximum == b.maximum && a.index < b.index);
  const float maximum = a_leads ? a.maximum : b.maximum, lower = a_leads ? b.maximum : a.maximum;
  const float sum = a_leads ? a.sum : b.sum, lower_sum = a_leads ? b.sum : a.sum;
  // A thread without logits has sum 0 and maximum -inf.
  const float rescaled = lower_sum == 0.0f ? 0.0f : lower_sum * __expf(lower - maximum);
  return {maximum, sum + rescaled, a_leads ? a.index : b.index};
}

__global__ void __launch_bounds__(kRowThreads)
    logit_statistics_kernel(const void* logits, const int64_t* targets, float* logp, float* max_logit, float* logsumexp,
                            int* argmax, int vocabulary) {
  const int64_t row = blockIdx.x;
  const int64_t base = row * vocabulary;
  RowStatistics mine{-INFINITY, 0.0f, vocabulary};
  for (int column = int(threadIdx.x) * kVector; column < vocabulary; column += kRowThreads * kVector) {
    float logit[kVector];
    load(logits, base + column, logit);
    float high = logit[0];
#pragma unroll
    for (int j = 1; j < kVector; ++j) high = fmaxf(high, logit[j]);
    if (high > mine.maximum) {
      mine.sum *= __expf(mine.maximum - high);
      mine.maximum = high;
#pragma unroll
      for (int j = kVector - 1; j >= 0; --j) {
        if (logit[j] == high) mine.index = column + j;
      }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) mine.sum += __expf(logit[j] - mine.maximum);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const RowStatistics other{__shfl_xor_sync(0xffffffffu, mine.maximum, step),
                              __shfl_xor_sync(0xffffffffu, mine.sum, step),
                              __shfl_xor_sync(0xffffffffu, mine.index, step)};
    mine = combine(mine, other);
  }
  __shared__ RowStatistics of_warp[kRowWarps];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kRowWarps; ++warp) mine = combine(mine, of_warp[warp]);
  const float total = mine.maximum + logf(mine.sum);
  const int64_t target = targets[row];
  const bool counted = target >= 0;
  logsumexp[row] = total;
  argmax[row] = mine.index;
  max_logit[row] = counted ? mine.maximum : 0.0f;
  logp[row] = counted ? __bfloat162float(static_cast<const __nv_bfloat16*>(logits)[base + target]) - total : 0.0f;
}

__global__ void __launch_bounds__(kRowThreads)
    logit_gradient_kernel(void* logits, const int64_t* targets, const float* logsumexp, const int* argmax,
                          const float* grad_logp, const float* grad_max_logit, int vocabulary) {
  const int64_t row = blockIdx.x;
  const int64_t base = row * vocabulary;
  const int64_t target = targets[row];
  const bool counted = target >= 0;
  const float by_logp = counted ? grad_logp[row] : 0.0f;
  const float by_max = counted ? grad_max_logit[row] : 0.0f;
  const float total = logsumexp[row];
  const int highest = argmax[row];
  for (int column = int(threadIdx.x) * kVector; column < vocabulary; column += kRowThreads * kVector) {
    float value[kVector];
    if (counted) {
      load_written(logits, base + column, value);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        value[j] = -by_logp * __expf(value[j] - total);
        if (column + j == target) value[j] += by_logp;
        if (column + j == highest) value[j] += by_max;
      }
    } else {
      clear(value);
    }
    store(logits, base + column, value);
  }
}

}  // namespace

cudaError_t shift_mix_forward(const ShiftMix& a, const MixPointers& outputs, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const bool modulated = a.modulation != nullptr;
  switch (a.mixes) {
    case 1:
      return modulated ? launch_forward<1, true>(a, outputs, stream) : launch_forward<1, false>(a, outputs, stream);
    case 2:
      return modulated ? launch_forward<2, true>(a, outputs, stream) : launch_forward<2, false>(a, outputs, stream);
    case 5:
      return modulated ? launch_forward<5, true>(a, outputs, stream) : launch_forward<5, false>(a, outputs, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t shift_mix_backward(const ShiftMix& a, const MixPointers& grads, const int* children, void* grad_z,
                               void* grad_carry, void* grad_modulation, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const bool modulated = a.modulation != nullptr;
  const auto launch = [&](auto plain, auto with_modulation) {
    return (modulated ? with_modulation : plain)(a, grads, children, grad_z, grad_carry, grad_modulation, stream);
  };
  switch (a.mixes) {
    case 1:
      return launch(&launch_backward<1, false>, &launch_backward<1, true>);
    case 2:
      return launch(&launch_backward<2, false>, &launch_backward<2, true>);
    case 5:
      return launch(&launch_backward<5, false>, &launch_backward<5, true>);
    default:
      return cudaErrorInvalidValue;
  }
}

namespace {

constexpr int kNormTile = 2;

}  // namespace

cudaError_t group_norm_silu_gate_forward(const void* y, const void* gate, const void* weight, const void* bias,
                                         float eps, void* output, int rows, int channels, int head_size,
                                         cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const auto launch = [&](auto kernel) {
    kernel<<<blocks_for(rows, channels, kNormTile), kThreads, 0, stream>>>(y, gate, weight, bias, eps, output, rows,
                                                                           channels);
    return cudaGetLastError();
  };
  switch (head_size) {
    case 16:
      return launch(&group_norm_silu_gate_forward_kernel<2, kNormTile>);
    case 32:
      return launch(&group_norm_silu_gate_forward_kernel<4, kNormTile>);
    case 64:
      return launch(&group_norm_silu_gate_forward_kernel<8, kNormTile>);
    case 128:
      return launch(&group_norm_silu_gate_forward_kernel<16, kNormTile>);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t group_norm_silu_gate_backward(const void* y, const void* gate, const void* weight, const void* bias,
                                          float eps, const void* grad_output, void* grad_y, void* grad_gate, int rows,
                                          int channels, int head_size, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const auto launch = [&](auto kernel) {
    kernel<<<blocks_for(rows, channels, kNormTile), kThreads, 0, stream>>>(y, gate, weight, bias, eps, grad_output,
                                                                           grad_y, grad_gate, rows, channels);
    return cudaGetLastError();
  };
  switch (head_size) {
    case 16:
      return launch(&group_norm_silu_gate_backward_kernel<2, kNormTile>);
    case 32:
      return launch(&group_norm_silu_gate_backward_kernel<4, kNormTile>);
    case 64:
      return launch(&group_norm_silu_gate_backward_kernel<8, kNormTile>);
    case 128:
      return launch(&group_norm_silu_gate_backward_kernel<16, kNormTile>);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t add_norm_forward(const void* x, const void* delta, const void* weight, const void* bias, float eps,
                             void* sum, void* normed, float* statistics, int rows, int channels, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return for_row_of(channels, [&](auto held) {
    const auto kernel = delta == nullptr ? &add_norm_forward_kernel<decltype(held)::value, false>
                                         : &add_norm_forward_kernel<decltype(held)::value, true>;
    kernel<<<rows, kNormThreads, 0, stream>>>(x, delta, weight, bias, eps, sum, normed, statistics, channels);
    return cudaGetLastError();
  });
}

cudaError_t add_norm_backward(const void* sum, const float* statistics, const void* weight, const void* grad_normed,
                              const void* grad_sum, void* grad_x, int rows, int channels, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return for_row_of(channels, [&](auto held) {
    add_norm_backward_kernel<decltype(held)::value>
        <<<rows, kNormThreads, 0, stream>>>(sum, statistics, weight, grad_normed, grad_sum, grad_x, channels);
    return cudaGetLastError();
  });
}

cudaError_t squared_relu_forward(const void* x, void* output, int64_t count, cudaStream_t stream) {
  return count == 0 ? cudaSuccess : launch_each_vector(count, SquaredRelu{x, output}, stream);
}

cudaError_t squared_relu_backward(const void* x, const void* grad_output, void* grad_x, int64_t count,
                                  cudaStream_t stream) {
  return count == 0 ? cudaSuccess : launch_each_vector(count, SquaredReluGradient{x, grad_output, grad_x}, stream);
}

cudaError_t sigmoid_gated_residual_forward(const void* x, const void* r, const void* value, void* result, int64_t count,
                                           cudaStream_t stream) {
  return count == 0 ? cudaSuccess : launch_each_vector(count, SigmoidGatedResidual{x, r, value, result}, stream);
}

cudaError_t sigmoid_gated_residual_backward(const void* x, const void* r, const void* result, const void* grad,
                                            void* grad_r, void* grad_value, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return launch_each_vector(count, SigmoidGatedResidualGradient{x, r, result, grad, grad_r, grad_value}, stream);
}

cudaError_t logit_statistics(const void* logits, const int64_t* targets, float* logp, float* max_logit,
                             float* logsumexp, int* argmax, int rows, int vocabulary, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  logit_statistics_kernel<<<rows, kRowThreads, 0, stream>>>(logits, targets, logp, max_logit, logsumexp, argmax,
                                                            vocabulary);
  return cudaGetLastError();
}

cudaError_t logit_gradient(void* logits, const int64_t* targets, const float* logsumexp, const int* argmax,
                           const float* grad_logp, const float* grad_max_logit, int rows, int vocabulary,
                           cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  logit_gradient_kernel<<<rows, kRowThreads, 0, stream>>>(logits, targets, logsumexp, argmax, grad_logp, grad_max_logit,
                                                          vocabulary);
  return cudaGetLastError();
}

}  // namespace elementwise
