// One pass over the keys of a piece, a block at a time: all key heads of a block before the next
// block, because that is how they lie in memory, and every query head of a key head while its keys
// and values are in the first cache.
#include "cpu/attention/decode_attention.h"

#include "cpu/lib/lanes16.h"

namespace emu3::EMU3_LEVEL {
namespace {

constexpr int kBlock = 32;  // keys: those of 8 heads, and their values, fit the second cache twice
constexpr int kTile = 4;    // queries that share a load of keys or values
constexpr float kNothing = -__builtin_inff();

// Elements as dot() takes them: as bfloat16 where the processor multiplies that, else as floats.
#if defined(__AVX512BF16__)
inline BitVec operand(const bfloat16* from, int64_t count) {
  BitVec both = {};
  if (count == kPair) {
    __builtin_memcpy(&both, from, sizeof both);
  } else {
    __builtin_memcpy(&both, from, count * sizeof *from);
  }
  return both;
}

inline Vec dot(BitVec x, BitVec y, Vec sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}
#else
inline Pair operand(const bfloat16* from, int64_t count) { return load_pair(from, count); }
#endif

inline Pair operand(const float* from, int64_t count) { return load_pair(from, count); }

inline Vec dot(Pair x, Pair y, Vec sum) { return fma(x.b, y.b, fma(x.a, y.a, sum)); }

template <typename T>
using Operand = decltype(operand((const T*)nullptr, 0));

// An operand of floats part by part: GCC copies 64 bytes at once in pieces that stall a load of 32.
inline void read(const float* from, Pair& x) { x = load_pair(from); }
inline void read(const float* from, BitVec& x) { __builtin_memcpy(&x, from, sizeof x); }

template <typename T>
struct WeightOf {
  using type = float;
};

#if defined(__AVX512BF16__)
template <>
struct WeightOf<bfloat16> {
  using type = uint16_t;
};
#endif

// What a value is multiplied by: rounded to bfloat16 where the processor multiplies that.
template <typename T>
using Weight = typename WeightOf<T>::type;

// Lane i of the result is the sum of the lanes of x[i].
inline Vec sum_each(const Vec* x) {
#if defined(__AVX512F__)
  __m512 halves[8], quarters[4], eighths[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = x[i / 4 * 8 + i % 4], b = x[i / 4 * 8 + i % 4 + 4];
    halves[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = halves[i], b = halves[i + 4];
    quarters[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quarters[2 * i], b = quarters[2 * i + 1];
    eighths[i] = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  }
  return _mm512_shuffle_ps(eighths[0], eighths[1], 0x88) +
         _mm512_shuffle_ps(eighths[0], eighths[1], 0xdd);
#elif defined(__AVX2__)
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
#else
  return Vec{reduce_add(x[0]), reduce_add(x[1]), reduce_add(x[2]), reduce_add(x[3])};
#endif
}

// The keys and values of a block: where key head 0 of each begins. Keys past the last repeat it.
template <typename T>
struct Block {
  const T *k[kBlock], *v[kBlock];
  int64_t count;

  Block(const DecodeCall& call, int64_t row, int64_t first, int64_t end) {
    count = end - first < kBlock ? end - first : kBlock;
    for (int64_t j = 0; j < count; ++j) {
      int64_t at = row, key = first + j;
      if (call.pages.table) {
        at = call.pages.table[row * call.pages.row_stride + key / call.pages.page];
        key %= call.pages.page;
      }
      k[j] = (const T*)call.k.data + at * call.k.row_stride + key * call.k.key_stride;
      v[j] = (const T*)call.v.data + at * call.v.row_stride + key * call.v.key_stride;
    }
    for (int64_t j = count; j > 0 && j < kBlock; ++j) k[j] = k[count - 1], v[j] = v[count - 1];
  }
};

// Asks for the keys, or the values, of a block in the order in which they lie, a few lines at each
// step of the arithmetic on the block before: all at once they would wait for one another.
template <typename T>
struct Ahead {
  const T* const* rows;
  int64_t count, head_stride, groups, width, row = 0, group = 0, column = 0;

  void step(int64_t elements) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < elements && row < count; i += kLine) {
      __builtin_prefetch(rows[row] + group * head_stride + column, 0, 2);
      if ((column += kLine) < width) continue;
      column = 0;
      if (++group < groups) continue;
      group = 0, ++row;
    }
  }
};

// scores[r][j] = scale * q_r . key_j for `count` keys and some more; as many keys share a load of
// queries as fill a vector of sums.
template <typename T, int kRows>
void score(const DecodeCall& call, const float* packed, const T* const* keys, int64_t head,
           int64_t count, Ahead<T>& ahead, float (*scores)[kBlock]) {
  constexpr int kKeys = kLanes / kRows;
  const int64_t queries_stride = call.padded();
  for (int64_t j = 0; j < count; j += kKeys) {
    Vec sum[kRows][kKeys] = {};
    over_pairs(call.width, [&](int64_t c, int64_t elements) {
      ahead.step(kKeys * kPair);
      Operand<T> key[kKeys];
      for (int n = 0; n < kKeys; ++n) key[n] = operand(keys[j + n] + head + c, elements);
      for (int r = 0; r < kRows; ++r) {
        Operand<T> query;
        read(packed + r * queries_stride + c, query);
        for (int n = 0; n < kKeys; ++n) sum[r][n] = dot(query, key[n], sum[r][n]);
      }
    });
    float all[kLanes];
    store(all, sum_each(sum[0]) * call.scale);
    for (int r = 0; r < kRows; ++r) __builtin_memcpy(scores[r] + j, all + r * kKeys, 4 * kKeys);
  }
}

inline void store_weight(float* to, Vec weight) { store(to, weight); }

inline void store_weight(uint16_t* to, Vec weight) {
  const HalfVec rounded = narrow(weight);
  __builtin_memcpy(to, &rounded, sizeof rounded);
}

// Turns the scores of the first `visible` keys into weights, 0 for the others, and brings what the
// query has so far to the same greatest score.
template <typename W>
void weigh(const DecodeCall& call, float* scores, int64_t visible, W* weights, float* partial) {
  float *const sums = partial + call.padded(), *const greatest_yet = sums + kMostLanes;
  for (int64_t j = visible < 0 ? 0 : visible; j < kBlock; ++j) scores[j] = kNothing;
  float highest = *greatest_yet;
  for (int j = 0; j < kBlock; j += 16) {
    const Floats some = load16(scores + j);
    if (!less(splat16(highest), some)) continue;
    const float before = highest;
    highest = greatest(some);
    const Vec factor = exp2(splat(before - highest));
    for (int64_t c = 0; c < call.padded() + kMostLanes; c += kLanes)
      store(partial + c, load(partial + c) * factor);
  }
  *greatest_yet = highest;
  // Without any key in sight the difference would be NaN.
  const float subtract = highest == kNothing ? 0 : highest;
  for (int j = 0; j < kBlock; j += kLanes) {
    const Vec weight = exp2(load(scores + j) - subtract);
    store_weight(weights + j, weight);
    store(sums + j % kMostLanes, load(sums + j % kMostLanes) + weight);
  }
}

// sum_r += sum_j weights[r][j] * elements of value_j
template <int kRows, typename T>
inline void add_weighted(const float (*weights)[kBlock], const T* const* values, int64_t from,
                         int64_t elements, int64_t count, Ahead<T>& ahead, Pair* sum) {
  for (int64_t j = 0; j < count; ++j) {
    ahead.step(kPair);
    const Pair value = load_pair(values[j] + from, elements);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(weights[r][j]);
      sum[r] = fma({weight, weight}, value, sum[r]);
    }
  }
}

#if defined(__AVX512BF16__)
// Two keys at a time, which the processor multiplies and adds at once, in the order in which it
// lays them side by side: of every eight elements four in the one sum, four in the other. The last
// value is there twice if their count is odd.
template <int kRows>
inline void add_weighted(const uint16_t (*weights)[kBlock], const bfloat16* const* values,
                         int64_t from, int64_t elements, int64_t count, Ahead<bfloat16>& ahead,
                         Pair* sum) {
  for (int64_t j = 0; j < count; j += 2) {
    ahead.step(2 * kPair);
    const auto one = (__m512i)operand(values[j] + from, elements);
    const auto two = (__m512i)operand(values[j + 1] + from, elements);
    const auto a = (BitVec)_mm512_unpacklo_epi16(one, two);
    const auto b = (BitVec)_mm512_unpackhi_epi16(one, two);
    for (int r = 0; r < kRows; ++r) {
      uint32_t both;
      __builtin_memcpy(&both, weights[r] + j, sizeof both);
      const BitVec weight = both - BitVec{};
      sum[r] = {dot(weight, a, sum[r].a), dot(weight, b, sum[r].b)};
    }
  }
}

// Brings sums of add_weighted into the order of load_pair.
inline Pair in_order(const bfloat16*, Pair x) {
  const BitVec even = {0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30};
  return {(Vec)_mm512_permutex2var_ps((__m512)x.a, (__m512i)even, (__m512)x.b),
          (Vec)_mm512_permutex2var_ps((__m512)x.a, (__m512i)(even + 1), (__m512)x.b)};
}
#endif

template <typename T>
inline Pair in_order(const T*, Pair x) {
  return x;
}

// partial_r += sum_j weights[r][j] * value_j
template <typename T, int kRows>
void add_values(const DecodeCall& call, const Weight<T> (*weights)[kBlock], const T* const* values,
                int64_t head, int64_t count, Ahead<T>& ahead, float* partial) {
  const int64_t stride = partial_size(call);
  over_pairs(call.width, [&](int64_t c, int64_t n) {
    Pair sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = load_pair(partial + r * stride + c);
    add_weighted<kRows>(weights, values, head + c, n, count, ahead, sum);
    for (int r = 0; r < kRows; ++r) store_pair(partial + r * stride + c, sum[r], false);
  });
}

// A block in work and the next on its way.
template <typename T>
struct Work {
  const DecodeCall& call;
  const Block<T>& block;
  int64_t oldest_sees;  // keys of the block, below 0 or beyond its last too
  Ahead<T> k, v;

  Work(const DecodeCall& call, const Block<T>& block, const Block<T>& next, int64_t oldest_sees)
      : call(call),
        block(block),
        oldest_sees(oldest_sees),
        k{next.k, next.count, call.k.head_stride, call.groups, call.width},
        v{next.v, next.count, call.v.head_stride, call.groups, call.width} {}
};

// Queries [query, query + kRows) of key head g.
template <typename T, int kRows>
void attend_tile(Work<T>& work, int64_t g, int64_t query, const float* packed, float* partial) {
  const DecodeCall& call = work.call;
  const Block<T>& block = work.block;
  const int64_t heads_of_group = call.heads / call.groups;
  float scores[kRows][kBlock];
  Weight<T> weights[kRows][kBlock];
  score<T, kRows>(call, packed, block.k, g * call.k.head_stride, block.count, work.k, scores);
  for (int r = 0; r < kRows; ++r) {
    const int64_t sees = work.oldest_sees + (query + r) / heads_of_group;
    weigh(call, scores[r], sees < block.count ? sees : block.count, weights[r],
          partial + r * partial_size(call));
  }
  add_values<T, kRows>(call, weights, block.v, g * call.v.head_stride, block.count, work.v,
                       partial);
}

template <typename T>
void attend_piece(const DecodeCall& call, const Piece& piece, const float* packed, float* partial) {
  const int64_t of_group = call.queries() / call.groups, size = partial_size(call);
  for (int64_t i = 0; i < call.queries() * size; ++i) partial[i] = 0;
  for (int64_t i = 0; i < call.queries(); ++i)
    partial[i * size + call.padded() + kMostLanes] = kNothing;
  Block<T> block(call, piece.row, piece.first, piece.end);
  for (int64_t first = piece.first; first < piece.end; first += kBlock) {
    // The next block may be of the next piece, which this thread most likely takes too.
    const Block<T> next(call, piece.row, first + kBlock,
                        first + kBlock < piece.end ? piece.end : piece.length);
    Work<T> work(call, block, next, piece.length - call.new_tokens + 1 - first);
    for (int64_t g = 0; g < call.groups; ++g) {
      for (int64_t i = 0; i < of_group;) {
        const int64_t query = g * of_group + i;
        const float* const q = packed + query * call.padded();
        float* const to = partial + query * size;
        const int64_t left = of_group - i;
        if (left >= kTile) {
          attend_tile<T, kTile>(work, g, i, q, to), i += kTile;
        } else if (left >= 2) {
          attend_tile<T, 2>(work, g, i, q, to), i += 2;
        } else {
          attend_tile<T, 1>(work, g, i, q, to), ++i;
        }
      }
    }
    block = next;
  }
}

template <typename T>
void pack_row(const DecodeCall& call, int64_t row, float* packed) {
  const int64_t heads_of_group = call.heads / call.groups;
  for (int64_t g = 0; g < call.groups; ++g)
    for (int64_t i = 0; i < call.new_tokens; ++i)
      for (int64_t h = 0; h < heads_of_group; ++h, packed += call.padded()) {
        const T* const from = (const T*)call.q + row * call.q_row_stride + i * call.q_token_stride +
                              (g * heads_of_group + h) * call.q_head_stride;
        over_pairs(call.width, [&](int64_t c, int64_t count) {
          const Operand<T> elements = operand(from + c, count);
          __builtin_memcpy(packed + c, &elements, sizeof elements);
        });
      }
}

// The greatest score of all, then every partial at it, in order.
template <typename T>
void merge_partials(const DecodeCall& call, const float* partial, int64_t count, int64_t stride,
                    T* out) {
  const int64_t padded = call.padded();
  float highest = kNothing, denominator = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float other = partial[i * stride + padded + kMostLanes];
    if (!(other <= highest)) highest = other;
  }
  const auto factor_of = [&](int64_t i) {
    const float greatest_of = partial[i * stride + padded + kMostLanes];
    return greatest_of == kNothing ? 0.0f : exp2(splat(greatest_of - highest))[0];
  };
  for (int64_t i = 0; i < count; ++i) {
    const float* const sums = partial + i * stride + padded;
    float sum = 0;
    for (int64_t lane = 0; lane < kMostLanes; lane += kLanes) sum += reduce_add(load(sums + lane));
    denominator += factor_of(i) * sum;
  }
  const float inverse = highest == kNothing ? 0 : 1 / denominator;
  over_pairs(call.width, [&](int64_t c, int64_t n) {
    Pair sum = {};
    for (int64_t i = 0; i < count; ++i)
      sum = sum + load_pair(partial + i * stride + c) * factor_of(i);
    store_pair(out + c, in_order(out, sum * inverse), n, false);
  });
}

void pack(const DecodeCall& call, int64_t row, float* packed) {
  with_type(call.dtype, [&](auto type) { pack_row<decltype(type)>(call, row, packed); });
}

void attend(const DecodeCall& call, const Piece& piece, const float* packed, float* partial) {
  with_type(call.dtype,
            [&](auto type) { attend_piece<decltype(type)>(call, piece, packed, partial); });
}

void merge(const DecodeCall& call, const float* partial, int64_t count, int64_t stride, void* out) {
  with_type(call.dtype,
            [&](auto type) { merge_partials(call, partial, count, stride, (decltype(type)*)out); });
}

}  // namespace

extern const DecodeAttention decode_attention{pack, attend, merge};

}  // namespace emu3::EMU3_LEVEL
