// Thin names for the few PTX instructions that the WKV6 kernels are made of (sm_80 and newer).
//
// Fragment layouts of the 16x8 matrix products, with row = lane / 4 and pair = 2 * (lane % 4):
//   A 16x16 (row-major)    a0 (row, pair) a1 (row + 8, pair) a2 (row, pair + 8) a3 (row + 8, pair + 8); two values each
//   B 16x8  (k x n)        b0 (k = pair, n = row) b1 (k = pair + 8, n = row); two values each, neighbours in k
//   C 16x8  (float)        c0 c1 (row, pair and pair + 1), c2 c3 (row + 8, ...)
#ifndef WKV6_PRIMITIVES_CUH
#define WKV6_PRIMITIVES_CUH

#include "types.cuh"

#define WKV6_DEVICE __device__ __forceinline__

// Address of the block's dynamic shared memory, as the shared-memory instructions below take it.
WKV6_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}

WKV6_DEVICE void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
WKV6_DEVICE void store_shared_half(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(static_cast<unsigned short>(value)) : "memory");
}
WKV6_DEVICE void store_shared(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
WKV6_DEVICE void load_shared(uint32_t address, float& x, float& y) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(address) : "memory");
}
WKV6_DEVICE void store_shared(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
WKV6_DEVICE void load_shared(uint32_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(address)
               : "memory");
}

WKV6_DEVICE void load_shared(uint32_t address, float& x, float& y, float& z, float& w) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
               : "r"(address)
               : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8. Which lane reads (or below
// writes) what PTX leaves open, and the instruction itself orders no memory: __syncwarp does.
WKV6_DEVICE void load_matrices(uint32_t address, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
WKV6_DEVICE void load_matrices_transposed(uint32_t address, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
// The reverse of load_matrices: four fragments to the rows that the lanes name.
WKV6_DEVICE void store_matrices(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1),
               "r"(m2), "r"(m3)
               : "memory");
#else
  const int lane = threadIdx.x & 31, row = lane >> 2;
  const uint32_t at = 4 * (lane & 3);
  store_shared(__shfl_sync(0xffffffffu, address, row) + at, m0);
  store_shared(__shfl_sync(0xffffffffu, address, 8 + row) + at, m1);
  store_shared(__shfl_sync(0xffffffffu, address, 16 + row) + at, m2);
  store_shared(__shfl_sync(0xffffffffu, address, 24 + row) + at, m3);
#endif
}
// Transposes one 8x8 matrix of 16-bit values held as a fragment.
WKV6_DEVICE uint32_t transpose(uint32_t fragment) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
  return result;
}
WKV6_DEVICE void store_matrices_transposed(uint32_t address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0),
               "r"(m1), "r"(m2), "r"(m3)
               : "memory");
#else
  store_matrices(address, transpose(m0), transpose(m1), transpose(m2), transpose(m3));
#endif
}

// c += a * b, bfloat16 operands, float sums.
WKV6_DEVICE void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                              uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
WKV6_DEVICE void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(b0));
}

WKV6_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
WKV6_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
WKV6_DEVICE float shuffle_from(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// Copies 16 bytes to shared memory in the background; writes zeros when there is nothing to copy.
WKV6_DEVICE void copy_async(uint32_t address, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(exists ? 16 : 0)
               : "memory");
}
WKV6_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all of this thread's groups but the last kPending are there; for those of other threads a barrier follows.
template <int kPending>
WKV6_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

WKV6_DEVICE float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// The smaller of two numbers; NaN when one is.
WKV6_DEVICE float minimum(float x, float y) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}

#endif
