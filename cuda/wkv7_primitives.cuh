// What the WKV7 kernels are made of besides the instructions in wkv6_primitives.cuh (sm_80 and newer).
//
// Fragment layouts of the 16x8 products of tf32, with row = lane / 4 and quad = lane % 4:
//   A 16x8   a0 (row, k0) a1 (row + 8, k0) a2 (row, k1) a3 (row + 8, k1); k0 = quad, k1 = quad + 4
//   B 8x8    b0 (k0, n = row) b1 (k1, n = row)
//   C 16x8   as of those of bf16
// The order of k is free as long as A and B agree: here k0 and k1 are always neighbours, so that a C fragment is an A
// fragment (a0 a1 a2 a3 = c0 c2 c1 c3).
#ifndef WKV7_PRIMITIVES_CUH
#define WKV7_PRIMITIVES_CUH

#include "wkv6_primitives.cuh"

#define WKV7_DEVICE __device__ __forceinline__

WKV7_DEVICE void store_shared(uint32_t address, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
WKV7_DEVICE void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
WKV7_DEVICE uint32_t load_shared_word(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
WKV7_DEVICE void load_shared(uint32_t address, float (&x)[2]) { load_shared(address, x[0], x[1]); }
WKV7_DEVICE void load_shared(uint32_t address, float (&x)[4]) { load_shared(address, x[0], x[1], x[2], x[3]); }

// c += a * b: tf32 operands (floats whose last 13 bits are ignored), float sums.
WKV7_DEVICE void multiply_add(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// c += a * b: bfloat16 operands, float sums.
WKV7_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add(c, a[0], a[1], a[2], a[3], b0, b1);
}

WKV7_DEVICE float shuffle_down(float value, int distance) { return __shfl_down_sync(0xffffffffu, value, distance); }

// Of this thread.
WKV7_DEVICE void wait_for_all_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Brings 128 bytes nearer.
WKV7_DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// A barrier in shared memory (8 bytes) whose phases end when `count` threads have arrived. Others may use it after a
// barrier of the block.
//
// An arrival releases and a wait acquires, both for the block: PTX's defaults. So what comes before an arrival comes
// before what follows a wait for its phase: the thread's own accesses, and by __syncwarp those of its warp. Copies
// that were waited for are of the generic proxy as loads and stores are: no fence between proxies is wanted.
WKV7_DEVICE void init_barrier(uint32_t address, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
}
WKV7_DEVICE void arrive(uint32_t address) {
  asm volatile("{\n .reg .b64 token;\n mbarrier.arrive.shared.b64 token, [%0];\n}" ::"r"(address) : "memory");
}
// Waits for the end of a phase: 0 for the first, the third and so on, 1 for the others.
WKV7_DEVICE void wait_for_phase(uint32_t address, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
#endif
  }
}

WKV7_DEVICE float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// The tensor cores cut floats off behind 10 bits, which takes 0.35 * 2^-10 of a number on average. With that added
// before, operands are as exact as rounded ones, for one instruction instead of the four that rounding takes; NaN stays
// NaN.
constexpr float kBeforeCut = 1.0f + 0.35f / 1024;
WKV7_DEVICE float tf32(float x) { return x * kBeforeCut; }

#endif
