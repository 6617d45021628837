// Elements of tensors as the kernels compute with them. Knows no torch.
#pragma once

#include <stdint.h>

namespace emu3 {

struct bfloat16 {
  uint16_t bits;
};

__device__ inline float raise(float x) { return x; }
__device__ inline float raise(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

__device__ inline void lower(float x, float* to) { *to = x; }

// To nearest, ties to even; a NaN out of arithmetic is quiet and stays one.
__device__ inline void lower(float x, bfloat16* to) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits;
  to->bits = static_cast<uint16_t>(rounded >> 16);
}

}  // namespace emu3
