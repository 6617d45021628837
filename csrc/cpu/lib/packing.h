// Packing for a GEMM: conversion of rows to float32, and transposition.
// Include only in files that are compiled once per level, as simd.h.
#pragma once

#include "cpu/lib/words.h"

namespace emu3::EMU3_LEVEL {

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Converts a row to float32 and pads it with zeros to whole vectors.
template <typename T>
inline void row_to_float(const T* row, int64_t width, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) store(to + c, load(row + c));
  if (c == width) return;
  T rest[kLanes] = {};
  __builtin_memcpy(rest, row + c, (width - c) * sizeof(T));
  store(to + c, load(rest));
}

// Stores the first min(count, kLanes) elements.
// Stores the first min(count, kLanes) elements.
inline void store_head(float* to, Vec x, int64_t count) {
  count >= kLanes ? store(to, x) : store_tail(to, x, count);
}

inline void store_head(bfloat16* to, Vec x, int64_t count) {
  if (count < kLanes) return store_tail(to, x, count);
  const HalfVec half = to_bfloat16(x);
  __builtin_memcpy(to, &half, sizeof half);
}

// to[c][r] = from[r][c] for kLanes by kLanes words.
inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
#if defined(__AVX512F__)
  const BitVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  __m512i x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = (__m512i)load_words(from + i * from_stride);
#pragma GCC unroll 4
  for (uint32_t step = 1; step < 16; step *= 2) {
    const BitVec odd = lane & step;
    const __m512i even_lanes = (__m512i)(odd != 0 ? lane + (16 - step) : lane);
    const __m512i odd_lanes = (__m512i)(odd != 0 ? lane + 16 : lane + step);
#pragma GCC unroll 16
    for (uint32_t i = 0; i < 16; ++i) {
      if (i & step) continue;
      const __m512i a = x[i], b = x[i + step];
      x[i] = _mm512_permutex2var_epi32(a, even_lanes, b);
      x[i + step] = _mm512_permutex2var_epi32(a, odd_lanes, b);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store_words(to + i * to_stride, (BitVec)x[i]);
#elif defined(__AVX2__)
  __m256 x[8], y[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = (__m256)load_words(from + i * from_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {  // pairs of rows, lane by lane
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // columns of four rows, the lower and the upper four apart
      x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0x44);
      x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + j + 2], 0xee);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store_words(to + i * to_stride, (BitVec)_mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
    store_words(to + (i + 4) * to_stride, (BitVec)_mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
  }
#else
  for (int r = 0; r < kLanes; ++r)
    for (int c = 0; c < kLanes; ++c) to[c * to_stride + r] = from[r * from_stride + c];
#endif
}

}  // namespace emu3::EMU3_LEVEL
