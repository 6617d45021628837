#include "cpu/norm/rms_norm.h"

#include <optional>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

using torch::headeronly::ScalarType;

struct Forward {
  Tensor y, summed, rstd;
};

// Without a residual summed is undefined. Without dropout nothing is dropped. A row is read before
// it is written, so that y and summed may be x and the residual.
Tensor run_forward_into(Tensor& y, Tensor& summed, const Tensor& x, const Tensor* residual,
                        const Tensor& weight, double eps, const Dropout* dropout) {
  const int64_t rows = x.size(0), width = x.size(1);
  Tensor rstd = empty(x, {rows}, ScalarType::Float);
  const Dtype dtype = dtype_of(x);
  const bool in_place = y.const_data_ptr() == x.const_data_ptr();  // then its lines are cached
  const bool past = past_caches(y) && !in_place;
  torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    rms_norm().forward(
        dtype, at(x, begin * x.stride(0)),
        residual ? at(*residual, begin * residual->stride(0)) : nullptr, at(weight, 0),
        mutable_at(y, begin * width), residual ? mutable_at(summed, begin * width) : nullptr,
        (float*)mutable_at(rstd, begin), end - begin, width, x.stride(0),
        residual ? residual->stride(0) : 0, static_cast<float>(eps), dropout, begin, past);
  });
  return rstd;
}

Forward run_forward(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
                    const Dropout* dropout) {
  Tensor y = empty(x, {x.size(0), x.size(1)});
  Tensor summed = residual ? empty(x, {x.size(0), x.size(1)}) : Tensor();
  Tensor rstd = run_forward_into(y, summed, x, residual, weight, eps, dropout);
  return {y, summed, rstd};
}

struct Backward {
  Tensor dx, dresidual, dweight;
};

// Without dropout dresidual is dx and left undefined. dweight is summed over blocks of rows, then
// over the blocks: the same numbers on any number of threads.
Backward run_backward(const Tensor& dy, const Tensor* dsummed, const Tensor& x,
                      const Tensor& weight, const Tensor& rstd, const Dropout* dropout) {
  constexpr int64_t kMaxBlocks = 32, kMinRows = 16;
  const int64_t rows = x.size(0), width = x.size(1);
  const int64_t block = std::max(kMinRows, (rows + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (rows + block - 1) / block;
  Tensor dx = empty(x, {rows, width});
  Tensor dresidual = dropout ? empty(x, {rows, width}) : Tensor();
  Tensor dweight = empty(weight, {width});
  Tensor partial = empty(x, {blocks, padded_width(width)}, ScalarType::Float);
  const Dtype dtype = dtype_of(x);
  const bool past = past_caches(dx);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * block, end = std::min(rows, begin + block);
      rms_norm().backward(
          dtype, at(dy, begin * dy.stride(0)),
          dsummed ? at(*dsummed, begin * dsummed->stride(0)) : nullptr, at(x, begin * x.stride(0)),
          at(weight, 0), (const float*)at(rstd, begin), mutable_at(dx, begin * width),
          dropout ? mutable_at(dresidual, begin * width) : nullptr,
          (float*)mutable_at(partial, b * padded_width(width)), end - begin, width, dy.stride(0),
          dsummed ? dsummed->stride(0) : 0, x.stride(0), dropout, begin, past);
    }
  });
  rms_norm().reduce(dtype, (const float*)at(partial, 0), mutable_at(dweight, 0), blocks, width);
  return {dx, dresidual, dweight};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, double eps) {
  Forward result = run_forward(x, nullptr, weight, eps, nullptr);
  return {result.y, result.rstd};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                    const Tensor& rstd) {
  Backward result = run_backward(dy, nullptr, x, weight, rstd, nullptr);
  return {result.dx, result.dweight};
}

// Nothing is dropped without a seed.
std::tuple<Tensor, Tensor, Tensor> add_forward(const Tensor& x, const Tensor& residual,
                                               const Tensor& weight, double eps, double dropout_p,
                                               const std::optional<Tensor>& seed,
                                               const std::optional<Tensor>& dropout_rows) {
  const Dropout dropout = seed ? dropout_of(dropout_p, *seed, dropout_rows) : Dropout{};
  Forward result = run_forward(x, &residual, weight, eps, seed ? &dropout : nullptr);
  return {result.y, result.summed, result.rstd};
}

void add_forward_out(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                     double dropout_p, const std::optional<Tensor>& seed,
                     const std::optional<Tensor>& dropout_rows, Tensor y, Tensor summed) {
  const Dropout dropout = seed ? dropout_of(dropout_p, *seed, dropout_rows) : Dropout{};
  run_forward_into(y, summed, x, &residual, weight, eps, seed ? &dropout : nullptr);
}

std::tuple<Tensor, Tensor> add_backward(const Tensor& dy, const Tensor& dsummed,
                                        const Tensor& summed, const Tensor& weight,
                                        const Tensor& rstd) {
  Backward result = run_backward(dy, &dsummed, summed, weight, rstd, nullptr);
  return {result.dx, result.dweight};
}

std::tuple<Tensor, Tensor, Tensor> add_backward_dropped(const Tensor& dy, const Tensor& dsummed,
                                                        const Tensor& summed, const Tensor& weight,
                                                        const Tensor& rstd, double dropout_p,
                                                        const Tensor& seed,
                                                        const std::optional<Tensor>& dropout_rows) {
  const Dropout dropout = dropout_of(dropout_p, seed, dropout_rows);
  Backward result = run_backward(dy, &dsummed, summed, weight, rstd, &dropout);
  return {result.dx, result.dresidual, result.dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps, float dropout_p,"
      " Tensor? seed, Tensor? dropout_rows) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm_out(Tensor x, Tensor residual, Tensor weight, float eps, float dropout_p,"
      " Tensor? seed, Tensor? dropout_rows, Tensor(a!) y, Tensor(b!) summed) -> ()");
  m.def(
      "add_rms_norm_backward(Tensor dy, Tensor dsummed, Tensor summed, Tensor weight, Tensor rstd)"
      " -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm_backward_dropped(Tensor dy, Tensor dsummed, Tensor summed, Tensor weight,"
      " Tensor rstd, float dropout_p, Tensor seed, Tensor? dropout_rows)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&forward));
  m.impl("rms_norm_backward", TORCH_BOX(&backward));
  m.impl("add_rms_norm_forward", TORCH_BOX(&add_forward));
  m.impl("add_rms_norm_out", TORCH_BOX(&add_forward_out));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_backward));
  m.impl("add_rms_norm_backward_dropped", TORCH_BOX(&add_backward_dropped));
}

}  // namespace emu3
