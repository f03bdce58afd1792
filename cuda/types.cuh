// Integers of fixed width and bf16, so that no header of a CUDA toolkit is needed: NVRTC has none.
#ifndef TYPES_CUH
#define TYPES_CUH

#ifdef __CUDACC_RTC__
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
#else
#include <cstdint>
#endif

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Rounds two floats to bf16, to the nearest: `low` in the lower half of the word.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// bf16 is the upper half of a float.
__device__ __forceinline__ float low_half(uint32_t packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float high_half(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }
__device__ __forceinline__ float bf16_to_float(uint16_t value) { return __uint_as_float(uint32_t(value) << 16); }

#endif
