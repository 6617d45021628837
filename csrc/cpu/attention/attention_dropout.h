// The dropout mask of a vector of query rows, key by key, as emu3_kernels/runtime/dropout.py
// defines it.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/lib/philox.h"

namespace emu3::EMU3_LEVEL {

// Four neighbouring positions share one counter: call scale() for the keys in order.
struct DropoutMask {
  const Dropout& dropout;
  const int32_t* columns;
  int64_t keys;  // size of columns; a block of keys is padded beyond it
  BitVec row, head, word[4];
  int64_t quad = -1;

  Vec scale(int64_t key) {
    const auto column = (uint32_t)columns[key < keys ? key : keys - 1];
    if (quad != column / 4) draw(column / 4);
    return word[column % 4] >= dropout.drop_below ? splat(dropout.scale) : Vec{};
  }

  void draw(uint32_t column) {
    constexpr uint64_t kLower = 0xffffffff;
    quad = column;
    const Words even = philox(splat((uint64_t)column), (WideVec)row, (WideVec)head, dropout.seed);
    const Words odd =
        philox(splat((uint64_t)column), (WideVec)row >> 32, (WideVec)head >> 32, dropout.seed);
    for (int i = 0; i < 4; ++i) word[i] = (BitVec)((even.word[i] & kLower) | odd.word[i] << 32);
  }

  struct Words {
    WideVec word[4];
  };

  static Words philox(WideVec a, WideVec b, WideVec c, uint64_t seed) {
    WideVec d{};
    for (uint32_t round = 0; round < 10; ++round) {
      const WideVec x = multiply(a, 0xd2511f53), y = multiply(c, 0xcd9e8d57);
      a = (y >> 32) ^ b ^ splat((uint64_t)((uint32_t)seed + round * 0x9e3779b9));
      c = (x >> 32) ^ d ^ splat((uint64_t)((uint32_t)(seed >> 32) + round * 0xbb67ae85));
      b = y, d = x;
    }
    return {{a, b, c, d}};
  }
};

}  // namespace emu3::EMU3_LEVEL
