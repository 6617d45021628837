#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

struct SampleSettings {
  float guidance;
  int64_t top_k;  // from 1 to num_codes
  double top_p;   // 1 keeps every code
  float temperature;
  int64_t num;
};

// The definition is emu3_kernels/ops/sampling/reference.py.
struct SampleGuided {
  // Writes `num` codes of one row of logits [num_codes]; uncond may be null. `scratch` has
  // sample_guided_scratch(num_codes) words.
  void (*row)(Dtype dtype, const void* cond, const void* uncond, int64_t num_codes, uint64_t seed,
              int64_t place, SampleSettings settings, int32_t* scratch, int64_t* codes);
};

// Three arrays in whole vectors of 16 words, and one more that a packed store may overwrite.
inline int64_t sample_guided_stride(int64_t num_codes) { return (num_codes + 15) / 16 * 16 + 16; }
inline int64_t sample_guided_scratch(int64_t num_codes) {
  return 3 * sample_guided_stride(num_codes);
}

EMU3_KERNELS(SampleGuided, sample_guided)

}  // namespace emu3
