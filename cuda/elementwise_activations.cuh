// Activations: a thread has kPerThread vectors, a block's width apart.
#ifndef ELEMENTWISE_ACTIVATIONS_CUH
#define ELEMENTWISE_ACTIVATIONS_CUH

#include "elementwise_primitives.cuh"

namespace elementwise {

constexpr int kPerThread = 2;

// Calls body(offset) for each vector of this thread.
template <typename Body>
__device__ __forceinline__ void for_own_vectors(int64_t count, const Body& body) {
  const int64_t start = (int64_t(blockIdx.x) * kThreads * kPerThread + threadIdx.x) * kVector;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t offset = start + int64_t(i) * kThreads * kVector;
    if (offset < count) body(offset);
  }
}

template <typename Body>
__global__ void __launch_bounds__(kThreads) each_vector_kernel(int64_t count, Body body) {
  for_own_vectors(count, body);
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

// Both in place: x becomes its squared ReLU, and that one's gradient becomes x's.
struct SquaredReluAndGradient {
  void* x;
  void* grad;
  __device__ void operator()(int64_t offset) const {
    float value[kVector], gradient[kVector];
    load_written(x, offset, value);
    load_written(grad, offset, gradient);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float positive = fmaxf(value[j], 0.0f);
      gradient[j] *= 2.0f * positive;
      value[j] = positive * positive;
    }
    store(x, offset, value);
    store(grad, offset, gradient);
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

}  // namespace elementwise

#endif
