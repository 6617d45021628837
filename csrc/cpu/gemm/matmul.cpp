#include "cpu/gemm/matmul.h"

#include "cpu/lib/gemm_tiles.h"
#include "cpu/lib/packing.h"

namespace emu3::EMU3_LEVEL {
namespace {

static_assert(kBlockRows % kTall == 0 && kUnitRows % kTall == 0 && kUnitColumns % kPanel == 0);
static_assert(kBlockDepth % kLanes == 0 && kPair <= kMostPair);

const bfloat16* at(const Factor& x, int64_t row, int64_t column) {
  return (const bfloat16*)x.data + row * x.row_stride + column * x.column_stride;
}

// Elements [row, row + rows) x [column, column + columns) of x in float32, zeros up to whole
// vectors of columns and, where columns are what lies together, of rows.
void widen(const Factor& x, int64_t row, int64_t rows, int64_t column, int64_t columns, float* to,
           int64_t stride) {
  if (x.column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) widen_row(at(x, row + r, column), columns, to + r * stride);
    return;
  }
  float lines[kLanes][kLanes];
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i)
        if (c + i < columns) {
          widen_row(at(x, row + r, column + c + i), least(rows - r, kLanes), lines[i]);
        } else {
          store(lines[i], Vec{});
        }
      transpose((const uint32_t*)lines, kLanes, (uint32_t*)to + r * stride + c, stride);
    }
}

// One vector of a row of c.
void write(const MatmulCall& call, int64_t row, int64_t column, Vec sum, int64_t count) {
  with_type(call.c_dtype, [&](auto type) {
    typedef decltype(type) T;
    if (call.plus) {
      float plus[kLanes];
      widen_row((const T*)call.plus + row * call.plus_stride + column, least(count, kLanes), plus);
      sum += load(plus);
    }
    store_some((T*)call.c + row * call.c_stride + column, sum, count);
  });
}

void block(const MatmulCall& call, const Block& at, float* scratch) {
  const int64_t rows = at.row_end - at.row, tall = round_up(rows, kTall);
  float *const a = scratch, *const b = a + kBlockRows * kBlockDepth;
  float* const c = b + kBlockDepth * kPanel;
  for (int64_t p = 0; p < call.depth; p += kBlockDepth) {
    const int64_t depth = least(kBlockDepth, call.depth - p);
    widen(call.a, at.row, rows, p, depth, a, kBlockDepth);
    for (int64_t j = at.column; j < at.column_end; j += kPanel) {
      widen(call.b, p, depth, j, least(kPanel, at.column_end - j), b, kPanel);
      multiply_panel<Singles>({(const uint32_t*)a, kBlockDepth}, tall, {(const uint32_t*)b, kPanel},
                              depth, {c + (j - at.column) * kBlockRows, kPanel}, p == 0);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = at.column; j < at.column_end; j += kLanes) {
      const int64_t panel = (j - at.column) / kPanel * kPanel, lane = (j - at.column) % kPanel;
      const Vec sum = call.depth ? load(c + panel * kBlockRows + r * kPanel + lane) : Vec{};
      write(call, at.row + r, j, sum, at.column_end - j);
    }
}

// Sums of kRows rows, widened, with kColumns columns of b.
template <int kRows, int kColumns>
void dots(const MatmulCall& call, const float* a, int64_t row, int64_t column, float* sums) {
  const int64_t depth = round_up(call.depth, kPair);
  a += row * depth;
  Vec sum[kRows][kColumns] = {};
  over_pairs(call.depth, [&](int64_t p, int64_t count) {
    Pair x[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) x[r] = load_pair(a + r * depth + p);
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      const Pair w = load_pair(at(call.b, p, column + n), count);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][n] = fma(x[r].b, w.b, fma(x[r].a, w.a, sum[r][n]));
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) sums[(row + r) * kLanes + n] = reduce_add(sum[r][n]);
}

// kRows rows with columns [column, column + count), as many at a time as the registers hold.
template <int kRows>
void some_rows(const MatmulCall& call, const float* a, int64_t row, int64_t column, int64_t count,
               float* sums) {
  constexpr int kColumns = kRows == 4 ? 2 : 4;
  int64_t n = 0;
  for (; n + kColumns <= count; n += kColumns)
    dots<kRows, kColumns>(call, a, row, column + n, sums + n);
  for (; n < count; ++n) dots<kRows, 1>(call, a, row, column + n, sums + n);
}

void few_rows(const MatmulCall& call, int64_t begin, int64_t end, float* scratch) {
  const int64_t depth = round_up(call.depth, kPair);
  float *const a = scratch, *const sums = a + call.rows * depth;
  // In the order in which load_pair takes a column of b apart.
  for (int64_t r = 0; r < call.rows; ++r)
    over_pairs(call.depth, [&](int64_t p, int64_t count) {
      bfloat16 line[kPair] = {};
      for (int64_t i = 0; i < count; ++i) line[i] = *at(call.a, r, p + i);
      store_pair(a + r * depth + p, load_pair(line), false);
    });
  for (int64_t n = begin; n < end; n += kLanes) {
    const int64_t count = least(kLanes, end - n);
    int64_t r = 0;
    for (; r + 4 <= call.rows; r += 4) some_rows<4>(call, a, r, n, count, sums);
    for (; r + 2 <= call.rows; r += 2) some_rows<2>(call, a, r, n, count, sums);
    if (r < call.rows) some_rows<1>(call, a, r, n, count, sums);
    for (int64_t r = 0; r < call.rows; ++r) write(call, r, n, load(sums + r * kLanes), count);
  }
}

}  // namespace

extern const Matmul matmul{block, few_rows};

}  // namespace emu3::EMU3_LEVEL
