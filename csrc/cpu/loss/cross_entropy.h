#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Sums over the classes so far: m = max x, l = Σ e^(x - m), sum = Σ x (with label smoothing only).
struct PartialSums {
  double m = -__FLT_MAX__;  // finite, so that a block of -infinity leaves no NaN
  double l = 0, sum = 0, target = 0;
};

// lse = m + ln 2 * log2_l, in two parts because m may be huge.
struct Denominator {
  float m, log2_l;
};

struct LossSettings {
  float z_loss, label_smoothing;
  int64_t num_classes;  // of the whole vocabulary; a row may be a block of it
};

// A row is a block of consecutive classes with unit stride. `target` counts from the first of them
// and may be outside the block.
struct CrossEntropy {
  void (*add)(Dtype dtype, const void* logits, int64_t classes, int64_t target,
              LossSettings settings, PartialSums* sums);
  // dlogits may be logits.
  void (*backward)(Dtype dtype, const void* logits, void* dlogits, int64_t classes, int64_t target,
                   Denominator denominator, float dloss, LossSettings settings, bool past_caches);
};

EMU3_KERNELS(CrossEntropy, cross_entropy)

}  // namespace emu3
