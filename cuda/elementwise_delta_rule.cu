// What stands around RWKV-7's recurrence: the keys it removes and stores, the values it takes, and its readout.
//
// Tensors are bf16, contiguous and 16-byte aligned: [rows, channels], parameters [channels]; sums are fp32, arithmetic
// too. A head's kLanes lanes are neighbours in one warp, each with one vector of 8 channels. A gradient whose pointer is
// null is not asked for; one that has not arrived is null and counts as zero.
//
// Grids have a thread for each vector and tile of rows: kRowTile of them, or `tile` where the gradients of parameters
// are summed; those of value_residual one for each kPerThread vectors, those of small maps as said there. Blocks have
// kThreads threads.

#include "elementwise_activations.cuh"
#include "elementwise_group_norm_gate.cuh"
#include "elementwise_primitives.cuh"

namespace elementwise {

constexpr int kRowTile = 2;

constexpr float kSmallestNorm = 1e-12f;

// Replaces u by u / max(|u|, kSmallestNorm) over the head and returns the factor; `free` is false at the limit, where
// the factor is a constant.
template <int kLanes>
__device__ __forceinline__ float to_unit_length(float (&u)[kVector], unsigned mask, bool& free) {
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kVector; ++j) squares = fmaf(u[j], u[j], squares);
  const float norm = sqrtf(sum_over_head<kLanes>(squares, mask));
  free = norm > kSmallestNorm;
  const float inverse = 1.0f / fmaxf(norm, kSmallestNorm);
#pragma unroll
  for (int j = 0; j < kVector; ++j) u[j] *= inverse;
  return inverse;
}

// By a plain load: another gradient may be written in its place.
__device__ __forceinline__ void load_gradient(const void* gradient, int64_t offset, float (&values)[kVector]) {
  if (gradient == nullptr) {
    clear(values);
  } else {
    load_written(gradient, offset, values);
  }
}

// A vector of v + (first - v) sigmoid(amount).
__device__ __forceinline__ void pull(const void* v, const void* first, const void* amount, void* result,
                                     int64_t offset) {
  float own[kVector], other[kVector], share[kVector];
  load(v, offset, own);
  load(first, offset, other);
  load(amount, offset, share);
#pragma unroll
  for (int j = 0; j < kVector; ++j) own[j] = fmaf(other[j] - own[j], sigmoid(share[j]), own[j]);
  store(result, offset, own);
}

// Its gradients. With s = sigmoid(amount) that of amount is the gradient of the result times (first - v) s (1 - s), and
// (first - v) (1 - s) is first - result.
__device__ __forceinline__ void pull_back(const void* first, const void* amount, const void* result, const void* grad,
                                          void* grad_v, void* grad_first, void* grad_amount, int64_t offset) {
  float share[kVector], gradient[kVector], part[kVector];
  load(amount, offset, share);
  load(grad, offset, gradient);
#pragma unroll
  for (int j = 0; j < kVector; ++j) share[j] = sigmoid(share[j]);
  if (grad_v != nullptr) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) part[j] = gradient[j] * (1.0f - share[j]);
    store(grad_v, offset, part);
  }
  if (grad_first != nullptr) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) part[j] = gradient[j] * share[j];
    store(grad_first, offset, part);
  }
  if (grad_amount != nullptr) {
    float mixed[kVector];
    load(result, offset, mixed);
    load(first, offset, part);
#pragma unroll
    for (int j = 0; j < kVector; ++j) part[j] = gradient[j] * (part[j] - mixed[j]) * share[j];
    store(grad_amount, offset, part);
  }
}

// Of a vector that `count` values may end in, `size` of them. Plain loads: the same kernel writes there.
__device__ __forceinline__ void load_some(const void* base, int64_t offset, int size, float (&values)[kVector]) {
  if (size == kVector) return load_written(base, offset, values);
  clear(values);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j < size) values[j] = low_half(static_cast<const uint16_t*>(base)[offset + j]);
  }
}
__device__ __forceinline__ void store_some(void* base, int64_t offset, int size, const float (&values)[kVector]) {
  if (size == kVector) return store(base, offset, values);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    if (j < size) static_cast<uint16_t*>(base)[offset + j] = uint16_t(pack_bf16(values[j], 0.0f));
  }
}

// Calls body(offset, size) for a thread's vector of `count` values, the last of which may be smaller.
template <typename Body>
__device__ __forceinline__ void for_vector_of(int count, unsigned vector, const Body& body) {
  const int64_t offset = int64_t(vector) * kVector;
  if (offset < count) body(offset, count - offset < kVector ? int(count - offset) : kVector);
}

// With s = sigmoid(rate) and kappa = k k_k at unit length: replacement = k (1 + (s - 1) k_a), removal = -kappa,
// written = kappa s.
// With `values`, that is v pulled towards first_v by amount.
template <int kLanes>
__global__ void __launch_bounds__(kThreads)
    removal_and_replacement_forward(const void* k, const void* rate, const void* k_k, const void* k_a,
                                    void* replacement, void* removal, void* written, const void* v, const void* first_v,
                                    const void* amount, void* values, int rows, int channels) {
  const unsigned mask = head_mask<kLanes>();
  int channel, first;
  if (!own_tile(rows, channels, kRowTile, channel, first)) return;
  const Packed packed_k_k = load(k_k, channel), packed_k_a = load(k_a, channel);
#pragma unroll
  for (int i = 0; i < kRowTile; ++i) {
    const int row = first + i;
    if (row >= rows) break;
    const int64_t offset = int64_t(row) * channels + channel;
    float key[kVector], s[kVector], kappa[kVector], scale[kVector];
    load(k, offset, key);
    load(rate, offset, s);
    unpack(packed_k_k, kappa);
    unpack(packed_k_a, scale);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      kappa[j] *= key[j];
      s[j] = sigmoid(s[j]);
      key[j] *= fmaf(s[j] - 1.0f, scale[j], 1.0f);
    }
    store(replacement, offset, key);
    bool free;
    to_unit_length<kLanes>(kappa, mask, free);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      s[j] *= kappa[j];
      kappa[j] = -kappa[j];
    }
    store(removal, offset, kappa);
    store(written, offset, s);
    if (values != nullptr) pull(v, first_v, amount, values, offset);
  }
}

// The gradient of u = k k_k from those of -kappa and kappa s; kappa [in: u, out: kappa] and s stand ready.
template <int kLanes>
__device__ __forceinline__ void gradient_before_length(float (&kappa)[kVector], const float (&s)[kVector],
                                                       const float (&of_removal)[kVector],
                                                       const float (&of_written)[kVector], unsigned mask,
                                                       float (&of_u)[kVector]) {
  bool free;
  const float inverse = to_unit_length<kLanes>(kappa, mask, free);
  float along = 0.0f;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    of_u[j] = fmaf(of_written[j], s[j], -of_removal[j]);
    along = fmaf(of_u[j], kappa[j], along);
  }
  along = free ? sum_over_head<kLanes>(along, mask) : 0.0f;
#pragma unroll
  for (int j = 0; j < kVector; ++j) of_u[j] = inverse * (of_u[j] - kappa[j] * along);
}

template <int kLanes>
__global__ void __launch_bounds__(kThreads)
    removal_and_replacement_backward(const void* k, const void* rate, const void* k_k, const void* k_a,
                                     const void* grad_replacement, const void* grad_removal, const void* grad_written,
                                     void* grad_k, void* grad_rate, const void* first_v, const void* amount,
                                     const void* values, const void* grad_values, void* grad_v, void* grad_first,
                                     void* grad_amount, int rows, int channels) {
  const unsigned mask = head_mask<kLanes>();
  int channel, first;
  if (!own_tile(rows, channels, kRowTile, channel, first)) return;
  const Packed packed_k_k = load(k_k, channel), packed_k_a = load(k_a, channel);
#pragma unroll
  for (int i = 0; i < kRowTile; ++i) {
    const int row = first + i;
    if (row >= rows) break;
    const int64_t offset = int64_t(row) * channels + channel;
    float key[kVector], s[kVector], kappa[kVector], scale[kVector], of_replacement[kVector], of_removal[kVector];
    float of_written[kVector], of_u[kVector];
    load(k, offset, key);
    load(rate, offset, s);
    load_gradient(grad_replacement, offset, of_replacement);
    load_gradient(grad_removal, offset, of_removal);
    load_gradient(grad_written, offset, of_written);
    unpack(packed_k_k, scale);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      s[j] = sigmoid(s[j]);
      kappa[j] = key[j] * scale[j];
    }
    gradient_before_length<kLanes>(kappa, s, of_removal, of_written, mask, of_u);
#pragma unroll
    for (int j = 0; j < kVector; ++j) of_u[j] *= scale[j];
    unpack(packed_k_a, scale);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float of_s = fmaf(of_written[j], kappa[j], of_replacement[j] * key[j] * scale[j]);
      of_u[j] = fmaf(of_replacement[j], fmaf(s[j] - 1.0f, scale[j], 1.0f), of_u[j]);
      s[j] = of_s * s[j] * (1.0f - s[j]);
    }
    if (grad_k != nullptr) store(grad_k, offset, of_u);
    if (grad_rate != nullptr) store(grad_rate, offset, s);
    if (grad_values != nullptr) {
      pull_back(first_v, amount, values, grad_values, grad_v, grad_first, grad_amount, offset);
    }
  }
}

// Sums over each tile of rows what k_k gets, the gradient of u times k, and what k_a gets: a row of
// channels every `stride` values.
template <int kLanes>
__global__ void __launch_bounds__(kSumThreads)
    removal_and_replacement_sums(const void* k, const void* rate, const void* k_k, const void* grad_replacement,
                                 const void* grad_removal, const void* grad_written, float* of_k_k, float* of_k_a,
                                 int stride, int tile, int rows, int channels) {
  const unsigned mask = head_mask<kLanes>();
  int channel, first, end;
  own_rows(rows, channels, tile, channel, first, end);
  Packed packed_k_k = {};
  if (channel < channels) packed_k_k = load(k_k, channel);
  float sum_k_k[kVector], sum_k_a[kVector];
  clear(sum_k_k);
  clear(sum_k_a);
  for (int row = first; row < end; row += kSumWarps) {
    const int64_t offset = int64_t(row) * channels + channel;
    float key[kVector], s[kVector];
    load(k, offset, key);
    load(rate, offset, s);
#pragma unroll
    for (int j = 0; j < kVector; ++j) s[j] = sigmoid(s[j]);
    if (of_k_k != nullptr) {
      float kappa[kVector], of_removal[kVector], of_written[kVector], of_u[kVector];
      load_gradient(grad_removal, offset, of_removal);
      load_gradient(grad_written, offset, of_written);
      unpack(packed_k_k, kappa);
#pragma unroll
      for (int j = 0; j < kVector; ++j) kappa[j] *= key[j];
      gradient_before_length<kLanes>(kappa, s, of_removal, of_written, mask, of_u);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum_k_k[j] = fmaf(of_u[j], key[j], sum_k_k[j]);
    }
    if (of_k_a != nullptr) {
      float of_replacement[kVector];
      load_gradient(grad_replacement, offset, of_replacement);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum_k_a[j] = fmaf(of_replacement[j] * key[j], s[j] - 1.0f, sum_k_a[j]);
    }
  }
  const int64_t place = int64_t(blockIdx.y) * stride;
  if (of_k_k != nullptr) store_sums(of_k_k + place, channels, sum_k_k);
  if (of_k_a != nullptr) store_sums(of_k_a + place, channels, sum_k_a);
}

// result = v + (first - v) sigmoid(amount)
__global__ void __launch_bounds__(kThreads)
    value_residual_forward(const void* v, const void* first, const void* amount, void* result, int vectors) {
  for_own_vectors(int64_t(vectors) * kVector, [=](int64_t offset) { pull(v, first, amount, result, offset); });
}

__global__ void __launch_bounds__(kThreads)
    value_residual_backward(const void* first, const void* amount, const void* result, const void* grad, void* grad_v,
                            void* grad_first, void* grad_amount, int vectors) {
  for_own_vectors(int64_t(vectors) * kVector, [=](int64_t offset) {
    pull_back(first, amount, result, grad, grad_v, grad_first, grad_amount, offset);
  });
}

// What stands between the two matrices of small maps: hidden [maps, rows, width], whose first map goes through tanh and
// whose last column becomes 1 in each, and gate [count], which goes through sigmoid. Written in place. A thread for each
// vector of the first map, for the last one of each row of the others, and for each of the gate.
__global__ void __launch_bounds__(kThreads)
    small_maps_forward(void* hidden, void* gate, int rows, int width, int maps, int count) {
  unsigned thread = blockIdx.x * kThreads + threadIdx.x;
  const unsigned vectors = unsigned(width) / kVector, of_first = rows * vectors, of_others = (maps - 1) * rows;
  float values[kVector];
  if (thread < of_first + of_others) {
    const bool first = thread < of_first;
    const int64_t offset =
        first ? int64_t(thread) * kVector : int64_t(rows + thread - of_first + 1) * width - kVector;
    load_written(hidden, offset, values);
    if (first) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = tanhf(values[j]);
    }
    if (!first || thread % vectors == vectors - 1) values[kVector - 1] = 1.0f;
    store(hidden, offset, values);
    return;
  }
  for_vector_of(count, thread - of_first - of_others, [=](int64_t offset, int size) {
    float s[kVector];
    load_some(gate, offset, size, s);
#pragma unroll
    for (int j = 0; j < kVector; ++j) s[j] = sigmoid(s[j]);
    store_some(gate, offset, size, s);
  });
}

// The gradients before tanh and sigmoid from those behind, in place; a thread for each vector of the first map and of the
// gate.
__global__ void __launch_bounds__(kThreads)
    small_maps_backward(const void* hidden, void* grad_hidden, const void* gate, void* grad_gate, int rows, int width,
                        int count) {
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
  const unsigned of_first = rows * (unsigned(width) / kVector);
  if (thread < of_first) {
    const int64_t offset = int64_t(thread) * kVector;
    float values[kVector], grad[kVector];
    load(hidden, offset, values);
    load_written(grad_hidden, offset, grad);
#pragma unroll
    for (int j = 0; j < kVector; ++j) grad[j] *= fmaf(-values[j], values[j], 1.0f);
    store(grad_hidden, offset, grad);
    return;
  }
  for_vector_of(count, thread - of_first, [=](int64_t offset, int size) {
    float s[kVector], grad[kVector];
    load_some(gate, offset, size, s);
    load_some(grad_gate, offset, size, grad);
#pragma unroll
    for (int j = 0; j < kVector; ++j) grad[j] *= s[j] * (1.0f - s[j]);
    store_some(grad_gate, offset, size, grad);
  });
}

// The sum over the head of x y z.
template <int kLanes>
__device__ __forceinline__ float head_product(const float (&x)[kVector], const float (&y)[kVector],
                                              const float (&z)[kVector], unsigned mask) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kVector; ++j) sum = fmaf(x[j] * y[j], z[j], sum);
  return sum_over_head<kLanes>(sum, mask);
}

// output = (group norm of y + (sum over the head of r k r_k) v) gate
template <int kLanes>
__global__ void __launch_bounds__(kThreads)
    group_norm_bonus_gate_forward(const void* y, const void* r, const void* k, const void* v, const void* gate,
                                  const void* r_k, const void* weight, const void* bias, float eps, void* output,
                                  int rows, int channels) {
  const unsigned mask = head_mask<kLanes>();
  int channel, first;
  if (!own_tile(rows, channels, kRowTile, channel, first)) return;
  const Packed packed_r_k = load(r_k, channel), packed_weight = load(weight, channel);
  const Packed packed_bias = load(bias, channel);
#pragma unroll
  for (int i = 0; i < kRowTile; ++i) {
    const int row = first + i;
    if (row >= rows) break;
    const int64_t offset = int64_t(row) * channels + channel;
    float value[kVector], receptance[kVector], key[kVector], other[kVector];
    load(y, offset, value);
    load(r, offset, receptance);
    load(k, offset, key);
    normalise<kLanes>(value, eps, mask);
    unpack(packed_r_k, other);
    const float bonus = head_product<kLanes>(receptance, key, other, mask);
    unpack(packed_weight, receptance);
    unpack(packed_bias, key);
    load(v, offset, other);
#pragma unroll
    for (int j = 0; j < kVector; ++j) value[j] = fmaf(bonus, other[j], fmaf(value[j], receptance[j], key[j]));
    load(gate, offset, other);
#pragma unroll
    for (int j = 0; j < kVector; ++j) value[j] *= other[j];
    store(output, offset, value);
  }
}

template <int kLanes>
__global__ void __launch_bounds__(kThreads)
    group_norm_bonus_gate_backward(const void* y, const void* r, const void* k, const void* v, const void* gate,
                                   const void* r_k, const void* weight, const void* bias, float eps,
                                   const void* grad_output, void* grad_y, void* grad_r, void* grad_k, void* grad_v,
                                   void* grad_gate, int rows, int channels) {
  constexpr float kShare = 1.0f / (kLanes * kVector);
  const unsigned mask = head_mask<kLanes>();
  int channel, first;
  if (!own_tile(rows, channels, kRowTile, channel, first)) return;
  const Packed packed_r_k = load(r_k, channel), packed_weight = load(weight, channel);
  const Packed packed_bias = load(bias, channel);
  const bool of_bonus = grad_r != nullptr || grad_k != nullptr || grad_v != nullptr || grad_gate != nullptr;
#pragma unroll
  for (int i = 0; i < kRowTile; ++i) {
    const int row = first + i;
    if (row >= rows) break;
    const int64_t offset = int64_t(row) * channels + channel;
    float grad[kVector], g[kVector], value[kVector], part[kVector];
    load(grad_output, offset, grad);
    load(gate, offset, g);
    load_written(y, offset, value);
    const float inverse = normalise<kLanes>(value, eps, mask);
    if (of_bonus) {
      float receptance[kVector], key[kVector], v_of[kVector], scale[kVector];
      load(r, offset, receptance);
      load(k, offset, key);
      load(v, offset, v_of);
      unpack(packed_r_k, scale);
      const float bonus = head_product<kLanes>(receptance, key, scale, mask);
      const float of_sum = head_product<kLanes>(grad, g, v_of, mask);
      if (grad_gate != nullptr) {
        float shift[kVector];
        unpack(packed_weight, part);
        unpack(packed_bias, shift);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          part[j] = grad[j] * fmaf(bonus, v_of[j], fmaf(value[j], part[j], shift[j]));
        }
        store(grad_gate, offset, part);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) grad[j] *= g[j];
      if (grad_v != nullptr) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) part[j] = bonus * grad[j];
        store(grad_v, offset, part);
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) scale[j] *= of_sum;
      if (grad_r != nullptr) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) part[j] = scale[j] * key[j];
        store(grad_r, offset, part);
      }
      if (grad_k != nullptr) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) part[j] = scale[j] * receptance[j];
        store(grad_k, offset, part);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) grad[j] *= g[j];
    }
    if (grad_y == nullptr) continue;
    unpack(packed_weight, part);
    float sum = 0.0f, projection = 0.0f;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      grad[j] *= part[j];
      sum += grad[j];
      projection = fmaf(grad[j], value[j], projection);
    }
    sum = sum_over_head<kLanes>(sum, mask) * kShare;
    projection = sum_over_head<kLanes>(projection, mask) * kShare;
#pragma unroll
    for (int j = 0; j < kVector; ++j) grad[j] = inverse * (grad[j] - sum - value[j] * projection);
    store(grad_y, offset, grad);
  }
}

// Sums over each tile of rows what weight, bias and r_k get: with p = grad_output gate, p times the normalised y, p,
// and the sum over the head of p v, times r k.
template <int kLanes>
__global__ void __launch_bounds__(kSumThreads)
    group_norm_bonus_gate_sums(const void* y, const void* r, const void* k, const void* v, const void* gate, float eps,
                               const void* grad_output, float* of_r_k, float* of_weight, float* of_bias, int stride,
                               int tile, int rows, int channels) {
  const unsigned mask = head_mask<kLanes>();
  int channel, first, end;
  own_rows(rows, channels, tile, channel, first, end);
  float sum_weight[kVector], sum_bias[kVector], sum_r_k[kVector];
  clear(sum_weight);
  clear(sum_bias);
  clear(sum_r_k);
  for (int row = first; row < end; row += kSumWarps) {
    const int64_t offset = int64_t(row) * channels + channel;
    float grad[kVector], value[kVector];
    load(gate, offset, value);
    load(grad_output, offset, grad);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      grad[j] *= value[j];
      sum_bias[j] += grad[j];
    }
    if (of_weight != nullptr) {
      load(y, offset, value);
      normalise<kLanes>(value, eps, mask);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum_weight[j] = fmaf(grad[j], value[j], sum_weight[j]);
    }
    if (of_r_k != nullptr) {
      float key[kVector], ones[kVector];
      load(v, offset, value);
#pragma unroll
      for (int j = 0; j < kVector; ++j) ones[j] = 1.0f;
      const float of_sum = head_product<kLanes>(grad, value, ones, mask);
      load(r, offset, value);
      load(k, offset, key);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum_r_k[j] = fmaf(of_sum * value[j], key[j], sum_r_k[j]);
    }
  }
  const int64_t place = int64_t(blockIdx.y) * stride;
  if (of_weight != nullptr) store_sums(of_weight + place, channels, sum_weight);
  if (of_bias != nullptr) store_sums(of_bias + place, channels, sum_bias);
  if (of_r_k != nullptr) store_sums(of_r_k + place, channels, sum_r_k);
}

}  // namespace elementwise
