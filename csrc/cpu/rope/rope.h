#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// The heads of a tensor [B, T, heads, K]: strides count elements, K has unit stride.
struct Heads {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// Heads to rotate and where to write them, which may be in place.
struct Rotated {
  Heads from, to;
  int64_t heads;
  bool past_caches;
};

// Positions or slots [B, T].
struct Indices {
  const int64_t* data;  // null: 0 … T - 1 in every sequence
  int64_t batch_stride, token_stride;
};

struct RopeCall {
  Dtype dtype;
  bool inverse;
  int64_t tokens, head_dim;  // of one sequence; of one head
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
  Indices positions, slots;  // of q and k in the tables; of k and v in the caches
  Rotated q, k, v;           // v, if it has heads, is copied
};

// Tokens [begin, end), counted through all sequences.
struct Rope {
  void (*rotate)(const RopeCall& call, int64_t begin, int64_t end);
};

EMU3_KERNELS(Rope, rope)

}  // namespace emu3
