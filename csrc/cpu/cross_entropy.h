#pragma once

#include <stdint.h>

#include "dtype.h"
#include "levels.h"

namespace emu3 {

// Of the softmax: lse = highest + ln 2 * log2_sum, kept apart because highest may be huge.
struct Denominator {
  float highest, log2_sum;
};

struct TokenLoss {
  float loss;
  Denominator denominator;
};

struct LossSettings {
  float z_loss, label_smoothing;
};

// One row of logits, unit stride; the target is a class.
struct CrossEntropy {
  TokenLoss (*forward)(Dtype dtype, const void* logits, int64_t classes, int64_t target,
                       LossSettings settings);
  // dlogits may be logits.
  void (*backward)(Dtype dtype, const void* logits, void* dlogits, int64_t classes, int64_t target,
                   Denominator denominator, float dloss, LossSettings settings, bool past_caches);
};

EMU3_KERNELS(CrossEntropy, cross_entropy)

}  // namespace emu3
