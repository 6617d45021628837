// SiLU, x / (1 + e^-x), and its derivative.
// Include only in files that are compiled once per level, as simd.h.
#pragma once

#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {

// SiLU of x < -kLowest is computed as SiLU(-kLowest) = -1e-36, which bounds the exponent.
constexpr float kLowest = 87;
inline Vec above_lowest(Vec x) { return max(splat(-kLowest), x); }

// Returns 1 + e^-x with a relative error of at most 2e-6; x < -87 is taken as -87, so it is finite.
inline Vec one_plus_exp_minus(Vec x) {
#if defined(__AVX2__)
  // e^-x = 2^n * 2^(i/k) * 2^g with |g| <= 1/2k and k = kLanes: a register lookup of 2^(i/k) saves
  // half the polynomial. Adding kShift rounds -x / ln 2 to a multiple of 1/k and leaves k n + i in
  // the lowest bits. The shift by 23 - kBits also adds i to the mantissa, so kPowers subtracts it.
  constexpr float kShift = 12582912.0f / kLanes, kPerUnit = -1.44269504f;  // 1.5 * 2^23, -1 / ln 2
#if defined(__AVX512F__)
  alignas(64) static constexpr uint32_t kPowers[16] = {
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
      0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
      0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  constexpr int kBits = 4, kLeastMagnitude = 2;  // with the sign of the first
  const Vec bounded = _mm512_range_ps(x, splat(kLowest), kLeastMagnitude);
#else
  alignas(32) static constexpr uint32_t kPowers[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0,
                                                      0x3f75fed7, 0x3f7504f3, 0x3f75672a,
                                                      0x3f7744fd, 0x3f7ac0c7};
  constexpr int kBits = 3;
  const Vec bounded = min(splat(kLowest), above_lowest(x));
#endif
  const Vec shifted = fma(bounded, splat(kPerUnit), splat(kShift));
  const Vec g = fma(bounded, splat(kPerUnit), splat(kShift) - shifted);
#if defined(__AVX512F__)
  const Vec p = fma(g, splat(0.240228221f), splat(0.693187773f));  // minimax, 4.3e-7
  const BitVec power =
      (BitVec)_mm512_permutexvar_epi32((__m512i)shifted, _mm512_load_si512(kPowers));
#else
  const Vec q = fma(g, splat(0.0554975161f), splat(0.24026408f));  // minimax, 3.7e-8
  const Vec p = fma(g, q, splat(0.693147227f));
  const BitVec power = (BitVec)_mm256_permutevar8x32_epi32(
      _mm256_load_si256((const __m256i*)kPowers), (__m256i)shifted);
#endif
  return fma((Vec)(power + ((BitVec)shifted << (23 - kBits))), fma(g, p, splat(1)), splat(1));
#else
  return exp2(min(splat(126), x * -1.44269504f)) + 1.0f;
#endif
}

inline Vec sigmoid(Vec x) { return 1.0f / one_plus_exp_minus(x); }

inline Vec silu(Vec x) { return above_lowest(x) / one_plus_exp_minus(x); }
inline Pair silu(Pair x) { return {silu(x.a), silu(x.b)}; }

inline Vec silu_gradient(Vec x) {
  const Vec s = sigmoid(x);
  return s * fma(above_lowest(x), 1.0f - s, splat(1));
}
inline Pair silu_gradient(Pair x) { return {silu_gradient(x.a), silu_gradient(x.b)}; }

}  // namespace emu3::EMU3_LEVEL
