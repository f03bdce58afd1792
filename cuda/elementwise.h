// Arguments of the element-wise kernels.
//
// `wide`: parameters are stored in fp32, from which they are rounded as they are read; else in bf16.
// All activations are bf16, 16-byte aligned, and contiguous, but for what a token shift makes; channel counts are
// multiples of 8, tensors have fewer than 2^32 vectors of 8. Arithmetic is fp32.
#pragma once

#include "types.cuh"

namespace elementwise {

constexpr int kVector = 8;  // bf16 values in 16 bytes
constexpr int kMaxMixes = 6;

// Where the sums for a norm's weight and bias go; null where it is not asked for.
struct NormSums {
  float* weight;   // [tiles, channels], as bias
  float* bias;
  int64_t stride;  // values from one tile to the next
};

// The gradients of the G outputs of a token shift; one that is not there is null.
struct MixPointers {
  void* mix[kMaxMixes];
};

// The G outputs themselves.
struct MixOutputs {
  void* mix[kMaxMixes];
  int vectors[kMaxMixes];  // of 8 values, from one row to the next
};

// What both passes of the token shift read. Null: carry = zeros, modulation = zeros, previous = the row before.
struct ShiftMix {
  const void* z;            // [rows, channels]
  const void* carry;        // [rows / tokens, channels]: stands before the first token of each sequence
  const void* maa;          // [mixes, channels]
  const void* modulation;   // [mixes, rows, channels]
  const int64_t* previous;  // [rows], -1 where no token stands before; excludes carry
  int mixes;                // 1, 2, 5 or 6
  int rows;                 // sequences * tokens
  int tokens;               // per sequence
  int channels;
  int wide;                 // whether maa is in fp32
};

constexpr int kMostNormChannels = 8192;

}  // namespace elementwise
