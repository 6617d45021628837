#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Lines of pixels that are upsampled from one row of the latent: pixels [starts[p], starts[p + 1])
// of a line from position p. `affine` and arrays are those of group_norm.h.
struct Strip {
  int64_t lines, line_pixels, channels, positions, width;
  const int64_t* starts;
  const void* latent;   // [positions, width]
  const float* affine;  // mean, scale, shift
  const float* tables;  // of tables() below
  float* scratch;       // strip_scratch() floats
};

struct SpatialNorm {
  // Writes 2 * (width + 1) arrays: the columns of y_weight, y_bias, the columns of b_weight,
  // b_bias.
  void (*tables)(Dtype dtype, const void* y_weight, const void* y_bias, const void* b_weight,
                 const void* b_bias, int64_t channels, int64_t width, float* tables);
  void (*apply)(Dtype dtype, const Strip& strip, const void* x, void* y, bool silu,
                bool past_caches);
  // Adds to `sums`, 4 + 2 * width arrays: the sums over pixels of n and of n * (x - mean), where n
  // is the gradient of the output of the group norm; then the gradients of y_bias, of b_bias and of
  // the columns of y_weight and b_weight. Overwrites `dlatent`.
  void (*sums)(Dtype dtype, const Strip& strip, const void* dy, const void* x, bool silu,
               float* sums, float* dlatent);
  void (*backward)(Dtype dtype, const Strip& strip, const void* dy, const void* x, void* dx,
                   const float* stat_grads, bool silu, bool past_caches);
};

// Floats for the scale, the shift and two sums of a position, for as many positions as fit the L1
// cache.
inline int64_t strip_scratch(int64_t padded) { return 4 * padded > 4096 ? 4 * padded : 4096; }

EMU3_KERNELS(SpatialNorm, spatial_norm)

}  // namespace emu3
