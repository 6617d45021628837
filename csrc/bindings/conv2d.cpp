#include "cpu/conv2d/conv3x3.h"

#include <algorithm>
#include <optional>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

// x, residual and the output are [B, H, W, channels], weight is [out, 3, 3, in], all bfloat16; bias
// [out] is float32.
Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
               const std::optional<Tensor>& residual) {
  Tensor y = empty(x, {x.size(0), x.size(1), x.size(2), weight.size(0)});
  const int64_t in = x.size(3), out = weight.size(0);
  const std::unique_ptr<float, Free> packed_weights = uninitialised(kPoints * in * out);
  const Conv3x3Call call{
      .height = x.size(1),
      .width = x.size(2),
      .in = in,
      .out = out,
      .x = x.const_data_ptr(),
      .packed_weights = packed_weights.get(),
      .bias = static_cast<const float*>(bias.const_data_ptr()),
      .residual = residual ? residual->const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
  };
  constexpr int64_t kAtOnce = 16;  // input channels
  const int64_t parts = in / kAtOnce;
  torch::stable::parallel_for(0, out / kOutBlock * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t o = i / parts * kOutBlock, c = i % parts * kAtOnce;
      conv3x3().pack(at(weight, o * 9 * in), in, c, c + kAtOnce,
                     packed_weights.get() + o * kPoints * in);
    }
  });
  // The same number of blocks for every thread and, up to one, of tiles for every block.
  const int64_t tiles = x.size(0) * call.rows() * call.columns();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rounds = (tiles + kMaxTiles * threads - 1) / (kMaxTiles * threads);
  const int64_t blocks = std::min(tiles, rounds * threads);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t block, int64_t end) {
    const std::unique_ptr<float, Free> scratch = uninitialised(conv3x3_scratch(call));
    for (; block < end; ++block) {
      const int64_t first = tiles * block / blocks, last = tiles * (block + 1) / blocks;
      conv3x3().forward(call, first, last - first, scratch.get());
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def("conv3x3(Tensor x, Tensor weight, Tensor bias, Tensor? residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) { m.impl("conv3x3", TORCH_BOX(&forward)); }

}  // namespace emu3
