// The WKV7 kernels: forward, backward of the state, gradients of the tokens.
//
// A tile is 16 tokens. With q[t] the product of its decays after token t, d[t] the token's own, D that of all,
//   A = a / (q d)   R = r / q   (read with)     B = b q   K = k q   (written)
// the state S before a tile becomes the state after it by
//   Mab = tril_(A B^T)  Mak = tril_(A K^T)  Mqb = tril(R B^T)  Mqk = tril(R K^T)         T = (I - Mab)^-1  P = Mqb T
//   U = (T A D) S^T + (T Mak) V         S' = S D + U^T B + V^T K         y = ((R + P A) D) S^T + (Mqk + P Mak) V
// and with E the gradient of S', dX that of what T is applied to, the gradient of S is E' of
//   dX = (T^T B) E^T + P^T dY           E' = (E + dX^T A + dY^T R) D
// Both have one form, so one kernel is both (`scan_kernel`): what does not depend on the state is made ahead by
// producer warps, a tile each, and handed over in slots of shared memory; four consumer warps walk over the tiles with
// 16 value rows of the state each, which never mix. They may belong to two blocks, which then make all tiles each.
// T comes from substitution: powers of Mab reach thousands in trained models.
//
// No decay is below exp(-exp(-1/2)) = 0.5452, so 1 / (q d) stays below 1.7e4.
//
// The gradients of the tokens need S before and E after a tile, U and dX. The scans leave S before and E after every
// chunk of two tiles, and all U and dX, in bfloat16; from there chunks are independent (`gradients_kernel`):
//   dMab = tril_(dX U^T)  dMak = tril_(dX V^T)  dMqb = tril(dY U^T)  dMqk = tril(dY V^T)
//   dR = D (dY S) + dMqk K + dMqb B     dA = D (dX S) + dMak K + dMab B     dV = Mqk^T dY + Mak^T dX + K E^T
//   dK = V E + dMqk^T R + dMak^T A      dB = U E + dMqb^T R + dMab^T A
// The gradient of log decay at token s sums what spans it:
//   D sum_v(S E) + sum_{t<s} (K (V E) + B (U E)) + sum_{t>=s} (R dR - K dK_in - B dB_in) + sum_{t>s} A dA
// with dK_in, dB_in the parts from inside the tile.
//
// Operands of the scans have tf32's 10 bits. Those of the tokens' gradients are bfloat16: A R B K and the dM in two
// terms each (16 bits), the stored ones in one.
#include "wkv7_primitives.cuh"

namespace wkv7 {

constexpr int kN = 64;
constexpr int kTile = 16;
constexpr int kChunk = 32;
constexpr int kStateValues = kN * kN;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kStrongestLogDecay = -0.6065306597126334f;  // -exp(-1/2)

// Where a sequence's tokens are, and its first chunk. Chunks of different sequences do not meet: there is room for
// tokens / kChunk + sequences.
struct Sequence {
  int begin, length, first_chunk;
};

WKV7_DEVICE Sequence sequence_at(int index, const int* borders, int tokens) {
  if (borders == nullptr) return {index * tokens, tokens, index * ((tokens + kChunk - 1) / kChunk)};
  const int begin = borders[index];
  return {begin, borders[index + 1] - begin, begin / kChunk + index};
}

// log2 of the decay.
WKV7_DEVICE float log2_decay(float w_raw) {
  return kStrongestLogDecay * kLog2E * reciprocal_approximate(1.0f + exp2_approximate(-kLog2E * w_raw));
}

// ---------------------------------------------------------------------------------------------------------------------
// Scan. A slot holds, in float:
//   writing operands by key, 16 tokens side by side (`by_key`): the k index of products over tokens;
//   reading operands by token, 64 keys side by side (`by_token`): the k index of products over keys.
// A thread's fragments are four neighbours of these: keys 16 j + 4 quad + 2 i + e are columns 2 quad + e of the
// product's column tile 2 j + i, and tokens 4 quad + 2 s + e its rows in step s.
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kValueWarps = 4;  // consumers of all blocks of a head
constexpr int kOperandBytes = kTile * kN * 4;
constexpr int kSmallRow = 20;                       // floats, of a 16x16 matrix
constexpr int kSmallBytes = kTile * kSmallRow * 4;  // M_ab, then T; M_qb, then P; M_ak

template <bool kBackward>
struct Slot {
  // Forward: A then T A D; R then (R + P A) D; B; K. Backward: B then T^T B; A; R.
  static constexpr int kOperands = kBackward ? 3 : 4;
  static constexpr int kA = (kBackward ? 1 : 0) * kOperandBytes;
  static constexpr int kR = (kBackward ? 2 : 1) * kOperandBytes;
  static constexpr int kB = (kBackward ? 0 : 2) * kOperandBytes;
  static constexpr int kK = 3 * kOperandBytes;
  static constexpr int kReading = 0;  // what the state is multiplied by
  static constexpr int kMab = kOperands * kOperandBytes;
  static constexpr int kMqb = kMab + kSmallBytes;
  static constexpr int kMak = kMqb + kSmallBytes;
  static constexpr int kToAnswer = kBackward ? kMqb : kMak;  // 16x16: what V (or dY) adds to U (or dX)
  static constexpr int kToOutput = kMqb;                     // 16x16: what V adds to y
  static constexpr int kDecay = kMak + (kBackward ? 0 : kSmallBytes);
  static constexpr int kRows = kDecay + kN * 4;  // bf16 tile of V (or dY)
  static constexpr int kBytes = kRows + kTile * kN * 2;
};

// With 4 producers a block has the shared memory that sm_86, sm_89 and sm_120 allow it, with more that of Hopper and
// sm_100, whose multiprocessors make tiles faster with more warps.
template <bool kBackward, int kProducers>
struct Ring {
  static constexpr int kSlots = kProducers + (kBackward ? 1 : 0);
  static constexpr int kBarrierBytes = (2 * 8 * kSlots + 127) / 128 * 128;  // two for each slot, then whole lines
  static constexpr int kSharedBytes = kBarrierBytes + kSlots * Slot<kBackward>::kBytes;
};
static_assert(Ring<false, 4>::kSharedBytes == 90240 && Ring<true, 4>::kSharedBytes == 85888, "said in wkv7_cuda.py");
static_assert(Ring<false, 8>::kSharedBytes == 180352 && Ring<true, 8>::kSharedBytes == 154624, "likewise");
static_assert(Ring<false, 10>::kSharedBytes == 225536 && Ring<true, 10>::kSharedBytes == 188928, "likewise");

// Shapes: B batch, T tokens, H heads, S sequences (B for a dense batch). States are [value, key].
struct Scan {
  const void *r, *w_raw, *k, *rows, *a, *b;  // bf16 [B, T, H, 64]; rows: v, or the gradient of y, without k
  const float* start;                        // states, or gradients of final states; null: zero
  const int64_t* parents;                    // [S]: which of `start` each sequence starts from; null: its own
  const float* added;                        // of these, what is added to `start`: those
  const int64_t* added_to;                   // that name the sequence
  const int32_t* borders;                    // [S + 1] for packed sequences, else null
  int start_is_shared, added_count;
  int tokens, heads;  // tokens of one sequence; with borders: of all
  void* y;            // bf16 [B, T, H, 64]
  float* end;         // [S, H, 64, 64]: final states, or gradients of start states; may be null
  // bf16 [chunks, H, 64, 64]: states before chunks, or their gradients after; may be null. Values in eights, in these
  // 16 keys after 16 keys, in these by value.
  void* checkpoints;
  void* answers;      // bf16 [chunks, 2, H, 64 values, 16 tokens]: U, or dX; may be null
};

// Bytes from a by-key operand's start: four tokens from 4 piece on. Keys that are 8 apart lie in different banks.
WKV7_DEVICE uint32_t by_key(int key, int piece) {
  return (key >> 1) * 128 + (((((key & 1) << 2) | piece) ^ (((key >> 3) & 3) << 1)) << 4);
}
// Likewise, of a by-token one: four keys from 16 j + 4 quad on. Neighbouring tokens, tokens that are 2 apart with all j,
// and all quads lie in different banks.
WKV7_DEVICE uint32_t by_token(int token, int j, int quad) {
  return token * (kN * 4) + (j >> 1) * 128 + ((((j ^ token ^ (token >> 1)) & 1) << 2 | (quad ^ j)) << 4);
}
// Of the bf16 tile: eight values from 8 piece on. Rows that one matrix load names differ in the bits 0, 2 and 3.
WKV7_DEVICE uint32_t row_piece(int token, int piece) {
  return token * (kN * 2) + ((piece ^ ((token & 1) | ((token >> 1) & 6))) << 4);
}

WKV7_DEVICE void store_rounded(uint32_t address, float x, float y, float z, float w) {
  store_shared(address, tf32(x), tf32(y), tf32(z), tf32(w));
}

// Brings a tile into the L2 cache. `token_row`: its first token, in rows of 64 values from a tensor's start.
template <bool kBackward>
WKV7_DEVICE void prefetch_tile(const Scan& x, uint32_t token_row, int count) {
  const int lane = threadIdx.x & 31, token = lane & 15;
  const bool second = lane >= 16;
  if (token >= count) return;
  const size_t at = static_cast<size_t>(token_row + token * x.heads) * (kN * 2);
  auto bring = [&](const void* tensor) { prefetch(static_cast<const char*>(tensor) + at); };
  bring(second ? x.b : x.w_raw);
  bring(second ? x.a : x.r);
  bring(kBackward || second ? x.rows : x.k);
}

// What a producer's thread reads of 32 keys: tokens 2 row + h, keys 8 quad + 0 to 7.
struct Inputs {
  uint4 w[2], b[2], k[2], r[2], a[2];
};
WKV7_DEVICE uint32_t word_of(const uint4& four, int index) {
  return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

// One tile by one warp; `count` of its tokens exist. Of V or dY it brings the values of the block's kConsumers warps.
template <bool kBackward, int kConsumers>
WKV7_DEVICE void produce(const Scan& x, uint32_t slot, uint32_t token_row, int count, int share) {
  using S = Slot<kBackward>;
  const int lane = threadIdx.x & 31, row = lane >> 2, quad = lane & 3;

#pragma unroll
  for (int part = 0; part < kConsumers; ++part) {
    const int at = 32 * part + lane, token = at / (2 * kConsumers);
    const int piece = 2 * kConsumers * share + at % (2 * kConsumers);
    const bool exists = token < count;
    const uint32_t from = (token_row + (exists ? token * x.heads : 0)) * 8 + piece;
    copy_async(slot + S::kRows + row_piece(token, piece), static_cast<const uint4*>(x.rows) + from, exists);
  }

  auto load = [&](Inputs& to, int half) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = 2 * row + h;
      const uint32_t from = (token_row + token * x.heads) * 8 + 4 * half + quad;
      const uint4 nothing = make_uint4(0, 0, 0, 0), kept = make_uint4(0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u);
      const bool exists = token < count;
      to.w[h] = exists ? static_cast<const uint4*>(x.w_raw)[from] : kept;  // -inf: a decay of 1
      to.b[h] = exists ? static_cast<const uint4*>(x.b)[from] : nothing;
      if (!kBackward) to.k[h] = exists ? static_cast<const uint4*>(x.k)[from] : nothing;
      to.r[h] = exists ? static_cast<const uint4*>(x.r)[from] : nothing;
      to.a[h] = exists ? static_cast<const uint4*>(x.a)[from] : nothing;
    }
  };

  // --- The operands, and of these the four M: c[s][2 h + e] is row 2 row + h, column 4 quad + 2 e + s. A thread's own
  // numbers are what its fragments consist of, its keys in the order 32 half + 8 quad + 2 pair + e.
  float mab[2][4] = {}, mqb[2][4] = {}, mak[2][4] = {}, mqk[2][4] = {};
  float output[8][4];  // R, of tokens 2 row + h and keys 2 quad + e of column tile 4 half + pair
  auto make = [&](const Inputs& from, int half) {
    float decay[2][8], after[8];  // log2: of the thread's tokens; of all later rows' together
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t both = word_of(from.w[h], c >> 1);
        decay[h][c] = log2_decay(c & 1 ? high_half(both) : low_half(both));
      }
      const float own = decay[0][c] + decay[1][c];
      float sum = own;
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
        const float next = shuffle_down(sum, 4 * distance);
        if (row + distance < 8) sum += next;
      }
      after[c] = sum - own;
    }
    auto whole = [&](int c) { return exp2_approximate(after[c] + decay[1][c] + decay[0][c]); };
    if (row == 0)
#pragma unroll
      for (int c = 0; c < 8; c += 4)
        store_shared(slot + S::kDecay + (32 * half + 8 * quad + c) * 4, whole(c), whole(c + 1), whole(c + 2),
                     whole(c + 3));
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      float of_a[2][2], of_r[2][2], of_b[2][2], of_k[2][2];  // [h][e]
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 2 * pair + e;
        float later = after[c], raised = tf32(exp2_approximate(-later));  // log2 of q, and 1 / q
#pragma unroll
        for (int h = 1; h >= 0; --h) {
          auto half_of = [&](const uint4& four) {
            const uint32_t both = word_of(four, pair);
            return e ? high_half(both) : low_half(both);
          };
          const float q = tf32(exp2_approximate(later));
          of_b[h][e] = half_of(from.b[h]) * q;
          if (!kBackward) of_k[h][e] = half_of(from.k[h]) * q;
          of_r[h][e] = half_of(from.r[h]) * raised;
          later += decay[h][c];
          raised = tf32(exp2_approximate(-later));
          of_a[h][e] = half_of(from.a[h]) * raised;
        }
        const uint32_t at = slot + by_key(32 * half + 8 * quad + c, row >> 1) + (row & 1) * 8;
        store_shared(at + S::kA, of_a[0][e], of_a[1][e]);
        if (kBackward) store_shared(at + S::kR, of_r[0][e], of_r[1][e]);
        store_shared(at + S::kB, of_b[0][e], of_b[1][e]);
        if (!kBackward) store_shared(at + S::kK, of_k[0][e], of_k[1][e]);
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        multiply_add(mab[s], of_a[0][0], of_a[1][0], of_a[0][1], of_a[1][1], of_b[s][0], of_b[s][1]);
        multiply_add(mqb[s], of_r[0][0], of_r[1][0], of_r[0][1], of_r[1][1], of_b[s][0], of_b[s][1]);
        if (!kBackward) {
          multiply_add(mak[s], of_a[0][0], of_a[1][0], of_a[0][1], of_a[1][1], of_k[s][0], of_k[s][1]);
          multiply_add(mqk[s], of_r[0][0], of_r[1][0], of_r[0][1], of_r[1][1], of_k[s][0], of_k[s][1]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 2; ++e) output[4 * half + pair][2 * h + e] = of_r[h][e];
    }
  };
  Inputs low, high;
  load(low, 0);
  load(high, 1);
  make(low, 0);
  make(high, 1);
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int later_by = 2 * row + h - (4 * quad + 2 * e + s);
        if (later_by <= 0) mab[s][2 * h + e] = 0.0f, mak[s][2 * h + e] = 0.0f;
        if (later_by < 0) mqb[s][2 * h + e] = 0.0f, mqk[s][2 * h + e] = 0.0f;
      }
  // M_ab and M_qb by rows, M_ak by columns.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t at = slot + ((2 * row + h) * kSmallRow + 4 * quad) * 4;
    store_shared(at + S::kMab, mab[0][2 * h], mab[1][2 * h], mab[0][2 * h + 1], mab[1][2 * h + 1]);
    store_shared(at + S::kMqb, mqb[0][2 * h], mqb[1][2 * h], mqb[0][2 * h + 1], mqb[1][2 * h + 1]);
  }
  if (!kBackward)
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        store_shared(slot + S::kMak + ((4 * quad + 2 * e + s) * kSmallRow + 2 * row) * 4, tf32(mak[s][e]),
                     tf32(mak[s][2 + e]));
  __syncwarp();  // all of M_ab, M_qb and M_ak, A, R or B, and the decays are written

  // --- T (I - M_ab) = I by the first half of the warp, P (I - M_ab) = M_qb by the second, a row each.
  const int own_row = lane & 15;
  const bool of_p = lane >= 16;
  float solved[kTile];
#pragma unroll
  for (int piece = 0; piece < 4; ++piece) {
    float right[4];
    load_shared(slot + S::kMqb + (own_row * kSmallRow + 4 * piece) * 4, right);
#pragma unroll
    for (int i = 0; i < 4; ++i) solved[4 * piece + i] = of_p ? right[i] : 4 * piece + i == own_row ? 1.0f : 0.0f;
  }
  // What a column is, once known, goes to all before it at once: these do not wait for each other.
#pragma unroll
  for (int known = kTile - 1; known > 0; --known)
#pragma unroll
    for (int piece = (known - 1) / 4; piece >= 0; --piece) {
      float m[4];
      load_shared(slot + S::kMab + (known * kSmallRow + 4 * piece) * 4, m);
#pragma unroll
      for (int i = 3; i >= 0; --i)
        if (4 * piece + i < known) solved[4 * piece + i] += solved[known] * m[i];
    }
  __syncwarp();  // all of M_ab and M_qb has been read
  if (kBackward) {
    // Both transposed; that of P is what dY adds to dX.
    const uint32_t to = of_p ? slot + S::kToAnswer : slot + S::kMab;
    const int stride = of_p ? kTile : kSmallRow;
#pragma unroll
    for (int t = 0; t < kTile; ++t) store_shared(to + (t * stride + own_row) * 4, tf32(solved[t]));
  } else {
    const uint32_t to = (of_p ? slot + S::kMqb : slot + S::kMab) + own_row * kSmallRow * 4;
#pragma unroll
    for (int piece = 0; piece < 4; ++piece)
      store_rounded(to + piece * 16, solved[4 * piece], solved[4 * piece + 1], solved[4 * piece + 2],
                    solved[4 * piece + 3]);
  }
  __syncwarp();  // all of T and P is written

  // --- What the state is multiplied by. Rows are tokens 2 row + h.
  float solve[2][4], project[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    load_shared(slot + S::kMab + ((2 * row + h) * kSmallRow + 4 * quad) * 4, solve[h]);
    if (!kBackward) load_shared(slot + S::kMqb + ((2 * row + h) * kSmallRow + 4 * quad) * 4, project[h]);
  }
  float to_answer[2][4] = {};
  if (!kBackward) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      float m[4];
      load_shared(slot + S::kMak + ((2 * row + s) * kSmallRow + 4 * quad) * 4, m);
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        multiply_add(to_answer[s], solve[0][step], solve[1][step], solve[0][step + 1], solve[1][step + 1], m[step],
                     m[step + 1]);
        multiply_add(mqk[s], project[0][step], project[1][step], project[0][step + 1], project[1][step + 1], m[step],
                     m[step + 1]);
      }
    }
  }
  float reading[8][4] = {};
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const int key = 32 * (tile >> 2) + 8 * (row >> 1) + 2 * (tile & 3) + (row & 1);
    float m[4];
    load_shared(slot + (kBackward ? S::kB : S::kA) + by_key(key, quad), m);
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
      multiply_add(reading[tile], solve[0][step], solve[1][step], solve[0][step + 1], solve[1][step + 1], m[step],
                   m[step + 1]);
      if (!kBackward)
        multiply_add(output[tile], project[0][step], project[1][step], project[0][step + 1], project[1][step + 1],
                     m[step], m[step + 1]);
    }
  }
  __syncwarp();  // all of A, R (or B), P and M_ak has been read
#pragma unroll
  for (int four = 0; four < 4; ++four) {
    // Keys 32 (four / 2) + 8 quad + 4 (four % 2) + 0 to 3.
    const int j = 2 * (four >> 1) + (quad >> 1), piece = 2 * (quad & 1) + (four & 1);
    float decay[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    if (!kBackward) load_shared(slot + S::kDecay + (16 * j + 4 * piece) * 4, decay);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t at = slot + by_token(2 * row + h, j, piece);
      auto store = [&](uint32_t to, const float(&first)[4], const float(&second)[4]) {
        store_rounded(to, first[2 * h] * decay[0], first[2 * h + 1] * decay[1], second[2 * h] * decay[2],
                      second[2 * h + 1] * decay[3]);
      };
      store(at + S::kReading, reading[2 * four], reading[2 * four + 1]);
      if (!kBackward) store(at + S::kR, output[2 * four], output[2 * four + 1]);
    }
  }
  if (!kBackward) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t at = slot + ((2 * row + h) * kTile + 4 * quad) * 4;
      store_rounded(at + S::kToAnswer, to_answer[0][2 * h], to_answer[1][2 * h], to_answer[0][2 * h + 1],
                    to_answer[1][2 * h + 1]);
      store_rounded(at + S::kToOutput, mqk[0][2 * h], mqk[1][2 * h], mqk[0][2 * h + 1], mqk[1][2 * h + 1]);
    }
  }
  wait_for_all_copies();
  __syncwarp();  // every lane has written its part and waited for its copies: one of them may arrive for all
}

// Eight neighbouring words of a row from the four threads of a quad, of which each has word `quad` of both halves.
WKV7_DEVICE void store_words(uint32_t* row, uint32_t low, uint32_t high, bool exists) {
  const int quad = threadIdx.x & 3;
  const bool odd = quad & 1;
  const uint32_t other = shuffle_xor(odd ? low : high, 1);
  if (exists) *reinterpret_cast<uint2*>(row + quad + (odd ? 3 : 0)) = odd ? make_uint2(other, high) : make_uint2(low, other);
}

// A thread's parts of a state, four keys of one value each: column tiles 2 j and 2 j + 1, half h of the values, and where
// that is from the thread's first one.
template <class Action>
WKV7_DEVICE void for_each_piece(Action action) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) action(j, h, 16 * j + 8 * h * kN);
}

// Use u of a slot: a producer waits for the end of phase u - 1 of its `empty`, writes, and ends phase u of its `full`;
// every thread of the consumers waits for that and reads; all consumers together end phase u of `empty`. A warp arrives
// by one lane, after __syncwarp: all its lanes have written, or read, and have left the wait before.
// A wait names its phase by parity, so the barrier must not be two phases away:
//   ahead it is not, since the phase after the one waited for does not end without an arrival of the waiting warp;
//   nor behind: consumers wait for one phase after another, and a producer that waits for phase u - 1 of `empty` has
//   waited before, kProducers <= kSlots steps ago, for the end of that slot's phase u - 2, or (where slots change their
//   producers) for that of a later tile's: consumers read in order.
// No barrier of the block follows, so producers may end first: its shared memory lasts as long as any thread of it.
template <bool kBackward, int kProducers, int kConsumers>
__global__ void __launch_bounds__(32 * (kConsumers + kProducers), 1) scan_kernel(const Scan x) {
  using S = Slot<kBackward>;
  using R = Ring<kBackward, kProducers>;
  constexpr int kSlots = R::kSlots, kShares = kValueWarps / kConsumers;
  const int share = blockIdx.x % kShares, item = blockIdx.x / kShares;
  const int heads = x.heads, index = item / heads, head = item % heads;
  const Sequence sequence = sequence_at(index, x.borders, x.tokens);
  const int tiles = (sequence.length + kTile - 1) / kTile;
  const uint32_t full = shared_base(), empty = full + 8 * kSlots, first_slot = full + R::kBarrierBytes;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = lane >> 2, quad = lane & 3;
  if (threadIdx.x < kSlots) {
    init_barrier(full + 8 * threadIdx.x, 1);
    init_barrier(empty + 8 * threadIdx.x, kConsumers);
  }
  __syncthreads();

  if (warp >= kConsumers) {
    int slot = warp - kConsumers, use = 0;
    for (int step = warp - kConsumers; step < tiles; step += kProducers) {
      auto tile_of = [&](int of_step) { return kBackward ? tiles - 1 - of_step : of_step; };
      auto row_of = [&](int tile) { return static_cast<uint32_t>(sequence.begin + tile * kTile) * heads + head; };
      const int tile = tile_of(step), next = tile_of(step + kProducers);
      if (step + kProducers < tiles) prefetch_tile<kBackward>(x, row_of(next), sequence.length - next * kTile);
      if (use > 0) wait_for_phase(empty + 8 * slot, (use - 1) & 1);
      produce<kBackward, kConsumers>(x, first_slot + slot * S::kBytes, row_of(tile), sequence.length - tile * kTile,
                                     share);
      if (lane == 0) arrive(full + 8 * slot);
      slot += kProducers;
      if (slot >= kSlots) slot -= kSlots, ++use;
    }
    return;
  }

  // state[2 j + i][2 h + e]: value 16 part + row + 8 h, key 16 j + 4 quad + 2 i + e.
  const int part = kConsumers * share + warp;
  float state[8][4] = {};
  const size_t within = static_cast<size_t>(head) * kStateValues + (16 * part + row) * kN + 4 * quad;
  auto add_state = [&](const float* states, int64_t of) {
    const float* from = states + of * heads * kStateValues + within;
    for_each_piece([&](int j, int h, int offset) {
      const float4 four = *reinterpret_cast<const float4*>(from + offset);
      state[2 * j][2 * h] += four.x, state[2 * j][2 * h + 1] += four.y;
      state[2 * j + 1][2 * h] += four.z, state[2 * j + 1][2 * h + 1] += four.w;
    });
  };
  if (x.start != nullptr) add_state(x.start, x.start_is_shared ? 0 : x.parents != nullptr ? x.parents[index] : index);
  for (int i = 0; i < x.added_count; ++i)
    if (x.added_to[i] == index) add_state(x.added, i);

  const int token_of_row = 4 * (row >> 1) + (row & 1);  // and + 2: tokens that are column `row` of U's two column tiles
  // Matrices (token pairs s, values): (0, low) (0, high) (1, low) (1, high).
  const int of_matrix = lane & 7;
  const uint32_t rows = S::kRows + row_piece(4 * (of_matrix >> 1) + 2 * (lane >> 4) + (of_matrix & 1),
                                             2 * part + ((lane >> 3) & 1));

  int slot_index = 0, use = 0;
  for (int step = 0; step < tiles; ++step) {
    const int tile = kBackward ? tiles - 1 - step : step;
    const uint32_t slot = first_slot + slot_index * S::kBytes;
    float rounded[8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) rounded[n][c] = tf32(state[n][c]);
    if (x.checkpoints != nullptr && (kBackward ? (tile & 1) != 0 || step == 0 : (tile & 1) == 0)) {
      const size_t chunk = static_cast<size_t>(sequence.first_chunk + (tile >> 1)) * heads + head;
      uint2* to = static_cast<uint2*>(x.checkpoints) + chunk * (kStateValues / 4) + 256 * part + lane;
      for_each_piece([&](int j, int h, int) {
        to[32 * (4 * h + j)] = make_uint2(pack_bf16(state[2 * j][2 * h], state[2 * j][2 * h + 1]),
                                          pack_bf16(state[2 * j + 1][2 * h], state[2 * j + 1][2 * h + 1]));
      });
    }

    // What follows is loaded a batch (four pieces of a thread) ahead of its products, and no product waits for the one
    // before: a warp is alone on its part of the multiprocessor.
    float one[4][4], other[4][4];
    // Two 16-key columns of a by-token operand, for two rows of it that are `apart` tokens apart.
    auto load_reading = [&](float(&m)[4][4], uint32_t operand, int token, int apart, int j) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_shared(slot + operand + by_token(token + (i & 1) * apart, j + (i >> 1), quad), m[i]);
    };
    // sums[s] and sums[2 + s] += state (that operand)^T, row s.
    auto read = [&](float(&sums)[4][4], const float(&m)[4][4], int j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&low)[4] = rounded[2 * (j + (i >> 1))], (&high)[4] = rounded[2 * (j + (i >> 1)) + 1];
        multiply_add(sums[i & 1], low[0], low[2], low[1], low[3], m[i][0], m[i][1]);
        multiply_add(sums[2 + (i & 1)], high[0], high[2], high[1], high[3], m[i][2], m[i][3]);
      }
    };
    // Half of a by-key operand: column tiles n to n + 3 of the state.
    auto load_writing = [&](float(&m)[4][4], uint32_t operand, int n) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_shared(slot + operand + by_key(8 * (n + (i & 2)) + token_of_row + 2 * (i & 1), quad), m[i]);
    };
    auto write = [&](const float(&a)[2][4], const float(&m)[4][4], int n) {
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          multiply_add(state[n + i], a[s][0], a[s][1], a[s][2], a[s][3], m[i][2 * s], m[i][2 * s + 1]);
    };
    auto decay = [&] {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float of[4];
        load_shared(slot + S::kDecay + (16 * j + 4 * quad) * 4, of);
#pragma unroll
        for (int c = 0; c < 4; ++c) state[2 * j][c] *= of[c & 1], state[2 * j + 1][c] *= of[2 + (c & 1)];
      }
    };

    wait_for_phase(full + 8 * slot_index, use & 1);
    // --- U^T: values x tokens. Then what V writes, and y, while U comes.
    float answer[4][4] = {};
    load_reading(one, S::kReading, token_of_row, 2, 0);
    load_reading(other, S::kReading, token_of_row, 2, 2);
    float value[2][4];  // A fragments of V^T, for token step s
    {
      uint32_t m[4];
      load_matrices_transposed(slot + rows, m);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        value[s][0] = low_half(m[2 * s]), value[s][1] = low_half(m[2 * s + 1]);
        value[s][2] = high_half(m[2 * s]), value[s][3] = high_half(m[2 * s + 1]);
      }
    }
    read(answer, one, 0);
    load_writing(one, kBackward ? S::kR : S::kK, 0);
    read(answer, other, 2);
    float small[2][4];
#pragma unroll
    for (int s = 0; s < 2; ++s)
      load_shared(slot + S::kToAnswer + ((token_of_row + 2 * s) * kTile + 4 * quad) * 4, small[s]);
    load_writing(other, kBackward ? S::kR : S::kK, 4);
#pragma unroll
    for (int step_of = 0; step_of < 2; ++step_of)
#pragma unroll
      for (int s = 0; s < 2; ++s)
        multiply_add(answer[2 * step_of + s], value[step_of][0], value[step_of][1], value[step_of][2],
                     value[step_of][3], small[s][2 * step_of], small[s][2 * step_of + 1]);
    if (!kBackward) decay();
    write(value, one, 0);
    if (!kBackward) load_reading(one, S::kR, row, 8, 0);
    write(value, other, 4);
    float y[4][4] = {};
    if (!kBackward) {
      load_reading(other, S::kR, row, 8, 2);
      read(y, one, 0);
#pragma unroll
      for (int s = 0; s < 2; ++s)
        load_shared(slot + S::kToOutput + ((row + 8 * s) * kTile + 4 * quad) * 4, small[s]);
    }
    load_writing(one, kBackward ? S::kA : S::kB, 0);
    if (!kBackward) {
      read(y, other, 2);
#pragma unroll
      for (int step_of = 0; step_of < 2; ++step_of)
#pragma unroll
        for (int s = 0; s < 2; ++s)
          multiply_add(y[2 * step_of + s], value[step_of][0], value[step_of][1], value[step_of][2], value[step_of][3],
                       small[s][2 * step_of], small[s][2 * step_of + 1]);
    }
    load_writing(other, kBackward ? S::kA : S::kB, 4);
    float written[2][4];  // U^T as A fragments
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int c = 0; c < 4; ++c) answer[s][c] += answer[2 + s][c];
      written[s][0] = tf32(answer[s][0]), written[s][1] = tf32(answer[s][2]);
      written[s][2] = tf32(answer[s][1]), written[s][3] = tf32(answer[s][3]);
    }
    write(written, one, 0);
    write(written, other, 4);
    if (kBackward) decay();
    __syncwarp();  // all of the slot has been read
    if (lane == 0) arrive(empty + 8 * slot_index);

    if (!kBackward) {
      // y^T: values x tokens; its fragments turned are what memory wants.
      const int first = tile * kTile + row;
      uint32_t* to = static_cast<uint32_t*>(x.y) +
                     (static_cast<uint32_t>(sequence.begin + first) * heads + head) * (kN / 2) + 8 * part;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint32_t low = transpose(pack_bf16(y[s][0] + y[2 + s][0], y[s][1] + y[2 + s][1]));
        const uint32_t high = transpose(pack_bf16(y[s][2] + y[2 + s][2], y[s][3] + y[2 + s][3]));
        const uint32_t at = s * 8 * heads * (kN / 2);
        store_words(to + at, low, high, first + 8 * s < sequence.length);
      }
    }
    if (x.answers != nullptr) {
      // By value, a tile's tokens side by side.
      const size_t at = static_cast<size_t>(2 * sequence.first_chunk + tile) * heads + head;
      uint2* to = static_cast<uint2*>(x.answers) + (at * kN + 16 * part + row) * (kTile / 4) + quad;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        to[8 * h * (kTile / 4)] = make_uint2(pack_bf16(answer[0][2 * h], answer[0][2 * h + 1]),
                                             pack_bf16(answer[1][2 * h], answer[1][2 * h + 1]));
    }
    if (++slot_index == kSlots) slot_index = 0, ++use;
  }

  if (x.end != nullptr) {
    float* to = x.end + static_cast<size_t>(index) * heads * kStateValues + within;
    for_each_piece([&](int j, int h, int offset) {
      *reinterpret_cast<float4*>(to + offset) = make_float4(state[2 * j][2 * h], state[2 * j][2 * h + 1],
                                                            state[2 * j + 1][2 * h], state[2 * j + 1][2 * h + 1]);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of a chunk's tokens. Eight warps: four for each of its two tiles, with 16 keys (and 16 values of dv) each.
//
// Matrix loads name rows and 16-byte pieces by lane in one of two ways. `first`: matrices (0, 0) (8, 0) (0, 1) (8, 1),
// which is an A fragment of what is stored, or transposed a B fragment of it; `second`: (0, 0) (0, 1) (8, 0) (8, 1), a
// B fragment, or transposed an A fragment. Of a B fragment words 0 and 1 are the first 8 columns, 2 and 3 the others.
// ---------------------------------------------------------------------------------------------------------------------

constexpr int kGradientThreads = 256;
constexpr int kTileBytes = kTile * kN * 2;
constexpr int kPairBytes = kTile * kTile * 2;
constexpr int kTerms = 2;
constexpr int kGradientV = 0;  // two tiles each: by token
constexpr int kGradientDy = kGradientV + 2 * kTileBytes;
constexpr int kGradientU = kGradientDy + 2 * kTileBytes;  // by value
constexpr int kGradientDx = kGradientU + 2 * kTileBytes;
constexpr int kGradientOperands = kGradientDx + 2 * kTileBytes;  // [tile][A R B K][term], by token
constexpr int kGradientStates = kGradientOperands + 2 * 4 * kTerms * kTileBytes;  // before tiles 0 and 1
constexpr int kGradientAfter = kGradientStates + 2 * kStateValues * 2;            // E after tiles 0 and 1
constexpr int kGradientLogs = kGradientAfter + 2 * kStateValues * 2;  // [tile][17][64] log2 of q D_t, then of q
constexpr int kLogBytes = (kTile + 1) * kN * 4;
constexpr int kGradientPairs = kGradientLogs + 2 * kLogBytes;
constexpr int kPairsOfTile = 2 + 4 * kTerms;
static_assert(kGradientPairs + 2 * kPairsOfTile * kPairBytes == 100864, "said in wkv7_cuda.py");

enum Operand { kOfA, kOfR, kOfB, kOfK };
enum Pairs { kMqk, kMak, kDmqk, kDmqb = kDmqk + kTerms, kDmak = kDmqb + kTerms, kDmab = kDmak + kTerms };

struct Gradients {
  const void *r, *w_raw, *k, *v, *a, *b, *dy;  // bf16 [B, T, H, 64]
  const void *states, *answers;                // what the forward scan left
  const void *gradients, *danswers;            // and the backward one
  const int32_t* borders;                      // as in Scan
  int sequences, tokens, heads;
  int adds;                               // whether dr, dk and dv hold what their gradients are added to
  void *dr, *dw_raw, *dk, *dv, *da, *db;  // bf16 [B, T, H, 64]; each may be null
};

// Rows of 64 bf16, and of 16.
WKV7_DEVICE uint32_t wide(int row, int piece) { return row * (kN * 2) + ((piece ^ (row & 7)) << 4); }
WKV7_DEVICE uint32_t narrow(int row, int piece) { return row * (kTile * 2) + ((piece ^ ((row >> 2) & 1)) << 4); }

WKV7_DEVICE void split(float x, float y, uint32_t& high, uint32_t& low) {
  high = pack_bf16(x, y);
  low = pack_bf16(x - low_half(high), y - high_half(high));
}

// c += a b over 16 columns, both in two terms.
WKV7_DEVICE void multiply_add_terms(float (&c)[2][4], const uint32_t (&a)[kTerms][4], const uint32_t (&b)[kTerms][4]) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    multiply_add(c[n], a[0], b[1][2 * n], b[1][2 * n + 1]);
    multiply_add(c[n], a[1], b[0][2 * n], b[0][2 * n + 1]);
    multiply_add(c[n], a[0], b[0][2 * n], b[0][2 * n + 1]);
  }
}
WKV7_DEVICE void multiply_add_both(float (&c)[2][4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  multiply_add(c[0], a, b[0], b[1]);
  multiply_add(c[1], a, b[2], b[3]);
}

// The chunk of which block it is: false where there is none.
WKV7_DEVICE bool find_chunk(const Gradients& x, int chunk, Sequence& sequence) {
  int low = 0;
  if (x.borders == nullptr) {
    low = chunk / ((x.tokens + kChunk - 1) / kChunk);
  } else {
    // The last sequence whose first chunk is not later.
    int high = x.sequences - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (x.borders[middle] / kChunk + middle <= chunk) low = middle;
      else high = middle - 1;
    }
  }
  sequence = sequence_at(low, x.borders, x.tokens);
  return (chunk - sequence.first_chunk) * kChunk < sequence.length;
}

__global__ void __launch_bounds__(kGradientThreads, 2) gradients_kernel(const Gradients x) {
  const int heads = x.heads, chunk = blockIdx.x / heads, head = blockIdx.x % heads;
  Sequence sequence;
  if (!find_chunk(x, chunk, sequence)) return;
  const int offset = (chunk - sequence.first_chunk) * kChunk;
  const int begin = sequence.begin + offset, count = sequence.length - offset;
  const uint32_t shared = shared_base();
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, row = lane >> 2, quad = lane & 3;
  const int tile = warp >> 2, part = warp & 3;
  const int first_row = lane & 15, first_piece = lane >> 4;
  const int second_row = (lane & 7) + (lane >> 4) * 8, second_piece = (lane >> 3) & 1;

  auto operand = [&](int of_tile, int which, int term) {
    return shared + kGradientOperands + ((of_tile * 4 + which) * kTerms + term) * kTileBytes;
  };
  auto pairs = [&](int which) { return shared + kGradientPairs + (tile * kPairsOfTile + which) * kPairBytes; };
  auto state_before = [&](int of_tile) { return shared + kGradientStates + of_tile * kStateValues * 2; };
  auto gradient_after = [&](int of_tile) { return shared + kGradientAfter + of_tile * kStateValues * 2; };
  // Neighbouring channels, from an even one on; rows lie so that four of them meet in no bank.
  auto logs = [&](int of_tile, int of_row, int channel) {
    return shared + kGradientLogs + of_tile * kLogBytes + (of_row * kN + (channel ^ ((of_row & 3) << 3))) * 4;
  };

  // --- What the chunk consists of.
  {
    const int token = thread >> 3, piece = thread & 7;
    const bool exists = token < count;
    const size_t from = (static_cast<size_t>(begin + (exists ? token : 0)) * heads + head) * 8 + piece;
    const uint32_t to = shared + (token >> 4) * kTileBytes + wide(token & 15, piece);
    copy_async(to + kGradientV, static_cast<const uint4*>(x.v) + from, exists);
    copy_async(to + kGradientDy, static_cast<const uint4*>(x.dy) + from, exists);
    const int of_tile = thread >> 7, value = (thread >> 1) & 63, half = thread & 1;
    const bool tile_exists = of_tile * kTile < count;
    const size_t tile_at = tile_exists ? (static_cast<size_t>(2 * chunk + of_tile) * heads + head) * kN * 2 : 0;
    const size_t of_answers = tile_at + value * 2 + half;
    const uint32_t to_answers = shared + of_tile * kTileBytes + narrow(value, half);
    copy_async(to_answers + kGradientU, static_cast<const uint4*>(x.answers) + of_answers, tile_exists);
    copy_async(to_answers + kGradientDx, static_cast<const uint4*>(x.danswers) + of_answers, tile_exists);
    const size_t state_at = (static_cast<size_t>(chunk) * heads + head) * (kStateValues / 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // As `checkpoints` lie; eight threads in a row take every other value, whose places are in different banks.
      const int of = thread + i * kGradientThreads;
      const int value = ((of >> 1) & 3) * 2 + ((of >> 3) & 1), at = (of & ~15) + 2 * value + (of & 1);
      const uint32_t place = wide(8 * (of >> 6) + value, 2 * ((of >> 4) & 3) + (of & 1));
      copy_async(state_before(0) + place, static_cast<const uint4*>(x.states) + state_at + at, true);
      copy_async(gradient_after(1) + place, static_cast<const uint4*>(x.gradients) + state_at + at, true);
    }
  }

  // --- A, R, B, K: each warp takes 4 tokens, each lane 2 channels.
  {
    uint32_t r[4], w[4], k[4], a[4], b[4];
    const int first = tile * kTile + 4 * part;
    const size_t word = (static_cast<size_t>(begin + first) * heads + head) * (kN / 2) + lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const size_t at = word + static_cast<size_t>(i) * heads * (kN / 2);
      const bool exists = first + i < count;
      w[i] = exists ? static_cast<const uint32_t*>(x.w_raw)[at] : 0xff80ff80u;  // -inf twice: a decay of 1
      r[i] = exists ? static_cast<const uint32_t*>(x.r)[at] : 0u;
      k[i] = exists ? static_cast<const uint32_t*>(x.k)[at] : 0u;
      a[i] = exists ? static_cast<const uint32_t*>(x.a)[at] : 0u;
      b[i] = exists ? static_cast<const uint32_t*>(x.b)[at] : 0u;
    }
    float decay[4][2], later[2] = {0.0f, 0.0f};
    float total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      decay[i][0] = log2_decay(low_half(w[i])), decay[i][1] = log2_decay(high_half(w[i]));
      total[0] += decay[i][0], total[1] += decay[i][1];
    }
    const uint32_t totals = shared + kGradientPairs + tile * 4 * kN * 4 + lane * 8;
    store_shared(totals + part * kN * 4, total[0], total[1]);
    __syncthreads();  // all totals are written; the next barrier comes before anything takes their place
#pragma unroll
    for (int other = 3; other > 0; --other)
      if (other > part) {
        load_shared(totals + other * kN * 4, total);
        later[0] += total[0], later[1] += total[1];
      }
    float raised[2] = {exp2_approximate(-later[0]), exp2_approximate(-later[1])};
    auto store_operand = [&](int which, int token, float low, float high) {
      uint32_t terms[2];
      split(low, high, terms[0], terms[1]);
#pragma unroll
      for (int term = 0; term < kTerms; ++term)
        store_shared(operand(tile, which, term) + wide(token, lane >> 2) + quad * 4, terms[term]);
    };
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      const int token = 4 * part + i;
      store_shared(logs(tile, token + 1, 2 * lane), later[0], later[1]);
      const float q[2] = {exp2_approximate(later[0]), exp2_approximate(later[1])};
      store_operand(kOfB, token, low_half(b[i]) * q[0], high_half(b[i]) * q[1]);
      store_operand(kOfK, token, low_half(k[i]) * q[0], high_half(k[i]) * q[1]);
      store_operand(kOfR, token, low_half(r[i]) * raised[0], high_half(r[i]) * raised[1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) later[e] += decay[i][e], raised[e] = exp2_approximate(-later[e]);
      store_operand(kOfA, token, low_half(a[i]) * raised[0], high_half(a[i]) * raised[1]);
    }
    if (part == 0) store_shared(logs(tile, 0, 2 * lane), later[0], later[1]);
  }
  wait_for_all_copies();
  __syncthreads();

  // --- S before tile 1 by the first four warps, E after tile 0 by the others: 16 values each.
  {
    const bool backward = tile == 1;
    const uint32_t from = backward ? gradient_after(1) : state_before(0);
    const uint32_t to = backward ? gradient_after(0) : state_before(1);
    const uint32_t rows = shared + (backward ? kGradientDy : kGradientV) + tile * kTileBytes;
    const uint32_t answers = shared + (backward ? kGradientDx : kGradientU) + tile * kTileBytes;
    uint32_t of_rows[4], of_answers[4];
    load_matrices_transposed(rows + wide(second_row, 2 * part + second_piece), of_rows);
    load_matrices(answers + narrow(16 * part + first_row, first_piece), of_answers);
    const int value = 16 * part + row;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      float state[2][4], decay[2][2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        load_shared(logs(tile, 0, 16 * p + 8 * n + 2 * quad), decay[n]);
#pragma unroll
        for (int e = 0; e < 2; ++e) decay[n][e] = exp2_approximate(decay[n][e]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t both = load_shared_word(from + wide(value + 8 * h, 2 * p + n) + quad * 4);
          state[n][2 * h] = low_half(both), state[n][2 * h + 1] = high_half(both);
        }
        if (!backward)
#pragma unroll
          for (int c = 0; c < 4; ++c) state[n][c] *= decay[n][c & 1];
      }
#pragma unroll
      for (int term = kTerms - 1; term >= 0; --term) {
        uint32_t m[4];
        load_matrices_transposed(operand(tile, backward ? kOfR : kOfK, term) + wide(first_row, 2 * p + first_piece), m);
        multiply_add_both(state, of_rows, m);
        load_matrices_transposed(operand(tile, backward ? kOfA : kOfB, term) + wide(first_row, 2 * p + first_piece), m);
        multiply_add_both(state, of_answers, m);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (backward)
#pragma unroll
          for (int c = 0; c < 4; ++c) state[n][c] *= decay[n][c & 1];
#pragma unroll
        for (int h = 0; h < 2; ++h)
          store_shared(to + wide(value + 8 * h, 2 * p + n) + quad * 4, pack_bf16(state[n][2 * h], state[n][2 * h + 1]));
      }
    }
  }

  // --- The 16x16 matrices of the tile, spread over its warps.
  const uint32_t v = shared + kGradientV + tile * kTileBytes, dy = shared + kGradientDy + tile * kTileBytes;
  const uint32_t u = shared + kGradientU + tile * kTileBytes, dx = shared + kGradientDx + tile * kTileBytes;
  {
    // Entries above the diagonal (strictly: on it too) become zero.
    auto store_pairs = [&](int which, int terms, bool strictly, const float(&c)[2][4]) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = row + 8 * h, j = 8 * n + 2 * quad;
          const float x0 = i > j || (i == j && !strictly) ? c[n][2 * h] : 0.0f;
          const float x1 = i > j + 1 || (i == j + 1 && !strictly) ? c[n][2 * h + 1] : 0.0f;
          uint32_t of[2];
          split(x0, x1, of[0], of[1]);
          for (int term = 0; term < terms; ++term)
            store_shared(pairs(which + term) + narrow(i, n) + quad * 4, of[term]);
        }
    };
    if (part < 2) {
      float c[2][4] = {};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t reading[kTerms][4], writing[kTerms][4];
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          load_matrices(operand(tile, part == 0 ? kOfR : kOfA, term) + wide(first_row, 2 * step + first_piece),
                        reading[term]);
          load_matrices(operand(tile, kOfK, term) + wide(second_row, 2 * step + second_piece), writing[term]);
        }
        multiply_add_terms(c, reading, writing);
      }
      store_pairs(part == 0 ? kMqk : kMak, 1, part == 1, c);
    } else {
      float with_v[2][4] = {}, with_u[2][4] = {};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t of[4], m[4];
        if (part == 2) load_matrices(dy + wide(first_row, 2 * step + first_piece), of);
        else load_matrices_transposed(dx + narrow(16 * step + second_row, second_piece), of);
        load_matrices(v + wide(second_row, 2 * step + second_piece), m);
        multiply_add_both(with_v, of, m);
        load_matrices_transposed(u + narrow(16 * step + first_row, first_piece), m);
        multiply_add_both(with_u, of, m);
      }
      store_pairs(part == 2 ? kDmqk : kDmak, kTerms, part == 3, with_v);
      store_pairs(part == 2 ? kDmqb : kDmab, kTerms, part == 3, with_u);
    }
  }
  __syncthreads();

  const int first_token = tile * kTile + row;  // and + 8
  const uint32_t first_word = (static_cast<uint32_t>(begin + first_token) * heads + head) * (kN / 2) + 8 * part;
  const uint32_t words[2] = {first_word, first_word + 8 * heads * (kN / 2)};
  auto store = [&](void* tensor, const uint32_t(&packed)[2][2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      store_words(static_cast<uint32_t*>(tensor) + words[h], packed[0][h], packed[1][h], first_token + 8 * h < count);
  };
  // Rounds a word of a gradient, added to what is there. Another lane may store it: __syncwarp comes between.
  auto pack_added = [&](const void* tensor, int n, int h, float low, float high) {
    if (x.adds && tensor != nullptr && first_token + 8 * h < count) {
      const uint32_t both = static_cast<const uint32_t*>(tensor)[words[h] + 4 * n + quad];
      low += low_half(both), high += high_half(both);
    }
    return pack_bf16(low, high);
  };

  // --- dv, of 16 values.
  if (x.dv != nullptr) {
    float dv[2][4] = {};
    uint32_t m[4], of[4];
    load_matrices_transposed(pairs(kMqk) + narrow(second_row, second_piece), m);
    load_matrices_transposed(dy + wide(first_row, 2 * part + first_piece), of);
    multiply_add_both(dv, m, of);
    load_matrices_transposed(pairs(kMak) + narrow(second_row, second_piece), m);
    load_matrices(dx + narrow(16 * part + second_row, second_piece), of);
    multiply_add_both(dv, m, of);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      load_matrices(gradient_after(tile) + wide(16 * part + second_row, 2 * step + second_piece), of);
#pragma unroll
      for (int term = kTerms - 1; term >= 0; --term) {
        load_matrices(operand(tile, kOfK, term) + wide(first_row, 2 * step + first_piece), m);
        multiply_add_both(dv, m, of);
      }
    }
    uint32_t packed[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) packed[n][h] = pack_added(x.dv, n, h, dv[n][2 * h], dv[n][2 * h + 1]);
    __syncwarp();  // in global memory
    store(x.dv, packed);
  }

  // --- The others, of 16 keys: first what comes through the states at the tile's ends.
  float dr[2][4] = {}, da[2][4] = {}, dk[2][4] = {}, db[2][4] = {}, across[2][4] = {};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t s[4], e[4], m[4];
    load_matrices_transposed(state_before(tile) + wide(16 * step + first_row, 2 * part + first_piece), s);
    load_matrices_transposed(gradient_after(tile) + wide(16 * step + first_row, 2 * part + first_piece), e);
    load_matrices(dy + wide(first_row, 2 * step + first_piece), m);
    multiply_add_both(dr, m, s);
    load_matrices_transposed(dx + narrow(16 * step + second_row, second_piece), m);
    multiply_add_both(da, m, s);
    load_matrices(v + wide(first_row, 2 * step + first_piece), m);
    multiply_add_both(dk, m, e);
    load_matrices_transposed(u + narrow(16 * step + second_row, second_piece), m);
    multiply_add_both(db, m, e);
    const uint32_t turned[4] = {s[0], s[2], s[1], s[3]};  // S^T: of its product with E the diagonal is wanted
    multiply_add_both(across, turned, e);
  }
  // Inside the tile.
  float dk_in[2][4] = {}, db_in[2][4] = {};
  float decay[2][2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    load_shared(logs(tile, 0, 16 * part + 8 * n + 2 * quad), decay[n]);
#pragma unroll
    for (int e = 0; e < 2; ++e) decay[n][e] = exp2_approximate(decay[n][e]);
#pragma unroll
    for (int c = 0; c < 4; ++c) dr[n][c] *= decay[n][c & 1], da[n][c] *= decay[n][c & 1];
  }
  auto load_pairs = [&](int which, uint32_t(&m)[kTerms][4]) {
#pragma unroll
    for (int term = 0; term < kTerms; ++term)
      load_matrices(pairs(which + term) + narrow(first_row, first_piece), m[term]);
  };
  auto load_pairs_turned = [&](int which, uint32_t(&m)[kTerms][4]) {
#pragma unroll
    for (int term = 0; term < kTerms; ++term)
      load_matrices_transposed(pairs(which + term) + narrow(second_row, second_piece), m[term]);
  };
  auto load_columns = [&](int which, uint32_t(&m)[kTerms][4]) {
#pragma unroll
    for (int term = 0; term < kTerms; ++term)
      load_matrices_transposed(operand(tile, which, term) + wide(first_row, 2 * part + first_piece), m[term]);
  };
  {
    uint32_t columns[kTerms][4], m[kTerms][4];
    load_columns(kOfK, columns);
    load_pairs(kDmqk, m);
    multiply_add_terms(dr, m, columns);
    load_pairs(kDmak, m);
    multiply_add_terms(da, m, columns);
    load_columns(kOfB, columns);
    load_pairs(kDmqb, m);
    multiply_add_terms(dr, m, columns);
    load_pairs(kDmab, m);
    multiply_add_terms(da, m, columns);
    load_columns(kOfR, columns);
    load_pairs_turned(kDmqk, m);
    multiply_add_terms(dk_in, m, columns);
    load_pairs_turned(kDmqb, m);
    multiply_add_terms(db_in, m, columns);
    load_columns(kOfA, columns);
    load_pairs_turned(kDmak, m);
    multiply_add_terms(dk_in, m, columns);
    load_pairs_turned(kDmab, m);
    multiply_add_terms(db_in, m, columns);
  }

  // --- Of log decay; then all of them on their own scales.
  uint32_t of_r[2][2], of_a[2][2], of_k[2][2], of_b[2][2], of_w[2][2];  // [n][h]
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float dlog[2][2];  // [h][e]
    const uint32_t piece = 2 * part + n;
    {
      float suffix[2][2], own[2][2], after[2] = {0.0f, 0.0f};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float of[4][2];
#pragma unroll
        for (int which = 0; which < 4; ++which) {
          of[which][0] = of[which][1] = 0.0f;
#pragma unroll
          for (int term = kTerms - 1; term >= 0; --term) {
            const uint32_t both = load_shared_word(operand(tile, which, term) + wide(row + 8 * h, piece) + quad * 4);
            of[which][0] += low_half(both), of[which][1] += high_half(both);
          }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = 2 * h + e;
          const float through = of[kOfK][e] * dk[n][c] + of[kOfB][e] * db[n][c];
          own[h][e] = of[kOfA][e] * da[n][c];
          suffix[h][e] = own[h][e] + of[kOfR][e] * dr[n][c] - of[kOfK][e] * dk_in[n][c] - of[kOfB][e] * db_in[n][c] -
                         through;
          after[e] += through;
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int diagonal = 2 * quad + e;
        after[e] += shuffle_xor(after[e], 4);
        after[e] += shuffle_xor(after[e], 8);
        after[e] += shuffle_xor(after[e], 16);
        const float state_part = shuffle_from(across[n][2 * n], diagonal * 4 + (diagonal >> 1));
        const float state_part_odd = shuffle_from(across[n][2 * n + 1], diagonal * 4 + (diagonal >> 1));
        const float whole = decay[n][e] * (e ? state_part_odd : state_part) + after[e];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int distance = 1; distance < 8; distance *= 2) {
            const float next = shuffle_down(suffix[h][e], 4 * distance);
            if (row + distance < 8) suffix[h][e] += next;
          }
        suffix[0][e] += shuffle_from(suffix[1][e], quad);
#pragma unroll
        for (int h = 0; h < 2; ++h) dlog[h][e] = whole + suffix[h][e] - own[h][e];
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float with[2], without[2], raised[2], raised_all[2], q[2];
      load_shared(logs(tile, row + 8 * h, 8 * piece + 2 * quad), with);
      load_shared(logs(tile, row + 8 * h + 1, 8 * piece + 2 * quad), without);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        raised_all[e] = exp2_approximate(-with[e]);
        raised[e] = exp2_approximate(-without[e]);
        q[e] = exp2_approximate(without[e]);
      }
      const int c = 2 * h;
      of_r[n][h] = pack_added(x.dr, n, h, dr[n][c] * raised[0], dr[n][c + 1] * raised[1]);
      of_a[n][h] = pack_bf16(da[n][c] * raised_all[0], da[n][c + 1] * raised_all[1]);
      of_k[n][h] =
          pack_added(x.dk, n, h, (dk[n][c] + dk_in[n][c]) * q[0], (dk[n][c + 1] + dk_in[n][c + 1]) * q[1]);
      of_b[n][h] = pack_bf16((db[n][c] + db_in[n][c]) * q[0], (db[n][c + 1] + db_in[n][c + 1]) * q[1]);
      if (x.dw_raw != nullptr && first_token + 8 * h < count) {
        const uint32_t both = static_cast<const uint32_t*>(x.w_raw)[words[h] + 4 * n + quad];
        float dw[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float w = kLog2E * (e ? high_half(both) : low_half(both));
          // Both factors by themselves: 1 - sigmoid(w_raw) would be zero from w_raw = 17 on.
          dw[e] = dlog[h][e] * kStrongestLogDecay * reciprocal_approximate(1.0f + exp2_approximate(-w)) *
                  reciprocal_approximate(1.0f + exp2_approximate(w));
        }
        of_w[n][h] = pack_bf16(dw[0], dw[1]);
      }
    }
  }
  __syncwarp();  // in global memory
  if (x.dr != nullptr) store(x.dr, of_r);
  if (x.da != nullptr) store(x.da, of_a);
  if (x.dk != nullptr) store(x.dk, of_k);
  if (x.db != nullptr) store(x.db, of_b);
  if (x.dw_raw != nullptr) store(x.dw_raw, of_w);
}

}  // namespace wkv7
