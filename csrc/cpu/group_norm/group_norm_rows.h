// Loops over the pixels of a group norm, shared by group_norm_silu and spatial_norm_silu.
#pragma once

#include "cpu/group_norm/group_norm.h"
#include "cpu/lib/silu.h"

namespace emu3::EMU3_LEVEL {

// The norm of a channel is (x - mean) * scale + shift.
struct Affine {
  const float *mean, *scale, *shift;
};

inline Affine affine_at(const float* arrays, int64_t channels) {
  const int64_t padded = padded_channels(channels);
  return {arrays, arrays + padded, arrays + 2 * padded};
}

// Returns the index of channel c in an array, which has the order of load_pair(const T*).
template <typename T>
inline int64_t lane_of(int64_t c) {
  if (sizeof(T) == sizeof(float)) return c;
  const int64_t i = c % kPair;
  return c - i + i % 2 * kLanes + i / 2;
}

inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, bfloat16* to) { store_tail(to, splat(x), 1); }

// Rows that share a load of the coefficients. The next rows are prefetched in memory order.
constexpr int kRows = 4;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// Calls block(number, row) for blocks of kRows rows, then for single rows; `number` is a Count.
template <typename Block>
inline void over_rows(int64_t rows, Block block) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) block(Count<kRows>{}, r);
  for (; r < rows; ++r) block(Count<1>{}, r);
}

// y = (x - mean) * scale + shift, with SiLU if kSilu.
template <bool kSilu, typename T>
inline void apply_rows(const T* x, T* y, int64_t rows, int64_t channels, Affine to,
                       bool past_caches) {
  over_rows(rows, [&](auto number, int64_t r) {
    over_pairs(channels, [&](int64_t c, int64_t count) {
      const Pair mean = load_pair(to.mean + c), scale = load_pair(to.scale + c);
      const Pair shift = load_pair(to.shift + c);
      const int64_t next = (r + number.value) * channels + c * number.value;
      for (int i = 0; i < number.value; ++i) {
        const int64_t at = (r + i) * channels + c;
        const Pair normed = fma(load_pair(x + at, count) - mean, scale, shift);
        prefetch_pair<kFirstCache>(x + next + i * kPair);
        store_pair(y + at, kSilu ? silu(normed) : normed, count, past_caches);
      }
    });
  });
}

// Adds d to sum and d * (x - mean) to product, where d is the gradient of the input of SiLU.
template <bool kSilu, typename T>
inline void add_gradients(const T* dy, const T* x, int64_t rows, int64_t channels, Affine to,
                          float* sum, float* product) {
  over_rows(rows, [&](auto number, int64_t r) {
    over_pairs(channels, [&](int64_t c, int64_t count) {
      const Pair mean = load_pair(to.mean + c), scale = load_pair(to.scale + c);
      const Pair shift = load_pair(to.shift + c);
      const int64_t next = (r + number.value) * channels + c * number.value;
      Pair plain{}, times_x{};
      for (int i = 0; i < number.value; ++i) {
        const int64_t at = (r + i) * channels + c;
        const Pair centred = load_pair(x + at, count) - mean;
        prefetch_pair<kFirstCache>(x + next + i * kPair);
        prefetch_pair<kFirstCache>(dy + next + i * kPair);
        Pair d = load_pair(dy + at, count);
        if (kSilu) d = d * silu_gradient(fma(centred, scale, shift));
        plain = plain + d;
        times_x = fma(d, centred, times_x);
      }
      store_pair(sum + c, load_pair(sum + c) + plain, false);
      store_pair(product + c, load_pair(product + c) + times_x, false);
    });
  });
}

// dx = d * scale - stat_grads[0] - (x - mean) * stat_grads[1].
template <bool kSilu, typename T>
inline void backward_rows(const T* dy, const T* x, T* dx, int64_t rows, int64_t channels, Affine to,
                          const float* stat_grads, bool past_caches) {
  const float* stat_grad = stat_grads + padded_channels(channels);
  over_rows(rows, [&](auto number, int64_t r) {
    over_pairs(channels, [&](int64_t c, int64_t count) {
      const Pair mean = load_pair(to.mean + c), scale = load_pair(to.scale + c);
      const Pair shift = load_pair(to.shift + c);
      const int64_t next = (r + number.value) * channels + c * number.value;
      const Pair mean_grad = load_pair(stat_grads + c), rstd_grad = load_pair(stat_grad + c);
      for (int i = 0; i < number.value; ++i) {
        const int64_t at = (r + i) * channels + c;
        const Pair centred = load_pair(x + at, count) - mean;
        prefetch_pair<kFirstCache>(x + next + i * kPair);
        prefetch_pair<kFirstCache>(dy + next + i * kPair);
        Pair d = load_pair(dy + at, count);
        if (kSilu) d = d * silu_gradient(fma(centred, scale, shift));
        store_pair(dx + at, d * scale - fma(centred, rstd_grad, mean_grad), count, past_caches);
      }
    });
  });
}

}  // namespace emu3::EMU3_LEVEL
