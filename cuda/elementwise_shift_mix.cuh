// Token shift and mix: out_g = z + (shifted - z) * (maa_g + modulation_g).
#ifndef ELEMENTWISE_SHIFT_MIX_CUH
#define ELEMENTWISE_SHIFT_MIX_CUH

#include "elementwise.h"
#include "elementwise_primitives.cuh"

namespace elementwise {

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
__global__ void __launch_bounds__(kThreads) shift_mix_forward_kernel(ShiftMix a, MixOutputs outputs) {
  int channel, first;
  if (!own_tile(a.rows, a.channels, kTile, channel, first)) return;
  Packed maa[kMixes];
#pragma unroll
  for (int g = 0; g < kMixes; ++g) maa[g] = load_parameter(a.maa, int64_t(g) * a.channels + channel, a.wide);
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
      store(outputs.mix[g], int64_t(row) * outputs.vectors[g] * kVector + channel, mixed);
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
  for (int g = 0; g < kMixes; ++g) maa[g] = load_parameter(a.maa, int64_t(g) * a.channels + channel, a.wide);
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

// Sums grad_g * (shifted - z) over each tile of rows: sums [tiles, mixes, channels].
template <int kMixes>
__global__ void __launch_bounds__(kSumThreads)
    shift_mix_maa_sums_kernel(ShiftMix a, MixPointers grads, int tile, float* __restrict__ sums) {
  int channel, first, end;
  own_rows(a.rows, a.channels, tile, channel, first, end);
  float sum[kMixes][kVector];
#pragma unroll
  for (int g = 0; g < kMixes; ++g) clear(sum[g]);
#pragma unroll 2
  for (int row = first; row < end; row += kSumWarps) {
    const int64_t offset = int64_t(row) * a.channels + channel;
    float z[kVector], delta[kVector];
    load(a.z, offset, z);
    load_shifted(a, row, channel, delta);
#pragma unroll
    for (int j = 0; j < kVector; ++j) delta[j] -= z[j];
#pragma unroll
    for (int g = 0; g < kMixes; ++g) {
      if (grads.mix[g] == nullptr) continue;
      float grad[kVector];
      load(grads.mix[g], offset, grad);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[g][j] = fmaf(grad[j], delta[j], sum[g][j]);
    }
  }
  float* of_tile = sums + int64_t(blockIdx.y) * kMixes * a.channels;
#pragma unroll
  for (int g = 0; g < kMixes; ++g) store_sums(of_tile + int64_t(g) * a.channels, a.channels, sum[g]);
}

}  // namespace elementwise

#endif
