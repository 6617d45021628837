#include "group_norm_images.h"

namespace emu3 {
namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight,
                                           const Tensor& bias, int64_t groups, double eps,
                                           bool silu) {
  const Images m = images_of(x, groups);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor mean = torch::stable::new_empty(x, {m.batch, groups}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {m.batch, groups}, ScalarType::Float);
  const bool past = past_caches(y);
  over_images(m, [&](int64_t first, int64_t count) {
    take_statistics(m, x, first, count, eps, mean, rstd);
    const Floats affine = affine_of(m, first, count, mean, rstd, weight, bias);
    over_chunks(m, count, true, [&](int64_t image, int64_t, int64_t row, int64_t rows) {
      const int64_t offset = m.offset(first + image, row);
      group_norm().apply(m.dtype, at(x, offset), mutable_at(y, offset), rows, m.channels,
                         affine.at(image * 3 * m.padded), silu, past);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                            const Tensor& bias, const Tensor& mean,
                                            const Tensor& rstd, int64_t groups, bool silu) {
  const Images m = images_of(x, groups);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dweight = torch::stable::new_empty(weight, {m.channels});
  Tensor dbias = torch::stable::new_empty(bias, {m.channels});
  const bool past = past_caches(dx);
  const int64_t size = 2 * m.padded;
  std::vector<double> totals(size);
  over_images(m, [&](int64_t first, int64_t count) {
    const Floats affine = affine_of(m, first, count, mean, rstd, weight, bias);
    Floats parts(count * m.chunks * size), slopes(count * size);
    over_chunks(m, count, false, [&](int64_t image, int64_t unit, int64_t row, int64_t rows) {
      const int64_t offset = m.offset(first + image, row);
      group_norm().sums(m.dtype, at(dy, offset), at(x, offset), rows, m.channels,
                        affine.at(image * 3 * m.padded), silu, parts.at(unit * size));
    });
    std::vector<double> sums = sum_parts(parts, count, m.chunks, size);
    over_each(count, [&](int64_t i) {
      take_slopes(m, &sums[i * size], rstd, weight, first + i, slopes.at(i * size));
    });
    for (int64_t i = 0; i < count * size; ++i) totals[i % size] += sums[i];
    over_chunks(m, count, true, [&](int64_t image, int64_t, int64_t row, int64_t rows) {
      const int64_t offset = m.offset(first + image, row);
      group_norm().backward(m.dtype, at(dy, offset), at(x, offset), mutable_at(dx, offset), rows,
                            m.channels, affine.at(image * 3 * m.padded), slopes.at(image * size),
                            silu, past);
    });
  });
  group_norm().write(m.dtype, totals.data(), mutable_at(dbias, 0), m.channels, 1);
  group_norm().write(m.dtype, totals.data() + m.padded, mutable_at(dweight, 0), m.channels, 1);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "group_norm_forward(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
      " Tensor rstd, int groups, bool silu) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("group_norm_forward", TORCH_BOX(&forward));
  m.impl("group_norm_backward", TORCH_BOX(&backward));
}

}  // namespace emu3
