// SIMD on the vector extensions of GCC and Clang, with intrinsics where these compile badly.
// A Vec is as wide as the registers of the level. Include only in files that are compiled once per
// level: everything is in the namespace EMU3_LEVEL, and no header of the standard library with
// inline code may be included beside it (the linker could keep the copy of an inline function that
// was compiled for AVX-512 and use it on every processor).
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

// Returns b if either is NaN: with a bound as `a`, a NaN in `b` is kept.
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
inline Vec to_float(HalfVec half) { return (Vec)(__builtin_convertvector(half, BitVec) << 16); }

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

// Rounds the upper half of the bits of x to nearest, ties to even. A NaN is returned as it is: its
// upper half is a NaN already (arithmetic makes quiet ones), and rounding could carry out of it.
inline BitVec rounded(Vec x) {
  const BitVec bits = (BitVec)x;
  return (x == x) ? bits + 0x7fff + ((bits >> 16) & 1) : bits;
}

inline HalfVec to_bfloat16(Vec x) { return __builtin_convertvector(rounded(x) >> 16, HalfVec); }

inline Vec load(const float* from) {
  Vec x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline Vec load(const bfloat16* from) {
  HalfVec half;
  __builtin_memcpy(&half, from, sizeof half);
  return to_float(half);
}

inline void store(float* to, Vec x) { __builtin_memcpy(to, &x, sizeof x); }

inline void store(bfloat16* to, Vec x) {
  const HalfVec half = to_bfloat16(x);
  __builtin_memcpy(to, &half, sizeof half);
}

// Stores the first `count` < kLanes elements.
inline void store_tail(float* to, Vec x, int64_t count) {
  __builtin_memcpy(to, &x, count * sizeof *to);
}

inline void store_tail(bfloat16* to, Vec x, int64_t count) {
  const HalfVec half = to_bfloat16(x);
  __builtin_memcpy(to, &half, count * sizeof *to);
}

// 2 * kLanes elements. For float, a and b are the lower and the upper half; for bfloat16 they are
// the even and the odd elements, which a shift and a mask separate. Loads and stores use the same
// order.
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

// VCVTNE2PS2BF16 flushes inputs below 2^-126 to zero; the portable rounding does not.
inline BitVec to_bfloat16_pair(Pair x) {
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

// A streaming store (past_caches) does not read the line that it overwrites. `to` must then be
// aligned to a vector, and stream_fence() must follow the last such store.
inline void store_pair(float* to, Pair x, bool past_caches) {
  write(to, (BitVec)x.a, past_caches);
  write(to + kLanes, (BitVec)x.b, past_caches);
}

inline void store_pair(bfloat16* to, Pair x, bool past_caches) {
  write(to, to_bfloat16_pair(x), past_caches);
}

constexpr int64_t kPair = 2 * kLanes;

// Loads the first `count` <= kPair elements and reads no others; the rest of the pair is zero.
template <typename T>
inline Pair load_pair(const T* from, int64_t count) {
  if (count == kPair) return load_pair(from);
  T block[kPair] = {};
  __builtin_memcpy(block, from, count * sizeof *from);
  return load_pair(block);
}

enum Cache { kFirstCache = 3, kSecondCache = 2 };

// Prefetches the pair of elements at `from`, which may be an invalid address.
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

// Calls block(c, count) for every pair of elements, with count < kPair for the tail.
template <typename Block>
inline void over_pairs(int64_t width, Block block) {
  int64_t c = 0;
  for (; c + kPair <= width; c += kPair) block(c, kPair);
  if (c < width) block(c, width - c);
}

// Returns whether every row of `stride` elements is aligned for streaming stores.
template <typename T>
inline bool can_stream(const T* rows, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(rows) | stride * sizeof(T)) % 64 == 0;
}

inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Returns 2^t within two units in the last place; 0 below -150 and infinity from 128 on. Without
// AVX-512 it is 0 below -127, and t must be below 127.
inline Vec exp2(Vec t) {
#if defined(__AVX512F__)
  const Vec f = _mm512_reduce_ps(t, 1);  // t - floor(t)
  // minimax of the relative error on [0, 1], 6.9e-8, and 1 at 0
  Vec p = splat(1.861827332e-3f);
  p = fma(p, f, splat(9.030426852e-3f));
  p = fma(p, f, splat(5.578842387e-2f));
  p = fma(p, f, splat(2.401682436e-1f));
  p = fma(p, f, splat(6.931509376e-1f));
  p = fma(p, f, splat(1));
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

// Calls `body` with a value of the element type of `dtype`.
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
