// Gumbel noise of codes: -log(-log1p(-(word + 1/2) / 2^32)) of the Philox words with the counter
// (code / 4, place, 0, 1). Include only in files that are compiled once per level, as simd.h.
#pragma once

#include "cpu/lib/philox.h"

namespace emu3::EMU3_LEVEL {

// Returns the natural logarithm of a positive normal number within two units in the last place,
// near 1 too.
inline Vec log(Vec x) {
  constexpr uint32_t kRootOfHalf = 0x3f3504f3;
  const BitVec bits = (BitVec)x - kRootOfHalf;
  const Vec exponent = __builtin_convertvector((IntVec)bits >> 23, Vec);
  const Vec f = (Vec)((bits & 0x007fffff) + kRootOfHalf) - 1.0f;
  // Cephes: (log(1 + f) - f + f^2 / 2) / f^3 for 1 + f from sqrt(1/2) to sqrt(2).
  Vec p = splat(7.0376836292e-2f);
  p = fma(p, f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  const Vec square = f * f;
  // ln 2 in two parts, the first exact in a product with an exponent.
  Vec low = fma(exponent, splat(-2.12194440e-4f), p * square * f);
  low = fma(square, splat(-0.5f), low);
  return fma(exponent, splat(0.693359375f), f + low);
}

// Returns word `id % 4` of the counter (id / 4, place, 0, 1) for each id, none negative.
inline BitVec words_of(uint64_t seed, int64_t place, IntVec id) {
  const WideVec group = (WideVec)(id >> 2), place_of_all = splat((uint64_t)place);
  // Two ids share a lane of 64 bits: the even ones, then the odd ones.
  const Words even = philox(seed, group, place_of_all, WideVec{}, splat(uint64_t{1}));
  const Words odd = philox(seed, group >> 32, place_of_all, WideVec{}, splat(uint64_t{1}));
  const auto both = [](WideVec x, WideVec y) { return (BitVec)((x & kLowerWord) | y << 32); };
  const IntVec word = id & 3;
  const BitVec first = word == 0 ? both(even.a, odd.a) : both(even.b, odd.b);
  const BitVec second = word == 2 ? both(even.c, odd.c) : both(even.d, odd.d);
  return word < 2 ? first : second;
}

// The product of log(1 - u) and u / (1 - (1 - u)) is log1p(-u) without the rounding of 1 - u.
inline Vec gumbel_of(BitVec word) {
  const Vec uniform = (__builtin_convertvector(word, Vec) + 0.5f) * 0x1p-32f;
  const Vec rest = 1.0f - uniform;
  const Vec exponential = rest == 1.0f ? uniform : -log(rest) * (uniform / (1.0f - rest));
  return rest > 0.0f ? -log(exponential) : splat(-__builtin_inff());
}

}  // namespace emu3::EMU3_LEVEL
