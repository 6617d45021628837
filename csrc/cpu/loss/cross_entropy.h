#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// What the classes seen so far add up to: sum = Σ e^(x - highest), total = Σ x (for smoothing
// alone).
struct Sums {
  double highest = -__FLT_MAX__;  // finite, so that a block of -infinity leaves no NaN
  double sum = 0, total = 0, target = 0;
};

// Of the softmax: lse = highest + ln 2 * log2_sum, kept apart because highest may be huge.
struct Denominator {
  float highest, log2_sum;
};

struct LossSettings {
  float z_loss, label_smoothing;
  int64_t num_classes;  // of the vocabulary, of which a row may hold a part
};

// A row holds consecutive classes with unit stride. `target` counts from its first one; outside the
// row it belongs to another part.
struct CrossEntropy {
  void (*add)(Dtype dtype, const void* logits, int64_t classes, int64_t target,
              LossSettings settings, Sums* sums);
  // dlogits may be logits.
  void (*backward)(Dtype dtype, const void* logits, void* dlogits, int64_t classes, int64_t target,
                   Denominator denominator, float dloss, LossSettings settings, bool past_caches);
};

EMU3_KERNELS(CrossEntropy, cross_entropy)

}  // namespace emu3
