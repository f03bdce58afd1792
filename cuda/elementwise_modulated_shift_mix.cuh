// Token shift and mix whose modulation is a product, hidden_g @ up_g, that is computed where it is used and not stored.
//
// A warp has 64 channels of a tile of rows, on tensor cores: channels down, rows across. Which channel, row or term of
// the sum stands at which place of a fragment is free as long as the operands agree, and is chosen so that lane (c, q)
// has, as a thread of the other token shifts, 8 neighbouring channels, 8c to 8c + 7, of neighbouring rows, as many as
// R = 2 * kTiles, R q to R q + R - 1. So a warp moves whole lines of 128 bytes, and a row's neighbour is at hand.
//   term tile s (16 places): places 2q, 2q + 1 and 2q + 8, 2q + 9 are four neighbours, from term q * kWidth/4 + 4s on
//   channel tile t (16 places): places c and c + 8 are channels 8c + 2t and 8c + 2t + 1
//   row tile j (8 places): places 2q and 2q + 1 are rows R q + 2j and R q + 2j + 1
// Sums are fp32, begin with maa, and are not rounded.
//
// Nothing is beyond an end: what would lie behind the last row or channel is the last one again, computed and written
// once more with the same bits.
#ifndef ELEMENTWISE_MODULATED_SHIFT_MIX_CUH
#define ELEMENTWISE_MODULATED_SHIFT_MIX_CUH

#include "elementwise_shift_mix.cuh"
#include "fragments.cuh"

namespace elementwise {

constexpr int kModulatedMixes = 5;
constexpr int kWarpChannels = 64;
constexpr uint32_t kAllLanes = 0xffffffffu;

// What is multiplied: hidden [rows, mixes * width] and up [mixes, width, channels], bf16.
struct Modulation {
  const void* hidden;
  const void* up;
};

// A block's share of the parameters: up as fragments, and maa.
template <int kWidth>
struct Parameters {
  static constexpr int kSteps = kWidth / 16;
  uint4 up[kModulatedMixes][kSteps][4][32];
  Packed maa[kModulatedMixes][8];
};

// A lane's terms of one row for each of its row tiles: word w of two is pair w % 4 of vector w / 4.
template <int kWidth, int kTiles>
struct Terms {
  Packed of[kTiles][kWidth / 32];
};

// A lane's channels, of the 64 that begin with `first`.
__device__ __forceinline__ int own_channel(const ShiftMix& a, int first, int c) {
  return min(first + c * kVector, a.channels - kVector);
}

// The number of a vector, which takes half the registers of an offset, where `vectors` of them lie between rows.
__device__ __forceinline__ uint32_t vector_of(const ShiftMix& a, int row, int channel, int vectors) {
  return uint32_t(min(row, a.rows - 1)) * uint32_t(vectors) + uint32_t(channel / kVector);
}

__device__ __forceinline__ uint32_t vector_of(const ShiftMix& a, int row, int channel) {
  return vector_of(a, row, channel, a.channels / kVector);
}

__device__ __forceinline__ Packed load_vector(const void* base, uint32_t number) {
  return load(base, int64_t(number) * kVector);
}

__device__ __forceinline__ void store_vector(void* base, uint32_t number, const float (&values)[kVector]) {
  store(base, int64_t(number) * kVector, values);
}

// All threads of the block, whose channels begin with `first`.
template <int kWidth, int kBlockThreads>
__device__ __forceinline__ void load_parameters(Parameters<kWidth>& to, const ShiftMix& a, const void* up, int first) {
  constexpr int kSteps = Parameters<kWidth>::kSteps, kItems = kModulatedMixes * kSteps * 32;
#pragma unroll
  for (int begin = 0; begin < kItems; begin += kBlockThreads) {
    const int item = begin + int(threadIdx.x);
    if (item >= kItems) break;
    const int lane = item % 32, step = item / 32 % kSteps, g = item / 32 / kSteps;
    const int channel = own_channel(a, first, lane / 4), term = g * kWidth + lane % 4 * (kWidth / 4) + 4 * step;
    Packed rows[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) rows[r] = load(up, int64_t(term + r) * a.channels + channel);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const uint32_t r0 = rows[0].pair[t], r1 = rows[1].pair[t], r2 = rows[2].pair[t], r3 = rows[3].pair[t];
      to.up[g][step][t][lane] = make_uint4((r0 & 0xffffu) | r1 << 16, r0 >> 16 | (r1 & 0xffff0000u),
                                           (r2 & 0xffffu) | r3 << 16, r2 >> 16 | (r3 & 0xffff0000u));
    }
  }
  if (threadIdx.x < kModulatedMixes * 8) {
    const int g = int(threadIdx.x) / 8, c = int(threadIdx.x) % 8;
    to.maa[g][c] = load_parameter(a.maa, int64_t(g) * a.channels + own_channel(a, first, c), a.wide);
  }
  __syncthreads();
}

// For the tile of rows that begins with `first`.
template <int kWidth, int kTiles>
__device__ __forceinline__ void load_terms(Terms<kWidth, kTiles>& terms, const ShiftMix& a, const void* hidden, int g,
                                           int first) {
  const int lane = threadIdx.x % 32, c = lane / 4, q = lane % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int row = min(first + 2 * kTiles * (c / 2) + 2 * j + c % 2, a.rows - 1);
    const int64_t offset = (int64_t(row) * kModulatedMixes + g) * kWidth + q * (kWidth / 4);
#pragma unroll
    for (int v = 0; v < kWidth / 32; ++v) terms.of[j][v] = load(hidden, offset + v * kVector);
  }
}

// maa_g + hidden_g @ up_g: channel 2t + h of row 2j + b of the lane's is sums[j][t][2h + b].
template <int kWidth, int kTiles>
__device__ __forceinline__ void compute_proportions(float (&sums)[kTiles][4][4], const Parameters<kWidth>& parameters,
                                                    int g, const Terms<kWidth, kTiles>& terms) {
  const int lane = threadIdx.x % 32;
  float maa[kVector];
  unpack(parameters.maa[g][lane / 4], maa);
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][t][i] = maa[2 * t + i / 2];
#pragma unroll
  for (int s = 0; s < Parameters<kWidth>::kSteps; ++s) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const uint4 up = parameters.up[g][s][t][lane];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const Packed& words = terms.of[j][s / 2];
        fragments::multiply_add(sums[j][t], up.x, up.y, up.z, up.w, words.pair[s % 2 * 2], words.pair[s % 2 * 2 + 1]);
      }
    }
  }
}

// Which of the rows from `row` to `row + kRows` do not follow the one before them in their sequence, a bit for each: it
// begins there, they are behind the last row, or `previous` says what they follow.
template <int kRows>
__device__ __forceinline__ uint32_t find_starts(const ShiftMix& a, int row) {
  if (a.previous != nullptr) return ~0u;
  uint32_t starts = 0;
  int position = row % a.tokens;
#pragma unroll
  for (int i = 0; i <= kRows; ++i) {
    starts |= uint32_t(position == 0 || row + i >= a.rows) << i;
    position = position + 1 == a.tokens ? 0 : position + 1;
  }
  return starts;
}

// z of the lane's rows, `row` being the first, whose vectors are named, and what it is mixed with less z.
template <int kRows>
__device__ __forceinline__ void load_deltas(const ShiftMix& a, uint32_t starts, int row, int channel,
                                            const uint32_t (&vector)[kRows], Packed (&z)[kRows],
                                            float (&delta)[kRows][kVector]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) z[i] = load_vector(a.z, vector[i]);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i > 0 && !(starts >> i & 1)) {
      unpack(z[i - 1], delta[i]);
    } else {
      load_shifted(a, min(row + i, a.rows - 1), channel, delta[i]);
    }
    float own[kVector];
    unpack(z[i], own);
#pragma unroll
    for (int j = 0; j < kVector; ++j) delta[i][j] -= own[j];
  }
}

// grid (groups of 64 channels, parts of the rows): each of the kWarps warps has `chunk` rows, whole tiles. kResident: warps of a
// multiprocessor, for which the registers are to suffice.
template <int kWidth, int kWarps, int kTiles, int kResident>
__global__ void __launch_bounds__(32 * kWarps, kResident / kWarps)
    modulated_shift_mix_forward_kernel(ShiftMix a, Modulation modulation, const __grid_constant__ MixOutputs outputs,
                                       int chunk) {
  constexpr int kRows = 2 * kTiles, kTileRows = 4 * kRows;
  __shared__ Parameters<kWidth> parameters;
  load_parameters<kWidth, 32 * kWarps>(parameters, a, modulation.up, blockIdx.x * kWarpChannels);
  const int lane = threadIdx.x % 32, c = lane / 4, q = lane % 4;
  const int channel = own_channel(a, blockIdx.x * kWarpChannels, c);
  const int begin = (blockIdx.y * kWarps + threadIdx.x / 32) * chunk, end = min(a.rows, begin + chunk);
#pragma unroll 1
  for (int first = begin; first < end; first += kTileRows) {
    const int row = first + kRows * q;
    uint32_t vector[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) vector[i] = vector_of(a, row + i, channel);
    Terms<kWidth, kTiles> terms;
    load_terms(terms, a, modulation.hidden, 0, first);
    Packed z[kRows];
    float delta[kRows][kVector];
    load_deltas(a, find_starts<kRows>(a, row), row, channel, vector, z, delta);
#pragma unroll 1
    for (int g = 0; g < kModulatedMixes; ++g) {
      float proportion[kTiles][4][4];
      compute_proportions(proportion, parameters, g, terms);
      if (g + 1 < kModulatedMixes) load_terms(terms, a, modulation.hidden, g + 1, first);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float mixed[kVector];
        unpack(z[i], mixed);
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          mixed[j] = fmaf(delta[i][j], proportion[i / 2][j / 2][j % 2 * 2 + i % 2], mixed[j]);
        store_vector(outputs.mix[g], vector_of(a, row + i, channel, outputs.vectors[g]), mixed);
      }
    }
  }
}

// What a row sends back to the row it was mixed with; no row (-1) sends zeros. Lanes of one q name the same row, and
// all lanes of the warp are here.
template <int kWidth>
__device__ __forceinline__ void compute_sent_back(const ShiftMix& a, const void* hidden, const MixPointers& grads,
                                                  const Parameters<kWidth>& parameters, int row, int channel,
                                                  float (&sent)[kVector]) {
  const int lane = threadIdx.x % 32, c = lane / 4, q = lane % 4;
  const int row_of_place = __shfl_sync(kAllLanes, row, c / 2);
  clear(sent);
#pragma unroll 1
  for (int g = 0; g < kModulatedMixes; ++g) {
    if (grads.mix[g] == nullptr) continue;
    Terms<kWidth, 1> terms;
    const int64_t offset = (int64_t(row_of_place) * kModulatedMixes + g) * kWidth + q * (kWidth / 4);
#pragma unroll
    for (int v = 0; v < kWidth / 32; ++v)
      terms.of[0][v] = row_of_place >= 0 && c % 2 == 0 ? load(hidden, offset + v * kVector) : Packed{};
    float proportion[1][4][4], grad[kVector];
    compute_proportions(proportion, parameters, g, terms);
    unpack(row >= 0 ? load(grads.mix[g], int64_t(row) * a.channels + channel) : Packed{}, grad);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sent[j] = fmaf(grad[j], proportion[0][j / 2][j % 2 * 2], sent[j]);
  }
}

// A lane's gradients of mix g; zeros where there are none.
template <int kRows>
__device__ __forceinline__ void load_grads(const void* grad, const uint32_t (&vector)[kRows],
                                           Packed (&values)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    values[i] = grad != nullptr ? load_vector(grad, vector[i]) : Packed{};
}

// Walks its rows from the last tile to the first: what the row after a tile sends back is then at hand. Only the row
// after the last tile is computed twice. Grid as forward.
template <int kWidth, int kWarps, int kTiles, int kResident>
__global__ void __launch_bounds__(32 * kWarps, kResident / kWarps)
    modulated_shift_mix_backward_kernel(ShiftMix a, Modulation modulation, const __grid_constant__ MixPointers grads,
                                        const int* __restrict__ children, void* grad_z, void* grad_carry,
                                        void* grad_modulation, int chunk) {
  constexpr int kRows = 2 * kTiles, kTileRows = 4 * kRows;
  __shared__ Parameters<kWidth> parameters;
  load_parameters<kWidth, 32 * kWarps>(parameters, a, modulation.up, blockIdx.x * kWarpChannels);
  const int lane = threadIdx.x % 32, c = lane / 4, q = lane % 4;
  const int channel = own_channel(a, blockIdx.x * kWarpChannels, c);
  const int begin = (blockIdx.y * kWarps + threadIdx.x / 32) * chunk, end = min(a.rows, begin + chunk);
  if (begin >= end) return;
  float from_after[kVector];  // to the last row of a tile, which lanes of q == 3 have
  clear(from_after);
  if (end < a.rows)
    compute_sent_back<kWidth>(a, modulation.hidden, grads, parameters, q == 3 ? end : -1, channel, from_after);
#pragma unroll 1
  for (int first = begin + (end - 1 - begin) / kTileRows * kTileRows; first >= begin; first -= kTileRows) {
    const int row = first + kRows * q;
    uint32_t vector[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) vector[i] = vector_of(a, row + i, channel);
    Terms<kWidth, kTiles> terms;
    Packed grad[kRows];
    load_grads(grads.mix[0], vector, grad);
    load_terms(terms, a, modulation.hidden, 0, first);
    const uint32_t starts = find_starts<kRows>(a, row);
    float delta[kRows][kVector];
    if (grad_modulation != nullptr) {
      Packed z[kRows];
      load_deltas(a, starts, row, channel, vector, z, delta);
    }
    float total[kRows][kVector], sent[kRows][kVector];
#pragma unroll
    for (int i = 0; i < kRows; ++i) clear(total[i]), clear(sent[i]);
#pragma unroll 1
    for (int g = 0; g < kModulatedMixes; ++g) {
      Packed next[kRows];
      if (g + 1 < kModulatedMixes) load_grads(grads.mix[g + 1], vector, next);
      float proportion[kTiles][4][4];
      compute_proportions(proportion, parameters, g, terms);
      if (g + 1 < kModulatedMixes) load_terms(terms, a, modulation.hidden, g + 1, first);
      uint16_t* of_mix = static_cast<uint16_t*>(grad_modulation) + int64_t(g) * a.rows * a.channels;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float own[kVector];
        unpack(grad[i], own);
        grad[i] = next[i];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          total[i][j] += own[j];
          sent[i][j] = fmaf(own[j], proportion[i / 2][j / 2][j % 2 * 2 + i % 2], sent[i][j]);
        }
        if (grad_modulation != nullptr) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) own[j] *= delta[i][j];
          store_vector(of_mix, vector[i], own);
        }
      }
    }
    float from_next[kVector];  // of the lane's rows: what the one after them sends back
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float of_next_lane = __shfl_sync(kAllLanes, sent[0][j], lane / 4 * 4 + (q + 1) % 4);
      from_next[j] = q == 3 ? from_after[j] : of_next_lane;
      from_after[j] = of_next_lane;
    }
#pragma unroll
    for (int i = kRows - 1; i >= 0; --i) {
      const int own = min(row + i, a.rows - 1);
#pragma unroll
      for (int j = 0; j < kVector; ++j) total[i][j] -= sent[i][j];
      if (children == nullptr) {
        if (!(starts >> (i + 1) & 1)) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) total[i][j] += from_next[j];
        }
      } else {
        int child = children[own];
        while (__any_sync(kAllLanes, child >= 0)) {
          float from_child[kVector];
          const int other = child == own + 1 ? -1 : child;
          if (__any_sync(kAllLanes, other >= 0)) {
            compute_sent_back<kWidth>(a, modulation.hidden, grads, parameters, other, channel, from_child);
          } else {
            clear(from_child);
          }
          if (child >= 0) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) total[i][j] += other >= 0 ? from_child[j] : from_next[j];
            child = children[a.rows + child];
          }
        }
      }
      store_vector(grad_z, vector[i], total[i]);
      if (grad_carry != nullptr && own % a.tokens == 0)
        store(grad_carry, int64_t(own / a.tokens) * a.channels + channel, sent[i]);
#pragma unroll
      for (int j = 0; j < kVector; ++j) from_next[j] = sent[i][j];
    }
  }
}

}  // namespace elementwise

#endif
