// The k-th largest of a row, and the smallest set of largest ones with a given softmax mass: radix
// select on keys, integers in the order of the logits. Include only in files that are compiled once
// per level, as simd.h.
#pragma once

#include "cpu/lib/lanes16.h"

namespace emu3::EMU3_LEVEL {

constexpr int32_t kNaN = 0x7fffffff;    // the key of a NaN, the largest
constexpr int32_t kAbsent = -kNaN - 1;  // below the key of every float

// -0 and 0 have one key.
inline IntVec key_of(Vec x) {
  const IntVec bits = (IntVec)(x + 0.0f);
  const IntVec key = bits ^ ((bits >> 31) & kNaN);
  return x == x ? key : kNaN - IntVec{};
}

inline Vec float_of(IntVec key) { return (Vec)(key ^ ((key >> 31) & kNaN)); }

inline float float_of(int32_t key) { return __builtin_bit_cast(float, key ^ ((key >> 31) & kNaN)); }

// What is kept: every key above `key` and the first `ties` that equal it.
struct Threshold {
  int32_t key;
  uint64_t ties;
};

// Returns the highest key at which `enough(sum of the weights of all keys from it on)` holds, and
// how many that equal it are needed. weights(from, w) writes the weights of 16 keys. Integer sums
// are exact in any order, so that every pass decides alike. `packed` may be overwritten.
template <typename Weights, typename Enough>
Threshold radix_select(const int32_t* keys, int64_t count, int32_t* packed, Weights weights,
                       Enough enough) {
  constexpr int kShifts[] = {21, 10, 0};
  constexpr uint32_t kSign = 0x80000000;
  uint64_t above = 0;
  uint32_t chosen = 0;
  uint64_t sums[2048];
  for (const int shift : kShifts) {
    for (uint64_t& sum : sums) sum = 0;
    const uint32_t mask = shift ? 2047 : 1023;
    uint64_t weight[16];
    for (int64_t i = 0; i < count; i += 16) {
      weights(keys + i, weight);
      const int n = count - i < 16 ? static_cast<int>(count - i) : 16;
      for (int j = 0; j < n; ++j)
        sums[((uint32_t)keys[i + j] ^ kSign) >> shift & mask] += weight[j];
    }
    uint32_t digit = mask;
    while (digit && !enough(above + sums[digit])) above += sums[digit--];
    chosen |= digit << shift;
    if (!shift) break;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += 16) {
      const Ints x = load16(keys + i);
      Ints top;
      for (int p = 0; p < kParts; ++p) top.part[p] = (IntVec)(((BitVec)x.part[p] ^ kSign) >> shift);
      unsigned same = equal(top, splat16((int32_t)(chosen >> shift)));
      if (count - i < 16) same &= (1u << (count - i)) - 1;
      kept += store_packed(packed + kept, x, same);
    }
    keys = packed, count = kept;
  }
  const int32_t key = (int32_t)(chosen ^ kSign);
  uint64_t weight[16];
  alignas(64) int32_t alike[16];
  store16(alike, splat16(key));
  weights(alike, weight);
  uint64_t too_few = 0;
  for (uint64_t bit = 1 << 22; bit; bit >>= 1)
    if (!enough(above + (too_few + bit) * weight[0])) too_few += bit;
  return {key, too_few + 1};
}

// Moves the kept keys and ids to the front, in their order, and returns their number.
inline int64_t keep(int32_t* keys, int32_t* ids, int64_t count, Threshold threshold) {
  const Ints at = splat16(threshold.key);
  uint64_t ties = threshold.ties;
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const Ints key = load16(keys + i), id = load16(ids + i);
    unsigned tied = equal(key, at), inside = less(at, key);
    if (count - i < 16) {
      const unsigned first = (1u << (count - i)) - 1;
      tied &= first, inside &= first;
    }
    while ((uint64_t)__builtin_popcount(tied) > ties) tied &= ~(1u << (31 - __builtin_clz(tied)));
    ties -= __builtin_popcount(tied);
    store_packed(keys + kept, key, inside | tied);
    kept += store_packed(ids + kept, id, inside | tied);
  }
  return kept;
}

}  // namespace emu3::EMU3_LEVEL
