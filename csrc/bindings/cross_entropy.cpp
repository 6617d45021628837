#include "../cpu/cross_entropy.h"

#include <cmath>
#include <cstring>
#include <tuple>

#include "torch_stable.h"

namespace emu3 {
namespace {

using torch::headeronly::ScalarType;

// Rows of logits, and what each is compared with. A row of weight 0 is not read.
struct Rows {
  Dtype dtype;
  int64_t count, classes, stride;
  const int64_t* targets;
  const float* weights;

  Rows(const Tensor& logits, const Tensor& targets_of, const Tensor& weights_of)
      : dtype(dtype_of(logits)),
        count(logits.size(0)),
        classes(logits.size(1)),
        stride(logits.stride(0)),
        targets(static_cast<const int64_t*>(targets_of.const_data_ptr())),
        weights(static_cast<const float*>(weights_of.const_data_ptr())) {
    for (int64_t row = 0; row < count; ++row)
      STD_TORCH_CHECK(weights[row] == 0 || (0 <= targets[row] && targets[row] < classes),
                      "cross_entropy: targets must lie in [0, ", classes, "), got ", targets[row]);
  }
};

// Calls body(row) for every row, a row being the work of one thread.
template <typename Body>
void each(const Rows& rows, Body body) {
  torch::stable::parallel_for(0, rows.count, row_grain(rows.classes),
                              [&](int64_t row, int64_t end) {
                                for (; row < end; ++row) body(row);
                              });
}

LossSettings settings(double z_loss, double label_smoothing, int64_t num_classes) {
  return {static_cast<float>(z_loss), static_cast<float>(label_smoothing), num_classes};
}

// lse - (1 - s) * logits[target] - s * mean(logits) + z * lse^2.
float loss_of(const Sums& sums, const LossSettings& chosen) {
  const double smoothing = chosen.label_smoothing, lse = sums.highest + std::log(sums.sum);
  const double loss = lse - (1 - smoothing) * sums.target + chosen.z_loss * lse * lse;
  return static_cast<float>(smoothing ? loss - smoothing * sums.total / chosen.num_classes : loss);
}

// logits [rows, V] with unit stride in V; targets and weights [rows], contiguous. Returns the loss
// of each row and its Denominator, [rows, 2]; 0 where the weight is 0.
std::tuple<Tensor, Tensor> forward(const Tensor& logits, const Tensor& targets,
                                   const Tensor& weights, double z_loss, double label_smoothing) {
  const Rows rows(logits, targets, weights);
  Tensor losses = fresh(logits, {rows.count}, ScalarType::Float);
  Tensor denominators = fresh(logits, {rows.count, 2}, ScalarType::Float);
  auto* const to = static_cast<float*>(losses.mutable_data_ptr());
  auto* const denominator_of = static_cast<Denominator*>(denominators.mutable_data_ptr());
  const LossSettings chosen = settings(z_loss, label_smoothing, rows.classes);
  each(rows, [&](int64_t row) {
    to[row] = 0;
    denominator_of[row] = {0, 0};
    if (rows.weights[row] == 0) return;
    Sums sums;
    cross_entropy().add(rows.dtype, at(logits, row * rows.stride), rows.classes, rows.targets[row],
                        chosen, &sums);
    to[row] = loss_of(sums, chosen);
    denominator_of[row] = {static_cast<float>(sums.highest),
                           static_cast<float>(std::log2(sums.sum))};
  });
  return {losses, denominators};
}

// The gradient of Σ dlosses * losses, contiguous; exactly 0 where dlosses is 0.
Tensor backward(const Tensor& dlosses, const Tensor& logits, const Tensor& targets,
                const Tensor& denominators, double z_loss, double label_smoothing) {
  const Rows rows(logits, targets, dlosses);
  Tensor dlogits = fresh(logits, {rows.count, rows.classes});
  const auto* const denominator_of = static_cast<const Denominator*>(denominators.const_data_ptr());
  const bool past = past_caches(dlogits);
  const LossSettings chosen = settings(z_loss, label_smoothing, rows.classes);
  each(rows, [&](int64_t row) {
    char* const to = mutable_at(dlogits, row * rows.classes);
    if (rows.weights[row] == 0) {
      std::memset(to, 0, rows.classes * dlogits.element_size());
      return;
    }
    cross_entropy().backward(rows.dtype, at(logits, row * rows.stride), to, rows.classes,
                             rows.targets[row], denominator_of[row], rows.weights[row], chosen,
                             past);
  });
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor targets, Tensor weights, float z_loss, "
      "float label_smoothing) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor targets, Tensor denominators, "
      "float z_loss, float label_smoothing) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&backward));
}

}  // namespace emu3
