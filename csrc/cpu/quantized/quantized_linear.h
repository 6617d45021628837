#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Codes of int4 come in blocks of 32 inputs: byte i of 16 holds input i in its lower half and input
// 16 + i in its upper half, both plus 8.
struct QuantizedWeight {
  int64_t K, N;
  const void* codes;   // [N, K] int8, or [N, K / 2] bytes with two codes each
  const void* scales;  // [N] float32, or [N, K / group] bfloat16
  int64_t group;       // inputs that share a scale: 32, 64 or 128; 0: int8
};

// Columns between two reads of x.
constexpr int64_t kColumnBlock = 32;

// Rows of x that are computed at once, of those that are left: their packed vectors alternate.
inline int64_t rows_at_once(int64_t left) {
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// The definition is emu3_kernels/ops/quantized/reference.py.
struct QuantizedLinear {
  // The floats of one packed row.
  int64_t (*packed_width)(const QuantizedWeight& w);
  // Converts row `row` of `rows` rows that are computed at once, x [K], to float32 in the order in
  // which `columns` reads it.
  void (*pack)(const QuantizedWeight& w, Dtype dtype, const void* x, int64_t row, int64_t rows,
               float* packed);
  // Columns [begin, end) of y [rows, N], from packed rows.
  void (*columns)(const QuantizedWeight& w, Dtype dtype, const float* packed, int64_t rows,
                  int64_t begin, int64_t end, void* y);
  // Rows [begin, end) of the weight, as [N, K] in `dtype`.
  void (*dequantize)(const QuantizedWeight& w, Dtype dtype, int64_t begin, int64_t end, void* to);
};

EMU3_KERNELS(QuantizedLinear, quantized_linear)

}  // namespace emu3
