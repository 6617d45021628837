// A GEMM micro-kernel on AMX, whose tile registers are 16 rows of 16 words.
// Include only in files that are compiled once per level, as simd.h. Below the AMX level this file
// only defines a TileUse that does nothing.
#pragma once

#include "cpu/lib/words.h"

namespace emu3::EMU3_LEVEL {

#if defined(__AMX_BF16__)
constexpr int kTileRows = 16;

// Configures all eight tile registers of this thread at full size until it is destroyed. A thread
// with configured tiles costs the operating system 8 KiB more at every context switch.
struct TileUse {
  TileUse() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    static_assert(sizeof shape == 64);
    _tile_loadconfig(&shape);
  }
  TileUse(const TileUse&) = delete;
  ~TileUse() { _tile_release(); }
};

// C (+)= A B for M = N = 32 and K a multiple of 16 words. Every loaded tile of A and B is used
// twice. TDPBF16PS flushes inputs below 2^-126 to zero and sums even and odd elements of K apart
// before it adds them to C.
inline void amx_tile(Operand a, Operand b, int64_t depth, Accumulator c, bool overwrite) {
  const int64_t a_stride = a.stride * sizeof *a.data, b_stride = b.stride * sizeof *b.data;
  const int64_t c_stride = c.stride * sizeof *c.data;
  const Operand lower = a.at(kTileRows, 0), right = b.at(0, kTileRows);
  const Accumulator c_right = c.at(0, kTileRows), c_lower = c.at(kTileRows, 0);
  const Accumulator c_last = c.at(kTileRows, kTileRows);
  if (overwrite) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c.data, c_stride);
    _tile_loadd(1, c_right.data, c_stride);
    _tile_loadd(2, c_lower.data, c_stride);
    _tile_loadd(3, c_last.data, c_stride);
  }
  for (int64_t p = 0; p < depth; p += 16) {
    _tile_loadd(6, b.at(p, 0).data, b_stride);
    _tile_loadd(4, a.at(0, p).data, a_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, lower.at(0, p).data, a_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, right.at(p, 0).data, b_stride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c.data, c_stride);
  _tile_stored(1, c_right.data, c_stride);
  _tile_stored(2, c_lower.data, c_stride);
  _tile_stored(3, c_last.data, c_stride);
}
#else
struct TileUse {
  TileUse() {}
};
#endif

}  // namespace emu3::EMU3_LEVEL
