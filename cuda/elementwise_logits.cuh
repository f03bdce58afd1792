// Log-probabilities of targets: one block for each row of logits.
#ifndef ELEMENTWISE_LOGITS_CUH
#define ELEMENTWISE_LOGITS_CUH

#include "elementwise_primitives.cuh"

namespace elementwise {

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
  RowStatistics mine{-infinity(), 0.0f, vocabulary};
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
  logp[row] = counted ? bf16_to_float(static_cast<const uint16_t*>(logits)[base + target]) - total : 0.0f;
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

}  // namespace elementwise

#endif
