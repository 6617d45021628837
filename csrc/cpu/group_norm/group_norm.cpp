// group_norm_silu on the CPU: statistics of groups of channels, the norm with SiLU, and its
// gradients.
#include "cpu/group_norm/group_norm.h"

#include "cpu/group_norm/group_norm_rows.h"
#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

// Pixels whose mean and squared deviations are computed in registers.
constexpr int kBlock = kLanes == 16 ? 8 : 4;

// Merges `kCount` pixels into the moments of `before` others (Chan, Golub and LeVeque, 1983).
// The next pixels are prefetched in memory order, which is not the order of the loop over channels:
// that halves the time of a large image.
template <int kCount, typename T>
inline void merge_moments(const T* x, int64_t channels, int64_t before, float* mean,
                          float* deviations) {
  const float share = static_cast<float>(kCount) / (before + kCount), weight = before * share;
  const T* next = x + kCount * channels;
  over_pairs(channels, [&](int64_t c, int64_t count) {
    Pair pixel[kCount], sum{}, squares{};
    for (int i = 0; i < kCount; ++i) {
      pixel[i] = load_pair(x + i * channels + c, count);
      prefetch_pair<kFirstCache>(next + c * kCount + i * kPair);
      sum = sum + pixel[i];
    }
    const Pair centre = sum * (1.0f / kCount);
    for (int i = 0; i < kCount; ++i) {
      const Pair deviation = pixel[i] - centre;
      squares = fma(deviation, deviation, squares);
    }
    const Pair old = load_pair(mean + c), delta = centre - old;
    store_pair(mean + c, old + delta * share, false);
    squares = fma(delta * delta, Pair{splat(weight), splat(weight)}, squares);
    store_pair(deviations + c, load_pair(deviations + c) + squares, false);
  });
}

void moments(Dtype dtype, const void* x, int64_t rows, int64_t channels, float* moments) {
  const int64_t padded = padded_channels(channels);
  for (int64_t i = 0; i < 2 * padded; ++i) moments[i] = 0;
  with_type(dtype, [&](auto type) {
    const auto* pixels = (const decltype(type)*)x;
    int64_t r = 0;
    for (; r + kBlock <= rows; r += kBlock)
      merge_moments<kBlock>(pixels + r * channels, channels, r, moments, moments + padded);
    for (; r < rows; ++r)
      merge_moments<1>(pixels + r * channels, channels, r, moments, moments + padded);
  });
}

// Calls chunk(number of pixels, moments) for every chunk of an image.
template <typename Chunk>
inline void over_chunks(const float* moments, int64_t chunk_rows, int64_t rows, int64_t padded,
                        Chunk chunk) {
  for (int64_t first = 0; first < rows; first += chunk_rows, moments += 2 * padded)
    chunk(static_cast<double>(rows - first < chunk_rows ? rows - first : chunk_rows), moments);
}

template <typename T>
void group_statistics(const double* mean_of, const double* deviations_of, int64_t rows,
                      int64_t width, int64_t groups, double eps, float* mean, float* rstd) {
  for (int64_t g = 0; g < groups; ++g) {
    double sum = 0, deviations = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += mean_of[lane_of<T>(c)];
    const double centre = sum / width;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double delta = mean_of[lane_of<T>(c)] - centre;
      deviations += deviations_of[lane_of<T>(c)] + rows * delta * delta;
    }
    mean[g] = static_cast<float>(centre);
    rstd[g] = static_cast<float>(1 / __builtin_sqrt(deviations / (rows ? rows * width : 1) + eps));
  }
}

void statistics(Dtype dtype, const float* moments, int64_t chunk_rows, int64_t rows,
                int64_t channels, int64_t groups, double eps, double* scratch, float* mean,
                float* rstd) {
  const int64_t padded = padded_channels(channels);
  double *mean_of = scratch, *deviations_of = scratch + padded;
  for (int64_t i = 0; i < 2 * padded; ++i) scratch[i] = 0;
  over_chunks(moments, chunk_rows, rows, padded, [&](double pixels, const float* chunk) {
    for (int64_t i = 0; i < padded; ++i) mean_of[i] += chunk[i] * (pixels / rows);
  });
  over_chunks(moments, chunk_rows, rows, padded, [&](double pixels, const float* chunk) {
    for (int64_t i = 0; i < padded; ++i) {
      const double delta = chunk[i] - mean_of[i];
      deviations_of[i] += chunk[padded + i] + pixels * delta * delta;
    }
  });
  with_type(dtype, [&](auto type) {
    group_statistics<decltype(type)>(mean_of, deviations_of, rows, channels / groups, groups, eps,
                                     mean, rstd);
  });
}

void affine(Dtype dtype, const float* mean, const float* rstd, const void* weight, const void* bias,
            int64_t channels, int64_t groups, float* affine) {
  const int64_t padded = padded_channels(channels), width = channels / groups;
  for (int64_t i = 0; i < 3 * padded; ++i) affine[i] = 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t c = 0; c < channels; ++c) {
      float* at = affine + lane_of<T>(c);
      at[0] = mean[c / width];
      at[padded] = rstd[c / width] * to_float(((const T*)weight)[c]);
      at[2 * padded] = to_float(((const T*)bias)[c]);
    }
  });
}

void apply(Dtype dtype, const void* x, void* y, int64_t rows, int64_t channels, const float* affine,
           bool silu, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = silu ? apply_rows<true, T> : apply_rows<false, T>;
    run((const T*)x, (T*)y, rows, channels, affine_at(affine, channels),
        past_caches && can_stream((T*)y, channels));
  });
  stream_fence();
}

void sums(Dtype dtype, const void* dy, const void* x, int64_t rows, int64_t channels,
          const float* affine, bool silu, float* sums) {
  const int64_t padded = padded_channels(channels);
  for (int64_t i = 0; i < 2 * padded; ++i) sums[i] = 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = silu ? add_gradients<true, T> : add_gradients<false, T>;
    run((const T*)dy, (const T*)x, rows, channels, affine_at(affine, channels), sums,
        sums + padded);
  });
}

// With n the normed x and dn the gradient of n: dx = rstd * (dn - mean(dn) - n * mean(dn * n)).
void stat_grads(Dtype dtype, double* sums, const float* rstd, const void* weight, int64_t rows,
                int64_t channels, int64_t groups, float* stat_grads) {
  const int64_t padded = padded_channels(channels), width = channels / groups;
  for (int64_t i = 0; i < 2 * padded; ++i) stat_grads[i] = 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t g = 0; g < groups; ++g) {
      double plain = 0, times_n = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        double* sum = sums + lane_of<T>(c);
        sum[padded] *= rstd[g];
        plain += sum[0] * to_float(((const T*)weight)[c]);
        times_n += sum[padded] * to_float(((const T*)weight)[c]);
      }
      const double scale = rstd[g] / static_cast<double>(rows * width);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        float* stat_grad = stat_grads + lane_of<T>(c);
        stat_grad[0] = static_cast<float>(plain * scale);
        stat_grad[padded] = static_cast<float>(times_n * scale * rstd[g]);
      }
    }
  });
}

void backward(Dtype dtype, const void* dy, const void* x, void* dx, int64_t rows, int64_t channels,
              const float* affine, const float* stat_grads, bool silu, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = silu ? backward_rows<true, T> : backward_rows<false, T>;
    run((const T*)dy, (const T*)x, (T*)dx, rows, channels, affine_at(affine, channels), stat_grads,
        past_caches && can_stream((T*)dx, channels));
  });
  stream_fence();
}

void write(Dtype dtype, const double* sums, void* out, int64_t channels, int64_t stride) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t c = 0; c < channels; ++c)
      from_float(static_cast<float>(sums[lane_of<T>(c)]), (T*)out + c * stride);
  });
}

}  // namespace

extern const GroupNorm group_norm{moments, statistics, affine,   apply,
                                  sums,    stat_grads, backward, write};

}  // namespace emu3::EMU3_LEVEL
