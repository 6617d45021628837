#include "cpu/loss/cross_entropy.h"

#include <cmath>
#include <cstring>
#include <tuple>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

using torch::headeronly::ScalarType;

// Calls body(row) for every row in parallel.
template <typename Body>
void each(const Tensor& logits, Body body) {
  const int64_t grain = row_grain(logits.size(1));
  torch::stable::parallel_for(0, logits.size(0), grain, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) body(row);
  });
}

// Rows of logits with their targets and weights. A row of weight 0 is not read.
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

LossSettings settings_of(double z_loss, double label_smoothing, int64_t num_classes) {
  return {static_cast<float>(z_loss), static_cast<float>(label_smoothing), num_classes};
}

// lse - (1 - s) * logits[target] - s * mean(logits) + z * lse^2.
float loss_of(const PartialSums& sums, const LossSettings& options) {
  const double smoothing = options.label_smoothing, lse = sums.m + std::log(sums.l);
  const double loss = lse - (1 - smoothing) * sums.target + options.z_loss * lse * lse;
  return static_cast<float>(smoothing ? loss - smoothing * sums.sum / options.num_classes : loss);
}

// logits [rows, V] have unit stride in V; targets and weights [rows] are contiguous. Returns the
// loss and the Denominator [rows, 2] of each row; both are 0 where the weight is 0.
std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets,
                                             const Tensor& weights, double z_loss,
                                             double label_smoothing) {
  const Rows rows(logits, targets, weights);
  Tensor losses = empty(logits, {rows.count}, ScalarType::Float);
  Tensor denominators = empty(logits, {rows.count, 2}, ScalarType::Float);
  auto* const to = static_cast<float*>(losses.mutable_data_ptr());
  auto* const denominator_of = static_cast<Denominator*>(denominators.mutable_data_ptr());
  const LossSettings options = settings_of(z_loss, label_smoothing, rows.classes);
  each(logits, [&](int64_t row) {
    to[row] = 0;
    denominator_of[row] = {0, 0};
    if (rows.weights[row] == 0) return;
    PartialSums sums;
    cross_entropy().add(rows.dtype, at(logits, row * rows.stride), rows.classes, rows.targets[row],
                        options, &sums);
    to[row] = loss_of(sums, options);
    denominator_of[row] = {static_cast<float>(sums.m), static_cast<float>(std::log2(sums.l))};
  });
  return {losses, denominators};
}

// The gradient of Σ dlosses * losses, contiguous; exactly 0 where dlosses is 0.
Tensor cross_entropy_bwd(const Tensor& dlosses, const Tensor& logits, const Tensor& targets,
                         const Tensor& denominators, double z_loss, double label_smoothing) {
  const Rows rows(logits, targets, dlosses);
  Tensor dlogits = empty(logits, {rows.count, rows.classes});
  const auto* const denominator_of = static_cast<const Denominator*>(denominators.const_data_ptr());
  const bool past = past_caches(dlogits);
  const LossSettings options = settings_of(z_loss, label_smoothing, rows.classes);
  each(logits, [&](int64_t row) {
    char* const to = mutable_at(dlogits, row * rows.classes);
    if (rows.weights[row] == 0) {
      std::memset(to, 0, rows.classes * dlogits.element_size());
      return;
    }
    cross_entropy().backward(rows.dtype, at(logits, row * rows.stride), to, rows.classes,
                             rows.targets[row], denominator_of[row], rows.weights[row], options,
                             past);
  });
  return dlogits;
}

// The steps of linear_cross_entropy between its GEMMs, for one block of the vocabulary: logits
// [rows, block] are those of the classes from `first` on, with unit stride in the block.

// Adds a block to sums, float64 [rows, 4] (m, l, sum, target), which the block with first = 0
// initialises.
void add_block_(const Tensor& logits, const Tensor& targets, Tensor sums, int64_t first,
                double label_smoothing) {
  const auto* const target_of = static_cast<const int64_t*>(targets.const_data_ptr());
  auto* const sums_of = static_cast<PartialSums*>(sums.mutable_data_ptr());
  const Dtype dtype = dtype_of(logits);
  const LossSettings options = settings_of(0, label_smoothing, 0);
  each(logits, [&](int64_t row) {
    if (first == 0) sums_of[row] = PartialSums{};
    cross_entropy().add(dtype, at(logits, row * logits.stride(0)), logits.size(1),
                        target_of[row] - first, options, sums_of + row);
  });
}

// Overwrites the logits of a block with their gradient of Σ dlosses * losses; denominators are
// float32 [rows, 2].
void block_gradient_(Tensor logits, const Tensor& targets, const Tensor& denominators,
                     const Tensor& dlosses, int64_t first, int64_t num_classes, double z_loss,
                     double label_smoothing) {
  const auto* const target_of = static_cast<const int64_t*>(targets.const_data_ptr());
  const auto* const denominator_of = static_cast<const Denominator*>(denominators.const_data_ptr());
  const auto* const dloss_of = static_cast<const float*>(dlosses.const_data_ptr());
  const Dtype dtype = dtype_of(logits);
  const LossSettings options = settings_of(z_loss, label_smoothing, num_classes);
  each(logits, [&](int64_t row) {
    char* const block = mutable_at(logits, row * logits.stride(0));
    cross_entropy().backward(dtype, block, block, logits.size(1), target_of[row] - first,
                             denominator_of[row], dloss_of[row], options, false);
  });
}

// Calls body(i) for every element in parallel.
template <typename Body>
void over_halves(const Tensor& parts, Body body) {
  torch::stable::parallel_for(0, parts.numel(), 1 << 15, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) body(i);
  });
}

// Joins the upper and the lower 16 bits of float32 numbers; split_halves is the inverse.
void join_halves(const Tensor& upper, const Tensor& lower, Tensor numbers) {
  const auto* const high = static_cast<const uint16_t*>(upper.const_data_ptr());
  const auto* const low = static_cast<const uint16_t*>(lower.const_data_ptr());
  auto* const bits = static_cast<uint32_t*>(numbers.mutable_data_ptr());
  over_halves(upper, [=](int64_t i) { bits[i] = static_cast<uint32_t>(high[i]) << 16 | low[i]; });
}

void split_halves(Tensor upper, Tensor lower, const Tensor& numbers) {
  auto* const high = static_cast<uint16_t*>(upper.mutable_data_ptr());
  auto* const low = static_cast<uint16_t*>(lower.mutable_data_ptr());
  const auto* const bits = static_cast<const uint32_t*>(numbers.const_data_ptr());
  over_halves(upper, [=](int64_t i) { high[i] = bits[i] >> 16, low[i] = bits[i]; });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor targets, Tensor weights, float z_loss, "
      "float label_smoothing) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor targets, Tensor denominators, "
      "float z_loss, float label_smoothing) -> Tensor");
  m.def(
      "linear_cross_entropy_add_(Tensor logits, Tensor targets, Tensor(a!) sums, int first, "
      "float label_smoothing) -> ()");
  m.def(
      "linear_cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor denominators, "
      "Tensor dlosses, int first, int num_classes, float z_loss, float label_smoothing) -> ()");
  m.def("join_halves(Tensor upper, Tensor lower, Tensor(a!) numbers) -> ()");
  m.def("split_halves(Tensor(a!) upper, Tensor(b!) lower, Tensor numbers) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_bwd));
  m.impl("linear_cross_entropy_add_", TORCH_BOX(&add_block_));
  m.impl("linear_cross_entropy_gradient_", TORCH_BOX(&block_gradient_));
  m.impl("join_halves", TORCH_BOX(&join_halves));
  m.impl("split_halves", TORCH_BOX(&split_halves));
}

}  // namespace emu3
