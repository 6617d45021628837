#include "cpu/gemm/matmul.h"

#include "cpu/lib/gemm_tiles.h"
#include "cpu/lib/packing.h"

namespace emu3::EMU3_LEVEL {
namespace {

static_assert(kMC % kMR == 0 && kMUnit % kMR == 0 && kNUnit % kNR == 0);
static_assert(kKC % kLanes == 0 && kPair <= kMaxPair);

const bfloat16* at(const MatmulOperand& x, int64_t row, int64_t column) {
  return (const bfloat16*)x.data + row * x.row_stride + column * x.column_stride;
}

// Packs elements [row, row + rows) x [column, column + columns) of x in float32. Columns are padded
// with zeros to whole vectors; rows too where x is column-major.
void pack(const MatmulOperand& x, int64_t row, int64_t rows, int64_t column, int64_t columns,
          float* to, int64_t stride) {
  if (x.column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r)
      row_to_float(at(x, row + r, column), columns, to + r * stride);
    return;
  }
  float lines[kLanes][kLanes];
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i)
        if (c + i < columns) {
          row_to_float(at(x, row + r, column + c + i), min(rows - r, kLanes), lines[i]);
        } else {
          store(lines[i], Vec{});
        }
      transpose((const uint32_t*)lines, kLanes, (uint32_t*)to + r * stride + c, stride);
    }
}

// Writes one vector of a row of C.
void write(const MatmulCall& call, int64_t row, int64_t column, Vec sum, int64_t count) {
  with_type(call.c_dtype, [&](auto type) {
    typedef decltype(type) T;
    if (call.plus) {
      float plus[kLanes];
      row_to_float((const T*)call.plus + row * call.plus_stride + column, min(count, kLanes), plus);
      sum += load(plus);
    }
    store_head((T*)call.c + row * call.c_stride + column, sum, count);
  });
}

void block(const MatmulCall& call, const Block& at, float* scratch) {
  const int64_t rows = at.row_end - at.row, tall = round_up(rows, kMR);
  float *const a = scratch, *const b = a + kMC * kKC;
  float* const c = b + kKC * kNR;
  for (int64_t p = 0; p < call.K; p += kKC) {
    const int64_t depth = min(kKC, call.K - p);
    pack(call.a, at.row, rows, p, depth, a, kKC);
    for (int64_t j = at.column; j < at.column_end; j += kNR) {
      pack(call.b, p, depth, j, min(kNR, at.column_end - j), b, kNR);
      gemm_panel<FloatDot>({(const uint32_t*)a, kKC}, tall, {(const uint32_t*)b, kNR}, depth,
                           {c + (j - at.column) * kMC, kNR}, p == 0);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = at.column; j < at.column_end; j += kLanes) {
      const int64_t panel = (j - at.column) / kNR * kNR, lane = (j - at.column) % kNR;
      const Vec sum = call.K ? load(c + panel * kMC + r * kNR + lane) : Vec{};
      write(call, at.row + r, j, sum, at.column_end - j);
    }
}

// Dot products of kRows packed rows of A and kColumns columns of B.
template <int kRows, int kColumns>
void dot_products(const MatmulCall& call, const float* a, int64_t row, int64_t column,
                  float* sums) {
  const int64_t depth = round_up(call.K, kPair);
  a += row * depth;
  Vec sum[kRows][kColumns] = {};
  over_pairs(call.K, [&](int64_t p, int64_t count) {
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

// kRows rows of A and columns [column, column + count) of B, as many at a time as fit the
// registers.
template <int kRows>
void small_m_rows(const MatmulCall& call, const float* a, int64_t row, int64_t column,
                  int64_t count, float* sums) {
  constexpr int kColumns = kRows == 4 ? 2 : 4;
  int64_t n = 0;
  for (; n + kColumns <= count; n += kColumns)
    dot_products<kRows, kColumns>(call, a, row, column + n, sums + n);
  for (; n < count; ++n) dot_products<kRows, 1>(call, a, row, column + n, sums + n);
}

void small_m(const MatmulCall& call, int64_t begin, int64_t end, float* scratch) {
  const int64_t depth = round_up(call.K, kPair);
  float *const a = scratch, *const sums = a + call.M * depth;
  // In the order of elements in which load_pair returns a column of B.
  for (int64_t r = 0; r < call.M; ++r)
    over_pairs(call.K, [&](int64_t p, int64_t count) {
      bfloat16 line[kPair] = {};
      for (int64_t i = 0; i < count; ++i) line[i] = *at(call.a, r, p + i);
      store_pair(a + r * depth + p, load_pair(line), false);
    });
  for (int64_t n = begin; n < end; n += kLanes) {
    const int64_t count = min(kLanes, end - n);
    int64_t r = 0;
    for (; r + 4 <= call.M; r += 4) small_m_rows<4>(call, a, r, n, count, sums);
    for (; r + 2 <= call.M; r += 2) small_m_rows<2>(call, a, r, n, count, sums);
    if (r < call.M) small_m_rows<1>(call, a, r, n, count, sums);
    for (int64_t r = 0; r < call.M; ++r) write(call, r, n, load(sums + r * kLanes), count);
  }
}

}  // namespace

extern const Matmul matmul{block, small_m};

}  // namespace emu3::EMU3_LEVEL
