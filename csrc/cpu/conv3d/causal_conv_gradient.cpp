#include "cpu/conv3d/causal_conv.h"
#include "cpu/conv3d/causal_conv_rows.h"
#include "cpu/lib/simd.h"

namespace emu3::EMU3_LEVEL {
namespace {

// The register tile: kIn input channels, kOut output channels and up to kTaps column taps.
constexpr int kIn = kLanes == 16 ? 2 : 1;
constexpr int kTaps = 3;

// Four partial sums, to which a vector is reduced without a shuffle.
typedef float Quad __attribute__((vector_size(16)));

inline void accumulate(float* to, Vec x) {
  Quad part[kLanes / 4], sum;
  __builtin_memcpy(part, &x, sizeof x);
  __builtin_memcpy(&sum, to, sizeof sum);
  for (const Quad quarter : part) sum += quarter;
  __builtin_memcpy(to, &sum, sizeof sum);
}

// The backward pass of SiLU and norm for a row of one channel. Adds to dscale and dshift in double,
// since many gradients of both signs cancel.
template <typename T>
void activation_bwd(const float* du, const T* x, const Activation& activate, int64_t width, T* dx,
                    double* dscale, double* dshift) {
  Vec scale_sum = {}, shift_sum = {};
  over_vectors(width, [&](int64_t j, int64_t count) {
    const Vec from = load(x + j, count), u = activate.normed(from);
    Vec gradient = load(du + j, count);
    if (activate.with_silu) gradient *= silu_gradient(u);
    scale_sum = fma(gradient, from, scale_sum);
    shift_sum += gradient;
    store(dx + j, gradient * activate.scale, count);
  });
  *dscale += reduce_add(scale_sum);
  *dshift += reduce_add(shift_sum);
}

template <typename Element, typename S, typename T>
void of_input_tile(const Conv& conv, const Tile& tile, const S* dz, const T* x,
                   const Activated& input, T* dx, double* sums, float* scratch) {
  const int64_t channel = output_channel_stride(conv), width = conv.columns.outputs;
  const int64_t pitch = round_up(width, kMaxColumns);
  float* const line = scratch + window_size(conv, tile.row_end - tile.row) + row_size(conv);
  over_rows<Element>(conv, tile, dz, scratch,
                     [&](const auto& window, const ColumnTaps& columns, int64_t t, int64_t h) {
                       convolve_row(conv, window, columns, t, h,
                                    [&](int64_t c, int64_t j, int64_t, Vec du) {
                                      store(line + c * pitch + j, du);
                                    });
                       const int64_t row = output_row(conv, tile, t, h);
                       for (int64_t c = 0; c < conv.out; ++c) {
                         const Activation activate(input.scale, input.shift, input.silu, c);
                         activation_bwd(line + c * pitch, x + row + c * channel, activate, width,
                                        dx + row + c * channel, sums + c, sums + conv.out + c);
                       }
                     });
}

template <typename Element>
constexpr int64_t kColumns = kLanes * 4 / sizeof(Element);  // in a vector

// Rows of dz and of the input of one tap in time and rows, and the partial gradients of its column
// taps.
template <typename Element>
struct GradientTile {
  const Element *dz, *x;
  int64_t rows, vectors;
  int64_t dz_row, dz_channel, x_row, x_channel;
  float* to;
  int64_t to_out, to_in;
};

// Accumulates over the rows dot products of kOut channels of dz and kChannels channels of x for
// kCount column taps.
template <int kChannels, int kCount, typename Element>
void dot_rows(const GradientTile<Element>& m, const int64_t* offset, int num_out) {
  Vec sum[kOut][kChannels][kCount] = {};
  for (int64_t r = 0; r < m.rows; ++r)
    for (int64_t v = 0; v < m.vectors; ++v) {
      const Element* const dz = m.dz + r * m.dz_row + v * kColumns<Element>;
      const Element* const x = m.x + r * m.x_row + v * kColumns<Element>;
      BitVec gradient[kOut];
      for (int o = 0; o < kOut; ++o)
        gradient[o] = load_words((const uint32_t*)(dz + o * m.dz_channel));
      for (int c = 0; c < kChannels; ++c)
        for (int k = 0; k < kCount; ++k) {
          const BitVec column = load_words((const uint32_t*)(x + c * m.x_channel + offset[k]));
          for (int o = 0; o < kOut; ++o)
            sum[o][c][k] = Dot<Element>::dot(gradient[o], column, sum[o][c][k]);
        }
    }
  for (int o = 0; o < num_out; ++o)
    for (int c = 0; c < kChannels; ++c)
      for (int k = 0; k < kCount; ++k)
        accumulate(m.to + o * m.to_out + c * m.to_in + 4 * k, sum[o][c][k]);
}

template <int kChannels, typename Element>
void dot_rows(GradientTile<Element> m, const int64_t* offset, int64_t kernel, int num_out) {
  int64_t k = 0;
  for (; k + kTaps <= kernel; k += kTaps, m.to += 4 * kTaps)
    dot_rows<kChannels, kTaps>(m, offset + k, num_out);
  for (; k < kernel; ++k, m.to += 4) dot_rows<kChannels, 1>(m, offset + k, num_out);
}

// The staged gradient of a frame of outputs, with zeros after each row and channel.
template <typename Element>
struct Gradient {
  Element* data;
  int64_t channel, row;

  Gradient(const Conv& conv, float* data)
      : data((Element*)data),
        channel(round_up(conv.columns.outputs, kMaxColumns)),
        row(channel * round_up(conv.out, kOut)) {}

  template <typename S>
  void stage(const Conv& conv, const Tile& tile, const S* dz, int64_t t, float* bias) const {
    for (int64_t o = 0; o < conv.out; ++o) {
      Vec frame = {};
      for (int64_t h = tile.row; h < tile.row_end; ++h) {
        Vec sum = {};
        const S* const from = dz + output_row(conv, tile, t, h) + o * output_channel_stride(conv);
        Element* const to = data + (h - tile.row) * row + o * channel;
        over_vectors(conv.columns.outputs, [&](int64_t j, int64_t count) {
          const Vec x = load(from + j, count);
          sum += x;
          store(to + j, x, count);
        });
        frame += sum;
      }
      accumulate(bias + 4 * o, frame);
    }
  }
};

// Adds the partial gradients of the taps at a in time and b in rows, for the outputs of frame t.
template <typename Element>
void tap_gradients(const Conv& conv, const Tile& tile, const Window<Element>& window,
                   const ColumnTaps& columns, const Gradient<Element>& gradient, int64_t t,
                   int64_t a, int64_t b, float* partial) {
  const int64_t frame = conv.time.at(t, a);
  int64_t row = tile.row, row_end = tile.row_end;
  while (row < row_end && conv.rows.at(row, b) < 0) ++row;
  while (row < row_end && conv.rows.at(row_end - 1, b) < 0) --row_end;
  if (frame < 0 || row == row_end) return;
  const int64_t kernel = conv.columns.kernel, of_in = 4 * conv.taps(), of_out = of_in * conv.in;
  const Element* const x = window.row(frame, conv.rows.at(row, b));
  partial += 4 * (a * conv.rows.kernel + b) * kernel;
  for (int64_t o = 0; o < conv.out; o += kOut)
    for (int64_t c = 0; c < conv.in;) {
      const GradientTile<Element> gradient_tile{
          gradient.data + (row - tile.row) * gradient.row + o * gradient.channel,
          x + c * window.channel(),
          row_end - row,
          (conv.columns.outputs + kColumns<Element> - 1) / kColumns<Element>,
          gradient.row,
          gradient.channel,
          conv.rows.stride * window.pitch(),
          window.channel(),
          partial + o * of_out + c * of_in,
          of_out,
          of_in};
      const int num_out = conv.out - o < kOut ? conv.out - o : kOut;
      if (c + kIn <= conv.in) {
        dot_rows<kIn>(gradient_tile, columns.offset, kernel, num_out);
        c += kIn;
      } else {
        dot_rows<1>(gradient_tile, columns.offset, kernel, num_out);
        ++c;
      }
    }
}

template <typename Element, typename S, typename T>
void of_weight_tile(const Conv& conv, const Tile& tile, const T* x, const S* dz, float* partial,
                    float* scratch) {
  Window<Element> window(conv, tile.row, tile.row_end, scratch);
  const ColumnTaps columns(conv, window);
  const Gradient<Element> gradient(conv, scratch + conv_scratch(conv, tile.row_end - tile.row));
  float* const bias = partial + 4 * conv.out * conv.in * conv.taps();
  for (int64_t t = tile.frame; t < tile.frame_end; ++t) {
    window.reach(x + tile.batch * conv.source_size(), t);
    gradient.stage(conv, tile, dz, t, bias);
    for (int64_t a = 0; a < conv.time.kernel; ++a)
      for (int64_t b = 0; b < conv.rows.kernel; ++b)
        tap_gradients(conv, tile, window, columns, gradient, t, a, b, partial);
  }
}

void of_input(const Conv& conv, const Tile& tile, Dtype dtype, const void* dz,
              const Activated& input, void* dx, double* sums, float* scratch) {
  with_type(dtype, [&]<typename S>(S) {
    with_type(input.dtype, [&]<typename T>(T) {
      with_elements(conv, [&]<typename Element>(Element) {
        of_input_tile<Element>(conv, tile, (const S*)dz, (const T*)input.x, input, (T*)dx, sums,
                               scratch);
      });
    });
  });
}

void of_weight(const Conv& conv, const Tile& tile, Dtype dtype, const void* x, Dtype dz_dtype,
               const void* dz, bool is_bfloat16, float* partial, float* scratch) {
#if defined(__AVX512BF16__)
  if (is_bfloat16 && dtype == Dtype::bfloat16 && dz_dtype == Dtype::bfloat16)
    return of_weight_tile<bfloat16>(conv, tile, (const bfloat16*)x, (const bfloat16*)dz, partial,
                                    scratch);
#endif
  with_type(dz_dtype, [&]<typename S>(S) {
    with_type(dtype, [&]<typename T>(T) {
      of_weight_tile<float>(conv, tile, (const T*)x, (const S*)dz, partial, scratch);
    });
  });
}

}  // namespace

extern const CausalConvGradient causal_conv_gradient{of_input, of_weight};

}  // namespace emu3::EMU3_LEVEL
