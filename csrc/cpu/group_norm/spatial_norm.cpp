// spatial_norm_silu on the CPU: a group norm whose scale and shift depend on a latent at each
// position, and its gradients.
#include "cpu/group_norm/spatial_norm.h"

#include "cpu/group_norm/group_norm_rows.h"
#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

template <typename T>
void fill_tables(const T* weight, const T* bias, int64_t channels, int64_t width, float* tables) {
  const int64_t padded = padded_channels(channels);
  for (int64_t i = 0; i < (width + 1) * padded; ++i) tables[i] = 0;
  for (int64_t c = 0; c < channels; ++c) {
    float* at = tables + lane_of<T>(c);
    for (int64_t l = 0; l < width; ++l) at[l * padded] = to_float(weight[c * width + l]);
    at[width * padded] = to_float(bias[c]);
  }
}

void tables(Dtype dtype, const void* y_weight, const void* y_bias, const void* b_weight,
            const void* b_bias, int64_t channels, int64_t width, float* tables) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    float* second = tables + (width + 1) * padded_channels(channels);
    fill_tables((const T*)y_weight, (const T*)y_bias, channels, width, tables);
    fill_tables((const T*)b_weight, (const T*)b_bias, channels, width, second);
  });
}

// A strip with its arrays.
template <typename T>
struct View {
  const Strip& strip;
  int64_t padded = padded_channels(strip.channels);
  Affine base = affine_at(strip.affine, strip.channels);
  const float* y_table = strip.tables;
  const float* b_table = strip.tables + (strip.width + 1) * padded;

  const T* latent(int64_t position) const {
    return (const T*)strip.latent + position * strip.width;
  }

  // Returns channels c and on of one of the two 1x1 convolutions of the latent.
  Pair convolved(const float* table, const T* z, int64_t c) const {
    Pair sum = load_pair(table + strip.width * padded + c);
    for (int64_t l = 0; l < strip.width; ++l)
      sum = sum + load_pair(table + l * padded + c) * to_float(z[l]);
    return sum;
  }

  // ((x - mean) * base.scale + base.shift) * y + b = (x - mean) * scale + shift.
  Affine modulated(int64_t position, float* scale) const {
    float* shift = scale + padded;
    for (int64_t c = 0; c < padded; c += kPair) {
      const Pair y = convolved(y_table, latent(position), c),
                 b = convolved(b_table, latent(position), c);
      store_pair(scale + c, load_pair(base.scale + c) * y, false);
      store_pair(shift + c, fma(load_pair(base.shift + c), y, b), false);
    }
    return {base.mean, scale, shift};
  }
};

// Calls open(position, arrays) for as many positions as fit the scratch with `count` arrays each,
// then run(first pixel, number of pixels, arrays) for these positions line by line, then
// close(position, arrays). open and close are called for a position without pixels too.
template <typename Open, typename Run, typename Close>
inline void over_positions(const Strip& strip, int64_t count, Open open, Run run, Close close) {
  const int64_t size = count * padded_channels(strip.channels);
  const int64_t fit = strip_scratch(padded_channels(strip.channels)) / size;
  for (int64_t first = 0; first < strip.positions; first += fit) {
    const int64_t last = first + fit < strip.positions ? first + fit : strip.positions;
    for (int64_t p = first; p < last; ++p) open(p, strip.scratch + (p - first) * size);
    for (int64_t line = 0; line < strip.lines; ++line)
      for (int64_t p = first; p < last; ++p)
        run(line * strip.line_pixels + strip.starts[p], strip.starts[p + 1] - strip.starts[p],
            strip.scratch + (p - first) * size);
    for (int64_t p = first; p < last; ++p) close(p, strip.scratch + (p - first) * size);
  }
}

template <bool kSilu, typename T>
void apply_strip(const Strip& strip, const T* x, T* y, bool past_caches) {
  const View<T> view{strip};
  over_positions(
      strip, 2, [&](int64_t position, float* arrays) { view.modulated(position, arrays); },
      [&](int64_t pixel, int64_t pixels, const float* arrays) {
        const int64_t at = pixel * strip.channels;
        apply_rows<kSilu>(x + at, y + at, pixels, strip.channels,
                          {view.base.mean, arrays, arrays + view.padded}, past_caches);
      },
      [](int64_t, float*) {});
}

// The backward pass of a position: from the sums of d and of d * (x - mean) over its pixels to the
// gradients of the parameters and of the latent.
template <typename T>
void position_vjp(const View<T>& view, int64_t position, const float* d_sum, float* d_product,
                  float* sums, float* dlatent) {
  const int64_t padded = view.padded, width = view.strip.width;
  const T* z = view.latent(position);
  const auto add = [&](int64_t array, int64_t c, Pair value) {
    float* at = sums + array * padded + c;
    store_pair(at, load_pair(at) + value, false);
  };
  float* dy = d_product;
  for (int64_t c = 0; c < padded; c += kPair) {
    const Pair db = load_pair(d_sum + c), product = load_pair(d_product + c);
    const Pair y = view.convolved(view.y_table, z, c);
    const Pair dy_here =
        fma(load_pair(view.base.scale + c), product, load_pair(view.base.shift + c) * db);
    add(0, c, y * db);
    add(1, c, y * product);
    add(2, c, dy_here);
    add(3, c, db);
    store_pair(dy + c, dy_here, false);
  }
  for (int64_t l = 0; l < width; ++l) {
    Pair dz{};
    for (int64_t c = 0; c < padded; c += kPair) {
      const Pair db = load_pair(d_sum + c), dy_here = load_pair(dy + c);
      add(4 + l, c, dy_here * to_float(z[l]));
      add(4 + width + l, c, db * to_float(z[l]));
      dz = fma(dy_here, load_pair(view.y_table + l * padded + c), dz);
      dz = fma(db, load_pair(view.b_table + l * padded + c), dz);
    }
    dlatent[position * width + l] = reduce_add(dz);
  }
}

template <bool kSilu, typename T>
void sum_strip(const Strip& strip, const T* dy, const T* x, float* sums, float* dlatent) {
  const View<T> view{strip};
  const int64_t padded = view.padded;
  over_positions(
      strip, 4,
      [&](int64_t position, float* arrays) {
        view.modulated(position, arrays);
        for (int64_t i = 2 * padded; i < 4 * padded; ++i) arrays[i] = 0;
      },
      [&](int64_t pixel, int64_t pixels, float* arrays) {
        const int64_t at = pixel * strip.channels;
        add_gradients<kSilu>(dy + at, x + at, pixels, strip.channels,
                             {view.base.mean, arrays, arrays + padded}, arrays + 2 * padded,
                             arrays + 3 * padded);
      },
      [&](int64_t position, float* arrays) {
        position_vjp(view, position, arrays + 2 * padded, arrays + 3 * padded, sums, dlatent);
      });
}

template <bool kSilu, typename T>
void backward_strip(const Strip& strip, const T* dy, const T* x, T* dx, const float* stat_grads,
                    bool past_caches) {
  const View<T> view{strip};
  over_positions(
      strip, 2, [&](int64_t position, float* arrays) { view.modulated(position, arrays); },
      [&](int64_t pixel, int64_t pixels, const float* arrays) {
        const int64_t at = pixel * strip.channels;
        backward_rows<kSilu>(dy + at, x + at, dx + at, pixels, strip.channels,
                             {view.base.mean, arrays, arrays + view.padded}, stat_grads,
                             past_caches);
      },
      [](int64_t, float*) {});
}

void apply(Dtype dtype, const Strip& strip, const void* x, void* y, bool silu, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = silu ? apply_strip<true, T> : apply_strip<false, T>;
    run(strip, (const T*)x, (T*)y, past_caches && can_stream((T*)y, strip.channels));
  });
  stream_fence();
}

void sums(Dtype dtype, const Strip& strip, const void* dy, const void* x, bool silu, float* sums,
          float* dlatent) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = silu ? sum_strip<true, T> : sum_strip<false, T>;
    run(strip, (const T*)dy, (const T*)x, sums, dlatent);
  });
}

void backward(Dtype dtype, const Strip& strip, const void* dy, const void* x, void* dx,
              const float* stat_grads, bool silu, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = silu ? backward_strip<true, T> : backward_strip<false, T>;
    run(strip, (const T*)dy, (const T*)x, (T*)dx, stat_grads,
        past_caches && can_stream((T*)dx, strip.channels));
  });
  stream_fence();
}

}  // namespace

extern const SpatialNorm spatial_norm{tables, apply, sums, backward};

}  // namespace emu3::EMU3_LEVEL
