#pragma once

#include <stdint.h>

#include "dtype.h"
#include "levels.h"

namespace emu3 {

// The heads of q or of k. Strides count elements; the width has unit stride.
struct Heads {
  const void* from;
  void* to;
  int64_t heads, batch_stride, token_stride, head_stride;  // of `from`; `to` is contiguous
};

struct RopeCall {
  Dtype dtype;
  bool inverse, past_caches;
  int64_t tokens, width;  // of one sequence; of one head
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
  const int64_t* positions;  // null: 0 … tokens - 1
  int64_t positions_batch_stride, positions_token_stride;
  Heads q, k;
};

// Tokens [begin, end) of all sequences laid end to end.
struct Rope {
  void (*rotate)(const RopeCall& call, int64_t begin, int64_t end);
};

EMU3_KERNELS(Rope, rope)

}  // namespace emu3
