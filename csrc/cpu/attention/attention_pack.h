// The forms in which the kernels of attention keep blocks of rows: words along a row, words down a
// column, and both transposed; and which keys a block of queries sees. Included, like simd.h, only
// by files that are compiled once per level.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/lib/gemm_tiles.h"
#include "cpu/lib/packing.h"

namespace emu3::EMU3_LEVEL {

// Right where the argument comes of a difference: the factor does not meet what has cancelled.
inline Vec exp(Vec x) { return exp2(x * 1.44269504f); }

// Deals out a buffer in pieces of whole cache lines; from null, it counts them.
struct Pieces {
  uintptr_t next;

  explicit Pieces(const char* buffer) : next(reinterpret_cast<uintptr_t>(buffer)) {}

  template <typename T>
  void take(T*& piece, int64_t count) {
    piece = reinterpret_cast<T*>(next);
    next += round_up(count * sizeof(T), 64);
  }
};

// The extents of a call's blocks. Columns and words of a row are padded to whole vectors and tiles,
// query rows to whole panels.
template <typename T>
struct Extents {
  typedef typename WordsOf<T>::type Word;
  int64_t width, columns, depth, words, rows, panels, keys;

  explicit Extents(const AttentionCall& call)
      : width(call.width),
        columns(round_up(width, kBroad)),
        depth(round_up((width + Word::kPer - 1) / Word::kPer, kDeep)),
        words(round_up(depth, kLanes)),
        rows(round_up(call.query_block * call.shared(), kPanel)),
        panels(rows / kPanel),
        keys(call.key_block) {}

  int64_t key_words() const { return keys / Word::kPer; }
  int64_t row_words() const { return rows / Word::kPer; }
};

template <typename T>
inline T* row_of(const TokenHeads& x, int64_t batch, int64_t token, int64_t head) {
  return (T*)x.data + batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
}

inline void write_row(const TokenHeads& x, int64_t batch, int64_t token, int64_t head,
                      const float* from, int64_t width) {
  with_type(x.dtype, [&](auto type) {
    auto* const to = row_of<decltype(type)>(x, batch, token, head);
    for (int64_t c = 0; c < width; c += kLanes) store_some(to + c, load(from + c), width - c);
  });
}

// Words of two numbers of a row; null is a row of zeros.
template <typename T>
inline void along_row(Singles, const T* row, int64_t width, uint32_t* to) {
  if (!row) return void(__builtin_memset(to, 0, round_up(width, kLanes) * sizeof *to));
  widen_row(row, width, (float*)to);
}

// Words of a number of `a` and the one of `b` below it.
template <typename T>
inline void down_column(Singles, const T* a, const T*, int64_t width, uint32_t* to) {
  along_row(Singles{}, a, width, to);
}

#if defined(__AVX512BF16__)
inline void along_row(Pairs, const bfloat16* row, int64_t width, uint32_t* to) {
  const int64_t words = round_up((width + 1) / 2, kLanes);
  if (!row || width % kPair) __builtin_memset(to, 0, words * sizeof *to);
  if (row) __builtin_memcpy(to, row, width * sizeof *row);
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

inline void down_column(Pairs, const bfloat16* a, const bfloat16* b, int64_t width, uint32_t* to) {
  for (int64_t c = 0; c < width; c += kLanes) {
    const BitVec upper = halves(b ? b + c : b, width - c) << 16;
    store_words(to + c, halves(a ? a + c : a, width - c) | upper);
  }
}
#endif

// kLanes rows of `words`, a multiple of kLanes.
inline void transpose_rows(const uint32_t* from, int64_t words, uint32_t* to, int64_t to_stride) {
  for (int64_t c = 0; c < words; c += kLanes)
    transpose(from + c, words, to + c * to_stride, to_stride);
}

// The rows of a block of queries in one group: all heads of a query, then those of the next. Rows
// beyond the last are null.
template <typename T>
struct QueryRows {
  const TokenHeads& x;
  int64_t batch, head, shared, first, count;

  QueryRows(const AttentionCall& call, const TokenHeads& x, int64_t sequence, int64_t block)
      : x(x),
        batch(sequence / call.groups),
        head(sequence % call.groups * call.shared()),
        shared(call.shared()),
        first(block * call.query_block),
        count(least(call.query_block, call.queries - first) * shared) {}

  int64_t token(int64_t row) const { return first + row / shared; }
  int64_t head_of(int64_t row) const { return head + row % shared; }
  T* operator()(int64_t row) const {
    return row < count ? row_of<T>(x, batch, token(row), head_of(row)) : nullptr;
  }
};

// The rows of a block of keys; beyond the last, null.
template <typename T>
struct KeyRows {
  const TokenHeads& x;
  int64_t batch, group, first, count;

  KeyRows(const AttentionCall& call, const TokenHeads& x, int64_t sequence, int64_t block)
      : x(x),
        batch(sequence / call.groups),
        group(sequence % call.groups),
        first(block * call.key_block),
        count(least(call.key_block, call.keys - first)) {}

  T* operator()(int64_t row) const {
    return row < count ? row_of<T>(x, batch, first + row, group) : nullptr;
  }
};

// [rows][depth]
template <typename T, typename Rows>
inline void pack_rows(const Extents<T>& extents, const Rows& row, int64_t rows, uint32_t* to,
                      uint32_t* line) {
  for (int64_t r = 0; r < rows; ++r) {
    along_row(typename Extents<T>::Word{}, row(r), extents.width, line);
    __builtin_memcpy(to + r * extents.depth, line, extents.depth * sizeof *to);
  }
}

// [panels][words][kPanel]
template <typename T, typename Rows>
inline void pack_panels(const Extents<T>& extents, const Rows& row, uint32_t* to, uint32_t* lines) {
  for (int64_t r = 0; r < extents.rows; r += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i)
      along_row(typename Extents<T>::Word{}, row(r + i), extents.width, lines + i * extents.words);
    uint32_t* const panel = to + r / kPanel * kPanel * extents.words;
    transpose_rows(lines, extents.words, panel + r % kPanel, kPanel);
  }
}

// [rows / kPer][columns]
template <typename T, typename Rows>
inline void pack_columns(const Extents<T>& extents, const Rows& row, int64_t rows, uint32_t* to) {
  typedef typename Extents<T>::Word Word;
  for (int64_t r = 0; r < rows; r += Word::kPer)
    down_column(Word{}, row(r), row(r + 1), extents.width, to + r / Word::kPer * extents.columns);
}

// [columns][keys / kPer]
template <typename T, typename Rows>
inline void pack_transposed(const Extents<T>& extents, const Rows& row, uint32_t* to,
                            uint32_t* lines) {
  typedef typename Extents<T>::Word Word;
  for (int64_t word = 0; word < extents.key_words(); word += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t r = (word + i) * Word::kPer;
      down_column(Word{}, row(r), row(r + 1), extents.width, lines + i * extents.columns);
    }
    transpose_rows(lines, extents.columns, to + word, extents.key_words());
  }
}

// Of each row of a block of queries: its span and, where any is dropped, its place.
struct QueryLanes {
  int32_t *first, *end;
  uint32_t *position, *head;

  void take(Pieces& pieces, int64_t rows) {
    pieces.take(first, rows);
    pieces.take(end, rows);
    pieces.take(position, rows);
    pieces.take(head, rows);
  }

  // Rows beyond the last see what the last sees, so that they hide nothing.
  template <typename T>
  void fill(const AttentionCall& call, const QueryRows<T>& rows, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = least(r, rows.count - 1), token = rows.token(row);
      const int64_t span = rows.batch * call.span_stride + token;
      first[r] = call.first[span], end[r] = call.end[span];
      if (!call.dropout.drop_below) continue;
      position[r] = call.rows[token];
      head[r] = rows.batch * call.heads + rows.head_of(row);
    }
  }
};

// Keys of a block, counted from its first, that the rows of a panel see between them; hidden tells
// whether one of them does not see all of these.
struct Seen {
  int64_t from, to;
  bool hidden;

  Seen() = default;
  Seen(const QueryLanes& lanes, int64_t panel, int64_t first_key, int64_t keys) {
    const int64_t row = panel * kPanel, last = row + kPanel - 1;
    from = most(lanes.first[row] - first_key, 0) / kStep * kStep;
    to = round_up(most(least(lanes.end[last] - first_key, keys), 0), kStep);
    hidden = lanes.first[last] > first_key + from || lanes.end[row] < first_key + to;
  }
};

}  // namespace emu3::EMU3_LEVEL
