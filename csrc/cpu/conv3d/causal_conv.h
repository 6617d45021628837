#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// Which element of a source every tap of every result reads, along one axis. A gradient goes the
// other way: its source are the results, its results the source.
struct Axis {
  int64_t kernel, stride, before;  // zeros ahead of the source
  int64_t source, results;
  bool gradient;

  // -1 for one that is not there.
  int64_t at(int64_t result, int64_t tap) const {
    const int64_t way = result + before - tap;
    if (gradient && (way < 0 || way % stride)) return -1;
    const int64_t index = gradient ? way / stride : result * stride + tap - before;
    return index < source ? index : -1;
  }

  // No result from `result` on reads an element before first(result), none up to it one after
  // last(result).
  int64_t first(int64_t result) const {
    const int64_t way = result + before - kernel + stride;
    const int64_t index = gradient ? (way < 0 ? 0 : way / stride) : result * stride - before;
    return index < 0 ? 0 : index;
  }
  int64_t last(int64_t result) const {
    const int64_t index =
        gradient ? (result + before) / stride : result * stride - before + kernel - 1;
    return index < source ? index : source - 1;
  }

  // The most elements that `count` results in a row read.
  int64_t span(int64_t count) const {
    return gradient ? (count + kernel - 2) / stride + 1 : (count - 1) * stride + kernel;
  }
};

constexpr int64_t kMostColumns = 32;  // of a vector of any level
constexpr int64_t kOut = 4;           // channels out whose sums are in registers at once
constexpr int64_t kMostColumnTaps = 16, kMostRowTaps = 64;

constexpr int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// How a row of a source lies in memory once it is staged. Columns that a stride jumps over lie
// apart, in one phase for each remainder, so that a tap reads its columns side by side; those of a
// gradient lie `spread` apart, with zeros between.
struct RowLayout {
  int64_t spread, base, phases, phase;

  explicit RowLayout(const Axis& columns)
      : spread(columns.gradient ? columns.stride : 1),
        base(columns.gradient ? columns.kernel - 1 - columns.before : columns.before),
        phases(columns.gradient ? 1 : columns.stride) {
    const int64_t written = ((columns.source - 1) * spread + base) / phases + 1;
    const int64_t read = whole(columns.results, kMostColumns) + (columns.kernel - 1) / phases;
    phase = whole(written > read ? written : read, kMostColumns);
  }
  int64_t channel() const { return phases * phase; }
};

// Results [out, T', H', W'] from a source [in, T, H, W], for every element of a batch.
struct Conv {
  Axis time, rows, columns;
  int64_t in, out;
  int64_t together;            // channels in of a word
  const uint32_t* weight;      // words: [out / kOut, kt, kh, in / together, kw, kOut]
  const float* bias;           // [out] or null
  const float *scale, *shift;  // [in] or null
  bool silu, post_silu;

  int64_t source_size() const { return in * time.source * rows.source * columns.source; }
  int64_t result_size() const { return out * time.results * rows.results * columns.results; }
  int64_t words() const { return whole(in, together) / together; }
  int64_t taps() const { return time.kernel * rows.kernel * columns.kernel; }
};

// Results of one element of the batch: frames [frame, frame_end), rows [row, row_end).
struct Tile {
  int64_t batch, frame, frame_end, row, row_end;
};

// Floats of scratch memory, zero at first, for tiles of at most `rows` rows.
inline int64_t window_size(const Conv& conv, int64_t rows) {
  return conv.time.kernel * conv.rows.span(rows) * conv.words() * RowLayout(conv.columns).channel();
}
inline int64_t row_size(const Conv& conv) {  // a row of the source or of the results
  const int64_t source = whole(conv.columns.source, kMostColumns);
  const int64_t results = conv.out * whole(conv.columns.results, kMostColumns);
  return source > results ? source : results;
}
inline int64_t conv_scratch(const Conv& conv, int64_t rows) {
  return window_size(conv, rows) + row_size(conv);
}
inline int64_t block_scratch(const Conv& first, const Conv& second, int64_t rows) {
  return conv_scratch(first, second.rows.span(rows)) + conv_scratch(second, rows);
}
inline int64_t input_scratch(const Conv& conv, int64_t rows) {
  return conv_scratch(conv, rows) + row_size(conv);
}
inline int64_t weight_scratch(const Conv& conv, int64_t rows) {
  return conv_scratch(conv, rows) +
         rows * whole(conv.out, kOut) * whole(conv.columns.results, kMostColumns);
}

// Floats of a part of the weights' gradient: four partial sums of each weight and of each bias.
inline int64_t partial_size(const Conv& conv) { return 4 * conv.out * (conv.in * conv.taps() + 1); }

struct CausalConv {
  // How many channels in go into a word where source and weights are bfloat16; one float elsewhere.
  int64_t halves_together;
  void (*forward)(const Conv& conv, const Tile& tile, Dtype dtype, const void* x,
                  const void* residual, void* y, float* scratch);
  // y = x + second(first(x)), the results of the first rounded to the dtype.
  void (*block)(const Conv& first, const Conv& second, const Tile& tile, Dtype dtype, const void* x,
                void* y, float* scratch);
  // dz = dy * silu'(conv(x) + bias), float32.
  void (*activation_gradient)(const Conv& conv, const Tile& tile, Dtype dtype, const void* x,
                              const void* dy, float* dz, float* scratch);
};

// x of a convolution and what is done to it before.
struct Activated {
  Dtype dtype;
  const void* x;
  const float *scale, *shift;
  bool silu;
};

struct CausalConvGradient {
  // `conv` is that of the gradient. Adds dscale and dshift to sums [2, out].
  void (*of_input)(const Conv& conv, const Tile& tile, Dtype dtype, const void* dz,
                   const Activated& input, void* dx, double* sums, float* scratch);
  // Adds to partial [partial_size]: four sums of each weight, then of each bias. `halves` allows to
  // round the activated x to bfloat16 where x and dz are.
  void (*of_weight)(const Conv& conv, const Tile& tile, Dtype dtype, const void* x, Dtype dz_dtype,
                    const void* dz, bool halves, float* partial, float* scratch);
};

EMU3_KERNELS(CausalConv, causal_conv)
EMU3_KERNELS(CausalConvGradient, causal_conv_gradient)

}  // namespace emu3
