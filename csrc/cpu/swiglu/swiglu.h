#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Rows may be strided, channels have unit stride; strides and widths count elements.
struct SwiGLU {
  void (*forward)(Dtype dtype, const void* gate, const void* up, void* out, int64_t rows,
                  int64_t width, int64_t gate_stride, int64_t up_stride, bool past_caches);
  void (*backward)(Dtype dtype, const void* dout, const void* gate, const void* up, void* dgate,
                   void* dup, int64_t rows, int64_t width, int64_t dout_stride, int64_t gate_stride,
                   int64_t up_stride, int64_t grad_stride, bool past_caches);
};

EMU3_KERNELS(SwiGLU, swiglu)

}  // namespace emu3
