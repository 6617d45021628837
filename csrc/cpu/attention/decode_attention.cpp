// decode_attention on the CPU: an online softmax over the keys of a split, one block of keys at a
// time. All KV heads of a block come before the next block, as in memory, and all query heads of a
// KV head while its keys and values are in the L1 cache.
#include "cpu/attention/decode_attention.h"

#include "cpu/lib/lanes16.h"

namespace emu3::EMU3_LEVEL {
namespace {

constexpr int kBlockKeys = 32;  // of a block: keys and values of 8 heads fit the L2 cache twice
constexpr int kQueries = 4;     // that share a load of keys or values
constexpr float kNegInf = -__builtin_inff();

// Operands of dot(): pairs of bfloat16 where the processor has a bfloat16 dot product, else floats.
#if defined(__AVX512BF16__)
inline BitVec load_operand(const bfloat16* from, int64_t count) {
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
inline Pair load_operand(const bfloat16* from, int64_t count) { return load_pair(from, count); }
#endif

inline Pair load_operand(const float* from, int64_t count) { return load_pair(from, count); }

inline Vec dot(Pair x, Pair y, Vec sum) { return fma(x.b, y.b, fma(x.a, y.a, sum)); }

template <typename T>
using Operand = decltype(load_operand((const T*)nullptr, 0));

// Loads a Pair vector by vector: GCC copies 64 bytes in pieces that stall a load of 32 after them.
inline void read(const float* from, Pair& x) { x = load_pair(from); }
inline void read(const float* from, BitVec& x) { __builtin_memcpy(&x, from, sizeof x); }

template <typename T>
struct ProbOf {
  using type = float;
};

#if defined(__AVX512BF16__)
template <>
struct ProbOf<bfloat16> {
  using type = uint16_t;
};
#endif

// The type of p: bfloat16 where the processor has a bfloat16 dot product.
template <typename T>
using Prob = typename ProbOf<T>::type;

// Returns a vector whose lane i is the sum of the lanes of x[i].
inline Vec reduce_each(const Vec* x) {
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

// Pointers to KV head 0 of the keys and values of a block. Keys past the last repeat it.
template <typename T>
struct Block {
  const T *k[kBlockKeys], *v[kBlockKeys];
  int64_t count;

  Block(const DecodeCall& call, int64_t row, int64_t first, int64_t end) {
    count = end - first < kBlockKeys ? end - first : kBlockKeys;
    for (int64_t j = 0; j < count; ++j) {
      int64_t at = row, key = first + j;
      if (call.pages.table) {
        at = call.pages.table[row * call.pages.row_stride + key / call.pages.page];
        key %= call.pages.page;
      }
      k[j] = (const T*)call.k.data + at * call.k.row_stride + key * call.k.key_stride;
      v[j] = (const T*)call.v.data + at * call.v.row_stride + key * call.v.key_stride;
    }
    for (int64_t j = count; j > 0 && j < kBlockKeys; ++j) k[j] = k[count - 1], v[j] = v[count - 1];
  }
};

// Prefetches the keys, or the values, of the next block in memory order, a few cache lines at each
// step of the arithmetic on this block: all at once would exceed the outstanding loads of a core.
template <typename T>
struct Prefetch {
  const T* const* rows;
  int64_t count, head_stride, kv_heads, head_dim, row = 0, kv_head = 0, column = 0;

  void step(int64_t elements) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < elements && row < count; i += kLine) {
      __builtin_prefetch(rows[row] + kv_head * head_stride + column, 0, 2);
      if ((column += kLine) < head_dim) continue;
      column = 0;
      if (++kv_head < kv_heads) continue;
      kv_head = 0, ++row;
    }
  }
};

// scores[r][j] = scale * dot(q_r, key_j) for `count` keys, rounded up to a multiple of kKeys.
template <typename T, int kRows>
void score(const DecodeCall& call, const float* packed, const T* const* keys, int64_t head,
           int64_t count, Prefetch<T>& next, float (*scores)[kBlockKeys]) {
  constexpr int kKeys = kLanes / kRows;
  const int64_t queries_stride = call.padded();
  for (int64_t j = 0; j < count; j += kKeys) {
    Vec sum[kRows][kKeys] = {};
    over_pairs(call.head_dim, [&](int64_t c, int64_t elements) {
      next.step(kKeys * kPair);
      Operand<T> key[kKeys];
      for (int n = 0; n < kKeys; ++n) key[n] = load_operand(keys[j + n] + head + c, elements);
      for (int r = 0; r < kRows; ++r) {
        Operand<T> query;
        read(packed + r * queries_stride + c, query);
        for (int n = 0; n < kKeys; ++n) sum[r][n] = dot(query, key[n], sum[r][n]);
      }
    });
    float all[kLanes];
    store(all, reduce_each(sum[0]) * call.scale);
    for (int r = 0; r < kRows; ++r) __builtin_memcpy(scores[r] + j, all + r * kKeys, 4 * kKeys);
  }
}

// Masks the scores of keys of new tokens, from `first_new` on, that are not in `word`.
inline void mask_scores(float* scores, uint64_t word, int64_t first_new, int64_t count) {
  for (int64_t j = first_new < 0 ? 0 : first_new; j < count; ++j)
    if (!(word >> (j - first_new) & 1)) scores[j] = kNegInf;
}

inline void store_p(float* to, Vec p_j) { store(to, p_j); }

inline void store_p(uint16_t* to, Vec p_j) {
  const HalfVec rounded = to_bfloat16(p_j);
  __builtin_memcpy(to, &rounded, sizeof rounded);
}

// One step of the online softmax of a query: p of the first `num_attended` scores, 0 for the
// others, and the partial softmax so far rescaled to the new m_i.
template <typename W>
void softmax_step(const DecodeCall& call, float* scores, int64_t num_attended, W* p,
                  float* partial) {
  float *const l_i_lanes = partial + call.padded(), *const m_ptr = l_i_lanes + kMaxLanes;
  for (int64_t j = num_attended < 0 ? 0 : num_attended; j < kBlockKeys; ++j) scores[j] = kNegInf;
  float m_i = *m_ptr;
  for (int j = 0; j < kBlockKeys; j += 16) {
    const Floats some = load16(scores + j);
    if (!less(splat16(m_i), some)) continue;
    const float m_old = m_i;
    m_i = reduce_max(some);
    const Vec alpha = exp2(splat(m_old - m_i));
    for (int64_t c = 0; c < call.padded() + kMaxLanes; c += kLanes)
      store(partial + c, load(partial + c) * alpha);
  }
  *m_ptr = m_i;
  // Without any attended key the difference would be NaN.
  const float m_safe = m_i == kNegInf ? 0 : m_i;
  for (int j = 0; j < kBlockKeys; j += kLanes) {
    const Vec p_j = exp2(load(scores + j) - m_safe);
    store_p(p + j, p_j);
    store(l_i_lanes + j % kMaxLanes, load(l_i_lanes + j % kMaxLanes) + p_j);
  }
}

// sum_r += sum_j p[r][j] * v_j, for `elements` elements of v_j from `from` on.
template <int kRows, typename T>
inline void add_pv(const float (*p)[kBlockKeys], const T* const* values, int64_t from,
                   int64_t elements, int64_t count, Prefetch<T>& next, Pair* sum) {
  for (int64_t j = 0; j < count; ++j) {
    next.step(kPair);
    const Pair value = load_pair(values[j] + from, elements);
    for (int r = 0; r < kRows; ++r) {
      const Vec p_j = splat(p[r][j]);
      sum[r] = fma({p_j, p_j}, value, sum[r]);
    }
  }
}

#if defined(__AVX512BF16__)
// As above, two keys per dot product. Unpacking interleaves two rows of v so that, of every eight
// elements, four go to each of the two sums. If `count` is odd, the last value is read twice, with
// p = 0.
template <int kRows>
inline void add_pv(const uint16_t (*p)[kBlockKeys], const bfloat16* const* values, int64_t from,
                   int64_t elements, int64_t count, Prefetch<bfloat16>& next, Pair* sum) {
  for (int64_t j = 0; j < count; j += 2) {
    next.step(2 * kPair);
    const auto one = (__m512i)load_operand(values[j] + from, elements);
    const auto two = (__m512i)load_operand(values[j + 1] + from, elements);
    const auto a = (BitVec)_mm512_unpacklo_epi16(one, two);
    const auto b = (BitVec)_mm512_unpackhi_epi16(one, two);
    for (int r = 0; r < kRows; ++r) {
      uint32_t both;
      __builtin_memcpy(&both, p[r] + j, sizeof both);
      const BitVec p_j = both - BitVec{};
      sum[r] = {dot(p_j, a, sum[r].a), dot(p_j, b, sum[r].b)};
    }
  }
}

// Returns the sums of add_pv in the order of load_pair.
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

// partial_r += sum_j p[r][j] * v_j
template <typename T, int kRows>
void add_values(const DecodeCall& call, const Prob<T> (*p)[kBlockKeys], const T* const* values,
                int64_t head, int64_t count, Prefetch<T>& next, float* partial) {
  const int64_t stride = partial_size(call);
  over_pairs(call.head_dim, [&](int64_t c, int64_t n) {
    Pair sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = load_pair(partial + r * stride + c);
    add_pv<kRows>(p, values, head + c, n, count, next, sum);
    for (int r = 0; r < kRows; ++r) store_pair(partial + r * stride + c, sum[r], false);
  });
}

// A block and the prefetch of the next one.
template <typename T>
struct Work {
  const DecodeCall& call;
  const Block<T>& block;
  int64_t first_query_keys;  // keys of the block to which the first query attends, unclamped
  const uint64_t* mask;      // of the batch entry
  Prefetch<T> k, v;

  Work(const DecodeCall& call, const Block<T>& block, const Block<T>& next, int64_t row,
       int64_t first_query_keys)
      : call(call),
        block(block),
        first_query_keys(first_query_keys),
        mask(call.mask ? call.mask + row * call.new_tokens : nullptr),
        k{next.k, next.count, call.k.head_stride, call.kv_heads, call.head_dim},
        v{next.v, next.count, call.v.head_stride, call.kv_heads, call.head_dim} {}
};

// Queries [query, query + kRows) of KV head g.
template <typename T, int kRows>
void attend_tile(Work<T>& work, int64_t g, int64_t query, const float* packed, float* partial) {
  const DecodeCall& call = work.call;
  const Block<T>& block = work.block;
  const int64_t heads_per_kv = call.heads / call.kv_heads;
  float scores[kRows][kBlockKeys];
  Prob<T> p[kRows][kBlockKeys];
  score<T, kRows>(call, packed, block.k, g * call.k.head_stride, block.count, work.k, scores);
  for (int r = 0; r < kRows; ++r) {
    const int64_t token = (query + r) / heads_per_kv;
    int64_t num_attended = work.first_query_keys + token;
    if (work.mask) {
      mask_scores(scores[r], work.mask[token], work.first_query_keys - 1, block.count);
      num_attended = block.count;
    }
    softmax_step(call, scores[r], num_attended < block.count ? num_attended : block.count, p[r],
                 partial + r * partial_size(call));
  }
  add_values<T, kRows>(call, p, block.v, g * call.v.head_stride, block.count, work.v, partial);
}

template <typename T>
void attend_split(const DecodeCall& call, const KeySplit& split, const float* packed,
                  float* partial) {
  const int64_t queries_per_kv = call.queries() / call.kv_heads, size = partial_size(call);
  for (int64_t i = 0; i < call.queries() * size; ++i) partial[i] = 0;
  for (int64_t i = 0; i < call.queries(); ++i)
    partial[i * size + call.padded() + kMaxLanes] = kNegInf;
  Block<T> block(call, split.row, split.first, split.end);
  for (int64_t first = split.first; first < split.end; first += kBlockKeys) {
    // The next block may belong to the next split, which this thread most likely takes too.
    const Block<T> next(call, split.row, first + kBlockKeys,
                        first + kBlockKeys < split.end ? split.end : split.length);
    Work<T> work(call, block, next, split.row, split.length - call.new_tokens + 1 - first);
    for (int64_t g = 0; g < call.kv_heads; ++g) {
      for (int64_t i = 0; i < queries_per_kv;) {
        const int64_t query = g * queries_per_kv + i;
        const float* const q = packed + query * call.padded();
        float* const to = partial + query * size;
        const int64_t left = queries_per_kv - i;
        if (left >= kQueries) {
          attend_tile<T, kQueries>(work, g, i, q, to), i += kQueries;
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
  const int64_t heads_per_kv = call.heads / call.kv_heads;
  for (int64_t g = 0; g < call.kv_heads; ++g)
    for (int64_t i = 0; i < call.new_tokens; ++i)
      for (int64_t h = 0; h < heads_per_kv; ++h, packed += call.padded()) {
        const T* const from = (const T*)call.q + row * call.q_row_stride + i * call.q_token_stride +
                              (g * heads_per_kv + h) * call.q_head_stride;
        over_pairs(call.head_dim, [&](int64_t c, int64_t count) {
          const Operand<T> elements = load_operand(from + c, count);
          __builtin_memcpy(packed + c, &elements, sizeof elements);
        });
      }
}

// Merges partial softmaxes: the maximum m_i, then the sum of all partials rescaled to it, in order.
template <typename T>
void merge_partials(const DecodeCall& call, const float* partial, int64_t count, int64_t stride,
                    T* out) {
  const int64_t padded = call.padded();
  float m_i = kNegInf, l_i = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float other = partial[i * stride + padded + kMaxLanes];
    if (!(other <= m_i)) m_i = other;
  }
  const auto alpha_of = [&](int64_t i) {
    const float m_split = partial[i * stride + padded + kMaxLanes];
    return m_split == kNegInf ? 0.0f : exp2(splat(m_split - m_i))[0];
  };
  for (int64_t i = 0; i < count; ++i) {
    const float* const l_i_lanes = partial + i * stride + padded;
    float sum = 0;
    for (int64_t lane = 0; lane < kMaxLanes; lane += kLanes)
      sum += reduce_add(load(l_i_lanes + lane));
    l_i += alpha_of(i) * sum;
  }
  const float inverse = m_i == kNegInf ? 0 : 1 / l_i;
  over_pairs(call.head_dim, [&](int64_t c, int64_t n) {
    Pair sum = {};
    for (int64_t i = 0; i < count; ++i)
      sum = sum + load_pair(partial + i * stride + c) * alpha_of(i);
    store_pair(out + c, in_order(out, sum * inverse), n, false);
  });
}

void pack(const DecodeCall& call, int64_t row, float* packed) {
  with_type(call.dtype, [&](auto type) { pack_row<decltype(type)>(call, row, packed); });
}

void attend(const DecodeCall& call, const KeySplit& split, const float* packed, float* partial) {
  with_type(call.dtype,
            [&](auto type) { attend_split<decltype(type)>(call, split, packed, partial); });
}

void merge(const DecodeCall& call, const float* partial, int64_t count, int64_t stride, void* out) {
  with_type(call.dtype,
            [&](auto type) { merge_partials(call, partial, count, stride, (decltype(type)*)out); });
}

}  // namespace

extern const DecodeAttention decode_attention{pack, attend, merge};

}  // namespace emu3::EMU3_LEVEL
