#include "cpu/conv3d/causal_conv.h"

#include "cpu/conv3d/causal_conv_rows.h"
#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

// The epilogue of a sum: bias and activation.
inline Vec epilogue(const Conv& conv, int64_t o, Vec sum) {
  if (conv.bias) sum += conv.bias[o];
  return conv.post_silu ? silu(sum) : sum;
}

template <typename T, typename Element>
void write_row(const Conv& conv, const Window<Element>& window, const ColumnTaps& columns,
               int64_t t, int64_t h, const T* residual, T* y, int64_t channel) {
  convolve_row(conv, window, columns, t, h, [&](int64_t o, int64_t j, int64_t count, Vec sum) {
    Vec output = epilogue(conv, o, sum);
    if (residual) output += load(residual + o * channel + j, count);
    store(y + o * channel + j, output, count);
  });
}

template <typename Element, typename T>
void forward_tile(const Conv& conv, const Tile& tile, const T* x, const T* residual, T* y,
                  float* scratch) {
  over_rows<Element>(conv, tile, x, scratch,
                     [&](const auto& window, const ColumnTaps& columns, int64_t t, int64_t h) {
                       const int64_t at = output_row(conv, tile, t, h);
                       write_row(conv, window, columns, t, h, residual ? residual + at : nullptr,
                                 y + at, output_channel_stride(conv));
                     });
}

// The first convolution writes one row at a time to `line`, which is staged in the window of the
// second.
template <typename Element, typename T>
void block_tile(const Conv& first, const Conv& second, const Tile& tile, const T* x, T* y,
                float* scratch) {
  Window<Element> outer(second, tile.row, tile.row_end, scratch);
  scratch += conv_scratch(second, tile.row_end - tile.row);
  const int64_t row = outer.first_row(), row_end = outer.end_row();
  Window<Element> inner(first, row, row_end, scratch);
  T* const line = (T*)(scratch + window_size(first, row_end - row));
  const ColumnTaps inner_columns(first, inner), outer_columns(second, outer);
  const int64_t line_pitch = round_up(first.columns.outputs, kMaxColumns);
  const T* const element = x + tile.batch * first.source_size();
  for (int64_t t = second.time.first(tile.frame); t < tile.frame_end; ++t) {
    inner.reach(element, t);
    for (int64_t h = row; h < row_end; ++h) {
      write_row<T>(first, inner, inner_columns, t, h, nullptr, line, line_pitch);
      outer.stage(line, line_pitch, outer.row(t, h));
    }
    for (int64_t h = tile.row; t >= tile.frame && h < tile.row_end; ++h) {
      const int64_t at = output_row(second, tile, t, h);
      write_row(second, outer, outer_columns, t, h, x + at, y + at, output_channel_stride(second));
    }
  }
}

template <typename Element, typename T>
void activation_gradient_tile(const Conv& conv, const Tile& tile, const T* x, const T* dy,
                              float* dz, float* scratch) {
  over_rows<Element>(
      conv, tile, x, scratch,
      [&](const auto& window, const ColumnTaps& columns, int64_t t, int64_t h) {
        const int64_t row = output_row(conv, tile, t, h), channel = output_channel_stride(conv);
        convolve_row(conv, window, columns, t, h, [&](int64_t o, int64_t j, int64_t count, Vec z) {
          const int64_t at = row + o * channel + j;
          if (conv.bias) z += conv.bias[o];
          store(dz + at, load(dy + at, count) * silu_gradient(z), count);
        });
      });
}

// Calls body with a value of the type of the source and one of the elements of a window.
template <typename Body>
void with_types(Dtype dtype, const Conv& conv, Body body) {
  with_type(dtype, [&](auto source) {
    with_elements(conv, [&](auto element) { body(source, element); });
  });
}

void forward(const Conv& conv, const Tile& tile, Dtype dtype, const void* x, const void* residual,
             void* y, float* scratch) {
  with_types(dtype, conv, [&]<typename T, typename Element>(T, Element) {
    forward_tile<Element>(conv, tile, (const T*)x, (const T*)residual, (T*)y, scratch);
  });
}

void block(const Conv& first, const Conv& second, const Tile& tile, Dtype dtype, const void* x,
           void* y, float* scratch) {
  with_types(dtype, second, [&]<typename T, typename Element>(T, Element) {
    block_tile<Element>(first, second, tile, (const T*)x, (T*)y, scratch);
  });
}

void activation_gradient(const Conv& conv, const Tile& tile, Dtype dtype, const void* x,
                         const void* dy, float* dz, float* scratch) {
  with_types(dtype, conv, [&]<typename T, typename Element>(T, Element) {
    activation_gradient_tile<Element>(conv, tile, (const T*)x, (const T*)dy, dz, scratch);
  });
}

}  // namespace

extern const CausalConv causal_conv{kBfloat16ChannelsPerWord, forward, block, activation_gradient};

}  // namespace emu3::EMU3_LEVEL
