#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Lines of pixels that all show one row of the latent: place p at pixels starts[p] to starts[p +
// 1]. `affine` is that of the image in group_norm.h; arrays by channel are as there.
struct Strip {
  int64_t lines, line_pixels, channels, places, width;
  const int64_t* starts;
  const void* latent;   // [places, width]
  const float* affine;  // mean, scale, shift
  const float* tables;  // of tables() below
  float* scratch;       // strip_scratch() floats
};

struct SpatialNorm {
  // Twice width + 1 arrays: the columns of y_weight and y_bias, those of b_weight and b_bias.
  void (*tables)(Dtype dtype, const void* y_weight, const void* y_bias, const void* b_weight,
                 const void* b_bias, int64_t channels, int64_t width, float* tables);
  void (*apply)(Dtype dtype, const Strip& strip, const void* x, void* y, bool silu,
                bool past_caches);
  // Adds to `sums`, 4 + 2 * width arrays: with d the gradient of what SiLU is applied to, n that of
  // the group norm, the sums over pixels of n and of n * (x - mean), then the gradients of y_bias,
  // b_bias and of the columns of y_weight and b_weight. `dlatent` is overwritten.
  void (*sums)(Dtype dtype, const Strip& strip, const void* dy, const void* x, bool silu,
               float* sums, float* dlatent);
  void (*backward)(Dtype dtype, const Strip& strip, const void* dy, const void* x, void* dx,
                   const float* slopes, bool silu, bool past_caches);
};

// Room for the scale, the shift and two sums of a place, and of as many as the L1 cache holds.
inline int64_t strip_scratch(int64_t padded) { return 4 * padded > 4096 ? 4 * padded : 4096; }

EMU3_KERNELS(SpatialNorm, spatial_norm)

}  // namespace emu3
