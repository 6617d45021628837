// Parameters of dropout, as emu3_kernels/runtime/dropout.py defines it; philox.h computes the
// words.
#pragma once

#include <stdint.h>

namespace emu3 {

struct Dropout {
  uint64_t seed;
  uint32_t drop_below;  // an element is dropped if its word is less; 0: no dropout
  float scale;          // of kept elements
  const int64_t* rows;  // the row of the mask of each row; null: its index

  int64_t row_of(int64_t index) const { return rows ? rows[index] : index; }
};

}  // namespace emu3
