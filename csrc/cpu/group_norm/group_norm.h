#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Pixels are contiguous rows of `channels` elements. An array has padded_channels() floats or
// doubles, one per channel in the order of load_pair() and zero past the last channel.
struct GroupNorm {
  // Writes two arrays: the mean of each channel over `rows` pixels and its sum of squared
  // deviations.
  void (*moments)(Dtype dtype, const void* x, int64_t rows, int64_t channels, float* moments);
  // Writes mean and 1 / sqrt(variance + eps) of each group, from the moments of chunks of
  // `chunk_rows` pixels (the last may have fewer); `scratch` has room for two arrays.
  void (*statistics)(Dtype dtype, const float* moments, int64_t chunk_rows, int64_t rows,
                     int64_t channels, int64_t groups, double eps, double* scratch, float* mean,
                     float* rstd);
  // Writes three arrays: mean, scale = rstd * weight and shift = bias. The norm is
  // (x - mean) * scale + shift.
  void (*affine)(Dtype dtype, const float* mean, const float* rstd, const void* weight,
                 const void* bias, int64_t channels, int64_t groups, float* affine);
  void (*apply)(Dtype dtype, const void* x, void* y, int64_t rows, int64_t channels,
                const float* affine, bool silu, bool past_caches);
  // Writes two arrays: the sums over these pixels of d and of d * (x - mean), where d is the
  // gradient of the input of SiLU.
  void (*sums)(Dtype dtype, const void* dy, const void* x, int64_t rows, int64_t channels,
               const float* affine, bool silu, float* sums);
  // Writes two arrays from the sums of an image: the terms of dx that come from mean and rstd.
  // Multiplies the second sum by rstd, which makes it the gradient of the weight.
  void (*stat_grads)(Dtype dtype, double* sums, const float* rstd, const void* weight, int64_t rows,
                     int64_t channels, int64_t groups, float* stat_grads);
  void (*backward)(Dtype dtype, const void* dy, const void* x, void* dx, int64_t rows,
                   int64_t channels, const float* affine, const float* stat_grads, bool silu,
                   bool past_caches);
  // out[c * stride] = sums[c] for every channel c.
  void (*write)(Dtype dtype, const double* sums, void* out, int64_t channels, int64_t stride);
};

// A multiple of the vectors of every level.
inline int64_t padded_channels(int64_t channels) { return (channels + 31) / 32 * 32; }

EMU3_KERNELS(GroupNorm, group_norm)

}  // namespace emu3
