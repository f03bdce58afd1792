// Adam on tensors of one kind, in one pass: fp32 or bf16 weights with gradients of the same type, moments in fp32 or
// packed in 8 bits, which may lie in pinned host memory. What a recorded step cannot have as a number is read from the
// device: rates, the norm that clips, the number of the step, and whether an earlier tensor's gradient was not finite.
//
// src/ops/adam.py has the definition and launches it.

#include "types.cuh"

namespace adam {

constexpr int kBlock = 256;  // values that share a scale: a warp's
constexpr int kValues = 8;   // of a lane
constexpr uint32_t kAllLanes = 0xffffffffu;

// Source: lowbias32, https://nullprogram.com/blog/2018/07/31/
__device__ __forceinline__ uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// The place of the nearest number of an 8-bit map. The map has seven decades, each with as many numbers as all below
// it, the middles of equal parts of the decade; and 0 and 1. Signed, zero stands at 127 and 1 alone has no counterpart.
// Unsigned, nothing is brought to 0, see src/ops/adam.py.
//
// Borders lie between the last number of a decade and the first of the next. To look neighbours up in the map instead
// kept the kernel to a third of the memory's speed (H100).
template <bool kSigned>
__device__ __forceinline__ int place_of(float x) {
  constexpr float kBorders[2][6] = {{1.45e-6f, 1.225e-5f, 1.1125e-4f, 1.05625e-3f, 1.028125e-2f, 0.10140625f},
                                    {1.9e-6f, 1.45e-5f, 1.225e-4f, 1.1125e-3f, 1.05625e-2f, 0.1028125f}};
  constexpr float kScales[6] = {1e5f, 1e4f, 1e3f, 1e2f, 1e1f, 1.f};
  const float a = fabsf(x);
  float scale = 1e6f;
  int items = kSigned ? 1 : 2;
#pragma unroll
  for (int decade = 0; decade < 6; ++decade) {
    if (a > kBorders[kSigned][decade]) {
      scale = kScales[decade];
      items *= 2;
    }
  }
  const int inside = max(0, min(items - 1, (int)((a * scale - 0.1f) * ((float)items * (1.f / 0.9f)))));
  if (!kSigned) return a > 0.9982421875f ? kBlock - 1 : items - 1 + inside;
  if (a < 2.75e-7f) return 127;
  if (x > 0.996484375f) return kBlock - 1;
  return x < 0.f ? 127 - items - inside : 127 + items + inside;
}

template <bool kNarrow>
__device__ __forceinline__ void load(const void* from, int begin, int count, bool whole, float* values) {
  if (kNarrow) {
    if (whole) {
      const uint4 raw = reinterpret_cast<const uint4*>(from)[begin / kValues];
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[2 * i] = __uint_as_float(words[i] << 16);
        values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    } else {
      for (int i = 0; i < kValues; ++i)
        values[i] = begin + i < count ? bf16_to_float(static_cast<const uint16_t*>(from)[begin + i]) : 0.f;
    }
  } else if (whole) {
    const float4* four = reinterpret_cast<const float4*>(from) + begin / 4;
    const float4 one = four[0], other = four[1];
    values[0] = one.x, values[1] = one.y, values[2] = one.z, values[3] = one.w;
    values[4] = other.x, values[5] = other.y, values[6] = other.z, values[7] = other.w;
  } else {
    for (int i = 0; i < kValues; ++i)
      values[i] = begin + i < count ? static_cast<const float*>(from)[begin + i] : 0.f;
  }
}

// Eight values of a gradient that has memory for some of its table's rows only: `places` says which of them a row of the
// table is, -1 that it is none of them and its gradient is 0.
template <bool kNarrow>
__device__ __forceinline__ void load_rows(const void* from, const int* places, int columns, int begin, int count,
                                          bool whole, float* values) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = 0.f;
  if (columns % kValues == 0) {  // all in one row
    if (begin >= count) return;
    const int row = begin / columns, place = places[row];
    const int at = place * columns + (begin - row * columns);
    if (place >= 0) load<kNarrow>(from, at, at + count - begin, whole, values);
    return;
  }
  for (int i = 0; i < kValues && begin + i < count; ++i) {
    const int row = (begin + i) / columns, place = places[row];
    const int at = place * columns + (begin + i - row * columns);
    float one[kValues];
    if (place >= 0) {
      load<kNarrow>(from, at, at + 1, false, one);
      values[i] = one[0];
    }
  }
}

__device__ __forceinline__ void store(float* to, int begin, int count, bool whole, const float* values) {
  if (whole) {
    float4* four = reinterpret_cast<float4*>(to) + begin / 4;
    four[0] = make_float4(values[0], values[1], values[2], values[3]);
    four[1] = make_float4(values[4], values[5], values[6], values[7]);
  } else {
    for (int i = 0; i < kValues && begin + i < count; ++i) to[begin + i] = values[i];
  }
}

// To the bf16 below or above, with the odds of the distance to the other; what is not finite as it is.
__device__ __forceinline__ uint16_t rounded(float value, uint32_t noise) {
  const uint32_t bits = __float_as_uint(value);
  return (uint16_t)((fabsf(value) <= 3.402823466e38f ? bits + noise : bits) >> 16);
}

__device__ __forceinline__ void store_rounded(uint16_t* to, int begin, int count, bool whole, const float* values,
                                              uint32_t seed) {
  uint16_t narrow[kValues];
#pragma unroll
  for (int i = 0; i < kValues; i += 2) {
    const uint32_t noise = mixed(seed + (uint32_t)((begin + i) / 2));
    narrow[i] = rounded(values[i], noise & 0xffffu);
    narrow[i + 1] = rounded(values[i + 1], noise >> 16);
  }
  if (whole) {
    uint4 raw;
    raw.x = narrow[0] | (uint32_t)narrow[1] << 16;
    raw.y = narrow[2] | (uint32_t)narrow[3] << 16;
    raw.z = narrow[4] | (uint32_t)narrow[5] << 16;
    raw.w = narrow[6] | (uint32_t)narrow[7] << 16;
    reinterpret_cast<uint4*>(to)[begin / kValues] = raw;
  } else {
    for (int i = 0; i < kValues && begin + i < count; ++i) to[begin + i] = narrow[i];
  }
}

__device__ __forceinline__ void unpack(const uint8_t* from, int begin, int count, bool whole, const float* map,
                                       float scale, float* values) {
  uint8_t places[kValues];
  if (whole) {
    const uint2 raw = reinterpret_cast<const uint2*>(from)[begin / kValues];
#pragma unroll
    for (int i = 0; i < 4; ++i) places[i] = raw.x >> (8 * i), places[i + 4] = raw.y >> (8 * i);
  } else {
    for (int i = 0; i < kValues; ++i) places[i] = begin + i < count ? from[begin + i] : 0;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = map[places[i]] * scale;
}

template <bool kSigned>
__device__ __forceinline__ void pack(uint8_t* to, int begin, int count, bool whole, float* scale,
                                     const float* values) {
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < kValues; ++i)
    if (whole || begin + i < count) largest = fmaxf(largest, fabsf(values[i]));
  largest = largest_of_warp(largest);
  if (threadIdx.x % 32 == 0) *scale = largest;
  const float factor = largest > 0.f ? 1.f / largest : 0.f;
  uint8_t places[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) places[i] = place_of<kSigned>(values[i] * factor);
  if (whole) {
    uint2 raw;
    raw.x = places[0] | (uint32_t)places[1] << 8 | (uint32_t)places[2] << 16 | (uint32_t)places[3] << 24;
    raw.y = places[4] | (uint32_t)places[5] << 8 | (uint32_t)places[6] << 16 | (uint32_t)places[7] << 24;
    reinterpret_cast<uint2*>(to)[begin / kValues] = raw;
  } else {
    for (int i = 0; i < kValues && begin + i < count; ++i) to[begin + i] = places[i];
  }
}

// A tensor and what belongs to it; `aligned`: whether every pointer is a multiple of 32 bytes.
struct Tensor {
  void* weights;
  const void* gradient;
  void* first;
  void* second;
  float* first_scales;
  float* second_scales;
  int64_t count;
  int row, seed;

  __device__ __forceinline__ bool aligned() const {
    return (((uint64_t)weights | (uint64_t)gradient | (uint64_t)first | (uint64_t)second) & 31) == 0;
  }
};

// What a step depends on besides its tensors, see src/ops/adam.py. `flags` is the number of the step and, if it is not
// 0, a reason to leave all as it is.
struct Step {
  const float* first_map;
  const float* second_map;
  const float* settings;
  const float* norm;
  const int* flags;
  float beta1, beta2, eps, clip;
};

struct Maps {
  float first[kBlock], second[kBlock];
};

template <bool kPacked>
__device__ __forceinline__ void fill(Maps& maps, const Step& a) {
  if (!kPacked) return;
  for (int i = threadIdx.x; i < kBlock; i += blockDim.x) {
    maps.first[i] = a.first_map[i];
    maps.second[i] = a.second_map[i];
  }
  __syncthreads();
}

// Every `stride`-th block of values from `block` to `end`, by this warp. `places` is null where the gradient has all
// rows, of `columns` values.
template <bool kNarrow, bool kPacked>
__device__ __forceinline__ void update(const Tensor& t, const Step& a, const Maps& maps, int block, int end,
                                       int stride, const int* places = nullptr, int columns = 0) {
  const float* settings = a.settings + 4 * t.row;
  const float rate = settings[0], kept = 1.f - rate * settings[1];
  const float step_size = rate * settings[2], correction = settings[3];
  float factor = a.clip / (*a.norm + 1e-6f);
  if (!(factor < 1.f)) factor = 1.f;  // also before the first norm, which is nan
  const uint32_t noise_seed = mixed((uint32_t)t.seed + (uint32_t)a.flags[0] * 0x9e3779b9u);
  const int count = (int)t.count, lane = threadIdx.x % 32;
  const bool aligned = t.aligned();
  for (; block < end; block += stride) {
    const int begin = block * kBlock + lane * kValues;
    const bool whole = aligned && begin + kValues <= count;
    float w[kValues], g[kValues], m[kValues], v[kValues];
    load<kNarrow>(t.weights, begin, count, whole, w);
    if (places) {
      load_rows<kNarrow>(t.gradient, places, columns, begin, count, whole, g);
    } else {
      load<kNarrow>(t.gradient, begin, count, whole, g);
    }
    if (kPacked) {
      unpack(static_cast<const uint8_t*>(t.first), begin, count, whole, maps.first, t.first_scales[block], m);
      unpack(static_cast<const uint8_t*>(t.second), begin, count, whole, maps.second, t.second_scales[block], v);
      __syncwarp();  // all have read the scales
    } else {
      load<false>(t.first, begin, count, whole, m);
      load<false>(t.second, begin, count, whole, v);
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      g[i] *= factor;
      m[i] = a.beta1 * m[i] + (1.f - a.beta1) * g[i];
      v[i] = a.beta2 * v[i] + (1.f - a.beta2) * g[i] * g[i];
      w[i] = w[i] * kept - __fdividef(step_size * m[i], sqrtf(v[i]) * correction + a.eps);
    }
    if (kNarrow) {
      store_rounded(static_cast<uint16_t*>(t.weights), begin, count, whole, w, noise_seed);
    } else {
      store(static_cast<float*>(t.weights), begin, count, whole, w);
    }
    if (kPacked) {
      pack<true>(static_cast<uint8_t*>(t.first), begin, count, whole, t.first_scales + block, m);
      pack<false>(static_cast<uint8_t*>(t.second), begin, count, whole, t.second_scales + block, v);
    } else {
      store(static_cast<float*>(t.first), begin, count, whole, m);
      store(static_cast<float*>(t.second), begin, count, whole, v);
    }
  }
}

template <bool kNarrow, bool kPacked>
__global__ void step_kernel(Tensor t, Step a, const int* places, int columns) {
  if (a.flags[1] != 0) return;
  __shared__ Maps maps;
  fill<kPacked>(maps, a);
  const int warps = blockDim.x / 32;
  const int blocks = (int)((t.count + kBlock - 1) / kBlock);
  update<kNarrow, kPacked>(t, a, maps, blockIdx.x * warps + threadIdx.x / 32, blocks, gridDim.x * warps,
                           places, columns);
}

// Many tensors, cut into pieces of so many blocks of values; `pieces` names tensor and first block of each.
constexpr int kPieceBlocks = 32;

template <bool kNarrow, bool kPacked>
__global__ void steps_kernel(const Tensor* tensors, const int2* pieces, Step a) {
  if (a.flags[1] != 0) return;
  __shared__ Maps maps;
  fill<kPacked>(maps, a);
  const int2 piece = pieces[blockIdx.x];
  const Tensor t = tensors[piece.x];
  const int blocks = (int)((t.count + kBlock - 1) / kBlock);
  update<kNarrow, kPacked>(t, a, maps, piece.y + threadIdx.x / 32, min(blocks, piece.y + kPieceBlocks),
                           blockDim.x / 32);
}

// The norm of the gradient of each piece.
template <bool kNarrow>
__global__ void norms_kernel(const Tensor* tensors, const int2* pieces, float* norms) {
  __shared__ float of_warp[32];
  const int2 piece = pieces[blockIdx.x];
  const Tensor& t = tensors[piece.x];
  const int count = (int)t.count, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int end = min((count + kBlock - 1) / kBlock, piece.y + kPieceBlocks);
  const bool aligned = ((uint64_t)t.gradient & 31) == 0;
  float sum = 0.f;
  for (int block = piece.y + warp; block < end; block += warps) {
    const int begin = block * kBlock + lane * kValues;
    float g[kValues];
    load<kNarrow>(t.gradient, begin, count, aligned && begin + kValues <= count, g);
#pragma unroll
    for (int i = 0; i < kValues; ++i) sum += g[i] * g[i];
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int other = 1; other < warps; ++other) sum += of_warp[other];
  norms[blockIdx.x] = sqrtf(sum);
}

}  // namespace adam
