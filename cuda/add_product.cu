// y += h u with a narrow h: y [rows, columns] and h [rows, rank] by rows, u [rank, columns] by rows or by columns, all
// bf16, sums in fp32. It is bound by y, which is read and written once in 16-byte vectors.
//
// A warp has 16 rows after another and a few columns, whose u stays in its registers. As in block_diagonal.cu, which
// value stands at which place of a fragment is chosen so that a lane's are neighbours: with W = rank / 8 words of two
// values, lane (row, q) has h's values q * rank/4 to (q + 1) * rank/4 - 1 of its row, word 2s at places 2q, 2q + 1 of
// step s and word 2s + 1 at places 2q + 8, 2q + 9. Of 32 columns it has 8q to 8q + 7, columns 2t and 2t + 1 of these
// from tile t: place c of tile t is column 8 (c / 2) + 2t + c % 2.

#include "fragments.cuh"
#include "types.cuh"

namespace add_product {

using fragments::load;
using fragments::multiply_add;

constexpr int kWarps = 4;
constexpr int kRows = 16;  // of a warp at a time
constexpr int kTiles = 4;  // of 8 places, 32 columns
constexpr int kColumns = 32;

// A batch's tensors: values from one to the next.
struct Strides {
  int64_t y, h, u;
};

// Word w of the lane's values of u, for tile t of its columns: those that the lane's place `c` stands for.
template <int kWords, bool kByColumns>
__device__ __forceinline__ void load_u(uint32_t (&words)[kTiles][kWords], const uint16_t* u, int column, int columns,
                                       int c, int q) {
  constexpr int kRank = 8 * kWords;
  if constexpr (kByColumns) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int own = column + 8 * (c / 2) + 2 * t + c % 2;
      load<kWords>(words[t], u + int64_t(own) * kRank + q * 2 * kWords, own < columns);
    }
  } else {
    const int own = column + 8 * (c / 2);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint16_t* from = u + int64_t(2 * (q * kWords + w)) * columns + own;
      uint32_t even[kTiles], odd[kTiles];
      load<kTiles>(even, from, own < columns);
      load<kTiles>(odd, from + columns, own < columns);
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        words[t][w] = c % 2 ? even[t] >> 16 | (odd[t] & 0xffff0000u) : (even[t] & 0xffffu) | odd[t] << 16;
    }
  }
}

// grid (column groups, row chunks of `chunk` rows, batch); kGroups: how many times 32 columns a block has.
template <int kRank, int kGroups, bool kByColumns>
__global__ void __launch_bounds__(32 * kWarps)
    kernel(uint16_t* y, const uint16_t* h, const uint16_t* u, Strides strides, int rows, int columns, int chunk) {
  constexpr int kWords = kRank / 8;
  y += blockIdx.z * strides.y;
  h += blockIdx.z * strides.h;
  u += blockIdx.z * strides.u;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane / 4, q = lane % 4;
  const int column = blockIdx.x * kGroups * kColumns;
  uint32_t of_u[kGroups][kTiles][kWords];
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    load_u<kWords, kByColumns>(of_u[group], u, column + group * kColumns, columns, c, q);
  const int first = blockIdx.y * chunk, end = min(rows, first + chunk);
#pragma unroll 1
  for (int begin = first + warp * kRows; begin < end; begin += kWarps * kRows) {
    uint32_t of_h[2][kWords], of_y[kGroups][2][kTiles];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = begin + 8 * half + c;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int own = column + group * kColumns + 8 * q;
        load<kTiles>(of_y[group][half], y + int64_t(row) * columns + own, row < end && own < columns);
      }
      load<kWords>(of_h[half], h + int64_t(row) * kRank + q * 2 * kWords, row < end);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float sum[kTiles][4] = {};
#pragma unroll
      for (int s = 0; s < kWords; s += 2)
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          multiply_add(sum[t], of_h[0][s], of_h[1][s], of_h[0][s + 1], of_h[1][s + 1], of_u[group][t][s],
                       of_u[group][t][s + 1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = begin + 8 * half + c, own = column + group * kColumns + 8 * q;
        uint32_t(&words)[kTiles] = of_y[group][half];
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
          words[t] = pack_bf16(low_half(words[t]) + sum[t][2 * half], high_half(words[t]) + sum[t][2 * half + 1]);
        if (row < end && own < columns)
          *reinterpret_cast<uint4*>(y + int64_t(row) * columns + own) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

}  // namespace add_product
