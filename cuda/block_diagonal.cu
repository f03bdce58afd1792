// Products with a block-diagonal matrix: blocks P_b [r, r], each for r neighbouring channels of the rows.
//
// A warp has 16 rows and one block after another, on tensor cores. Which channel stands at which place of a fragment is
// free as long as both operands agree, and is chosen so that a lane's values of a row are neighbours, in operands and
// results alike: lane (row, q) has the channels q * r/4 to (q + 1) * r/4 - 1 of its block. So everything that moves,
// moves in whole vectors, the blocks as they are stored, and nothing is transposed on its way.
//
// With W = r / 8, the words of two bf16 that a lane has of a row, word w being values 2w and 2w + 1:
//   step s of the sum over channels (16 places): place 2q, 2q + 1 are word 2s, places 2q + 8, 2q + 9 are word 2s + 1
//   tile t of the results (8 places): forward places 2q, 2q + 1 are values 2t, 2t + 1; backward values t, W + t

#include "fragments.cuh"
#include "types.cuh"

namespace block_diagonal {

constexpr int kRows = 16;  // of a block of threads

using fragments::load;
using fragments::multiply_add;

template <int kWords>
__device__ __forceinline__ void store(uint16_t* to, const uint32_t (&words)[kWords], bool exists) {
  if (!exists) return;
#pragma unroll
  for (int w = 0; w < kWords; w += 4)
    *reinterpret_cast<uint4*>(to + 2 * w) = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
}

__device__ __forceinline__ uint32_t add(uint32_t pair, float low, float high) {
  return pack_bf16(low_half(pair) + low, high_half(pair) + high);
}

// moved = x + u and summed = the sum of u_b over the blocks that this part has, with u_b = P_b x_b.
//   x, moved [rows, channels], blocks [channels / r, r, r], summed [rows, parts * r]; all bf16
//   grid (row tiles, parts); kWarps warps
template <int kR, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    forward_kernel(const uint16_t* x, const uint16_t* blocks, uint16_t* moved, uint16_t* summed, int rows, int channels) {
  constexpr int kWords = kR / 8;
  __shared__ float sums[kRows][kR];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane / 4, q = lane % 4;
  const int row = blockIdx.x * kRows + c;
  const bool has_upper = row < rows, has_lower = row + 8 < rows;
  float sum[kWords][4] = {};
  for (int b = blockIdx.y * kWarps + warp; b < channels / kR; b += gridDim.y * kWarps) {
    const int64_t upper_at = int64_t(row) * channels + b * kR + 2 * kWords * q, lower_at = upper_at + int64_t(8) * channels;
    uint32_t upper[kWords], lower[kWords], moved_upper[kWords], moved_lower[kWords];
    load(upper, x + upper_at, has_upper);
    load(lower, x + lower_at, has_lower);
    const uint16_t* block = blocks + int64_t(b) * kR * kR + 2 * kWords * q;
#pragma unroll
    for (int t = 0; t < kWords; ++t) {
      uint32_t p[kWords];
      load(p, block + (2 * kWords * (c / 2) + 2 * t + c % 2) * kR, true);
      float u[4] = {};
#pragma unroll
      for (int w = 0; w < kWords; w += 2)
        multiply_add(u, upper[w], lower[w], upper[w + 1], lower[w + 1], p[w], p[w + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[t][i] += u[i];
      moved_upper[t] = add(upper[t], u[0], u[1]);
      moved_lower[t] = add(lower[t], u[2], u[3]);
    }
    store(moved + upper_at, moved_upper, has_upper);
    store(moved + lower_at, moved_lower, has_lower);
  }
  // Warp after warp, so that the same numbers are added in every run.
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int t = 0; t < kWords; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& place = sums[c + 8 * (i / 2)][2 * kWords * q + 2 * t + i % 2];
          place = turn == 0 ? sum[t][i] : place + sum[t][i];
        }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kRows * kR / 2; i += 32 * kWarps) {
    const int r = i / (kR / 2), pair = 2 * (i % (kR / 2)), at = blockIdx.x * kRows + r;
    if (at < rows)
      *reinterpret_cast<uint32_t*>(summed + (int64_t(at) * gridDim.y + blockIdx.y) * kR + pair) =
          pack_bf16(sums[r][pair], sums[r][pair + 1]);
  }
}

// added = grad + the gradient of summed, repeated for each block; grad becomes grad + P_bᵀ added_b: the gradient of x.
//   grad, added [rows, channels], grad_summed [rows, r], blocks as above; all bf16
//   grid (row tiles, parts); kWarps warps
template <int kR, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    backward_kernel(uint16_t* grad, const uint16_t* grad_summed, const uint16_t* blocks, uint16_t* added, int rows,
                    int channels) {
  constexpr int kWords = kR / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane / 4, q = lane % 4;
  const int row = blockIdx.x * kRows + c;
  const bool has_upper = row < rows, has_lower = row + 8 < rows;
  uint32_t summed_upper[kWords], summed_lower[kWords];
  load(summed_upper, grad_summed + int64_t(row) * kR + 2 * kWords * q, has_upper);
  load(summed_lower, grad_summed + int64_t(row + 8) * kR + 2 * kWords * q, has_lower);
  for (int b = blockIdx.y * kWarps + warp; b < channels / kR; b += gridDim.y * kWarps) {
    const int64_t upper_at = int64_t(row) * channels + b * kR + 2 * kWords * q, lower_at = upper_at + int64_t(8) * channels;
    uint32_t upper[kWords], lower[kWords], added_upper[kWords], added_lower[kWords];
    load(upper, grad + upper_at, has_upper);
    load(lower, grad + lower_at, has_lower);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      added_upper[w] = add(upper[w], low_half(summed_upper[w]), high_half(summed_upper[w]));
      added_lower[w] = add(lower[w], low_half(summed_lower[w]), high_half(summed_lower[w]));
    }
    store(added + upper_at, added_upper, has_upper);
    store(added + lower_at, added_lower, has_lower);
    const uint16_t* block = blocks + int64_t(b) * kR * kR + kWords * c;
    float sum[kWords][4] = {};
#pragma unroll
    for (int w = 0; w < kWords; w += 2) {
      uint32_t p[4][kWords / 2];  // four neighbouring rows of P_b, W values of each
#pragma unroll
      for (int i = 0; i < 4; ++i) load(p[i], block + (2 * kWords * q + 2 * w + i) * kR, true);
#pragma unroll
      for (int t = 0; t < kWords; ++t) {
        const int shift = t % 2 * 16;
        const uint32_t b0 = (p[0][t / 2] >> shift & 0xffffu) | (p[1][t / 2] >> shift << 16);
        const uint32_t b1 = (p[2][t / 2] >> shift & 0xffffu) | (p[3][t / 2] >> shift << 16);
        multiply_add(sum[t], added_upper[w], added_lower[w], added_upper[w + 1], added_lower[w + 1], b0, b1);
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int t = 2 * w % kWords, i = 2 * w / kWords;
      upper[w] = add(upper[w], sum[t][i], sum[t + 1][i]);
      lower[w] = add(lower[w], sum[t][2 + i], sum[t + 1][2 + i]);
    }
    store(grad + upper_at, upper, has_upper);
    store(grad + lower_at, lower, has_lower);
  }
}

}  // namespace block_diagonal
