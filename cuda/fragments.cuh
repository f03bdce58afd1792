// Products of 16 x 16 and 16 x 8 values on tensor cores, and the words that their operands are.
#ifndef FRAGMENTS_CUH
#define FRAGMENTS_CUH

#include "types.cuh"

namespace fragments {

// c += a * b of 16 x 16 and 16 x 8 places, see wkv6_primitives.cuh.
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Neighbouring values, as words of two; zeros where there are none.
template <int kWords>
__device__ __forceinline__ void load(uint32_t (&words)[kWords], const uint16_t* from, bool exists) {
  if constexpr (kWords == 2) {
    const uint2 vector = exists ? *reinterpret_cast<const uint2*>(from) : make_uint2(0, 0);
    words[0] = vector.x, words[1] = vector.y;
  } else {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 vector = exists ? *reinterpret_cast<const uint4*>(from + 2 * w) : make_uint4(0, 0, 0, 0);
      words[w] = vector.x, words[w + 1] = vector.y, words[w + 2] = vector.z, words[w + 3] = vector.w;
    }
  }
}

}  // namespace fragments

#endif
