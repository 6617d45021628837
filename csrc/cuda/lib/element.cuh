// Conversion of elements to and from float32. Includes no torch header.
#pragma once

#include <stdint.h>

namespace emu3 {

struct bfloat16 {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

__device__ inline void from_float(float x, float* to) { *to = x; }

// Rounds to nearest, ties to even; a NaN (arithmetic makes quiet ones) stays a NaN.
__device__ inline void from_float(float x, bfloat16* to) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits;
  to->bits = static_cast<uint16_t>(rounded >> 16);
}

}  // namespace emu3
