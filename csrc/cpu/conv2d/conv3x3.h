#pragma once

#include <stdint.h>

#include "cpu/lib/levels.h"

namespace emu3 {

// A 3x3 convolution with zeros around, channels last and in bfloat16, as Winograd's F(4x4, 3x3): a
// tile of 4x4 results comes out of 6x6 pixels by products at 36 points instead of 144.
constexpr int64_t kSide = 4, kPoints = 36;
constexpr int64_t kPanelOut = 64;   // channels out whose weights lie together
constexpr int64_t kMostTiles = 96;  // at work at once; the most rows of a register tile divide it

struct Conv3x3Call {
  int64_t height, width, in, out;
  const void* x;         // [B, height, width, in]
  const float* panels;   // [out / kPanelOut, kPoints, in, kPanelOut]
  const float* bias;     // [out]
  const void* residual;  // [B, height, width, out] or null
  void* y;               // [B, height, width, out]

  int64_t rows() const { return (height + kSide - 1) / kSide; }
  int64_t columns() const { return (width + kSide - 1) / kSide; }
};

// Floats for the pixels of a block of tiles at the points, and their products with a panel.
inline int64_t conv3x3_scratch(const Conv3x3Call& call) {
  return kPoints * kMostTiles * (call.in + kPanelOut);
}

struct Conv3x3 {
  // Takes channels in [begin, end) of weight [kPanelOut, 3, 3, in] to the points of a panel.
  void (*pack)(const void* weight, int64_t in, int64_t begin, int64_t end, float* panel);
  // The results of tiles [first, first + count), counted through the batch, count <= kMostTiles.
  void (*results)(const Conv3x3Call& call, int64_t first, int64_t count, float* scratch);
};

EMU3_KERNELS(Conv3x3, conv3x3)

}  // namespace emu3
