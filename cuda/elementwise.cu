// Fused element-wise kernels of a layer, forward and backward.
//
// They are bound by memory: each tensor is read once and written once in 16-byte vectors, parameters ([channels] rows)
// stay in registers over a tile of tokens. Sums have a fixed order and there are no atomics, so results are
// reproducible bit for bit.
//
// A thread owns 8 neighbouring channels ("a vector") of a tile of consecutive rows, also where a warp computes products
// for them; norms and logits, whose sums run along a row, have a block for each row.

#include "elementwise.h"
#include "elementwise_activations.cuh"
#include "elementwise_add_norm.cuh"
#include "elementwise_group_norm_gate.cuh"
#include "elementwise_logits.cuh"
#include "elementwise_modulated_shift_mix.cuh"
#include "elementwise_shift_mix.cuh"
