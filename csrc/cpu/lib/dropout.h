// Parameters of dropout, as emu3_kernels/runtime/dropout.py defines it; philox.h computes the
// words.
#pragma once

#include <stdint.h>

namespace emu3 {

struct Dropout {
  uint64_t seed;
  uint32_t drop_below;  // an element is dropped if its word is less; 0: no dropout
  float scale;          // of kept elements
};

}  // namespace emu3
