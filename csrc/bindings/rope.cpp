#include "../cpu/rope.h"

#include <optional>
#include <tuple>

#include "torch_stable.h"

namespace emu3 {
namespace {

void check_positions(const std::optional<Tensor>& positions, int64_t batch, int64_t tokens,
                     int64_t longest) {
  if (!positions) {
    STD_TORCH_CHECK(tokens <= longest, "rope: positions must lie in [0, ", longest, "), got 0 … ",
                    tokens - 1);
    return;
  }
  const auto* const from = static_cast<const int64_t*>(positions->const_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t position = from[b * positions->stride(0) + t * positions->stride(1)];
      STD_TORCH_CHECK(0 <= position && position < longest, "rope: positions must lie in [0, ",
                      longest, "), got ", position);
    }
}

Heads heads(const Tensor& from, const Tensor& to) {
  return {from.const_data_ptr(), to.mutable_data_ptr(), from.size(2),
          from.stride(0),        from.stride(1),        from.stride(2)};
}

// q [B, T, H, K] and k [B, T, G, K] with unit stride in K; tables with unit stride in K/2.
std::tuple<Tensor, Tensor> rotate(const Tensor& q, const Tensor& k, const Tensor& cos,
                                  const Tensor& sin, const std::optional<Tensor>& positions,
                                  bool inverse) {
  const int64_t batch = q.size(0), tokens = q.size(1), width = q.size(3);
  check_positions(positions, batch, tokens, cos.size(0));
  Tensor q_out = torch::stable::new_empty(q, {batch, tokens, q.size(2), width});
  Tensor k_out = torch::stable::new_empty(k, {batch, tokens, k.size(2), width});
  const RopeCall call{
      .dtype = dtype_of(q),
      .inverse = inverse,
      .past_caches = past_caches(q_out),
      .tokens = tokens,
      .width = width,
      .cos = static_cast<const float*>(cos.const_data_ptr()),
      .sin = static_cast<const float*>(sin.const_data_ptr()),
      .cos_stride = cos.stride(0),
      .sin_stride = sin.stride(0),
      .positions = positions ? static_cast<const int64_t*>(positions->const_data_ptr()) : nullptr,
      .positions_batch_stride = positions ? positions->stride(0) : 0,
      .positions_token_stride = positions ? positions->stride(1) : 0,
      .q = heads(q, q_out),
      .k = heads(k, k_out),
  };
  const int64_t grain = row_grain((q.size(2) + k.size(2)) * width);
  torch::stable::parallel_for(0, batch * tokens, grain,
                              [&](int64_t begin, int64_t end) { rope().rotate(call, begin, end); });
  return {q_out, k_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool inverse) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) { m.impl("rope", TORCH_BOX(&rotate)); }

}  // namespace emu3
