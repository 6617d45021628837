#include "cpu/quantized/quantized_linear.h"

#include "cpu/lib/packing.h"

namespace emu3::EMU3_LEVEL {
namespace {

template <int kValue>
struct Size {
  static constexpr int value = kValue;
};

// Codes of int4 are read as words of eight, a vector of words at a time. A code is masked where it
// lies and converted: it is then 2^(4 i) times too large, which the packed x makes up for.
constexpr int64_t kNibbles = 8 * kLanes;
// Packed x of a vector of words: for each of the eight codes of a word a vector, and one of -8
// times their sum, since 8 was added to the codes.
constexpr int64_t kPackedNibbles = kNibbles + kLanes;

// Inputs of one row that are read before the next columns: those of all rows fit the L1 cache.
constexpr int64_t kChunk = 4096;

Vec load_int8(const int8_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = from[i];
  return x;
#endif
}

// The code at place kCode of each word, times 2^(4 kCode); the last would be negative in its place.
template <int kCode>
Vec code_of(BitVec words) {
  constexpr int kPlace = kCode < 7 ? kCode : 6;
  const BitVec moved = kCode < 7 ? words : words >> 4;
  return __builtin_convertvector((IntVec)(moved & (15u << 4 * kPlace)), Vec);
}

constexpr float kUnit[8] = {1, 0x1p-4, 0x1p-8, 0x1p-12, 0x1p-16, 0x1p-20, 0x1p-24, 0x1p-24};

// Which input of its 32 the code `code` of word `word` is.
constexpr int64_t input_of(int64_t word, int64_t code) {
  return word / 4 * 32 + word % 4 * 4 + code / 2 + code % 2 * 16;
}

// The scale of each word.
template <int kGroup>
Vec scales_of(const bfloat16* scales, int64_t vector) {
  constexpr int kWords = kGroup / 8;
  if constexpr (kWords >= kLanes) return splat(to_float(scales[vector / (kWords / kLanes)]));
  scales += vector * (kLanes / kWords);
  Vec all;
  for (int i = 0; i < kLanes; ++i) all[i] = to_float(scales[i / kWords]);
  return all;
}

struct Int8 {
  static constexpr int kInputs = kLanes, kFloats = kLanes;  // of a step: in a row, and packed
  static constexpr int kSums = 8;  // sums that are independent, to hide the latency of fma
  const QuantizedWeight& w;

  const int8_t* row(int64_t n) const { return (const int8_t*)w.codes + n * w.K; }

  // sum += x . codes for steps [from, to), of which the last may be ragged.
  template <int kRows, int kColumns>
  void dot(const float* x, int64_t n, int64_t from, int64_t to, Vec (&sum)[kRows][kColumns]) const {
    const int64_t whole = min(to, w.K / kLanes);
    for (int64_t s = from; s < whole; ++s)
      step(x, s, sum, [&](int c) { return load_int8(row(n + c) + s * kLanes); });
    if (whole < to)
      step(x, whole, sum, [&](int c) {
        int8_t rest[kLanes] = {};
        __builtin_memcpy(rest, row(n + c) + whole * kLanes, w.K - whole * kLanes);
        return load_int8(rest);
      });
  }

  template <int kRows, int kColumns, typename Codes>
  static void step(const float* x, int64_t s, Vec (&sum)[kRows][kColumns], Codes codes) {
    Vec weight[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) weight[c] = codes(c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec input = load(x + (s * kRows + r) * kLanes);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(input, weight[c], sum[r][c]);
    }
  }

  float scale(int64_t n) const { return ((const float*)w.scales)[n]; }

  template <typename T>
  void pack(const T* x, int64_t row, int64_t rows, float* to) const {
    to += row * kLanes;
    for (int64_t k = 0; k < w.K; k += kLanes, to += rows * kLanes)
      row_to_float(x + k, min(kLanes, w.K - k), to);
  }
};

template <int kGroup>
struct Int4 {
  static constexpr int kInputs = kNibbles, kFloats = kPackedNibbles;
  static constexpr int kSums = 8;  // the eight codes of a word add to one, and start anew
  const QuantizedWeight& w;

  const uint32_t* row(int64_t n) const {
    return (const uint32_t*)((const char*)w.codes + n * w.K / 2);
  }
  const bfloat16* scales(int64_t n) const { return (const bfloat16*)w.scales + n * (w.K / kGroup); }

  template <int kRows, int kColumns>
  void dot(const float* x, int64_t n, int64_t from, int64_t to, Vec (&sum)[kRows][kColumns]) const {
    const int64_t whole = min(to, w.K / kNibbles);
    for (int64_t s = from; s < whole; ++s) {
      step(
          x, s, sum, [&](int c) { return load_words(row(n + c) + s * kLanes); },
          [&](int c) { return scales_of<kGroup>(scales(n + c), s); });
    }
    if (whole < to) ragged(x, n, whole, sum);
  }

  template <int kRows, int kColumns>
  void ragged(const float* x, int64_t n, int64_t s, Vec (&sum)[kRows][kColumns]) const {
    constexpr int64_t kScales = kNibbles / kGroup + 1;
    step(
        x, s, sum,
        [&](int c) {
          uint32_t rest[kLanes] = {};
          __builtin_memcpy(rest, row(n + c) + s * kLanes, (w.K - s * kNibbles) / 2);
          return load_words(rest);
        },
        [&](int c) {
          bfloat16 rest[kScales] = {};
          const int64_t first = s * kNibbles / kGroup;
          __builtin_memcpy(rest, scales(n + c) + first, (w.K / kGroup - first) * sizeof *rest);
          return scales_of<kGroup>(rest, 0);
        });
  }

  template <int kRows, int kColumns, typename Words, typename Scales>
  static void step(const float* x, int64_t s, Vec (&sum)[kRows][kColumns], Words words,
                   Scales scales) {
    x += s * kFloats * kRows;
    Vec group[kRows][kColumns];
    BitVec codes[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) codes[c] = words(c);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) group[r][c] = load(x + (8 * kRows + r) * kLanes);
    code<0>(x, codes, group);
    code<1>(x, codes, group);
    code<2>(x, codes, group);
    code<3>(x, codes, group);
    code<4>(x, codes, group);
    code<5>(x, codes, group);
    code<6>(x, codes, group);
    code<7>(x, codes, group);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const Vec scale = scales(c);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][c] = fma(group[r][c], scale, sum[r][c]);
    }
  }

  template <int kCode, int kRows, int kColumns>
  static void code(const float* x, const BitVec (&codes)[kColumns], Vec (&group)[kRows][kColumns]) {
    Vec weight[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) weight[c] = code_of<kCode>(codes[c]);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec input = load(x + (kCode * kRows + r) * kLanes);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) group[r][c] = fma(input, weight[c], group[r][c]);
    }
  }

  float scale(int64_t) const { return 1; }

  template <typename T>
  void pack(const T* x, int64_t row, int64_t rows, float* to) const {
    const int64_t stride = rows * kLanes;
    to += row * kLanes;
    for (int64_t first = 0; first < w.K; first += kNibbles, to += 9 * stride)
      for (int64_t word = 0; word < kLanes; ++word) {
        float sum = 0;
        for (int64_t code = 0; code < 8; ++code) {
          const int64_t k = first + input_of(word, code);
          const float input = k < w.K ? to_float(x[k]) : 0;
          to[code * stride + word] = input * kUnit[code];
          sum += input;
        }
        to[8 * stride + word] = -8 * sum;
      }
  }
};

template <typename Body>
void with_format(const QuantizedWeight& w, Body body) {
  if (w.group == 0) return body(Int8{w});
  if (w.group == 32) return body(Int4<32>{w});
  if (w.group == 64) return body(Int4<64>{w});
  body(Int4<128>{w});
}

template <typename Format>
int64_t steps_of(const Format& format) {
  return (format.w.K + Format::kInputs - 1) / Format::kInputs;
}

// kRows rows of y and columns [begin, begin + count), at most kColumnBlock.
template <int kRows, typename Format, typename T>
void block(const Format& format, const float* x, int64_t begin, int64_t count, T* y) {
  constexpr int kColumns = Format::kSums > kRows ? Format::kSums / kRows : 1;
  constexpr int64_t kSteps = kChunk / kRows / Format::kInputs;
  const int64_t steps = steps_of(format);
  Vec sums[kColumnBlock][kRows] = {};
  for (int64_t from = 0; from < steps; from += kSteps) {
    const int64_t to = min(steps, from + kSteps);
    const auto some = [&](auto columns, int64_t n) {
      constexpr int kCount = decltype(columns)::value;
      Vec sum[kRows][kCount];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kCount; ++c) sum[r][c] = sums[n + c][r];
      format.template dot<kRows, kCount>(x, begin + n, from, to, sum);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kCount; ++c) sums[n + c][r] = sum[r][c];
    };
    int64_t n = 0;
    for (; n + kColumns <= count; n += kColumns) some(Size<kColumns>{}, n);
    for (; n < count; ++n) some(Size<1>{}, n);
  }
  for (int64_t n = 0; n < count; ++n)
    for (int r = 0; r < kRows; ++r)
      store_tail(y + r * format.w.N + begin + n,
                 splat(reduce_add(sums[n][r]) * format.scale(begin + n)), 1);
}

int64_t packed_width(const QuantizedWeight& w) {
  int64_t width = 0;
  with_format(w, [&](auto format) { width = steps_of(format) * format.kFloats; });
  return width;
}

void pack(const QuantizedWeight& w, Dtype dtype, const void* x, int64_t row, int64_t rows,
          float* packed) {
  with_format(w, [&](auto format) {
    with_type(dtype, [&](auto type) { format.pack((const decltype(type)*)x, row, rows, packed); });
  });
}

void columns(const QuantizedWeight& w, Dtype dtype, const float* packed, int64_t rows,
             int64_t begin, int64_t end, void* y) {
  with_format(w, [&](auto format) {
    with_type(dtype, [&](auto type) {
      typedef decltype(type) T;
      const int64_t stride = steps_of(format) * format.kFloats;
      for (int64_t n = begin; n < end; n += kColumnBlock) {
        const int64_t count = min(kColumnBlock, end - n);
        int64_t r = 0;
        const auto next = [&](auto some) {
          constexpr int kRows = decltype(some)::value;
          for (; r + kRows <= rows; r += kRows)
            block<kRows>(format, packed + r * stride, n, count, (T*)y + r * w.N);
        };
        next(Size<8>{});
        next(Size<4>{});
        next(Size<2>{});
        next(Size<1>{});
      }
    });
  });
}

template <typename T>
void put(T* to, float x) {
  store_tail(to, splat(x), 1);
}

void dequantize(const QuantizedWeight& w, Dtype dtype, int64_t begin, int64_t end, void* to) {
  with_type(dtype, [&](auto type) {
    typedef decltype(type) T;
    T* out = (T*)to;
    for (int64_t n = begin; n < end; ++n, out += w.K) {
      if (w.group == 0) {
        const int8_t* codes = (const int8_t*)w.codes + n * w.K;
        const Vec scale = splat(((const float*)w.scales)[n]);
        int64_t k = 0;
        for (; k + kLanes <= w.K; k += kLanes) store(out + k, load_int8(codes + k) * scale);
        for (; k < w.K; ++k) put(out + k, codes[k] * scale[0]);
        continue;
      }
      const uint8_t* codes = (const uint8_t*)w.codes + n * w.K / 2;
      const bfloat16* scales = (const bfloat16*)w.scales + n * (w.K / w.group);
      for (int64_t k = 0; k < w.K; k += 32, codes += 16) {
        const Vec scale = splat(to_float(scales[k / w.group]));
        int8_t halves[32];
        for (int i = 0; i < 16; ++i) {
          halves[i] = (int8_t)((codes[i] & 15) - 8);
          halves[16 + i] = (int8_t)((codes[i] >> 4) - 8);
        }
        for (int i = 0; i < 32; i += kLanes) store(out + k + i, load_int8(halves + i) * scale);
      }
    }
  });
}

}  // namespace

extern const QuantizedLinear quantized_linear{packed_width, pack, columns, dequantize};

}  // namespace emu3::EMU3_LEVEL
