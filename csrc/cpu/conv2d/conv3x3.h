#pragma once

#include <stdint.h>

#include "cpu/lib/levels.h"

namespace emu3 {

// A 3x3 convolution with zero padding, channels last and in bfloat16, as Winograd F(4x4, 3x3): a
// tile of 4x4 outputs is computed from 6x6 inputs with 36 multiplications a channel instead of 144.
constexpr int64_t kSide = 4, kPoints = 36;
constexpr int64_t kOutBlock = 64;  // output channels of a packed weight
constexpr int64_t kMaxTiles = 96;  // of a task; a multiple of kMRWide at every level

struct Conv3x3Call {
  int64_t height, width, in, out;
  const void* x;                // [B, height, width, in]
  const float* packed_weights;  // [out / kOutBlock, kPoints, in, kOutBlock]
  const float* bias;            // [out]
  const void* residual;         // [B, height, width, out] or null
  void* y;                      // [B, height, width, out]

  int64_t rows() const { return (height + kSide - 1) / kSide; }
  int64_t columns() const { return (width + kSide - 1) / kSide; }
};

// Floats for the transformed inputs of a block of tiles and the outputs of their GEMMs.
inline int64_t conv3x3_scratch(const Conv3x3Call& call) {
  return kPoints * kMaxTiles * (call.in + kOutBlock);
}

struct Conv3x3 {
  // Transforms and packs input channels [begin, end) of weight [kOutBlock, 3, 3, in].
  void (*pack)(const void* weight, int64_t in, int64_t begin, int64_t end, float* packed);
  // Computes tiles [first, first + count), counted through the batch; count <= kMaxTiles.
  void (*forward)(const Conv3x3Call& call, int64_t first, int64_t count, float* scratch);
};

EMU3_KERNELS(Conv3x3, conv3x3)

}  // namespace emu3
