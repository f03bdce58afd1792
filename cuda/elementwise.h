// Launchers of the element-wise kernels, between elementwise.cu (no torch header) and elementwise_binding.cpp.
//
// All activations are bf16, contiguous, 16-byte aligned; channel counts are multiples of 8, tensors have fewer than
// 2^32 vectors of 8. Arithmetic is fp32.
// Every launcher enqueues on `stream` and returns the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace elementwise {

constexpr int kVector = 8;  // bf16 values in 16 bytes
constexpr int kMaxMixes = 5;

// The gradient of a parameter is a sum over rows. Its launchers write one fp32 sum for each tile of this many rows, and
// leave the sum over tiles to the caller. As many threads as two blocks on each multiprocessor of an H100 have, one for
// each vector and tile, keep its memory busy and the sums at 1 MiB for each parameter row; no tile is below 8 rows.
constexpr int64_t parameter_tile(int64_t rows, int64_t channels) {
  constexpr int64_t kThreadsWanted = 2 * 132 * 128;
  const int64_t tile = rows * (channels / kVector) / kThreadsWanted;
  return tile < 8 ? 8 : tile;
}

constexpr int64_t parameter_tiles(int64_t rows, int64_t channels) {
  const int64_t tile = parameter_tile(rows, channels);
  return (rows + tile - 1) / tile;
}

// Where the sums for a norm's weight and bias go; null where it is not asked for.
struct NormSums {
  float* weight;   // [tiles, channels], as bias
  float* bias;
  int64_t stride;  // values from one tile to the next
};

// The G outputs of a token shift, or their gradients; a gradient that is not there is null.
struct MixPointers {
  void* mix[kMaxMixes];
};

// What both passes of the token shift read. Null: carry = zeros, modulation = zeros, previous = the row before.
struct ShiftMix {
  const void* z;            // [rows, channels]
  const void* carry;        // [rows / tokens, channels]: stands before the first token of each sequence
  const void* maa;          // [mixes, channels]
  const void* modulation;   // [mixes, rows, channels]
  const int64_t* previous;  // [rows], -1 where no token stands before; excludes carry
  int mixes;                // 1, 2 or 5
  int rows;                 // sequences * tokens
  int tokens;               // per sequence
  int channels;
};

cudaError_t shift_mix_forward(const ShiftMix& arguments, const MixPointers& outputs, cudaStream_t stream);

// children [2, rows] goes with `previous`: the first row that continues each row, and the next row that continues the
// same one; -1 ends a list. grad_carry and grad_modulation may be null.
cudaError_t shift_mix_backward(const ShiftMix& arguments, const MixPointers& grad_outputs, const int* children,
                               void* grad_z, void* grad_carry, void* grad_modulation, cudaStream_t stream);

// For the gradient of maa: sums [tiles, mixes, channels]. Of the arguments, maa and modulation are not read.
cudaError_t shift_mix_maa_sums(const ShiftMix& arguments, const MixPointers& grad_outputs, float* sums,
                               cudaStream_t stream);

// y, gate, output: [rows, channels]; weight, bias: [channels]; head_size 16, 32, 64 or 128.
cudaError_t group_norm_silu_gate_forward(const void* y, const void* gate, const void* weight, const void* bias,
                                         float eps, void* output, int rows, int channels, int head_size,
                                         cudaStream_t stream);

cudaError_t group_norm_silu_gate_backward(const void* y, const void* gate, const void* weight, const void* bias,
                                          float eps, const void* grad_output, void* grad_y, void* grad_gate, int rows,
                                          int channels, int head_size, cudaStream_t stream);

cudaError_t group_norm_silu_gate_sums(const void* y, const void* gate, float eps, const void* grad_output, int rows,
                                      int channels, int head_size, const NormSums& sums, cudaStream_t stream);

constexpr int kMostNormChannels = 8192;

// sum = x + delta, normed = layer norm of sum; x, delta, sum, normed: [rows, channels]; weight, bias: [channels].
// statistics [2, rows]: mean and inverse standard deviation of each row of sum. delta null: sum is x and not written.
cudaError_t add_norm_forward(const void* x, const void* delta, const void* weight, const void* bias, float eps,
                             void* sum, void* normed, float* statistics, int rows, int channels, cudaStream_t stream);

// The gradient of x and of delta alike; grad_sum may be null.
cudaError_t add_norm_backward(const void* sum, const float* statistics, const void* weight, const void* grad_normed,
                              const void* grad_sum, void* grad_x, int rows, int channels, cudaStream_t stream);

cudaError_t add_norm_sums(const void* sum, const float* statistics, const void* grad_normed, int rows, int channels,
                          const NormSums& sums, cudaStream_t stream);

cudaError_t squared_relu_forward(const void* x, void* output, int64_t count, cudaStream_t stream);

// grad_x may be grad_output.
cudaError_t squared_relu_backward(const void* x, const void* grad_output, void* grad_x, int64_t count,
                                  cudaStream_t stream);

// result = x + sigmoid(r) * value
cudaError_t sigmoid_gated_residual_forward(const void* x, const void* r, const void* value, void* result, int64_t count,
                                           cudaStream_t stream);

// result - x stands for sigmoid(r) * value. The gradient of x is that of the result.
cudaError_t sigmoid_gated_residual_backward(const void* x, const void* r, const void* result, const void* grad,
                                            void* grad_r, void* grad_value, int64_t count, cudaStream_t stream);

// logits [rows, vocabulary] -> per row: log p(target), largest logit, their logsumexp, and where the largest is (the
// lowest index of equal ones). A negative target gives logp 0 and max_logit 0.
cudaError_t logit_statistics(const void* logits, const int64_t* targets, float* logp, float* max_logit,
                             float* logsumexp, int* argmax, int rows, int vocabulary, cudaStream_t stream);

// Overwrites the logits by their gradient; rows with a negative target become zero.
cudaError_t logit_gradient(void* logits, const int64_t* targets, const float* logsumexp, const int* argmax,
                           const float* grad_logp, const float* grad_max_logit, int rows, int vocabulary,
                           cudaStream_t stream);

}  // namespace elementwise
