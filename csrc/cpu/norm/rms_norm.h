#pragma once

#include <stdint.h>

#include "cpu/lib/dropout.h"
#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Rows may be strided, channels have unit stride; strides and widths count elements.
struct RMSNorm {
  // With a residual, `summed` = x + residual is rounded and then normed in place of x. With
  // dropout, x is dropped before the addition; `first_row` is the index of the first of these rows.
  void (*forward)(Dtype dtype, const void* x, const void* residual, const void* weight, void* y,
                  void* summed, float* rstd, int64_t rows, int64_t width, int64_t x_stride,
                  int64_t residual_stride, float eps, const Dropout* dropout, int64_t first_row,
                  bool past_caches);
  // dsummed is added to dx if it is not null. With dropout this sum is dresidual, and dx is
  // dresidual dropped. `dweight`, padded_width(width) floats, is overwritten with the sum over
  // these rows, in the order of channels that reduce() reads.
  void (*backward)(Dtype dtype, const void* dy, const void* dsummed, const void* x,
                   const void* weight, const float* rstd, void* dx, void* dresidual, float* dweight,
                   int64_t rows, int64_t width, int64_t dy_stride, int64_t dsummed_stride,
                   int64_t x_stride, const Dropout* dropout, int64_t first_row, bool past_caches);
  void (*reduce)(Dtype dtype, const float* partial, void* dweight, int64_t partials, int64_t width);
};

// Room for whole vectors of every level.
inline int64_t padded_width(int64_t width) { return (width + 31) / 32 * 32; }

EMU3_KERNELS(RMSNorm, rms_norm)

}  // namespace emu3
