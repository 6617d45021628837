// A vector of floats as wide as the level's registers, and what the kernels do with one.
// Built on the vector extensions of GCC and Clang; an intrinsic stands where they compile badly.
// Included by files that are compiled once per level: everything lives in EMU3_LEVEL's namespace,
// and no header of the standard library with inline code may be included beside it (an inline
// function compiled for AVX-512 could be the copy that the linker keeps for every processor).
#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace emu3 {

struct bfloat16 {
  uint16_t bits;
};

namespace EMU3_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

inline Vec splat(float x) { return x - Vec{}; }

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// b where either is NaN, so that a bound as `a` lets a NaN in `b` through.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// bfloat16 is the upper half of a float.
inline Vec widen(HalfVec half) { return (Vec)(__builtin_convertvector(half, BitVec) << 16); }

// The bits of x with its upper half rounded to nearest, ties to even. A NaN out of arithmetic is
// quiet: its upper half is a NaN already, and rounding could carry out of it.
inline BitVec rounded(Vec x) {
  const BitVec bits = (BitVec)x;
  return (x == x) ? bits + 0x7fff + ((bits >> 16) & 1) : bits;
}

inline HalfVec narrow(Vec x) { return __builtin_convertvector(rounded(x) >> 16, HalfVec); }

inline Vec load(const float* from) {
  Vec x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline Vec load(const bfloat16* from) {
  HalfVec half;
  __builtin_memcpy(&half, from, sizeof half);
  return widen(half);
}

inline void store(float* to, Vec x) { __builtin_memcpy(to, &x, sizeof x); }

inline void store(bfloat16* to, Vec x) {
  const HalfVec half = narrow(x);
  __builtin_memcpy(to, &half, sizeof half);
}

// The first `count` < kLanes elements alone.
inline void store_tail(float* to, Vec x, int64_t count) {
  __builtin_memcpy(to, &x, count * sizeof *to);
}

inline void store_tail(bfloat16* to, Vec x, int64_t count) {
  const HalfVec half = narrow(x);
  __builtin_memcpy(to, &half, count * sizeof *to);
}

// 2 * kLanes elements at once, in whatever order is cheap: for float the lower and the upper half,
// for bfloat16 the even and the odd ones, which come apart with a shift and a mask. Same order in
// and out.
struct Pair {
  Vec a, b;
};

inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
inline Pair operator*(Pair x, float y) { return {x.a * y, x.b * y}; }
inline Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }

inline Pair load_pair(const float* from) { return {load(from), load(from + kLanes)}; }

inline Pair load_pair(const bfloat16* from) {
  BitVec both;
  __builtin_memcpy(&both, from, sizeof both);
  return {(Vec)(both << 16), (Vec)(both & 0xffff0000)};
}

// The processor's own rounding takes numbers below 2^-126 for zero.
inline BitVec narrow_pair(Pair x) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(x.b, x.a);
  return (BitVec)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves);
#else
  return (rounded(x.a) >> 16) | (rounded(x.b) & 0xffff0000);
#endif
}

inline void write(void* to, BitVec x, bool past_caches) {
#if defined(__AVX512F__)
  if (past_caches) return _mm512_stream_si512((__m512i*)to, (__m512i)x);
#elif defined(__AVX2__)
  if (past_caches) return _mm256_stream_si256((__m256i*)to, (__m256i)x);
#endif
  __builtin_memcpy(to, &x, sizeof x);
}

// Past the caches: saves reading the line that is about to be overwritten. `to` must then be
// aligned to a vector, and the last such store be followed by stream_fence().
inline void store_pair(float* to, Pair x, bool past_caches) {
  write(to, (BitVec)x.a, past_caches);
  write(to + kLanes, (BitVec)x.b, past_caches);
}

inline void store_pair(bfloat16* to, Pair x, bool past_caches) {
  write(to, narrow_pair(x), past_caches);
}

constexpr int64_t kPair = 2 * kLanes;

// The first `count` <= kPair elements; the rest of the pair is zero and stays out of memory.
template <typename T>
inline Pair load_pair(const T* from, int64_t count) {
  if (count == kPair) return load_pair(from);
  T block[kPair] = {};
  __builtin_memcpy(block, from, count * sizeof *from);
  return load_pair(block);
}

enum Cache { kFirstCache = 3, kSecondCache = 2 };

// Asks for the pair of elements that stands at `from`, which may lie outside of memory.
template <Cache kTo, typename T>
inline void prefetch_pair(const T* from) {
  for (uint64_t i = 0; i < kPair * sizeof(T); i += 64)
    __builtin_prefetch((const char*)from + i, 0, kTo);
}

template <typename T>
inline void store_pair(T* to, Pair x, int64_t count, bool past_caches) {
  if (count == kPair) return store_pair(to, x, past_caches);
  T block[kPair];
  store_pair(block, x, false);
  __builtin_memcpy(to, block, count * sizeof *to);
}

// Calls block(c, count) for whole pairs of elements, then for the rest.
template <typename Block>
inline void over_pairs(int64_t width, Block block) {
  int64_t c = 0;
  for (; c + kPair <= width; c += kPair) block(c, kPair);
  if (c < width) block(c, width - c);
}

// Whether every row of `stride` elements can be written past the caches.
template <typename T>
inline bool can_stream(const T* rows, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(rows) | stride * sizeof(T)) % 64 == 0;
}

inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// 2^t to within two units in the last place; 0 below -150, infinity from 128. Without AVX-512, 0
// below -127, and t must be below 127.
inline Vec exp2(Vec t) {
#if defined(__AVX512F__)
  const Vec f = _mm512_reduce_ps(t, 1);  // t - floor(t)
  Vec p = splat(1.877576578e-3f);        // minimax of the relative error on [0, 1], 7.5e-8
  p = fma(p, f, splat(8.989340626e-3f));
  p = fma(p, f, splat(5.582631752e-2f));
  p = fma(p, f, splat(2.401536107e-1f));
  p = fma(p, f, splat(6.931530833e-1f));
  p = fma(p, f, splat(9.999999404e-1f));
  return _mm512_scalef_ps(p, t);
#else
  t = max(splat(-127), t);
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = t + shift;
  const Vec f = t - (shifted - shift);
  Vec p =
      splat(1.326472684e-3f);  // minimax of the relative error on [-1/2, 1/2], 9.1e-8, and 1 at 0
  p = fma(p, f, splat(9.671512629e-3f));
  p = fma(p, f, splat(5.550733744e-2f));
  p = fma(p, f, splat(2.402224209e-1f));
  p = fma(p, f, splat(6.931469776e-1f));
  p = fma(p, f, splat(1));
  return p * (Vec)(((BitVec)shifted << 23) + 0x3f800000);  // its lowest bits are the exponent
#endif
}

inline float reduce_add(Vec x) {
  float lane[kLanes];
  __builtin_memcpy(lane, &x, sizeof x);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

inline float reduce_add(Pair x) { return reduce_add(x.a + x.b); }

inline float reduce_max(Vec x) {
  float lane[kLanes];
  __builtin_memcpy(lane, &x, sizeof x);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// Call `body` with a value whose type is the element type that `dtype` names.
template <typename Body>
inline void with_type(Dtype dtype, Body body) {
  if (dtype == Dtype::float32) {
    body(float{});
  } else {
    body(bfloat16{});
  }
}

}  // namespace EMU3_LEVEL
}  // namespace emu3
