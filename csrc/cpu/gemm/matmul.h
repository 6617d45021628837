#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// A matrix in bfloat16. Strides count elements, and one of them is 1.
struct MatmulOperand {
  const void* data;
  int64_t row_stride, column_stride;
};

// C = A B + plus, accumulated in float32 and rounded once.
struct MatmulCall {
  int64_t M, K, N;
  MatmulOperand a, b;  // [M, K], [K, N]
  const void* plus;    // [M or 1, N] in the dtype of C with unit stride in N, or null
  int64_t plus_stride;
  void* c;
  Dtype c_dtype;
  int64_t c_stride;
};

// The block of C that is one task, and its K at a time: A packed in float32 fits the L2 cache.
constexpr int64_t kMC = 192, kKC = 288, kNC = 480;
// Multiples of the register tile and of a panel at every level.
constexpr int64_t kMUnit = 8, kNUnit = 48;
constexpr int64_t kBlockScratch = kMC * (kKC + kNC) + kKC * kNUnit;

struct Block {
  int64_t row, row_end, column, column_end;
};

// Up to this M, dot products read B where it is: packing it would not pay.
constexpr int64_t kSmallM = 16, kMaxPair = 32;

inline int64_t small_m_scratch(const MatmulCall& call) { return call.M * (call.K + 2 * kMaxPair); }

struct Matmul {
  void (*block)(const MatmulCall& call, const Block& block, float* scratch);
  // Columns [begin, end) of C for a small M; b.row_stride must be 1.
  void (*small_m)(const MatmulCall& call, int64_t begin, int64_t end, float* scratch);
};

EMU3_KERNELS(Matmul, matmul)

}  // namespace emu3
