// Arguments of the WKV6 kernels. Every pointer is device memory, 16-byte aligned.
//
// Shapes: B batch, T tokens, H heads, S sequences (B for a dense batch). Head size 64. States are [value, key].
#ifndef WKV6_H
#define WKV6_H

#include "types.cuh"

constexpr int kWkv6HeadSize = 64;
constexpr int kWkv6TileTokens = 16;
constexpr int kWkv6ChunkTokens = 64;  // a state checkpoint stands at the start of each chunk

// How the tokens divide into sequences, and the sequences into spans that different blocks work on.
struct Wkv6Layout {
  int heads;
  int sequences;
  int tokens;              // of one sequence; with borders: of all
  const int32_t* borders;  // [S + 1] for packed sequences, else null
  int span_tokens;         // a multiple of kWkv6ChunkTokens
  int items;               // spans of all sequences; with borders an upper bound
};

struct Wkv6Forward {
  Wkv6Layout layout;
  const void *r, *k, *v, *w_raw;  // bf16 [B, T, H, 64]
  const void* u;                  // bf16 or float [H, 64]
  bool u_is_bf16;
  const float* state;  // [H, 64, 64] or [S, H, 64, 64]
  bool state_is_shared;
  const int64_t* parents;  // [S]: which of `state` each sequence starts from; null: its own
  void* y;                 // bf16 [B, T, H, 64]
  float* final_state;      // [S, H, 64, 64]
  void* checkpoints;       // bf16 [chunks, H, 64, 64] in the kernel's own order, or null when no backward follows
  void* pair_weights;      // bf16 [chunks, H, 4, 16, 16], likewise
  float* span_states;      // [items, H, 64, 64] and
  float* span_decays;      // [items, H, 64]: scratch, only for more than one span per sequence
};

struct Wkv6Backward {
  Wkv6Layout layout;
  const void *r, *k, *v, *w_raw, *dy;
  const void* u;
  bool u_is_bf16;
  const void* checkpoints;
  const void* pair_weights;
  const float* dfinal_state;    // [S, H, 64, 64] or null
  void *dr, *dk, *dv, *dw_raw;  // bf16 [B, T, H, 64]; all null when only the state's gradient is wanted
  float* du;                    // [items, H, 64], to be summed over items, or null
  float* dstate;                // [S, H, 64, 64] or null
  float* span_states;           // as above
  float* span_decays;
};

#endif
