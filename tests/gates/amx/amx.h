// The AMX intrinsics of our kernels in plain C++, for processors without AMX: included before a
// kernel
// (-include), it replaces them by macros. Results are those of Intel's Software Developer's Manual,
// volume 2, with numbers below 2^-126 flushed to zero. A tile without a shape ends the program, and
// a tile that is read before it is written is NaN.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply

namespace emulated {

struct Shape {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct Register {
  uint32_t words[16][16];
};

inline thread_local Shape shape;
inline thread_local Register registers[8];

inline void expect(bool held) {
  if (!held) __builtin_trap();
}

// Returns a tile register, which must be configured.
inline Register& at(int i) {
  expect(shape.palette == 1 && i >= 0 && i < 8 && shape.rows[i] && shape.row_bytes[i]);
  return registers[i];
}

inline void configure(const void* from) {
  expect(shape.palette == 0);  // released, as a thread that goes on without tiles should
  __builtin_memcpy(&shape, from, sizeof shape);
  expect(shape.palette == 1 && shape.start_row == 0);
  for (uint8_t reserved : shape.reserved) expect(reserved == 0);
  for (int i = 0; i < 16; ++i)
    expect(shape.rows[i] <= (i < 8 ? 16 : 0) && shape.row_bytes[i] <= (i < 8 ? 64 : 0));
  __builtin_memset(registers, 0xff, sizeof registers);  // NaN; the processor's are zero
}

inline void release() { shape = Shape{}; }

inline void zero(int i) { at(i) = Register{}; }

inline void load(int i, const void* from, int64_t stride) {
  at(i) = Register{};
  for (int row = 0; row < shape.rows[i]; ++row)
    __builtin_memcpy(at(i).words[row], (const char*)from + row * stride, shape.row_bytes[i]);
}

inline void store(int i, void* to, int64_t stride) {
  for (int row = 0; row < shape.rows[i]; ++row)
    __builtin_memcpy((char*)to + row * stride, at(i).words[row], shape.row_bytes[i]);
}

inline float flushed(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x;
}

inline float to_float(uint32_t upper_half) {
  float x;
  const uint32_t bits = upper_half << 16;
  __builtin_memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

// to[m][n] += dot products of the pairs a[m][k] and b[k][n]; first and second elements are summed
// apart.
inline void multiply(int to, int a, int b) {
  const int K = shape.row_bytes[a] / 4;
  expect(shape.rows[to] == shape.rows[a] && shape.rows[b] == K);
  expect(shape.row_bytes[to] == shape.row_bytes[b] && to != a && to != b && a != b);
  for (int m = 0; m < shape.rows[to]; ++m)
    for (int n = 0; n < shape.row_bytes[to] / 4; ++n) {
      float sum[2] = {};
      for (int k = 0; k < K; ++k) {
        const uint32_t x = at(a).words[m][k], y = at(b).words[k][n];
        sum[0] = flushed(sum[0] + to_float(x & 0xffff) * to_float(y & 0xffff));
        sum[1] = flushed(sum[1] + to_float(x >> 16) * to_float(y >> 16));
      }
      float total;
      __builtin_memcpy(&total, &at(to).words[m][n], sizeof total);
      total = flushed(flushed(total) + flushed(sum[0] + sum[1]));
      __builtin_memcpy(&at(to).words[m][n], &total, sizeof total);
    }
}

}  // namespace emulated
