// How a call drops elements: see emu3_kernels/_dropout.py, and philox.h for the words.
#pragma once

#include <stdint.h>

namespace emu3 {

struct Dropout {
  uint64_t seed;
  uint32_t drop_below;  // the smallest word of a kept element; 0: none is dropped
  float scale;          // of the kept elements
};

}  // namespace emu3
