// Many tensors of fp32 rounded to bf16 by one launch: a block has a piece of one of them.
//
// src/ops/cast.py launches it.

#include "types.cuh"

namespace cast {

constexpr int kMost = 32;  // tensors of a launch
constexpr int kThreads = 256;
constexpr int kVector = 8;
constexpr int kVectors = 2;  // of a thread
constexpr int kPiece = kThreads * kVector * kVectors;

// A launch's tensors; `end` counts pieces up to a tensor's last one, and goes on with the same number behind the last
// tensor. What is written has rows of `width` values that are `stride` apart.
struct Tensors {
  const float* from[kMost];
  uint16_t* to[kMost];
  int count[kMost];
  int end[kMost];
  int width[kMost];
  int stride[kMost];
};

// Where a value goes.
__device__ __forceinline__ int64_t place_of(int value, int width, int stride) {
  const int row = value / width;
  return int64_t(row) * stride + (value - row * width);
}

__device__ __forceinline__ bool aligned(const void* pointer) { return ((uint64_t)pointer & 15) == 0; }

__global__ void __launch_bounds__(kThreads) to_bf16_kernel(Tensors tensors) {
  const int block = blockIdx.x;
  int number = 0;
#pragma unroll
  for (int step = kMost / 2; step; step /= 2)
    if (block >= tensors.end[number + step - 1]) number += step;
  const float* from = tensors.from[number];
  uint16_t* to = tensors.to[number];
  const int count = tensors.count[number], width = tensors.width[number], stride = tensors.stride[number];
  const int piece = block - (number ? tensors.end[number - 1] : 0);
  const bool vectors = aligned(from) && aligned(to) && width % kVector == 0 && stride % kVector == 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int begin = piece * kPiece + (i * kThreads + (int)threadIdx.x) * kVector;
    if (vectors && begin + kVector <= count) {
      const float4* four = reinterpret_cast<const float4*>(from + begin);
      const float4 one = four[0], other = four[1];
      *reinterpret_cast<uint4*>(to + place_of(begin, width, stride)) =
          make_uint4(pack_bf16(one.x, one.y), pack_bf16(one.z, one.w), pack_bf16(other.x, other.y),
                     pack_bf16(other.z, other.w));
    } else {
      for (int at = begin; at < min(begin + kVector, count); ++at)
        to[place_of(at, width, stride)] = (uint16_t)pack_bf16(from[at], 0.0f);
    }
  }
}

}  // namespace cast
