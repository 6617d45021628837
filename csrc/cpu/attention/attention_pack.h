// Packed layouts of blocks of rows as GEMM operands, with K along a row or down a column, and both
// transposed; and the key range of a block of queries. Include only in files that are compiled once
// per level, as simd.h.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/lib/gemm_tiles.h"
#include "cpu/lib/packing.h"

namespace emu3::EMU3_LEVEL {

// e^x. The factor is applied to the difference x, after the cancellation, so that it adds no error.
inline Vec exp(Vec x) { return exp2(x * 1.44269504f); }

// Divides a buffer into arrays of whole cache lines; from null, `next` is the size.
struct Arena {
  uintptr_t next;

  explicit Arena(const char* buffer) : next(reinterpret_cast<uintptr_t>(buffer)) {}

  template <typename T>
  void take(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(next);
    next += round_up(count * sizeof(T), 64);
  }
};

// Sizes of the blocks of a call. head_dim is padded to whole vectors and tiles, query rows to whole
// panels.
template <typename T>
struct Sizes {
  typedef typename DotOf<T>::type Dot;
  int64_t head_dim, columns, depth, words, rows, panels, keys;

  explicit Sizes(const AttentionCall& call)
      : head_dim(call.head_dim),
        columns(round_up(head_dim, kNAlign)),
        depth(round_up((head_dim + Dot::kPerWord - 1) / Dot::kPerWord, kKAlign)),
        words(round_up(depth, kLanes)),
        rows(round_up(call.query_block * call.heads_per_kv(), kNR)),
        panels(rows / kNR),
        keys(call.key_block) {}

  int64_t key_words() const { return keys / Dot::kPerWord; }
  int64_t row_words() const { return rows / Dot::kPerWord; }
};

template <typename T>
inline T* row_of(const TokenHeads& x, int64_t batch, int64_t token, int64_t head) {
  return (T*)x.data + batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
}

inline void write_row(const TokenHeads& x, int64_t batch, int64_t token, int64_t head,
                      const float* from, int64_t head_dim) {
  with_type(x.dtype, [&](auto type) {
    auto* const to = row_of<decltype(type)>(x, batch, token, head);
    for (int64_t c = 0; c < head_dim; c += kLanes) store_head(to + c, load(from + c), head_dim - c);
  });
}

// Packs words with K along the row; null is a row of zeros.
template <typename T>
inline void along_row(FloatDot, const T* row, int64_t head_dim, uint32_t* to) {
  if (!row) return void(__builtin_memset(to, 0, round_up(head_dim, kLanes) * sizeof *to));
  row_to_float(row, head_dim, (float*)to);
}

// Packs words with K down the column: an element of `a` and the one of `b` below it.
template <typename T>
inline void down_column(FloatDot, const T* a, const T*, int64_t head_dim, uint32_t* to) {
  along_row(FloatDot{}, a, head_dim, to);
}

#if defined(__AVX512BF16__)
inline void along_row(Bfloat16PairDot, const bfloat16* row, int64_t head_dim, uint32_t* to) {
  const int64_t words = round_up((head_dim + 1) / 2, kLanes);
  if (!row || head_dim % kPair) __builtin_memset(to, 0, words * sizeof *to);
  if (row) __builtin_memcpy(to, row, head_dim * sizeof *row);
}

inline BitVec halves(const bfloat16* from, int64_t count) {
  HalfVec half{};
  if (!from) return BitVec{};
  if (count >= kLanes) {
    __builtin_memcpy(&half, from, sizeof half);
  } else {
    __builtin_memcpy(&half, from, count * sizeof *from);
  }
  return __builtin_convertvector(half, BitVec);
}

inline void down_column(Bfloat16PairDot, const bfloat16* a, const bfloat16* b, int64_t head_dim,
                        uint32_t* to) {
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    const BitVec upper = halves(b ? b + c : b, head_dim - c) << 16;
    store_words(to + c, halves(a ? a + c : a, head_dim - c) | upper);
  }
}
#endif

// Transposes kLanes rows of `words` words, a multiple of kLanes.
inline void transpose_rows(const uint32_t* from, int64_t words, uint32_t* to, int64_t to_stride) {
  for (int64_t c = 0; c < words; c += kLanes)
    transpose(from + c, words, to + c * to_stride, to_stride);
}

// The rows of a block of queries for one KV head: all its heads of a query, then those of the next.
// Rows beyond the last are null.
template <typename T>
struct QueryRows {
  const TokenHeads& x;
  int64_t batch, head, heads_per_kv, first, count;

  QueryRows(const AttentionCall& call, const TokenHeads& x, int64_t sequence, int64_t block)
      : x(x),
        batch(sequence / call.kv_heads),
        head(sequence % call.kv_heads * call.heads_per_kv()),
        heads_per_kv(call.heads_per_kv()),
        first(block * call.query_block),
        count(min(call.query_block, call.queries - first) * heads_per_kv) {}

  int64_t token(int64_t row) const { return first + row / heads_per_kv; }
  int64_t head_of(int64_t row) const { return head + row % heads_per_kv; }
  T* operator()(int64_t row) const {
    return row < count ? row_of<T>(x, batch, token(row), head_of(row)) : nullptr;
  }
};

// The rows of a block of keys. Rows beyond the last are null.
template <typename T>
struct KeyRows {
  const TokenHeads& x;
  int64_t batch, kv_head, first, count;

  KeyRows(const AttentionCall& call, const TokenHeads& x, int64_t sequence, int64_t block)
      : x(x),
        batch(sequence / call.kv_heads),
        kv_head(sequence % call.kv_heads),
        first(block * call.key_block),
        count(min(call.key_block, call.keys - first)) {}

  T* operator()(int64_t row) const {
    return row < count ? row_of<T>(x, batch, first + row, kv_head) : nullptr;
  }
};

// [rows][depth]
template <typename T, typename Rows>
inline void pack_rows(const Sizes<T>& sizes, const Rows& row, int64_t rows, uint32_t* to,
                      uint32_t* line) {
  for (int64_t r = 0; r < rows; ++r) {
    along_row(typename Sizes<T>::Dot{}, row(r), sizes.head_dim, line);
    __builtin_memcpy(to + r * sizes.depth, line, sizes.depth * sizeof *to);
  }
}

// [panels][words][kNR]
template <typename T, typename Rows>
inline void pack_panels(const Sizes<T>& sizes, const Rows& row, uint32_t* to, uint32_t* lines) {
  for (int64_t r = 0; r < sizes.rows; r += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i)
      along_row(typename Sizes<T>::Dot{}, row(r + i), sizes.head_dim, lines + i * sizes.words);
    uint32_t* const panel = to + r / kNR * kNR * sizes.words;
    transpose_rows(lines, sizes.words, panel + r % kNR, kNR);
  }
}

// [rows / kPerWord][columns]
template <typename T, typename Rows>
inline void pack_columns(const Sizes<T>& sizes, const Rows& row, int64_t rows, uint32_t* to) {
  typedef typename Sizes<T>::Dot Dot;
  for (int64_t r = 0; r < rows; r += Dot::kPerWord)
    down_column(Dot{}, row(r), row(r + 1), sizes.head_dim, to + r / Dot::kPerWord * sizes.columns);
}

// [columns][keys / kPerWord]
template <typename T, typename Rows>
inline void pack_transposed(const Sizes<T>& sizes, const Rows& row, uint32_t* to, uint32_t* lines) {
  typedef typename Sizes<T>::Dot Dot;
  for (int64_t word = 0; word < sizes.key_words(); word += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t r = (word + i) * Dot::kPerWord;
      down_column(Dot{}, row(r), row(r + 1), sizes.head_dim, lines + i * sizes.columns);
    }
    transpose_rows(lines, sizes.columns, to + word, sizes.key_words());
  }
}

// The key range of each row of a block of queries and, with dropout, its position and head.
struct QueryInfo {
  int32_t *first, *end;
  uint32_t *position, *head;

  void take(Arena& arena, int64_t rows) {
    arena.take(first, rows);
    arena.take(end, rows);
    arena.take(position, rows);
    arena.take(head, rows);
  }

  // Rows beyond the last get the key range of the last, so that they need no mask.
  template <typename T>
  void fill(const AttentionCall& call, const QueryRows<T>& rows, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = min(r, rows.count - 1), token = rows.token(row);
      const int64_t offset = rows.batch * call.range_stride + token;
      first[r] = call.first[offset], end[r] = call.end[offset];
      if (!call.dropout.drop_below) continue;
      position[r] = call.rows[token];
      head[r] = call.first_head + rows.batch * call.all_heads + rows.head_of(row);
    }
  }
};

// The keys [from, to) of a block, counted from its first, to which any row of a panel attends.
// `masked`: some row does not attend to all of them.
struct KeyRange {
  int64_t from, to;
  bool masked;

  KeyRange() = default;
  KeyRange(const QueryInfo& info, int64_t panel, int64_t first_key, int64_t keys) {
    const int64_t row = panel * kNR, last = row + kNR - 1;
    from = max(info.first[row] - first_key, 0) / kMAlign * kMAlign;
    to = round_up(max(min(info.end[last] - first_key, keys), 0), kMAlign);
    masked = info.first[last] > first_key + from || info.end[row] < first_key + to;
  }
};

}  // namespace emu3::EMU3_LEVEL
