#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Numbers in bfloat16; the strides count elements and one of them is 1.
struct Factor {
  const void* data;
  int64_t row_stride, column_stride;
};

// c = a b + plus, summed in float32 and rounded once.
struct MatmulCall {
  int64_t rows, depth, columns;
  Factor a, b;       // [rows, depth], [depth, columns]
  const void* plus;  // in the dtype of c, its columns side by side; or null
  int64_t plus_stride;
  void* c;
  Dtype c_dtype;
  int64_t c_stride;
};

// One thread's work at a time: its part of a, widened, fits the second cache.
constexpr int64_t kBlockRows = 192, kBlockDepth = 288, kBlockColumns = 480;
// Whole tiles and panels of every level divide these.
constexpr int64_t kUnitRows = 8, kUnitColumns = 48;
constexpr int64_t kBlockScratch =
    kBlockRows * (kBlockDepth + kBlockColumns) + kBlockDepth * kUnitColumns;

struct Block {
  int64_t row, row_end, column, column_end;
};

// So many rows meet the columns of b where they lie, each in one piece, before b is worth widening.
constexpr int64_t kFewRows = 16, kMostPair = 32;

inline int64_t few_rows_scratch(const MatmulCall& call) {
  return call.rows * (call.depth + 2 * kMostPair);
}

struct Matmul {
  void (*block)(const MatmulCall& call, const Block& block, float* scratch);
  // Columns [begin, end) where there are few rows; b.row_stride is 1.
  void (*few_rows)(const MatmulCall& call, int64_t begin, int64_t end, float* scratch);
};

EMU3_KERNELS(Matmul, matmul)

}  // namespace emu3
