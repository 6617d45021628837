// Sixteen floats or integers at every level, in one to four registers; a comparison returns a mask
// of 16 bits. Include only in files that are compiled once per level, as simd.h.
#pragma once

#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {

constexpr int kParts = 16 / kLanes;

struct Floats {
  Vec part[kParts];
};

struct Ints {
  IntVec part[kParts];
};

template <typename Function>
inline Floats each(Function f) {
  Floats x;
  for (int i = 0; i < kParts; ++i) x.part[i] = f(i);
  return x;
}

// Loads register by register: GCC copies a struct of 64 bytes in pieces of 16, and a 32-byte load
// after them would stall on store forwarding.
inline Floats load16(const float* from) {
  return each([&](int i) { return load(from + i * kLanes); });
}

inline Ints load16(const int32_t* from) {
  Ints x;
  for (int i = 0; i < kParts; ++i)
    __builtin_memcpy(&x.part[i], from + i * kLanes, sizeof x.part[i]);
  return x;
}

inline void store16(float* to, const Floats& x) {
  for (int i = 0; i < kParts; ++i) store(to + i * kLanes, x.part[i]);
}

inline void store16(int32_t* to, const Ints& x) {
  for (int i = 0; i < kParts; ++i) __builtin_memcpy(to + i * kLanes, &x.part[i], sizeof x.part[i]);
}

inline Floats splat16(float x) {
  return each([&](int) { return splat(x); });
}

inline Ints splat16(int32_t x) {
  Ints all;
  for (int i = 0; i < kParts; ++i) all.part[i] = x - IntVec{};
  return all;
}

inline Floats operator+(const Floats& a, const Floats& b) {
  return each([&](int i) { return a.part[i] + b.part[i]; });
}

inline Floats operator-(const Floats& a, const Floats& b) {
  return each([&](int i) { return a.part[i] - b.part[i]; });
}

inline Floats operator*(const Floats& a, const Floats& b) {
  return each([&](int i) { return a.part[i] * b.part[i]; });
}

inline Ints operator+(const Ints& a, const Ints& b) {
  Ints sum;
  for (int i = 0; i < kParts; ++i) sum.part[i] = a.part[i] + b.part[i];
  return sum;
}

// Both return b where either is NaN.
inline Floats min(const Floats& a, const Floats& b) {
  return each([&](int i) { return min(a.part[i], b.part[i]); });
}

inline Floats max(const Floats& a, const Floats& b) {
  return each([&](int i) { return max(a.part[i], b.part[i]); });
}

#if !defined(__AVX512F__)
// Returns one bit for each lane of a comparison.
inline unsigned bits(IntVec all_or_nothing) {
#if defined(__AVX2__)
  return _mm256_movemask_ps((Vec)all_or_nothing);
#else
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (all_or_nothing[i] & 1u) << i;
  return mask;
#endif
}

template <typename Function>
inline unsigned bits_of_each(Function f) {
  unsigned mask = 0;
  for (int i = 0; i < kParts; ++i) mask |= bits(f(i)) << (i * kLanes);
  return mask;
}
#endif

// Comparisons are false where a lane is NaN.
inline unsigned less(const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_LT_OQ);
#else
  return bits_of_each([&](int i) { return a.part[i] < b.part[i]; });
#endif
}

inline unsigned less_or_equal(const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_LE_OQ);
#else
  return bits_of_each([&](int i) { return a.part[i] <= b.part[i]; });
#endif
}

inline unsigned equal(const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a.part[0], b.part[0], _CMP_EQ_OQ);
#else
  return bits_of_each([&](int i) { return a.part[i] == b.part[i]; });
#endif
}

inline unsigned less(const Ints& a, const Ints& b) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask((__m512i)a.part[0], (__m512i)b.part[0]);
#else
  return bits_of_each([&](int i) { return a.part[i] < b.part[i]; });
#endif
}

inline unsigned equal(const Ints& a, const Ints& b) {
#if defined(__AVX512F__)
  return _mm512_cmpeq_epi32_mask((__m512i)a.part[0], (__m512i)b.part[0]);
#else
  return bits_of_each([&](int i) { return a.part[i] == b.part[i]; });
#endif
}

// Returns `yes` where a < b and `no` elsewhere.
inline Ints select_less(const Floats& a, const Floats& b, const Ints& yes, const Ints& no) {
  Ints chosen;
  for (int i = 0; i < kParts; ++i)
    chosen.part[i] = a.part[i] < b.part[i] ? yes.part[i] : no.part[i];
  return chosen;
}

alignas(64) inline constexpr int32_t kLane[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                  8, 9, 10, 11, 12, 13, 14, 15};

// Returns x in the first `count` lanes and `rest` in the others.
inline Floats first_of(const Floats& x, int count, float rest) {
  const Ints lane = load16(kLane), end = splat16(count);
  return each([&](int i) { return lane.part[i] < end.part[i] ? x.part[i] : splat(rest); });
}

inline Ints first_of(const Ints& x, int count, int32_t rest) {
  const Ints lane = load16(kLane), end = splat16(count), other = splat16(rest);
  Ints first;
  for (int i = 0; i < kParts; ++i)
    first.part[i] = lane.part[i] < end.part[i] ? x.part[i] : other.part[i];
  return first;
}

// Returns the minimum of 16 lanes, none of which may be NaN.
inline float reduce_min(const Floats& x) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps(x.part[0]);
#elif defined(__AVX2__)
  const __m256 both = _mm256_min_ps(x.part[0], x.part[1]);
  __m128 four = _mm_min_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  four = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(four, _mm_movehdup_ps(four)));
#else
  const Vec four = min(min(x.part[0], x.part[1]), min(x.part[2], x.part[3]));
  const float a = four[0] < four[1] ? four[0] : four[1], b = four[2] < four[3] ? four[2] : four[3];
  return a < b ? a : b;
#endif
}

inline float reduce_max(const Floats& x) {
  return -reduce_min(each([&](int i) { return -x.part[i]; }));
}

// Stores the lanes of x in `mask` packed and returns their number. All 16 elements from `to` on may
// be overwritten.
inline int store_packed(int32_t* to, const Ints& x, unsigned mask) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, (__m512i)x.part[0]));
#else
  int32_t lane[16];
  store16(lane, x);
  for (unsigned rest = mask; rest; rest &= rest - 1) *to++ = lane[__builtin_ctz(rest)];
#endif
  return __builtin_popcount(mask);
}

// As store_packed, but no other element is overwritten. A load right after it waits for the store.
inline void store_packed_alone(float* to, const Floats& x, unsigned mask) {
#if defined(__AVX512F__)
  const __mmask16 packed = (1u << __builtin_popcount(mask)) - 1;
  _mm512_mask_storeu_ps(to, packed, _mm512_maskz_compress_ps(mask, x.part[0]));
#else
  float lane[16];
  store16(lane, x);
  for (; mask; mask &= mask - 1) *to++ = lane[__builtin_ctz(mask)];
#endif
}

}  // namespace emu3::EMU3_LEVEL
