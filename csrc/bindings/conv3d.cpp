#include "cpu/conv3d/causal_conv.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

using torch::headeronly::ScalarType;

template <typename T>
const T* data(const std::optional<Tensor>& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

float* mutable_floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

struct Settings {
  std::vector<int64_t> stride;
  int64_t front;
  bool silu, post_silu;
};

// Pads p // 2 + p % 2 zeros before rows and columns, and `front` before frames.
Axis axis(const Tensor& x, const Tensor& weight, const Settings& settings, int i) {
  const int64_t kernel = weight.size(2 + i), stride = settings.stride[i], size = x.size(2 + i);
  const int64_t padding = i ? (kernel - stride + 1) / 2 : settings.front;
  const int64_t frames = std::max<int64_t>(0, (size + padding - kernel + stride) / stride);
  return {kernel, stride, padding, size, i ? size / stride : frames, false};
}

Conv convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                 const Settings& settings) {
  return {
      .time = axis(x, weight, settings, 0),
      .rows = axis(x, weight, settings, 1),
      .columns = axis(x, weight, settings, 2),
      .in = x.size(1),
      .out = weight.size(0),
      .channels_per_word = 1,
      .weight = nullptr,
      .bias = data<float>(bias),
      .scale = data<float>(scale),
      .shift = data<float>(shift),
      .silu = settings.silu,
      .post_silu = settings.post_silu,
  };
}

// Returns the transposed convolution, from the gradient of the outputs to that of the source.
Conv gradient(const Conv& conv) {
  const auto transposed = [](Axis axis) {
    std::swap(axis.source, axis.outputs);
    axis.gradient = true;
    return axis;
  };
  return {
      .time = transposed(conv.time),
      .rows = transposed(conv.rows),
      .columns = transposed(conv.columns),
      .in = conv.out,
      .out = conv.in,
      .channels_per_word = 1,
      .weight = nullptr,
      .bias = nullptr,
      .scale = nullptr,
      .shift = nullptr,
      .silu = false,
      .post_silu = false,
  };
}

// Packs float32 or bfloat16 weights for `conv`, with zeros for missing channels, and returns their
// memory. A word has two input channels if weights and source are bfloat16 and the level has a
// bfloat16 dot product.
std::vector<uint32_t> pack(Conv& conv, Dtype source, const Tensor& weight) {
  const bool is_bfloat16 = dtype_of(weight) == Dtype::bfloat16;
  if (is_bfloat16 && source == Dtype::bfloat16)
    conv.channels_per_word = causal_conv().bfloat16_channels_per_word;
  const auto* const words = static_cast<const uint32_t*>(weight.const_data_ptr());
  const auto* const half = static_cast<const uint16_t*>(weight.const_data_ptr());
  const int64_t planes = conv.time.kernel * conv.rows.kernel, columns = conv.columns.kernel;
  const bool transposed = conv.columns.gradient;
  const int64_t by_out = transposed ? conv.taps() : conv.in * conv.taps();
  const int64_t by_in = transposed ? conv.out * conv.taps() : conv.taps();
  const int64_t block = conv.words() * conv.taps() * kOut;
  std::vector<uint32_t> to(round_up(conv.out, kOut) / kOut * block);
  for (int64_t o = 0; o < conv.out; ++o)
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t c = 0; c < conv.in; ++c)
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t from =
              o * by_out + c * by_in + plane * columns + (transposed ? columns - 1 - k : k);
          const int64_t word = (plane * conv.words() + c / conv.channels_per_word) * columns + k;
          // The upper half of a word is the second channel of a pair, or a bfloat16 as a float.
          const int shift = is_bfloat16 && (conv.channels_per_word == 1 || c % 2) ? 16 : 0;
          to[o / kOut * block + word * kOut + o % kOut] |=
              is_bfloat16 ? uint32_t{half[from]} << shift : words[from];
        }
  conv.weight = to.data();
  return to;
}

// Divides the outputs of a batch into tiles, about `wanted` or more, of few enough rows that the
// staged source of one fits the L2 cache. No output depends on the tiles.
std::vector<Tile> tiles(const Conv& conv, int64_t batch, int64_t wanted) {
  constexpr int64_t kMinRows = 32, kCache = 96 << 10;  // rows; floats
  const int64_t rows = conv.rows.outputs, frames = conv.time.outputs;
  if (!rows || !frames || !batch || !conv.columns.outputs) return {};
  const int64_t fit = std::max(kMinRows / 8, rows * kCache / window_size(conv, rows));
  const int64_t wanted_per_image = (wanted + batch - 1) / batch;
  const int64_t parts = std::max((rows + fit - 1) / fit,
                                 std::min(wanted_per_image, std::max<int64_t>(1, rows / kMinRows)));
  const int64_t slices = std::min(frames, (wanted_per_image + parts - 1) / parts);
  std::vector<Tile> all;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t slice = 0; slice < slices; ++slice)
      for (int64_t part = 0; part < parts; ++part)
        all.push_back({b, frames * slice / slices, frames * (slice + 1) / slices,
                       rows * part / parts, rows * (part + 1) / parts});
  return all;
}

int64_t max_rows(const std::vector<Tile>& all) {
  int64_t rows = 0;
  for (const Tile& tile : all) rows = std::max(rows, tile.row_end - tile.row);
  return rows;
}

// Calls body(tile, part, scratch) for every tile, with `size` zeroed floats. Tiles i, i + parts, …
// are part i and run in this order; a free thread takes the next part.
template <typename Body>
void over_tiles(const std::vector<Tile>& all, int64_t parts, int64_t size, Body body) {
  const int64_t count = static_cast<int64_t>(all.size());
  const int64_t workers = std::min<int64_t>(parts, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t worker, int64_t end) {
    const std::unique_ptr<float, Free> scratch = uninitialised(size);
    for (; worker < end; ++worker)
      for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;)
        for (int64_t i = part; i < count; i += parts) {
          std::fill_n(scratch.get(), size, 0.0f);
          body(all[i], part, scratch.get());
        }
  });
}

template <typename Body>
void over_tiles(const std::vector<Tile>& all, int64_t size, Body body) {
  over_tiles(all, static_cast<int64_t>(all.size()), size, body);
}

int64_t threads() { return torch::stable::get_num_threads(); }

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
               const std::optional<Tensor>& residual, std::vector<int64_t> stride, int64_t front,
               bool silu, bool post_silu) {
  const Settings settings{std::move(stride), front, silu, post_silu};
  Conv conv = convolution(x, weight, bias, scale, shift, settings);
  const auto weights = pack(conv, dtype_of(x), weight);
  Tensor y = torch::stable::new_empty(
      x, {x.size(0), conv.out, conv.time.outputs, conv.rows.outputs, conv.columns.outputs});
  const std::vector<Tile> all = tiles(conv, x.size(0), 2 * threads());
  over_tiles(all, conv_scratch(conv, max_rows(all)),
             [&](const Tile& tile, int64_t, float* scratch) {
               causal_conv().forward(conv, tile, dtype_of(x), x.const_data_ptr(),
                                     residual ? residual->const_data_ptr() : nullptr,
                                     y.mutable_data_ptr(), scratch);
             });
  return y;
}

// Returns dy * silu'(z), where z is the input of SiLU, which is computed again.
Tensor before_silu(const Conv& conv, const Tensor& dy, const Tensor& x, const Tensor& weight) {
  Conv again = conv;
  const auto weights = pack(again, dtype_of(x), weight);
  Tensor dz = torch::stable::new_empty(dy, dy.sizes(), ScalarType::Float);
  const std::vector<Tile> all = tiles(conv, x.size(0), 2 * threads());
  over_tiles(all, conv_scratch(conv, max_rows(all)),
             [&](const Tile& tile, int64_t, float* scratch) {
               causal_conv().activation_gradient(again, tile, dtype_of(x), x.const_data_ptr(),
                                                 dy.const_data_ptr(), mutable_floats(dz), scratch);
             });
  return dz;
}

// The number of partial sums depends on the shape alone, so that gradients do not depend on the
// threads.
constexpr int64_t kParts = 16;

int64_t num_parts(const std::vector<Tile>& all) {
  return std::min(kParts, static_cast<int64_t>(all.size()));
}

// Returns dx, and dscale and dshift [2, in].
std::tuple<Tensor, Tensor> input_gradient(const Conv& conv, const Tensor& dz, const Tensor& x,
                                          const Tensor& weight) {
  Conv back = gradient(conv);
  const auto weights = pack(back, dtype_of(dz), weight);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dnorm = torch::stable::new_empty(x, {2, conv.in}, ScalarType::Float);
  const std::vector<Tile> all = tiles(back, x.size(0), kParts);
  const int64_t size = 2 * conv.in, rows = max_rows(all), parts = num_parts(all);
  std::vector<double> sums(parts * size);
  const Activated input{dtype_of(x), x.const_data_ptr(), conv.scale, conv.shift, conv.silu};
  over_tiles(
      all, parts, input_scratch(back, rows), [&](const Tile& tile, int64_t part, float* scratch) {
        causal_conv_gradient().of_input(back, tile, dtype_of(dz), dz.const_data_ptr(), input,
                                        dx.mutable_data_ptr(), sums.data() + part * size, scratch);
      });
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * size + i];
    mutable_floats(dnorm)[i] = static_cast<float>(sum);
  }
  return {dx, dnorm};
}

// Returns dweight and dbias in float32.
std::tuple<Tensor, Tensor> weight_gradient(const Conv& conv, const Tensor& dz, const Tensor& x,
                                           const Tensor& weight) {
  Tensor dweight = torch::stable::new_empty(weight, weight.sizes(), ScalarType::Float);
  Tensor dbias = torch::stable::new_empty(weight, {conv.out}, ScalarType::Float);
  const std::vector<Tile> all = tiles(conv, x.size(0), kParts);
  const int64_t size = partial_size(conv), rows = max_rows(all), parts = num_parts(all);
  std::vector<float> partial(parts * size);
  const bool is_bfloat16 = dtype_of(weight) == Dtype::bfloat16;
  over_tiles(all, parts, weight_scratch(conv, rows),
             [&](const Tile& tile, int64_t part, float* scratch) {
               causal_conv_gradient().of_weight(conv, tile, dtype_of(x), x.const_data_ptr(),
                                                dtype_of(dz), dz.const_data_ptr(), is_bfloat16,
                                                partial.data() + part * size, scratch);
             });
  const int64_t num_weights = size / 4 - conv.out;
  torch::stable::parallel_for(0, size / 4, 1024, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      float sum[4] = {};
      for (int64_t part = 0; part < parts; ++part)
        for (int lane = 0; lane < 4; ++lane) sum[lane] += partial[part * size + 4 * i + lane];
      float* const to =
          i < num_weights ? mutable_floats(dweight) + i : mutable_floats(dbias) + i - num_weights;
      *to = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  });
  return {dweight, dbias};
}

using Gradients = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
                             std::optional<Tensor>>;

// Returns dx in the dtype of x, and dweight, dbias [O] and [dscale, dshift] in float32: dx and the
// gradients of the norm if `of_input`, dweight and dbias if `of_weight`.
Gradients backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& shift, std::vector<int64_t> stride, int64_t front,
                   bool silu, bool post_silu, bool of_input, bool of_weight) {
  const Settings settings{std::move(stride), front, silu, post_silu};
  const Conv conv = convolution(x, weight, bias, scale, shift, settings);
  const Tensor dz = post_silu ? before_silu(conv, dy, x, weight) : dy;
  std::optional<Tensor> dx, dweight, dbias, dnorm;
  if (of_input) std::tie(dx, dnorm) = input_gradient(conv, dz, x, weight);
  if (of_weight) std::tie(dweight, dbias) = weight_gradient(conv, dz, x, weight);
  return {dx, dweight, dbias, dnorm};
}

Tensor block(const Tensor& x, const Tensor& scale1, const Tensor& shift1, const Tensor& weight1,
             const Tensor& bias1, const Tensor& scale2, const Tensor& shift2, const Tensor& weight2,
             const Tensor& bias2) {
  const Settings settings{{1, 1, 1}, 2, true, false};
  Conv first = convolution(x, weight1, bias1, scale1, shift1, settings);
  Conv second = convolution(x, weight2, bias2, scale2, shift2, settings);
  const auto weights1 = pack(first, dtype_of(x), weight1);
  const auto weights2 = pack(second, dtype_of(x), weight2);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const std::vector<Tile> all = tiles(second, x.size(0), threads());
  const int64_t size = block_scratch(first, second, max_rows(all));
  over_tiles(all, size, [&](const Tile& tile, int64_t, float* scratch) {
    causal_conv().block(first, second, tile, dtype_of(x), x.const_data_ptr(), y.mutable_data_ptr(),
                        scratch);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "causal_conv_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift,"
      " Tensor? residual, int[] stride, int front, bool silu, bool post_silu) -> Tensor");
  m.def(
      "causal_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? scale,"
      " Tensor? shift, int[] stride, int front, bool silu, bool post_silu, bool of_input,"
      " bool of_weight) -> (Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def(
      "temporal_residual(Tensor x, Tensor scale1, Tensor shift1, Tensor weight1, Tensor bias1,"
      " Tensor scale2, Tensor shift2, Tensor weight2, Tensor bias2) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("causal_conv_forward", TORCH_BOX(&forward));
  m.impl("causal_conv_backward", TORCH_BOX(&backward));
  m.impl("temporal_residual", TORCH_BOX(&block));
}

}  // namespace emu3
