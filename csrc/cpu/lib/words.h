// What products are taken of, for float and bfloat16 alike: words of 32 bits, one float or, where
// the processor multiplies pairs, two bfloat16 that are neighbours in what is summed over.
// Included, like simd.h, only by files that are compiled once per level.
#pragma once

#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {

inline BitVec load_words(const uint32_t* from) {
  BitVec x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline void store_words(uint32_t* to, BitVec x) { __builtin_memcpy(to, &x, sizeof x); }

// Rows of words, or of floats.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;

  Matrix at(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};
typedef Matrix<const uint32_t> Words;
typedef Matrix<float> Sums;

struct Singles {
  static constexpr int64_t kPer = 1;  // numbers in a word

  static Vec dot(BitVec a, BitVec b, Vec sum) { return fma((Vec)a, (Vec)b, sum); }

  // x.a and x.b, neighbours in what is summed over, one under the other.
  static void store_column(uint32_t* to, int64_t stride, Pair x) {
    store_words(to, (BitVec)x.a);
    store_words(to + stride, (BitVec)x.b);
  }

  // Rows a and b of kLanes neighbours each.
  static void store_rows(uint32_t* a, uint32_t* b, Pair x) {
    store_words(a, (BitVec)x.a);
    store_words(b, (BitVec)x.b);
  }

  static void store_both(uint32_t* to, int64_t stride, uint32_t* a, uint32_t* b, Pair x) {
    store_column(to, stride, x);
    store_rows(a, b, x);
  }
};

template <typename T>
struct WordsOf {
  typedef Singles type;
};

#if defined(__AVX512BF16__)
// Numbers below 2^-126 count as zero, sums are rounded once a product.
struct Pairs {
  static constexpr int64_t kPer = 2;

  static Vec dot(BitVec a, BitVec b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static void store_column(uint32_t* to, int64_t, Pair x) { store_words(to, narrow_pair(x)); }

  static void store_rows(uint32_t* a, uint32_t* b, Pair x) {
    _mm256_storeu_si256((__m256i*)a, (__m256i)_mm512_cvtneps_pbh(x.a));
    _mm256_storeu_si256((__m256i*)b, (__m256i)_mm512_cvtneps_pbh(x.b));
  }

  static void store_both(uint32_t* to, int64_t stride, uint32_t* a, uint32_t* b, Pair x) {
    store_column(to, stride, x);
    store_rows(a, b, x);
  }
};

template <>
struct WordsOf<bfloat16> {
  typedef Pairs type;
};
#endif

}  // namespace emu3::EMU3_LEVEL
