// y = x * rsqrt(mean(x^2) + eps) * weight, and its gradients. A row is read from memory once. With
// several rows, the row after the next is prefetched, each array in one of the two passes: the
// hardware prefetcher follows one array well, several badly.
#include "cpu/norm/rms_norm.h"

#include "cpu/lib/philox.h"
#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

// Elements of a row that stay in the L1 cache between the two passes.
constexpr int64_t kScratch = 8192;

// Returns the distance from row r to the one to prefetch, 0 if there is none.
inline int64_t ahead(int64_t r, int64_t rows) { return r + 2 < rows ? 2 : 0; }

template <typename T>
float sum_of_squares(const T* x, int64_t width) {
  Pair sum{};
  over_pairs(width, [&](int64_t c, int64_t count) {
    const Pair value = load_pair(x + c, count);
    sum = fma(value, value, sum);
  });
  return reduce_add(sum);
}

// Writes x + residual, rounded, to `summed` and `copy`, and returns the sum of squares of the
// rounded sum. `branch` applies dropout to a pair of x; `next` is prefetched.
template <typename T, typename Branch>
float add_rows(const T* x, const T* residual, const T* next, T* summed, T* copy, int64_t width,
               bool past_caches, Branch branch) {
  Pair sum{};
  over_pairs(width, [&](int64_t c, int64_t count) {
    prefetch_pair<kSecondCache>(next + c);
    const Pair both = branch(load_pair(x + c, count), c) + load_pair(residual + c, count);
    store_pair(summed + c, both, count, past_caches);
    store_pair(copy + c, both, count, false);
    const Pair value = load_pair(copy + c, count);
    sum = fma(value, value, sum);
  });
  return reduce_add(sum);
}

// Both passes are compiled with and without dropout, so that it costs nothing where there is none.
template <bool kDrop, typename T>
void forward_rows(const T* x, const T* residual, const T* weight, T* y, T* summed, float* rstd,
                  int64_t rows, int64_t width, int64_t x_stride, int64_t residual_stride, float eps,
                  const Dropout* dropout, int64_t first_row, bool past_caches) {
  T scratch[kScratch];
  for (int64_t r = 0; r < rows; ++r, x += x_stride, y += width) {
    const int64_t next = ahead(r, rows);
    const T* row = x;
    const T* const next_x = x + next * x_stride;
    float squares;
    if (residual) {
      const int64_t dropout_row = kDrop ? dropout->row_of(first_row + r) : 0;
      const bool fits = width <= kScratch;
      T* copy = fits ? scratch : summed;
      squares = add_rows(x, residual, residual + next * residual_stride, summed, copy, width,
                         fits && past_caches, [&](Pair value, int64_t c) {
                           return kDrop ? drop<T>(value, *dropout, 0, dropout_row, c) : value;
                         });
      row = copy, residual += residual_stride, summed += width;
    } else {
      squares = sum_of_squares(x, width);
    }
    const float scale = rstd[r] = 1 / __builtin_sqrtf(squares / width + eps);
    over_pairs(width, [&](int64_t c, int64_t count) {
      if (residual) prefetch_pair<kSecondCache>(next_x + c);
      const Pair out = load_pair(row + c, count) * scale * load_pair(weight + c, count);
      store_pair(y + c, out, count, past_caches);
    });
  }
}

// With n = x * rstd: dx = rstd * (dy * weight - n * mean(dy * weight * n)), dweight = sum(dy * n).
template <bool kDrop, typename T>
void backward_rows(const T* dy, const T* dsummed, const T* x, const T* weight, const float* rstd,
                   T* dx, T* dresidual, float* dweight, int64_t rows, int64_t width,
                   int64_t dy_stride, int64_t dsummed_stride, int64_t x_stride,
                   const Dropout* dropout, int64_t first_row, bool past_caches) {
  for (int64_t c = 0; c < padded_width(width); ++c) dweight[c] = 0;
  for (int64_t r = 0; r < rows; ++r, dy += dy_stride, x += x_stride, dx += width) {
    const float scale = rstd[r];
    const int64_t next = ahead(r, rows);
    Pair sum{};
    over_pairs(width, [&](int64_t c, int64_t count) {
      prefetch_pair<kSecondCache>(dy + next * dy_stride + c);
      prefetch_pair<kSecondCache>(x + next * x_stride + c);
      const Pair g = load_pair(dy + c, count), value = load_pair(x + c, count);
      sum = fma(g * load_pair(weight + c, count), value, sum);
      store_pair(dweight + c, fma(g, value * scale, load_pair(dweight + c)), false);
    });
    const int64_t dropout_row = kDrop ? dropout->row_of(first_row + r) : 0;
    const float dx_scale = -reduce_add(sum) / width * scale * scale * scale;
    over_pairs(width, [&](int64_t c, int64_t count) {
      const Pair direct = load_pair(dy + c, count) * load_pair(weight + c, count) * scale;
      Pair d = load_pair(x + c, count) * dx_scale + direct;
      if (dsummed) {
        prefetch_pair<kSecondCache>(dsummed + (r + next) * dsummed_stride + c);
        d = d + load_pair(dsummed + r * dsummed_stride + c, count);
      }
      if constexpr (kDrop) {
        store_pair(dresidual + r * width + c, d, count, past_caches);
        d = drop<T>(d, *dropout, 0, dropout_row, c);
      }
      store_pair(dx + c, d, count, past_caches);
    });
  }
}

template <typename T>
void reduce_partials(const float* partial, T* dweight, int64_t partials, int64_t width) {
  over_pairs(width, [&](int64_t c, int64_t count) {
    Pair sum{};
    for (int64_t p = 0; p < partials; ++p)
      sum = sum + load_pair(partial + p * padded_width(width) + c);
    store_pair(dweight + c, sum, count, false);
  });
}

void forward(Dtype dtype, const void* x, const void* residual, const void* weight, void* y,
             void* summed, float* rstd, int64_t rows, int64_t width, int64_t x_stride,
             int64_t residual_stride, float eps, const Dropout* dropout, int64_t first_row,
             bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = dropout ? forward_rows<true, T> : forward_rows<false, T>;
    run((const T*)x, (const T*)residual, (const T*)weight, (T*)y, (T*)summed, rstd, rows, width,
        x_stride, residual_stride, eps, dropout, first_row,
        past_caches && can_stream((T*)y, width) && can_stream((T*)summed, width));
  });
  stream_fence();
}

void backward(Dtype dtype, const void* dy, const void* dsummed, const void* x, const void* weight,
              const float* rstd, void* dx, void* dresidual, float* dweight, int64_t rows,
              int64_t width, int64_t dy_stride, int64_t dsummed_stride, int64_t x_stride,
              const Dropout* dropout, int64_t first_row, bool past_caches) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = dropout ? backward_rows<true, T> : backward_rows<false, T>;
    run((const T*)dy, (const T*)dsummed, (const T*)x, (const T*)weight, rstd, (T*)dx, (T*)dresidual,
        dweight, rows, width, dy_stride, dsummed_stride, x_stride, dropout, first_row,
        past_caches && can_stream((T*)dx, width) && can_stream((T*)dresidual, width));
  });
  stream_fence();
}

void reduce(Dtype dtype, const float* partial, void* dweight, int64_t partials, int64_t width) {
  with_type(dtype, [&](auto type) {
    reduce_partials(partial, (decltype(type)*)dweight, partials, width);
  });
}

}  // namespace

extern const RMSNorm rms_norm{forward, backward, reduce};

}  // namespace emu3::EMU3_LEVEL
