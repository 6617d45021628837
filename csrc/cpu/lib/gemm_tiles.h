// Matrix products out of register tiles, the same for float and bfloat16: what is summed over comes
// in words.
// Included, like simd.h, only by files that are compiled once per level.
#pragma once

#include "cpu/lib/amx_tiles.h"

namespace emu3::EMU3_LEVEL {

// A panel is kPanel columns of the right factor. The tiles fill the registers with sums: kTall rows
// of a panel, or kFlat rows of up to kWide vectors. Every tile divides kStep. The left factor has
// whole kDeep words in a row, the right one whole kBroad columns.
#if defined(__AMX_BF16__)
constexpr int kTall = 32, kFlat = 32, kWide = 2, kPanelVectors = 2;
constexpr int64_t kStep = 32, kDeep = 16, kBroad = 32;
#else
#if defined(__AVX512F__)
constexpr int kTall = 8, kFlat = 6, kWide = 4, kPanelVectors = 3;
#else
constexpr int kTall = 4, kFlat = 6, kWide = 2, kPanelVectors = 3;
#endif
constexpr int64_t kStep = 24, kDeep = 1, kBroad = kLanes;
#endif
constexpr int64_t kPanel = kPanelVectors * kLanes;

// c (+)= a b: `depth` words of kRows rows of a, kVectors vectors of each row of b. Summed apart
// before it is added, so that errors grow with the length of a block and the number of blocks, not
// with their product.
template <typename Word, int kRows, int kVectors>
inline void add_tile(Words a, Words b, int64_t depth, Sums c, bool from_zero) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t p = 0; p < depth; ++p) {
    BitVec y[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) y[n] = load_words(b.data + p * b.stride + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const BitVec x = a.data[r * a.stride + p] - BitVec{};
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[r][n] = Word::dot(x, y[n], sum[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* const to = c.data + r * c.stride + n * kLanes;
      store(to, from_zero ? sum[r][n] : load(to) + sum[r][n]);
    }
}

// As add_tile, by as much as the registers hold at a time.
template <typename Word, int kRows, int kVectors>
inline void add_tiles(Words a, Words b, int64_t depth, Sums c, bool from_zero) {
#if defined(__AMX_BF16__)
  if constexpr (Word::kPer == 2) {
    static_assert(kRows == 2 * kTileRows && kVectors == 2);
    return add_amx_tiles(a, b, depth, c, from_zero);
  }
#endif
  constexpr int kHeld = kRows < 8 ? kRows : 8;
  for (int r = 0; r < kRows; r += kHeld)
    add_tile<Word, kHeld, kVectors>(a.at(r, 0), b, depth, c.at(r, 0), from_zero);
}

// Words that a panel sums without a break, for the same reason.
constexpr int64_t kLongest = 96;

// c (+)= a b for `rows`, a multiple of kTall, and one panel.
template <typename Word>
inline void multiply_panel(Words a, int64_t rows, Words b, int64_t depth, Sums c, bool from_zero) {
  for (int64_t p = 0; p < depth; p += kLongest) {
    const int64_t words = depth - p < kLongest ? depth - p : kLongest;
    for (int64_t r = 0; r < rows; r += kTall)
      add_tiles<Word, kTall, kPanelVectors>(a.at(r, p), b.at(p, 0), words, c.at(r, 0),
                                            from_zero && p == 0);
  }
}

// c += a b for kFlat rows and up to kWide vectors.
template <typename Word>
inline void add_flat(Words a, Words b, int64_t depth, Sums c, int64_t vectors) {
  if (vectors == kWide) return add_tiles<Word, kFlat, kWide>(a, b, depth, c, false);
  if constexpr (kBroad == kLanes) {
    if (vectors == 1) return add_tile<Word, kFlat, 1>(a, b, depth, c, false);
  }
  if constexpr (kWide > 2) {
    if (vectors == 2) return add_tile<Word, kFlat, 2>(a, b, depth, c, false);
    add_tile<Word, kFlat, 3>(a, b, depth, c, false);
  }
}

}  // namespace emu3::EMU3_LEVEL
