#include "cpu/sampling/sample_guided.h"

#include <optional>

#include "bindings/torch_stable.h"

namespace emu3 {
namespace {

// cond and uncond [batch, length, num_codes] have unit stride in codes; seeds [batch] and
// places [batch, length] are contiguous int64.
Tensor sample(const Tensor& cond, const std::optional<Tensor>& uncond, const Tensor& seeds,
              const Tensor& places, double guidance, int64_t top_k, double top_p,
              double temperature, int64_t num) {
  const int64_t batch = cond.size(0), length = cond.size(1), num_codes = cond.size(2);
  Tensor codes = empty(places, {batch, length, num});
  const SampleSettings settings{static_cast<float>(guidance), top_k, top_p,
                                static_cast<float>(temperature), num};
  const Dtype dtype = dtype_of(cond);
  const auto* seed = static_cast<const uint64_t*>(seeds.const_data_ptr());
  const auto* place = static_cast<const int64_t*>(places.const_data_ptr());
  auto* out = static_cast<int64_t*>(codes.mutable_data_ptr());
  const auto row_of = [&](const Tensor& logits, int64_t row) {
    return at(logits, row / length * logits.stride(0) + row % length * logits.stride(1));
  };
  torch::stable::parallel_for(
      0, batch * length, row_grain(num_codes), [&](int64_t begin, int64_t end) {
        const auto scratch = uninitialised(sample_guided_scratch(num_codes));
        for (int64_t row = begin; row < end; ++row)
          sample_guided().row(dtype, row_of(cond, row), uncond ? row_of(*uncond, row) : nullptr,
                              num_codes, seed[row / length], place[row], settings,
                              reinterpret_cast<int32_t*>(scratch.get()), out + row * num);
      });
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emu3_kernels, m) {
  m.def(
      "sample_guided(Tensor cond, Tensor? uncond, Tensor seeds, Tensor places, float guidance,"
      " int top_k, float top_p, float temperature, int num) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(emu3_kernels, CPU, m) { m.impl("sample_guided", TORCH_BOX(&sample)); }

}  // namespace emu3
