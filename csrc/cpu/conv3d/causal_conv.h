#pragma once

#include <stdint.h>

#include "cpu/lib/dtype.h"
#include "cpu/lib/levels.h"

namespace emu3 {

// The indices of a convolution along one axis: which element of the source each tap of each output
// reads. With `gradient` it is the transposed convolution, from the gradient of outputs to that of
// the source.
struct Axis {
  int64_t kernel, stride, padding;  // zeros before the source
  int64_t source, outputs;
  bool gradient;

  // Returns the index of the source, or -1 where the tap reads padding.
  int64_t at(int64_t output, int64_t tap) const {
    const int64_t shifted = output + padding - tap;
    if (gradient && (shifted < 0 || shifted % stride)) return -1;
    const int64_t index = gradient ? shifted / stride : output * stride + tap - padding;
    return index < source ? index : -1;
  }

  // Outputs from `output` on read no element before first(output), and outputs up to `output` none
  // after last(output).
  int64_t first(int64_t output) const {
    const int64_t shifted = output + padding - kernel + stride;
    const int64_t index =
        gradient ? (shifted < 0 ? 0 : shifted / stride) : output * stride - padding;
    return index < 0 ? 0 : index;
  }
  int64_t last(int64_t output) const {
    const int64_t index =
        gradient ? (output + padding) / stride : output * stride - padding + kernel - 1;
    return index < source ? index : source - 1;
  }

  // The most elements that `count` adjacent outputs read.
  int64_t receptive_field(int64_t count) const {
    return gradient ? (count + kernel - 2) / stride + 1 : (count - 1) * stride + kernel;
  }
};

constexpr int64_t kMaxColumns = 32;  // of a vector of any level
constexpr int64_t kOut = 4;          // output channels of a register tile
constexpr int64_t kMaxColumnTaps = 16, kMaxRowTaps = 64;

constexpr int64_t round_up(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// The layout of a staged row of the source. With a stride, columns are grouped by their remainder
// in one phase each, so that a tap reads adjacent columns; for a gradient, columns are `spread`
// apart with zeros between.
struct RowLayout {
  int64_t spread, base, phases, phase;

  explicit RowLayout(const Axis& columns)
      : spread(columns.gradient ? columns.stride : 1),
        base(columns.gradient ? columns.kernel - 1 - columns.padding : columns.padding),
        phases(columns.gradient ? 1 : columns.stride) {
    const int64_t written = ((columns.source - 1) * spread + base) / phases + 1;
    const int64_t read = round_up(columns.outputs, kMaxColumns) + (columns.kernel - 1) / phases;
    phase = round_up(written > read ? written : read, kMaxColumns);
  }
  int64_t channel() const { return phases * phase; }
};

// A convolution from a source [in, T, H, W] to outputs [out, T', H', W'], for every element of a
// batch.
struct Conv {
  Axis time, rows, columns;
  int64_t in, out;
  int64_t channels_per_word;   // input channels of a word
  const uint32_t* weight;      // words: [out / kOut, kt, kh, in / together, kw, kOut]
  const float* bias;           // [out] or null
  const float *scale, *shift;  // [in] or null
  bool silu, post_silu;

  int64_t source_size() const { return in * time.source * rows.source * columns.source; }
  int64_t output_size() const { return out * time.outputs * rows.outputs * columns.outputs; }
  int64_t words() const { return round_up(in, channels_per_word) / channels_per_word; }
  int64_t taps() const { return time.kernel * rows.kernel * columns.kernel; }
};

// Outputs of one element of the batch: frames [frame, frame_end), rows [row, row_end).
struct Tile {
  int64_t batch, frame, frame_end, row, row_end;
};

// Floats of zeroed scratch memory for tiles of at most `rows` rows.
inline int64_t window_size(const Conv& conv, int64_t rows) {
  return conv.time.kernel * conv.rows.receptive_field(rows) * conv.words() *
         RowLayout(conv.columns).channel();
}
inline int64_t row_size(const Conv& conv) {  // a row of the source or of the outputs
  const int64_t source = round_up(conv.columns.source, kMaxColumns);
  const int64_t outputs = conv.out * round_up(conv.columns.outputs, kMaxColumns);
  return source > outputs ? source : outputs;
}
inline int64_t conv_scratch(const Conv& conv, int64_t rows) {
  return window_size(conv, rows) + row_size(conv);
}
inline int64_t block_scratch(const Conv& first, const Conv& second, int64_t rows) {
  return conv_scratch(first, second.rows.receptive_field(rows)) + conv_scratch(second, rows);
}
inline int64_t input_scratch(const Conv& conv, int64_t rows) {
  return conv_scratch(conv, rows) + row_size(conv);
}
inline int64_t weight_scratch(const Conv& conv, int64_t rows) {
  return conv_scratch(conv, rows) +
         rows * round_up(conv.out, kOut) * round_up(conv.columns.outputs, kMaxColumns);
}

// Floats of a partial gradient of the weights: four partial sums of each weight and of each bias.
inline int64_t partial_size(const Conv& conv) { return 4 * conv.out * (conv.in * conv.taps() + 1); }

struct CausalConv {
  // Input channels of a word where source and weights are bfloat16; otherwise a word is one float.
  int64_t bfloat16_channels_per_word;
  void (*forward)(const Conv& conv, const Tile& tile, Dtype dtype, const void* x,
                  const void* residual, void* y, float* scratch);
  // y = x + second(first(x)); the outputs of the first are rounded to the dtype.
  void (*block)(const Conv& first, const Conv& second, const Tile& tile, Dtype dtype, const void* x,
                void* y, float* scratch);
  // dz = dy * silu'(conv(x) + bias), float32.
  void (*activation_gradient)(const Conv& conv, const Tile& tile, Dtype dtype, const void* x,
                              const void* dy, float* dz, float* scratch);
};

// x of a convolution with its norm and activation.
struct Activated {
  Dtype dtype;
  const void* x;
  const float *scale, *shift;
  bool silu;
};

struct CausalConvGradient {
  // `conv` is the transposed convolution. Adds dscale and dshift to sums [2, out].
  void (*of_input)(const Conv& conv, const Tile& tile, Dtype dtype, const void* dz,
                   const Activated& input, void* dx, double* sums, float* scratch);
  // Adds to partial [partial_size]: four sums of each weight, then of each bias. With is_bfloat16,
  // the activated x is rounded to bfloat16 if x and dz are bfloat16.
  void (*of_weight)(const Conv& conv, const Tile& tile, Dtype dtype, const void* x, Dtype dz_dtype,
                    const void* dz, bool is_bfloat16, float* partial, float* scratch);
};

EMU3_KERNELS(CausalConv, causal_conv)
EMU3_KERNELS(CausalConvGradient, causal_conv_gradient)

}  // namespace emu3
