// Philox 4x32-10, and the random words of dropout, a pair of vectors at a time, as
// emu3_kernels/runtime/dropout.py defines them. One counter gives four words, those of the columns
// 4 i … 4 i + 3 of a row of a head.
#pragma once

#include "cpu/lib/dropout.h"
#include "cpu/lib/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace emu3::EMU3_LEVEL {

// 64-bit lanes with a word each in the lower half; the upper half is ignored.
typedef uint64_t WideVec __attribute__((vector_size(4 * kLanes)));

struct BitPair {
  BitVec a, b;
};

inline WideVec splat(uint64_t x) { return x - WideVec{}; }

// Returns the 64-bit products of the lower halves and `factor`.
inline WideVec multiply(WideVec x, uint32_t factor) {
#if defined(__AVX512F__)
  return (WideVec)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (WideVec)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (WideVec)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
  return (x & 0xffffffff) * factor;
#endif
}

// x0 y0 x1 y1 …
inline BitPair interleave(WideVec x, WideVec y) {
#if defined(__AVX512F__)
  const __m512i lower = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i upper = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  return {(BitVec)_mm512_permutex2var_epi64((__m512i)x, lower, (__m512i)y),
          (BitVec)_mm512_permutex2var_epi64((__m512i)x, upper, (__m512i)y)};
#else
  uint64_t both[kLanes];
  for (int i = 0; i < kLanes / 2; ++i) both[2 * i] = x[i], both[2 * i + 1] = y[i];
  BitPair pair;
  __builtin_memcpy(&pair, both, sizeof pair);
  return pair;
#endif
}

// The four words of each counter, in the lower halves.
struct Words {
  WideVec a, b, c, d;
};

constexpr uint64_t kLowerWord = 0xffffffff;

// Encrypts the lower halves of a, b, c and d in ten rounds.
inline Words philox(uint64_t key, WideVec a, WideVec b, WideVec c, WideVec d) {
  for (uint32_t round = 0; round < 10; ++round) {
    const WideVec x = multiply(a, 0xd2511f53), y = multiply(c, 0xcd9e8d57);
    a = (y >> 32) ^ b ^ splat((uint64_t)((uint32_t)key + round * 0x9e3779b9));
    c = (x >> 32) ^ d ^ splat((uint64_t)((uint32_t)(key >> 32) + round * 0xbb67ae85));
    b = y, d = x;
  }
  return {a, b, c, d};
}

// Returns the words of the columns [column, column + kPair) in the order of load_pair(const T*).
// `column` must be a multiple of 4.
template <typename T>
inline BitPair dropout_words(uint64_t seed, int64_t head, int64_t row, int64_t column) {
  static constexpr uint64_t kLane[] = {0, 1, 2, 3, 4, 5, 6, 7};
  WideVec group;
  __builtin_memcpy(&group, kLane, sizeof group);
  group += splat((uint64_t)column / 4);
  const auto [a, b, c, d] =
      philox(seed, group, splat((uint64_t)row), splat((uint64_t)head), WideVec{});
  if constexpr (sizeof(T) == sizeof(float)) {
    return interleave((a & kLowerWord) | b << 32, (c & kLowerWord) | d << 32);
  } else {
    return {(BitVec)((a & kLowerWord) | c << 32), (BitVec)((b & kLowerWord) | d << 32)};
  }
}

// Drops x: x * scale where it is kept, 0 where it is dropped. Arguments as of dropout_words().
template <typename T>
inline Pair drop(Pair x, const Dropout& dropout, int64_t head, int64_t row, int64_t column) {
  const BitPair words = dropout_words<T>(dropout.seed, head, row, column);
  return {words.a >= dropout.drop_below ? x.a * dropout.scale : Vec{},
          words.b >= dropout.drop_below ? x.b * dropout.scale : Vec{}};
}

}  // namespace emu3::EMU3_LEVEL
