// GEMM micro-kernels for float and bfloat16: C (+)= A B with A [M, K] and B [K, N], where K is
// counted in the words of words.h. Include only in files that are compiled once per level, as
// simd.h.
#pragma once

#include "cpu/lib/amx_tiles.h"

namespace emu3::EMU3_LEVEL {

// There are two register tiles of C: kMR rows x kNR columns for packed panels of B (kNRVectors
// vectors), and kMRWide rows x up to kNRWide vectors for a row-major B. Both heights divide
// kMAlign. Rows of A are padded to kKAlign words, rows of B to kNAlign columns.
#if defined(__AMX_BF16__)
constexpr int kMR = 32, kMRWide = 32, kNRWide = 2, kNRVectors = 2;
constexpr int64_t kMAlign = 32, kKAlign = 16, kNAlign = 32;
#else
#if defined(__AVX512F__)
constexpr int kMR = 8, kMRWide = 6, kNRWide = 4, kNRVectors = 3;
#else
constexpr int kMR = 4, kMRWide = 6, kNRWide = 2, kNRVectors = 3;
#endif
constexpr int64_t kMAlign = 24, kKAlign = 1, kNAlign = kLanes;
#endif
constexpr int64_t kNR = kNRVectors * kLanes;

// C (+)= A B for kRows rows, kVectors vectors of columns and `depth` words of K. The accumulators
// start at zero and are added to C once, so that rounding errors grow with the length of a block
// plus the number of blocks, not with their product.
template <typename Dot, int kRows, int kVectors>
inline void micro_kernel(Operand a, Operand b, int64_t depth, Accumulator c, bool overwrite) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < depth; ++p) {
    BitVec y[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) y[n] = load_words(b.data + p * b.stride + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const BitVec x = a.data[r * a.stride + p] - BitVec{};
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[r][n] = Dot::dot(x, y[n], sum[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* const to = c.data + r * c.stride + n * kLanes;
      store(to, overwrite ? sum[r][n] : load(to) + sum[r][n]);
    }
}

// As micro_kernel, in parts of as many rows as fit the registers.
template <typename Dot, int kRows, int kVectors>
inline void register_tile(Operand a, Operand b, int64_t depth, Accumulator c, bool overwrite) {
#if defined(__AMX_BF16__)
  if constexpr (Dot::kPerWord == 2) {
    static_assert(kRows == 2 * kTileRows && kVectors == 2);
    return amx_tile(a, b, depth, c, overwrite);
  }
#endif
  constexpr int kHeld = kRows < 8 ? kRows : 8;
  for (int r = 0; r < kRows; r += kHeld)
    micro_kernel<Dot, kHeld, kVectors>(a.at(r, 0), b, depth, c.at(r, 0), overwrite);
}

// The most words of K that gemm_panel accumulates before it adds to C, for the same reason.
constexpr int64_t kMaxChain = 96;

// C (+)= A B for `rows` rows, a multiple of kMR, and one panel of B.
template <typename Dot>
inline void gemm_panel(Operand a, int64_t rows, Operand b, int64_t depth, Accumulator c,
                       bool overwrite) {
  for (int64_t p = 0; p < depth; p += kMaxChain) {
    const int64_t words = depth - p < kMaxChain ? depth - p : kMaxChain;
    for (int64_t r = 0; r < rows; r += kMR)
      register_tile<Dot, kMR, kNRVectors>(a.at(r, p), b.at(p, 0), words, c.at(r, 0),
                                          overwrite && p == 0);
  }
}

// C += A B for kMRWide rows and up to kNRWide vectors of columns.
template <typename Dot>
inline void gemm_wide(Operand a, Operand b, int64_t depth, Accumulator c, int64_t vectors) {
  if (vectors == kNRWide) return register_tile<Dot, kMRWide, kNRWide>(a, b, depth, c, false);
  if constexpr (kNAlign == kLanes) {
    if (vectors == 1) return micro_kernel<Dot, kMRWide, 1>(a, b, depth, c, false);
  }
  if constexpr (kNRWide > 2) {
    if (vectors == 2) return micro_kernel<Dot, kMRWide, 2>(a, b, depth, c, false);
    micro_kernel<Dot, kMRWide, 3>(a, b, depth, c, false);
  }
}

}  // namespace emu3::EMU3_LEVEL
