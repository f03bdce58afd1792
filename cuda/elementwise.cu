// Fused element-wise kernels of a layer, forward and backward.
//
// They are bound by memory: each tensor is read once and written once in 16-byte vectors, parameters ([channels] rows)
// stay in registers over a tile of tokens. Sums have a fixed order and there are no atomics, so results are
// reproducible bit for bit.
//
// A thread owns 8 neighbouring channels ("a vector") of a tile of consecutive rows; norms and logits, whose sums run
// along a row, have a block for each row.

#include <type_traits>

#include "elementwise.h"
#include "elementwise_activations.cuh"
#include "elementwise_add_norm.cuh"
#include "elementwise_group_norm_gate.cuh"
#include "elementwise_logits.cuh"
#include "elementwise_primitives.cuh"
#include "elementwise_shift_mix.cuh"

namespace elementwise {
namespace {

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

// Calls launch(std::integral_constant<int, kHeld>) with as many vectors as a thread has to hold.
template <typename Launch>
cudaError_t for_row_of(int channels, const Launch& launch) {
  const int held = (channels / kVector + kNormThreads - 1) / kNormThreads;
  if (held <= 1) return launch(std::integral_constant<int, 1>());
  if (held <= 2) return launch(std::integral_constant<int, 2>());
  if (held <= kMostHeld) return launch(std::integral_constant<int, kMostHeld>());
  return cudaErrorInvalidValue;
}

template <typename Body>
cudaError_t launch_each_vector(int64_t count, const Body& body, cudaStream_t stream) {
  constexpr int64_t kPerBlock = int64_t(kThreads) * kPerThread * kVector;
  each_vector_kernel<<<(count + kPerBlock - 1) / kPerBlock, kThreads, 0, stream>>>(count, body);
  return cudaGetLastError();
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

cudaError_t shift_mix_maa_sums(const ShiftMix& a, const MixPointers& grads, float* sums, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const auto launch = [&](auto kernel) {
    const int tile = int(parameter_tile(a.rows, a.channels));
    kernel<<<blocks_for(a.rows, a.channels, tile), kThreads, 0, stream>>>(a, grads, tile, sums);
    return cudaGetLastError();
  };
  switch (a.mixes) {
    case 1:
      return launch(&shift_mix_maa_sums_kernel<1>);
    case 2:
      return launch(&shift_mix_maa_sums_kernel<2>);
    case 5:
      return launch(&shift_mix_maa_sums_kernel<5>);
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

cudaError_t group_norm_silu_gate_sums(const void* y, const void* gate, float eps, const void* grad_output, int rows,
                                      int channels, int head_size, const NormSums& sums, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const auto launch = [&](auto kernel) {
    const int tile = int(parameter_tile(rows, channels));
    kernel<<<blocks_for(rows, channels, tile), kThreads, 0, stream>>>(y, gate, eps, grad_output, rows, channels, tile,
                                                                      sums);
    return cudaGetLastError();
  };
  switch (head_size) {
    case 16:
      return launch(&group_norm_silu_gate_sums_kernel<2>);
    case 32:
      return launch(&group_norm_silu_gate_sums_kernel<4>);
    case 64:
      return launch(&group_norm_silu_gate_sums_kernel<8>);
    case 128:
      return launch(&group_norm_silu_gate_sums_kernel<16>);
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

cudaError_t add_norm_sums(const void* sum, const float* statistics, const void* grad_normed, int rows, int channels,
                          const NormSums& sums, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const int tile = int(parameter_tile(rows, channels));
  add_norm_sums_kernel<<<blocks_for(rows, channels, tile), kThreads, 0, stream>>>(sum, statistics, grad_normed, rows,
                                                                                  channels, tile, sums);
  return cudaGetLastError();
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
