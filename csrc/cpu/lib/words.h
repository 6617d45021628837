// Traits of dot operands. A GEMM reads both operands as 32-bit words, so that one kernel serves
// both dtypes: a word is one float or, where the processor has a bfloat16 dot product, two bfloat16
// that are neighbours along K. Include only in files that are compiled once per level, as simd.h.
#pragma once

#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {

inline BitVec load_words(const uint32_t* from) {
  BitVec x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline void store_words(uint32_t* to, BitVec x) { __builtin_memcpy(to, &x, sizeof x); }

// A row-major view; `stride` is the distance between two rows.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;

  Matrix at(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};
typedef Matrix<const uint32_t> Operand;
typedef Matrix<float> Accumulator;

struct FloatDot {
  static constexpr int64_t kPerWord = 1;  // elements of K in a word

  static Vec dot(BitVec a, BitVec b, Vec sum) { return fma((Vec)a, (Vec)b, sum); }

  // x.a and x.b are neighbours along K, which runs down the rows of `to`.
  static void store_column(uint32_t* to, int64_t stride, Pair x) {
    store_words(to, (BitVec)x.a);
    store_words(to + stride, (BitVec)x.b);
  }

  // x.a goes to row a and x.b to row b; K runs along the rows.
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
struct DotOf {
  typedef FloatDot type;
};

#if defined(__AVX512BF16__)
// VDPBF16PS: inputs and results below 2^-126 are flushed to zero, and every addition is rounded.
struct Bfloat16PairDot {
  static constexpr int64_t kPerWord = 2;

  static Vec dot(BitVec a, BitVec b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static void store_column(uint32_t* to, int64_t, Pair x) { store_words(to, to_bfloat16_pair(x)); }

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
struct DotOf<bfloat16> {
  typedef Bfloat16PairDot type;
};
#endif

}  // namespace emu3::EMU3_LEVEL
