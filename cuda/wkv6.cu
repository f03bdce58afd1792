// The WKV6 kernels: forward, backward, and the pass that summarises a span.
//
// One block of 4 warps works on one item: one head of one sequence, or of a span of it. It walks over tiles of 16
// tokens with the running state (or its gradient) in float registers. Inside a tile all products run on tensor cores.
//
// For tokens j < i of a tile the decays between them multiply to D[i, j]. The tile is halved again and again; at the
// level with blocks of s tokens (s = 1, 2, 4, 8) a pair lies in the two halves of one block of 2s tokens, and there
// D[i, j] = q[j] * p[i]: q multiplies the decays after j to its block's end, p those before i from its block's start.
// All factors are in [0, 1]; there is no quotient, no difference of exponents and no running sum of logarithms, so
// the result is right for every w_raw. At s = 16 the same p and q connect the tile with the states at its two ends.
//
// With R = r * p, K = k * q of a level and A[i, j] the sum over the levels of R K^T (and r u k on the diagonal):
//   y   = R16 S + A v                          S' = W S + K16^T v
//   dv  = A^T dy + K16 E                       E  = gradient of S', dS = W E + R16^T dy
//   dr  = p16 (dy S^T) + sum_s p (dA_s K)      dA = lower triangle of dy v^T, dA_s its pairs of level s
//   dk  = q16 (v E^T)  + sum_s q (dA_s^T R)
// The gradient of log decay at token t sums the pairs that span t, each kind directly (no subtraction): those over the
// whole tile, W rowsum(S E); r dr of later and k dk of earlier tokens with one end outside the tile; and per level r dr
// of later tokens in t's block and k dk of earlier ones.
#include "wkv6.h"
#include "wkv6_primitives.cuh"

namespace wkv6 {

constexpr int kN = kWkv6HeadSize;
constexpr int kTile = kWkv6TileTokens;
constexpr int kChunk = kWkv6ChunkTokens;
constexpr int kTilesPerChunk = kChunk / kTile;
constexpr int kThreads = 128;
constexpr int kStateValues = kN * kN;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLog2Log2E = 0.5287663729448977f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kHuge = 3.0e38f;

WKV6_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What one block works on.
struct Item {
  int sequence;
  int span;         // of its sequence
  int spans;        // of its sequence
  int first_item;   // item of the sequence's span 0
  int begin;        // first token, as a row of the [B * T] tokens
  int length;       // tokens; 0 only for an empty sequence
  int first_chunk;  // its first checkpoint
};

WKV6_DEVICE bool find_item(const Wkv6Layout& layout, int index, Item& item) {
  int begin = 0, length = layout.tokens, chunks = 0;
  item.first_item = 0;
  if (layout.borders == nullptr) {
    const int spans = ceil_div(length, layout.span_tokens);
    item.sequence = index / spans;
    item.spans = spans;
    item.first_item = item.sequence * spans;
    begin = item.sequence * length;
    chunks = item.sequence * ceil_div(length, kChunk);
  } else {
    int sequence = 0;
    for (;; ++sequence) {
      if (sequence == layout.sequences) return false;
      begin = layout.borders[sequence];
      length = layout.borders[sequence + 1] - begin;
      item.spans = length > 0 ? ceil_div(length, layout.span_tokens) : 1;
      if (index < item.first_item + item.spans) break;
      item.first_item += item.spans;
      chunks += ceil_div(length, kChunk);
    }
    item.sequence = sequence;
  }
  item.span = index - item.first_item;
  const int offset = item.span * layout.span_tokens;
  const int rest = length - offset;
  item.begin = begin + offset;
  item.length = rest < layout.span_tokens ? rest : layout.span_tokens;
  item.first_chunk = chunks + offset / kChunk;
  return true;
}

// rate = log2(e) * exp(w_raw), and the decay exp(-exp(w_raw)) = 2^-rate.
WKV6_DEVICE float rate_of(float w_raw) { return exp2_approximate(w_raw * kLog2E + kLog2Log2E); }
WKV6_DEVICE float decay_of(float rate) { return exp2_approximate(-rate); }

// Tile in shared memory: 16 rows of 64 bf16; the 16-byte pieces of a row are permuted so that neither the copies nor
// the matrix loads meet in one bank.
constexpr int kRowBytes = kN * 2;
constexpr int kTileBytes = kTile * kRowBytes;
WKV6_DEVICE uint32_t swizzled(int row, int piece) { return row * kRowBytes + ((piece ^ (row & 7)) << 4); }

// Each thread of the block copies one 16-byte piece of a tile. `piece` counts such pieces from the tensor's start.
WKV6_DEVICE void copy_tile(uint32_t address, const void* tensor, uint32_t piece, bool exists) {
  copy_async(address, static_cast<const uint4*>(tensor) + (exists ? piece : 0u), exists);
}

// The reverse: the piece that copy_tile would bring, from shared memory to `tensor`.
WKV6_DEVICE void store_tile(void* tensor, uint32_t address, uint32_t piece, bool exists) {
  uint4 words;
  load_shared(address, words.x, words.y, words.z, words.w);
  if (exists) static_cast<uint4*>(tensor)[piece] = words;
}

// The threads' pieces of a tile's 16 rows, for copy_tile and store_tile: `at` in shared memory, `piece` in a tensor.
struct CopyPlace {
  int row;
  uint32_t at, piece;
  __device__ __forceinline__ CopyPlace(int begin, int heads, int head) {
    row = threadIdx.x >> 3;
    const int column = threadIdx.x & 7;
    at = swizzled(row, column);
    piece = (static_cast<uint32_t>(begin + row) * heads + head) * 8 + column;
  }
};

// Where this lane's row of a 16x16 piece of a tile begins, columns 16 step and on; the four 8x8 matrices in the order
// of an A fragment.
WKV6_DEVICE void piece_offsets(uint32_t (&offset)[4]) {
  const int lane = threadIdx.x & 31;
  const int row = (lane & 7) + ((lane >> 3) & 1) * 8, piece = lane >> 4;
#pragma unroll
  for (int step = 0; step < 4; ++step) offset[step] = swizzled(row, 2 * step + piece);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward. Warps own 16 value rows of the state each; the decays are worked out by all of them together.
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kOperandRowBytes = kRowBytes + 16;  // rows start in different banks
constexpr int kLevels = 4;
constexpr int kLevelRows = 16;                     // 8 rows of R, then 8 rows of K
constexpr int kForwardR16 = kLevels * kLevelRows;  // first row of R16
constexpr int kForwardK16 = kForwardR16 + kTile;
constexpr int kForwardOperandRows = kForwardK16 + kTile;
constexpr int kForwardTotals = kForwardOperandRows * kOperandRowBytes;  // float [4 quarters][64]
constexpr int kForwardWhole = kForwardTotals + 4 * kN * 4;              // float, as whole_offset says
constexpr int kPairRowBytes = 48;                                       // 16 bf16 and a gap against bank conflicts
constexpr int kWholeQuadBytes = 80;                                     // 16 floats and a gap against bank conflicts
constexpr int kForwardPairs = kForwardWhole + 4 * kWholeQuadBytes;
constexpr int kForwardValues = (kForwardPairs + kTile * kPairRowBytes + 127) / 128 * 128;
constexpr int kValueStages = 4;  // tiles of v, which y replaces
constexpr int kForwardSharedBytes = kForwardValues + kValueStages * kTileBytes;
static_assert(kForwardSharedBytes == 24192, "src/ops/wkv6_cuda.py asks for so many");

// Decays of the whole tile lie so that a thread of the state update finds its 16 channels, 8 n + pair, side by side.
WKV6_DEVICE uint32_t whole_offset(int quad, int n) { return quad * kWholeQuadBytes + n * 8; }

struct RawTile {
  uint32_t r[4], k[4], w[4];  // 4 tokens x 2 channels
};

// `count`: how many of the 4 tokens exist.
WKV6_DEVICE void load_raw(RawTile& raw, const Wkv6Forward& a, uint32_t word, uint32_t words_per_token, int count) {
  const uint32_t *r = static_cast<const uint32_t*>(a.r), *k = static_cast<const uint32_t*>(a.k),
                 *w = static_cast<const uint32_t*>(a.w_raw);
  if (count >= 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = word + i * words_per_token;
      raw.r[i] = r[at], raw.k[i] = k[at], raw.w[i] = w[at];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = word + i * words_per_token;
      raw.r[i] = i < count ? r[at] : 0u;
      raw.k[i] = i < count ? k[at] : 0u;
      raw.w[i] = i < count ? w[at] : 0xff80ff80u;  // -inf twice: a decay of 1, which leaves everything as it is
    }
  }
}

constexpr int kForwardBlocks = 4;  // on one multiprocessor, by registers

__global__ void __launch_bounds__(kThreads, kForwardBlocks) forward_kernel(const Wkv6Forward a) {
  const int head = blockIdx.x, heads = a.layout.heads;
  Item item;
  if (!find_item(a.layout, blockIdx.y, item)) return;

  const uint32_t shared = shared_base();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int row = lane >> 2, pair = 2 * (lane & 3);
  const int tiles = ceil_div(item.length, kTile);
  const uint32_t values = shared + kForwardValues;

  const CopyPlace place(item.begin, heads, head);
  auto copy_values = [&](int tile) {
    if (tile < tiles)
      copy_tile(values + (tile % kValueStages) * kTileBytes + place.at, a.v, place.piece + tile * kTile * heads * 8,
                tile * kTile + place.row < item.length);
    commit_copies();
  };
  // Brings y of a finished tile to memory and makes room for v of a later one.
  auto retire = [&](int tile) {
    store_tile(a.y, values + (tile % kValueStages) * kTileBytes + place.at, place.piece + tile * kTile * heads * 8,
               tile * kTile + place.row < item.length);
    copy_values(tile + kValueStages);
  };
  for (int tile = 0; tile < kValueStages; ++tile) copy_values(tile);
  const uint32_t words_per_token = heads * (kN / 2);
  uint32_t raw_word = (static_cast<uint32_t>(item.begin + 4 * warp) * heads + head) * (kN / 2) + lane;
  int raw_count = item.length - 4 * warp;
  RawTile raw;
  load_raw(raw, a, raw_word, words_per_token, raw_count);

  // Entries above the diagonal stay zero.
  for (int word = threadIdx.x; word < kTile * kPairRowBytes / 4; word += kThreads)
    store_shared(shared + kForwardPairs + word * 4, 0u);

  float bonus[2];
  if (a.u_is_bf16) {
    const uint32_t both = static_cast<const uint32_t*>(a.u)[head * (kN / 2) + lane];
    bonus[0] = low_half(both), bonus[1] = high_half(both);
  } else {
    const float2 both = static_cast<const float2*>(a.u)[head * (kN / 2) + lane];
    bonus[0] = both.x, bonus[1] = both.y;
  }

  // state[n]: values 16 warp + row (and + 8), keys 8 n + pair (and + 1).
  float state[8][4];
  const int own = (16 * warp + row) * kN + pair;
  {
    const size_t of = a.state_is_shared ? 0 : a.parents != nullptr ? a.parents[item.sequence] : item.sequence;
    const size_t start = of * heads + head;
    const float* source = a.state + start * kStateValues + own;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 low = *reinterpret_cast<const float2*>(source + 8 * n);
      const float2 high = *reinterpret_cast<const float2*>(source + 8 * n + 8 * kN);
      state[n][0] = low.x, state[n][1] = low.y, state[n][2] = high.x, state[n][3] = high.y;
    }
#pragma unroll 2
    for (int before = 0; before < item.span; ++before) {
      const size_t at = static_cast<size_t>(item.first_item + before) * heads + head;
      const float* added = a.span_states + at * kStateValues + own;
      const float* decay = a.span_decays + at * kN + pair;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float2 w = *reinterpret_cast<const float2*>(decay + 8 * n);
        const float2 low = *reinterpret_cast<const float2*>(added + 8 * n);
        const float2 high = *reinterpret_cast<const float2*>(added + 8 * n + 8 * kN);
        state[n][0] = w.x * state[n][0] + low.x, state[n][1] = w.y * state[n][1] + low.y;
        state[n][2] = w.x * state[n][2] + high.x, state[n][3] = w.y * state[n][3] + high.y;
      }
    }
  }

  // Where this lane's two results of its warp's level belong in A; negative offsets are pairs of another level.
  const int level = warp, size = 1 << level;
  const int later = ((row >> level) << (level + 1)) | size | (row & (size - 1));
  int pair_offset[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int column = pair + e;
    const int earlier = ((column >> level) << (level + 1)) | (column & (size - 1));
    pair_offset[e] = (row >> level) == (column >> level) ? later * kPairRowBytes + earlier * 2 : -1;
  }
  // Rows of matrix loads: 16x16 pieces in the order (0, 0) (8, 0) (0, 8) (8, 8), and with the middle two swapped.
  const int lower_first = (lane & 7) + ((lane >> 3) & 1) * 8, lower_piece = lane >> 4;
  const int upper_first = (lane & 7) + (lane >> 4) * 8, upper_piece = (lane >> 3) & 1;
  const uint32_t value_load = values + swizzled(upper_first, 2 * warp + upper_piece);
  const uint32_t y_store = values + swizzled(lower_first, 2 * warp + lower_piece);

  const uint32_t column_address = shared + lane * 4;  // this thread's two channels in an operand row
  auto operand = [&](int r) { return column_address + r * kOperandRowBytes; };

  for (int tile = 0; tile < tiles; ++tile) {
    // --- Each warp takes 4 tokens, each lane 2 channels: decays, and the operands of the levels inside 4 tokens.
    float r[4][2], k[4][2], p[4][2], q[4][2], total[2];
    float diagonal[4];
    {
      float decay[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r[i][0] = low_half(raw.r[i]), r[i][1] = high_half(raw.r[i]);
        k[i][0] = low_half(raw.k[i]), k[i][1] = high_half(raw.k[i]);
        decay[i][0] = decay_of(rate_of(low_half(raw.w[i])));
        decay[i][1] = decay_of(rate_of(high_half(raw.w[i])));
        diagonal[i] = r[i][0] * bonus[0] * k[i][0] + r[i][1] * bonus[1] * k[i][1];
      }
      store_shared(operand(0 * kLevelRows + 2 * warp), raw.r[1]);
      store_shared(operand(0 * kLevelRows + 2 * warp + 1), raw.r[3]);
      store_shared(operand(0 * kLevelRows + 8 + 2 * warp), raw.k[0]);
      store_shared(operand(0 * kLevelRows + 8 + 2 * warp + 1), raw.k[2]);
      store_shared(operand(1 * kLevelRows + 2 * warp), raw.r[2]);
      store_shared(operand(1 * kLevelRows + 2 * warp + 1), pack_bf16(r[3][0] * decay[2][0], r[3][1] * decay[2][1]));
      store_shared(operand(1 * kLevelRows + 8 + 2 * warp), pack_bf16(k[0][0] * decay[1][0], k[0][1] * decay[1][1]));
      store_shared(operand(1 * kLevelRows + 8 + 2 * warp + 1), raw.k[1]);
      raw_word += kTile * words_per_token, raw_count -= kTile;
      load_raw(raw, a, raw_word, words_per_token, raw_count);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float low = decay[0][e] * decay[1][e], high = decay[2][e] * decay[3][e];
        p[0][e] = 1.0f, p[1][e] = decay[0][e], p[2][e] = low, p[3][e] = low * decay[2][e];
        q[0][e] = decay[1][e] * high, q[1][e] = high, q[2][e] = decay[3][e], q[3][e] = 1.0f;
        total[e] = low * high;
      }
    }
    store_shared(shared + kForwardTotals + warp * kN * 4 + lane * 8, total[0], total[1]);
    {
      const int to = 2 * kLevelRows + (warp >> 1) * 4;
      if (warp & 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared(operand(to + i), pack_bf16(r[i][0] * p[i][0], r[i][1] * p[i][1]));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared(operand(to + 8 + i), pack_bf16(k[i][0] * q[i][0], k[i][1] * q[i][1]));
      }
    }
    {
      // Sums over the 64 channels, one token per group of 8 lanes.
      const bool upper = lane & 16, odd = lane & 8;
      const float x = (upper ? diagonal[2] : diagonal[0]) + shuffle_xor(upper ? diagonal[0] : diagonal[2], 16);
      const float z = (upper ? diagonal[3] : diagonal[1]) + shuffle_xor(upper ? diagonal[1] : diagonal[3], 16);
      float sum = (odd ? z : x) + shuffle_xor(odd ? x : z, 8);
      sum += shuffle_xor(sum, 4);
      sum += shuffle_xor(sum, 2);
      diagonal[0] = sum + shuffle_xor(sum, 1);
    }
    wait_for_copies<kValueStages - 2>();
    __syncthreads();  // all of v is there, totals and operands within 4 tokens are written, y of the tile before, too
    if (tile > 0) retire(tile - 1);

    // --- The operands that reach beyond 4 tokens.
    {
      if ((lane & 7) == 0) {
        const int t = 4 * warp + (lane >> 3);
        store_shared_half(shared + kForwardPairs + t * kPairRowBytes + t * 2, pack_bf16(diagonal[0], 0.0f));
      }
      float quarter[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_shared(shared + kForwardTotals + i * kN * 4 + lane * 8, quarter[i][0], quarter[i][1]);
      float factor8[2], p16[2], q16[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float low = quarter[0][e] * quarter[1][e], high = quarter[2][e] * quarter[3][e];
        factor8[e] = warp == 3 ? quarter[2][e] : warp == 0 ? quarter[1][e] : 1.0f;
        p16[e] = warp == 0 ? 1.0f : warp == 1 ? quarter[0][e] : warp == 2 ? low : low * quarter[2][e];
        q16[e] = warp == 3 ? 1.0f : warp == 2 ? quarter[3][e] : warp == 1 ? high : quarter[1][e] * high;
        total[e] = low * high;
      }
      if (warp == 0) store_shared(shared + kForwardWhole + whole_offset(lane & 3, lane >> 2), total[0], total[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) p[i][e] *= r[i][e], q[i][e] *= k[i][e];
      const int to = 3 * kLevelRows + (warp & 1) * 4;
      if (warp >= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared(operand(to + i), pack_bf16(p[i][0] * factor8[0], p[i][1] * factor8[1]));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared(operand(to + 8 + i), pack_bf16(q[i][0] * factor8[0], q[i][1] * factor8[1]));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_shared(operand(kForwardR16 + 4 * warp + i), pack_bf16(p[i][0] * p16[0], p[i][1] * p16[1]));
        store_shared(operand(kForwardK16 + 4 * warp + i), pack_bf16(q[i][0] * q16[0], q[i][1] * q16[1]));
      }
    }
    __syncthreads();  // all operands, the diagonal and the whole tile's decays are written

    // --- One level of A per warp.
    {
      float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const uint32_t from = shared + (level * kLevelRows + (lane & 7)) * kOperandRowBytes + (lane >> 3) * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t later_rows[4], earlier_rows[4];
        load_matrices(from + half * 64, later_rows);
        load_matrices(from + 8 * kOperandRowBytes + half * 64, earlier_rows);
        multiply_add(sums, later_rows[0], 0u, later_rows[1], 0u, earlier_rows[0], earlier_rows[1]);
        multiply_add(sums, later_rows[2], 0u, later_rows[3], 0u, earlier_rows[2], earlier_rows[3]);
      }
      const uint32_t both = pack_bf16(sums[0], sums[1]);
      if (pair_offset[0] >= 0) store_shared_half(shared + kForwardPairs + pair_offset[0], both);
      if (pair_offset[1] >= 0) store_shared_half(shared + kForwardPairs + pair_offset[1], both >> 16);
    }
    // --- Output from the state before the tile, then the state after it.
    uint32_t value[4];
    load_matrices_transposed(value_load + (tile % kValueStages) * kTileBytes, value);
    float y[2][4] = {};
    {
      uint32_t rounded[8][2];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        rounded[n][0] = pack_bf16(state[n][0], state[n][1]);
        rounded[n][1] = pack_bf16(state[n][2], state[n][3]);
      }
      if (a.checkpoints != nullptr && tile % kTilesPerChunk == 0) {
        const size_t checkpoint = static_cast<size_t>(item.first_chunk + tile / kTilesPerChunk) * heads + head;
        uint4* to = static_cast<uint4*>(a.checkpoints) + checkpoint * (kStateValues / 8) + warp * 128 + lane;
#pragma unroll
        for (int n = 0; n < 4; ++n)
          to[n * 32] = make_uint4(rounded[2 * n][0], rounded[2 * n][1], rounded[2 * n + 1][0], rounded[2 * n + 1][1]);
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t r16[4];
        load_matrices(shared + (kForwardR16 + lower_first) * kOperandRowBytes + (2 * step + lower_piece) * 16, r16);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          multiply_add(y[half], r16[0], r16[1], r16[2], r16[3], rounded[2 * step][half], rounded[2 * step + 1][half]);
      }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t k16[4];
      load_matrices_transposed(shared + (kForwardK16 + lower_first) * kOperandRowBytes + (2 * step + lower_piece) * 16,
                               k16);
      float whole[2][2];
      load_shared(shared + kForwardWhole + whole_offset(pair / 2, 2 * step), whole[0][0], whole[0][1], whole[1][0],
                  whole[1][1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = 2 * step + half;
        const float w0 = whole[half][0], w1 = whole[half][1];
        state[n][0] *= w0, state[n][1] *= w1, state[n][2] *= w0, state[n][3] *= w1;
        multiply_add(state[n], value[0], value[1], value[2], value[3], k16[2 * half], k16[2 * half + 1]);
      }
    }
    __syncthreads();  // A is written; operands, decays and this tile's v have been read

    // --- Output from the tile itself.
    uint32_t pairs[4];
    load_matrices(shared + kForwardPairs + lower_first * kPairRowBytes + lower_piece * 16, pairs);
    multiply_add(y[0], pairs[0], pairs[1], pairs[2], pairs[3], value[0], value[2]);
    multiply_add(y[1], pairs[0], pairs[1], pairs[2], pairs[3], value[1], value[3]);
    if (a.pair_weights != nullptr && (tile & 3) == warp) {
      uint32_t turned[4];
      load_matrices_transposed(shared + kForwardPairs + upper_first * kPairRowBytes + upper_piece * 16, turned);
      const size_t checkpoint = static_cast<size_t>(item.first_chunk + tile / kTilesPerChunk) * heads + head;
      static_cast<uint4*>(a.pair_weights)[(checkpoint * kTilesPerChunk + tile % kTilesPerChunk) * 32 + lane] =
          make_uint4(turned[0], turned[1], turned[2], turned[3]);
    }
    // y takes the place of v, of which this warp alone reads these columns.
    store_matrices(y_store + (tile % kValueStages) * kTileBytes, pack_bf16(y[0][0], y[0][1]), pack_bf16(y[0][2], y[0][3]),
                   pack_bf16(y[1][0], y[1][1]), pack_bf16(y[1][2], y[1][3]));
  }
  if (tiles > 0) {
    __syncthreads();  // y is written
    retire(tiles - 1);
  }

  if (item.span == item.spans - 1) {
    float* to = a.final_state + (static_cast<size_t>(item.sequence) * heads + head) * kStateValues + own;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      *reinterpret_cast<float2*>(to + 8 * n) = make_float2(state[n][0], state[n][1]);
      *reinterpret_cast<float2*>(to + 8 * n + 8 * kN) = make_float2(state[n][2], state[n][3]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward and span summaries. Warps own 16 key channels each. A thread holds, of a tile, channels 16 warp + row and
// + 8 (index c), tokens 8 h + pair + e (halves h, neighbours e): the layout in which a tile loaded transposed arrives,
// in which the tensor cores want operands channel x token, and in which they deliver results channel x token.
// ---------------------------------------------------------------------------------------------------------------------

// Decay products of one thread's tokens of one channel. At level s, p of its two tokens is (p[s], first * p[s]) and q
// is (second * q[s], q[s]); s = 2, 4, 8, 16 stand at index 0 to 3, and p[0] = q[0] = 1.
struct Products {
  float first[2];   // decay of the even token, per half
  float second[2];  // of the odd one
  float p[2][3];    // per half: s = 4, 8, 16
  float q[2][3];
  float whole;
};

WKV6_DEVICE void decay_products(Products& d, const float (&decay)[2][2]) {
  const int quad = threadIdx.x & 3;
  float eight[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    d.first[h] = decay[h][0], d.second[h] = decay[h][1];
    const float two = decay[h][0] * decay[h][1];
    const float other_two = shuffle_xor(two, 1);
    const float four = two * other_two;
    const float other_four = shuffle_xor(four, 2);
    d.p[h][0] = quad & 1 ? other_two : 1.0f;
    d.q[h][0] = quad & 1 ? 1.0f : other_two;
    d.p[h][1] = d.p[h][0] * (quad & 2 ? other_four : 1.0f);
    d.q[h][1] = d.q[h][0] * (quad & 2 ? 1.0f : other_four);
    eight[h] = four * other_four;
  }
  d.p[0][2] = d.p[0][1], d.p[1][2] = d.p[1][1] * eight[0];
  d.q[0][2] = d.q[0][1] * eight[1], d.q[1][2] = d.q[1][1];
  d.whole = eight[0] * eight[1];
}

// w_raw fragment -> rate and decay; tokens from `count` on decay by 1.
WKV6_DEVICE void decays(const uint32_t (&w)[4], int count, float (&decay)[2][2][2], float (&rate)[2][2][2]) {
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float raw = e ? high_half(w[2 * h + c]) : low_half(w[2 * h + c]);
        rate[c][h][e] = rate_of(raw);
        decay[c][h][e] = decay_of(rate[c][h][e]);
      }
  if (count < kTile) {
    const int pair = 2 * (threadIdx.x & 3);
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * h + pair + e >= count) decay[c][h][e] = 1.0f;
  }
}

// state += operand rows: `operand` channel x token, `rows` a tile token x value in shared memory.
WKV6_DEVICE void add_product(float (&state)[8][4], const uint32_t (&operand)[4], uint32_t rows,
                             const uint32_t (&offset)[4]) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t m[4];
    load_matrices_transposed(rows + offset[step], m);
    multiply_add(state[2 * step], operand[0], operand[1], operand[2], operand[3], m[0], m[1]);
    multiply_add(state[2 * step + 1], operand[0], operand[1], operand[2], operand[3], m[2], m[3]);
  }
}

// state = whole * state + operand rows; whole0 and whole1 of this thread's two channels.
WKV6_DEVICE void advance(float (&state)[8][4], float whole0, float whole1, const uint32_t (&operand)[4], uint32_t rows,
                         const uint32_t (&offset)[4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
    state[n][0] *= whole0, state[n][1] *= whole0, state[n][2] *= whole1, state[n][3] *= whole1;
  add_product(state, operand, rows, offset);
}

// A [value, key] matrix in global memory <-> fragments with rows = own key channels, columns = values.
WKV6_DEVICE size_t own_state_offset() {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  return static_cast<size_t>(2 * (lane & 3)) * kN + 16 * warp + (lane >> 2);
}

// Continues `gradient` (after the item's sequence) to the end of span `span`.
WKV6_DEVICE void fold_later_spans(float (&gradient)[8][4], const float* states, const float* decays,
                                  const Item& item, int span, int heads, int head) {
  const int warp = threadIdx.x >> 5, row = (threadIdx.x & 31) >> 2;
#pragma unroll 2
  for (int after = item.spans - 1; after > span; --after) {
    const size_t at = static_cast<size_t>(item.first_item + after) * heads + head;
    const float* added = states + at * kStateValues + own_state_offset();
    const float whole0 = decays[at * kN + 16 * warp + row], whole1 = decays[at * kN + 16 * warp + row + 8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      gradient[n][0] = whole0 * gradient[n][0] + added[(8 * n) * kN];
      gradient[n][1] = whole0 * gradient[n][1] + added[(8 * n + 1) * kN];
      gradient[n][2] = whole1 * gradient[n][2] + added[(8 * n) * kN + 8];
      gradient[n][3] = whole1 * gradient[n][3] + added[(8 * n + 1) * kN + 8];
    }
  }
}

WKV6_DEVICE void load_state_gradient(float (&gradient)[8][4], const float* source) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      gradient[n][i] = source == nullptr ? 0.0f : source[own_state_offset() + (8 * n + (i & 1)) * kN + (i >> 1) * 8];
}

WKV6_DEVICE void store_state(float* to, const float (&state)[8][4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) to[own_state_offset() + (8 * n + (i & 1)) * kN + (i >> 1) * 8] = state[n][i];
}

// What a span does to a state that passes through it: state' = decay * state + added. Forward in time from k, w_raw,
// v; for gradients (kBackward), which pass backward in time, from r, w_raw, dy. Tiles are read in the opposite
// direction to the state's, so that the tiles which the next kernel wants first are the last to have come into the L2
// cache.
struct Summary {
  Wkv6Layout layout;
  const void *operand, *w_raw, *rows;
  float *added, *decay;
  bool of_all;  // also of the span (forward the last, backward the first) after which no other comes
};

constexpr int kSummaryStages = 4;
constexpr int kSummarySharedBytes = kSummaryStages * 3 * kTileBytes;
static_assert(kSummarySharedBytes == 24576, "src/ops/wkv6_cuda.py asks for so many");

template <bool kBackward>
__global__ void __launch_bounds__(kThreads, 6) summary_kernel(const Summary a) {
  const int head = blockIdx.x, heads = a.layout.heads;
  Item item;
  if (!find_item(a.layout, blockIdx.y, item)) return;
  if (!a.of_all && item.span == (kBackward ? 0 : item.spans - 1)) return;
  const uint32_t shared = shared_base();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = lane >> 2;
  const int tiles = ceil_div(item.length, kTile);

  const CopyPlace place(item.begin, heads, head);
  auto copy = [&](int step) {
    if (step < tiles) {
      const int tile = kBackward ? step : tiles - 1 - step;
      const uint32_t stage = shared + place.at + (step % kSummaryStages) * 3 * kTileBytes;
      const uint32_t piece = place.piece + tile * kTile * heads * 8;
      const bool exists = tile * kTile + place.row < item.length;
      copy_tile(stage, a.operand, piece, exists);
      copy_tile(stage + kTileBytes, a.w_raw, piece, exists);
      copy_tile(stage + 2 * kTileBytes, a.rows, piece, exists);
    }
    commit_copies();
  };
  for (int step = 0; step < kSummaryStages - 1; ++step) copy(step);

  float state[8][4] = {};
  float decay_total[2] = {1.0f, 1.0f};
  const uint32_t own_tile = swizzled((lane & 7) + (lane >> 4) * 8, 2 * warp + ((lane >> 3) & 1));
  uint32_t offset[4];
  piece_offsets(offset);
  for (int step = 0; step < tiles; ++step) {
    wait_for_copies<kSummaryStages - 2>();
    __syncthreads();  // all parts of the step's tiles are there, the step before has been read: its place is free
    copy(step + kSummaryStages - 1);
    const uint32_t stage = shared + (step % kSummaryStages) * 3 * kTileBytes;
    const int count = item.length - (kBackward ? step : tiles - 1 - step) * kTile;
    uint32_t x[4], w[4];
    load_matrices_transposed(stage + own_tile, x);
    load_matrices_transposed(stage + kTileBytes + own_tile, w);
    float decay[2][2][2], rate[2][2][2];
    decays(w, count, decay, rate);
    uint32_t operand[4];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      Products d;
      decay_products(d, decay[c]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = decay_total[c] * (kBackward ? d.p[h][2] : d.q[h][2]);
        const float low = kBackward ? factor : d.second[h] * factor, high = kBackward ? d.first[h] * factor : factor;
        operand[2 * h + c] = pack_bf16(low_half(x[2 * h + c]) * low, high_half(x[2 * h + c]) * high);
      }
      decay_total[c] *= d.whole;
    }
    add_product(state, operand, stage + 2 * kTileBytes, offset);
  }
  const size_t at = static_cast<size_t>(blockIdx.y) * heads + head;
  store_state(a.added + at * kStateValues, state);
  if ((lane & 3) == 0) {
    a.decay[at * kN + 16 * warp + row] = decay_total[0];
    a.decay[at * kN + 16 * warp + row + 8] = decay_total[1];
  }
}

// dstate from the summaries of all spans; for when no other gradient is wanted.
__global__ void __launch_bounds__(kThreads) fold_kernel(const Wkv6Backward a) {
  const int head = blockIdx.x, heads = a.layout.heads;
  // The item of a sequence's span 0 is found by walking, as the other kernels do.
  Item item;
  for (int index = 0;; ++index) {
    if (!find_item(a.layout, index, item)) return;
    if (item.sequence == static_cast<int>(blockIdx.y)) break;
    index = item.first_item + item.spans - 1;
  }
  const size_t at = (static_cast<size_t>(item.sequence) * heads + head) * kStateValues;
  float gradient[8][4];
  load_state_gradient(gradient, a.dfinal_state == nullptr ? nullptr : a.dfinal_state + at);
  fold_later_spans(gradient, a.span_states, a.span_decays, item, -1, heads, head);
  store_state(a.dstate + at, gradient);
}

constexpr int kSlots = kTilesPerChunk;
constexpr int kSlotTensors = 5;  // r, k, v, w_raw, dy
constexpr int kSlotBytes = kSlotTensors * kTileBytes;
constexpr int kBackwardPairs = kSlots * kSlotBytes;             // A^T fragments, 512 bytes per slot
constexpr int kBackwardStates = kBackwardPairs + kSlots * 512;  // bf16 states before a chunk's tiles but the last
constexpr int kBackwardGradients = kBackwardStates + (kSlots - 1) * kStateValues * 2;  // E [key][value], bf16, two
constexpr int kBackwardSharedBytes = kBackwardGradients + 2 * kStateValues * 2;
static_assert(kBackwardSharedBytes == 83968, "src/ops/wkv6_cuda.py asks for so many");
static_assert(kBackwardSharedBytes <= 99 * 1024, "what a block may have on sm_86, sm_89 and sm_120");
constexpr int kBackwardBlocks = 2;  // on one multiprocessor of sm_90, by registers and by shared memory

template <bool kWithDu>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) backward_kernel(const Wkv6Backward a) {
  const int head = blockIdx.x, heads = a.layout.heads;
  Item item;
  if (!find_item(a.layout, blockIdx.y, item)) {
    if (kWithDu && threadIdx.x < kN) a.du[(static_cast<size_t>(blockIdx.y) * heads + head) * kN + threadIdx.x] = 0.0f;
    return;
  }

  const uint32_t shared = shared_base();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int row = lane >> 2, quad = lane & 3, pair = 2 * quad;
  const int chunks = ceil_div(item.length, kChunk);
  const int own_channel = 16 * warp + row;

  // Tile `tile` of chunk `chunk` lies in this slot: tiles are used last to first, and each makes room for the chunk
  // before, whose first tiles are wanted first.
  auto slot_of = [&](int chunk, int tile) { return (chunks - 1 - chunk) & 1 ? kSlots - 1 - tile : tile; };
  const CopyPlace place(item.begin, heads, head);
  auto copy = [&](int chunk, int tile) {
    if (chunk >= 0) {
      const int slot = slot_of(chunk, tile);
      const int first = chunk * kChunk + tile * kTile;
      const uint32_t to = shared + slot * kSlotBytes + place.at;
      const uint32_t piece = place.piece + first * heads * 8;
      const bool exists = first + place.row < item.length;
      copy_tile(to, a.r, piece, exists);
      copy_tile(to + kTileBytes, a.k, piece, exists);
      copy_tile(to + 2 * kTileBytes, a.v, piece, exists);
      copy_tile(to + 3 * kTileBytes, a.w_raw, piece, exists);
      copy_tile(to + 4 * kTileBytes, a.dy, piece, exists);
      if (warp == tile) {
        const size_t at = static_cast<size_t>(item.first_chunk + chunk) * heads + head;
        copy_async(shared + kBackwardPairs + slot * 512 + lane * 16,
                   static_cast<const uint4*>(a.pair_weights) + (at * kTilesPerChunk + tile) * 32 + lane,
                   first < item.length);
      }
    }
    commit_copies();
  };
  const uint32_t stash = shared + kBackwardStates + threadIdx.x * 16;
  auto stash_of = [&](int tile, int part) { return stash + tile * kStateValues * 2 + part * kThreads * 16; };
  // The checkpoint of a chunk, as the forward left it, to where the state before its tile 0 will be. Each thread brings
  // what it alone needs; the copies belong to the group that is committed next.
  auto copy_checkpoint = [&](int chunk) {
    if (chunk < 0) return;
    const size_t at = static_cast<size_t>(item.first_chunk + chunk) * heads + head;
    const uint4* from = static_cast<const uint4*>(a.checkpoints) + at * (kStateValues / 8) + warp * 32 + lane;
#pragma unroll
    for (int part = 0; part < 4; ++part) copy_async(stash_of(0, part), from + part * 128, true);
  };
  // Brings the gradients of a finished tile, which lie where its inputs did, to memory; the slot's next tile follows.
  auto retire = [&](int chunk, int tile) {
    const int first = chunk * kChunk + tile * kTile;
    const uint32_t from = shared + slot_of(chunk, tile) * kSlotBytes + place.at;
    const uint32_t piece = place.piece + first * heads * 8;
    const bool exists = first + place.row < item.length;
    store_tile(a.dr, from, piece, exists);
    store_tile(a.dk, from + 2 * kTileBytes, piece, exists);
    store_tile(a.dw_raw, from + 3 * kTileBytes, piece, exists);
    store_tile(a.dv, from + 4 * kTileBytes, piece, exists);
    copy(chunk - 1, kTilesPerChunk - 1 - tile);
  };
  copy_checkpoint(chunks - 1);
  for (int tile = 0; tile < kTilesPerChunk; ++tile) copy(chunks - 1, tile);

  float bonus[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int at = head * kN + own_channel + 8 * c;
    bonus[c] = a.u_is_bf16 ? low_half(static_cast<const unsigned short*>(a.u)[at]) : static_cast<const float*>(a.u)[at];
  }
  float du[2] = {0.0f, 0.0f};

  const size_t state_at = (static_cast<size_t>(item.sequence) * heads + head) * kStateValues;
  float gradient[8][4];  // E: own channels x values
  load_state_gradient(gradient, a.dfinal_state == nullptr ? nullptr : a.dfinal_state + state_at);
  fold_later_spans(gradient, a.span_states, a.span_decays, item, item.span, heads, head);

  uint32_t offset[4];
  piece_offsets(offset);
  const int lower_first = (lane & 7) + ((lane >> 3) & 1) * 8, lower_piece = lane >> 4;
  const int upper_first = (lane & 7) + (lane >> 4) * 8, upper_piece = (lane >> 3) & 1;
  const uint32_t own_tile = swizzled(upper_first, 2 * warp + upper_piece);    // own channels, to be loaded transposed
  const uint32_t own_values = swizzled(lower_first, 2 * warp + lower_piece);  // own value columns, likewise
  const uint32_t gradient_store = shared + kBackwardGradients + warp * 16 * kRowBytes;
  const uint32_t gradient_load = shared + kBackwardGradients + own_values;
  // Which pairs of an 8x8 block on the diagonal belong to the levels s = 4, 2, 1; rows i, columns j, and transposed.
  const bool four = row >= 4 && quad < 2, four_t = row < 4 && quad >= 2;
  const bool two = (row & 2) && !(quad & 1) && (row >> 2) == (quad >> 1);
  const bool two_t = !(row & 2) && (quad & 1) && (row >> 2) == (quad >> 1);
  const bool one = (row & 1) && (row >> 1) == quad, one_t = !(row & 1) && (row >> 1) == quad;

  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    // --- States before each tile of the chunk, from its checkpoint.
    const int last = ceil_div(item.length - chunk * kChunk, kTile) < kTilesPerChunk
                         ? ceil_div(item.length - chunk * kChunk, kTile) - 1
                         : kTilesPerChunk - 1;
    float state[8][4];
    uint32_t rounded[8][2];
    wait_for_copies<1>();  // all but the chunk's last tile
    __syncthreads();       // of all threads
    {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        // The forward's fragments are values x keys; turned they are keys x values.
        uint32_t m[4];
        load_shared(stash_of(0, part), m[0], m[1], m[2], m[3]);
        rounded[2 * part][0] = transpose(m[0]), rounded[2 * part + 1][0] = transpose(m[1]);
        rounded[2 * part][1] = transpose(m[2]), rounded[2 * part + 1][1] = transpose(m[3]);
      }
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          state[n][2 * c] = low_half(rounded[n][c]), state[n][2 * c + 1] = high_half(rounded[n][c]);
    }
    for (int tile = 0; tile < last; ++tile) {
#pragma unroll
      for (int n = 0; n < 4; ++n)
        store_shared(stash_of(tile, n), rounded[2 * n][0], rounded[2 * n][1], rounded[2 * n + 1][0],
                     rounded[2 * n + 1][1]);
      const uint32_t slot = shared + slot_of(chunk, tile) * kSlotBytes;
      uint32_t k[4], w[4];
      load_matrices_transposed(slot + kTileBytes + own_tile, k);
      load_matrices_transposed(slot + 3 * kTileBytes + own_tile, w);
      float decay[2][2][2], rate[2][2][2], whole[2];
      decays(w, kTile, decay, rate);
      uint32_t operand[4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        Products d;
        decay_products(d, decay[c]);
        whole[c] = d.whole;
#pragma unroll
        for (int h = 0; h < 2; ++h)
          operand[2 * h + c] =
              pack_bf16(low_half(k[2 * h + c]) * d.second[h] * d.q[h][2], high_half(k[2 * h + c]) * d.q[h][2]);
      }
      advance(state, whole[0], whole[1], operand, slot + 2 * kTileBytes, offset);
#pragma unroll
      for (int n = 0; n < 8; ++n)
        rounded[n][0] = pack_bf16(state[n][0], state[n][1]), rounded[n][1] = pack_bf16(state[n][2], state[n][3]);
    }

    wait_for_copies<0>();
    __syncthreads();  // the last tile is there, and the states before tiles are made: k, w and v may be replaced
    for (int tile = last; tile >= 0; --tile) {
      const uint32_t slot = shared + slot_of(chunk, tile) * kSlotBytes;
      const int count = item.length - chunk * kChunk - tile * kTile;
      const uint32_t buffer = tile & 1;
      if (tile < last) {
#pragma unroll
        for (int n = 0; n < 4; ++n)
          load_shared(stash_of(tile, n), rounded[2 * n][0], rounded[2 * n][1], rounded[2 * n + 1][0],
                      rounded[2 * n + 1][1]);
      }

      // --- E as an operand, for this warp and, in shared memory, for the others.
      uint32_t e16[8][2];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        e16[n][0] = pack_bf16(gradient[n][0], gradient[n][1]);
        e16[n][1] = pack_bf16(gradient[n][2], gradient[n][3]);
      }
#pragma unroll
      for (int step = 0; step < 4; ++step)
        store_matrices(gradient_store + buffer * kStateValues * 2 + offset[step], e16[2 * step][0], e16[2 * step][1],
                       e16[2 * step + 1][0], e16[2 * step + 1][1]);

      // --- Products over the value columns: dA, the inter-tile parts of dr and dk, rowsum(S E).
      float dpairs0[4] = {}, dpairs1[4] = {};  // columns j = 0..7 and 8..15
      float dr16[2][4] = {}, dk16[2][4] = {};  // [half of the tokens][channel c, neighbour e]
      float span[2];
      {
        float se0[4] = {}, se1[4] = {};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t dy[4], v[4];
          load_matrices(slot + 4 * kTileBytes + offset[step], dy);
          load_matrices(slot + 2 * kTileBytes + offset[step], v);
          const uint32_t (&s0)[2] = rounded[2 * step], (&s1)[2] = rounded[2 * step + 1];
          const uint32_t (&e0)[2] = e16[2 * step], (&e1)[2] = e16[2 * step + 1];
          multiply_add(dpairs0, dy[0], dy[1], dy[2], dy[3], v[0], v[2]);
          multiply_add(dpairs1, dy[0], dy[1], dy[2], dy[3], v[1], v[3]);
          multiply_add(dr16[0], s0[0], s0[1], s1[0], s1[1], dy[0], dy[2]);
          multiply_add(dr16[1], s0[0], s0[1], s1[0], s1[1], dy[1], dy[3]);
          multiply_add(dk16[0], e0[0], e0[1], e1[0], e1[1], v[0], v[2]);
          multiply_add(dk16[1], e0[0], e0[1], e1[0], e1[1], v[1], v[3]);
          multiply_add(se0, s0[0], s0[1], s1[0], s1[1], e0[0], e1[0]);
          multiply_add(se1, s0[0], s0[1], s1[0], s1[1], e0[1], e1[1]);
        }
        const int from = 4 * row + (row >> 1);  // the lane that holds the diagonal of this row
        span[0] = shuffle_from(row & 1 ? se0[1] : se0[0], from);
        span[1] = shuffle_from(row & 1 ? se1[3] : se1[2], from);
      }

      // --- Decays and this thread's tokens; r and k carry the factor of their own pair of tokens from here on.
      uint32_t r_words[4], k_words[4], w_words[4];
      load_matrices_transposed(slot + own_tile, r_words);
      load_matrices_transposed(slot + kTileBytes + own_tile, k_words);
      load_matrices_transposed(slot + 3 * kTileBytes + own_tile, w_words);
      float rate[2][2][2];
      Products d[2];
      {
        float decay[2][2][2];
        decays(w_words, count, decay, rate);
        decay_products(d[0], decay[0]);
        decay_products(d[1], decay[1]);
      }
      float r[2][2][2], k[2][2][2];
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          r[c][h][0] = low_half(r_words[2 * h + c]), r[c][h][1] = high_half(r_words[2 * h + c]) * d[c].first[h];
          k[c][h][0] = low_half(k_words[2 * h + c]) * d[c].second[h], k[c][h][1] = high_half(k_words[2 * h + c]);
        }

      // --- s = 16. dr and dk are collected without the factors first and second; x = r dr, z = k dk.
      float dr[2][2][2], dk[2][2][2], x[2][2][2], z[2][2][2], dlog[2][2][2];
      uint32_t r16[4], k16[4];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float p = d[c].p[h][2], q = d[c].q[h][2];
          const float rp0 = r[c][h][0] * p, rp1 = r[c][h][1] * p, kq0 = k[c][h][0] * q, kq1 = k[c][h][1] * q;
          r16[2 * h + c] = pack_bf16(rp0, rp1);
          k16[2 * h + c] = pack_bf16(kq0, kq1);
          dr[c][h][0] = p * dr16[h][2 * c], dr[c][h][1] = p * dr16[h][2 * c + 1];
          dk[c][h][0] = q * dk16[h][2 * c], dk[c][h][1] = q * dk16[h][2 * c + 1];
          x[c][h][0] = rp0 * dr16[h][2 * c], x[c][h][1] = rp1 * dr16[h][2 * c + 1];
          z[c][h][0] = kq0 * dk16[h][2 * c], z[c][h][1] = kq1 * dk16[h][2 * c + 1];
        }
        float later = x[c][1][0] + x[c][1][1], earlier = z[c][0][0] + z[c][0][1];
        later += shuffle_xor(later, 1), earlier += shuffle_xor(earlier, 1);
        later += shuffle_xor(later, 2), earlier += shuffle_xor(earlier, 2);
        const float whole_span = d[c].whole * span[c];
        dlog[c][0][0] = dlog[c][0][1] = whole_span + later;
        dlog[c][1][0] = dlog[c][1][1] = whole_span + earlier;
      }

      // K16 takes the place of k, of which this warp alone reads these columns.
      __syncwarp();  // all lanes have read r, k and w
      store_matrices_transposed(slot + kTileBytes + own_tile, k16[0], k16[1], k16[2], k16[3]);

      // --- dA of the tile as operands: 8x8 blocks (i, j), and transposed.
      const uint32_t upper_left = pack_bf16(dpairs0[0], dpairs0[1]), lower_left = pack_bf16(dpairs0[2], dpairs0[3]);
      const uint32_t lower_right = pack_bf16(dpairs1[2], dpairs1[3]);
      const uint32_t block[2] = {upper_left, lower_right};
      const uint32_t block_t[2] = {transpose(upper_left), transpose(lower_right)};
      const uint32_t lower_left_t = transpose(lower_left);

      // --- s = 8: i in the second half of the tile, j in the first.
      {
        uint32_t later_operand[2], earlier_operand[2];
        float later[2][2], earlier[2][2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            later[c][e] = r[c][1][e] * d[c].p[1][1], earlier[c][e] = k[c][0][e] * d[c].q[0][1];
          later_operand[c] = pack_bf16(later[c][0], later[c][1]), earlier_operand[c] = pack_bf16(earlier[c][0], earlier[c][1]);
        }
        float to_later[4] = {}, to_earlier[4] = {};
        multiply_add(to_later, earlier_operand[0], earlier_operand[1], lower_left);
        multiply_add(to_earlier, later_operand[0], later_operand[1], lower_left_t);
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            dr[c][1][e] += d[c].p[1][1] * to_later[2 * c + e], x[c][1][e] += later[c][e] * to_later[2 * c + e];
            dk[c][0][e] += d[c].q[0][1] * to_earlier[2 * c + e], z[c][0][e] += earlier[c][e] * to_earlier[2 * c + e];
          }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Totals over 4 tokens: later ones of x for lanes of the first 4 tokens, earlier ones of z for the others.
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float sum = quad < 2 ? z[c][h][0] + z[c][h][1] : x[c][h][0] + x[c][h][1];
          sum += shuffle_xor(sum, 1);
          sum = shuffle_xor(sum, 2);
          dlog[c][h][0] += sum, dlog[c][h][1] += sum;
        }
        // --- s = 4
        {
          uint32_t later_operand[2], earlier_operand[2];
          float later[2][2], earlier[2][2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e)
              later[c][e] = r[c][h][e] * d[c].p[h][0], earlier[c][e] = k[c][h][e] * d[c].q[h][0];
            later_operand[c] = pack_bf16(later[c][0], later[c][1]), earlier_operand[c] = pack_bf16(earlier[c][0], earlier[c][1]);
          }
          float to_later[4] = {}, to_earlier[4] = {};
          multiply_add(to_later, earlier_operand[0], earlier_operand[1], four ? block[h] : 0u);
          multiply_add(to_earlier, later_operand[0], later_operand[1], four_t ? block_t[h] : 0u);
#pragma unroll
          for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              dr[c][h][e] += d[c].p[h][0] * to_later[2 * c + e], x[c][h][e] += later[c][e] * to_later[2 * c + e];
              dk[c][h][e] += d[c].q[h][0] * to_earlier[2 * c + e];
              z[c][h][e] += earlier[c][e] * to_earlier[2 * c + e];
            }
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float sum = shuffle_xor(quad & 1 ? x[c][h][0] + x[c][h][1] : z[c][h][0] + z[c][h][1], 1);
          dlog[c][h][0] += sum, dlog[c][h][1] += sum;
        }
        // --- s = 2 and 1, and the diagonal; then dr, dk and dlog are complete.
        float to_later[4] = {}, to_earlier[4] = {}, next_later[4] = {}, next_earlier[4] = {};
        multiply_add(to_later, pack_bf16(k[0][h][0], k[0][h][1]), pack_bf16(k[1][h][0], k[1][h][1]), two ? block[h] : 0u);
        multiply_add(to_earlier, pack_bf16(r[0][h][0], r[0][h][1]), pack_bf16(r[1][h][0], r[1][h][1]), two_t ? block_t[h] : 0u);
        multiply_add(next_later, k_words[2 * h], k_words[2 * h + 1], one ? block[h] & 0x0000ffffu : 0u);
        multiply_add(next_earlier, r_words[2 * h], r_words[2 * h + 1], one_t ? block_t[h] & 0xffff0000u : 0u);
        float diagonal[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) diagonal[e] = shuffle_from(h ? dpairs1[2 + e] : dpairs0[e], (pair + e) * 4 + quad);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            dr[c][h][e] += to_later[2 * c + e], x[c][h][e] += r[c][h][e] * to_later[2 * c + e];
            dk[c][h][e] += to_earlier[2 * c + e], z[c][h][e] += k[c][h][e] * to_earlier[2 * c + e];
          }
          dlog[c][h][0] += x[c][h][1], dlog[c][h][1] += z[c][h][0];
          dr[c][h][1] = dr[c][h][1] * d[c].first[h] + next_later[2 * c + 1];
          dk[c][h][0] = dk[c][h][0] * d[c].second[h] + next_earlier[2 * c];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const uint32_t r_word = r_words[2 * h + c], k_word = k_words[2 * h + c];
            const float r_own = e ? high_half(r_word) : low_half(r_word);
            const float k_own = e ? high_half(k_word) : low_half(k_word);
            const float weight = diagonal[e] * bonus[c];
            dr[c][h][e] += weight * k_own;
            dk[c][h][e] += weight * r_own;
            if (kWithDu) du[c] += diagonal[e] * r_own * k_own;
          }
        }
      }

      // --- E before the tile.
      advance(gradient, d[0].whole, d[1].whole, r16, slot + 4 * kTileBytes, offset);

      // dr and dw take the places of r and w, of which this warp alone reads these columns; dk has to wait.
      auto store_channels = [&](uint32_t to, const float (&value)[2][2][2]) {
        store_matrices_transposed(to + own_tile, pack_bf16(value[0][0][0], value[0][0][1]),
                                  pack_bf16(value[1][0][0], value[1][0][1]), pack_bf16(value[0][1][0], value[0][1][1]),
                                  pack_bf16(value[1][1][0], value[1][1][1]));
      };
      store_channels(slot, dr);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          // Where exp(w_raw) overflows the decay is 0 and dlog exactly 0: the bound keeps their product from being NaN.
          for (int e = 0; e < 2; ++e) dlog[c][h][e] *= -kLn2 * minimum(rate[c][h][e], kHuge);
      store_channels(slot + 3 * kTileBytes, dlog);

      // --- dv of this warp's value columns needs E and K16 of all channels.
      if (tile == 0) copy_checkpoint(chunk - 1);
      __syncthreads();  // E and K16 are written, gradients of tile + 1, too; v has been read, dy but for own columns
      if (tile == last) {
        for (int ahead = 0; ahead < kTilesPerChunk - 1 - last; ++ahead) copy(chunk - 1, ahead);
      } else {
        retire(chunk, tile + 1);
      }
      store_channels(slot + 2 * kTileBytes, dk);  // v is no longer wanted by anyone
      float dv[2][4] = {};
      {
        uint32_t pairs[4], dy[4];
        load_shared(shared + kBackwardPairs + slot_of(chunk, tile) * 512 + lane * 16, pairs[0], pairs[1], pairs[2],
                    pairs[3]);
        load_matrices_transposed(slot + 4 * kTileBytes + own_values, dy);
        multiply_add(dv[0], pairs[0], pairs[1], pairs[2], pairs[3], dy[0], dy[1]);
        multiply_add(dv[1], pairs[0], pairs[1], pairs[2], pairs[3], dy[2], dy[3]);
      }
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t keys[4], e[4];
        load_matrices(slot + kTileBytes + offset[step], keys);
        load_matrices_transposed(gradient_load + buffer * kStateValues * 2 + step * 16 * kRowBytes, e);
        multiply_add(dv[0], keys[0], keys[1], keys[2], keys[3], e[0], e[1]);
        multiply_add(dv[1], keys[0], keys[1], keys[2], keys[3], e[2], e[3]);
      }
      __syncwarp();  // all lanes have read their dy
      store_matrices(slot + 4 * kTileBytes + own_values, pack_bf16(dv[0][0], dv[0][1]), pack_bf16(dv[0][2], dv[0][3]),
                     pack_bf16(dv[1][0], dv[1][1]), pack_bf16(dv[1][2], dv[1][3]));
    }
    __syncthreads();  // gradients of tile 0 are written
    retire(chunk, 0);
  }

  if (a.dstate != nullptr && item.span == 0) store_state(a.dstate + state_at, gradient);
  if (kWithDu) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      du[c] += shuffle_xor(du[c], 1);
      du[c] += shuffle_xor(du[c], 2);
      if (quad == 0) a.du[(static_cast<size_t>(blockIdx.y) * heads + head) * kN + own_channel + 8 * c] = du[c];
    }
  }
}

}  // namespace wkv6
