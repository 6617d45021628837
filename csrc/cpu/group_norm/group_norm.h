#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Pixels are rows of `channels` elements without gaps. Arrays of floats or doubles by channel are
// padded_channels() long, zero past the last channel, in an order that only the kernels know.
struct GroupNorm {
  // Two arrays: the mean of each channel over `rows` pixels and the sum of squared deviations.
  void (*moments)(Dtype dtype, const void* x, int64_t rows, int64_t channels, float* moments);
  // Mean and 1 / sqrt(variance + eps) of each group, from the moments of chunks of `chunk_rows`
  // pixels, of which the last may have fewer; `scratch` has room for two arrays.
  void (*statistics)(Dtype dtype, const float* moments, int64_t chunk_rows, int64_t rows,
                     int64_t channels, int64_t groups, double eps, double* scratch, float* mean,
                     float* rstd);
  // Three arrays, mean, rstd * weight and bias, which make the norm (x - mean) * scale + shift.
  void (*affine)(Dtype dtype, const float* mean, const float* rstd, const void* weight,
                 const void* bias, int64_t channels, int64_t groups, float* affine);
  void (*apply)(Dtype dtype, const void* x, void* y, int64_t rows, int64_t channels,
                const float* affine, bool silu, bool past_caches);
  // Two arrays: over these pixels, the sums of d and of d * (x - mean), d being the gradient of
  // what SiLU is applied to.
  void (*sums)(Dtype dtype, const void* dy, const void* x, int64_t rows, int64_t channels,
               const float* affine, bool silu, float* sums);
  // Two arrays, what the statistics give back to the gradient of x, from the sums of an image; the
  // second sum, multiplied by rstd, becomes the gradient of the weight.
  void (*slopes)(Dtype dtype, double* sums, const float* rstd, const void* weight, int64_t rows,
                 int64_t channels, int64_t groups, float* slopes);
  void (*backward)(Dtype dtype, const void* dy, const void* x, void* dx, int64_t rows,
                   int64_t channels, const float* affine, const float* slopes, bool silu,
                   bool past_caches);
  // out[c * stride] = sums[c], in the order of memory.
  void (*write)(Dtype dtype, const double* sums, void* out, int64_t channels, int64_t stride);
};

// Room for whole vectors of every level.
inline int64_t padded_channels(int64_t channels) { return (channels + 31) / 32 * 32; }

EMU3_KERNELS(GroupNorm, group_norm)

}  // namespace emu3
